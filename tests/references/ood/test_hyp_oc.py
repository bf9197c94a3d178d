"""Hyperbolic maths against Moebius addition in numpy and distances found by minimising; Hyp-OC's loss as a sum."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from lossary.ood import (
    HyperbolicMLR,
    HypOC,
    RunningMeanPseudoNegatives,
    hyperbolic_pairwise_confusion_loss,
    to_poincare_ball,
)


def plus(u, v, c):
    """Moebius addition."""
    uv, uu, vv = u @ v, u @ u, v @ v
    return ((1 + 2 * c * uv + c * vv) * u + (1 - c * uu) * v) / (1 + 2 * c * uv + c**2 * uu * vv)


def distance(u, v, c):
    return 2 / math.sqrt(c) * math.atanh(math.sqrt(c) * np.linalg.norm(plus(-u, v, c)))


def inner_points(n, c, seed=0):
    """Points of the plane well inside the ball."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.6, 0.6, (n, 2)) / math.sqrt(c)


def made(c, points, normals):
    regression = HyperbolicMLR(2, len(points), curvature=c).double()
    weights = {"points": torch.from_numpy(points), "normals": torch.from_numpy(normals)}
    regression.load_state_dict(weights)
    return regression


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_the_map_moves_as_far_as_the_vector_is_long_in_the_balls_own_metric(c):
    """The metric at a point is 4 / (1 - c r^2)^2 times Euclid's and at the centre 4, hence twice |x|."""
    x = torch.tensor([[0.3, -0.9], [-0.05, 0.02]], dtype=torch.float64)
    for row, point in zip(x, to_poincare_ball(x, curvature=c)):
        nodes, weights = np.polynomial.legendre.leggauss(60)
        r = point.norm().item() * (nodes + 1) / 2
        length = point.norm().item() / 2 * (weights * 2 / (1 - c * r * r)).sum()
        assert length == pytest.approx(2 * row.norm().item(), rel=1e-10)
        torch.testing.assert_close(point / point.norm(), row / row.norm())


def test_clipping_cuts_length_and_keeps_direction():
    x = torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    got = to_poincare_ball(x, curvature=0.1, clip=2.0)
    cut = torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, to_poincare_ball(cut, curvature=0.1, clip=9.0))
    assert got[0].norm().item() == pytest.approx(math.tanh(2 * math.sqrt(0.1)) / math.sqrt(0.1), rel=1e-12)


def test_without_clipping_points_stay_inside_in_every_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        point = to_poincare_ball(torch.tensor([1e3, 1e3], dtype=dtype), curvature=1.0, clip=1e4)
        assert 0.95 < point.norm() < 1
        assert HyperbolicMLR(2, 3, curvature=1.0).to(dtype)(point).isfinite().all()


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_pairwise_distances_are_moebius_ones(c):
    points = inner_points(6, c)
    got = hyperbolic_pairwise_confusion_loss(torch.from_numpy(points), curvature=c)
    expected = [distance(points[i], points[(i + 3) % 6], c) for i in range(6)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    odd = hyperbolic_pairwise_confusion_loss(torch.from_numpy(points[:5]), curvature=c)
    np.testing.assert_allclose(odd, [distance(points[i], points[(i + 2) % 5], c) for i in range(5)], rtol=1e-12)


def test_equal_points_have_no_distance_and_a_finite_gradient():
    points = torch.full((4, 3), 0.2, dtype=torch.float64, requires_grad=True)
    value = hyperbolic_pairwise_confusion_loss(points, curvature=1.0)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    assert (value == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_logits_are_the_formula_with_moebius_addition(c):
    x, rng = inner_points(5, c), np.random.default_rng(1)
    points, normals = rng.normal(size=(2, 3, 2))
    got = made(c, points, normals)(torch.from_numpy(x)).detach().numpy()
    for k in range(3):
        length = np.linalg.norm(points[k])
        p = math.tanh(math.sqrt(c) * length) * points[k] / (math.sqrt(c) * length)
        factor = 2 / (1 - c * p @ p)
        a = normals[k] * (1 - c * p @ p)
        for i in range(5):
            w = plus(-p, x[i], c)
            inside = 2 * math.sqrt(c) * (w @ a) / ((1 - c * w @ w) * np.linalg.norm(a))
            logit = factor * np.linalg.norm(a) / math.sqrt(c) * math.asinh(inside)
            assert got[i, k] == pytest.approx(logit, rel=1e-10)


def test_a_logit_is_the_shortest_way_to_the_plane_times_twice_the_normal():
    c, x, point, normal = 0.7, np.array([0.5, 0.4]), np.array([[-0.3, 0.2]]), np.array([[0.6, -0.8]])
    length = np.linalg.norm(point[0])
    p = math.tanh(math.sqrt(c) * length) * point[0] / (math.sqrt(c) * length)
    along = np.array([0.8, 0.6])
    nearest = minimize(
        lambda t: distance(x, plus(p, math.tanh(t[0]) * along / math.sqrt(c), c), c), [0.0], options={"gtol": 1e-10}
    )
    logit = made(c, point, normal)(torch.from_numpy(x)).item()
    assert abs(logit) == pytest.approx(2 * nearest.fun, rel=1e-8)
    assert logit > 0
    assert made(c, point, -normal)(torch.from_numpy(x)).item() == pytest.approx(-logit, rel=1e-12)


def test_weights_start_as_in_a_linear_layer_from_the_generator_alone():
    state = torch.random.get_rng_state()
    regression = HyperbolicMLR(400, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    for weight in (regression.points, regression.normals):
        assert weight.abs().max() <= 1 / 20
        assert weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not torch.equal(regression.points, regression.normals)


def test_the_running_mean_by_hand_and_at_rest_in_evaluation():
    negatives = RunningMeanPseudoNegatives(2, alpha=0.8)
    first, second = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    g = torch.Generator().manual_seed(0)
    negatives(first, generator=g)
    negatives(second, generator=g)
    torch.testing.assert_close(negatives.mean, torch.tensor([0.8 * 0.4, 0.8 * 0.2 + 0.2 * 5]))
    before = negatives.mean.clone()
    negatives.eval()(first, generator=g)
    assert torch.equal(negatives.mean, before)


def test_negatives_have_the_running_mean_and_the_variance_and_no_gradient():
    negatives = RunningMeanPseudoNegatives(3, alpha=0.0, variance=4.0)
    features = torch.tensor([[1.0, 0.0, -2.0]], dtype=torch.float64).expand(40_000, 3).requires_grad_()
    drawn = negatives(features, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype is torch.float64
    assert not drawn.requires_grad
    torch.testing.assert_close(drawn.mean(0), features[0].detach(), rtol=0, atol=0.04)  # 4 standard errors
    torch.testing.assert_close(drawn.var(0), torch.full((3,), 4.0, dtype=torch.float64), rtol=0.03, atol=0)


def one_class(**hyper):
    head = torch.nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6]]))
        head.bias.copy_(torch.tensor([0.1, -0.1]))
    made = HypOC(head, 3, 2, generator=torch.Generator().manual_seed(3), **hyper).double()
    with torch.no_grad():
        made.classifier.normals.mul_(3)
    return made


FEATURES = torch.tensor([[0.5, 1.0, -0.3], [0.2, 0.7, 0.1], [0.9, 1.4, -0.5], [0.4, 0.8, 0.0]], dtype=torch.float64)


def test_the_loss_is_two_cross_entropies_and_the_pairs():
    part = one_class(confusion=0.5, curvature=0.3, clip=1.0)
    got = part(FEATURES, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    both = torch.cat([FEATURES, 0.2 * FEATURES.mean(0) + noise])
    points = to_poincare_ball(part.head(both), curvature=0.3, clip=1.0)
    values = F.cross_entropy(part.classifier(points), torch.tensor([0] * 4 + [1] * 4), reduction="none")
    p = points[:4].detach().numpy()
    pairs = torch.tensor([distance(p[i], p[(i + 2) % 4], 0.3) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(got, (values[:4] + values[4:]) / 2 + 0.5 * pairs)
    mean_of_pairs = (pairs[0] + pairs[1]) / 2
    torch.testing.assert_close(got.mean(), values.mean() + 0.5 * mean_of_pairs)


def test_the_score_is_the_log_odds_of_the_second_class():
    part = one_class().eval()
    probability = part.classifier(part.embed(FEATURES)).softmax(1)[:, 1]
    torch.testing.assert_close(part.anomaly_score(FEATURES), torch.logit(probability))


def test_a_state_dict_continues_the_run():
    part, other = one_class(), one_class()
    part(FEATURES, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    again = [p(FEATURES, generator=torch.Generator().manual_seed(1)) for p in (part, other)]
    assert torch.equal(*again)
    assert torch.equal(part.negatives.mean, other.negatives.mean)


def test_trained_on_a_flat_class_it_scores_what_leaves_the_plane_higher():
    g = torch.Generator().manual_seed(0)

    def rows(n):
        return torch.cat([torch.randn(n, 1, generator=g) + 1, torch.randn(n, 1, generator=g) / 20], dim=1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = HypOC(torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), 2, 4)
    optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        part(rows(32), generator=g).mean().backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optimizer.step()
    usual, strange = rows(200), rows(200) + torch.tensor([0.0, 1.0])
    wins = part.eval().anomaly_score(strange).unsqueeze(1) > part.anomaly_score(usual)
    assert wins.double().mean() > 0.95


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"curvature: expected a number > 0, got 0.0"):
        to_poincare_ball(torch.ones(2), curvature=0.0)
    with pytest.raises(ValueError, match=r"curvature: expected a number, got a tensor"):
        HyperbolicMLR(2, 2, curvature=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x: expected 2 features last, got shape \(3,\)"):
        HyperbolicMLR(2, 2)(torch.ones(3))
    with pytest.raises(ValueError, match=r"points: expected 2 dimensions, got shape \(3,\)"):
        hyperbolic_pairwise_confusion_loss(torch.ones(3))
    with pytest.raises(ValueError, match=r"alpha: expected a number >= 0 and < 1, got 1.0"):
        RunningMeanPseudoNegatives(2, alpha=1.0)
    with pytest.raises(ValueError, match=r"variance: expected a number > 0, got 0.0"):
        one_class(variance=0.0)
    with pytest.raises(ValueError, match=r"features: expected \(batch, 3\), got shape \(4, 2\)"):
        one_class()(FEATURES[:, :2])
    with pytest.raises(ValueError, match=r"confusion: expected a number >= 0, got -1.0"):
        one_class(confusion=-1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees():
    g = torch.Generator().manual_seed(0)
    got = one_class().cuda()(FEATURES.cuda(), generator=g).cpu()
    torch.testing.assert_close(got, one_class()(FEATURES, generator=torch.Generator().manual_seed(0)))
