"""Z-loss by Python's statistics, its invariances, and the factored layer against dense autograd over many steps."""

import copy
import math
import statistics

import pytest
import torch

from lossary.losses import FactoredOutput, z_loss, z_loss_from_sums

LOGITS = [[1.0, -2.0, 0.5, 3.0, 0.0], [-4.0, 1.0, 1.0, 0.0, 2.5]]
TARGET = [2, 4]


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.1, 10.0), (4.0, 1.5)])
def test_z_loss_by_the_statistics_module(a, b):
    zs = [(o[y] - statistics.fmean(o)) / statistics.pstdev(o) for o, y in zip(LOGITS, TARGET)]
    expected = [math.log1p(math.exp(a * (b - z))) / a for z in zs]
    got = z_loss(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET), a=a, b=b, eps=0.0)
    assert got.tolist() == pytest.approx(expected, abs=1e-14)


def test_shift_and_scale_leave_the_loss_and_a_flip_of_sign_does_not():
    o, y = torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET)
    before = z_loss(o, y, b=2.0, eps=0.0)
    torch.testing.assert_close(z_loss(37.0 * o - 11.0, y, b=2.0, eps=0.0), before, rtol=0, atol=1e-13)
    assert (z_loss(-o, y, b=2.0, eps=0.0) - before).abs().max() > 0.1


def test_largest_z_score_is_the_root_of_one_less_than_the_classes():
    one_hot = torch.eye(10, dtype=torch.float64)[:1]
    assert z_loss(one_hot, torch.tensor([0]), a=50.0, b=5.0, eps=0.0).item() == pytest.approx(2.0, abs=1e-12)


def test_three_sums_are_enough():
    o, y = torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET)
    sums = o.gather(1, y[:, None])[:, 0], o.square().sum(1), o.sum(1)
    torch.testing.assert_close(z_loss_from_sums(*sums, num_classes=5, b=1.0), z_loss(o, y, b=1.0), rtol=0, atol=1e-14)


def other_spherical_loss(true, squares, total):
    """No Z-loss: every one of the three slopes differs in kind."""
    return (1 + 0.01 * squares).log() - true.tanh() + (1 + 0.01 * total**2).sqrt()


@pytest.mark.parametrize("form", ["z", "other"])
def test_the_factored_layer_follows_dense_gradient_descent(form):
    """200 steps with repeated classes in a batch; W, the gradient that goes down, and the buffers stay equal."""
    g = torch.Generator().manual_seed(0)
    classes, width, batch, lr = 120, 10, 8, 0.2
    dense = torch.randn(classes, width, generator=g, dtype=torch.float64)
    output = FactoredOutput(dense)
    start = dense.clone()
    for _ in range(200):
        hidden = torch.randn(batch, width, generator=g, dtype=torch.float64, requires_grad=True)
        target = torch.randint(12, (batch,), generator=g)
        dense.requires_grad_()
        o = hidden @ dense.T
        if form == "z":
            objective = z_loss(o, target, a=2.0, b=3.0).mean()
        else:
            objective = other_spherical_loss(o.gather(1, target[:, None])[:, 0], o.square().sum(1), o.sum(1)).mean()
        down, slope = torch.autograd.grad(objective, (hidden, dense))
        dense = (dense - lr * slope).detach()

        sums = output(hidden, target)
        for value in sums:
            value.retain_grad()
        loss = (
            z_loss_from_sums(*sums, num_classes=classes, a=2.0, b=3.0) if form == "z" else other_spherical_loss(*sums)
        )
        loss.mean().backward()
        torch.testing.assert_close(hidden.grad, down, rtol=0, atol=1e-8)
        output.update(hidden, target, tuple(value.grad for value in sums), lr=lr)
    assert (dense - start).abs().max() > 0.1
    torch.testing.assert_close(output.weight(), dense, rtol=0, atol=1e-8)
    torch.testing.assert_close(output.Q, dense.T @ dense, rtol=0, atol=1e-8)
    torch.testing.assert_close(output.row_sum, dense.sum(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(output.logits(hidden), hidden @ dense.T, rtol=0, atol=1e-8)
    assert not torch.allclose(output.U, torch.eye(width, dtype=torch.float64), atol=1e-3)

    copied = copy.deepcopy(output)
    copied.refresh()
    torch.testing.assert_close(copied.weight(), dense, rtol=0, atol=1e-8)
    restored = FactoredOutput(start)
    restored.load_state_dict(output.state_dict())
    for layer in (copied, restored, output):
        layer.update(hidden, target, tuple(value.grad for value in sums), lr=lr)
    for layer in (copied, restored):
        torch.testing.assert_close(layer.weight(), output.weight(), rtol=0, atol=1e-8)


def test_an_update_never_makes_a_tensor_as_long_as_the_classes():
    classes, width, batch = 50_000, 8, 4
    output = FactoredOutput(torch.randn(classes, width, generator=torch.Generator().manual_seed(0)))
    hidden, target = torch.ones(batch, width), torch.arange(batch)
    slopes = (torch.ones(batch),) * 3
    with torch.profiler.profile(record_shapes=False, profile_memory=True) as profile:
        output(hidden, target)
        output.update(hidden, target, slopes, lr=0.01)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < classes


def test_refusals():
    output = FactoredOutput(torch.ones(5, 3))
    with pytest.raises(ValueError, match="hidden: expected"):
        output(torch.ones(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slopes: expected"):
        output.update(torch.ones(2, 3), torch.tensor([0, 1]), (torch.ones(2), torch.ones(2), torch.ones(())), lr=0.1)
    with pytest.raises(ValueError, match="weight: expected"):
        FactoredOutput(torch.ones(5))
