"""Correctness-aware calibration: does it pay to train a calibrator on right and wrong, and to show it copies?

A network learns noisy digits by 30 people; the calibrator learns on 1500 further images and is judged on 1500 more,
as they are and with the noise half as strong again. The copies are shifted by a pixel, blurred, and of half the
contrast.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import auroc, cross_entropy, fit, optdigits_writers, stacked_mlp
from lossary.uncertainty import TransformAwareTemperature, correctness_aware_loss
from lossary.uncertainty._calibration import calibrated, expected_calibration_error, temperature

TRAIN, CALIBRATE, NOISE = 800, 1500, 0.3


class Seen(NamedTuple):
    """What a network says of some images and of their copies, and what they show."""

    logits: Tensor
    views: Tensor
    y: Tensor


Calibrate = Callable[[Seen, Seen], NDArray]
"""calibrate(held-out images, new images) -> probabilities of the new ones."""


def _networks(seeds: Seeds) -> list[dict[str, Seen]]:
    """For each seed the images to calibrate on, the test images as they are, and more noisy."""
    data = optdigits_writers()
    home = torch.nonzero(data.group == 0).squeeze(1)
    rows = torch.stack([home[torch.randperm(len(home), generator=g)] for g in seeds.torch("people")])
    noise = NOISE * torch.stack([torch.randn(data.x.shape, generator=g) for g in seeds.torch("noise")])
    model = stacked_mlp((64, 64, 10), seeds)
    fit(model, data.x + noise, data.y, loss=cross_entropy, seeds=seeds, train=rows[:, :TRAIN], steps=seeds.few(400))

    @torch.no_grad()
    def seen(strength: float, rows: Tensor) -> list[Seen]:
        images = torch.stack([(data.x + strength * e)[r] for e, r in zip(noise, rows)])
        views = torch.stack([model(copy) for copy in _copies(images)], dim=1)
        return [Seen(*s) for s in zip(model(images), views, data.y[rows])]

    held_out, test = rows[:, TRAIN : TRAIN + CALIBRATE], rows[:, TRAIN + CALIBRATE :]
    parts = {"calibrate": seen(1.0, held_out), "test": seen(1.0, test), "noisier": seen(1.5, test)}
    return [dict(zip(parts, s)) for s in zip(*parts.values())]


def _copies(x: Tensor) -> list[Tensor]:
    """Images (S, N, 64) shifted by a pixel, blurred, and of half the contrast."""
    images = x.unflatten(-1, (8, 8))
    shifted, blurred = F.pad(images, (1, 0))[..., :-1], F.avg_pool2d(images, 3, stride=1, padding=1)
    return [copy.flatten(-2) for copy in (shifted, blurred, images / 2)]


def _one_temperature(held_out: Seen, new: Seen) -> NDArray:
    return calibrated(new.logits.double().numpy(), temperature(held_out.logits, held_out.y))


def _transform_aware(**hyper: Any) -> Calibrate:
    def calibrate(held_out: Seen, new: Seen) -> NDArray:
        learned = TransformAwareTemperature(**hyper).fit(held_out.logits, held_out.y, held_out.views)
        return learned.predict_proba(new.logits, new.views)

    return calibrate


def _confidence(seeds: Seeds, calibrate: Calibrate, on: str) -> list[tuple[NDArray, NDArray]]:
    """For each seed the confidence in test predictions, and which are right."""
    found = []
    for parts in _networks(seeds):
        p = calibrate(parts["calibrate"], parts[on])
        found.append((p.max(1), p.argmax(1) == parts[on].y.numpy()))
    return found


def _calibration_error(seeds: Seeds, calibrate: Calibrate, on: str) -> NDArray:
    """In percent, per seed, from 25 bins as in the paper."""
    return np.array([100 * expected_calibration_error(*s, bins=25) for s in _confidence(seeds, calibrate, on)])


def _separation(seeds: Seeds, calibrate: Calibrate) -> NDArray:
    """AUROC of right against wrong predictions on noisier images, in percent, per seed."""
    pairs = _confidence(seeds, calibrate, "noisier")
    return np.array([auroc(torch.from_numpy(c), torch.from_numpy(right)).item() for c, right in pairs])


@claim(
    says="On noisier images a calibrator trained on correctness errs less than the same one trained by cross-entropy",
    kind="superiority",
    metric="calibration error",
    scale="optdigits 8x8 with noise 0.3, then 0.45, MLP 64-64-10 on 800 images, 1500 to calibrate; 4 settings each",
)
def correctness_beats_cross_entropy(seeds: Seeds) -> Arms:
    def score(seeds: Seeds, **hyper: Any) -> NDArray:
        return _calibration_error(seeds, _transform_aware(**hyper), "test")

    steps, rates = seeds.few(500), (0.003, 0.01)
    ours = [
        {"loss": correctness_aware_loss, "steps": steps, "learning_rate": r, "balanced": b}
        for r in rates
        for b in (False, True)
    ]
    theirs = [{"loss": cross_entropy, "steps": steps, "learning_rate": r, "hidden": h} for r in rates for h in (5, 20)]
    chosen = [tune(score, grid, seeds, better="lower", n=2) for grid in (ours, theirs)]
    method, baseline = (_calibration_error(seeds, _transform_aware(**best), "noisier") for best in chosen)
    settings = [{k: v for k, v in best.items() if k != "loss"} for best in chosen]
    return Arms(method, baseline, dict(zip(("method", "baseline"), settings)))


@claim(
    says="On noisier images transform-aware temperatures trained on correctness err less than a single temperature",
    kind="superiority",
    metric="calibration error",
    scale="optdigits 8x8 with noise 0.3, then 0.45, MLP 64-64-10 on 800 images, 1500 to calibrate; nothing to tune",
)
def transform_aware_beats_one_temperature(seeds: Seeds) -> Arms:
    ours = _transform_aware(steps=seeds.few(500))
    at_home = {
        name: _calibration_error(seeds, how, "test").mean()
        for name, how in (("method", ours), ("baseline", _one_temperature))
    }
    arms = (_calibration_error(seeds, how, "noisier") for how in (ours, _one_temperature))
    return Arms(*arms, {"mean without the added noise": at_home})


@claim(
    says="Their confidence tells right from wrong predictions on noisier images better than after a single temperature",
    kind="superiority",
    metric="AUROC",
    scale="optdigits 8x8 with noise 0.3, then 0.45, MLP 64-64-10 on 800 images, 1500 to calibrate; nothing to tune",
)
def transform_aware_separates_better(seeds: Seeds) -> Arms:
    return Arms(_separation(seeds, _transform_aware(steps=seeds.few(500))), _separation(seeds, _one_temperature))


@claim(
    says="Where nothing tells right from wrong, confidence ends at the accuracy, or at one half if balanced",
    kind="exact",
    metric="deviation",
    scale="one row of logits 500 times, right with probability 0.6 to 0.95, three classes, 500 steps of Adam",
    tolerance=0.002,
)
def balance_aims_at_one_half(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("right"):
        right = rng.random(500) < rng.uniform(0.6, 0.95)
        logits = np.tile([2.0, 0.0, 0.0], (500, 1))
        for balanced, aim in ((False, right.mean()), (True, 0.5)):
            learned = TransformAwareTemperature(balanced=balanced, learning_rate=0.1).fit(logits, np.where(right, 0, 1))
            deviations.append(learned.predict_proba(logits[:1]).max() - aim)
    return Arms(np.array(deviations))
