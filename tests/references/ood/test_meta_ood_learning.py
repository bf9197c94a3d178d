"""The meta-gradient by Hessians and by finite differences, adaptation as plain SGD, the protocol by scikit-learn."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from lossary.ood import MetaOODLearner, adapt_to_domain, caood_benchmark
from lossary.roles import advance
from lossary.tasks import Seeds, stacked_mlp


def episode(lead=(), seed=0):
    g = torch.Generator().manual_seed(seed)

    def rows(n):
        return torch.randn(*lead, n, 4, generator=g, dtype=torch.float64)

    def labels(n):
        return torch.randint(3, (*lead, n), generator=g)

    return rows(5), labels(5), rows(6), labels(6), rows(7)


def linear():
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(12.0).view(3, 4).sin())
    return model


def outer(weight, query_x, query_y, outliers, outlier_weight=0.5):
    """Mean cross-entropy of the query, and of outliers from the uniform distribution."""
    uniform = torch.full((len(outliers), 3), 1 / 3, dtype=torch.float64)
    strange = F.cross_entropy(outliers @ weight.T, uniform)
    return F.cross_entropy(query_x @ weight.T, query_y) + outlier_weight * strange


def gradient(learner, batch):
    mean = learner.objective("model", batch, step=0).mean()
    return torch.autograd.grad(mean, learner.model.weight)[0]


def test_the_objective_is_the_outer_loss_after_plain_gradient_steps():
    x, y, *rest = episode()
    learner = MetaOODLearner(linear(), inner_lr=0.3, inner_steps=3, outlier_weight=0.7)
    weight = linear().weight.detach().requires_grad_()
    for _ in range(3):
        (slope,) = torch.autograd.grad(F.cross_entropy(x @ weight.T, y), weight)
        weight = (weight - 0.3 * slope).detach().requires_grad_()
    values = learner.objective("model", episode(), step=0)
    assert values.shape == (6,)
    torch.testing.assert_close(values.mean(), outer(weight, *rest, outlier_weight=0.7))
    away = values - F.cross_entropy(rest[0] @ weight.T, rest[1], reduction="none")
    torch.testing.assert_close(away, away[:1].expand(6))  # what outliers add is the same for every query sample


def test_the_gradient_of_one_step_is_the_outer_one_times_identity_less_the_rate_times_the_hessian():
    x, y, *rest = episode()
    start = linear().weight.detach()

    def inner(flat):
        return F.cross_entropy(x @ flat.view(3, 4).T, y)

    hessian = torch.autograd.functional.hessian(inner, start.flatten())
    slope = torch.autograd.functional.jacobian(inner, start.flatten())
    end = (start.flatten() - 0.5 * slope).view(3, 4).requires_grad_()
    (after,) = torch.autograd.grad(outer(end, *rest), end)
    expected = (torch.eye(12) - 0.5 * hessian) @ after.flatten()
    got = gradient(MetaOODLearner(linear(), inner_lr=0.5), episode())
    torch.testing.assert_close(got.flatten(), expected)
    cheap = gradient(MetaOODLearner(linear(), inner_lr=0.5, first_order=True), episode())
    torch.testing.assert_close(cheap, after)
    assert (got - cheap).abs().max() > 0.01


def test_the_gradient_through_three_steps_agrees_with_finite_differences():
    learner = MetaOODLearner(linear(), inner_lr=0.4, inner_steps=3)
    got, step = gradient(learner, episode()), 1e-6
    for i in (0, 5, 11):
        ends = []
        for sign in (1, -1):
            moved = MetaOODLearner(linear(), inner_lr=0.4, inner_steps=3)
            with torch.no_grad():
                moved.model.weight.view(-1)[i] += sign * step
            ends.append(moved.objective("model", episode(), step=0).mean().item())
        assert got.flatten()[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_replicas_do_not_look_at_each_other():
    seeds = Seeds((0, 1))
    stack, batch = stacked_mlp((4, 8, 3), seeds).double(), episode(lead=(2,))
    stacked = MetaOODLearner(stack, inner_lr=0.2, inner_steps=2).objective("model", batch, step=0)
    assert stacked.shape == (2, 6)
    for s in range(2):
        alone = MetaOODLearner(stack.replica(s), inner_lr=0.2, inner_steps=2)
        torch.testing.assert_close(alone.objective("model", tuple(t[s] for t in batch), step=0), stacked[s])
        x, y, *_ = batch
        one, both = adapt_to_domain(stack.replica(s), x[s], y[s], lr=0.5), adapt_to_domain(stack, x, y, lr=0.5)
        torch.testing.assert_close(one[0].weight, both.replica(s)[0].weight)


def test_advance_takes_the_meta_gradients_step_and_a_state_dict_continues_it():
    learner = MetaOODLearner(linear(), inner_lr=0.3)
    expected = learner.model.weight - 0.1 * gradient(learner, episode())
    optimizers = {"model": torch.optim.SGD(learner.parameters(), lr=0.1)}
    means = advance(learner, episode(), optimizers, step=0)
    torch.testing.assert_close(learner.model.weight, expected)
    assert means["model"].shape == ()
    other, file = MetaOODLearner(nn.Linear(4, 3, bias=False).double(), inner_lr=0.3), io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(gradient(other, episode(seed=1)), gradient(learner, episode(seed=1)), rtol=0, atol=0)
    assert torch.equal(other(episode()[0]), other.model(episode()[0]))


def test_frozen_and_idle_parameters_stay_out_of_the_inner_steps():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    model.idle = nn.Linear(2, 2).double()
    model.forward = lambda x: model[1](model[0](x))
    learner = MetaOODLearner(model)
    learner.objective("model", episode(), step=0).mean().backward()
    assert model[0].weight.grad is None
    assert (model.idle.weight.grad is None) or (model.idle.weight.grad == 0).all()
    assert model[1].weight.grad.abs().max() > 0


def test_adapting_takes_the_learners_inner_steps_on_a_copy():
    model, (x, y, query_x, query_y, _) = linear(), episode()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        adapted = adapt_to_domain(model, x, y, lr=0.3, steps=3)
    assert torch.equal(model.weight, before["weight"])
    assert model.weight.grad is None
    learner = MetaOODLearner(model, inner_lr=0.3, inner_steps=3, outlier_weight=0.0)
    values = learner.objective("model", episode(), step=0)
    torch.testing.assert_close(values, F.cross_entropy(adapted(query_x), query_y, reduction="none"))


def test_the_protocol_is_scikit_learns_roc_by_domain():
    rng = np.random.default_rng(0)
    domains = []
    for shift in (0.0, 1.0):
        x, outliers = rng.normal(0, 2, (57, 3)) + shift, rng.normal(0.5, 1, (43, 3)).round(1)
        y = x.argmax(1)
        y[: 10 + int(shift)] = (y[: 10 + int(shift)] + 1) % 3
        t = [torch.from_numpy(a) for a in (x[:5], y[:5], x, y, outliers)]
        domains.append(tuple(t))
    found = caood_benchmark(nn.Identity(), domains)
    assert found["accuracy"].tolist() == pytest.approx([47 / 57, 46 / 57])
    for d, (_, _, x, _, outliers) in enumerate(domains):
        score = -np.log(np.exp(np.vstack([x, outliers])).sum(1))
        strange = np.arange(100) >= 57
        assert found["auroc"][d].item() == pytest.approx(roc_auc_score(strange, score), abs=1e-12)
        fpr, tpr, _ = roc_curve(~strange, -score, drop_intermediate=False)  # here known inputs are the positives
        assert found["fpr95"][d].item() == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_ties_count_half_and_a_score_of_ones_own_is_used():
    x, outliers = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    y = torch.zeros(2, dtype=torch.int64)
    found = caood_benchmark(nn.Identity(), [(x, y, x, y, outliers)], score=lambda z: z[..., 0])
    assert found["auroc"].item() == (1 + 0.5 + 1 + 1) / 4
    assert found["fpr95"].item() == 0.5  # the threshold is 2, which passes


def test_domains_adapt_the_last_model_or_the_first():
    x, y = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)

    class Counted(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.count = count

        def forward(self, z):
            return z * self.count

    def adapt(model, support_x, support_y):
        assert torch.equal(support_x, 7 * x)
        return Counted(model.count + 1)

    domains = [(7 * x, y, x, y, x)] * 3
    seen = []

    def score(logits):
        seen.append(logits[0, 0].item())
        return logits[..., 0]

    caood_benchmark(Counted(0), domains, adapt=adapt, score=score)
    caood_benchmark(Counted(0), domains, adapt=adapt, carry=False, score=score)
    caood_benchmark(Counted(0), domains, score=score)
    assert seen[::2] == [1, 2, 3, 1, 1, 1, 0, 0, 0]


def test_the_protocol_keeps_replicas_apart():
    model, domains = stacked_mlp((4, 8, 3), Seeds((0, 1))).double(), [episode(lead=(2,), seed=s) for s in range(3)]
    found = caood_benchmark(model, domains, adapt=adapt_to_domain)
    for s in range(2):
        alone = [tuple(t[s] for t in domain) for domain in domains]
        expected = caood_benchmark(model.replica(s), alone, adapt=adapt_to_domain)
        for name, values in found.items():
            assert values.shape == (3, 2)
            torch.testing.assert_close(values[:, s], expected[name])


def test_refusals_name_the_argument():
    x, y, *_ = episode()
    with pytest.raises(ValueError, match=r"inner_lr: expected a number > 0, got 0.0"):
        MetaOODLearner(linear(), inner_lr=0.0)
    with pytest.raises(ValueError, match=r"outlier_weight: expected a number >= 0, got -1.0"):
        MetaOODLearner(linear(), outlier_weight=-1.0)
    with pytest.raises(ValueError, match=r"batch: expected support inputs and labels, query inputs and labels, and"):
        MetaOODLearner(linear()).objective("model", (x, y), step=0)
    with pytest.raises(ValueError, match=r"steps: expected a whole number >= 1, got 0"):
        adapt_to_domain(linear(), x, y, steps=0)
    with pytest.raises(ValueError, match=r"target: expected shape \(5,\), got \(4,\)"):
        adapt_to_domain(linear(), x, y[:4])
    with pytest.raises(ValueError, match=r"domains: expected at least one, got none"):
        caood_benchmark(linear(), [])


def test_doubt_is_least_for_logits_that_agree():
    """The outlier term is at least log 3, which equal logits reach."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x = torch.zeros(5, 4, dtype=torch.float64)
    batch = (x, torch.arange(5) % 3, x, torch.arange(5) % 3, x)
    one, none = (MetaOODLearner(model, inner_lr=1e-9, outlier_weight=w) for w in (1.0, 0.0))
    apart = one.objective("model", batch, step=0) - none.objective("model", batch, step=0)
    torch.testing.assert_close(apart, torch.full((5,), math.log(3), dtype=torch.float64))
