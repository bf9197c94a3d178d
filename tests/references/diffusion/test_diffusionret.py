"""DiffusionRet: the network pair by pair, and with exact posteriors the reranker draws from them."""

import math

import numpy as np
import pytest
import torch

from lossary.diffusion import RetrievalDiffusion, diffusion_rerank, relevance_diffusion_loss
from lossary.diffusion._process import cosine


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(**named) -> RetrievalDiffusion:
    torch.manual_seed(0)
    return RetrievalDiffusion(6, **named).double()


def by_hand(net, x, t, queries, candidates):
    """One list; queries (C, 6), the query as each candidate sees it."""
    w = {name: value.detach().numpy() for name, value in net.named_parameters()}
    position = 1000 * t * 10_000.0 ** (-np.arange(0, 6, 2) / 6)
    wave = np.empty(6)
    wave[0::2], wave[1::2] = np.sin(position), np.cos(position)
    hidden = w["time.0.weight"] @ wave + w["time.0.bias"]
    tau = w["time.2.weight"] @ (hidden / (1 + np.exp(-hidden))) + w["time.2.bias"]
    logits = [
        (w["query.weight"] @ (q + tau)) @ (w["key.weight"] @ (c + tau)) + x[j]
        for j, (q, c) in enumerate(zip(queries, candidates))
    ]
    a = np.exp(logits - np.max(logits))
    a = a / a.sum()
    e = w["out.weight"] @ sum(a[j] * w["value.weight"] @ (c + tau) for j, c in enumerate(candidates)) + w["out.bias"]
    found = []
    for j, c in enumerate(candidates):
        h = np.maximum(w["decoder.0.weight"] @ np.concatenate([e, c]) + w["decoder.0.bias"], 0)
        found.append((w["decoder.2.weight"] @ h + w["decoder.2.bias"])[0] + a[j])
    return found


def pooled(sequence, other, temperature):
    share = np.exp(sequence @ other / temperature)
    return share / share.sum() @ sequence


@pytest.mark.parametrize("masked", [False, True])
def test_the_network_pair_by_pair(masked):
    g = rng()
    x, t = torch.randn(2, 4, generator=g, dtype=torch.float64), torch.tensor([0.1, 0.8], dtype=torch.float64)
    texts = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    frames = torch.randn(2, 4, 3, 6, generator=g, dtype=torch.float64)
    kept = torch.tensor([True, False, True]) if masked else torch.ones(3, dtype=torch.bool)
    net = network(temperature=0.7)
    mask = kept.expand(2, 4, 3) if masked else None
    found = net(x, t, texts[:, 0], frames, mask)
    for b in range(2):
        videos = [pooled(frames[b, j, kept].numpy(), texts[b, 0].numpy(), 0.7) for j in range(4)]
        expected = by_hand(net, x[b].numpy(), t[b].item(), [texts[b, 0].numpy()] * 4, videos)
        assert found[b].tolist() == pytest.approx(expected)
    net = network(frames="query", temperature=0.7)
    mask = kept.expand(2, 3) if masked else None
    found = net(x, t, frames[:, 0], texts, mask)
    for b in range(2):
        queries = [pooled(frames[b, 0, kept].numpy(), texts[b, j].numpy(), 0.7) for j in range(4)]
        expected = by_hand(net, x[b].numpy(), t[b].item(), queries, list(texts[b].numpy()))
        assert found[b].tolist() == pytest.approx(expected)


def test_the_order_of_candidates_does_not_matter():
    g, net = rng(), network()
    x, query = torch.randn(1, 5, generator=g).double(), torch.randn(1, 6, generator=g).double()
    candidates, order = torch.randn(1, 5, 6, generator=g).double(), torch.tensor([3, 0, 4, 1, 2])
    t = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(net(x[:, order], t, query, candidates[:, order]), net(x, t, query, candidates)[:, order])
    one_frame = net(x, t, query, candidates.unsqueeze(2))
    torch.testing.assert_close(one_frame, net(x, t, query, candidates))


@pytest.mark.parametrize("negative", [0.0, -1.0])
def test_the_loss_by_hand(negative):
    net, g = network(), rng(1)
    query, candidates = torch.randn(3, 6, generator=g).double(), torch.randn(3, 4, 6, generator=g).double()
    found = relevance_diffusion_loss(net, query, candidates, negative=negative, generator=rng(2))
    g = rng(2)
    t = torch.rand(3, generator=g, dtype=torch.float64)
    noise = torch.randn(3, 4, generator=g, dtype=torch.float64)
    clean = torch.tensor([1.0] + 3 * [negative], dtype=torch.float64)
    x = (math.pi / 2 * t).cos()[:, None] * clean + (math.pi / 2 * t).sin()[:, None] * noise
    expected = torch.nn.functional.cross_entropy(
        100 * net(x, t, query, candidates), torch.zeros(3, dtype=torch.int64), reduction="none"
    )
    torch.testing.assert_close(found, expected)
    stacked = relevance_diffusion_loss(
        net, query[None], candidates[None], batch=2, negative=negative, generator=[rng(2)]
    )
    torch.testing.assert_close(stacked[0], expected)


def posterior(table: torch.Tensor):
    """E[x_0 | x_t] of one-hot relevances with these log-probabilities, which the first feature of candidates holds."""
    process = cosine()

    def model(x, t, query, candidates):
        gain = (process.alpha(t) / process.sigma(t) ** 2).unsqueeze(-1)
        return (candidates[..., 0] + gain * x).softmax(-1)

    return model


def test_with_exact_posteriors_it_draws_from_them():
    """Each query's list ends one-hot, and how often at which item is the posterior's."""
    chance = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    items = torch.stack([chance.log(), torch.zeros(4, dtype=torch.float64)], dim=1)
    n = 20_000
    similarity = torch.zeros(n, 4, dtype=torch.float64)
    found = diffusion_rerank(
        posterior(chance), similarity, torch.zeros(n, 2).double(), items, alpha=2.0, steps=100, generator=rng()
    )
    best = found.max(-1)
    share = torch.bincount(best.indices, minlength=4) / n
    torch.testing.assert_close(share, chance.to(share), atol=0.015, rtol=0)
    one_hot = 2 * math.e / (math.e + 3)  # softmax of a one-hot list, twice
    assert best.values.median().item() == pytest.approx(one_hot, abs=1e-3)
    many = diffusion_rerank(
        posterior(chance), similarity[:50], torch.zeros(50, 2).double(), items, steps=30, draws=200, generator=rng()
    )
    slope = (math.e - 1) / (math.e + 3)  # of the mean softmax in the chance
    expected = 1 / (math.e + 3) + slope * chance
    torch.testing.assert_close(many.mean(0), expected, atol=0.01, rtol=0)
    assert (many.argmax(-1) == 0).all()  # the mean of many draws names the likeliest


def test_only_the_top_moves_and_items_are_the_right_ones():
    """A model that reads the items: relevance 1 for the item whose number is the query's."""

    def model(x, t, query, candidates):
        return 2 * (candidates[..., 0] == query[..., :1]).to(x) - 1

    g = rng()
    similarity = torch.rand(2, 5, 9, generator=g)  # two replicas
    items = torch.arange(9.0).view(1, 9, 1, 1).expand(2, 9, 2, 3) + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1)
    query = similarity.argsort(-1)[..., [-3]].float().expand(-1, -1, 4) + torch.tensor([0.0, 100.0]).view(2, 1, 1)

    def pairs(x, t, query, candidates):
        return model(x, t, query, candidates.flatten(-2))

    found = diffusion_rerank(pairs, similarity, query, items, top=4, alpha=0.5, steps=3, generator=rng())
    gain = torch.full((4,), -1.0)
    gain[0] = 1.0
    gain = 0.5 * gain.softmax(0)
    rank = similarity.argsort(-1).argsort(-1)
    expected = torch.where(rank == 6, gain[0], torch.where(rank >= 5, gain[1], 0.0))
    torch.testing.assert_close(found - similarity, expected)
    everything = diffusion_rerank(pairs, similarity, query, items, top=99, steps=1, generator=rng())
    assert (everything > similarity).all()


@pytest.mark.parametrize("frames", ["candidates", "query"])
def test_masked_frames_do_not_matter(frames):
    """Two replicas; items or queries have three frames, the masked ones of which hold anything."""
    g, net = rng(), network(frames=frames)
    sequences, others = (torch.randn(*shape, generator=g).double() for shape in ((2, 7, 3, 6), (2, 5, 6)))
    mask = torch.rand(2, 7, 3, generator=g) < 0.5
    mask[..., 0] = True
    changed = torch.where(mask[..., None], sequences, 100 * torch.randn(2, 7, 3, 6, generator=g).double())
    if frames == "candidates":
        table = torch.rand(2, 5, 7, generator=g).double()
        inputs = [(others, items) for items in (sequences, changed)]
    else:
        table = torch.rand(2, 7, 5, generator=g).double()
        inputs = [(queries, others) for queries in (sequences, changed)]
    one, two = (
        diffusion_rerank(net, table, *pair, mask=mask, top=4, steps=2, generator=[rng(1), rng(2)]) for pair in inputs
    )
    torch.testing.assert_close(one, two)
    plain = diffusion_rerank(net, table, *inputs[0], top=4, steps=2, generator=[rng(1), rng(2)])
    assert (one - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"mask: expected sequences and shape \(2, 7, 3\)"):
        diffusion_rerank(net, table, *inputs[0], mask=mask[:, :6])

    lists = sequences[:, :4].unsqueeze(0) if frames == "candidates" else others[:, :4].unsqueeze(0)
    queries = others[:, 0].unsqueeze(0) if frames == "candidates" else sequences[:, 0].unsqueeze(0)
    kept = mask[None, :, :4] if frames == "candidates" else mask[None, :, 0]
    whole = torch.ones_like(kept)
    found, full, none = (
        relevance_diffusion_loss(net, queries, lists, mask=m, batch=2, generator=[rng(3)]) for m in (kept, whole, None)
    )
    torch.testing.assert_close(full, none)
    assert (found - full).abs().max() > 1e-4


def test_predictions_are_cut():
    seen = []

    def model(x, t, query, candidates):
        seen.append((x, t))
        return torch.full_like(x, 30.0)

    similarity = torch.zeros(1, 2, dtype=torch.float64)
    diffusion_rerank(model, similarity, torch.zeros(1, 3), torch.zeros(2, 3), steps=4, generator=rng())
    x, t = seen[-1]
    assert len(seen) == 4
    assert t.item() == pytest.approx(0.99 / 4)
    noise = torch.randn(1, 2, generator=rng(), dtype=torch.float64)
    angle = math.pi / 2 * torch.tensor([0.99, 0.99 / 4], dtype=torch.float64)
    sigma = angle.tan()
    first = sigma[0] * noise
    expected = angle[1].cos() * (1 + (first - 1) * sigma[1] / sigma[0])  # towards 1, not 30
    torch.testing.assert_close(x, expected)


def test_training_teaches_it_to_rerank():
    """Items with a hidden flaw that the cosine does not see; the query's twin is the one without."""
    g = rng(5)
    torch.manual_seed(0)
    net = RetrievalDiffusion(4)

    def batch(n):
        base = torch.randn(n, 1, 3, generator=g).expand(-1, 4, -1)
        flaw = torch.ones(n, 4, 1)
        flaw[:, 0] = 0
        return torch.cat([base[:, 0], torch.zeros(n, 1)], dim=1), torch.cat([base, flaw], dim=2)

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        relevance_diffusion_loss(net, *batch(64), generator=g).mean().backward()
        optimizer.step()
    query, lists = batch(30)
    for i in range(30):
        items = lists[i].roll(i, 0)
        found = diffusion_rerank(net, torch.zeros(1, 4), query[i : i + 1], items, steps=5, generator=g)
        assert found.argmax().item() == i % 4


def test_refusals():
    x, net = torch.zeros(2, 4), RetrievalDiffusion(4)
    for call, message in (
        (lambda: RetrievalDiffusion(5), "width: expected an even number"),
        (lambda: RetrievalDiffusion(4, frames="both"), "frames: expected one of"),
        (lambda: net(x, x[:, 0], x, torch.zeros(2, 3, 4)), r"candidates: expected \(2, 4\) in front"),
        (lambda: relevance_diffusion_loss(net, x, torch.zeros(2, 1, 4)), "candidates: expected at least 2"),
        (lambda: relevance_diffusion_loss(net, x, torch.zeros(2, 3, 4), temperature=0.0), "temperature: expected"),
        (lambda: diffusion_rerank(net, x, x[:1], x), r"query: expected \(2,\) in front"),
        (lambda: diffusion_rerank(net, x, x, x), r"items: expected \(4,\) in front"),
        (lambda: diffusion_rerank(net, x, x, torch.zeros(4, 4), steps=0), "steps: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
