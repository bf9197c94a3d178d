"""NC1, NC2 and the measures of neural collapse against the official code's numbers and the simplex in closed form."""

import math

import numpy as np
import pytest
import torch

from lossary.weighting import NC1Loss, nc2_loss, neural_collapse_metrics

H = torch.tensor(
    [[0.5, -1.0, 2.0], [1.5, 0.0, 1.0], [-0.5, 1.0, 0.0], [2.0, 2.0, -1.0], [0.0, -1.5, -2.5], [-1.0, -1.0, -1.0]]
)
MU = [[1.0, 0.0, 1.0], [0.0, 1.0, -0.5], [-1.0, 0.5, 0.25], [0.5, -2.0, 1.0]]


def simplex(classes, width, generator=None):
    """Unit vectors with all cosines -1 / (classes - 1), somewhere in `width` dimensions."""
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return corners / corners.norm(dim=1, keepdim=True) @ rotation[:classes]


def test_nc1_and_its_pull_on_the_means_are_the_official_codes():
    nc1 = NC1Loss(4, 3)
    nc1.means.data.copy_(torch.tensor(MU))
    value = nc1(H, torch.tensor([0, 0, 1, 3, 0, 3]))  # class 2 is absent
    value.backward()
    assert value.item() == pytest.approx(5.3125)  # NC1Loss in losses.py of Pepper-lll/NCfeature, as all that follows
    expected = [[1 / 6, 5 / 12, 5 / 12], [0.25, 0.0, -0.25], [0.0, 0.0, 0.0], [0.0, -1.25, 1.0]]
    assert torch.allclose(nc1.means.grad, torch.tensor(expected), atol=1e-6)


def test_nc2_and_its_gradient_are_the_official_codes():
    means = torch.tensor(MU, requires_grad=True)
    value = nc2_loss(means)
    value.backward()
    expected = [
        [-0.0026, -0.4365, 0.0778],
        [-0.3440, 0.0618, 0.0706],
        [0.1567, 0.2641, -0.2632],
        [0.1899, 0.1105, 0.1149],
    ]
    assert value.item() == pytest.approx(-1.1906521, abs=1e-6)
    assert torch.allclose(means.grad, torch.tensor(expected), atol=5e-5)


def test_measures_are_the_official_codes():
    weight = torch.tensor([[0.5, -0.5, 1.0], [-1.0, 1.0, 0.0], [0.2, 0.3, 0.1], [1.0, 0.0, -1.0]])
    bias = torch.tensor([0.1, -0.2, 0.3, 0.0])
    found = neural_collapse_metrics(H.double(), torch.tensor([0, 0, 1, 3, 2, 3]), weight=weight.double(), bias=bias)
    # analysisNC in double precision; its spread of norms has C - 1 in the divisor.
    expected = {
        "nc1": 2.6735537190082685,
        "norm_spread": 0.42060605015548863 * math.sqrt(3 / 4),
        "cosine_gap": 0.3672244347905855,
        "nc3": 0.9604394593318212,
        "nc4": 1 / 3,
    }
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, abs=1e-6)


def test_an_absent_class_and_its_classifier_row_are_passed_over():
    target, weight = torch.tensor([0, 0, 1, 2, 1, 2]), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    gap = torch.cat([weight[:1], torch.full((1, 3), 9.0), weight[1:]])
    plain = neural_collapse_metrics(H, target, weight=weight)
    gapped = neural_collapse_metrics(H, torch.tensor([0, 2, 3])[target], weight=gap)
    assert list(plain.values()) == list(gapped.values())


def test_a_simplex_is_full_collapse():
    corners = simplex(5, 7, torch.Generator().manual_seed(1))
    target = torch.arange(5).repeat_interleave(3)
    weight = 0.2 * corners
    found = neural_collapse_metrics(3 * corners[target] + 11.0, target, weight=weight, bias=-11.0 * weight.sum(1))
    assert list(found) == ["nc1", "norm_spread", "cosine_spread", "cosine_gap", "nc3", "nc4"]
    assert [value.item() for value in found.values()] == pytest.approx([0.0] * 6, abs=1e-10)
    assert nc2_loss(3 * corners + 11.0).item() == pytest.approx(-math.acos(-1 / 4), abs=1e-10)


def test_within_class_variation_is_measured_by_the_pseudo_inverse():
    """Three means of norm 2 on a simplex: S_B is 2 on its plane and 0 off it, and what is off it does not count."""
    plane = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(3) / 2], [-0.5, -math.sqrt(3) / 2]], dtype=torch.float64)
    corners = torch.cat([2 * plane, torch.zeros(3, 2, dtype=torch.float64)], dim=1)
    steps = torch.tensor([[0.3, 0.0, 5.0, 0.0], [-0.3, 0.0, -5.0, 0.0], [0.0, 0.5, 0.0, 1.0], [0.0, -0.5, 0.0, -1.0]])
    h = (corners.unsqueeze(1) + steps.double()).flatten(0, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    found = neural_collapse_metrics(h @ turn, torch.arange(3).repeat_interleave(4))
    assert found["nc1"].item() == pytest.approx((0.3**2 + 0.5**2) / 2 / 2 / 3)


def test_spread_of_cosines_is_over_pairs():
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    found = neural_collapse_metrics(means, torch.arange(4))  # two cosines of 0 and one of -1 for each mean
    assert found["cosine_spread"].item() == pytest.approx(math.sqrt(2) / 3, abs=1e-6)
    assert found["cosine_gap"].item() == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3, abs=1e-6)


@pytest.mark.parametrize("target", [[0] * 6, [0, 0, 1, 1, 2, 2]])
def test_without_a_difference_between_classes_there_is_no_measure(target):
    h = H if target == [0] * 6 else torch.ones(6, 3)
    assert all(value.isnan() for value in neural_collapse_metrics(h, torch.tensor(target)).values())


def test_descent_on_nc2_ends_at_a_simplex():
    means = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    optimizer = torch.optim.SGD([means], lr=0.3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 250)
        optimizer.zero_grad()
        nc2_loss(means).backward()
        optimizer.step()
    centred = (means - means.mean(0)).detach().numpy()
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert (centred @ centred.T)[~np.eye(4, dtype=bool)] == pytest.approx(np.full(12, -1 / 3), abs=0.01)


def test_descent_on_both_gathers_features_on_their_class_however_rare():
    g = torch.Generator().manual_seed(4)
    h, y = torch.randn(21, 3, generator=g, requires_grad=True), torch.tensor([0] * 18 + [1] * 2 + [2])
    nc1 = NC1Loss(3, 3, generator=g)
    optimizer = torch.optim.SGD([{"params": [h], "lr": 2.0}, {"params": nc1.parameters()}], lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        (nc1(h, y) + 0.1 * nc2_loss(nc1.means)).backward()
        optimizer.step()
    found = neural_collapse_metrics(h.detach(), y)
    assert found["nc1"] < 1e-3
    assert found["cosine_gap"] < 0.05


def test_a_stack_is_its_replicas():
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    stack = NC1Loss(4, 3, generator=generators)
    h, y = torch.stack([H, H.flip(1)]), torch.tensor([[0, 0, 1, 3, 0, 3], [2, 1, 1, 3, 0, 0]])
    values = stack(h, y)
    for s in range(2):
        alone = NC1Loss(4, 3, generator=torch.Generator().manual_seed(5 + s))
        assert alone(h[s], y[s]).item() == pytest.approx(values[s].item(), abs=1e-6)
        assert nc2_loss(alone.means).item() == pytest.approx(nc2_loss(stack.means)[s].item(), abs=1e-6)


def test_nc2_gradient_agrees_with_finite_differences():
    means = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nc2_loss, means)


def test_refusals():
    with pytest.raises(ValueError, match="num_classes: expected a whole number >= 2, got 1"):
        NC1Loss(1, 3)
    with pytest.raises(ValueError, match=r"means: expected at least two classes, got shape \(1, 3\)"):
        nc2_loss(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"features: expected shape \(6, 2\), got \(6, 3\)"):
        NC1Loss(4, 2)(H, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 3\), got \(4, 2\)"):
        neural_collapse_metrics(H, torch.tensor([0, 0, 1, 3, 2, 3]), weight=torch.zeros(4, 2))


def test_means_that_all_but_coincide_are_cut_off():
    close = torch.tensor([[1.0, 1e-3], [1.0, -1e-3], [-1.0, 1e-3], [-1.0, -1e-3]], requires_grad=True)
    value = nc2_loss(close)
    value.backward()
    assert value.item() == pytest.approx(-math.acos(0.99999), abs=1e-5)
    assert not close.grad.any()
