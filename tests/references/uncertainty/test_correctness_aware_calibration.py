"""Correctness-aware calibration against hand-worked values, the best constant in each group, and a slow look-up."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.exceptions import NotFittedError

from lossary.uncertainty import TransformAwareTemperature, correctness_aware_loss
from lossary.uncertainty._calibration import temperature


def test_loss_by_hand():
    logits = torch.log(torch.tensor([[5.0, 3.0, 2.0], [5.0, 3.0, 2.0], [1.0, 1.0, 8.0]], dtype=torch.float64))
    values = correctness_aware_loss(logits, torch.tensor([0, 2, 2]))
    torch.testing.assert_close(values, torch.tensor([0.25, 0.25, 0.04], dtype=torch.float64))


def test_a_narrow_error_is_where_it_parts_from_cross_entropy():
    """True class close behind the predicted one: cross-entropy sharpens, the correctness-aware loss flattens."""
    z = torch.tensor([1.0, 0.9, -1.0, -1.0, -1.0], dtype=torch.float64)
    inverse = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    slopes = []
    for loss in (correctness_aware_loss, lambda i, t: F.cross_entropy(i, t, reduction="none")):
        value = loss((inverse * z).unsqueeze(0), torch.tensor([1])).sum()
        slopes.append(torch.autograd.grad(value, inverse)[0].item())
    p = z.softmax(0)
    by_hand = 2 * p[0] * p[0] * (z[0] - p @ z)  # 2 (c_hat - 0) c_hat'
    assert slopes[0] == pytest.approx(by_hand.item(), rel=1e-12)
    assert slopes[0] > 0 > slopes[1] == pytest.approx((p @ z - z[1]).item(), rel=1e-12)


def two_groups(n=400):
    """Logits all alike; the copy agrees in the even rows, 90% right, and not in the odd ones, 50% right."""
    even = np.arange(n) % 2 == 0
    right = np.where(even, np.arange(n) % 20 != 0, np.arange(n) % 4 == 1)
    logits = np.tile([1.0, 0.0, 0.0, 0.0], (n, 1))
    views = np.where(even[:, None], logits, logits[:, ::-1])[None]
    return logits, np.where(right, 0, 3), views, even, right


@pytest.mark.parametrize("balanced", [False, True])
def test_confidence_is_how_often_each_group_is_right(balanced):
    """A squared error is least at the (weighted) mean of what it is held against."""
    logits, labels, views, even, right = two_groups()
    calibrator = TransformAwareTemperature(balanced=balanced, learning_rate=0.1).fit(logits, labels, views)
    got = calibrator.predict_proba(logits, views).max(1)
    weights = np.where(right, 1 / right.mean(), 1 / (~right).mean()) if balanced else np.ones(len(right))
    for group in (even, ~even):
        np.testing.assert_allclose(got[group], np.average(right[group], weights=weights[group]), atol=2e-3)


def test_any_loss_trains_it():
    """Cross-entropy with the errors spread evenly: p = 0.5 for the top class, at T = 2 / log(0.5 * 3 / 0.5)."""
    logits = np.tile([2.0, 0.0, 0.0, 0.0], (60, 1))
    labels = np.tile([0, 1, 0, 2, 0, 3], 10)

    def loss(input, target):
        return F.cross_entropy(input, target, reduction="none")

    calibrator = TransformAwareTemperature(loss=loss).fit(logits, labels)
    assert calibrator.temperature_ == pytest.approx(2 / math.log(3), rel=1e-9)
    np.testing.assert_allclose(calibrator.temperatures(logits), 2 / math.log(3), rtol=1e-4)


def test_temperatures_stop_at_their_bounds():
    logits = np.tile([1.0, 0.0, 0.0], (50, 1))
    for labels, bound in ((0, 0.1), (1, 10.0)):
        calibrator = TransformAwareTemperature(learning_rate=0.5).fit(logits, np.full(50, labels))
        np.testing.assert_allclose(calibrator.temperatures(logits), bound, rtol=1e-6)


def sample(n=120, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((n, classes))
    views = [logits + rng.standard_normal((n, classes)) for _ in range(3)]
    return logits, (logits + 2 * rng.standard_normal((n, classes))).argmax(1), views


def test_features_are_looked_up_at_the_originals_top_classes():
    """The network that was learned, fed by hand with p of each view at the k-th class of the original."""
    logits, labels, views = sample()
    calibrator = TransformAwareTemperature(top=2, steps=100).fit(logits, labels, views)
    for row in range(10):
        best = sorted(range(5), key=lambda c, z=logits[row]: -z[c])[:2]
        features = []
        for view in views:
            exponentials = [math.exp(value) for value in view[row]]
            features += [exponentials[c] / sum(exponentials) for c in best]
        first, second = calibrator.network_[0], calibrator.network_[2]
        hidden = first.weight.detach().numpy() @ features + first.bias.detach().numpy()
        t = second.weight.detach().numpy()[0] @ hidden.clip(min=0) + second.bias.item()
        expected = logits[row] / min(max(t, 0.1), 10.0)
        got = np.log(calibrator.predict_proba(logits[row : row + 1], [v[row : row + 1] for v in views])[0])
        np.testing.assert_allclose(got - got[0], expected - expected[0], atol=1e-9)


def test_classes_may_be_renamed_and_predictions_stay():
    logits, labels, views = sample()
    order = np.array([3, 0, 4, 1, 2])  # new column i is old column order[i]
    plain = TransformAwareTemperature(steps=60).fit(logits, labels, views).predict_proba(logits, views)
    renamed = TransformAwareTemperature(steps=60)
    renamed.fit(logits[:, order], np.argsort(order)[labels], [v[:, order] for v in views])
    got = renamed.predict_proba(logits[:, order], [v[:, order] for v in views])
    np.testing.assert_allclose(got, plain[:, order], rtol=1e-7)
    assert (plain.argmax(1) == logits.argmax(1)).all()


def test_tensors_and_fewer_classes_than_top():
    logits, labels, views = sample(classes=2)
    as_tensors = torch.tensor(logits), torch.tensor(labels), torch.tensor(np.stack(views))
    first, second = (TransformAwareTemperature(top=4, steps=20).fit(*a) for a in ((logits, labels, views), as_tensors))
    assert np.array_equal(first.predict_proba(logits, views), second.predict_proba(as_tensors[0], as_tensors[2]))
    assert first.network_[0].in_features == 6


def test_training_begins_at_the_single_temperature():
    logits, labels, views = sample()
    calibrator = TransformAwareTemperature(steps=1, learning_rate=1e-9).fit(logits, labels, views)
    np.testing.assert_allclose(calibrator.temperatures(logits, views), temperature(logits, labels), rtol=1e-6)


def test_refusals_name_the_argument():
    logits, labels, views = sample()
    fitted = TransformAwareTemperature(steps=1).fit(logits, labels, views)
    with pytest.raises(NotFittedError):
        TransformAwareTemperature().predict_proba(logits)
    with pytest.raises(ValueError, match=r"views: expected 3 of 120 rows each, got \[120\]"):
        fitted.predict_proba(logits)
    with pytest.raises(ValueError, match=r"views: expected 3 of 120 rows each, got \[120, 120, 119\]"):
        fitted.predict_proba(logits, [*views[:2], views[2][1:]])
    with pytest.raises(ValueError, match=r"X has 4 features, but TransformAwareTemperature is expecting 5 features"):
        fitted.predict_proba(logits[:, :4], views)
    with pytest.raises(ValueError, match=r"views: contains NaN"):
        fitted.predict_proba(logits, [*views[:2], views[2] * np.nan])
    with pytest.raises(ValueError, match=r"top: expected a whole number >= 1, got 0"):
        TransformAwareTemperature(top=0).fit(logits, labels)
    with pytest.raises(ValueError, match=r"labels: expected classes 0 to 4"):
        TransformAwareTemperature().fit(logits, labels + 1)
