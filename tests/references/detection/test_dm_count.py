"""DM-Count against POT's Sinkhorn, finite differences of the entropic cost, and crowds small enough to do by hand."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import count_loss, dm_count_loss, dot_map, sinkhorn_ot_loss, total_variation_loss

STRIDE, HEIGHT, WIDTH = 4, 3, 5


@pytest.fixture
def crowd():
    """Two images of 3 x 5 cells, with 4 and 2 points."""
    rng = np.random.default_rng(0)
    density = torch.from_numpy(rng.uniform(0.1, 1.0, (2, 1, HEIGHT, WIDTH)))
    points = [torch.from_numpy(rng.uniform(0, [STRIDE * WIDTH, STRIDE * HEIGHT], (n, 2))) for n in (4, 2)]
    return density, points


def costs(points):
    """Squared distances from each point to each cell, row by row."""
    return np.array(
        [
            [(x - STRIDE * (j + 0.5)) ** 2 + (y - STRIDE * (i + 0.5)) ** 2 for i in range(HEIGHT) for j in range(WIDTH)]
            for x, y in points.tolist()
        ]
    )


@pytest.mark.parametrize("reg", [2.0, 10.0])
def test_value_and_gradient_are_those_of_pots_plan(crowd, reg):
    ot = pytest.importorskip("ot")
    density, points = crowd
    density.requires_grad_()
    values = sinkhorn_ot_loss(density, points, stride=STRIDE, reg=reg, iterations=600)
    values.sum().backward()
    for i, p in enumerate(points):
        z = density[i].detach().flatten().numpy()
        a, b, cost = np.full(len(p), 1 / len(p)), z / z.sum(), costs(p)
        plan, log = ot.bregman.sinkhorn_log(a, b, cost, reg, numItermax=600, stopThr=0, log=True, warn=False)
        assert values[i].item() == pytest.approx((cost * plan).sum() + reg * (plan * np.log(plan)).sum(), rel=1e-9)
        beta = reg * log["log_v"]
        expected = beta / z.sum() - (beta * z).sum() / z.sum() ** 2
        np.testing.assert_allclose(density.grad[i].flatten().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_after_few_iterations_it_is_the_official_order_cells_first(crowd):
    density, points = crowd
    density.requires_grad_()
    sinkhorn_ot_loss(density, points, stride=STRIDE, iterations=3).sum().backward()
    for i, p in enumerate(points):
        z = density[i].detach().flatten().numpy()
        kernel = np.exp(-costs(p) / 10)
        u = np.full(len(p), 1 / len(p))
        for _ in range(3):
            v = z / z.sum() / (u @ kernel)
            u = 1 / len(p) / (kernel @ v)
        beta = 10 * np.log(v)
        expected = beta / z.sum() - (beta * z).sum() / z.sum() ** 2
        np.testing.assert_allclose(density.grad[i].flatten().numpy(), expected, rtol=1e-5, atol=1e-8)


def test_gradient_is_the_derivative_of_the_value(crowd):
    density, points = crowd
    torch.autograd.gradcheck(
        lambda z: dm_count_loss(z, points, stride=STRIDE, iterations=150),
        (density.requires_grad_(),),
        atol=1e-5,
        fast_mode=True,
    )


def test_transport_pulls_the_mass_towards_the_points():
    density = torch.full((1, 1, 1, 4), 1.0, requires_grad=True)
    sinkhorn_ot_loss(density, [torch.tensor([[28.0, 4.0]])]).sum().backward()
    slopes = density.grad.flatten().tolist()
    assert slopes == sorted(slopes, reverse=True)
    assert sum(slopes) == pytest.approx(0, abs=1e-3)


def test_one_cell_and_two_points_by_hand():
    density = torch.tensor([[[[0.7]]]], dtype=torch.float64)
    points = [torch.tensor([[1.0, 4.0], [4.0, 6.0]], dtype=torch.float64)]  # the cell's centre is 4, 4
    assert sinkhorn_ot_loss(density, points).item() == pytest.approx((9 + 4) / 2 - 10 * math.log(2))
    assert total_variation_loss(density, points).item() == pytest.approx(0, abs=1e-6)
    expected = 1.3 + 0.1 * (6.5 - 10 * math.log(2))
    assert dm_count_loss(density, points).item() == pytest.approx(expected, abs=1e-6)


def test_total_variation_is_the_mass_in_wrong_cells_times_the_count():
    density = torch.tensor([[[[2.0, 2.0, 0.0]]]], dtype=torch.float64)
    points = [torch.tensor([[4.0, 4.0], [20.0, 4.0], [21.0, 3.0], [22.0, 2.0]], dtype=torch.float64)]
    assert total_variation_loss(density, points).item() == pytest.approx(0.75, abs=1e-6)
    got = dm_count_loss(density, points, transport_weight=0.0, variation_weight=0.5).item()
    assert got == pytest.approx(0.5 * 4 * 0.75, abs=1e-5)


def test_default_weights(crowd):
    density, points = crowd
    ot = sinkhorn_ot_loss(density, points, stride=8, reg=10.0, iterations=100)
    tv = total_variation_loss(density, points) * torch.tensor([4.0, 2.0])
    expected = count_loss(density, points) + 0.1 * ot + 0.01 * tv
    torch.testing.assert_close(dm_count_loss(density, points), expected)


def test_default_iterations_where_they_matter():
    density = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 9
    points = [64 * torch.rand(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
    got = sinkhorn_ot_loss(density, points).item()
    assert got == pytest.approx(sinkhorn_ot_loss(density, points, iterations=100).item(), rel=1e-9)
    assert got != pytest.approx(sinkhorn_ot_loss(density, points, iterations=90).item(), rel=1e-7)


def test_an_image_is_not_changed_by_its_neighbours(crowd):
    density, points = crowd
    both = dm_count_loss(density, points, stride=STRIDE)
    alone = [dm_count_loss(density[i : i + 1], points[i : i + 1], stride=STRIDE) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_dots_by_rows_and_columns():
    got = dot_map(torch.tensor([[7.9, 0.0], [8.0, 0.0], [23.0, 15.0], [-1.0, 9.0]]), (2, 3))
    assert got.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_without_points_only_the_sum_counts():
    density = torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = dm_count_loss(density, [torch.zeros(0, 2), torch.zeros(0, 2)])
    torch.testing.assert_close(loss, density.sum((1, 2, 3)))
    loss.sum().backward()
    assert density.grad.unique().tolist() == [1.0]


def test_without_density_transport_is_silent_and_nearly_none_does_not_explode():
    density = torch.tensor([0.0, 1e-12]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone().requires_grad_()
    points = [torch.tensor([[3.0, 3.0]])] * 2
    loss = sinkhorn_ot_loss(density, points)
    loss.sum().backward()
    assert loss[0].item() == 0
    assert density.grad[0].abs().max() == 0
    assert density.grad[1].abs().max() < 1
    assert dm_count_loss(density, points).isfinite().all()


def test_cells_without_mass_and_far_away_stay_finite():
    density = torch.zeros(1, 1, 64, 64)
    density[0, 0, 63, 63] = 3.0
    density.requires_grad_()
    loss = sinkhorn_ot_loss(density, [torch.tensor([[1.0, 1.0]])])
    assert loss.item() == pytest.approx(2 * (508.0 - 1) ** 2, rel=1e-4)  # one cell, one point: their distance
    loss.sum().backward()
    assert density.grad.isfinite().all()


def test_half_precision_follows_the_input(crowd):
    density, points = crowd
    half = density.bfloat16().requires_grad_()
    loss = dm_count_loss(half, points, stride=STRIDE)
    loss.sum().backward()
    assert loss.dtype == half.grad.dtype == torch.bfloat16
    half_cost, cost = (sinkhorn_ot_loss(z, points, stride=STRIDE) for z in (half.detach(), half.detach().double()))
    torch.testing.assert_close(half_cost.double(), cost, rtol=4e-3, atol=0.0)  # rounded once, at the end


def test_refusals(crowd):
    density, points = crowd
    with pytest.raises(ValueError, match="points: expected a list of 2 tensors"):
        dm_count_loss(density, points[:1])
    with pytest.raises(ValueError, match="points: expected a list of 2 tensors"):
        count_loss(density, torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match=r"points: expected shape \(4, 2\)"):
        dm_count_loss(density, [torch.zeros(4, 3), points[1]])
    with pytest.raises(ValueError, match="density: expected 4 dimensions"):
        count_loss(density[0], points)
    with pytest.raises(ValueError, match=r"density: expected shape \(2, 1, 3, 5\)"):
        count_loss(density.expand(2, 2, 3, 5), points)
    with pytest.raises(ValueError, match="reg: expected a number > 0"):
        sinkhorn_ot_loss(density, points, reg=0.0)
    with pytest.raises(ValueError, match="transport_weight: expected a number, got a tensor"):
        dm_count_loss(density, points, transport_weight=torch.tensor(0.1))
    with pytest.raises(ValueError, match="stride: expected a whole number >= 1"):
        dot_map(points[0], (2, 2), stride=0)
