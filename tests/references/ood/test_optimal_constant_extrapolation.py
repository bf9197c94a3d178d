"""Constants by numerical minimisation of torch's losses, distances by torch.distributions, tables by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

from lossary.ood import (
    abstention_rewards,
    accumulated_constants,
    aligned_share,
    distance_to_ocs,
    extrapolation_table,
    ocs_abstention_policy,
    optimal_constant_solution,
)

generator = torch.Generator().manual_seed(0)
labels = torch.tensor([0, 2, 2, 1, 2, 0, 2, 1])
numbers = torch.randn(8, generator=generator, dtype=torch.float64) + 3


def best_constant(start, objective):
    """The constant with the least mean loss, by Newton-like steps of L-BFGS."""
    constant = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([constant], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = objective(constant)
        value.backward()
        return value

    optimizer.step(closure)
    return constant.detach()


def test_class_shares_minimise_cross_entropy():
    found = best_constant(torch.zeros(3, dtype=torch.float64), lambda c: F.cross_entropy(c.expand(8, 3), labels))
    torch.testing.assert_close(optimal_constant_solution(labels).double(), found.softmax(0), atol=1e-6, rtol=0)
    assert optimal_constant_solution(labels, classes=4).tolist() == [0.25, 0.25, 0.5, 0.0]


def test_the_mean_minimises_squared_error():
    target = torch.stack([numbers, -2 * numbers], 1)
    found = best_constant(torch.zeros(2, dtype=torch.float64), lambda c: F.mse_loss(c.expand(8, 2), target))
    torch.testing.assert_close(optimal_constant_solution(target, loss="mse"), found, atol=1e-6, rtol=0)


def test_mean_and_variance_minimise_the_gaussian_likelihood():
    def objective(c):
        return F.gaussian_nll_loss(c[0].expand(8), numbers, c[1].exp().expand(8), eps=1e-12)

    found = best_constant(torch.zeros(2, dtype=torch.float64), objective)
    expected = torch.stack([found[0], found[1].exp()])
    torch.testing.assert_close(optimal_constant_solution(numbers, loss="gaussian_nll"), expected, atol=1e-6, rtol=0)


def test_distances_are_those_of_torch_distributions():
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=logits), Categorical(shares.expand(5, 3)))
    torch.testing.assert_close(distance_to_ocs(logits, shares), expected)
    output = torch.stack([logits[:, 0], logits[:, 1].exp()], 1)
    expected = kl_divergence(Normal(output[:, 0], output[:, 1].sqrt()), Normal(torch.tensor(3.0), torch.tensor(2.0)))
    got = distance_to_ocs(output, torch.tensor([3.0, 4.0], dtype=torch.float64), loss="gaussian_nll")
    torch.testing.assert_close(got, expected)
    expected = F.mse_loss(logits, shares.expand(5, 3), reduction="none").mean(1)
    torch.testing.assert_close(distance_to_ocs(logits, shares, loss="mse"), expected)
    assert distance_to_ocs(torch.tensor([1.0, 4.0]), torch.tensor(2.0), loss="mse").tolist() == [1, 4]


def test_abstaining_is_the_best_constant_action_when_classes_are_even():
    rewards = abstention_rewards(torch.arange(10), 10)
    constant = optimal_constant_solution(rewards, loss="mse")
    torch.testing.assert_close(constant, torch.tensor([-3.5] * 10 + [0.0]))  # the paper's, for ten classes
    assert ocs_abstention_policy(constant.unsqueeze(0)).tolist() == [-1]
    assert ocs_abstention_policy(rewards).tolist() == list(range(10))
    assert ocs_abstention_policy(torch.zeros(1, 4)).tolist() == [-1]
    assert abstention_rewards(torch.tensor([1]), 2, cost=0.5).tolist() == [[-0.5, 1.0, 0.0]]


def test_table_by_hand():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)).double()
    near, far = torch.randn(2, 6, 1, 3, generator=generator, dtype=torch.float64)
    constant = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    table = extrapolation_table(model, {"near": near, "far": [far[:4], far[4:]]}, constant, layers=["0", "3"])
    assert [row["severity"] for row in table] == ["near", "far"]
    with torch.no_grad():
        for x, row in zip((near, far), table):
            p = model(x).softmax(1)
            assert row["distance"] == pytest.approx((p * (p / constant).log()).sum(1).mean().item())
            assert row["spread"] == pytest.approx(p.numpy().std(0).mean())
        maps = [F.conv1d(x, model[0].weight) for x in (near, far)]
        inner = [F.linear(model[:3](x), model[3].weight) for x in (near, far)]
    for name, values in (("0", maps), ("3", inner)):
        sizes = [np.linalg.norm(v.numpy().reshape(6, -1), axis=1).mean() for v in values]
        assert [row[name] for row in table] == pytest.approx([1, sizes[1] / sizes[0]])


def test_constants_accumulate_from_the_layer_on():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 1, generator=generator)  # so that no ReLU is silent
    got = accumulated_constants(model, "2", torch.ones(5, 2))
    expected = model[4](model[2].bias.relu()).detach()
    torch.testing.assert_close(got, expected.expand(5, 2))
    assert not model[2]._forward_pre_hooks
    assert (model(torch.ones(5, 2)) > got).all()


def test_share_is_that_of_the_leading_singular_vectors():
    axes = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    weight = torch.diag(torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)) @ axes[:3]
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64) @ axes
    # Of the norm, root of 13.25, the first has 82% and the first two 99%.
    for share, kept in ((0.8, 1), (0.95, 5), (1.0, 14)):
        assert aligned_share(rows, weight, share=share).item() == pytest.approx(kept / 30)
    assert aligned_share(torch.zeros(1, 4), weight.float()).item() == 0


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"loss: expected one of 'cross_entropy', 'mse', 'gaussian_nll', got 'l1'"):
        optimal_constant_solution(numbers, loss="l1")
    with pytest.raises(ValueError, match=r"classes: expected more than the largest target 2, got 2"):
        optimal_constant_solution(labels, classes=2)
    with pytest.raises(ValueError, match=r"target: expected a tensor with at least one row"):
        optimal_constant_solution(numbers[:0], loss="mse")
    with pytest.raises(ValueError, match=r"constant: expected shape \(3,\), got \(2,\)"):
        distance_to_ocs(torch.ones(4, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"layer: expected the name of a module, got 'head'"):
        accumulated_constants(nn.ReLU(), "head", numbers)
    with pytest.raises(ValueError, match=r"severities: expected at least one, got none"):
        extrapolation_table(nn.ReLU(), {}, numbers)
    with pytest.raises(ValueError, match=r"cost: expected a number >= 0, got -1"):
        abstention_rewards(labels, 3, cost=-1.0)
    with pytest.raises(ValueError, match=r"share: expected a number > 0 and <= 1, got 0.0"):
        aligned_share(torch.ones(1, 2), torch.ones(3, 2), share=0.0)
