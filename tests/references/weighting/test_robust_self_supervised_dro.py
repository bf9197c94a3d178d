"""Robust self-training against searches over a grid of perturbed samples, and suprema worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.tasks import Seeds, stacked_mlp
from lossary.weighting import RobustSelfTrainingLoss, linear_surrogate_loss, wasserstein_surrogate_loss


def linear(classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(2, classes, device="meta", dtype=torch.float64).to_empty(device="cpu")
    model.load_state_dict(
        {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in model.named_parameters()}
    )
    return model


GRID = torch.cartesian_prod(*[torch.linspace(-4, 4, 401, dtype=torch.float64)] * 2)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("gamma", [0.3, 1.2])
def test_the_linear_form_is_the_worst_sample_of_a_fine_grid(classes, gamma):
    model = linear(classes)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 2, generator=g, dtype=torch.float64), torch.randint(classes, (30,), generator=g)
    got = linear_surrogate_loss(model, x, y, gamma=gamma)
    z = torch.cat([GRID, x])
    wrong = (model(z).argmax(1)[:, None] != y).double()
    worst = (wrong - gamma * torch.cdist(z, x)).amax(0)
    assert got.tolist() == pytest.approx(worst.tolist(), abs=gamma * 0.02)  # the grid is 0.02 wide
    assert ((got > 0.05) & (got < 0.95)).sum() >= 5


def test_the_two_class_form_is_the_papers():
    """clip(1 - gamma y w.x, 0, 1) with |w| = 1, also where the logits share the vector unevenly."""
    w = torch.tensor([0.6, -0.8])
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict({"weight": torch.stack([-0.3 * 5 * w, 0.7 * 5 * w])})
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.1, 0.0], [0.0, -2.0]]), torch.tensor([1, 0, 1, 1])
    got = linear_surrogate_loss(model, x, y, gamma=0.5)
    assert got.tolist() == pytest.approx([1 - 0.5 * 0.6, 1.0, 1 - 0.5 * 0.06, 1 - 0.5 * 1.6], abs=1e-6)


def test_ascent_finds_the_supremum_of_a_quadratic_loss():
    """sup_z c |z|^2 / 2 - gamma |z - x|^2 = c gamma |x|^2 / (2 gamma - c), for c < 2 gamma."""
    x, c, gamma = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64), 0.6, 0.8
    got = wasserstein_surrogate_loss(
        lambda z: z, x, torch.zeros(2), gamma=gamma, loss=lambda z, _: c * z.square().sum(1) / 2, steps=400
    )
    expected = c * gamma * x.square().sum(1) / (2 * gamma - c)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=2e-2)  # steps 1 / t leave t^-0.6
    one = torch.ones(1, 1)  # steps to 3/2 and, half as long, to 13/8
    twice = wasserstein_surrogate_loss(
        lambda z: z, one, one, gamma=1.0, loss=lambda z, _: z[:, 0].square() / 2, steps=2
    )
    assert twice.item() == pytest.approx((13 / 8) ** 2 / 2 - (5 / 8) ** 2)
    plain = wasserstein_surrogate_loss(lambda z: 3 * z, x, torch.tensor([0, 1]), gamma=gamma, steps=0)
    assert torch.equal(plain, F.cross_entropy(3 * x, torch.tensor([0, 1]), reduction="none"))


def test_ascent_on_cross_entropy_finds_what_a_random_search_does_where_the_price_makes_it_concave():
    g = torch.Generator().manual_seed(2)
    model, gamma = linear(3), 4.0
    x, y = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.randint(3, (8,), generator=g)
    weights = model.weight.detach()
    assert torch.linalg.eigvalsh(weights.T @ weights).max() / 4 < gamma  # curvature is at most |W|^2 / 2
    got = wasserstein_surrogate_loss(model, x, y, gamma=gamma, steps=100)
    near = x + 0.3 * torch.randn(20_000, 8, 2, generator=g, dtype=torch.float64)
    values = F.cross_entropy(model(near).flatten(0, 1), y.repeat(20_000), reduction="none").view(20_000, 8)
    worst = (values - gamma * (near - x).square().sum(2)).amax(0)
    assert got.tolist() == pytest.approx(worst.tolist(), abs=2e-3)
    assert (got > F.cross_entropy(model(x), y, reduction="none") + 0.05).any()


def test_the_gradient_is_that_of_the_loss_at_the_worst_sample():
    """l = a.z: z = x + a / (2 gamma), phi = a.x + |a|^2 / (4 gamma), and dphi/da = z."""
    a = torch.tensor([1.0, -3.0], requires_grad=True)
    x = torch.tensor([[2.0, 5.0]])
    loss = wasserstein_surrogate_loss(lambda z: z @ a, x, torch.zeros(1), gamma=0.25, loss=lambda z, _: z, steps=3)
    assert loss.item() == pytest.approx(-13 + 10)
    loss.sum().backward()
    assert a.grad.tolist() == pytest.approx([2 + 1 / 0.5, 5 - 3 / 0.5])


def test_the_objective_averages_both_parts_and_labels_with_predictions():
    model = linear(2)
    g = torch.Generator().manual_seed(3)
    xl, xu = torch.randn(5, 2, generator=g).double(), torch.randn(7, 2, generator=g).double()
    yl = torch.tensor([0, 1, 1, 0, 1])
    objective = RobustSelfTrainingLoss(gamma=0.7, gamma_unlabeled=0.2, lam=3.0, surrogate=linear_surrogate_loss)
    w = (model.weight[1] - model.weight[0]).detach()
    b = (model.bias[1] - model.bias[0]).item()

    def clipped(x, sign, gamma):
        return min(1.0, max(0.0, 1 - gamma * sign * (float(x @ w) + b) / math.hypot(*w.tolist())))

    labelled = [clipped(x, 2 * int(y) - 1, 0.7) for x, y in zip(xl, yl)]
    unlabelled = [clipped(x, math.copysign(1, float(x @ w) + b), 0.2) for x in xu]
    expected = sum(labelled) / 5 + 3 * sum(unlabelled) / 7
    assert objective(model, xl, yl, xu).item() == pytest.approx(expected, abs=1e-9)
    assert objective(model, xl, yl, xu[:0]).item() == pytest.approx(sum(labelled) / 5, abs=1e-9)
    assert objective(model, xl[:0], yl[:0], xu).item() == pytest.approx(3 * sum(unlabelled) / 7, abs=1e-9)


def test_a_stack_of_models_has_an_objective_each():
    seeds = Seeds((0, 1, 2))
    model = stacked_mlp((4, 6, 3), seeds)
    g = torch.Generator().manual_seed(4)
    xl, xu, yl = torch.randn(3, 5, 4, generator=g), torch.randn(3, 6, 4, generator=g), torch.ones(3, 5).long()
    objective = RobustSelfTrainingLoss(gamma=2.0, gamma_unlabeled=1.0, lam=0.5)
    alone = [objective(model.replica(s), xl[s], yl[s], xu[s]) for s in range(3)]
    assert objective(model, xl, yl, xu).tolist() == pytest.approx([value.item() for value in alone], rel=1e-5)


def test_images_and_modules_modes():
    """The squared distance is over a whole image; batch statistics see the worst samples once, not the ascent."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9, 2, bias=False))
    model[2].load_state_dict({"weight": torch.linspace(-1, 1, 18).view(2, 9)})
    model[0].eval()  # frozen
    x = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(5))
    values = wasserstein_surrogate_loss(model, x, torch.zeros(6).long(), gamma=1.0)
    assert values.shape == (6,)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert model[0].running_mean.item() == 0.0
    assert not any(p.grad is not None for p in model.parameters())


def test_refusals():
    model, x, y = linear(2), torch.zeros(3, 2).double(), torch.zeros(3).long()
    with pytest.raises(ValueError, match="gamma: expected a number > 0, got 0"):
        linear_surrogate_loss(model, x, y, gamma=0.0)
    with pytest.raises(ValueError, match=r"y: expected shape \(3,\), got \(2,\)"):
        linear_surrogate_loss(model, x, y[:2], gamma=1.0)
    with pytest.raises(ValueError, match="model: expected logits of at least two classes"):
        linear_surrogate_loss(linear(1), x, y, gamma=1.0)
    with pytest.raises(ValueError, match="x: expected a floating-point tensor"):
        wasserstein_surrogate_loss(model, x.long(), y, gamma=1.0)
    with pytest.raises(ValueError, match="lam: expected a number >= 0"):
        RobustSelfTrainingLoss(lam=-1.0)
