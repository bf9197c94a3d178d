"""T2I-Zero, against loops over numbers, scipy's blur, and a diffusers network and layer."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lossary.diffusion import CrossTokenNMSAttnProcessor, correct_by_similarities, cross_token_nms


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(f, concepts, window, threshold, strength, per_dimension=False):
    """The algorithm on lists, one number at a time."""
    n, d = len(f), len(f[0])
    out = [row[:] for row in f]
    for c in concepts:
        alike = [[f[c][k] * f[i][k] for k in range(d)] for i in range(n)]
        tops = [max(row[k] for row in alike) for k in range(d)]
        for k in range(d):
            top = tops[k] if per_dimension else max(tops)
            total = 0.0
            for i in range(n):
                if abs(i - c) <= window and alike[i][k] > threshold * top:
                    total += alike[i][k] / top * f[i][k]
            out[c][k] = (1 - strength) * f[c][k] + strength * total
    return out


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize(("window", "threshold", "strength"), [(2, 0.1, 0.5), (0, 0.0, 1.0), (9, 0.4, 0.3)])
def test_correction_by_hand(window, threshold, strength, per_dimension):
    f = torch.randn(6, 5, generator=rng(), dtype=torch.float64)
    hyper = {"window": window, "threshold": threshold, "strength": strength, "per_dimension": per_dimension}
    found = correct_by_similarities(f, [1, 5, 2], **hyper)
    torch.testing.assert_close(found, torch.tensor(by_hand(f.tolist(), [1, 5, 2], **hyper), dtype=torch.float64))
    pair = torch.stack([f, -3 * f.flip(0)])
    batched = correct_by_similarities(pair, [1, 5, 2], **hyper)
    torch.testing.assert_close(batched[0], found)
    torch.testing.assert_close(batched[1], correct_by_similarities(pair[1], [1, 5, 2], **hyper))


def test_a_massive_dimension_hides_all_others_unless_each_has_a_largest_of_its_own():
    """Seven tokens with 30 in dimension 0, as CLIP's last states have it, and the rest of ordinary size."""
    f = torch.randn(7, 5, generator=rng(), dtype=torch.float64)
    f[:, 0] = 30
    hidden = correct_by_similarities(f, [3])[3]
    assert hidden[0].item() == pytest.approx(90)  # (1 - 0.5) 30 + 0.5 * 5 * 30
    torch.testing.assert_close(hidden[1:], 0.5 * f[3, 1:])
    seen = correct_by_similarities(f, [3], per_dimension=True)[3]
    without = correct_by_similarities(f[:, 1:], [3], per_dimension=True)[3]
    torch.testing.assert_close(seen[1:], without)
    assert ((without - 0.5 * f[3, 1:]).abs() > 0.01).all()
    assert seen[0].item() == pytest.approx(90)  # shared by all: still added up
    alone = correct_by_similarities(f, [3], per_dimension=True, window=0)[3]
    assert alone[0].item() == pytest.approx(30)


def test_what_stays():
    f = torch.randn(4, 5, generator=rng())
    assert torch.equal(correct_by_similarities(f, []), f)
    torch.testing.assert_close(correct_by_similarities(f, [0, 3], strength=0.0), f)
    f[2] = 0
    assert correct_by_similarities(f, [2])[2].tolist() == [0] * 5  # alike to nothing
    assert torch.autograd.gradcheck(lambda x: correct_by_similarities(x, [0, 3]), (f.double().requires_grad_(),))


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 1.0), (5, 0.7), (1, 1.0)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_winner_is_that_of_scipys_blur(kernel, sigma, shared):
    a = torch.rand(2, 3, 6, 5, 7, generator=rng(), dtype=torch.float64)
    concepts = [4, 1, 6]
    found = cross_token_nms(a, concepts, kernel=kernel, sigma=sigma, shared=shared)
    for b in range(2):
        heads = a[b].numpy()
        blurred = np.array(
            [[gaussian_filter(h[..., c], sigma, radius=kernel // 2, mode="nearest") for c in concepts] for h in heads]
        )
        if shared:
            blurred = np.broadcast_to(blurred.mean(0), blurred.shape)
        expected = heads.copy()
        for h, k in np.ndindex(3, 3):
            expected[h, ..., concepts[k]] *= blurred[h].argmax(0) == k
        torch.testing.assert_close(found[b], torch.from_numpy(expected))
    survivors = (found[..., concepts] > 0).sum(-1)
    assert survivors.unique().tolist() == [1]
    if shared:
        assert ((found > 0) == (found > 0)[:, :1]).all()


def test_blurring_decides():
    """One bright pixel of concept 1 on the ground of concept 0: as it is it wins, blurred it loses."""
    a = torch.zeros(5, 5, 2)
    a[..., 0], a[2, 2, 1] = 0.5, 0.6
    assert cross_token_nms(a, [0, 1], kernel=1)[2, 2].tolist() == pytest.approx([0, 0.6])
    assert cross_token_nms(a, [0, 1])[2, 2].tolist() == pytest.approx([0.5, 0])
    ties = torch.full((1, 1, 3), 0.3)
    assert cross_token_nms(ties, [2, 0])[0, 0].tolist() == pytest.approx([0, 0.3, 0.3])
    assert torch.equal(cross_token_nms(a, [1]), a)


def test_the_processor_in_a_diffusers_network_and_layer():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    x, prompt = torch.randn(1, 4, 4, 16, generator=rng()).repeat(4, 1, 1, 1), torch.randn(4, 5, 12, generator=rng(1))
    with torch.no_grad():
        expected = unet(x, 10, prompt).sample
        processor = CrossTokenNMSAttnProcessor([1, 3], aspect=0.25)
        unet.set_attn_processor(processor)
        found = unet(x, 10, prompt).sample
        torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-4)
        assert (found[2:] - expected[2:]).abs().amax((1, 2, 3)).min() > 1e-4
        processor.active = False
        torch.testing.assert_close(unet(x, 10, prompt).sample, expected, atol=1e-5, rtol=1e-4)

        layer = diffusers.models.attention_processor.Attention(6, cross_attention_dim=4, heads=2, dim_head=3)
        layer.set_processor(CrossTokenNMSAttnProcessor([0, 2], aspect=0.5, guided=False))
        x, prompt = torch.randn(1, 8, 6, generator=rng()), torch.randn(1, 3, 4, generator=rng(1))
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            maps = (layer.to_q(x)[0, :, head] @ layer.to_k(prompt)[0, :, head].T / math.sqrt(3)).softmax(-1)
            kept = cross_token_nms(maps.view(2, 4, 3), [0, 2]).view(8, 3)
            heads.append(kept @ layer.to_v(prompt)[0, :, head])
        torch.testing.assert_close(layer(x, encoder_hidden_states=prompt)[0], layer.to_out[0](torch.cat(heads, -1)))
        with pytest.raises(ValueError, match="aspect: 6 pixels have no height over width"):
            layer(x[:, :6], encoder_hidden_states=prompt)


def test_refusals():
    f, a = torch.zeros(3, 4), torch.zeros(2, 2, 3)
    for call, message in (
        (lambda: correct_by_similarities(f, [3]), "concepts: expected a whole number >= 0 and <= 2"),
        (lambda: correct_by_similarities(f, [-1]), "concepts: expected a whole number"),
        (lambda: correct_by_similarities(f.long(), [0]), "embeddings: expected a floating"),
        (lambda: correct_by_similarities(f, [0], threshold=1.0), "threshold: expected a number"),
        (lambda: correct_by_similarities(f, [0], window=-1), "window: expected a whole number >= 0"),
        (lambda: correct_by_similarities(f, [0], strength=-0.1), "strength: expected a number >= 0"),
        (lambda: cross_token_nms(a, [0, 3]), "concepts: expected a whole number"),
        (lambda: cross_token_nms(a, [0, 1], kernel=2), "kernel: expected an odd whole number"),
        (lambda: cross_token_nms(a, [0, 1], sigma=0.0), "sigma: expected a number > 0"),
        (lambda: cross_token_nms(a, [0, 1], shared=True), "attention: expected at least 4 dimensions"),
        (lambda: CrossTokenNMSAttnProcessor([0], aspect=0.0), "aspect: expected a number > 0"),
        (lambda: correct_by_similarities(f, [2, 2]), r"concepts: expected no position twice, got \[2, 2\]"),
        (lambda: cross_token_nms(a, [1, 1]), r"concepts: expected no position twice, got \[1, 1\]"),
        (lambda: cross_token_nms(a, [0, 1], kernel=3.0), "kernel: expected a whole number, got 3.0"),
        (lambda: cross_token_nms(a, [0, 1], kernel=-1), "kernel: expected a whole number >= 1"),
        (lambda: CrossTokenNMSAttnProcessor([1, 1]), "concepts: expected no position twice"),
        (lambda: CrossTokenNMSAttnProcessor([-1]), "concepts: expected a whole number >= 0"),
        (lambda: CrossTokenNMSAttnProcessor([0, 1], kernel=4), "kernel: expected an odd whole number"),
        (lambda: CrossTokenNMSAttnProcessor([0, 1], sigma=-1.0), "sigma: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
