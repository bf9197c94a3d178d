"""LMPT: do captions and weights for rare classes help class vectors tuned on a long tail of labels?

Twenty classes have normal concepts of 32 dimensions. An image shows one to four of them, drawn with a chance that
falls a hundredfold from the first to the last; its embedding and its caption's are the sum of their concepts with
noise of their own, normalised, the caption's the less noisy. The class vectors start as noisy text embeddings, which
is zero-shot CLIP; they and a bias for each class are trained, the towers are fixed. All arms have the same model and
four learning rates; test images show all classes alike often.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import fit, mean_average_precision
from lossary.weighting import class_specific_embedding_loss, distribution_balanced_loss

CLASSES, SIZE = 20, 32
TRAIN, TEST = 1500, 2000
SCALE = 10.0
IMAGE_NOISE, CAPTION_NOISE, TEXT_NOISE = 2.0, 1.0, 1.0  # beside concepts of unit variance
HEAD, TAIL = slice(0, 7), slice(13, None)  # of classes, the most frequent first
RATES = (0.03, 0.1, 0.3, 1.0)


def _images(rng: np.random.Generator, concepts: np.ndarray, n: int, ratio: float) -> tuple[np.ndarray, ...]:
    """Embeddings of images and of their captions, (n, 32) each, and labels (n, 20)."""
    keys = -np.log(ratio) * np.arange(CLASSES) / (CLASSES - 1) + rng.gumbel(size=(n, CLASSES))
    order = np.argsort(np.argsort(-keys, axis=1), axis=1)
    labels = (order < rng.integers(1, 5, (n, 1))).astype(float)
    shown = labels @ concepts
    return *(_unit(shown + noise * rng.standard_normal((n, SIZE))) for noise in (IMAGE_NOISE, CAPTION_NOISE)), labels


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class _ClassVectors(nn.Module):
    """Scaled cosines of images (S, N, 32) with a vector for each class, and a bias: (S, N, 20)."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())
        self.bias = nn.Parameter(torch.zeros(len(vectors), 1, CLASSES))

    def cosines(self, embeddings: Tensor) -> Tensor:
        return embeddings @ F.normalize(self.vectors, dim=-1).mT

    def forward(self, images: Tensor) -> Tensor:
        return SCALE * self.cosines(images) + self.bias


def _average_precision(seeds: Seeds, *, arm: str, lr: float, classes: slice = slice(None)) -> Tensor:
    """Mean average precision of some classes, per seed, of "zero-shot", "bce", "balanced" or "lmpt"."""
    drawn = []
    for rng in seeds.numpy("concepts"):
        concepts = rng.standard_normal((CLASSES, SIZE))
        text = _unit(concepts + TEXT_NOISE * rng.standard_normal(concepts.shape))
        drawn.append((text, *_images(rng, concepts, TRAIN, 100.0), *_images(rng, concepts, TEST, 1.0)))
    vectors, x, captions, y, test_x, _, test_y = (torch.from_numpy(np.stack(part)).float() for part in zip(*drawn))
    model = _ClassVectors(vectors)
    counts = y.sum(1)

    def per_label(stacked: Callable[..., Tensor], *tensors: Tensor, **hyper: Any) -> Tensor:
        """A loss whose class counts differ from seed to seed."""
        return torch.stack([stacked(*each, class_counts=n, **hyper) for *each, n in zip(*tensors, counts)])

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        labels, embeddings = target[..., :CLASSES], target[..., CLASSES:]
        if arm == "bce":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        balanced = per_label(distribution_balanced_loss, logits, labels, num_samples=TRAIN)
        if arm == "balanced":
            return balanced
        return 0.5 * balanced + 0.5 * per_label(class_specific_embedding_loss, model.cosines(embeddings), labels)

    if arm != "zero-shot":
        adam = partial(torch.optim.Adam, lr=lr)
        target = torch.cat([y, captions], -1)
        fit(model, x, target, loss=loss, seeds=seeds, steps=seeds.few(300), optimizer=adam)
    with torch.no_grad():
        return mean_average_precision(model(test_x)[..., classes], test_y[..., classes])


def _compare(seeds: Seeds, baseline: str, classes: slice = slice(None)) -> Arms:
    """LMPT against another arm, each with the learning rate that is best over all classes, as one would choose it."""
    chosen, other = (
        tune(_average_precision, [{"arm": arm, "lr": lr} for lr in RATES], seeds) for arm in ("lmpt", baseline)
    )
    method, reference = (_average_precision(seeds, **setting, classes=classes) for setting in (chosen, other))
    return Arms(method, reference, {"method": chosen, "baseline": other})


@claim(
    says="Distribution-balanced loss with the class-specific embedding loss ranks images better than without it",
    kind="superiority",
    metric="average precision",
    scale="20 synthetic classes in a tail of 100, 1500 images with captions, class vectors of 32, 300 steps; 4 settings"
    " each",
)
def lmpt_beats_distribution_balanced_loss(seeds: Seeds) -> Arms:
    return _compare(seeds, "balanced")


@claim(
    says="Class vectors tuned by LMPT rank images better than zero-shot ones",
    kind="superiority",
    metric="average precision",
    scale="20 synthetic classes in a tail of 100, 1500 images with captions, class vectors of 32, 300 steps; 4 settings"
    " for LMPT",
)
def lmpt_beats_zero_shot(seeds: Seeds) -> Arms:
    setting = tune(_average_precision, [{"arm": "lmpt", "lr": lr} for lr in RATES], seeds)
    zero_shot = _average_precision(seeds, arm="zero-shot", lr=0.0)
    return Arms(_average_precision(seeds, **setting), zero_shot, {"method": setting})


@claim(
    says="LMPT ranks images of the seven rarest classes better than binary cross-entropy",
    kind="superiority",
    metric="average precision",
    scale="20 synthetic classes in a tail of 100, 1500 images with captions, class vectors of 32, 300 steps; 4 settings"
    " each",
)
def lmpt_beats_bce_on_the_tail(seeds: Seeds) -> Arms:
    return _compare(seeds, "bce", TAIL)


@claim(
    says="LMPT ranks images of the seven most frequent classes no worse than binary cross-entropy",
    kind="noninferiority",
    metric="average precision",
    scale="20 synthetic classes in a tail of 100, 1500 images with captions, class vectors of 32, 300 steps; 4 settings"
    " each",
)
def lmpt_matches_bce_on_the_head(seeds: Seeds) -> Arms:
    return _compare(seeds, "bce", HEAD)
