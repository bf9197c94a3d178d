"""NMS-AP against the steps of the official script done one by one in lists, cases by hand, and closed forms."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import NMSAveragePrecision, hard_negative_queries, nms_average_precision
from lossary.detection._average_precision import average_precision

UNIT = [0.0, 0.0, 10.0, 10.0]


def image(detections, truth):
    """Tensors from (box, score, label) and (box, label)."""
    boxes, scores, labels = zip(*detections) if detections else ((), (), ())
    true, names = zip(*truth) if truth else ((), ())
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "truth": torch.tensor(true).reshape(-1, 4),
        "truth_labels": torch.tensor(names, dtype=torch.int64),
    }


def measured(*images, **hyper):
    return nms_average_precision(**{name: [i[name] for i in images] for name in images[0]}, **hyper)


def ordinary(*images, **hyper):
    return average_precision(**{name: [i[name] for i in images] for name in images[0]}, **hyper)


def shifted(x):
    return [x, 0.0, x + 10.0, 10.0]


@pytest.mark.parametrize("mode", ["ground_truth", "class_agnostic"])
def test_a_wrong_name_with_the_higher_score_takes_the_object(mode):
    right_first = image([(UNIT, 0.9, 0), (UNIT, 0.8, 1)], [(UNIT, 0)])
    wrong_first = image([(UNIT, 0.8, 0), (UNIT, 0.9, 1)], [(UNIT, 0)])
    assert measured(right_first, mode=mode) == pytest.approx(100)
    assert measured(wrong_first, mode=mode) == 0
    assert ordinary(wrong_first) == pytest.approx(100)


def test_what_touches_no_true_box_stays_and_still_counts_against_its_label():
    away = image([(shifted(50.0), 0.9, 0), (shifted(50.0), 0.95, 0), (UNIT, 0.8, 0)], [(UNIT, 0)])
    assert measured(away) == pytest.approx(100 / 3)
    assert measured(away, mode="class_agnostic") == pytest.approx(50)


def test_what_one_true_box_keeps_another_cannot_send_away():
    """The detection between two true boxes (IoU 7/13 and 1 with them) is best for the second only."""
    crowd = image([(shifted(0.0), 0.9, 0), (shifted(3.0), 0.8, 0)], [(shifted(0.0), 0), (shifted(3.0), 0)])
    assert measured(crowd, thresholds=[0.5]) == pytest.approx(100 * 51 / 101)  # 0.9 is the best for both of them
    crowd["scores"] = torch.tensor([0.9, 0.8])
    crowd["truth"] = torch.tensor([shifted(-1.0), shifted(5.0)])  # 9/11 and 5/15 with the first, 6/14 and 8/12
    assert measured(crowd, thresholds=[0.5]) == pytest.approx(100)


def test_the_threshold_is_not_included():
    """An IoU of exactly 1/2 is no contact."""
    half = image([([0.0, 0.0, 5.0, 10.0], 0.9, 1), (UNIT, 0.8, 0)], [(UNIT, 0)])
    assert measured(half) == pytest.approx(100)
    assert measured(half, iou_threshold=0.49) == 0


def by_the_script(case, threshold):
    """Its steps on lists: who is kept, who is removed, and removed but not kept."""
    keep, remove = [], []
    boxes, scores = case["boxes"].tolist(), case["scores"].tolist()
    for g in case["truth"].tolist():
        near = []
        for k, p in enumerate(boxes):
            common = max(0, min(g[2], p[2]) - max(g[0], p[0])) * max(0, min(g[3], p[3]) - max(g[1], p[1]))
            areas = (g[2] - g[0]) * (g[3] - g[1]) + (p[2] - p[0]) * (p[3] - p[1])
            if common / (areas - common) > threshold:
                near.append(k)
        near.sort(key=lambda k: -scores[k])
        keep += near[:1]
        remove += near[1:]
    gone = set(remove) - set(keep)
    return [k for k in range(len(boxes)) if k not in gone]


def random_image(rng):
    corner = rng.uniform(0, 60, (5, 2))
    truth = np.concatenate([corner, corner + rng.uniform(15, 30, (5, 2))], axis=1)
    boxes = (truth[:, None] + rng.normal(0, 3, (5, 4, 4))).reshape(-1, 4)
    return {
        "boxes": torch.from_numpy(boxes),
        "scores": torch.from_numpy(rng.permutation(20) / 20),
        "labels": torch.from_numpy(rng.integers(0, 3, 20)),
        "truth": torch.from_numpy(truth),
        "truth_labels": torch.from_numpy(rng.integers(0, 3, 5)),
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_the_official_script(threshold):
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(6)]
    kept = []
    for case in images:
        keep = by_the_script(case, threshold)
        assert len(keep) < 20
        kept.append({**case, **{name: case[name][keep] for name in ("boxes", "scores", "labels")}})
    assert measured(*images, iou_threshold=threshold) == pytest.approx(ordinary(*kept), abs=1e-12)
    assert measured(*images, iou_threshold=threshold) < ordinary(*images)


def test_names_that_are_never_true_leave_ap_at_a_hundred_and_lower_nms_ap_to_the_share_that_is_right():
    images = [image([(UNIT, 0.5, 0), (UNIT, 0.4 if k < 6 else 0.6, 1)], [(UNIT, 0)]) for k in range(8)]
    assert ordinary(*images) == pytest.approx(100)
    assert measured(*images) == pytest.approx(100 * 76 / 101)  # recalls 0, 0.01, ..., 0.75


def test_the_accumulating_form_is_the_same():
    rng = np.random.default_rng(1)
    images = [random_image(rng) for _ in range(4)]
    metric = NMSAveragePrecision(iou_threshold=0.4)
    for start in (0, 2):
        batch = images[start : start + 2]
        metric.update(
            [{name: i[name] for name in ("boxes", "scores", "labels")} for i in batch],
            [{"boxes": i["truth"], "labels": i["truth_labels"]} for i in batch],
        )
    assert metric.compute() == measured(*images, iou_threshold=0.4)
    metric.reset()
    assert math.isnan(metric.compute())
    with pytest.raises(ValueError, match="target: expected one for each of 1 predictions, got 0"):
        metric.update([{}], [])


def test_queries():
    similarity = torch.tensor([[1.0, 0.2, 0.7, 0.7], [0.2, 1.0, 0.1, 0.8], [0.7, 0.1, 1.0, 0.3], [0.7, 0.8, 0.3, 1.0]])
    labels = [torch.tensor([1, 0, 1]), torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    queries = hard_negative_queries(labels, similarity, negatives=2)
    assert [q.tolist() for q in queries] == [[0, 1, 3, 2], [2, 0, 3], [0, 1]]
    assert hard_negative_queries(labels, similarity, negatives=0)[0].tolist() == [0, 1]
    assert hard_negative_queries(labels[:1], similarity, negatives=9)[0].tolist() == [0, 1, 3, 2]


def test_nothing_found_nothing_true_and_boxes_that_are_no_boxes():
    assert measured(image([], [(UNIT, 0)])) == 0
    assert math.isnan(measured(image([(UNIT, 0.9, 0)], [])))
    odd = image([([math.nan, 0.0, 1.0, 1.0], 0.9, 0), ([3.0, 3.0, 3.0, 3.0], 0.8, 0), (UNIT, 0.7, 0)], [(UNIT, 0)])
    assert measured(odd) == pytest.approx(100 / 3)


def test_refusals():
    case = image([(UNIT, 0.9, 0)], [(UNIT, 0)])
    for wrong, message in (
        ({"mode": "soft"}, "mode: expected one of 'ground_truth', 'class_agnostic', got 'soft'"),
        ({"iou_threshold": 1.5}, "iou_threshold: expected a number >= 0 and <= 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(case, **wrong)
    with pytest.raises(ValueError, match="labels: expected an int64 tensor"):
        measured({**case, "labels": case["labels"].double()})
    with pytest.raises(ValueError, match="labels: expected one entry for each of 1 images, got 0"):
        nms_average_precision(**{name: [] if name == "labels" else [value] for name, value in case.items()})
    with pytest.raises(ValueError, match="similarity: expected shape"):
        hard_negative_queries([], torch.zeros(2, 3), negatives=1)
    with pytest.raises(ValueError, match="negatives: expected a whole number >= 0"):
        hard_negative_queries([], torch.zeros(2, 2), negatives=-1)
