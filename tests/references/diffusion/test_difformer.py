"""Difformer against its formulas worked in numpy and against a perfect denoiser of embedded words."""

import math

import numpy as np
import pytest
import torch

from lossary.diffusion import (
    NormalizedEmbedding,
    decode_embeddings,
    embedding_diffusion_anchor_loss,
    noise_factor_process,
)
from lossary.diffusion._denoiser import Counted, Denoiser


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(vocabulary: int = 5, width: int = 3, **options) -> NormalizedEmbedding:
    return NormalizedEmbedding(torch.randn(vocabulary, width, generator=rng(), dtype=torch.float64), **options)


def test_embeddings_have_mean_0_and_one_length():
    embedding, tokens = words(), torch.tensor([[0, 3], [4, 4]])
    z = embedding(tokens)
    row = embedding.weight[3].detach().numpy() * math.sqrt(3)
    expected = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
    np.testing.assert_allclose(z[0, 1].detach().numpy(), expected, rtol=1e-9)
    raw = words(normalise=False)(tokens)
    np.testing.assert_allclose(raw[1, 0].detach().numpy(), math.sqrt(3) * words().weight[4].detach().numpy())
    np.testing.assert_allclose(
        embedding.logits(z)[1, 1].detach().numpy(), (embedding.weight @ z[1, 1]).detach().numpy(), rtol=1e-9
    )


@pytest.mark.parametrize("anchor", [True, False])
def test_the_loss_worked_out(anchor):
    embedding = words()
    target, present = torch.tensor([[1, 4, 2]]), torch.tensor([[True, True, False]])
    predicted = torch.randn(1, 3, 3, generator=rng(1), dtype=torch.float64)
    clean, table = embedding(target).detach().numpy()[0], embedding.weight.detach().numpy()
    total = 0.0
    for i in (0, 1):
        at = predicted[0, i].numpy() if anchor else clean[i]
        scores = table @ at
        log_p = scores - np.log(np.exp(scores).sum())
        smooth = np.full(5, 0.1 / 5)
        smooth[target[0, i]] += 0.9
        total += ((predicted[0, i].numpy() - clean[i]) ** 2).mean() - smooth @ log_p
    found = embedding_diffusion_anchor_loss(predicted, target, embedding=embedding, present=present, anchor=anchor)
    assert found.item() == pytest.approx(total / 2, rel=1e-9)


def test_gradients_reach_the_words_by_both_terms():
    embedding, target = words(), torch.tensor([[1, 2]])
    noise = torch.randn(1, 2, 3, generator=rng(1), dtype=torch.float64)
    embedding_diffusion_anchor_loss(embedding(target) + noise, target, embedding=embedding).sum().backward()
    both = embedding.weight.grad.clone()
    embedding.weight.grad = None
    log_p = embedding.logits(embedding(target) + noise).log_softmax(-1)
    (-(0.9 * log_p.gather(-1, target[..., None])[..., 0] + 0.1 * log_p.mean(-1)).mean()).backward()
    torch.testing.assert_close(both, embedding.weight.grad)  # the squared error of z + noise does not move the words
    assert both.abs().min() > 0


def test_a_stack_is_each_of_them():
    tables = torch.randn(2, 5, 3, generator=rng())
    target = torch.randint(5, (2, 4, 6), generator=rng())
    predicted = torch.randn(2, 4, 6, 3, generator=rng(1))
    stack = embedding_diffusion_anchor_loss(predicted, target, embedding=NormalizedEmbedding(tables))
    for s in range(2):
        one = embedding_diffusion_anchor_loss(predicted[s], target[s], embedding=NormalizedEmbedding(tables[s]))
        torch.testing.assert_close(stack[s], one)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_factor_multiplies_the_noise_of_the_same_time(factor):
    t = torch.tensor([0.04, 0.3, 0.8], dtype=torch.float64)
    kept = 1 - (t + 1e-4).sqrt()
    process = noise_factor_process(factor)
    torch.testing.assert_close(process.alpha(t), kept.sqrt())
    torch.testing.assert_close(process.sigma(t), factor * (1 - kept).sqrt())
    preserving = noise_factor_process(factor, variance_preserving=True)
    torch.testing.assert_close(preserving.alpha(t) ** 2, kept / (factor**2 - (factor**2 - 1) * kept))
    torch.testing.assert_close(preserving.alpha(t) ** 2 + preserving.sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(preserving.time(preserving.ratio(t)), t)


def test_decoding_with_the_perfect_denoiser_finds_the_words_in_their_shares():
    embedding = NormalizedEmbedding(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    law, centres = torch.tensor([0.6, 0.3, 0.1]), embedding(torch.arange(3)).detach()

    def denoise(z, sigma):
        distance = (z[..., None, :] - centres).square().sum(-1)
        return (law.log() - distance / (2 * sigma**2)).softmax(-1) @ centres

    counted = Counted(denoise)
    found = decode_embeddings(counted, embedding, (20_000, 1), steps=40, generator=rng())
    torch.testing.assert_close(torch.bincount(found[:, 0]) / 20_000, law, atol=0.02, rtol=0)
    assert counted.evaluations == 40
    # A network sees alpha z and the time of the plain schedule.
    seen = []

    class Network(torch.nn.Module):
        def forward(self, z, t):
            seen.append((z.square().mean().item(), t[0].item()))
            return z

    decode_embeddings(Denoiser(Network(), noise_factor_process(1.0), "clean"), embedding, (500, 4), generator=rng())
    assert len(seen) == 20
    assert seen[0] == (pytest.approx(1.0, rel=0.05), pytest.approx(0.99, abs=1e-3))
    assert seen[10][1] == pytest.approx(0.495, abs=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="table"):
        NormalizedEmbedding(torch.zeros(4))
    with pytest.raises(ValueError, match="tokens"):
        words()(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="target"):
        embedding_diffusion_anchor_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), embedding=words())
    with pytest.raises(ValueError, match="factor"):
        noise_factor_process(0.0)
    with pytest.raises(ValueError, match="steps"):
        decode_embeddings(lambda z, s: z, words(), (1, 2), steps=0)
