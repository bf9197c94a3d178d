"""What arms are scored by. Class predictions are logarithms of probabilities (S, n, k), real ones values (S, n)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lossary.errors import BadInput

if TYPE_CHECKING:
    from lossary.compare.profile import Profile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One way to score, by rows where that is possible.

    Attributes:
        name, unit: as people read them; a real target's own unit is "units of the target".
        better: which direction is.
        task: the problems that it is for.
        rows: (prediction (S, n, ...), target (n,)) to values (S, n), whose mean is the score. None where the
            score is no mean over rows.
        balanced: the score is the mean of the means within each class.
        weighted: (prediction (n, ...), target (n,), weights (B, n)) to scores (B,), where `rows` is None.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    task: Literal["classes", "real"]
    rows: Callable[[Floats, NDArray], Floats] | None = None
    balanced: bool = False
    weighted: Callable[[Floats, NDArray, Floats], Floats] | None = None

    @property
    def sign(self) -> float:
        """1 where higher is better, otherwise -1."""
        return 1.0 if self.better == "higher" else -1.0

    def score(self, prediction: Floats, target: NDArray) -> Floats:
        """(S,): NaN where the rows do not define it, such as AUROC with one class."""
        if self.rows is None:
            ones = np.ones((1, len(target)))
            return np.array([self.weighted(one, target, ones)[0] for one in prediction])
        return self.rows(prediction, target) @ self.shares(target)

    def shares(self, target: NDArray) -> Floats:
        """(n,): the share of each row's value in the score; they sum to 1."""
        if not self.balanced:
            return np.full(len(target), 1 / len(target))
        count = np.bincount(target)
        return 1 / (np.count_nonzero(count) * count[target])


def fitting(name: str, task: str) -> Metric:
    """The metric of this name, for this kind of target.

    Raises:
        BadInput: no such metric, or one for the other kind.
    """
    metric = named(name)
    if metric.task != task:
        others = ", ".join(other.name for other in METRICS if other.task == task)
        raise BadInput(f"--metric: {metric.name} is not for a target of {task}; choose one of {others}")
    return metric


def by_rule(task: str, profile: "Profile") -> tuple[Metric, str]:
    """The metric and why, where none was asked for: by a rule that knows the profile and no arm.

    Classes: balanced accuracy where the profile found them imbalanced, otherwise accuracy. Real: mean absolute
    error where it found heavy tails, otherwise root mean squared error.
    """
    raised = {finding.symptom for finding in profile.findings if finding.raised}
    if task == "classes":
        if "class-imbalance" in raised:
            return named("balanced accuracy"), "the classes are imbalanced, and accuracy would hide the small ones"
        return named("accuracy"), "the classes are about equally frequent"
    if "heavy-tails" in raised:
        return named("MAE"), "the target has heavy tails, and squares would hang on a few rows"
    return named("RMSE"), "the usual one for a target without heavy tails"


def named(name: str) -> Metric:
    """The metric of this name, capitals and punctuation aside.

    Raises:
        BadInput: there is none.
    """
    found = next((metric for metric in METRICS if _plain(name) in (_plain(metric.name), *ALIASES[metric.name])), None)
    if found is None:
        raise BadInput(f"--metric: no metric {name!r}; choose one of {', '.join(metric.name for metric in METRICS)}")
    return found


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _right(prediction: Floats, target: NDArray) -> Floats:
    return 100.0 * (prediction.argmax(-1) == target)


def _surprise(prediction: Floats, target: NDArray) -> Floats:
    return -np.take_along_axis(prediction, np.broadcast_to(target, prediction.shape[:2])[..., None], -1)[..., 0]


def _absolute(prediction: Floats, target: NDArray) -> Floats:
    return np.abs(prediction - target)


def _auroc(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """In points; with more than two classes the mean over classes of one against the rest."""
    columns = [1] if prediction.shape[1] == 2 else range(prediction.shape[1])
    areas = []
    for column in columns:
        values, tie = np.unique(prediction[:, column], return_inverse=True)
        order, first = np.argsort(tie, kind="stable"), np.searchsorted(np.sort(tie), np.arange(len(values)))
        positive = (target == column).astype(float)
        mass = [np.add.reduceat((weights * side)[:, order], first, axis=1) for side in (positive, 1 - positive)]
        below = np.cumsum(mass[1], axis=1) - mass[1] / 2
        with np.errstate(invalid="ignore"):
            areas.append((mass[0] * below).sum(1) / (mass[0].sum(1) * mass[1].sum(1)))
    areas = np.array(areas)
    defined = np.isfinite(areas)
    with np.errstate(invalid="ignore"):
        return 100 * np.where(defined, areas, 0.0).sum(0) / defined.sum(0)


def _macro_f1(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """In points: the mean over the classes that occur of 2 tp / (2 tp + fp + fn)."""
    chosen, scores = prediction.argmax(-1), []
    for label in np.unique(target):
        said, true = chosen == label, target == label
        both = weights @ (said & true)
        scores.append(2 * both / np.maximum(weights @ said + weights @ true, 1e-300))
    return 100 * np.mean(scores, axis=0)


def _rmse(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    return np.sqrt(weights @ (prediction - target) ** 2 / weights.sum(1))


def _r2(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    total = weights.sum(1)
    spread = weights @ target**2 / total - (weights @ target / total) ** 2
    return 1 - weights @ (prediction - target) ** 2 / total / np.maximum(spread, 1e-300)


METRICS = (
    Metric("accuracy", "points", "higher", "classes", _right),
    Metric("balanced accuracy", "points", "higher", "classes", _right, balanced=True),
    Metric("log-loss", "nats", "lower", "classes", _surprise),
    Metric("AUROC", "points", "higher", "classes", weighted=_auroc),
    Metric("macro F1", "points", "higher", "classes", weighted=_macro_f1),
    Metric("MAE", "units of the target", "lower", "real", _absolute),
    Metric("RMSE", "units of the target", "lower", "real", weighted=_rmse),
    Metric("R2", "of the variance", "higher", "real", weighted=_r2),
)
ALIASES = {
    "accuracy": ("acc",),
    "balanced accuracy": ("balanced", "bacc"),
    "log-loss": ("crossentropy", "nll"),
    "AUROC": ("auc", "rocauc"),
    "macro F1": ("f1",),
    "MAE": ("meanabsoluteerror",),
    "RMSE": ("rootmeansquarederror",),
    "R2": ("rsquared",),
}
