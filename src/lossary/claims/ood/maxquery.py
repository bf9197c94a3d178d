"""MaxQuery: do a mask transformer's queries show where unseen tissue is, and does reserving them help?

Scenes of 24x24 pixels hold an organ, a disc on noise, with blobs of two kinds of tumour in it, striped across or
along. Test scenes also have blobs of a third kind, chequered. All arms have the same three convolutions; the mask
transformer adds eight queries that look at the image once.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import cluster_segmentation, maxquery_score, query_distribution_loss
from lossary.tasks import auroc

SIDE, WIDTH, CLASSES, GROUPS = 24, 16, 4, (2, 2, 4)
UNSEEN = CLASSES  # the label of tissue that no training scene shows
RATES = (0.003, 0.01)


def _scenes(seeds: Seeds, stream: str, scenes: int, kinds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images (S, scenes, 1, 24, 24) and labels: 0 background, 1 organ, 2 and 3 tumours, 4 unseen."""
    y, x = np.mgrid[:SIDE, :SIDE]
    textures = {2: (y // 2) % 2, 3: (x // 2) % 2, UNSEEN: (y // 2 + x // 2) % 2}
    images, labels = np.zeros((2, len(seeds), scenes, SIDE, SIDE))
    for s, rng in enumerate(seeds.numpy(stream)):
        for image, label in zip(images[s], labels[s]):
            middle = rng.uniform(9, 15, 2)
            organ = np.hypot(y - middle[0], x - middle[1]) < rng.uniform(8, 9)
            label[organ], image[organ] = 1, 0.5
            for kind in kinds:
                angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(2, 6)
                blob = np.hypot(y - middle[0] - far * np.sin(angle), x - middle[1] - far * np.cos(angle)) < 2.5
                blob &= organ
                label[blob], image[blob] = kind, textures[kind][blob]
            image += rng.normal(0, 0.35, image.shape)
    return torch.from_numpy(images).float().unsqueeze(2), torch.from_numpy(labels).long()


class _Trunk(nn.Sequential):
    """Three convolutions: (batch, 1, 24, 24) to pixel embeddings (batch, 16, 24, 24)."""

    def __init__(self) -> None:
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1)
        super().__init__(
            convolution(1, WIDTH), nn.ReLU(), convolution(WIDTH, WIDTH), nn.ReLU(), convolution(WIDTH, WIDTH)
        )


class _MaskTransformer(nn.Module):
    """Queries attend to the pixels once; affinity to them and their classes give the segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _Trunk()
        self.queries = nn.Parameter(torch.randn(sum(GROUPS), WIDTH))
        self.value, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.classes = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Affinity (batch, queries, 24, 24) and class logits (batch, 4, 24, 24)."""
        pixels = self.trunk(images)
        flat = pixels.flatten(2).mT
        attention = (self.queries @ flat.mT / math.sqrt(WIDTH)).softmax(2)
        queries = self.norm(self.queries + self.value(attention @ flat))
        affinity = torch.einsum("bnd,bdhw->bnhw", queries, pixels)
        return affinity, cluster_segmentation(affinity, self.classes(queries))


class _Plain(nn.Module):
    """The trunk with a linear layer to the classes; there is no affinity."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classes = _Trunk(), nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.classes(self.trunk(images))


def _segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy plus one minus the mean Dice coefficient."""
    share, truth = logits.softmax(1), F.one_hot(labels, CLASSES).movedim(3, 1)
    dice = (2 * (share * truth).sum((0, 2, 3)) + 1) / (share.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1)
    return F.cross_entropy(logits, labels) + 1 - dice.mean()


def _trained(seeds: Seeds, made: type[nn.Module], *, lr: float, weight: float = 0.0) -> list[nn.Module]:
    """A network for each seed; `weight` is that of the query-distribution loss."""
    images, labels = _scenes(seeds, "scenes", 64, (2, 3))
    networks = []
    for s, (first, order) in enumerate(zip(seeds.torch("init"), seeds.torch("order"))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(first.initial_seed())
            network = made()
        optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        for _ in range(seeds.few(150)):
            rows = torch.randint(64, (4,), generator=order)
            affinity, logits = network(images[s, rows])
            loss = _segmentation_loss(logits, labels[s, rows])
            if weight:
                reserved = query_distribution_loss(affinity, labels[s, rows].clamp_max(2), sizes=GROUPS)
                loss = loss + weight * reserved.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        networks.append(network.eval())
    return networks


@torch.no_grad()
def _localised(seeds: Seeds, *, lr: float, weight: float = 1.0, score: str = "maxquery") -> Tensor:
    """How well unseen tissue is told from all else by pixel, in percent, per seed."""
    images, labels = _scenes(seeds, "test scenes", 32, (2, 3, UNSEEN))
    with torch.enable_grad():
        networks = _trained(seeds, _MaskTransformer, lr=lr, weight=weight)
    values = []
    for network, scenes, truth in zip(networks, images, labels):
        affinity, logits = network(scenes)
        scores = {
            "maxquery": lambda a=affinity: maxquery_score(a),
            "max softmax": lambda z=logits: -z.softmax(1).amax(1),
            "max logit": lambda z=logits: -z.amax(1),
        }
        values.append(auroc(scores[score]().flatten(), (truth == UNSEEN).flatten()))
    return torch.stack(values)


@torch.no_grad()
def _dice(seeds: Seeds, made: type[nn.Module], *, lr: float, weight: float = 0.0) -> Tensor:
    """Mean Dice coefficient of the two kinds of tumour on scenes without unseen ones, in percent, per seed."""
    images, labels = _scenes(seeds, "ordinary test scenes", 32, (2, 3))
    with torch.enable_grad():
        networks = _trained(seeds, made, lr=lr, weight=weight)
    values = []
    for network, scenes, truth in zip(networks, images, labels):
        found = network(scenes)[1].argmax(1)
        overlap = [2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + (truth == k).sum()) for k in (2, 3)]
        values.append(100 * torch.stack(overlap).mean())
    return torch.stack(values)


def _usual(seeds: Seeds, *, lr: float, score: str) -> Tensor:
    return _localised(seeds, lr=lr, score=score)


def _reserved(seeds: Seeds, *, lr: float, weight: float) -> Tensor:
    return _dice(seeds, _MaskTransformer, lr=lr, weight=weight)


def _convolutions(seeds: Seeds, *, lr: float) -> Tensor:
    return _dice(seeds, _Plain, lr=lr)


@claim(
    says="The largest affinity to a query shows unseen tissue better than softmax confidence or the largest logit does",
    kind="superiority",
    metric="AUROC",
    scale="scenes of 24x24 pixels with tumours of two kinds, a third at test, 3 convolutions of 16 and 8 queries, with"
    " query-distribution loss, 150 steps of 4; 4 settings each",
)
def affinity_beats_confidence(seeds: Seeds) -> Arms:
    rates = [{"lr": lr, "weight": weight} for lr in RATES for weight in (0.3, 1.0)]
    scores = [{"lr": lr, "score": score} for lr in RATES for score in ("max softmax", "max logit")]
    near, usual = tune(_localised, rates, seeds, n=2), tune(_usual, scores, seeds, n=2)
    return Arms(_localised(seeds, **near), _usual(seeds, **usual), {"method": near, "baseline": usual})


@claim(
    says="With queries reserved for each kind of region, affinity shows unseen tissue better than without",
    kind="superiority",
    metric="AUROC",
    scale="scenes of 24x24 pixels with tumours of two kinds, a third at test, 3 convolutions of 16 and 8 queries, 150"
    " steps of 4; 2 settings each",
)
def reserved_queries_localise_better(seeds: Seeds) -> Arms:
    rates = [{"lr": lr} for lr in RATES]
    free = partial(_localised, weight=0.0)
    reserved, unreserved = tune(_localised, rates, seeds, n=2), tune(free, rates, seeds, n=2)
    details = {"method": reserved, "baseline": unreserved}
    return Arms(_localised(seeds, **reserved), free(seeds, **unreserved), details)


@claim(
    says="A mask transformer with reserved queries segments known tumours better than the convolutions alone",
    kind="superiority",
    metric="F1",
    scale="scenes of 24x24 pixels with tumours of two kinds, 3 convolutions of 16, with or without 8 queries, 150 steps"
    " of 4, Dice coefficient of tumours; 4 settings each",
)
def queries_segment_better(seeds: Seeds) -> Arms:
    reserving = [{"lr": lr, "weight": weight} for lr in (0.01, 0.03) for weight in (0.3, 1.0)]
    plain = [{"lr": lr} for lr in (0.003, 0.01, 0.02, 0.03)]
    queries, convolutions = tune(_reserved, reserving, seeds, n=2), tune(_convolutions, plain, seeds, n=2)
    details = {"method": queries, "baseline": convolutions}
    return Arms(_reserved(seeds, **queries), _convolutions(seeds, **convolutions), details)
