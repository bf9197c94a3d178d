"""Soft-NMS: does lowering scores beat deleting boxes, in crowds and elsewhere, when both may tune five settings?

Once with boxes drawn at random, once with what the three networks of a published face detector (MTCNN) propose in
collages of real faces: about twenty boxes a face.
"""

from functools import cache, partial

from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import soft_nms
from lossary.detection._average_precision import average_precision
from lossary.tasks import crowded_boxes
from lossary.tasks.faces import FaceScenes, face_candidates, face_collages

SCENES = 60
COLLAGES = 5
HARD = [{"method": "hard", "iou_threshold": t} for t in (0.3, 0.4, 0.5, 0.6, 0.7)]
LINEAR = [{"method": "linear", "iou_threshold": t} for t in (0.3, 0.4, 0.5, 0.6, 0.7)]
GAUSSIAN = [{"method": "gaussian", "sigma": s} for s in (0.1, 0.3, 0.5, 0.7, 0.9)]


def _average_precision(seeds: Seeds, *, sparse: bool = False, **suppression: object) -> list[float]:
    """COCO's AP in percent of each seed's scenes; in sparse ones every second object is gone with its detections."""
    scenes = crowded_boxes(seeds, seeds.few(SCENES))
    boxes, scores, truth = scenes.boxes, scenes.scores, scenes.truth
    if sparse:
        seen = (scenes.source < 0) | (scenes.source % 2 == 0)
        boxes, scores, truth = boxes[:, :, seen], scores[:, :, seen], truth[:, :, ::2]
    values = []
    for s in range(len(seeds)):
        kept = [soft_nms(b, p, **suppression) for b, p in zip(boxes[s], scores[s])]
        found = [b[keep] for b, (keep, _) in zip(boxes[s], kept)]
        values.append(average_precision(found, [decayed for _, decayed in kept], list(truth[s])))
    return values


def _compare(seeds: Seeds, grid: list[dict], *, sparse: bool = False) -> Arms:
    score = partial(_average_precision, sparse=sparse)
    soft, hard = tune(score, grid, seeds), tune(score, HARD, seeds)
    return Arms(score(seeds, **soft), score(seeds, **hard), {"method": soft, "baseline": hard})


@claim(
    says="In crowds, Gaussian Soft-NMS ranks detections better than hard suppression",
    kind="superiority",
    metric="average precision",
    scale="60 synthetic scenes of 4 pairs at an IoU of 0.4 to 0.7, 3 jittered detections each; 5 settings each",
)
def gaussian_beats_hard_in_crowds(seeds: Seeds) -> Arms:
    return _compare(seeds, GAUSSIAN)


@claim(
    says="In crowds, linear Soft-NMS ranks detections better than hard suppression",
    kind="superiority",
    metric="average precision",
    scale="60 synthetic scenes of 4 pairs at an IoU of 0.4 to 0.7, 3 jittered detections each; 5 settings each",
)
def linear_beats_hard_in_crowds(seeds: Seeds) -> Arms:
    return _compare(seeds, LINEAR)


@claim(
    says="In sparse scenes, Gaussian Soft-NMS costs nothing",
    kind="noninferiority",
    metric="average precision",
    scale="60 synthetic scenes of 4 objects apart, 3 jittered detections each; 5 settings each",
)
def gaussian_costs_nothing_in_sparse_scenes(seeds: Seeds) -> Arms:
    return _compare(seeds, GAUSSIAN, sparse=True)


@cache
def _proposed(seeds: Seeds, pairs: bool) -> tuple[FaceScenes, list[list[tuple[Tensor, Tensor]]]]:
    """Collages of each seed, and the detector's boxes and scores in each before any suppression."""
    scenes = face_collages(seeds, seeds.few(COLLAGES), pairs=pairs)
    return scenes, [[face_candidates(image) for image in images] for images in scenes.images]


def _face_precision(seeds: Seeds, *, pairs: bool, **suppression: object) -> list[float]:
    scenes, proposed = _proposed(seeds, pairs)
    values = []
    for truth, candidates in zip(scenes.truth, proposed):
        kept = [soft_nms(boxes, scores, **suppression) for boxes, scores in candidates]
        found = [boxes[keep] for (boxes, _), (keep, _) in zip(candidates, kept)]
        values.append(average_precision(found, [decayed for _, decayed in kept], list(truth), thresholds=(0.5,)))
    return values


def _compare_faces(seeds: Seeds, *, pairs: bool) -> Arms:
    score = partial(_face_precision, pairs=pairs)
    soft, hard = tune(score, GAUSSIAN, seeds), tune(score, HARD, seeds)
    return Arms(score(seeds, **soft), score(seeds, **hard), {"method": soft, "baseline": hard})


@claim(
    says="On faces that cover each other, Gaussian Soft-NMS ranks a face detector's boxes better than hard suppression",
    kind="superiority",
    metric="average precision",
    scale="5 collages of 6 pairs of real faces, candidates of MTCNN's networks, AP at an IoU of 0.5; 5 settings each",
)
def gaussian_beats_hard_on_faces(seeds: Seeds) -> Arms:
    return _compare_faces(seeds, pairs=True)


@claim(
    says="On faces that stand apart, Gaussian Soft-NMS of a face detector's boxes costs nothing",
    kind="noninferiority",
    metric="average precision",
    scale="5 collages of 6 real faces, candidates of MTCNN's networks, AP at an IoU of 0.5; 5 settings each",
)
def gaussian_costs_nothing_on_faces_apart(seeds: Seeds) -> Arms:
    return _compare_faces(seeds, pairs=False)


@claim(
    says="Control: in sparse scenes, hard suppression beats keeping all duplicates",
    kind="superiority",
    metric="average precision",
    scale="60 synthetic scenes of 4 objects apart, 3 jittered detections each; IoU threshold 0.5 against 1",
    control="planted",
)
def suppression_beats_none(seeds: Seeds) -> Arms:
    hard, none = ({"sparse": True, "method": "hard", "iou_threshold": t} for t in (0.5, 1.0))
    return Arms(_average_precision(seeds, **hard), _average_precision(seeds, **none))


@claim(
    says="Control: hard suppression is no better than itself in other scenes",
    kind="superiority",
    metric="average precision",
    scale="60 synthetic scenes of 4 pairs at an IoU of 0.4 to 0.7, 3 jittered detections each; baseline: fresh seeds",
    control="A/A",
)
def hard_beats_itself(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_average_precision(seeds, **HARD[2]), _average_precision(other, **HARD[2]))


def draw(seeds: Seeds) -> list[Panel]:
    """A collage with the detector's boxes, and what hard and soft suppression leave with a score above 0.5."""
    collage = face_collages(seeds, 1, pairs=True).images[0, 0]
    boxes, scores = face_candidates(collage)
    panels = [Panel(f"{len(boxes)} candidates", collage.permute(1, 2, 0).numpy(), boxes.numpy())]
    for setting in (HARD[0], HARD[2], GAUSSIAN[2]):
        keep, left = soft_nms(boxes, scores, score_threshold=0.5, **setting)
        title = ", ".join(f"{name} {value}" for name, value in setting.items())
        labels = tuple(f"{score:.2f}" for score in left.tolist())
        panels.append(Panel(title, collage.permute(1, 2, 0).numpy(), boxes[keep].numpy(), labels=labels))
    return panels
