"""DeeDiff against the official losses written out in loops, a hand-made staircase of certainties, and gradients."""

import math

import pytest
import torch

from lossary.diffusion import UncertaintyExitHead, deediff_loss, early_exit_denoise


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(shape=(4, 2, 3, 3), layers=3):
    g = rng()
    predictions = torch.randn(layers, *shape, generator=g, dtype=torch.float64)
    certainty = torch.rand(layers, *shape, generator=g, dtype=torch.float64)
    return predictions, certainty, torch.randn(shape, generator=g, dtype=torch.float64)


def test_the_loss_in_loops():
    predictions, certainty, target = case()
    weights = [c.mean().item() for c in certainty]
    found = deediff_loss(predictions, certainty, target, certainty_weight=0.7, layer_weight=1.3)
    for b in range(4):
        flat = target[b].flatten().tolist()
        total = sum((p - y) ** 2 for p, y in zip(predictions[2, b].flatten().tolist(), flat)) / 18
        for i in range(3):
            values = predictions[i, b].flatten().tolist()
            sure = [1 - math.tanh(abs(p - y)) for p, y in zip(values, flat)]
            gap = sum((c - s) ** 2 for c, s in zip(certainty[i, b].flatten().tolist(), sure)) / 18
            error = sum((p - y) ** 2 for p, y in zip(values, flat)) / 18
            total += 0.7 * gap / 3 + 1.3 * weights[i] / sum(weights) * error
        assert found[b].item() == pytest.approx(total, rel=1e-9)


def test_its_parts_by_themselves():
    predictions, certainty, target = case((5, 3))
    plain = deediff_loss(predictions, certainty, target, certainty_weight=0.0, layer_weight=0.0)
    torch.testing.assert_close(plain, (predictions[-1] - target).square().mean(1))
    perfect = 1 - (predictions - target).abs().tanh()
    assert torch.equal(deediff_loss(predictions, perfect, target, layer_weight=0.0), plain)
    even = deediff_loss(predictions, torch.full_like(certainty, 0.3), target, certainty_weight=0.0)
    torch.testing.assert_close(even - plain, (predictions - target).square().mean((0, 2)))


def test_without_any_certainty_layers_weigh_the_same():
    predictions, certainty, target = case((5, 3))
    certainty = torch.zeros_like(certainty, requires_grad=True)
    plain = deediff_loss(predictions, certainty, target, certainty_weight=0.0, layer_weight=0.0)
    found = deediff_loss(predictions, certainty, target, certainty_weight=0.0)
    torch.testing.assert_close(found - plain, (predictions - target).square().mean((0, 2)))
    found.sum().backward()
    assert certainty.grad.isfinite().all()


def test_replicas_are_weighted_apart():
    predictions, certainty, target = case((2, 6, 3))
    found = deediff_loss(predictions, certainty, target, batch_dims=2)
    for s in range(2):
        one = deediff_loss(predictions[:, s], certainty[:, s], target[s])
        torch.testing.assert_close(found[s], one)
    scalars = deediff_loss(predictions[..., 0], certainty[..., 0], target[..., 0], batch_dims=2)
    torch.testing.assert_close(
        scalars, deediff_loss(predictions[..., :1], certainty[..., :1], target[..., :1], batch_dims=2)
    )


def test_who_gets_which_gradient():
    predictions, certainty, target = (v.requires_grad_() for v in case((5, 3)))
    learned = deediff_loss(predictions, certainty, target, layer_weight=0.0).mean()
    by_prediction, by_certainty = torch.autograd.grad(learned, (predictions, certainty))
    assert (by_prediction[:-1] == 0).all()  # the certainties' target is no path
    truth = 1 - (predictions - target).abs().tanh()
    torch.testing.assert_close(by_certainty, (2 * (certainty - truth) / (3 * 5 * 3)).detach())
    for detach in (False, True):
        value = deediff_loss(predictions, certainty, target, certainty_weight=0.0, detach=detach).mean()
        (slope,) = torch.autograd.grad(value, certainty)
        assert bool((slope == 0).all()) == detach


def test_the_head_is_a_sigmoid_that_leaves_features_alone():
    head = UncertaintyExitHead(4, 3, time_features=2).double()
    h = torch.randn(5, 7, 4, generator=rng(), dtype=torch.float64, requires_grad=True)
    time = torch.randn(5, 1, 2, generator=rng(1), dtype=torch.float64, requires_grad=True)
    found = head(h, time)
    weight, bias = head.linear.weight, head.linear.bias
    logits = h @ weight[:, :4].T + (time @ weight[:, 4:].T) + bias
    torch.testing.assert_close(found, 1 / (1 + (-logits).exp()))
    found.sum().backward()
    assert h.grad is None
    assert time.grad is None
    assert weight.grad.abs().min() > 0
    assert set(head.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("tokens", [7, 5])
def test_one_time_for_all_tokens_of_a_sample(tokens):
    """Five samples: with as many tokens, too, the times are still the samples'."""
    head = UncertaintyExitHead(4, 3, time_features=2).double()
    h = torch.randn(5, tokens, 4, generator=rng(), dtype=torch.float64)
    time = torch.randn(5, 2, generator=rng(1), dtype=torch.float64)
    found = head(h, time)
    for sample in range(5):
        for token in range(tokens):
            both = torch.cat([h[sample, token], time[sample]])
            torch.testing.assert_close(found[sample, token], head.linear(both).sigmoid())
    torch.testing.assert_close(head(h, time[0]), head(h, time[:1]))


STAIRS = torch.tensor(  # certainty of 3 samples after each of 4 blocks
    [[0.1, 0.6, 0.2], [0.9, 0.1, 0.3], [0.2, 0.7, 0.9], [0.9, 0.9, 0.9]]
)


def staircase(**setting):
    calls = []

    def block(h):
        calls.append(h)
        return h + 1

    heads = [lambda h, row=row: row[:, None] for row in STAIRS]
    found, depth = early_exit_denoise([block] * 4, heads, lambda h: 10 * h, torch.zeros(3, 1), **setting)
    assert torch.equal(found, 10.0 * depth[:, None])
    return depth.tolist(), len(calls)


def test_samples_leave_where_they_are_certain():
    assert staircase(threshold=0.5, per_sample=True) == ([2, 1, 3], 3)
    assert staircase(threshold=0.65, per_sample=True) == ([2, 3, 3], 3)
    assert staircase(threshold=0.8, per_sample=True) == ([2, 4, 3], 4)
    assert staircase(threshold=0.6, per_sample=True) == ([2, 3, 3], 3)  # above it, not at it
    assert staircase(threshold=1.0) == ([4, 4, 4], 4)


def test_together_they_leave_by_their_mean():
    means = STAIRS.mean(1)  # 0.3, 0.433, 0.6, 0.9
    assert means.tolist() == pytest.approx([0.3, 1.3 / 3, 0.6, 0.9])
    assert staircase(threshold=0.25) == ([1] * 3, 1)
    assert staircase(threshold=0.4) == ([2] * 3, 2)
    assert staircase(threshold=0.7) == ([4] * 3, 4)


def test_the_hesitant_half_needs_a_second_sign():
    assert staircase(threshold=0.25, hesitant=2) == ([2] * 3, 2)
    assert staircase(threshold=0.4, hesitant=2) == ([3] * 3, 3)  # block 2 is the first sign, block 3 is beyond
    assert staircase(threshold=0.5, hesitant=3, per_sample=True) == ([4, 3, 4], 4)
    assert staircase(threshold=0.5, hesitant=1, per_sample=True) == ([2, 3, 3], 3)


def test_replicas_leave_apart():
    certain = torch.tensor([[0.9, 0.8], [0.1, 0.2]])

    def head(h):
        return certain[..., None]

    found, depth = early_exit_denoise(
        [lambda h: h + 1] * 3, [head] * 3, lambda h: h, torch.zeros(2, 2, 4), threshold=0.5, batch_dims=2
    )
    assert depth.tolist() == [[1, 1], [3, 3]]
    assert torch.equal(found, depth[..., None].expand(2, 2, 4).float())


def test_it_learns_to_be_certain_where_it_is_right():
    """Outputs of block 1 are right for small inputs alone: the head finds that out."""
    g = torch.manual_seed(0)
    head = UncertaintyExitHead(2, 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(200):
        size = torch.rand(64, 1, generator=g)
        h = torch.cat([size, size.square()], dim=-1)
        target = 3.0 * (size > 0.5)
        predictions = torch.stack([torch.zeros(64, 1), target])
        loss = deediff_loss(predictions, torch.stack([head(h), torch.ones(64, 1)]), target, layer_weight=0.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    small, large = head(torch.tensor([[0.1, 0.01], [0.95, 0.9]])).flatten().tolist()
    assert small > 0.8
    assert large < 0.2


def test_refusals():
    predictions, certainty, target = case((5, 3))
    h = torch.zeros(2, 4)
    for call, message in (
        (lambda: UncertaintyExitHead(0, 1), "features: expected a whole number >= 1"),
        (lambda: UncertaintyExitHead(4, 1)(h, h), "time: expected 0 features"),
        (lambda: UncertaintyExitHead(4, 1, time_features=2)(h), "time: expected 2 features, got None"),
        (
            lambda: UncertaintyExitHead(4, 1, time_features=2)(torch.zeros(5, 7, 4), torch.zeros(7, 2)),
            r"time: expected leading dimensions of \(5, 7\)",
        ),
        (lambda: deediff_loss(target, certainty, target), "predictions: expected"),
        (lambda: deediff_loss(predictions, certainty[:2], target), "certainty: expected shape"),
        (lambda: deediff_loss(predictions, certainty, target, layer_weight=-1.0), "layer_weight: expected a number"),
        (lambda: deediff_loss(predictions, certainty, target, batch_dims=3), "batch_dims: expected a whole number"),
        (lambda: early_exit_denoise([], [], torch.exp, h), "heads: expected one for each of at least one block"),
        (lambda: early_exit_denoise([torch.exp], [], torch.exp, h), "heads: expected one for each"),
        (lambda: early_exit_denoise([torch.exp], [torch.exp], torch.exp, h, hesitant=-1), "hesitant: expected a whole"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
