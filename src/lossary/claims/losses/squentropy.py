"""Squentropy: more accurate and better calibrated than cross-entropy and the rescaled square loss, without tuning?

As in the paper squentropy takes over the learning rate that was chosen for cross-entropy; the competitors choose
theirs among four. Images of digits are few here, so that accuracy leaves room.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import rescaled_square_loss, squentropy_loss
from lossary.tasks import accuracy, cross_entropy, fit, mnist5k, split, stacked_mlp

LOSSES = {"cross_entropy": cross_entropy, "squentropy": squentropy_loss, "rescaled_square": rescaled_square_loss}
GRIDS = {
    "cross_entropy": (0.01, 0.03, 0.1, 0.3),
    "squentropy": (0.01, 0.03, 0.1, 0.3),
    "rescaled_square": (0.03, 0.1, 0.3, 1.0),  # its gradients are smaller, by the number of classes
}


def _calibration_error(logits: Tensor, target: Tensor) -> Tensor:
    """Expected calibration error over 15 equal bins of confidence, in points, per seed."""
    confidence, guess = logits.double().softmax(-1).max(-1)
    bin = (15 * confidence).long().clamp(max=14)
    gap = torch.zeros(len(logits), 15, dtype=torch.float64)
    return gap.scatter_add_(1, bin, (guess == target).double() - confidence).abs().sum(1) * 100 / target.shape[1]


def _score(seeds: Seeds, *, loss: str, lr: float, measure: Callable[[Tensor, Tensor], Tensor] = accuracy) -> Tensor:
    """A measure on the test part, per seed; accuracy, in percent, also chooses the learning rate."""
    data, model = mnist5k(), stacked_mlp((784, 64, 10), seeds)
    parts = split(data, seeds)
    fit(model, data.x, data.y, loss=LOSSES[loss], seeds=seeds, train=parts.train, steps=seeds.few(600), lr=lr)
    with torch.no_grad():
        return measure(model(data.x[parts.test]), data.y[parts.test])


def _tuned(loss: str, seeds: Seeds) -> dict:
    return tune(_score, [{"loss": loss, "lr": lr} for lr in GRIDS[loss]], seeds)


@claim(
    says="At the learning rate chosen for cross-entropy, squentropy classifies better than cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="MNIST 5000 images, MLP 784-64-10, 600 steps of 64; 4 learning rates for cross-entropy, its best for both",
)
def squentropy_beats_cross_entropy(seeds: Seeds) -> Arms:
    plain = _tuned("cross_entropy", seeds)
    return Arms(_score(seeds, loss="squentropy", lr=plain["lr"]), _score(seeds, **plain), {"baseline": plain})


@claim(
    says="Squentropy classifies better than the rescaled square loss with k = M = 1",
    kind="superiority",
    metric="accuracy",
    scale="MNIST 5000 images, MLP 784-64-10, 600 steps of 64; 4 learning rates each",
)
def squentropy_beats_rescaled_square(seeds: Seeds) -> Arms:
    method, square = _tuned("squentropy", seeds), _tuned("rescaled_square", seeds)
    return Arms(_score(seeds, **method), _score(seeds, **square), {"method": method, "baseline": square})


@claim(
    says="At the learning rate chosen for cross-entropy, squentropy is better calibrated than cross-entropy",
    kind="superiority",
    metric="calibration error",
    scale="MNIST 5000 images, MLP 784-64-10, 600 steps of 64; error over 15 bins; 4 learning rates for cross-entropy",
)
def squentropy_is_better_calibrated(seeds: Seeds) -> Arms:
    plain = _tuned("cross_entropy", seeds)
    method = {"loss": "squentropy", "lr": plain["lr"]}
    ours, theirs = (_score(seeds, **setting, measure=_calibration_error) for setting in (method, plain))
    return Arms(ours, theirs, {"baseline": plain})


@claim(
    says="Squentropy needs no tuning of its own: cross-entropy's learning rate serves it no worse than its best",
    kind="noninferiority",
    metric="accuracy",
    scale="MNIST 5000 images, MLP 784-64-10, 600 steps of 64; 4 learning rates each",
)
def squentropy_needs_no_tuning(seeds: Seeds) -> Arms:
    plain, own = _tuned("cross_entropy", seeds), _tuned("squentropy", seeds)
    taken = _score(seeds, loss="squentropy", lr=plain["lr"])
    return Arms(taken, _score(seeds, **own), {"cross_entropy": plain, "squentropy": own})
