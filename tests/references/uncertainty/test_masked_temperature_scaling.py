"""Masked temperature scaling against an enumeration of all masks, and gradient matching worked out for a linear map."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.exceptions import NotFittedError
from torch import nn

from lossary.uncertainty import MaskedTemperatureScaling, masked_distillation_step
from lossary.uncertainty._calibration import calibrated, temperature


def sample(n=200, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((n, classes)) + rng.standard_normal((n, 1))
    return logits, (calibrated(logits, 2.0).cumsum(1) > rng.random((n, 1))).argmax(1)


def test_without_masks_it_is_temperature_scaling():
    logits, labels = sample()
    found = MaskedTemperatureScaling(mask_rate=0.0, masks=2).fit(logits, labels)
    assert found.temperature_ == pytest.approx(temperature(logits, labels), rel=1e-9)
    np.testing.assert_allclose(found.predict_proba(logits), calibrated(logits, temperature(logits, labels)), rtol=1e-8)


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_temperature_is_the_best_over_all_masks(rate):
    """Each of the 2^4 masks with its probability; the masks that are drawn come close to that."""
    rng = np.random.default_rng(0)
    predicted = rng.integers(4, size=60)
    logits = 5 * np.eye(4)[predicted] + rng.standard_normal((60, 4))
    labels = (predicted + (rng.random(60) < 0.3)) % 4

    def expected_loss(log_t):
        total = 0.0
        for mask in itertools.product((0, 1), repeat=4):
            z = np.array(mask) * (logits - logits.mean(1, keepdims=True)) / math.exp(log_t)
            losses = np.log(np.exp(z).sum(1)) - z[np.arange(60), labels]
            total += (1 - rate) ** sum(mask) * rate ** (4 - sum(mask)) * losses.mean()
        return total

    exact = math.exp(minimize_scalar(expected_loss, bounds=(-3, 3), options={"xatol": 1e-9}).x)
    found = MaskedTemperatureScaling(mask_rate=rate, masks=2000).fit(logits, labels)
    assert found.temperature_ == pytest.approx(exact, rel=0.01)
    assert abs(temperature(logits, labels) / exact - 1) > 0.03


def test_offsets_of_rows_and_kind_of_input_do_not_matter():
    logits, labels = sample()
    found = MaskedTemperatureScaling().fit(logits, labels).temperature_
    shifted = MaskedTemperatureScaling().fit(logits + np.arange(200)[:, None], labels).temperature_
    assert shifted == pytest.approx(found, rel=1e-9)
    assert MaskedTemperatureScaling().fit(torch.tensor(logits), torch.tensor(labels)).temperature_ == found
    other = MaskedTemperatureScaling(random_state=1).fit(logits, labels).temperature_
    assert other != found
    assert other == pytest.approx(found, rel=0.2)
    assert (MaskedTemperatureScaling().fit(logits, labels).predict_proba(logits).argmax(1) == logits.argmax(1)).all()


def linear_gradient(weight, bias, x, y):
    """Of the mean cross-entropy by the weight, (C, d): mean (p - onehot) x'."""
    p = calibrated(x @ weight.T + bias, 1.0)
    p[np.arange(len(y)), y] -= 1
    return p.T @ x / len(y)


def test_distance_by_hand_for_a_linear_classifier():
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((3, 5)), rng.standard_normal(3)
    x, real = rng.standard_normal((6, 5)), rng.standard_normal((20, 5))
    y, labels = rng.integers(3, size=6), rng.integers(3, size=20)
    model = nn.Linear(5, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
        model.bias.copy_(torch.tensor(bias))
    kept = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)).numpy() >= 0.4
    g, w = linear_gradient(weight, bias, kept * x, y), linear_gradient(weight, bias, real, labels)
    expected = sum(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(g, w))
    tensors = [torch.tensor(v) for v in (x, y, real, labels)]
    generator = torch.Generator().manual_seed(3)
    got = masked_distillation_step(model, *tensors, mask_rate=0.4, generator=generator)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_its_gradient_reaches_the_kept_pixels_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    real, labels = torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.arange(9) % 3

    def distance(x, rate=0.5):
        generator = torch.Generator().manual_seed(1)
        return masked_distillation_step(
            model, x, torch.arange(4) % 3, real, labels, mask_rate=rate, generator=generator
        )

    assert torch.autograd.gradcheck(distance, (x,))
    (slope,) = torch.autograd.grad(distance(x), x)
    kept = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)) >= 0.5
    assert torch.equal(slope != 0, kept.expand(-1, 2, -1, -1))  # channels share a mask
    assert all(p.grad is None for p in model.parameters())
    (everywhere,) = torch.autograd.grad(distance(x, 0.0), x)
    assert (everywhere != 0).all()


def test_a_step_brings_the_gradients_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    real, labels = torch.randn(60, 8), torch.arange(60) % 3
    x = torch.randn(6, 8, requires_grad=True)
    optimizer, generator = torch.optim.SGD([x], lr=0.1), torch.Generator().manual_seed(0)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = masked_distillation_step(model, x, torch.arange(6) % 3, real, labels, generator=generator)
        value.backward(inputs=[x])
        optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.8 * sum(values[:10])


def test_refusals_name_the_argument():
    logits, labels = sample()
    with pytest.raises(NotFittedError):
        MaskedTemperatureScaling().predict_proba(logits)
    with pytest.raises(ValueError, match=r"mask_rate: expected a number >= 0 and < 1, got 1.0"):
        MaskedTemperatureScaling(mask_rate=1.0).fit(logits, labels)
    with pytest.raises(ValueError, match=r"masks: expected a whole number >= 1, got 0"):
        MaskedTemperatureScaling(masks=0).fit(logits, labels)
    with pytest.raises(ValueError, match=r"X has 3 features, but MaskedTemperatureScaling is expecting 4 features"):
        MaskedTemperatureScaling().fit(logits, labels).predict_proba(logits[:, :3])
    model, g = nn.Linear(5, 3), torch.Generator()
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    for name, wrong in {"x": (x.long(), y, x, y), "y": (x, y[1:], x, y), "real_x": (x, y, x[0], y)}.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            masked_distillation_step(model, *wrong, generator=g)
    with pytest.raises(ValueError, match=r"mask_rate: expected a number >= 0 and < 1"):
        masked_distillation_step(model, x, y, x, y, mask_rate=1.5, generator=g)
