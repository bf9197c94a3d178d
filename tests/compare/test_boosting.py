"""Losses and weightings inside gradient boosting: derivatives, floors, weights, and LightGBM's results in the limit."""

import pickle

import numpy as np
import pytest
import torch

from lossary.compare.boosting import Objective
from lossary.compare.training import Fold, fitted, predict
from lossary.tasks import Seeds

TREES = {"family": "boosting", "learning_rate": 0.1, "num_leaves": 8, "n_estimators": 20}


def part(name: str, role: str = "loss", **hyper: object) -> dict[str, object]:
    return {"part": name, "role": role, "hyper": hyper}


def setting(*parts: dict[str, object], weight: str | None = None, **more: object) -> dict[str, object]:
    return {**TREES, "class_weight": weight, "parts": list(parts), **more}


def fold(classes: int, **more: object) -> Fold:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4)).astype(np.float32)
    score = x[:, 0] - x[:, 1] + rng.normal(size=400)
    y = np.digitize(score, np.quantile(score, np.linspace(0, 1, classes + 1)[1:-1])) if classes else 50 + 7 * score
    return Fold(x[:300], y[:300], x[300:], classes, **more)


def test_at_its_plain_limit_a_loss_gives_the_trees_that_lightgbm_grows():
    data = fold(2)
    own, _ = predict(setting(part("losses.poly1_cross_entropy", epsilon=0.0)), data, Seeds((0,)))
    plain, _ = predict({**TREES, "class_weight": None}, data, Seeds((0,)))
    np.testing.assert_allclose(np.exp(own), np.exp(plain), atol=1e-6)
    other, _ = predict(setting(part("losses.poly1_cross_entropy", epsilon=3.0)), data, Seeds((0,)))
    assert np.abs(np.exp(other) - np.exp(plain)).max() > 0.01


@pytest.mark.parametrize("classes", [2, 4])
def test_cross_entropy_has_its_closed_form(classes):
    objective = Objective(setting(part("losses.poly1_cross_entropy", epsilon=0.0)), fold(classes))
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(300, classes) if classes > 2 else 300)
    slope, curve = objective(None, raw)
    y = fold(classes).y
    if classes == 2:
        p = 1 / (1 + np.exp(-raw))
        np.testing.assert_allclose(slope, p - y, atol=1e-12)
    else:
        p = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
        np.testing.assert_allclose(slope, p - np.eye(classes)[y], atol=1e-12)
    np.testing.assert_allclose(curve, np.maximum(p * (1 - p), np.abs(slope) / 20), atol=1e-12)


def test_squared_error_has_its_closed_form():
    data = fold(0)
    weighting = part("weighting.DynamicLossGate", "weighting", warmup=100)  # which lets all rows through until then
    objective = Objective({**TREES, "error": "squared", "parts": [weighting]}, data)
    raw = np.random.default_rng(2).normal(size=300)
    slope, curve = objective(None, raw)
    y = (data.y - data.y.mean()) / data.y.std()
    np.testing.assert_allclose(slope, 2 * (raw - y), atol=1e-12)
    np.testing.assert_allclose(curve, 2.0)


def test_curvature_agrees_with_differences_where_the_loss_is_convex_and_is_floored_elsewhere():
    objective = Objective(setting(part("losses.comp_sum_loss", tau=1.5)), fold(3))  # like generalised cross-entropy
    raw = np.random.default_rng(3).normal(size=(300, 3))
    slope, curve = objective(None, raw)
    step = 1e-5
    numeric = np.empty_like(raw)
    for k in range(3):
        up, down = raw.copy(), raw.copy()
        up[:, k] += step
        down[:, k] -= step
        numeric[:, k] = (objective(None, up)[0][:, k] - objective(None, down)[0][:, k]) / (2 * step)
    size = np.abs(slope)
    floor = np.maximum(size * (1 - size), size / 20)
    np.testing.assert_allclose(curve, np.maximum(numeric, floor), atol=1e-7)
    assert (numeric < 0).any()
    assert (curve > 0).all()


def test_weights_of_rows_and_classes_scale_both():
    weight = np.random.default_rng(4).uniform(0.5, 2, 300)
    entry = part("losses.poly1_cross_entropy", epsilon=1.0)
    raw = np.random.default_rng(5).normal(size=(300, 3))
    plain = Objective(setting(entry), fold(3))(None, raw)
    weighted = Objective(setting(entry), fold(3, weight=weight))(None, raw)
    for one, other in zip(plain, weighted):
        np.testing.assert_allclose(other, one * weight[:, None], atol=1e-12)
    data = fold(3)
    counts = np.bincount(data.y)
    balanced = Objective(setting(entry, weight="balanced"), data)(None, raw)
    np.testing.assert_allclose(balanced[0], plain[0] * (300 / (3 * counts[data.y]))[:, None], atol=1e-12)


def test_a_weighting_is_asked_anew_in_every_round():
    data = fold(2, group=np.arange(300) % 2)
    objective = Objective(setting(part("weighting.GroupDRO", "weighting", step_size=0.5)), data)
    raw = np.where(data.group == 0, 3.0, -3.0)  # one group is served worse
    first, second = (objective(None, raw)[0] for _ in range(2))
    p = 1 / (1 + np.exp(-raw))
    shares = [np.unique((slope / (p - data.y)).round(9)) for slope in (first, second)]
    assert len(shares[0]) == 2
    assert shares[1].max() > shares[0].max()


def test_what_is_fitted_can_be_kept():
    for classes, name in ((3, "losses.poly1_cross_entropy"), (0, "losses.log_cosh_loss")):
        data = fold(classes)
        made = fitted({**setting(part(name)), "error": "squared"}, data, Seeds((0,)))
        again = pickle.loads(pickle.dumps(made))
        np.testing.assert_array_equal(again(data.test), made(data.test))
    assert torch.is_grad_enabled()


def test_labels_have_trees_of_their_own():
    data = fold(2)
    both = Fold(data.x, np.stack([data.y, 1 - data.y], 1), data.test, 2, several=True)
    odds, _ = predict({**TREES, "class_weight": None}, both, Seeds((0,)))
    alone, _ = predict({**TREES, "class_weight": None}, data, Seeds((0,)))
    np.testing.assert_allclose(odds[0, :, 0], alone[0, :, 1] - alone[0, :, 0], atol=1e-9)
    assert odds.shape == (1, 100, 2)
