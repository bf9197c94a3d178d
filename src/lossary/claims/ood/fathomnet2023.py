"""FathomNet 2023 in small: digits as animals that live at their own depths, networks that saw shallow water only.

A scene is a mosaic of up to four digits. At each depth, 0 to 1, a digit is as frequent as its own depth is near; the
digits 8 and 9 live at the bottom. Networks train on scenes above 0.6 and are tested at all depths; out-of-sample are
those below.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import FathomNetScore, multilabel_map_at_k, scaled_auroc
from lossary.tasks import auroc, digits, fit, split, stacked_mlp

HORIZON = 0.6
HOME = np.array([0.1, 0.3, 0.5, 0.7, 0.2, 0.4, 0.6, 0.8, 1.1, 1.2])
"""The depth at which each digit is most frequent."""


def _scenes(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Mosaics (S, 3000, 256), digits in them (S, 3000, 10) and depths (S, 3000); the first 2000 are shallow, to train.

    They are made of training digits, the last 1000 of test digits.
    """
    data, parts = digits(), split(digits(), seeds)
    images, labels = data.x.numpy(), data.y.numpy()
    scenes = []
    for rng, train, test in zip(seeds.numpy("scenes"), parts.train.numpy(), parts.test.numpy()):
        depth = np.concatenate([rng.uniform(0, HORIZON, 2000), rng.uniform(0, 1, 1000)])
        frequency = np.exp(-(((depth[:, None] - HOME) / 0.2) ** 2))
        frequency /= frequency.sum(1, keepdims=True)
        tiles = (rng.random((3000, 4, 1)) > frequency.cumsum(1)[:, None]).sum(2)  # a digit for each tile
        shown = rng.random((3000, 4)).argsort(1) < rng.integers(1, 5, (3000, 1))
        mosaic, present = np.zeros((3000, 2, 2, 8, 8), np.float32), np.zeros((3000, 10), np.float32)
        for rows, pool in ((slice(0, 2000), train), (slice(2000, 3000), test)):
            by_digit = [pool[labels[pool] == c] for c in range(10)]
            picked = np.stack([rng.choice(own, tiles[rows].shape) for own in by_digit], -1)
            which = np.take_along_axis(picked, tiles[rows][..., None], -1)[..., 0]
            mosaic[rows] = (images[which] * shown[rows][..., None]).reshape(-1, 2, 2, 8, 8)
        np.maximum.at(present, (np.arange(3000)[:, None], tiles), shown)
        flat = mosaic.transpose(0, 1, 3, 2, 4).reshape(3000, 256)
        scenes.append([torch.from_numpy(a) for a in (flat, present, depth.astype(np.float32))])
    x, y, depths = (torch.stack(column) for column in zip(*scenes))
    return x, y, depths


def _recognised(seeds: Seeds, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the test scenes (S, 1000, 10) by networks trained on the shallow ones, what is there, and depths."""
    x, y, depth = _scenes(seeds)
    model = stacked_mlp((256, 128, 10), seeds)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)

    fit(model, x[:, :2000], y[:, :2000], loss=loss, seeds=seeds, steps=seeds.few(600), lr=lr)
    with torch.no_grad():
        return model(x[:, 2000:]), y[:, 2000:], depth[:, 2000:]


def _joint_energy(logits: Tensor) -> Tensor:
    """Minus the energies of all labels added up: little evidence for any label is strange."""
    return -F.softplus(logits).sum(-1)


def _uncertain(seeds: Seeds, *, lr: float, joint: bool) -> Tensor:
    """AUROC of a recogniser's own doubt for scenes below the horizon, per seed."""
    logits, _, depth = _recognised(seeds, lr)
    return auroc(_joint_energy(logits) if joint else -logits.amax(-1), depth > HORIZON)


def _sounding(seeds: Seeds, *, lr: float, weight_decay: float) -> Tensor:
    """AUROC of the depth that a network trained on shallow depths reads off a scene, per seed."""
    x, _, depth = _scenes(seeds)
    model = stacked_mlp((256, 128, 1), seeds)
    fit(
        model,
        x[:, :2000],
        depth[:, :2000],
        loss=lambda z, target: (z.squeeze(-1) - target).square(),
        seeds=seeds,
        steps=seeds.few(600),
        lr=lr,
        weight_decay=weight_decay,
    )
    with torch.no_grad():
        return auroc(model(x[:, 2000:]).squeeze(-1), depth[:, 2000:] > HORIZON)


def _map(logits: Tensor, y: Tensor) -> Tensor:
    return 100 * multilabel_map_at_k(logits.argsort(-1, descending=True), y)


@claim(
    says="Digits are recognised better in shallow scenes, as in training, than in deep ones",
    kind="superiority",
    metric="average precision",
    scale="mosaics of up to 4 digits by depth, MLP 256-128-10, binary cross-entropy, 600 steps; MAP@20; no tuning",
)
def depth_costs_recognition(seeds: Seeds) -> Arms:
    logits, y, depth = _recognised(seeds, 0.02)
    deep = depth > HORIZON
    arms = [[_map(z[rows], t[rows]) for z, t, rows in zip(logits, y, where)] for where in (~deep, deep)]
    return Arms(torch.stack(arms[0]), torch.stack(arms[1]))


@claim(
    says="A recogniser's joint energy tells scenes from below its training depths better than chance",
    kind="superiority",
    metric="AUROC",
    scale="mosaics of up to 4 digits by depth, MLP 256-128-10, binary cross-entropy, 600 steps; nothing to tune",
)
def joint_energy_beats_chance(seeds: Seeds) -> Arms:
    logits, y, depth = _recognised(seeds, 0.02)
    random = torch.stack([torch.rand(depth.shape[1], generator=g) for g in seeds.torch("chance")])
    outside = depth > HORIZON
    scores = []
    for z, t, doubt, flag in zip(logits, y, _joint_energy(logits), outside):
        score = FathomNetScore()
        score.update(z.argsort(-1, descending=True), t, doubt, flag)
        scores.append(float(score.compute()))
    return Arms(auroc(_joint_energy(logits), outside), auroc(random, outside), {"competition score": scores})


@claim(
    says="The depth read off a scene tells those from below the training depths better than the recogniser's own doubt",
    kind="superiority",
    metric="AUROC",
    scale="mosaics of up to 4 digits by depth, MLP 256-128, 600 steps, on depths against on labels; 4 settings each",
)
def reading_depth_beats_doubt(seeds: Seeds) -> Arms:
    method = tune(_sounding, [{"lr": lr, "weight_decay": w} for lr in (0.01, 0.05) for w in (0.0, 1e-3)], seeds)
    baseline = tune(_uncertain, [{"lr": lr, "joint": joint} for lr in (0.005, 0.02) for joint in (True, False)], seeds)
    return Arms(_sounding(seeds, **method), _uncertain(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="MAP@20 and sAUC are what loops over lists and pairs of images give",
    kind="exact",
    metric="deviation",
    tolerance=1e-12,
    scale="200 lists of 25 of 40 categories with repetitions and gaps, up to 30 true; 200 scores with ties",
)
def metrics_are_the_loops(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("lists"):
        ranked, size = rng.integers(-1, 40, (200, 25)), rng.integers(0, 31, 200)
        target = rng.random((200, 40)).argsort(1) < size[:, None]
        slow = np.mean([_slow_precision(list(r[:20]), set(np.flatnonzero(t))) for r, t in zip(ranked, target)])
        fast = multilabel_map_at_k(torch.from_numpy(ranked), torch.from_numpy(target.astype(float)))
        score, outside = rng.integers(0, 9, 200) / 8, rng.random(200) < 0.3
        pairs = np.sign(score[outside][:, None] - score[~outside]).mean()
        deviations.append([float(fast) - slow, float(scaled_auroc(*map(torch.from_numpy, (score, outside)))) - pairs])
    return Arms(deviations)


def _slow_precision(named: list[int], true: set[int]) -> float:
    found: list[int] = []
    total = 0.0
    for rank, category in enumerate(named, start=1):
        if category in true and category not in found:
            found.append(category)
            total += len(found) / rank
    return total / min(len(true), 20) if true else 0.0
