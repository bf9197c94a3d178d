"""YOLOv8-TO against the official formulas written in numpy, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import (
    dice_reconstruction_loss,
    mmc_topology_description,
    render_components,
    render_structure,
)

DOUBLE = torch.float64


def official(bar, n: int, epsilon: float) -> np.ndarray:
    """calc_Phi and smooth_heaviside of the official repository, a pixel at a time: rows y, columns x."""
    x0, y0, length, thickness, angle = bar
    picture = np.zeros((n, n))
    for row in range(n):
        for column in range(n):
            x, y = column / (n - 1) - x0, row / (n - 1) - y0
            u, v = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
            phi = 1 - ((u / (length / 2)) ** 6 + (v / (thickness / 2)) ** 6) ** (1 / 6)
            picture[row, column] = 1 / (1 + math.exp(min(-phi / epsilon, 700)))
    return picture


def test_bars_are_drawn_as_the_official_code_draws_them():
    bars = [(0.4, 0.55, 0.6, 0.13, 0.7), (0.7, 0.2, 0.3, 0.2, -2.0), (0.31, 0.44, 0.05, 0.3, 0.1)]
    for epsilon in (0.001, 0.05, 1.0):
        expected = np.stack([official(bar, 17, epsilon) for bar in bars])
        got = render_components(torch.tensor(bars, dtype=DOUBLE), 17, 17, epsilon=epsilon)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


def test_the_area_of_a_bar():
    """A superellipse of exponent 6 fills Gamma(7/6)^2 / Gamma(4/3) of its rectangle."""
    share = math.gamma(7 / 6) ** 2 / math.gamma(4 / 3)
    bar = torch.tensor([0.5, 0.5, 0.8, 0.4, 0.3], dtype=DOUBLE)
    area = render_components(bar, 401, 401).sum().item() / 400**2
    assert area == pytest.approx(share * 0.8 * 0.4, rel=1e-3)


def test_a_wide_picture_is_measured_by_its_shorter_side():
    """Twice as wide: the same bar stands at the same pixels from the left, and the rest is empty."""
    bar = torch.tensor([0.5, 0.5, 0.6, 0.3, 0.4], dtype=DOUBLE)
    square, wide = (render_components(bar, 21, width) for width in (21, 42))
    torch.testing.assert_close(wide[:, :21], square)
    assert wide[:, 25:].max() < 1e-6
    moved = bar + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(render_components(moved, 21, 42)[:, 20:41], square)


def test_five_numbers_become_a_bar_in_their_box():
    box = torch.tensor([0.2, 0.1, 0.6, 0.4], dtype=DOUBLE)
    numbers = torch.tensor([0.25, 1.0, 0.75, 0.0, 0.1], dtype=DOUBLE)  # from (0.3, 0.4) to (0.5, 0.1)
    expected = [0.4, 0.25, math.hypot(0.2, 0.3) + 1e-4, 0.001 + 0.1 * 0.199, math.atan2(-0.3, 0.2)]
    assert mmc_topology_description(numbers, box).tolist() == pytest.approx(expected)
    both = mmc_topology_description(numbers.expand(2, 3, 5), box.expand(2, 3, 4))
    assert both[1, 2].tolist() == pytest.approx(expected)


def test_gradients_by_finite_differences_and_where_a_bar_vanishes():
    bars = torch.tensor([[0.41, 0.52, 0.6, 0.2, 0.7], [0.3, 0.6, 0.2, 0.1, -1.0]], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: render_components(b, 6, 7, epsilon=0.3), (bars,))
    nothing = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.5, 0.5], requires_grad=True)  # two equal ends, then two more
    box = torch.tensor([0.0, 0.0, 1.0, 1.0])
    bar = mmc_topology_description(nothing[[0, 1, 4, 5, 2]], box)
    picture = render_components(bar, 9, 9, epsilon=0.05)
    picture.sum().backward()
    assert picture.isfinite().all()
    assert nothing.grad.isfinite().all()
    assert render_components(torch.zeros(5), 5, 5).isfinite().all()


def test_dice_by_hand():
    a, b = torch.tensor([[[0.5, 1.0], [0.0, 0.25]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert dice_reconstruction_loss(a, b).tolist() == pytest.approx([1 - (2 * 1.5 + 1) / (1.75 + 2 + 1)])
    assert dice_reconstruction_loss(a, b, smooth=0.25).tolist() == pytest.approx([1 - 3.25 / 4.0])
    assert dice_reconstruction_loss(b, b).tolist() == [0.0]
    assert dice_reconstruction_loss(0 * a, 0 * b).tolist() == [0.0]


def test_a_structure_is_its_bars_summed_and_clipped():
    pictures = torch.tensor([[[[0.2, 0.9, 0.0]], [[0.3, 0.8, 0.0]], [[0.1, 0.0, 0.4]]]])
    assert render_structure(pictures)[0, 0].tolist() == pytest.approx([0.6, 1.0, 0.4])


def test_a_bar_is_found_by_descending_the_loss():
    """Through the renderer, a bar that starts askew finds the mask of another that it overlaps."""
    true = torch.tensor([0.5, 0.45, 0.6, 0.15, 0.3])
    mask = render_components(true, 41, 41).round()
    bar = torch.tensor([0.45, 0.5, 0.45, 0.2, 0.0], requires_grad=True)
    adam = torch.optim.Adam([bar], lr=0.01)
    for _ in range(150):
        adam.zero_grad()
        dice_reconstruction_loss(render_components(bar, 41, 41, epsilon=0.1), mask).backward()
        adam.step()
    found = render_components(bar.detach(), 41, 41).round()
    assert dice_reconstruction_loss(found, mask) < 0.05
    assert bar.detach()[[0, 1, 4]].tolist() == pytest.approx(true[[0, 1, 4]].tolist(), abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmc_topology_description(torch.zeros(4), torch.zeros(4)), "input: expected shape"),
        (lambda: mmc_topology_description(torch.zeros(2, 5), torch.zeros(4)), "boxes: expected shape"),
        (lambda: render_components(torch.zeros(4), 5, 5), "bars: expected shape"),
        (lambda: render_components(torch.zeros(5), 1, 5), "height: expected a whole number >= 2"),
        (lambda: render_components(torch.zeros(5), 5, 1), "width: expected a whole number >= 2"),
        (lambda: render_components(torch.zeros(5), 5, 5, epsilon=0.0), "epsilon: expected a number > 0"),
        (lambda: render_structure(torch.zeros(5, 5)), "pictures: expected at least 3"),
        (lambda: dice_reconstruction_loss(torch.zeros(5), torch.zeros(5)), "input: expected at least 2"),
        (lambda: dice_reconstruction_loss(torch.zeros(5, 4), torch.zeros(4, 5)), "target: expected shape"),
        (lambda: dice_reconstruction_loss(*torch.zeros(2, 4, 4), smooth=0.0), "smooth: expected a number > 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
