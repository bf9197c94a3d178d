"""CAMOUFLaGE: the guidance by hand and with exact Gaussians, attention over joined tokens, ranks counted, diffusers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.diffusion import (
    AnonymizingDenoiser,
    AttributeTokens,
    anonymization_guidance,
    attribute_agreement,
    decoupled_attention,
    reidentification_rate,
)
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import euler, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_guidance_by_hand():
    c, u, known = torch.randn(3, 4, 2, 3, generator=rng(), dtype=torch.float64).unbind()
    plain = anonymization_guidance(c, u, known, scale=3.0, repulsion=0.5, rescale=False)
    found = anonymization_guidance(c, u, known, scale=3.0, repulsion=0.5)
    for b in range(4):
        for i in range(2):
            for j in range(3):
                expected = -2 * u[b, i, j] + 3.5 * c[b, i, j] - 0.5 * known[b, i, j]
                assert plain[b, i, j].item() == pytest.approx(expected.item())
        norm = (3 * c[b] - 2 * u[b]).norm()
        torch.testing.assert_close(found[b], plain[b] * (norm / plain[b].norm()))
    same = anonymization_guidance(c, u, known, scale=3.0, repulsion=0.0)
    torch.testing.assert_close(same, u + 3 * (c - u))
    zero = anonymization_guidance(0 * c, 0 * c, 0 * c)
    assert (zero == 0).all()


def gaussian(mean, scale=1.0):
    return Mixture(torch.tensor([mean], dtype=torch.float64), scale).denoise


def test_samples_stay_away_from_the_original():
    """Controls leave N(0, I), the original is at (2, 0): its side empties, more so with a stronger push."""
    sigmas, start = karras_sigmas(30, high=20.0), 20 * torch.randn(2000, 2, generator=rng(), dtype=torch.float64)
    branches = gaussian([0.0, 0.0]), gaussian([0.0, 0.0]), gaussian([2.0, 0.0], 0.3)
    means = []
    for w in (0.0, 0.5, 1.0):
        denoise = AnonymizingDenoiser(*branches, scale=1.0, repulsion=w, lowest=0.5)
        means.append(euler(denoise, start, sigmas).mean(0))
    assert means[0].abs().max() < 0.1
    assert means[2][0] < means[1][0] - 0.1 < -0.3
    assert abs(means[2][1]) < 0.1


def test_the_denoiser_is_the_guidance_on_noise():
    x, sigma = torch.randn(5, 2, generator=rng(), dtype=torch.float64), 1.7
    branches = gaussian([1.0, 0.0]), gaussian([0.0, 1.0]), gaussian([2.0, 0.0], 0.3)
    c, u, known = ((x - denoise(x, sigma)) / sigma for denoise in branches)
    noise = anonymization_guidance(c, u, known, scale=2.0, repulsion=0.7)
    calls = []

    def counted(x, sigma):
        calls.append(sigma)
        return branches[2](x, sigma)

    denoise = AnonymizingDenoiser(*branches[:2], counted, scale=2.0, repulsion=0.7, lowest=1.7)
    torch.testing.assert_close(denoise(x, sigma), x - sigma * noise)
    plain = branches[1](x, 1.6) + 2 * (branches[0](x, 1.6) - branches[1](x, 1.6))
    torch.testing.assert_close(denoise(x, 1.6), plain)
    assert calls == [1.7]
    torch.testing.assert_close(denoise(x, torch.tensor(sigma, dtype=torch.float64)), x - sigma * noise)


def test_at_no_noise_nothing_is_pushed():
    branches = [lambda x, sigma, k=k: x + k for k in range(3)]
    denoise = AnonymizingDenoiser(*branches, scale=2.0, repulsion=1.0)
    assert denoise(torch.zeros(2, 1), 0.0).flatten().tolist() == [-1, -1]  # 1 + 2 (0 - 1)
    with pytest.raises(ValueError, match=r"sigma: expected one noise level for all, got shape \(2,\)"):
        denoise(torch.zeros(2, 1), torch.tensor([1.0, 2.0]))


def test_tokens_of_people():
    torch.manual_seed(0)
    module, x = AttributeTokens(5, 8, tokens=3), torch.randn(2, 4, 5, generator=rng())
    found = module(x)
    assert found.shape == (2, 12, 8)
    alone = module(x[:, 2:3])  # each person by itself
    torch.testing.assert_close(found[:, 6:9], alone)
    rows = module.project.weight[8:16] @ x[1, 2] + module.project.bias[8:16]
    torch.testing.assert_close(alone[1, 1], (rows - rows.mean()) / (rows.var(correction=0) + 1e-5).sqrt())


def test_decoupled_attention_by_hand():
    q, before = torch.randn(2, 2, 3, 4, 5, generator=rng(), dtype=torch.float64).unbind()
    k, v = torch.randn(2, 2, 3, 6, 5, generator=rng(1), dtype=torch.float64).unbind()
    present = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    found = decoupled_attention(before, q, k, v, present=present, scale=0.3)
    live = present[0]
    for h in range(3):
        weights = (q[0, h] @ k[0, h, live].T / math.sqrt(5)).exp()
        expected = before[0, h] + 0.3 * (weights / weights.sum(1, keepdim=True)) @ v[0, h, live]
        torch.testing.assert_close(found[0, h], expected)
    torch.testing.assert_close(found[1], before[1])  # nobody there
    q.requires_grad_()
    decoupled_attention(before, q, k, v, present=present).sum().backward()
    assert q.grad.isfinite().all()
    every = decoupled_attention(before, q, k, v)
    torch.testing.assert_close(every, decoupled_attention(before, q, k, v, present=torch.ones(2, 6).bool()))


def test_it_is_what_diffusers_adapter_computes():
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    layer = diffusers.Attention(6, cross_attention_dim=4, heads=2, dim_head=3)
    processor = diffusers.IPAdapterAttnProcessor2_0(6, 4, num_tokens=(8,), scale=0.6)
    x, text = torch.randn(2, 5, 6, generator=rng()), torch.randn(2, 3, 4, generator=rng(1))
    with torch.no_grad():
        people = AttributeTokens(7, 4)(torch.randn(2, 2, 7, generator=rng(2)))
        layer.set_processor(processor)
        expected = layer(x, encoder_hidden_states=(text, [people[:, None]]))

        def split(states):
            return states.unflatten(-1, (2, 3)).transpose(1, 2)

        q, k, v = split(layer.to_q(x)), split(layer.to_k(text)), split(layer.to_v(text))
        own = split(processor.to_k_ip[0](people)), split(processor.to_v_ip[0](people))
        joined = decoupled_attention(F.scaled_dot_product_attention(q, k, v), q, *own, scale=0.6)
        torch.testing.assert_close(layer.to_out[0](joined.transpose(1, 2).flatten(2)), expected)


def test_people_found_by_counting():
    probes, gallery = torch.randn(30, 4, generator=rng()), torch.randn(50, 4, generator=rng(1))
    who, theirs = torch.arange(30) % 7, torch.arange(50) % 9
    for top in (1, 3):
        hits = 0
        for p, i in zip(probes, who.tolist()):
            order = sorted(range(50), key=lambda m, p=p: -F.cosine_similarity(p, gallery[m], dim=0).item())
            hits += i in [theirs[m].item() for m in order[:top]]
        found = reidentification_rate(7 * probes, who, gallery, theirs, top=top)
        assert found.item() == pytest.approx(hits / 30)
    assert reidentification_rate(gallery, theirs, gallery, theirs) == 1


def test_attributes_that_agree():
    kept = attribute_agreement(
        lambda x: x.long(), torch.tensor([[1.0, 0], [2, 5], [3, 3]]), torch.tensor([[1, 1], [2, 5], [0, 3]])
    )
    assert kept.tolist() == pytest.approx([2 / 3, 2 / 3])


def test_refusals():
    x, who = torch.zeros(2, 3), torch.tensor([0, 1])
    module, four = AttributeTokens(3, 4), torch.zeros(1, 1, 2, 3)
    assert isinstance(module, nn.Module)
    for call, message in (
        (lambda: anonymization_guidance(x, x[:1], x), "unconditional: expected shape"),
        (lambda: anonymization_guidance(x, x, x[:1]), "identity: expected shape"),
        (lambda: anonymization_guidance(x, x, x, repulsion=-1.0), "repulsion: expected a number >= 0"),
        (lambda: AnonymizingDenoiser(None, None, None, lowest=-1.0), "lowest: expected a number >= 0"),
        (lambda: AttributeTokens(3, 4, tokens=0), "tokens: expected a whole number >= 1"),
        (lambda: module(torch.zeros(2, 2, 4)), "attributes: expected to end in 3"),
        (lambda: decoupled_attention(four, four, four, four[..., :2]), "value: expected shape"),
        (lambda: decoupled_attention(four, four, four[..., :2], four[..., :2]), "key: expected shape"),
        (lambda: decoupled_attention(four, four, four.repeat(1, 2, 1, 1), four), "key: expected shape"),
        (lambda: decoupled_attention(four, four, four.repeat(2, 1, 1, 1), four), "key: expected shape"),
        (lambda: decoupled_attention(four, four, four, four, present=who.bool()), "present: expected bool"),
        (lambda: reidentification_rate(x, who[:1], x, who), "identity: expected shape"),
        (lambda: reidentification_rate(x[:0], who[:0], x, who), "embeddings: expected"),
        (lambda: reidentification_rate(x, who, x, who, top=3), "top: expected a whole number"),
        (lambda: attribute_agreement(lambda x: who, x, who[:, None]), "classify: expected shape"),
        (lambda: attribute_agreement(lambda x: x, x, who), "attributes: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
