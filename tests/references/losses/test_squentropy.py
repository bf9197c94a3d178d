"""Squentropy against sums written out in Python, its Hessian in closed form, and torch's losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossary.losses import rescaled_square_loss, squentropy_loss

LOGITS = [[1.0, -2.0, 0.5, 3.0], [0.0, 0.25, -1.5, 2.0], [-4.0, 1.0, 1.0, 0.0]]
TARGET = [3, 0, 1]


def tensors(dtype=torch.float64):
    return torch.tensor(LOGITS, dtype=dtype), torch.tensor(TARGET)


def test_squentropy_term_by_term():
    expected = [
        math.log(math.fsum(math.exp(v) for v in z)) - z[y] + math.fsum(v * v for j, v in enumerate(z) if j != y) / 3
        for z, y in zip(LOGITS, TARGET)
    ]
    assert squentropy_loss(*tensors()).tolist() == pytest.approx(expected, abs=1e-14)


def test_hessian_is_that_of_cross_entropy_plus_two_on_the_wrong_classes_over_their_number():
    z, y = tensors()
    p = z.softmax(-1)
    expected = torch.diag_embed(p + 2 / 3 * (1 - F.one_hot(y, 4).double())) - p.unsqueeze(-1) * p.unsqueeze(-2)
    for row, (logits, label) in enumerate(zip(z, y)):
        hessian = torch.autograd.functional.hessian(lambda v, label=label: squentropy_loss(v, label), logits)
        torch.testing.assert_close(hessian, expected[row], rtol=0, atol=1e-14)


def test_the_best_wrong_logit_solves_its_own_equation():
    """Two classes, true logit t held: at the minimum sigmoid(w - t) + 2 w = 0, so w is slightly below 0."""
    t, w = torch.tensor(3.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (slope,) = torch.autograd.grad(squentropy_loss(torch.stack([t, w]), torch.tensor(0)), w)
        w = (w - 0.3 * slope).detach().requires_grad_()
    low, high = -1.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 / (1 + math.exp(3 - middle)) + 2 * middle > 0 else (middle, high)
    assert w.item() == pytest.approx(low, abs=1e-12)


def test_a_large_true_logit_does_not_swallow_the_wrong_ones_in_half_precision():
    z = torch.full((1, 5), 0.5, dtype=torch.bfloat16)
    z[0, 2] = 60.0
    assert squentropy_loss(z, torch.tensor([2])).item() == 0.25


def test_rescaled_square_is_mean_squared_error_to_the_one_hot_code():
    z, y = tensors()
    expected = F.mse_loss(z, F.one_hot(y, 4).double(), reduction="none").mean(-1)
    torch.testing.assert_close(rescaled_square_loss(z, y), expected, rtol=0, atol=1e-14)


def test_rescaled_square_weighs_and_moves_the_true_class_only():
    z = LOGITS[1]
    expected = (5 * (z[0] - 3) ** 2 + z[1] ** 2 + z[2] ** 2 + z[3] ** 2) / 4
    assert rescaled_square_loss(*tensors(), k=5.0, M=3.0)[1].item() == pytest.approx(expected, abs=1e-14)
