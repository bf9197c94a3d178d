"""Soft-NMS against its official code, a published example and hard suppression."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import batched_soft_nms, soft_nms

# TensorFlow's and TFLite's test of NonMaxSuppressionV5 (ScoreThreshold 0, IoU threshold 1). Its kernel is
# exp(-0.5 iou^2 / soft_nms_sigma) with soft_nms_sigma 0.5, which is our sigma 1.
TENSORFLOW_BOXES = [
    [0, 0, 1, 1],
    [0, 0.1, 1, 1.1],
    [0, -0.1, 1, 0.9],
    [0, 10, 1, 11],
    [0, 10.1, 1, 11.1],
    [0, 100, 1, 101],
]
TENSORFLOW_SCORES = [0.9, 0.75, 0.6, 0.95, 0.5, 0.3]

# Printed by the official code, bharatsingh430/soft-nms lib/nms/cpu_nms.pyx, with sigma 0.5, Nt 0.3, threshold 0.001.
# It counts a box's last pixel as part of the box, so its boxes are ours with 1 added to x2 and y2.
OFFICIAL_BOXES = [[10, 10, 50, 60], [12, 12, 52, 58], [30, 10, 70, 60], [100, 100, 140, 150], [11, 9, 49, 61]]
OFFICIAL_SCORES = [0.9, 0.85, 0.8, 0.7, 0.6]
OFFICIAL = {
    "linear": ([0, 3, 2, 1, 4], [0.9, 0.7, 0.5245902, 0.0865335, 0.0064232]),
    "gaussian": ([0, 3, 2, 1, 4], [0.9, 0.7, 0.6311722, 0.1586633, 0.0244158]),
    "hard": ([0, 3], [0.9, 0.7]),
}


def test_published_example_of_tensorflow():
    keep, scores = soft_nms(torch.tensor(TENSORFLOW_BOXES), torch.tensor(TENSORFLOW_SCORES), sigma=1.0)
    assert keep.tolist() == [3, 0, 1, 5, 4, 2]
    np.testing.assert_allclose(scores.numpy(), [0.95, 0.9, 0.384, 0.3, 0.256, 0.197], atol=5e-4)


@pytest.mark.parametrize("method", OFFICIAL)
def test_the_official_code(method):
    boxes = torch.tensor(OFFICIAL_BOXES) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    keep, scores = soft_nms(boxes, torch.tensor(OFFICIAL_SCORES), method=method)
    assert keep.tolist() == OFFICIAL[method][0]
    np.testing.assert_allclose(scores.numpy(), OFFICIAL[method][1], rtol=2e-6)


def test_one_pair_by_hand():
    """An IoU of 1/3: the Gaussian gives exp(-(1/9) / sigma), the line 2/3, but only above its threshold."""
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    scores = torch.tensor([0.9, 0.6])
    assert soft_nms(boxes, scores, sigma=0.25)[1][1].item() == pytest.approx(0.6 * math.exp(-4 / 9))
    assert soft_nms(boxes, scores, method="linear", iou_threshold=0.3)[1][1].item() == pytest.approx(0.4)
    assert soft_nms(boxes, scores, method="linear", iou_threshold=0.35)[1][1].item() == pytest.approx(0.6)
    assert soft_nms(boxes, scores, method="hard", iou_threshold=0.3)[0].tolist() == [0]
    assert soft_nms(boxes, scores, method="hard", iou_threshold=0.35)[0].tolist() == [0, 1]


def test_an_overlap_of_exactly_the_threshold_is_left_alone():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 2.0]])  # an IoU of 1/2
    for method in ("linear", "hard"):
        _, scores = soft_nms(boxes, torch.tensor([0.9, 0.6]), method=method, iou_threshold=0.5)
        assert scores.tolist() == pytest.approx([0.9, 0.6])


def test_the_next_best_is_chosen_after_the_decay():
    """1 starts above 2 but overlaps 0, falls behind it, and can then no longer decay it."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 4.0], [3.0, 0.0, 7.0, 4.0]])
    keep, scores = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), sigma=0.5)
    decay = {(0, 1): 12 / 20, (0, 2): 4 / 28, (1, 2): 8 / 24}
    f = {pair: math.exp(-(iou**2) / 0.5) for pair, iou in decay.items()}
    assert keep.tolist() == [0, 2, 1]
    assert scores.tolist() == pytest.approx([0.9, 0.7 * f[0, 2], 0.8 * f[0, 1] * f[1, 2]])


def test_what_falls_below_the_score_threshold_is_gone_and_decays_nothing():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [50.0, 50.0, 60.0, 60.0]])
    keep, _ = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.05]), sigma=0.1, score_threshold=0.1)
    assert keep.tolist() == [0]


def test_classes_leave_each_other_alone():
    rng = np.random.default_rng(0)
    corner = rng.uniform(-20, 20, (30, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(5, 20, (30, 2))], axis=1))
    scores, idxs = torch.from_numpy(rng.uniform(0.1, 1, 30)), torch.from_numpy(rng.integers(-1, 3, 30))
    keep, decayed = batched_soft_nms(boxes, scores, idxs, method="linear")
    expected = {}
    for number in idxs.unique().tolist():
        (mine,) = torch.where(idxs == number)
        kept, left = soft_nms(boxes[mine], scores[mine], method="linear")
        expected |= dict(zip(mine[kept].tolist(), left.tolist(), strict=True))
    assert dict(zip(keep.tolist(), decayed.tolist(), strict=True)) == expected
    assert decayed.tolist() == sorted(expected.values(), reverse=True)


def test_of_equal_scores_the_lower_index_goes_first():
    boxes = torch.tensor([[9.0, 9.0, 10.0, 10.0], [0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    scores = torch.full((3,), 0.5)
    assert soft_nms(boxes, scores)[0].tolist() == [0, 1, 2]
    assert batched_soft_nms(boxes, scores, torch.tensor([2, 0, 1]))[0].tolist() == [0, 1, 2]


def test_keeps_what_ensemble_boxes_keeps():
    """It returns the scores undecayed, so only the boxes are compared."""
    peer = pytest.importorskip("ensemble_boxes").soft_nms
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 0.7, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.3, (40, 2))], axis=1)
    scores = rng.uniform(0.01, 1, 40)
    for number, method in ((1, "linear"), (2, "gaussian")):
        theirs, _, _ = peer([boxes], [scores], [np.zeros(40)], method=number, iou_thr=0.3, sigma=0.2, thresh=0.05)
        keep, _ = soft_nms(
            torch.from_numpy(boxes), torch.from_numpy(scores), method=method, sigma=0.2, score_threshold=0.05
        )
        assert sorted(map(tuple, boxes[keep])) == sorted(map(tuple, theirs))


def test_refusals():
    boxes, scores = torch.zeros(2, 4), torch.zeros(2)
    for wrong, message in (
        ({"sigma": 0.0}, "sigma: expected a number > 0, got 0.0"),
        ({"iou_threshold": 1.5}, "iou_threshold: expected a number >= 0 and <= 1, got 1.5"),
        ({"score_threshold": -0.1}, "score_threshold: expected a number >= 0, got -0.1"),
        ({"method": "soft"}, "method: expected one of 'gaussian', 'linear', 'hard', got 'soft'"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_nms(boxes, scores, **wrong)
