"""One finalist against the registered baseline, once, on the locked rows; and the sentences that this allows."""

from math import floor, log10
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lossary.compare.metrics import Metric, level
from lossary.compare.problem import Problem
from lossary.compare.result import ArmResult, Confirmation, Interval
from lossary.compare.statistics import over_rows, too_few

BINS = 10


def confirm(
    names: tuple[str, str],
    predictions: tuple[NDArray[np.float64], NDArray[np.float64]],
    metric: Metric,
    locked: Problem,
) -> Confirmation:
    """What the locked rows say.

    Args:
        names: finalist and baseline.
        predictions: theirs, each (seeds, rows, ...); one run for a model that draws nothing.
        metric: the primary one, named beforehand.
        locked: these rows.
    """
    first, second = predictions
    target, weight = locked.target, locked.weight
    lead = over_rows(metric, first, second, target, locked.units, np.random.default_rng(0), weight)
    return Confirmation(
        finalist=names[0],
        baseline=names[1],
        effect=lead.interval,
        detectable=lead.detectable,
        rows=len(target),
        seeds=(len(first), len(second)),
        scores=tuple(float(np.mean(metric.score(arm, target, weight))) for arm in predictions),
        exploratory=too_few(target, locked.task, locked.classes),
    )


def answer(confirmation: Confirmation | None, metric: Metric) -> str:
    """Does the best part beat the best conventional arm: no more than the interval says."""
    if confirmation is None:
        return "No part of the catalogue was tried, so there is nothing to confirm."
    c, effect = confirmation, confirmation.effect
    span = f"95% interval {bounds(effect)}"
    rows = f"on {c.rows:,} rows that nothing had looked at"
    if c.exploratory:
        return f"{_exploratory(c, metric)}."
    if effect.low > 0:
        verb = "raised" if metric.better == "higher" else "lowered"
        by = amount(effect.difference, effect, metric.unit)
        return f"{c.finalist} {verb} {metric.name} by {by} over {c.baseline} ({span}, {rows})."
    if effect.high < 0:
        return (
            f"Nothing tried is shown to beat {c.baseline}: the best part, {c.finalist}, was worse by "
            f"{amount(-effect.difference, effect, metric.unit)} in {metric.name} ({span}, {rows})."
        )
    return (
        f"Nothing tried is shown to beat {c.baseline}: the best part, {c.finalist}, differed by "
        f"{amount(effect.difference, effect, metric.unit, sign=True)} in {metric.name} ({span}, {rows}); a lead of "
        f"{amount(c.detectable, effect, metric.unit)} or more would most likely have been seen."
    )


def _exploratory(c: Confirmation, metric: Metric) -> str:
    """What is said, without the full stop, where the locked rows confirm nothing."""
    return (
        f"Exploratory only, as {c.exploratory}: there {c.finalist} differed from {c.baseline} by "
        f"{amount(c.effect.difference, c.effect, metric.unit, sign=True)} in {metric.name} "
        f"(95% interval {bounds(c.effect)}, more being better)"
    )


def detectable(c: Confirmation, unit: str) -> str:
    """The smallest lead that the comparison would most likely have seen, in words."""
    return (
        f"the smallest detectable lead over {c.baseline} on these {c.rows:,} rows is "
        f"{amount(c.detectable, c.effect, unit)} (2.8 standard errors)"
    )


def own_answer(finalist: ArmResult | None, metric: Metric) -> str:
    """Does the part improve its own model: by the search rows, so exploratory."""
    if finalist is None or finalist.against_own is None:
        return ""
    effect = finalist.against_own
    verdict = (
        f"{finalist.name} improved on the same model without it"
        if effect.low > 0
        else f"{finalist.name} was worse than the same model without it"
        if effect.high < 0
        else f"whether {finalist.name} improves on the same model without it is open"
    )
    difference = amount(effect.difference, effect, metric.unit, sign=True)
    return f"On the search rows, exploratory: {verdict}: {difference} in {metric.name} (95% interval {bounds(effect)})."


def amount(value: float, effect: Interval, unit: str, *, sign: bool = False) -> str:
    """A number as precise as its interval, with its unit where it has a name."""
    return figure(value, effect, sign=sign) + (f" {unit}" if unit in ("points", "nats") else "")


def bounds(effect: Interval) -> str:
    """-1.5 to 0.9."""
    return f"{figure(effect.low, effect)} to {figure(effect.high, effect)}"


def figure(value: float, effect: Interval, *, sign: bool = False) -> str:
    """A number as precise as its interval."""
    half = (effect.high - effect.low) / 2
    decimals = 1 if not np.isfinite(half) or half <= 0 else min(6, max(0, 1 - floor(log10(half))))
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def own_predictions(found: Confirmation, name: str, metric: Metric) -> str:
    """How predictions that the user brought stand to the finalist on the locked rows."""
    effect = found.effect
    rest = f"; {name} had {found.scores[1]:.4g}, and {detectable(found, metric.unit)}."
    if found.exploratory:
        return _exploratory(found, metric) + rest
    verdict = (
        f"{found.finalist} was better than {name}"
        if effect.low > 0
        else f"{found.finalist} was worse than {name}"
        if effect.high < 0
        else f"whether {found.finalist} is better than {name} is open"
    )
    return (
        f"On the {found.rows:,} locked rows {verdict}: {amount(effect.difference, effect, metric.unit, sign=True)} in "
        f"{metric.name} (95% interval {bounds(effect)}){rest}"
    )


def curves(
    names: tuple[str, str], predictions: tuple[NDArray[np.float64], NDArray[np.float64]], locked: Problem
) -> dict[str, Any]:
    """For charts, by arm: "reliability", bins of what was predicted against what came, all seeds together; and for
    classes and levels "confusion", counts of (true class, predicted class) of the first seed.
    """
    found: dict[str, Any] = {"reliability": {}}
    target, classes = locked.target, len(locked.classes)
    for name, values in zip(names, predictions):
        if locked.task == "multilabel":
            predicted, observed = expit(values), np.broadcast_to(target, values.shape)
        elif locked.task == "real":
            predicted, observed = values, np.broadcast_to(target, values.shape)
        else:
            chosen = level(values) if locked.task == "ordinal" else values.argmax(-1)
            predicted = np.exp(np.take_along_axis(values, chosen[..., None], -1))[..., 0]
            observed = chosen == target
        found["reliability"][name] = _bins(predicted.ravel(), observed.ravel(), len(values))
        if locked.task in ("classes", "ordinal"):
            pairs = np.bincount(target * classes + chosen[0], minlength=classes**2)
            found.setdefault("confusion", {})[name] = pairs.reshape(classes, classes).tolist()
    return found


def _bins(predicted: NDArray[Any], observed: NDArray[Any], seeds: int) -> list[dict[str, float]]:
    """Of equally many rows, in the order of what was predicted."""
    return [
        {
            "predicted": float(predicted[part].mean()),
            "observed": float(observed[part].mean()),
            "rows": len(part) / seeds,
        }
        for part in np.array_split(np.argsort(predicted, kind="stable"), BINS)
        if len(part)
    ]
