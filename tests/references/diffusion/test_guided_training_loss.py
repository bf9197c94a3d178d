"""Guided training loss: the formula in noises, its exact optimum over free predictions, and a diffusers network."""

import pytest
import torch

from lossary.diffusion import effective_guidance_scale, guided_noise_loss
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._process import tabulated, variance_preserving


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("detach", [False, True])
def test_the_formula_in_noises(detach):
    """Of a network that predicts noise, under a process that shrinks data."""
    process = variance_preserving()
    weight = torch.randn(3, 4, 4, generator=rng(), dtype=torch.float64).requires_grad_()

    class Net(torch.nn.Module):
        def forward(self, x, t, c):
            return x @ weight[2 if c is None else c] + t[:, None].sin()

    g = rng(1)
    clean, noise = torch.randn(2, 5, 4, generator=g, dtype=torch.float64).unbind()
    t = torch.rand(5, generator=g, dtype=torch.float64) * 0.8 + 0.1
    w = torch.rand(5, generator=g, dtype=torch.float64) * 3
    x_t = process.alpha(t)[:, None] * clean + process.sigma(t)[:, None] * noise
    cond, uncond = Net()(x_t, t, 1), Net()(x_t, t, None)
    base = uncond.detach() if detach else uncond
    guided = (1 + w)[:, None] * cond - w[:, None] * base
    expected = ((noise - guided) ** 2).mean(1) + 0.3 * ((noise - uncond) ** 2).mean(1)
    got = guided_noise_loss(
        Denoiser(Net(), process),
        clean,
        process.ratio(t),
        noise,
        1,
        w=w,
        uncond_weight=0.3,
        detach_uncond=detach,
    )
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad(v.sum(), weight, retain_graph=True)[0] for v in (got, expected)]
    torch.testing.assert_close(*slopes)
    assert slopes[0][1].abs().min() > 0
    assert (slopes[0][0] == 0).all()


@pytest.mark.parametrize(
    ("trained", "uncond_weight"), [(0.0, 0.1), (1.0, 0.1), (3.0, 2.0), ((0.0, 4.0), 0.0), ((1.0, 2.0), 0.5)]
)
def test_the_optimum_is_rescaled_guidance(trained, uncond_weight):
    """Six points in three classes seen at one noisy x: minimise the expected loss over all predictions there."""
    points = torch.randn(6, 2, generator=rng(), dtype=torch.float64)
    prior = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    x, sigma = torch.tensor([0.3, -0.4], dtype=torch.float64), 0.9
    weight = prior * (-(x - points).square().sum(1) / (2 * sigma**2)).exp()
    weight = weight / weight.sum()
    if isinstance(trained, tuple):  # Gauss-Legendre integrates squares exactly
        low, high = trained
        half = (high - low) / 2
        strengths = [low + half - half / 3**0.5, low + half + half / 3**0.5]
    else:
        strengths = [trained]
    free = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)  # of classes 0, 1, 2 and of none

    def expected_loss(table):
        total = 0.0
        for i, point in enumerate(points):
            for w in strengths:
                value = guided_noise_loss(
                    lambda x, s, c: table[3 if c is None else c].expand_as(x),
                    point[None],
                    torch.full((1,), sigma, dtype=torch.float64),
                    ((x - point) / sigma)[None],
                    i // 2,
                    w=w,
                    uncond_weight=uncond_weight,
                )
                total = total + weight[i] * value.sum() / len(strengths)
        return total

    gradient = torch.autograd.grad(expected_loss(free), free)[0].flatten()
    hessian = torch.autograd.functional.hessian(expected_loss, free.detach()).reshape(8, 8)
    best = torch.linalg.solve(hessian, -gradient).view(4, 2)  # it is quadratic

    uncond = weight @ points
    for c in range(3):
        share = weight[2 * c : 2 * c + 2]
        cond = share @ points[2 * c : 2 * c + 2] / share.sum()
        for w in (0.0, 1.0, 5.0):
            guided = (1 + w) * best[c] - w * best[3]
            scale = effective_guidance_scale(w, trained=trained)
            torch.testing.assert_close(guided, uncond + scale * (cond - uncond))
    torch.testing.assert_close(best[3], uncond)


def test_without_the_second_term_only_the_combination_is_determined():
    clean, noise, sigma = torch.zeros(1, 2), torch.randn(1, 2, generator=rng()), torch.ones(1)
    losses = []
    for shift in (0.0, 5.0):  # w = 2: shift the one by h, the other by 1.5 h
        table = {"c": torch.full((1, 2), 0.3 + shift), None: torch.full((1, 2), -0.2 + 1.5 * shift)}
        losses.append(
            [
                guided_noise_loss(lambda x, s, c, t=table: t[c], clean, sigma, noise, "c", w=2.0, uncond_weight=u)
                for u in (0.0, 0.1)
            ]
        )
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert losses[1][1].item() > losses[0][1].item() + 1


def test_a_uniform_w_by_simulation():
    v = 1 + 1 + 3 * torch.rand(1_000_000, generator=rng(), dtype=torch.float64)  # 1 + U(1, 4)
    expected = (3 * v.mean() / v.square().mean()).item()
    assert effective_guidance_scale(2.0, trained=(1.0, 4.0)) == pytest.approx(expected, rel=2e-3)


def test_a_diffusers_network_and_scheduler():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=4,
    )
    scheduler = diffusers.DDPMScheduler()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t, c):
            return self.unet(x, t.round(), class_labels=c).sample

    process = tabulated(scheduler.alphas_cumprod)
    clean, noise = torch.randn(2, 3, 1, 8, 8, generator=rng())
    step, label, none = torch.tensor([3, 400, 900]), torch.tensor([0, 1, 2]), torch.full((3,), 3)
    sigma = process.ratio(step.double()).float()
    got = guided_noise_loss(Denoiser(Net(), process), clean, sigma, noise, label, null=none, w=1.5)
    noisy = scheduler.add_noise(clean, noise, step)
    cond, uncond = (unet(noisy, step, class_labels=c).sample for c in (label, none))
    expected = (noise - (2.5 * cond - 1.5 * uncond)).square().mean((1, 2, 3))
    expected = expected + 0.1 * (noise - uncond).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)
    got.mean().backward()


def test_refusals():
    x, s = torch.zeros(2, 3), torch.ones(2)

    def run(**named):
        return guided_noise_loss(lambda x, s, c: x, named.pop("clean", x), named.pop("sigma", s), x, None, **named)

    for call, message in (
        (lambda: run(clean=torch.zeros(2, 4)), "noise: expected shape"),
        (lambda: run(sigma=torch.ones(3)), "sigma: expected shape"),
        (lambda: run(w=torch.ones(3)), "w: expected shape"),
        (lambda: run(w=float("nan")), "w: expected a finite number"),
        (lambda: run(uncond_weight=-1.0), "uncond_weight: expected a number >= 0"),
        (lambda: effective_guidance_scale(1.0, trained=-1.0), "trained: expected a number > -1"),
        (lambda: effective_guidance_scale(1.0, trained=(2.0, 1.0)), "trained: expected a number >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
