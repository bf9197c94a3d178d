"""LOGIN: does a head that keeps the subject before the object get both directions of a relation right?

Scenes of four boxes whose twelve directed pairs are each left of, right of, above, below, around or within; the map of
a pair's union shows where its cells are, in noise. All is trained on the true boxes.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.detection import AttractRepelLoss, DirectionalRelationHead, bidirectional_relationship_recall

CHANNELS, SIZE, OBJECTS, PREDICATES = 8, 4, 4, 6
TRAIN, TEST, STEPS, SCENES = 60, 60, 150, 4  # scenes in all, steps, and scenes in a batch
RATES = (0.001, 0.003, 0.01, 0.03)
PAIRS = torch.tensor([(a, b) for a in range(OBJECTS) for b in range(OBJECTS) if a != b])


@cache
def _scenes(seeds: Seeds) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each seed boxes (N, 4, 4), union features (N, 12, 8, 4, 4) and predicates (N, 12)."""
    count = seeds.few(TRAIN) + seeds.few(TEST)
    ramp = np.linspace(-1, 1, SIZE)
    drawn = []
    for rng in seeds.numpy("scenes"):
        centre, half = rng.uniform(0, 1, (count, OBJECTS, 2)), rng.uniform(0.05, 0.4, (count, OBJECTS, 2))
        boxes = np.concatenate([centre - half, centre + half], -1)
        a, b = boxes[:, PAIRS[:, 0]], boxes[:, PAIRS[:, 1]]
        around = ((a[..., :2] <= b[..., :2]) & (a[..., 2:] >= b[..., 2:])).all(-1)
        within = ((b[..., :2] <= a[..., :2]) & (b[..., 2:] >= a[..., 2:])).all(-1)
        shift = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]) / 2
        across = np.abs(shift[..., 0]) > np.abs(shift[..., 1])
        label = np.where(across, np.where(shift[..., 0] > 0, 0, 1), np.where(shift[..., 1] > 0, 2, 3))
        label = np.where(around, 4, np.where(within, 5, label))
        features = rng.normal(0, 1.0, (count, len(PAIRS), CHANNELS, SIZE, SIZE))
        features[:, :, 0] += 1
        features[:, :, 1] += ramp
        features[:, :, 2] += ramp[:, None]
        drawn.append(tuple(map(torch.from_numpy, (boxes.astype(np.float32), features.astype(np.float32), label))))
    return drawn


def _seeded(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module with weights drawn as torch draws those of linear layers, what starts at 0 left there."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.any():
            bound = layer.in_features**-0.5
            for p in layer.parameters():
                nn.init.uniform_(p, -bound, bound, generator=generator)
    return module


def _scores(head: nn.Module, boxes: Tensor, features: Tensor) -> Tensor:
    """Logits (12 N, 6)."""
    return head(features.flatten(0, 1), *(boxes[:, PAIRS[:, i]].flatten(0, 1) for i in (0, 1)))


def _recall(seeds: Seeds, *, orders: str, lr: float, attract: float = 0.0) -> list[float]:
    """Two-way recall of all six pairs of a scene, in percent, averaged over test scenes."""
    train, recalls = seeds.few(TRAIN), []
    streams = zip(_scenes(seeds), seeds.torch("init"), seeds.torch("order"))
    for (boxes, features, labels), init, order in streams:
        with torch.random.fork_rng(devices=[]):
            head = _seeded(DirectionalRelationHead(CHANNELS, hidden=32, out=PREDICATES, orders=orders), init)
        tuning = AttractRepelLoss(PREDICATES)
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        for _ in range(seeds.few(STEPS)):
            rows = torch.randint(train, (SCENES,), generator=order)
            logits, target = _scores(head, boxes[rows], features[rows]), labels[rows].flatten()
            loss = F.cross_entropy(logits, target)
            if attract:
                loss = loss + attract * tuning(logits, target).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores = _scores(head, boxes[train:], features[train:]).softmax(1).unflatten(0, (-1, len(PAIRS)))
        found = [
            bidirectional_relationship_recall(
                scene, PAIRS, [(a, b, c) for (a, b), c in zip(PAIRS.tolist(), true)], k=OBJECTS * (OBJECTS - 1) // 2
            )
            for scene, true in zip(scores, labels[train:].tolist())
        ]
        recalls.append(100 * float(np.mean(found)))
    return recalls


def _compare(seeds: Seeds, method: list[dict], baseline: list[dict]) -> Arms:
    chosen, other = tune(_recall, method, seeds), tune(_recall, baseline, seeds)
    return Arms(_recall(seeds, **chosen), _recall(seeds, **other), {"method": chosen, "baseline": other})


HALF = [{"orders": "half", "lr": lr} for lr in RATES]


@claim(
    says="The three orders with the subject first get more pairs right both ways than all six orders",
    kind="superiority",
    metric="recall",
    scale="60 scenes of 4 boxes, 6 directed predicates, 4x4 noisy features, 150 steps of 48 pairs; 4 settings each",
)
def half_the_orders_beat_all(seeds: Seeds) -> Arms:
    return _compare(seeds, HALF, [{"orders": "all", "lr": lr} for lr in RATES])


@claim(
    says="The three orders with the subject first get more pairs right both ways than one order",
    kind="superiority",
    metric="recall",
    scale="60 scenes of 4 boxes, 6 directed predicates, 4x4 noisy features, 150 steps of 48 pairs; 4 settings each",
)
def half_the_orders_beat_one(seeds: Seeds) -> Arms:
    return _compare(seeds, HALF, [{"orders": "one", "lr": lr} for lr in RATES])


@claim(
    says="Attract & Repel gets more pairs right both ways than cross-entropy alone",
    kind="superiority",
    metric="recall",
    scale="60 scenes of 4 boxes, 6 directed predicates, 4x4 noisy features, 150 steps of 48 pairs; 4 settings each",
)
def attract_repel_beats_cross_entropy(seeds: Seeds) -> Arms:
    method = [{"orders": "half", "attract": w, "lr": lr} for w in (0.1, 1.0) for lr in RATES[1:3]]
    return _compare(seeds, method, HALF)
