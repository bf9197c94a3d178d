"""DiffFashion: the mask and the loss by loops, the sampler as the official loop has it in its own coordinates, scipy's
square roots for colours, and a class-conditional diffusers network."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import inv, sqrtm

from lossary.diffusion import (
    StructureAppearanceLoss,
    label_contrast_mask,
    match_colours,
    structure_appearance_guidance,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._process import tabulated


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_label(x, sigma, label):
    return torch.tanh(x * (1 + label.view(-1, 1, 1, 1)) / (1 + sigma))


@pytest.mark.parametrize("threshold", [-0.2, 0.5])
def test_the_mask_by_hand(threshold):
    x = torch.randn(2, 3, 4, 5, generator=rng(), dtype=torch.float64)
    label, contrast = torch.tensor([0, 2]), torch.tensor([[1, 3, 2], [0, 1, 1]])
    found = label_contrast_mask(by_label, x, 0.7, label, contrast, threshold=threshold)
    for b in range(2):
        own = by_label(x[b : b + 1], 0.7, label[b : b + 1])[0]
        others = sum(by_label(x[b : b + 1], 0.7, c.view(1))[0] for c in contrast[b]) / 3
        values = [sum((own - others)[c, i, j].item() ** 2 for c in range(3)) for i in range(4) for j in range(5)]
        mean = sum(values) / 20
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 19)
        expected = [(v - mean) / spread > threshold for v in values]
        assert found[b, 0].flatten().tolist() == expected
    pair = torch.tensor([[[[0.0, 3.0]]]])  # z is 1 / sqrt(2) with n - 1 in the variance
    marked = [label_contrast_mask(by_label, pair, 0.7, label[:1], contrast[:1], threshold=z) for z in (0.7, 0.71)]
    assert [m.flatten().tolist() for m in marked] == [[False, True], [False, False]]


def features(x):
    keys = torch.stack([x[:, 0] + x[:, 1], x[:, 1] * x[:, 2], x[:, 2].sin()], -1).flatten(1, 2)
    return keys, torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3)), x[:, 0, 0, 0]], -1)


def pictures(n):
    return 0.6 * torch.randn(n, 2, 3, 2, 3, generator=rng(), dtype=torch.float64)


def alone(**weight):
    return dict.fromkeys(("structure", "contrast", "summary", "pixels", "range", "change"), 0.0) | weight


def test_each_term_by_hand():
    x, clean, source, reference, previous = pictures(5)
    mask = (torch.rand(2, 1, 2, 3, generator=rng(1)) < 0.5).double()

    def value(mask=mask, **weight):
        loss = StructureAppearanceLoss(features, source, reference, mask, **alone(**weight))
        return loss(x, 2 * clean, previous)

    keys, goals = features(x)[0], features(source)[0]
    for b in range(2):
        cosine = F.cosine_similarity
        own, goal = ([[cosine(p, q, dim=0) for q in k[b]] for p in k[b]] for k in (keys, goals))
        apart = [(own[i][j] - goal[i][j]) ** 2 for i in range(6) for j in range(6)]
        assert value(structure=2.0)[b].item() == pytest.approx(2 * sum(apart).item() / 36)
        total = 0.0
        for i in range(6):
            odds = [math.exp(cosine(keys[b, i], goals[b, j], dim=0).item() / 0.07) for j in range(6)]
            total -= math.log(odds[i] / sum(odds))
        assert value(contrast=2.0)[b].item() == pytest.approx(2 * total / 6)
        dark = torch.where(mask[b] > 0, x[b], -1.0)
        for inside, picture in ((mask, dark), (None, x[b])):
            apart = (features(picture[None])[1] - features(reference[b : b + 1])[1]).square().mean().item()
            assert value(mask=inside, summary=2.0)[b].item() == pytest.approx(2 * apart)
        assert value(pixels=2.0)[b].item() == pytest.approx(2 * (x - reference)[b].square().mean().item())
        beyond = [max(0.0, abs(v) - 1) ** 2 for v in (2 * clean[b]).flatten().tolist()]
        assert value(range=2.0)[b].item() == pytest.approx(2 * sum(beyond) / 18)
        moved = (features(x)[1] - features(previous)[1])[b].square().mean().item()
        assert value(change=2.0)[b].item() == pytest.approx(-2 * moved)
    whole = StructureAppearanceLoss(features, source, reference, mask, strength=0.01)
    weights = {"structure": 1000, "contrast": 200, "summary": 200, "pixels": 3000, "range": 200, "change": 100}
    terms = {name: value(**{name: float(w)}) for name, w in weights.items()}
    torch.testing.assert_close(whole(x, 2 * clean, previous), 0.01 * sum(terms.values()))
    still = sum(v for name, v in terms.items() if name != "change")
    torch.testing.assert_close(whole(x, 2 * clean), 0.01 * still)


def test_the_sampler_as_a_variance_preserving_loop():
    """x_t of unit scale, posterior mean and variance from beta, as in guided diffusion."""
    source, reference = pictures(2)
    mask = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    mask[..., :2] = 1
    kept = torch.tensor([0.9, 0.7, 0.45, 0.2], dtype=torch.float64)  # alpha-bar, from the cleanest
    sigmas = torch.cat([((1 - kept) / kept).sqrt().flip(0), torch.zeros(1, dtype=torch.float64)])
    loss = StructureAppearanceLoss(features, source, reference, mask, strength=1e-3)

    def denoise(x, sigma):
        return torch.tanh(x / (1 + sigma**2))

    found = structure_appearance_guidance(denoise, loss, sigmas, restarts=3, pasted=1, changing=2, generator=rng(7))
    g = rng(7)

    def noise():
        return torch.randn(source.shape, generator=g, dtype=torch.float64)

    x, previous = kept[3].sqrt() * reference + (1 - kept[3]).sqrt() * noise(), source
    for step, i in enumerate((3, 2, 1, 0)):
        bar, before = kept[i], kept[i - 1] if i else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - bar / before
        variance = beta * (1 - before) / (1 - bar)
        for again in range(3 if step == 0 else 1):
            if again:
                x = (1 - beta).sqrt() * x + beta.sqrt() * noise()
            x = x.detach().requires_grad_()
            clean = denoise(x / bar.sqrt(), ((1 - bar) / bar).sqrt())
            f = (1 - bar).sqrt()
            seen = f * clean + (1 - f) * x
            (slope,) = torch.autograd.grad(loss(seen, clean, previous if step < 2 else None).sum(), x)
            mean = before.sqrt() * beta / (1 - bar) * clean + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
            previous = seen.detach()
            x = (mean - variance * slope).detach()
            x = x + variance.sqrt() * noise() if i else x
        if step == 1:
            x = mask * x + (1 - mask) * (before.sqrt() * source + (1 - before).sqrt() * noise())
    torch.testing.assert_close(found, x)


def test_defaults_are_those_of_the_official_loop():
    """It counts t from 119 down, repeats the first 10 times, pastes at 84 to 118 and moves away while t > 100."""
    evaluated, pasted, changing = [], [], []
    source, reference = pictures(2)

    class Watched(StructureAppearanceLoss):
        def __call__(self, x, clean, previous=None):
            changing.append(previous is not None)
            return super().__call__(x, clean, previous)

    def denoise(x, sigma):
        evaluated.append(round(sigma) - 1)
        if len(evaluated) > 10:  # with a mask of nothing a paste leaves the source, plus noise, everywhere
            pasted.append((x - source).square().mean().sqrt().item() < 2 * sigma)
        return 0 * x + 1e6

    loss = Watched(features, source, reference, torch.zeros(2, 1, 2, 3), **alone())
    structure_appearance_guidance(denoise, loss, torch.arange(120.0, -1, -1).double(), generator=rng())
    assert evaluated == [119] * 9 + list(range(119, -1, -1))
    assert [t for t, seen in zip(evaluated, changing) if seen] == [119] * 9 + list(range(119, 100, -1))
    after_steps = list(range(119, 0, -1))  # what a step leaves, the next one sees
    assert [t for t, seen in zip(after_steps, pasted, strict=True) if seen] == list(range(118, 83, -1))


def test_without_weights_it_is_plain_sampling_and_without_a_mask_nothing_is_pasted():
    source, reference = pictures(2)
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    quiet = {"restarts": 1, "generator": rng(3)}
    loss = StructureAppearanceLoss(features, source, reference, **alone())
    found = structure_appearance_guidance(lambda x, sigma: 0 * x + 0.3, loss, sigmas, **quiet)
    torch.testing.assert_close(found, torch.full_like(found, 0.3))
    assert not found.requires_grad


def test_colours_by_scipy():
    x, reference = (torch.randn(2, 3, 6, 6, generator=rng(s), dtype=torch.float64) for s in (0, 1))
    x[:, 0] += 0.8 * x[:, 1]
    reference = 0.5 * reference + reference.roll(1, 1) + 0.2
    found = match_colours(x, reference[..., :5])
    for b in range(2):
        own, other = x[b].flatten(1).numpy(), reference[b, ..., :5].flatten(1)
        spread, wanted = np.cov(own, bias=True), np.cov(other.numpy(), bias=True)
        root = sqrtm(spread)
        matrix = inv(root) @ sqrtm(root @ wanted @ root) @ inv(root)
        expected = matrix @ (own - own.mean(1, keepdims=True)) + other.numpy().mean(1, keepdims=True)
        torch.testing.assert_close(found[b].flatten(1), torch.from_numpy(expected))
        torch.testing.assert_close(found[b].flatten(1).cov(correction=0), torch.from_numpy(wanted))
    constant = match_colours(torch.zeros(1, 3, 2, 2), torch.rand(1, 3, 2, 2, generator=rng()))
    assert constant.isfinite().all()
    assert constant.std((2, 3)).max() < 1e-6


def test_a_diffusers_network_with_labels():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=5,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    table = diffusers.DDPMScheduler().alphas_cumprod

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t, label):
            return self.unet(x, t, label).sample

    denoise = Denoiser(Network(), tabulated(table), "noise")
    source, reference = torch.rand(2, 2, 3, 8, 8, generator=rng()).unbind()
    label = torch.tensor([1, 4])
    mask = label_contrast_mask(denoise, source, 1.0, label, torch.tensor([[0, 2], [3, 0]]))
    assert 0 < mask.sum() < mask.numel()
    loss = StructureAppearanceLoss(features, source, reference, mask, strength=0.01)
    sigmas = ((1 - table) / table).sqrt()[[600, 300, 0]].double()
    found = structure_appearance_guidance(
        lambda x, sigma: denoise(x, sigma, label), loss, sigmas, restarts=2, generator=rng(1)
    )
    assert found.isfinite().all()
    outside = ~mask.expand_as(found)  # pasted at the last, almost clean level
    torch.testing.assert_close(found[outside], source[outside], atol=0.1, rtol=0)


def test_refusals():
    x, label = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    loss = StructureAppearanceLoss(features, x, x)
    down = torch.tensor([1.0, 0.0])
    for call, message in (
        (lambda: label_contrast_mask(by_label, x, 1.0, label[:1], label[:, None]), "label: expected shape"),
        (lambda: label_contrast_mask(by_label, x, 1.0, label, label), "contrast: expected shape"),
        (lambda: label_contrast_mask(by_label, x, 1.0, label, label[:, None][:, :0]), "contrast: expected shape"),
        (lambda: StructureAppearanceLoss(features, x, x[:1]), "reference: expected shape"),
        (lambda: StructureAppearanceLoss(features, x, x, x), "mask: expected shape"),
        (lambda: StructureAppearanceLoss(features, x, x, pixels=-1.0), "pixels: expected a number >= 0"),
        (lambda: structure_appearance_guidance(None, loss, down.flip(0)), "sigmas: expected at least two falling"),
        (lambda: structure_appearance_guidance(None, loss, down, restarts=0), "restarts: expected a whole number"),
        (lambda: structure_appearance_guidance(None, loss, down, pasted=-1), "pasted: expected a whole number"),
        (lambda: match_colours(x, x[:, :2]), "reference: expected batch and channels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
