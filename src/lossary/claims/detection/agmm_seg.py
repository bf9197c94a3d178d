"""AGMM: with three labelled pixels a region, does a mixture around them segment better than the pixels alone?

Scenes of up to four textures, sinusoids of different direction whose direction, phase and contrast vary from scene to
scene. The network is a convolution of 7x7 and two of 1x1. All arms know which classes a scene lacks.

The slowest claim took 9 minutes of a busy core: a segmenter is trained for each seed and setting.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import absent_class_loss, agmm_loss, class_centers, gmm_response, gmm_self_supervision_loss
from lossary.tasks import fit, stacked_mlp

SIZE, CLASSES, CONTEXT, WIDTH = 20, 4, 7, 16
TRAIN, TEST, STEPS, BATCH = 40, 60, 200, 4
RATES = (0.001, 0.003, 0.01, 0.03)
UNLABELLED = 255


@cache
def _scenes(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (S, N, 20, 20), the class of each pixel, and the same with three pixels a class labelled."""
    count = seeds.few(TRAIN) + seeds.few(TEST)
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures, truths, sparse = [], [], []
    for rng in seeds.numpy("scenes"):
        sites = rng.uniform(0, SIZE, (count, 5, 2))
        owner = rng.integers(0, CLASSES, (count, 5))
        nearest = ((sites[..., 0, None, None] - x) ** 2 + (sites[..., 1, None, None] - y) ** 2).argmin(1)
        truth = np.take_along_axis(owner, nearest.reshape(count, -1), 1).reshape(nearest.shape)
        angle = np.arange(CLASSES) * np.pi / CLASSES + rng.normal(0, 0.25, (count, CLASSES))
        phase, contrast = rng.uniform(0, 2 * np.pi, (count, CLASSES)), rng.uniform(0.5, 1.5, (count, 1))
        waves = np.cos(angle)[..., None, None] * x + np.sin(angle)[..., None, None] * y
        textures = np.sin(1.2 * waves + phase[..., None, None]) * contrast[..., None, None]
        picture = np.take_along_axis(textures, truth[:, None], 1)[:, 0] + rng.normal(0, 0.4, truth.shape)
        order = rng.random(truth.shape).reshape(count, -1)  # a class's labelled pixels are those of the lowest numbers
        label = np.full_like(truth, UNLABELLED)
        for k in range(CLASSES):
            rank = np.where((truth == k).reshape(count, -1), order, np.inf).argsort(1).argsort(1).reshape(truth.shape)
            label[(rank < 3) & (truth == k)] = k
        pictures.append(torch.from_numpy(picture).float())
        truths.append(torch.from_numpy(truth))
        sparse.append(torch.from_numpy(label))
    return torch.stack(pictures), torch.stack(truths), torch.stack(sparse)


class _Segmenter(nn.Module):
    """(S, B, 20, 20) to features and logits in one tensor, (S, B, 16 + 4, 20, 20)."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.features = stacked_mlp((CONTEXT * CONTEXT, 32, WIDTH), seeds)
        self.classifier = stacked_mlp((WIDTH, CLASSES), Seeds(tuple(i + 1 for i in seeds.ids)))

    def forward(self, input: Tensor) -> Tensor:
        patches = F.unfold(input.flatten(0, 1).unsqueeze(1), CONTEXT, padding=CONTEXT // 2)
        features = self.features(patches.unflatten(0, input.shape[:2]).mT.flatten(1, 2))
        both = torch.cat([features, self.classifier(features.relu())], 2)
        return both.unflatten(1, (input.shape[1], SIZE * SIZE)).mT.unflatten(3, (SIZE, SIZE))


def _partial(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the labelled pixels, and the term for absent classes."""
    _, present = class_centers(features, labels, CLASSES)
    known = labels < CLASSES
    picked = logits.log_softmax(1).gather(1, labels.where(known, 0).unsqueeze(1)).squeeze(1)
    return -(picked * known).sum((1, 2)) / known.sum((1, 2)) + absent_class_loss(logits, present)


def _with_entropy(features: Tensor, logits: Tensor, labels: Tensor, *, weight: float) -> Tensor:
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean((1, 2))
    return _partial(features, logits, labels) + weight * entropy


def _without_maximization(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """AGMM with its mixture as features and labels make it, which nothing trains to fit the labels."""
    centers, present = class_centers(features, labels, CLASSES)
    response = gmm_response(features, centers, present)
    return _partial(features, logits, labels) + gmm_self_supervision_loss(logits, response, present)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "partial": _partial,
    "entropy": _with_entropy,
    "fixed mixture": _without_maximization,
    "agmm": agmm_loss,
}


def _segmented(seeds: Seeds, *, loss: str, lr: float, **hyper: float) -> tuple[Tensor, Tensor]:
    """Classes of the test pixels as predicted and as they are, (S, n, 20, 20)."""
    pictures, truth, labels = _scenes(seeds)
    train, model = seeds.few(TRAIN), _Segmenter(seeds)
    values = torch.vmap(partial(LOSSES[loss], **hyper))
    fit(
        model,
        pictures[:, :train],
        labels[:, :train],
        loss=lambda z, y: values(*z.split([WIDTH, CLASSES], 2), y),
        seeds=seeds,
        steps=seeds.few(STEPS),
        batch=BATCH,
        optimizer=partial(torch.optim.Adam, lr=lr),
    )
    with torch.no_grad():
        return model(pictures[:, train:])[:, :, WIDTH:].argmax(2), truth[:, train:]


def _iou(seeds: Seeds, **setting: object) -> list[float]:
    """Intersection over union in percent, over all test pixels, averaged over classes."""
    found, truth = _segmented(seeds, **setting)
    both = [
        ((found == k) & (truth == k)).sum((1, 2, 3)) / ((found == k) | (truth == k)).sum((1, 2, 3))
        for k in range(CLASSES)
    ]
    return (100 * torch.stack(both).mean(0)).tolist()


def _compare(seeds: Seeds, baseline: list[dict]) -> Arms:
    method = tune(_iou, [{"loss": "agmm", "lr": lr} for lr in RATES], seeds)
    other = tune(_iou, baseline, seeds)
    return Arms(_iou(seeds, **method), _iou(seeds, **other), {"method": method, "baseline": other})


@claim(
    says="AGMM segments better than cross-entropy at the labelled pixels",
    kind="superiority",
    metric="IoU",
    scale="40 scenes of 4 textures, 20x20 px, 3 labelled px a class, 3-layer network, 200 steps of 4; 4 settings each",
)
def mixture_beats_labelled_pixels(seeds: Seeds) -> Arms:
    return _compare(seeds, [{"loss": "partial", "lr": lr} for lr in RATES])


@claim(
    says="AGMM segments better than entropy minimisation at all pixels",
    kind="superiority",
    metric="IoU",
    scale="40 scenes of 4 textures, 20x20 px, 3 labelled px a class, 3-layer network, 200 steps of 4; 4 settings each",
)
def mixture_beats_entropy_minimisation(seeds: Seeds) -> Arms:
    return _compare(seeds, [{"loss": "entropy", "weight": w, "lr": lr} for w in (0.03, 0.3) for lr in RATES[1:3]])


@claim(
    says="Training the mixture on the labels (maximisation and separation) segments better than leaving it as it falls",
    kind="superiority",
    metric="IoU",
    scale="40 scenes of 4 textures, 20x20 px, 3 labelled px a class, 3-layer network, 200 steps of 4; 4 settings each",
)
def maximization_matters(seeds: Seeds) -> Arms:
    return _compare(seeds, [{"loss": "fixed mixture", "lr": lr} for lr in RATES])


def draw(seeds: Seeds) -> list[Panel]:
    """Two test scenes, their classes, and what either loss makes of them."""
    seed = seeds.one(0)
    pictures = _scenes(seed)[0][0, seed.few(TRAIN) :]
    plain, truth = _segmented(seed, loss="partial", lr=0.01)
    mixture, _ = _segmented(seed, loss="agmm", lr=0.01)
    panels = []
    for i in range(2):
        panels.append(Panel("scene", (0.5 + pictures[i] / 4).numpy()))
        for title, classes in (("classes", truth), ("labelled pixels", plain), ("AGMM", mixture)):
            panels.append(Panel(title, classes[0, i].numpy() / (CLASSES - 1)))
    return panels
