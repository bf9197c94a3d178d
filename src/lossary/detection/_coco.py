"""COCO's JSON, in and out: true boxes ("instances") and detections ("results"), as lists of tensors, one an image.

What is read goes straight into `_average_precision`. Boxes are x1, y1, x2, y2 here and x, y, width, height there.
Masks and keypoints are passed over.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossary import require
from lossary.errors import BadInput


@dataclass(frozen=True)
class Annotations:
    """True boxes of N images.

    Attributes:
        images: COCO's image ids (N,).
        categories: COCO's category id -> name, in the order of the file; label k is the k-th of them.
        boxes: of each image (T, 4) float64, x1, y1, x2, y2 in pixels.
        labels: (T,) int64.
        crowd: (T,) bool.
        areas: (T,) float64, of the masks where the file has them.
    """

    images: tuple[int, ...]
    categories: dict[int, str]
    boxes: list[Tensor]
    labels: list[Tensor]
    crowd: list[Tensor]
    areas: list[Tensor]


@dataclass(frozen=True)
class Detections:
    """Detections in the same N images: boxes (D, 4), scores (D,) float64 and labels (D,) of each."""

    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]


def read_annotations(path: str | Path) -> Annotations:
    """True boxes from a file such as instances_val2017.json, images by ascending id, as pycocotools takes them.

    Raises:
        BadInput: a file that is missing, is no JSON or is no such file; the message names the entry.
    """
    data = _loaded(path)
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected an object with images, annotations and categories, got {_kind(data)}")
    parts = {name: _entries(path, name, data.get(name)) for name in ("images", "annotations", "categories")}
    images = tuple(sorted(_ids(path, "images", parts["images"])))
    ids = _ids(path, "categories", parts["categories"])
    categories = {i: str(entry.get("name", i)) for i, entry in zip(ids, parts["categories"])}
    rows = _rows(path, "annotations", parts["annotations"], images, categories)
    extra = []
    for k, entry in enumerate(parts["annotations"]):
        area = _number(path, f"annotations[{k}].area", entry.get("area", entry["bbox"][2] * entry["bbox"][3]))
        extra.append((bool(entry.get("iscrowd", 0)), area))
    return Annotations(
        images,
        categories,
        *_columns(rows),
        [torch.tensor([extra[k][0] for k, *_ in part], dtype=torch.bool) for part in rows],
        [torch.tensor([extra[k][1] for k, *_ in part], dtype=torch.float64) for part in rows],
    )


def read_detections(path: str | Path, annotations: Annotations) -> Detections:
    """Detections from a results file, a list of objects with image_id, category_id, bbox and score.

    Raises:
        BadInput: as in `read_annotations`, or an image or category that the annotations lack.
    """
    entries = _entries(path, "", _loaded(path))
    rows = _rows(path, "", entries, annotations.images, annotations.categories)
    scores = [_number(path, f"[{k}].score", entry.get("score")) for k, entry in enumerate(entries)]
    boxes, labels = _columns(rows)
    return Detections(boxes, [torch.tensor([scores[k] for k, *_ in p], dtype=torch.float64) for p in rows], labels)


def write_annotations(path: str | Path, annotations: Annotations) -> None:
    """Write what `read_annotations` reads and pycocotools takes."""
    entries = []
    for i, image in enumerate(annotations.images):
        for entry, crowd, area in zip(
            _listed(image, annotations.boxes[i], annotations.labels[i], annotations.categories),
            annotations.crowd[i].tolist(),
            annotations.areas[i].tolist(),
        ):
            entries.append({"id": len(entries) + 1, **entry, "area": area, "iscrowd": int(crowd)})
    data = {
        "images": [{"id": image} for image in annotations.images],
        "annotations": entries,
        "categories": [{"id": i, "name": name} for i, name in annotations.categories.items()],
    }
    Path(path).write_text(json.dumps(data, allow_nan=False), "utf-8")


def write_detections(path: str | Path, detections: Detections, annotations: Annotations) -> None:
    """Write a results file, for `read_detections`, pycocotools or COCO's server.

    Raises:
        ValueError: not one entry an image, or a box or score that is not finite.
    """
    if len(detections.boxes) != len(annotations.images):
        raise ValueError(f"detections: expected {len(annotations.images)} images, got {len(detections.boxes)}")
    entries = []
    for i, image in enumerate(annotations.images):
        require.same_shape("scores", detections.scores[i], (len(detections.boxes[i]),))
        listed = _listed(image, detections.boxes[i], detections.labels[i], annotations.categories)
        entries += [{**e, "score": score} for e, score in zip(listed, detections.scores[i].tolist(), strict=True)]
        if not (detections.boxes[i].isfinite().all() and detections.scores[i].isfinite().all()):
            raise ValueError(f"detections: expected finite boxes and scores, got others in image {image}")
    Path(path).write_text(json.dumps(entries, allow_nan=False), "utf-8")


def _loaded(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the decoder, of JSON or of Unicode
        raise BadInput(f"{path}: is not JSON: {error}") from error


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "nothing"}.get(type(value), repr(value))


def _entries(path: str | Path, name: str, value: Any) -> list[dict[str, Any]]:
    where = f"{path}: {name}: " if name else f"{path}: "
    if not isinstance(value, list):
        raise BadInput(f"{where}expected a list, got {_kind(value)}")
    for k, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise BadInput(f"{path}: {name}[{k}]: expected an object, got {_kind(entry)}")
    return value


def _ids(path: str | Path, name: str, entries: Sequence[dict[str, Any]]) -> list[int]:
    ids: list[int] = []
    for k, entry in enumerate(entries):
        number = entry.get("id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadInput(f"{path}: {name}[{k}].id: expected a whole number, got {_kind(number)}")
        ids.append(number)
    if len(set(ids)) < len(ids):
        twice = next(i for k, i in enumerate(ids) if i in ids[:k])
        raise BadInput(f"{path}: {name}: expected ids that differ, got {twice} twice")
    return ids


def _number(path: str | Path, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{path}: {where}: expected a finite number, got {_kind(value)}")
    return float(value)


def _rows(
    path: str | Path, name: str, entries: Sequence[dict[str, Any]], images: Sequence[int], categories: dict[int, str]
) -> list[list[tuple[int, list[float], int]]]:
    """For each image its entries: number in the file, x1, y1, x2, y2 and label."""
    place, label = ({key: k for k, key in enumerate(keys)} for keys in (images, categories))
    rows: list[list[tuple[int, list[float], int]]] = [[] for _ in images]
    for k, entry in enumerate(entries):
        for key, known, part in (("image_id", place, "images"), ("category_id", label, "categories")):
            if not isinstance(entry.get(key), int) or entry[key] not in known:
                got = _kind(entry.get(key))
                raise BadInput(f"{path}: {name}[{k}].{key}: expected the id of one of the {part}, got {got}")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise BadInput(f"{path}: {name}[{k}].bbox: expected x, y, width and height, got {box!r}")
        x, y, width, height = (_number(path, f"{name}[{k}].bbox", number) for number in box)
        if width < 0 or height < 0:
            raise BadInput(f"{path}: {name}[{k}].bbox: expected width and height >= 0, got {box!r}")
        rows[place[entry["image_id"]]].append((k, [x, y, x + width, y + height], label[entry["category_id"]]))
    return rows


def _columns(rows: list[list[tuple[int, list[float], int]]]) -> tuple[list[Tensor], list[Tensor]]:
    boxes = [torch.tensor([box for _, box, _ in part], dtype=torch.float64).reshape(-1, 4) for part in rows]
    return boxes, [torch.tensor([label for *_, label in part], dtype=torch.int64) for part in rows]


def _listed(image: int, boxes: Tensor, labels: Tensor, categories: dict[int, str]) -> list[dict[str, Any]]:
    ids = list(categories)
    require.same_shape("boxes", boxes, (len(labels), 4))
    return [
        {"image_id": image, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]
