"""Spectra against dense Hessians and a closed form, DRW against the official code's weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.optim import SAM
from lossary.weighting import DeferredReweighting, classwise_hessian_spectrum, saddle_index_by_class


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, wide=4):
    """A smooth little classifier of 3 features into 3 classes, with rows of classes 0 and 2."""
    g = generator(seed)
    model = nn.Sequential(nn.Linear(3, wide), nn.Tanh(), nn.Linear(wide, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model, torch.randn(9, 3, generator=g, dtype=torch.float64), torch.tensor([0, 0, 2, 0, 2, 2, 2, 0, 2])


def dense(model, x, y):
    """The Hessian of the mean cross-entropy, row by row."""
    names, weights = zip(*model.named_parameters())
    sizes = [w.numel() for w in weights]

    def objective(flat):
        parts = {n: v.view_as(w) for n, v, w in zip(names, flat.split(sizes), weights)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    return torch.autograd.functional.hessian(objective, torch.cat([w.detach().flatten() for w in weights]))


def spectrum(model, x, y, **how):
    return classwise_hessian_spectrum(model, x, y, **{"num_classes": 3, "generator": generator(1), **how})


def test_with_as_many_iterations_as_parameters_it_is_the_spectrum():
    model, x, y = small()
    found, weights = spectrum(model, x, y, draws=2)
    assert found.shape == weights.shape == (3, 2, 31)
    for c in (0, 2):
        expected = torch.linalg.eigvalsh(dense(model, x[y == c], y[y == c]))
        assert torch.allclose(found[c], expected.expand(2, -1), atol=1e-8)
        assert weights[c].sum(-1).tolist() == pytest.approx([1.0, 1.0])
    assert found[1].isnan().all()  # class 1 has no rows
    assert not weights[1].any()


def test_a_few_iterations_are_gauss_quadrature():
    """k nodes give v H^j v / v v for all j < 2 k, v the random signs."""
    model, x, y = small()
    found, weights = spectrum(model, x, y, iterations=4)
    g = generator(1)
    for c in (0, 2):
        v = torch.randint(2, (31,), generator=g).double() * 2 - 1
        matrix = dense(model, x[y == c], y[y == c])
        for j in range(8):
            exact = v @ torch.linalg.matrix_power(matrix, j) @ v / 31
            assert (weights[c, 0] * found[c, 0] ** j).sum().item() == pytest.approx(exact.item(), rel=1e-8)


def test_extremes_come_from_inside_and_soon():
    model, x, y = small(wide=30)
    found, _ = spectrum(model, x, y, iterations=40)
    for c in (0, 2):
        exact = torch.linalg.eigvalsh(dense(model, x[y == c], y[y == c]))
        assert exact[0] - 1e-9 <= found[c].min() <= exact[0] + 1e-6
        assert exact[-1] - 1e-6 <= found[c].max() <= exact[-1] + 1e-9


def test_draws_estimate_the_trace():
    model, x, y = small()
    found, weights = spectrum(model, x, y, iterations=3, draws=200)
    exact = dense(model, x[y == 2], y[y == 2])
    estimates = (found[2] * weights[2]).sum(-1)
    error = (2 * (exact - exact.diag().diag()).square().sum() / 200).sqrt() / 31  # Hutchinson's, exactly
    assert abs(estimates.mean() - exact.trace() / 31) < 3 * error
    assert estimates.std() == pytest.approx((error * 200**0.5).item(), rel=0.2)


def test_the_hessian_of_softmax_regression_in_closed_form():
    """At zero weights it is (diag p - p p^T) (x) mean x x^T with p = 1/3: rank 2, the Krylov space ends early."""
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    found, weights = spectrum(model, x, torch.tensor([1, 1]))
    assert found[1, 0].tolist() == pytest.approx([0, 0, 0, 0, 25 / 3, 25 / 3], abs=1e-10)
    assert weights[1].sum().item() == pytest.approx(1.0)
    assert saddle_index_by_class(found)[1] < 1e-12


def test_it_sees_the_deployed_model_and_leaves_it_as_it_was():
    model, x, y = small()
    model.insert(1, nn.Dropout(0.5))
    model.insert(1, nn.BatchNorm1d(4).double())
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with torch.no_grad():
        found, _ = spectrum(model, x, y)
    exact = dense(copy.deepcopy(model).eval(), x[y == 0], y[y == 0])
    assert torch.allclose(found[0, 0], torch.linalg.eigvalsh(exact), atol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_weights_are_no_directions():
    model, x, y = small()
    model[0].requires_grad_(False)
    found, _ = spectrum(model, x, y)
    exact = dense(model, x[y == 0], y[y == 0])[16:, 16:]
    assert torch.allclose(found[0, 0], torch.linalg.eigvalsh(exact), atol=1e-8)
    assert found[0].min() > -1e-10  # the last layer alone is convex


def test_any_loss_serves_and_a_flat_one_has_no_index():
    model, x, y = small()
    squared, _ = spectrum(model[:1], x, y, loss=lambda z, _: z.square().sum(-1))
    ones = torch.cat([x[y == 0], torch.ones(4, 1, dtype=torch.float64)], dim=1)
    exact = np.linalg.eigvalsh(2 * (ones.T @ ones / 4).numpy()).repeat(4)
    assert squared[0, 0].tolist() == pytest.approx(exact.tolist())
    flat, _ = spectrum(model, x, y, loss=lambda z, _: 0 * z.square().sum(-1))
    assert not flat[0].any()
    assert saddle_index_by_class(flat).isnan().all()


def test_saddle_index_at_its_ends():
    values = torch.tensor([[[-2.0, -1.0]], [[1.0, 3.0]], [[torch.nan, torch.nan]]])
    assert saddle_index_by_class(values)[:2].tolist() == [float("inf"), 0.0]
    assert saddle_index_by_class(values)[2].isnan()


def test_reweighting_sets_in_with_its_share_of_the_samples():
    counts = (500, 50, 5)
    deferred = DeferredReweighting(counts, epochs=2, delta=0.5)
    effective = 1.0 - np.power(0.9999, counts)  # as in cifar_train_sam.py of val-iisc/Saddle-LongTail
    expected = (1 - 0.9999) / effective / np.sum((1 - 0.9999) / effective) * 3
    target = torch.arange(3).repeat(37)  # 111 of 555 rows
    for _ in range(5):
        assert deferred.eval()(torch.ones(111), target=target).eq(1).all()  # not counted
        assert deferred.train()(torch.ones(111), target=target).eq(1).all()
    other = DeferredReweighting(counts, epochs=2, delta=0.5)
    other.load_state_dict(deferred.state_dict())
    assert other(torch.ones(3), target=torch.arange(3)).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert deferred.seen == 555


def test_all_processes_are_counted(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    deferred = DeferredReweighting((10, 6), epochs=1, delta=1.0)
    deferred(torch.ones(3), target=torch.tensor([0, 1, 0]))
    assert deferred.seen == 12


def test_sam_on_the_reweighted_loss_moves_as_its_definition_says():
    model, x, y = small()
    deferred = DeferredReweighting((4, 1, 5), epochs=1, delta=0.0, beta=1.0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    weights = torch.tensor([1 / 4, 1.0, 1 / 5]) / (1 / 4 + 1 + 1 / 5) * 3

    def reweighted(net):
        return (weights[y] * F.cross_entropy(net(x), y, reduction="none")).mean()

    def closure():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        (deferred(losses.detach(), target=y) * losses).mean().backward()

    start, climbed = copy.deepcopy(model), copy.deepcopy(model)
    slopes = torch.autograd.grad(reweighted(start), list(start.parameters()))
    length = torch.cat([g.flatten() for g in slopes]).norm()
    with torch.no_grad():
        for p, g in zip(climbed.parameters(), slopes):
            p += 0.5 * g / length
    steps = torch.autograd.grad(reweighted(climbed), list(climbed.parameters()))
    optimizer.step(closure)
    for p, old, step in zip(model.parameters(), start.parameters(), steps):
        assert torch.allclose(p, old - 0.1 * step, atol=1e-6)
    assert deferred.seen == 2 * len(x)


def test_refusals():
    model, x, y = small()
    with pytest.raises(ValueError, match="iterations: expected a whole number >= 1, got 0"):
        spectrum(model, x, y, iterations=0)
    with pytest.raises(ValueError, match="delta: expected a number, got a tensor"):
        DeferredReweighting((4, 2), epochs=1, delta=torch.tensor(0.5))
    with pytest.raises(ValueError, match="eigenvalues: expected 3 dimensions"):
        saddle_index_by_class(torch.zeros(2, 3))
