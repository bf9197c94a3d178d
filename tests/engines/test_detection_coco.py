"""COCO's files: what pycocotools reads and computes from the same ones, round trips, and refusals by name."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from lossary.detection._average_precision import coco_summary
from lossary.detection._coco import (
    Annotations,
    Detections,
    read_annotations,
    read_detections,
    write_annotations,
    write_detections,
)
from lossary.errors import BadInput

TRUTH = {
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 700.5, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 18, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    ],
}
FOUND = [{"image_id": 9, "category_id": 1, "bbox": [11.5, 20, 30, 40], "score": 0.75}]


def saved(folder, data, name="truth.json"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_reads_what_is_written_there(tmp_path):
    truth = read_annotations(saved(tmp_path, TRUTH))
    assert truth.images == (4, 9)
    assert truth.categories == {18: "dog", 1: "person"}
    assert [boxes.tolist() for boxes in truth.boxes] == [[], [[10, 20, 40, 60], [0, 0, 5, 5]]]
    assert [labels.tolist() for labels in truth.labels] == [[], [1, 0]]
    assert truth.crowd[1].tolist() == [False, True]
    assert truth.areas[1].tolist() == [700.5, 25]
    assert truth.boxes[0].shape == (0, 4)
    found = read_detections(saved(tmp_path, FOUND, "found.json"), truth)
    assert [boxes.tolist() for boxes in found.boxes] == [[], [[11.5, 20, 41.5, 60]]]
    assert (found.scores[1].tolist(), found.labels[1].tolist()) == ([0.75], [1])


def random_scenes(seed):
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.uniform(0, 200, (n, 2))
        return torch.from_numpy(np.concatenate([corner, corner + rng.uniform(10, 90, (n, 2))], axis=1))

    counts = rng.integers(0, 6, 8)
    truth = Annotations(
        images=tuple(range(3, 11)),
        categories={7: "cat", 2: "dog", 5: "bird"},
        boxes=[boxes(n) for n in counts],
        labels=[torch.from_numpy(rng.integers(0, 3, n)) for n in counts],
        crowd=[torch.from_numpy(rng.random(n) < 0.2) for n in counts],
        areas=[torch.from_numpy(rng.uniform(50, 9000, n)) for n in counts],
    )
    near = [part.repeat(2, 1) + torch.from_numpy(rng.normal(0, 3, (2 * len(part), 4))) for part in truth.boxes]
    scores = [torch.from_numpy(rng.random(len(part))) for part in near]
    return truth, Detections(near, scores, [labels.repeat(2) for labels in truth.labels])


def test_round_trip_and_what_pycocotools_makes_of_the_files(tmp_path):
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    truth, found = random_scenes(0)
    write_annotations(tmp_path / "truth.json", truth)
    write_detections(tmp_path / "found.json", found, truth)
    again = read_annotations(tmp_path / "truth.json")
    detected = read_detections(tmp_path / "found.json", again)
    assert (again.images, again.categories) == (truth.images, truth.categories)
    for name in ("boxes", "labels", "crowd", "areas"):
        for mine, theirs in zip(getattr(again, name), getattr(truth, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with contextlib.redirect_stdout(io.StringIO()):
        known = coco(str(tmp_path / "truth.json"))
        theirs = evaluation(known, known.loadRes(str(tmp_path / "found.json")), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    summary = coco_summary(
        detected.boxes,
        detected.scores,
        again.boxes,
        labels=detected.labels,
        truth_labels=again.labels,
        crowd=again.crowd,
        areas=again.areas,
    )
    np.testing.assert_allclose(np.nan_to_num(list(summary.values()), nan=-100), 100 * theirs.stats, atol=1e-9)


def changed(path, value):
    """TRUTH with one value replaced, or removed for ...."""
    data = json.loads(json.dumps(TRUTH))
    part = data
    for key in path[:-1]:
        part = part[key]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "truth.json: is not JSON: "),
        ([1], "truth.json: expected an object with images, annotations and categories, got a list"),
        (changed(["images"], ...), "truth.json: images: expected a list, got nothing"),
        (changed(["images", 0], 3), r"truth.json: images\[0\]: expected an object, got 3"),
        (changed(["images", 0, "id"], "9"), r"truth.json: images\[0\].id: expected a whole number, got '9'"),
        (changed(["images", 0, "id"], 4), "truth.json: images: expected ids that differ, got 4 twice"),
        (
            changed(["annotations", 1, "image_id"], 5),
            r"annotations\[1\].image_id: expected the id of one of the images, got 5",
        ),
        (
            changed(["annotations", 0, "category_id"], ...),
            r"annotations\[0\].category_id: .* one of the categories, got nothing",
        ),
        (
            changed(["annotations", 0, "bbox"], [1, 2, 3]),
            r"annotations\[0\].bbox: expected x, y, width and height, got \[1, 2, 3\]",
        ),
        (changed(["annotations", 0, "bbox", 2], -1), r"annotations\[0\].bbox: expected width and height >= 0"),
        (changed(["annotations", 0, "bbox", 2], "x"), r"annotations\[0\].bbox: expected a finite number, got 'x'"),
        (changed(["annotations", 0, "area"], None), r"annotations\[0\].area: expected a finite number, got nothing"),
    ],
)
def test_annotations_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(BadInput, match=message):
        read_annotations(saved(tmp_path, data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"annotations": []}, "found.json: expected a list, got an object"),
        ([{**FOUND[0], "image_id": 10}], r"found.json: \[0\].image_id: expected the id of one of the images, got 10"),
        (
            [FOUND[0], {**FOUND[0], "score": float("nan")}],
            r"found.json: \[1\].score: expected a finite number, got nan",
        ),
        ([{k: v for k, v in FOUND[0].items() if k != "score"}], r"\[0\].score: expected a finite number, got nothing"),
    ],
)
def test_detections_are_refused_by_name(tmp_path, data, message):
    truth = read_annotations(saved(tmp_path, TRUTH))
    with pytest.raises(BadInput, match=message):
        read_detections(saved(tmp_path, data, "found.json"), truth)


def test_files_that_are_not_there_and_boxes_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match=r"none.json: cannot be read: No such file"):
        read_annotations(tmp_path / "none.json")
    truth, found = random_scenes(1)
    with pytest.raises(ValueError, match="detections: expected 8 images, got 7"):
        write_detections(
            tmp_path / "found.json", Detections(found.boxes[1:], found.scores[1:], found.labels[1:]), truth
        )
    busy = next(i for i, part in enumerate(found.boxes) if len(part))
    found.boxes[busy][0, 0] = float("nan")
    with pytest.raises(ValueError, match="detections: expected finite boxes and scores, got others in image"):
        write_detections(tmp_path / "found.json", found, truth)


def test_no_images(tmp_path):
    truth = read_annotations(saved(tmp_path, {"images": [], "annotations": [], "categories": []}))
    assert truth.boxes == []
    assert read_detections(saved(tmp_path, [], "found.json"), truth).boxes == []
