"""Conformal risk control: is the risk what was asked for, no more and hardly less?

A model's blurred view of masks is cut at a threshold; the loss is the share of the mask's pixels that are missed. A
seed draws images, splits them many times into calibration and test parts and reports the mean test risk.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim
from lossary.tasks import blurred_masks
from lossary.uncertainty import conformal_risk_control, weighted_conformal_risk_control

LAMBDAS = np.linspace(0.0, 1.0, 1001)

Images = list[tuple[NDArray, NDArray]]
"""For each seed the losses (images, lambdas) and the mean scores (images,)."""

Choose = Callable[[NDArray, float], float]
"""choose(calibration losses, alpha) -> lambda."""


def _images(seeds: Seeds) -> Images:
    """1500 images a seed; the losses are false-negative rates of the sets {score >= 1 - lambda}."""
    drawn = blurred_masks(seeds, seeds.few(1500, smoke=150))
    found = []
    for masks, scores in zip(drawn.masks.numpy(), drawn.scores.numpy()):
        true = [np.sort(s[m]) for s, m in zip(scores, masks)]
        table = np.stack([np.searchsorted(s, 1 - LAMBDAS) / len(s) for s in true])
        found.append((table, scores.mean((1, 2), dtype=np.float64)))
    return found


def _risk(seeds: Seeds, images: Images, choose: Choose, *, n: int, alpha: float = 0.1) -> NDArray:
    """Mean loss on the images left over by n calibration images, over 25 splits, per seed."""
    n, risks = seeds.few(n, smoke=50), []
    for (losses, _), rng in zip(images, seeds.numpy("resplit")):
        values = []
        for _ in range(seeds.few(25, smoke=2)):
            order = rng.permutation(len(losses))
            chosen = choose(losses[order[:n]], alpha)
            values.append(losses[order[n:], np.searchsorted(LAMBDAS, chosen)].mean())
        risks.append(np.mean(values))
    return np.array(risks)


def _controlled(losses: NDArray, alpha: float) -> float:
    return conformal_risk_control(losses, LAMBDAS, alpha=alpha)


def _plug_in(losses: NDArray, alpha: float) -> float:
    """What one does without a guarantee: the first threshold whose mean calibration loss is at most alpha."""
    return float(LAMBDAS[np.argmax(losses.mean(0) <= alpha)])


@claim(
    says="With 1000 calibration images the risk is the level that was asked for, from both sides",
    kind="equality",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 1500 images, 25 splits a seed",
)
def risk_is_the_level(seeds: Seeds) -> Arms:
    images = _images(seeds)
    others = {f"at {a}": _risk(seeds, images, _controlled, n=1000, alpha=a).mean() for a in (0.05, 0.2)}
    return Arms(_risk(seeds, images, _controlled, n=1000), np.full(len(seeds), 0.1), {"mean risk": others})


@claim(
    says="With only 20 calibration images the risk still does not exceed the level",
    kind="noninferiority",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 1500 images, 25 splits a seed",
)
def few_images_keep_the_promise(seeds: Seeds) -> Arms:
    images = _images(seeds)
    plug_in = {"mean risk of the plug-in threshold": _risk(seeds, images, _plug_in, n=20).mean()}
    return Arms(_risk(seeds, images, _controlled, n=20), np.full(len(seeds), 0.1), plug_in)


def _shifted(images: Images, *, weighted: bool) -> NDArray:
    """Risk at level 0.1 where small objects have become common, after calibration where they were not, per seed.

    The density ratio is exp(-15 mean score), known and the same for both arms; the risk under the shift is the mean
    loss on 1000 unshifted images, weighted by it.
    """
    risks = []
    for losses, score in images:
        n, ratio = len(losses) // 3, np.exp(-15 * score)
        weights = ratio if weighted else np.ones_like(ratio)
        lambdas = weighted_conformal_risk_control(losses[:n], LAMBDAS, weights[:n], weights[n:], alpha=0.1)
        suffered = losses[np.arange(n, len(losses)), np.searchsorted(LAMBDAS, lambdas)]
        risks.append(np.average(suffered, weights=ratio[n:]))
    return np.array(risks)


@claim(
    says="Weights by the density ratio keep the risk at its level when small objects become common",
    kind="noninferiority",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 500 calibration images, known density ratio",
)
def weights_keep_the_promise_under_shift(seeds: Seeds) -> Arms:
    return Arms(_shifted(_images(seeds), weighted=True), np.full(len(seeds), 0.1))


@claim(
    says="When small objects become common, weights by the density ratio lower the risk",
    kind="superiority",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 500 calibration images, known density ratio",
)
def weights_lower_the_risk_under_shift(seeds: Seeds) -> Arms:
    images = _images(seeds)
    return Arms(_shifted(images, weighted=True), _shifted(images, weighted=False))


@claim(
    says="Control: risk control has no lower risk than itself under other seeds",
    kind="superiority",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 1500 images; baseline under fresh seeds",
    control="A/A",
)
def control_beats_itself(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(*(_risk(s, _images(s), _controlled, n=1000) for s in (seeds, other)))


@claim(
    says="Planted: counting the unseen image at its worst lowers the risk of a threshold chosen on 20 images",
    kind="superiority",
    metric="risk",
    scale="false-negative rate of masks 32x32 under blur, level 0.1, 1500 images, 25 splits a seed",
    control="planted",
)
def planted_caution(seeds: Seeds) -> Arms:
    images = _images(seeds)
    return Arms(*(_risk(seeds, images, choose, n=20) for choose in (_controlled, _plug_in)))
