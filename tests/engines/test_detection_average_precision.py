"""COCO's average precision against cases worked by hand, and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch

from lossary.detection._average_precision import average_precision

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


def test_refusals():
    with pytest.raises(ValueError, match="truth: expected one entry for each image, got 1, 1 and 2"):
        ap([[(UNIT, 0.9)]], [[UNIT], [UNIT]])
    with pytest.raises(ValueError, match="boxes: expected shape"):
        average_precision([torch.zeros(2, 4)], [torch.zeros(3)], [torch.zeros(1, 4)])


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    rng = np.random.default_rng(seed)
    boxes, scores, truth, annotations, results = [], [], [], [], []

    def listed(box, image):
        (x, y), (w, h) = box[:2], box[2:] - box[:2]
        return {"image_id": image, "category_id": 1, "bbox": [x, y, w, h]}

    for image in range(5):
        corner = rng.uniform(0, 60, (rng.integers(1, 6), 2))
        true = np.concatenate([corner, corner + rng.uniform(10, 30, corner.shape)], axis=1)
        found = true.repeat(3, axis=0) + rng.normal(0, 2, (3 * len(true), 4))
        score = rng.integers(1, 20, len(found)) / 20
        annotations += [{**listed(box, image), "area": 1.0, "iscrowd": 0} for box in true]
        results += [{**listed(box, image), "score": s} for box, s in zip(found, score)]
        for kept, value in ((boxes, found), (scores, score), (truth, true)):
            kept.append(torch.from_numpy(value))
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco()
        known.dataset = {
            "images": [{"id": image} for image in range(5)],
            "annotations": [{**a, "id": 1 + k} for k, a in enumerate(annotations)],
            "categories": [{"id": 1}],
        }
        known.createIndex()
        theirs = evaluation(known, known.loadRes(results), "bbox")
        theirs.params.areaRng, theirs.params.areaRngLbl = [[0, 1e10]], ["all"]
        theirs.evaluate()
        theirs.accumulate()
    expected = 100 * theirs.eval["precision"][:, :, 0, 0, -1].mean()
    assert average_precision(boxes, scores, truth) == pytest.approx(expected, abs=1e-9)
