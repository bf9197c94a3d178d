"""Co-DETR: do auxiliary one-to-many heads and their positives make a small DETR learn faster?

The features of a trained detector's first three convolutions are frozen; a transformer is trained on them. Both arms
draw the same scenes, initial weights and batches, and two learning rates. The runs are kept while the process lives,
since the claims share them.

The slowest claim took 15 minutes of a busy core: a transformer detector is trained for each seed and setting.
"""

from functools import cache

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import HybridAssignmentTrainer, atss_assign
from lossary.tasks import (
    ShapeScenes,
    detection_ap,
    detections,
    grid_points,
    shape_scenes,
    train_detector,
    trained_detector,
    transformer_detector,
)

STEPS = 160
RATES = [{"lr": lr} for lr in (2e-3, 4e-3)]
HYBRID, ALONE, NO_QUERIES = {"heads": 1}, {"heads": 0}, {"heads": 1, "lambda1": 0.0}


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
def _answers(seed: Seeds, heads: int, lambda1: float, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Class scores and boxes on the test scenes, after training."""
    features, scenes, unseen, _ = _scenes(seed)
    (generator,), (order,), (draws,) = seed.torch("init"), seed.torch("order"), seed.torch("queries")
    model, points = transformer_detector(generator=generator, inputs=48), grid_points()
    anchors = torch.cat([points - 10, points + 10], 1)
    trainer = HybridAssignmentTrainer(
        model, anchors, (64, 64), 6, generator=generator, assigners=(atss_assign,) * heads, lambda1=lambda1
    )

    def objective(rows: Tensor) -> Tensor:
        return trainer(features[rows], scenes.boxes[rows], scenes.labels[rows], scenes.mask[rows], generator=draws)

    train_detector(
        objective, trainer.parameters(), n=len(scenes.mask), steps=seed.few(steps, smoke=3), generator=order, lr=lr
    )
    model.eval()
    with torch.no_grad():
        logits, boxes = model(unseen)
    return logits.sigmoid(), boxes


def _ap(seeds: Seeds, *, heads: int, lr: float, lambda1: float = 1.0, steps: int = STEPS) -> list[float]:
    """Average precision on each seed's test scenes, without suppression."""
    values = []
    for i in range(len(seeds)):
        seed = seeds.one(i)
        found = detections(*_answers(seed, heads, lambda1, steps, lr))
        values.append(detection_ap(found, _scenes(seed)[3]))
    return values


def _compare(seeds: Seeds, method: dict, baseline: dict) -> Arms:
    chosen, other = (tune(_ap, [{**arm, **rate} for rate in RATES], seeds, n=2) for arm in (method, baseline))
    return Arms(_ap(seeds, **chosen), _ap(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="After equally many steps a DETR trained with an auxiliary ATSS head and its positives finds more",
    kind="superiority",
    metric="average precision",
    scale="400 scenes of shapes, a transformer of 3 layers and 16 queries on a frozen stem, 160 steps of 16;"
    " 2 learning rates each",
)
def hybrid_beats_one_to_one(seeds: Seeds) -> Arms:
    return _compare(seeds, HYBRID, ALONE)


@claim(
    says="It finds as much as one-to-one training of twice the steps, which costs more",
    kind="noninferiority",
    metric="average precision",
    scale="400 scenes of shapes, a transformer of 3 layers and 16 queries on a frozen stem, 160 against 320 steps of"
    " 16; 2 learning rates each",
)
def hybrid_saves_half_the_steps(seeds: Seeds) -> Arms:
    return _compare(seeds, HYBRID, {**ALONE, "steps": 2 * STEPS})


@claim(
    says="The positives as further queries add to what the auxiliary head does alone",
    kind="superiority",
    metric="average precision",
    scale="400 scenes of shapes, a transformer of 3 layers and 16 queries on a frozen stem, 160 steps of 16;"
    " 2 learning rates each; baseline: the auxiliary head, lambda1 = 0",
)
def positive_queries_add(seeds: Seeds) -> Arms:
    return _compare(seeds, HYBRID, NO_QUERIES)


def draw(seeds: Seeds) -> list[Panel]:
    """Two scenes with what is found one to one and with the auxiliary head, all of a score above 0.3."""
    seed = seeds.one(0)
    scenes = _scenes(seed)[3]
    panels = []
    for title, heads in (("One to one", 0), ("With an auxiliary head", 1)):
        scores, boxes = _answers(seed, heads, 1.0, STEPS, 2e-3)
        for i in range(2):
            ((box, score, _),) = detections(scores[i : i + 1], boxes[i : i + 1])
            image = scenes.images[i].permute(1, 2, 0).numpy()
            panels.append(Panel(title, image=image, boxes=box[score > 0.3].numpy()))
    return panels
