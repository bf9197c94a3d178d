"""What arms are scored by.

Predictions are logarithms of probabilities (S, n, k) for classes and for ordered levels, log-odds (S, n, k) for labels
of which several may hold, and values (S, n) for a real target.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

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
        tasks: the problems that it is for.
        rows: (prediction (S, n, ...), target (n, ...)) to values (S, n), whose mean is the score. None where the
            score is no mean over rows.
        balanced: the score is the mean of the means within each class.
        weighted: (prediction (n, ...), target (n, ...), weights (B, n)) to scores (B,), where `rows` is None.
        detail: what else the score depends on, such as the costs, as a hash.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    tasks: tuple[str, ...]
    rows: Callable[[Floats, NDArray], Floats] | None = None
    balanced: bool = False
    weighted: Callable[[Floats, NDArray, Floats], Floats] | None = None
    detail: str = ""

    @property
    def sign(self) -> float:
        """1 where higher is better, otherwise -1."""
        return 1.0 if self.better == "higher" else -1.0

    def score(self, prediction: Floats, target: NDArray, weight: Floats | None = None) -> Floats:
        """(S,), rows counted by their weight (n,) if any: NaN where they do not define it, as AUROC with one class."""
        if self.rows is None:
            counts = np.ones((1, len(target))) if weight is None else weight[None]
            return np.array([self.weighted(one, target, counts)[0] for one in prediction])
        return self.rows(prediction, target) @ self.shares(target, weight)

    def shares(self, target: NDArray, weight: Floats | None = None) -> Floats:
        """(n,): the share of each row's value in the score; they sum to 1."""
        weight = np.ones(len(target)) if weight is None else weight
        if not self.balanced:
            return weight / weight.sum()
        mass = np.bincount(target, weight)
        return weight / (np.count_nonzero(mass) * np.where(mass[target] > 0, mass[target], 1.0))


def fitting(name: str, task: str, classes: int = 0) -> Metric:
    """The metric of this name, for this kind of target; `package.module:function` is a function of the user's.

    Raises:
        BadInput: no such metric, or one for another kind.
    """
    if ":" in name:
        return own(name, task, classes)
    metric = named(name)
    if task not in metric.tasks:
        others = ", ".join(other.name for other in METRICS if task in other.tasks)
        raise BadInput(f"--metric: {metric.name} is not for a target of {KINDS[task]}; choose one of {others}")
    return metric


def by_rule(task: str, profile: "Profile") -> tuple[Metric, str]:
    """The metric and why, where none was asked for: by a rule that knows the profile and no arm.

    Classes: balanced accuracy where the profile found them imbalanced, otherwise accuracy. Levels: how many levels
    a prediction is off. Labels: mean average precision. Real: mean absolute error where the profile found heavy
    tails, otherwise root mean squared error.
    """
    raised = {finding.symptom for finding in profile.findings if finding.raised}
    if task == "classes":
        if "class-imbalance" in raised:
            return named("balanced accuracy"), "the classes are imbalanced, and accuracy would hide the small ones"
        return named("accuracy"), "the classes are about equally frequent"
    if task == "ordinal":
        return named("level error"), "the levels are ordered, and being off by two is worse than by one"
    if task == "multilabel":
        return named("mAP"), "it asks for each label which rows have it, however rare it is, without a threshold"
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
        raise BadInput(
            f"--metric: no metric {name!r}; choose one of {', '.join(metric.name for metric in METRICS)}, or name a "
            "function as package.module:function"
        )
    return found


def cost(matrix: Floats) -> Metric:
    """Mean cost of the decisions that a model's probabilities make cheapest, for costs (true class, decision)."""
    digest = sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()
    return Metric("cost", "units of cost", "lower", ("classes", "ordinal"), partial(_cost, matrix), detail=digest)


def own(name: str, task: str, classes: int) -> Metric:
    """A function of the user's, `package.module:function`, called as scikit-learn's metrics are: f(true, predicted).

    Higher is better if its name ends in `_score`, lower if it ends in `_error`, `_loss` or `_cost`, or as its
    attribute `greater_is_better` says. A second parameter called `y_score`, `y_proba` or `y_prob` is handed
    probabilities (n, classes), of two classes those of the second (n,); any other one the predicted class numbers,
    levels, labels (n, L) of 0 and 1, or values. Classes are numbered in the order of their names.

    Raises:
        BadInput: it cannot be imported or called, or does not tell which direction is better.
    """
    function = imported(name, "--metric")
    title = getattr(function, "__name__", name)
    better = getattr(function, "greater_is_better", None)
    if better is None:
        better = {"score": True, "error": False, "loss": False, "cost": False}.get(title.rpartition("_")[2])
    if better is None:
        raise BadInput(
            f"--metric: does a higher {title} mean better? End its name in _score or _error, or set "
            f"{title}.greater_is_better"
        )
    parameters = list(inspect.signature(function).parameters)
    if len(parameters) < 2:
        raise BadInput(f"--metric: {name} takes {parameters}, expected (true, predicted)")
    takes = "probabilities" if parameters[1] in ("y_score", "y_proba", "y_prob") else "labels"
    return Metric(
        title,
        "",
        "higher" if better else "lower",
        (task,),
        weighted=partial(_own, name, task, takes),
        detail=source(name),
    )


def imported(name: str, option: str) -> Any:
    """What `package.module:attribute` names; the current folder counts as installed.

    Raises:
        BadInput: it names nothing that can be called.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise BadInput(f"{option}: cannot import {name!r} ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise BadInput(f"{option}: {name!r} is a {type(found).__name__}, expected something to call")
    return found


def source(name: str) -> str:
    """A hash of the file that `package.module:attribute` comes from, so that an edit of it is noticed."""
    module = import_module(name.partition(":")[0])
    file = getattr(module, "__file__", None)
    return sha256(Path(file).read_bytes()).hexdigest() if file else str(getattr(module, "__version__", ""))


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


def _cost(matrix: Floats, prediction: Floats, target: NDArray) -> Floats:
    return matrix[target, (np.exp(prediction) @ matrix).argmin(-1)]


def level(prediction: Floats) -> NDArray[np.int64]:
    """The median level of log-probabilities (..., levels), which is off by as little as can be expected."""
    return (np.exp(prediction).cumsum(-1) >= 0.5 - 1e-9).argmax(-1)


def _levels_off(prediction: Floats, target: NDArray) -> Floats:
    return np.abs(level(prediction) - target).astype(float)


def _kappa(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """In points: quadratic weighted kappa, 1 - observed squared disagreement over that of independent draws."""
    said, total = level(prediction).astype(float), weights.sum(1)
    off = weights @ (said - target) ** 2 / total
    means = weights @ said / total, weights @ target / total
    apart = weights @ said**2 / total + weights @ target**2 / total - 2 * means[0] * means[1]
    return 100 * (1 - off / np.maximum(apart, 1e-300))


def _label_surprise(prediction: Floats, target: NDArray) -> Floats:
    return np.logaddexp(0, np.where(target == 1, -prediction, prediction)).mean(-1)


def _labels_right(prediction: Floats, target: NDArray) -> Floats:
    return 100.0 * ((prediction > 0) == target).mean(-1)


def _label_f1(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """In points: the mean over the labels that occur of 2 tp / (2 tp + fp + fn), at a probability of one half."""
    said, true = prediction > 0, target == 1
    present = true.any(0)
    both, either = weights @ (said & true)[:, present], weights @ said[:, present] + weights @ true[:, present]
    return 100 * np.mean(2 * both / np.maximum(either, 1e-300), axis=1)


def _mean_average_precision(prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """In points: the mean over the labels that occur of the area under precision against recall, ties together."""
    precisions = []
    for column in np.flatnonzero(target.any(0)):
        values, tie = np.unique(-prediction[:, column], return_inverse=True)
        order, first = np.argsort(tie, kind="stable"), np.searchsorted(np.sort(tie), np.arange(len(values)))
        mass, hits = (np.add.reduceat(w[:, order], first, axis=1) for w in (weights, weights * target[:, column]))
        with np.errstate(invalid="ignore"):
            precision = hits.cumsum(1) / np.maximum(mass.cumsum(1), 1e-300)
            precisions.append((precision * hits).sum(1) / hits.sum(1))
    return 100 * np.nanmean(precisions, axis=0)


def _own(name: str, task: str, takes: str, prediction: Floats, target: NDArray, weights: Floats) -> Floats:
    """The user's function on rows repeated as often as they count; weights that are no whole numbers are refused."""
    times = np.round(weights).astype(np.int64)
    if not np.allclose(times, weights):
        raise BadInput(f"--metric: {name} counts every row once; it cannot go with --sample-weight")
    predicted = _answers(prediction, task, takes)
    function, rows = imported(name, "--metric"), np.arange(len(target))
    scores = []
    for count in times:
        index = np.repeat(rows, count)
        try:
            scores.append(float(function(target[index], predicted[index])))
        except Exception as error:  # whatever the user's function raises
            raise BadInput(f"--metric: {name} raised {type(error).__name__}: {' '.join(str(error).split())}") from None
    return np.array(scores)


def _answers(prediction: Floats, task: str, takes: str) -> NDArray:
    """What a function of the user's is handed: probabilities, or the class, level, labels or value predicted."""
    if task == "real":
        return prediction
    if takes == "probabilities":
        chances = expit(prediction) if task == "multilabel" else np.exp(prediction)
        return chances[:, 1] if task != "multilabel" and chances.shape[1] == 2 else chances
    if task == "multilabel":
        return (prediction > 0).astype(np.int64)
    return level(prediction) if task == "ordinal" else prediction.argmax(-1)


KINDS = {"classes": "classes", "ordinal": "ordered levels", "multilabel": "several labels", "real": "numbers"}
_CHOICE = ("classes", "ordinal")
METRICS = (
    Metric("accuracy", "points", "higher", _CHOICE, _right),
    Metric("balanced accuracy", "points", "higher", _CHOICE, _right, balanced=True),
    Metric("log-loss", "nats", "lower", _CHOICE, _surprise),
    Metric("AUROC", "points", "higher", _CHOICE, weighted=_auroc),
    Metric("macro F1", "points", "higher", _CHOICE, weighted=_macro_f1),
    Metric("level error", "levels", "lower", ("ordinal",), _levels_off),
    Metric("quadratic kappa", "points", "higher", ("ordinal",), weighted=_kappa),
    Metric("mAP", "points", "higher", ("multilabel",), weighted=_mean_average_precision),
    Metric("label F1", "points", "higher", ("multilabel",), weighted=_label_f1),
    Metric("label accuracy", "points", "higher", ("multilabel",), _labels_right),
    Metric("label log-loss", "nats", "lower", ("multilabel",), _label_surprise),
    Metric("MAE", "units of the target", "lower", ("real",), _absolute),
    Metric("RMSE", "units of the target", "lower", ("real",), weighted=_rmse),
    Metric("R2", "of the variance", "higher", ("real",), weighted=_r2),
)
ALIASES = {
    "accuracy": ("acc",),
    "balanced accuracy": ("balanced", "bacc"),
    "log-loss": ("crossentropy", "nll"),
    "AUROC": ("auc", "rocauc"),
    "macro F1": ("f1",),
    "level error": ("levelmae", "ordinalmae"),
    "quadratic kappa": ("qwk", "kappa", "cohenkappa"),
    "mAP": ("meanaverageprecision", "averageprecision"),
    "label F1": ("multilabelf1",),
    "label accuracy": ("hamming",),
    "label log-loss": ("bce", "binarycrossentropy"),
    "MAE": ("meanabsoluteerror",),
    "RMSE": ("rootmeansquarederror",),
    "R2": ("rsquared",),
}
