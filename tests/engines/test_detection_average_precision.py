"""COCO's average precision against cases worked by hand, and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch

from lossary.detection._average_precision import average_precision, coco_summary
from lossary.detection._overlap import POLYGON

UNIT = [0.0, 0.0, 10.0, 10.0]


def shifted(x):
    """The unit box moved along x; its IoU with the unit box is (10 - x) / (10 + x)."""
    return [x, 0.0, x + 10.0, 10.0]


def ap(detections, truth, **options):
    """Of one image or a list of them; detections are (box, score) pairs."""
    boxes = [torch.tensor([box for box, _ in image]).reshape(-1, 4) for image in detections]
    scores = [torch.tensor([score for _, score in image]) for image in detections]
    return average_precision(boxes, scores, [torch.tensor(image).reshape(-1, 4) for image in truth], **options)


def test_a_perfect_detector_has_a_hundred():
    assert ap([[(UNIT, 0.9)], [(shifted(50.0), 0.1)]], [[UNIT], [shifted(50.0)]]) == pytest.approx(100)


def test_a_miss_above_a_hit_halves_the_precision():
    assert ap([[(shifted(50.0), 0.9), (UNIT, 0.8)]], [[UNIT]]) == pytest.approx(50)


def test_half_of_the_recall_counts_the_recalls_up_to_one_half():
    assert ap([[(UNIT, 0.9)]], [[UNIT, shifted(50.0)]]) == pytest.approx(100 * 51 / 101)


def test_precision_is_the_best_at_this_recall_or_beyond():
    """Hits and misses by score: right, wrong, right. Precision 1 to recall 1/2 (51 of 101 points), then 2/3."""
    detections = [[(UNIT, 0.9), (shifted(90.0), 0.8), (shifted(50.0), 0.7)]]
    assert ap(detections, [[UNIT, shifted(50.0)]]) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_a_duplicate_is_wrong_and_loses_only_what_stands_below_it():
    below = [[(UNIT, 0.9), (shifted(50.0), 0.8), (UNIT, 0.7)]]
    between = [[(UNIT, 0.9), (shifted(50.0), 0.7), (UNIT, 0.8)]]
    truth = [[UNIT, shifted(50.0)]]
    assert ap(below, truth) == pytest.approx(100)
    assert ap(between, truth) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_the_thresholds_up_to_the_overlap_count():
    """A shift of 2 is an IoU of 8 / 12 = 0.667: right at 0.5, 0.55, 0.6 and 0.65 of the ten thresholds."""
    assert ap([[(shifted(2.0), 0.9)]], [[UNIT]]) == pytest.approx(40)
    assert ap([[(shifted(2.0), 0.9)]], [[UNIT]], thresholds=[0.5]) == pytest.approx(100)


def test_each_takes_the_free_box_that_it_overlaps_most():
    """The first prefers the farther truth, 1, since it overlaps it more; the second then still finds 0."""
    truth = [[shifted(0.0), shifted(3.0)]]
    detections = [[(shifted(2.0), 0.9), (shifted(0.5), 0.8)]]
    assert ap(detections, truth, thresholds=[0.5]) == pytest.approx(100)


def test_images_share_one_ranking_and_a_limit_of_their_own():
    """Right at 0.9, wrong at 0.8, right at 0.7, wherever they stand; a limit of one drops the last."""
    detections = [[(UNIT, 0.9)], [(shifted(50.0), 0.8), (UNIT, 0.7)]]
    assert ap(detections, [[UNIT], [UNIT]]) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert ap(detections, [[UNIT], [UNIT]], limit=1) == pytest.approx(100 * 51 / 101)


def test_nothing_found_and_nothing_to_find():
    assert ap([[]], [[UNIT]]) == 0
    assert np.isnan(ap([[(UNIT, 0.9)]], [[]]))


def test_classes_are_averaged_and_those_without_true_boxes_left_out():
    """Class 7 is found, class 2 is not, class 5 has nothing to find."""
    boxes, truth = [torch.tensor([UNIT, shifted(50.0), UNIT])], [torch.tensor([UNIT, shifted(50.0)])]
    scores = [torch.tensor([0.9, 0.8, 0.7])]
    hyper = {"labels": [torch.tensor([7, 5, 2])], "truth_labels": [torch.tensor([7, 2])]}
    assert average_precision(boxes, scores, truth, **hyper) == pytest.approx(50)


def test_a_crowd_may_be_found_by_any_number_and_by_nobody():
    """Three detections within a crowd count for nothing; one that is half in it does not reach a threshold of 0.6."""
    crowd = [20.0, 0.0, 120.0, 10.0]
    found = [(shifted(30.0), 0.9), (shifted(40.0), 0.8), (shifted(115.0), 0.75), (UNIT, 0.7)]
    hyper = {"crowd": [torch.tensor([True, False])], "thresholds": [0.6]}
    assert ap([found], [[crowd, UNIT]], **hyper) == pytest.approx(50)
    assert ap([[*found[:2], found[3]]], [[crowd, UNIT]], **hyper) == pytest.approx(100)
    assert np.isnan(ap([found], [[crowd]], crowd=[torch.tensor([True])]))


def test_areas_out_of_range_count_for_nothing():
    """Boxes of area 100, and one of 400 that finds nothing: wrong only where its size counts."""
    large = [50.0, 50.0, 70.0, 70.0]
    detections = [[(large, 0.9), (UNIT, 0.8)]]
    assert ap(detections, [[UNIT]]) == pytest.approx(50)
    assert ap(detections, [[UNIT]], area_range=(0, 200)) == pytest.approx(100)
    assert np.isnan(ap(detections, [[UNIT]], area_range=(200, 500)))
    assert ap(detections, [[UNIT]], area_range=(200, 500), areas=[torch.tensor([300.0])]) == pytest.approx(50)


def test_boxes_that_are_no_boxes():
    nan = float("nan")
    odd = [([nan, 0.0, 1.0, 1.0], 0.9), ([5.0, 5.0, 5.0, 9.0], 0.8), ([9.0, 9.0, 1.0, 12.0], 0.7)]
    assert ap([[*odd, (UNIT, 0.1)]], [[UNIT]]) == pytest.approx(100 / 4)
    assert ap([[(UNIT, 0.5)]], [[UNIT, [3.0, 3.0, 3.0, 3.0]]]) == pytest.approx(100 * 51 / 101)


def test_polygons():
    """Two triangles of a square: neither overlaps the other, though their bounding boxes are the same."""
    lower, upper = torch.tensor([[0.0, 0, 4, 0, 0, 4]]), torch.tensor([[4.0, 0, 4, 4, 0, 4]])
    assert average_precision([lower], [torch.ones(1)], [lower], overlap=POLYGON) == pytest.approx(100)
    assert average_precision([upper], [torch.ones(1)], [lower], overlap=POLYGON) == 0


def test_refusals():
    one, none = [torch.zeros(1, 4)], [torch.zeros(1)]
    with pytest.raises(ValueError, match="truth: expected one entry for each of 1 images, got 2"):
        ap([[(UNIT, 0.9)]], [[UNIT], [UNIT]])
    with pytest.raises(ValueError, match="boxes: expected shape"):
        average_precision([torch.zeros(2, 4)], [torch.zeros(3)], [torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="labels, truth_labels: expected both or neither"):
        average_precision(one, none, one, labels=[torch.zeros(1).long()])
    with pytest.raises(ValueError, match=r"crowd: expected shape \(1,\), got \(2,\)"):
        average_precision(one, none, one, crowd=[torch.zeros(2).bool()])
    with pytest.raises(ValueError, match="scores: expected numbers, got nan in image 0"):
        average_precision(one, [torch.tensor([float("nan")])], one)
    with pytest.raises(ValueError, match="crowd: expected None for shapes that are not boxes"):
        average_precision(one, none, one, crowd=[torch.zeros(1).bool()], overlap=POLYGON)
    with pytest.raises(ValueError, match="area_range: expected"):
        average_precision(one, none, one, area_range=(0, 10), overlap=POLYGON)


def scenes(seed):
    """Twelve images with three classes, crowds, tied scores, and boxes of all sizes."""
    rng = np.random.default_rng(seed)
    found = {name: [] for name in "boxes scores truth labels truth_labels crowd areas".split()}
    for _ in range(12):
        corner = rng.uniform(0, 300, (rng.integers(0, 7), 2))
        true = np.concatenate([corner, corner + np.exp(rng.uniform(2, 5.5, corner.shape))], axis=1)
        boxes = true.repeat(3, axis=0)
        boxes = boxes + 0.06 * (boxes[:, 2:] - boxes[:, :2]).repeat(2, axis=1) * rng.normal(size=boxes.shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # pycocotools would ignore a negative area
        extra = rng.uniform(0, 300, (8, 2))
        boxes = np.concatenate([boxes, np.concatenate([extra, extra + np.exp(rng.uniform(2, 5, (8, 2)))], axis=1)])
        label = rng.integers(0, 3, len(true))
        wrong = rng.random(3 * len(true)) < 0.15
        found["boxes"].append(boxes)
        found["scores"].append(rng.integers(1, 20, len(boxes)) / 20)
        found["truth"].append(true)
        found["labels"].append(np.append(np.where(wrong, 1, label.repeat(3)), rng.integers(0, 4, 8)))
        found["truth_labels"].append(label)
        found["crowd"].append(rng.random(len(true)) < 0.2)
        found["areas"].append((true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1]) * rng.uniform(0.4, 1, len(true)))
    return found


def by_pycocotools(found):
    """The twelve numbers and the table of precisions, (thresholds, recalls, classes, area ranges, limits)."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    annotations, results = [], []
    for image in range(len(found["boxes"])):
        for kind, rest in (("", [("score", "scores")]), ("truth_", [("iscrowd", "crowd"), ("area", "areas")])):
            for k, (x1, y1, x2, y2) in enumerate(found["truth" if kind else "boxes"][image]):
                entry = {"image_id": image, "category_id": int(found[f"{kind}labels"][image][k])}
                entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1]} | {
                    key: float(found[name][image][k]) for key, name in rest
                }
                (annotations if kind else results).append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco()
        known.dataset = {
            "images": [{"id": image} for image in range(len(found["boxes"]))],
            "annotations": [{**a, "id": 1 + k, "iscrowd": int(a["iscrowd"])} for k, a in enumerate(annotations)],
            "categories": [{"id": label} for label in range(4)],
        }
        known.createIndex()
        theirs = evaluation(known, known.loadRes(results), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    return theirs.stats, theirs.eval["precision"]


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_pycocotools(seed):
    """All twelve numbers to 1e-9 of a point, and AP class by class."""
    found = scenes(seed)
    expected, precisions = by_pycocotools(found)
    tensors = {name: [torch.from_numpy(part) for part in parts] for name, parts in found.items()}
    summary = coco_summary(**tensors)
    assert list(summary) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    np.testing.assert_allclose(list(summary.values()), 100 * expected, atol=1e-9)
    assert average_precision(**tensors) == summary["AP"]
    for label in range(3):
        of_one = {name: list(tensors[name]) for name in tensors}
        for i in range(12):
            mine, theirs = tensors["labels"][i] == label, tensors["truth_labels"][i] == label
            for name in tensors:
                of_one[name][i] = tensors[name][i][mine if name in ("boxes", "scores", "labels") else theirs]
        alone = average_precision(**of_one, area_range=(32.0**2, 96.0**2), thresholds=[0.5], limit=10)
        assert alone == pytest.approx(100 * precisions[0, :, label, 2, 1].mean(), abs=1e-9)
