"""Masked-Diffuse LM against counts by hand, increments of noise step by step, and a perfect network."""

import math
from collections import Counter

import pytest
import torch

from lossary.diffusion import SoftMaskedNoise, categorical_denoising_loss, soft_masked_sample, word_importance


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_importance_by_counting():
    corpus = ["a b a c".split(), "a d d b".split(), "a c c d".split()]
    count = Counter(w for s in corpus for w in s)
    p = {w: n / 12 for w, n in count.items()}
    df = {w: sum(w in s for s in corpus) / 3 for w in count}
    letters = sorted(count)
    tokens = torch.tensor([[letters.index(w) for w in s] for s in corpus])
    found = word_importance(
        tokens,
        frequency=torch.tensor([p[w] for w in letters], dtype=torch.float64),
        document_frequency=torch.tensor([df[w] for w in letters], dtype=torch.float64),
    )
    for row, s in zip(found.tolist(), corpus):
        tfidf = [s.count(w) * math.log(1 / df[w]) for w in s]
        entropy = [-p[w] * math.log(p[w]) for w in s]
        expected = [a / sum(tfidf) + b / sum(entropy) for a, b in zip(tfidf, entropy)]
        assert row == pytest.approx(expected)
    everywhere = word_importance(tokens[:1, :1], frequency=torch.ones(4), document_frequency=torch.ones(4))
    assert everywhere.tolist() == [[0.0]]


def test_buckets_are_ranks():
    noise = SoftMaskedNoise(buckets=3)
    assert noise.bucket(torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2])).tolist() == [2, 0, 1, 1, 0, 2]
    assert noise.bucket(torch.zeros(2, 4)).tolist() == [[0, 0, 1, 2]] * 2
    assert SoftMaskedNoise(buckets=1).bucket(torch.rand(5)).tolist() == [0] * 5


@pytest.mark.parametrize("literal", [False, True])
def test_closed_form_is_the_increments_one_by_one(literal):
    """x_{k+1} = sqrt(1 - beta_k) x_k + sqrt(beta_k) noise for the words of the bucket whose turn it is."""
    m, n = 2, 40
    noise, importance = SoftMaskedNoise(buckets=m, literal=literal), torch.tensor([0.2, 0.8], dtype=torch.float64)

    def abar(u):
        return max(1 - math.sqrt(u + 1e-4), 1e-5)

    kept = [1.0, 1.0]  # of the less and the more important word
    for k in range(n):
        bucket = k * m // n
        word = 1 - bucket
        u, v = (k / n, (k + 1) / n) if literal else (k * m / n - bucket, (k + 1) * m / n - bucket)
        before = 1.0 if not literal and u == 0 else abar(u)
        kept[word] *= abar(v) / before
        found = noise.kept(importance, torch.tensor((k + 1) / n, dtype=torch.float64))
        assert found.tolist() == pytest.approx(kept, rel=1e-6, abs=1e-12)
    assert noise.kept(importance, torch.tensor(0.0, dtype=torch.float64)).tolist() == [1.0, 1.0]


def test_noised_has_each_word_s_own_alpha():
    noise, importance = SoftMaskedNoise(buckets=2), torch.tensor([[0.2, 0.8]]).repeat(50_000, 1)
    clean = torch.tensor([[[2.0], [2.0]]]).repeat(50_000, 1, 1)
    t = torch.full((50_000,), 0.25)
    x = noise.noised(clean, importance, t, torch.randn(clean.shape, generator=rng()))[..., 0]
    kept = 1 - math.sqrt(0.5 + 1e-4)
    assert torch.equal(x[:, 0], clean[:, 0, 0])
    assert x[:, 1].mean().item() == pytest.approx(2 * math.sqrt(kept), abs=0.01)
    assert x[:, 1].var().item() == pytest.approx(1 - kept, rel=0.02)


def test_samples_with_the_perfect_network_have_the_law_of_the_pairs():
    """Two words out of two: 00 and 11 often, so that the second drawn has to follow the first."""
    pairs = torch.tensor([[0.4, 0.1], [0.05, 0.45]])
    table = torch.tensor([[1.0], [-1.0]])
    noise = SoftMaskedNoise(buckets=2)
    rank = torch.tensor([0.9, 0.1])  # the first word is the more important one

    def predict(x, t):
        kept = noise.kept(rank.expand(len(x), 2), t)
        gap = (x - kept[..., None].sqrt() * table[:, 0]) ** 2  # (n, 2, words)
        fit = torch.exp(-gap / (2 * (1 - kept[..., None]).clamp(min=1e-4)))
        joint = pairs * fit[:, 0, :, None] * fit[:, 1, None, :]
        return torch.stack([joint.sum(2), joint.sum(1)], dim=1).clamp(min=1e-30).log()

    calls = []
    found = soft_masked_sample(
        lambda x, t: calls.append(t[0].item()) or predict(x, t),
        lambda w: table[w],
        lambda w: rank.expand(w.shape),
        torch.randn(20_000, 2, 1, generator=rng()),
        noise=noise,
        steps=40,
        generator=rng(1),
    )
    share = torch.bincount(2 * found[:, 0] + found[:, 1], minlength=4) / 20_000
    torch.testing.assert_close(share, pairs.flatten(), atol=0.02, rtol=0)
    assert calls == pytest.approx([1 - k / 40 for k in range(40)])


def test_the_loss_is_cross_entropy_of_what_is_present():
    logits = torch.randn(2, 3, 4, generator=rng(), dtype=torch.float64)
    target, present = torch.tensor([[1, 0, 3], [2, 2, 1]]), torch.tensor([[True, True, False], [False] * 3])
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = -(p[0, 0, 1].log() + p[0, 1, 0].log()) / 2
    found = categorical_denoising_loss(logits, target, present=present)
    assert found.tolist() == pytest.approx([expected.item(), 0.0])
    assert categorical_denoising_loss(logits, target)[1].item() == pytest.approx(
        -(p[1, 0, 2] * p[1, 1, 2] * p[1, 2, 1]).log().item() / 3
    )


def test_refusals():
    noise = SoftMaskedNoise()
    with pytest.raises(ValueError, match="buckets"):
        SoftMaskedNoise(buckets=0)
    with pytest.raises(ValueError, match="t:"):
        noise.kept(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="document_frequency"):
        word_importance(torch.zeros(1, 2).long(), frequency=torch.ones(3), document_frequency=torch.ones(2))
    with pytest.raises(ValueError, match="present"):
        categorical_denoising_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), present=torch.ones(1, 2))
    with pytest.raises(ValueError, match="steps"):
        soft_masked_sample(None, None, None, torch.zeros(1, 2, 1), noise=noise, steps=0)
