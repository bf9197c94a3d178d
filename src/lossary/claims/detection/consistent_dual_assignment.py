"""Consistent dual assignment: does a second, one-to-many head help a head that does without suppression?

A trained detector's first three convolutions are frozen; two more and the heads are trained anew. All arms draw the
same scenes, initial weights and batches, have the same loss and four settings. The runs are kept while the process
lives, since the claims share them.

The slowest claim took 18 minutes of a busy core: a detector is trained for each seed and setting.
"""

import copy
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import DualAssignmentLoss, consistent_dual_assign, task_aligned_assign, task_aligned_metric
from lossary.detection._assign import taken
from lossary.tasks import (
    ConvDetector,
    ShapeScenes,
    dense_loss,
    dense_predictions,
    detection_ap,
    detections,
    grid_points,
    shape_scenes,
    train_detector,
    trained_detector,
)

RATES = [{"lr": lr} for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
NMS = [{"lr": lr, "iou_threshold": threshold} for lr in (2e-3, 4e-3) for threshold in (0.5, 0.7)]
POWERS = {"consistent": (0.5, 6.0), "mismatched": (0.5, 2.0)}  # of the one-to-one head; the others have 0.5 and 6


@cache
def _scenes(seed: Seeds) -> tuple[Tensor, ShapeScenes, Tensor, ShapeScenes]:
    """Frozen features (n, 48, 8, 8) and scenes, to train and to test."""
    stem = trained_detector("plain", steps=seed.few(1500)).backbone[:3]
    drawn = [
        shape_scenes(seed.few(n), family="plain", generator=seed.numpy(stream)[0])
        for stream, n in (("scenes", 400), ("test scenes", 150))
    ]
    with torch.no_grad():
        features = [stem(scenes.images) for scenes in drawn]
    return features[0], drawn[0], features[1], drawn[1]


@cache
def _answers(seed: Seeds, arm: str, lr: float) -> tuple[Tensor, Tensor]:
    """Class scores and boxes on the test scenes, after training: arm "many", "one", "consistent" or "mismatched"."""
    features, scenes, unseen, _ = _scenes(seed)
    (generator,), points = seed.torch("init"), grid_points()
    fresh = ConvDetector(generator=generator)
    neck, head = fresh.backbone[3:], fresh.head
    second = copy.deepcopy(head)
    model = nn.ModuleList([neck, head, second] if arm in POWERS else [neck, head]).train()
    dual = DualAssignmentLoss(class_gain=1.0, box_gain=2.0)

    def alone(logits: Tensor, boxes: Tensor, rows: Tensor, k: int, alpha: float = 0.5, beta: float = 6.0) -> Tensor:
        truth, labels, mask = scenes.boxes[rows], scenes.labels[rows], scenes.mask[rows]
        likely = logits.sigmoid()
        match, weight = task_aligned_assign(likely, boxes, points, truth, labels, mask, k=k, alpha=alpha, beta=beta)
        target = F.one_hot(taken(labels, match), 6) * weight.unsqueeze(-1)
        return dense_loss(logits, boxes, target, taken(truth, match), weight)

    def objective(rows: Tensor) -> Tensor:
        seen = neck(features[rows])
        first = dense_predictions(head(seen), points)
        if arm not in POWERS:
            return alone(*first, rows, k=10 if arm == "many" else 1)
        last = dense_predictions(second(seen.detach()), points)
        if arm == "consistent":
            return dual(first, last, points, scenes.boxes[rows], scenes.labels[rows], scenes.mask[rows])
        return alone(*first, rows, 10) + alone(*last, rows, 1, *POWERS[arm])

    (order,) = seed.torch("order")
    train_detector(
        objective, model.parameters(), n=len(scenes.mask), steps=seed.few(250, smoke=3), generator=order, lr=lr
    )
    model.eval()
    with torch.no_grad():
        logits, boxes = dense_predictions(model[-1](neck(unseen)), points)
    return logits.sigmoid(), boxes


def _ap(seeds: Seeds, *, arm: str, lr: float, iou_threshold: float | None = None) -> list[float]:
    """Average precision on each seed's test scenes, without suppression where there is no threshold."""
    values = []
    for i in range(len(seeds)):
        seed = seeds.one(i)
        found = detections(*_answers(seed, arm, lr), iou_threshold=iou_threshold)
        values.append(detection_ap(found, _scenes(seed)[3]))
    return values


def _compare(seeds: Seeds, arm: str, grid: list[dict]) -> Arms:
    method = {"arm": "consistent", **tune(_tuned("consistent"), RATES, seeds, n=2)}
    baseline = {"arm": arm, **tune(_tuned(arm), grid, seeds, n=2)}
    return Arms(_ap(seeds, **method), _ap(seeds, **baseline), {"method": method, "baseline": baseline})


def _tuned(arm: str):  # type: ignore[no-untyped-def]
    return lambda seeds, **setting: _ap(seeds, arm=arm, **setting)


@claim(
    says="Without suppression, dual assignment finds more than training one-to-one alone",
    kind="superiority",
    metric="average precision",
    scale="400 scenes of shapes, 2 convolutions and heads on a frozen stem, 250 steps of 16; 4 learning rates each",
)
def dual_beats_one_to_one(seeds: Seeds) -> Arms:
    return _compare(seeds, "one", RATES)


@claim(
    says="The one-to-one head finds more if it chooses by the other head's measure than by one of its own",
    kind="superiority",
    metric="average precision",
    scale="400 scenes of shapes, 2 convolutions and heads on a frozen stem, 250 steps of 16; 4 learning rates each;"
    " baseline: powers 0.5 and 2 in the one-to-one head",
)
def consistent_beats_mismatched(seeds: Seeds) -> Arms:
    return _compare(seeds, "mismatched", RATES)


@claim(
    says="Without suppression, dual assignment finds as much as one-to-many training with it",
    kind="noninferiority",
    metric="average precision",
    scale="400 scenes of shapes, 2 convolutions and heads on a frozen stem, 250 steps of 16; 4 settings each:"
    " learning rates, or 2 of them with 2 IoU thresholds",
)
def dual_needs_no_suppression(seeds: Seeds) -> Arms:
    return _compare(seeds, "many", NMS)


@claim(
    says="Heads that predict the same agree on every object's best point, whatever the ratio of their powers",
    kind="exact",
    metric="deviation",
    scale="20 random scenes of 6 boxes, ratios 0.5, 1 and 2: objects whose one point is not the best of the many",
    tolerance=0.0,
)
def the_one_is_the_best_of_the_many(seeds: Seeds) -> Arms:
    (rng,) = seeds.one(0).numpy("scenes")
    scenes, points = shape_scenes(20, family="plain", generator=rng), grid_points().double()
    truth, labels, mask = scenes.boxes.double(), scenes.labels, scenes.mask
    scores = torch.from_numpy(rng.random((20, 64, 6)))
    boxes = torch.cat([points - 8, points + 8], 1) + torch.from_numpy(rng.normal(0, 2, (20, 64, 4)))
    wrong = []
    for ratio in (0.5, 1.0, 2.0):
        _, (match, _) = consistent_dual_assign(
            (scores, boxes), (scores, boxes), points, truth, labels, mask, ratio=ratio
        )
        metric = task_aligned_metric(scores, boxes, points, truth, labels)
        best = metric.argmax(1)  # of the 64 points, for each true box
        chosen = match.unsqueeze(-1) == torch.arange(6)
        alone = chosen.any(1)  # who lost his point to another has none
        wrong.append(float((chosen.double().argmax(1) != best)[alone].sum()))
    return Arms(np.array(wrong))


def draw(seeds: Seeds) -> list[Panel]:
    """A scene with the answers of the one-to-many and the one-to-one head, all of a score above 0.3."""
    seed = seeds.one(0)
    scenes = _scenes(seed)[3]
    panels = []
    for title, arm in (("One-to-many, no suppression", "many"), ("Dual, no suppression", "consistent")):
        scores, boxes = _answers(seed, arm, 2e-3)
        for i in range(2):
            ((box, score, _),) = detections(scores[i : i + 1], boxes[i : i + 1])
            image = scenes.images[i].permute(1, 2, 0).numpy()
            panels.append(Panel(title, image=image, boxes=box[score > 0.3].numpy()))
    return panels
