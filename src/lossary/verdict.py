"""The statistics behind a verdict: which margin, which interval, and when a claim holds.

A claim compares two arms over paired seeds. The effect D of a seed is the method's value minus the
baseline's, its sign flipped where lower is better, so that positive is always better. The two-sided 97.5%
t interval [low, high] of its mean is held against a margin m that was registered before anything ran:

| kind           | holds if              | does not hold if     |
|----------------|-----------------------|----------------------|
| superiority    | low > m               | high < m             |
| noninferiority | low > -m              | high < -m            |
| equality       | -m < low and high < m | high < -m or low > m |

A ratio is superiority of each seed's log(method / baseline) with m = log r, a trend superiority of each
seed's least-squares change over registered levels. Anything else is inconclusive. An exact claim has no
interval: it holds if every absolute deviation is within the tolerance, and otherwise does not.

A claim is looked at after 20 seeds and, only if that is inconclusive, once more with all 40. Each look
errs with probability 1.25% on a side, so a claim whose true effect sits on its margin holds with
probability 2.5% at most (2.2% when simulated). With D normal, a true effect of 0.5 standard deviations
above the margin holds at the first look with probability 44%, by the second with 81%.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Kind = Literal["superiority", "noninferiority", "equality", "ratio", "trend", "exact"]
Outcome = Literal["holds", "does not hold", "inconclusive"]
Floats = NDArray[np.float64]

CHANCE = 0.025  # of holding with the true effect on the margin: two looks, half of it on a side at each
FIRST_LOOK = tuple(range(20))
SECOND_LOOK = tuple(range(20, 40))
ROUNDING = 1e-6  # fraction of the values by which float32 results differ for no reason: less spread is none


@dataclass(frozen=True)
class Metric:
    """What a claim measures: the unit of its values, which direction is better, and the margin in that unit.

    Without a margin the metric's size means nothing by itself, and a claim about it is a ratio or exact.
    """

    unit: str
    better: Literal["higher", "lower"]
    margin: float | None


# The one table of margins. A margin is the smallest difference that a practitioner would act on, given
# that a new part costs code and tuning; it never depends on a result. Points run from 0 to 100. Measures
# that rest on fewer samples (one group, the rare classes) swing more between models that nobody would tell
# apart, hence their wider margins.
METRICS: dict[str, Metric] = {
    "accuracy": Metric("points", "higher", 0.5),  # one error fewer in 200 predictions
    "balanced accuracy": Metric("points", "higher", 1.0),
    "worst-group accuracy": Metric("points", "higher", 2.0),
    "AUROC": Metric("points", "higher", 1.0),
    "average precision": Metric("points", "higher", 0.5),
    "F1": Metric("points", "higher", 1.0),
    "Dice": Metric("points", "higher", 1.0),  # overlap of masks, 2|A and B| / (|A| + |B|)
    "IoU": Metric("points", "higher", 1.0),  # overlap of shapes or masks
    "recall": Metric("points", "higher", 1.0),
    "rank correlation": Metric("points", "higher", 1.0),  # a hundred times Spearman's
    "error rate": Metric("points", "lower", 0.5),
    "fairness gap": Metric("points", "lower", 1.0),  # between groups' rates
    "calibration error": Metric("points", "lower", 1.0),  # a confidence of 80% that is right 79% of the time
    "coverage": Metric("points", "higher", 0.5),  # of sets or intervals, mostly held equal to a level
    "log-loss": Metric("nats", "lower", 0.01),  # the true label becomes 1% more likely
    "risk": Metric("fraction", "lower", 0.005),  # an error rate that a method controls, 0 to 1
    "mean squared error": Metric("ratio", "lower", None),  # its size is the target's
    "mean absolute error": Metric("ratio", "lower", None),
    "relative error": Metric("ratio", "lower", None),
    "count error": Metric("ratio", "lower", None),  # mean absolute error of how many
    "landmark error": Metric("ratio", "lower", None),  # distance to the true place, normalised by the object's size
    "sample distance": Metric("ratio", "lower", None),  # of samples from the truth: sliced Wasserstein, energy
    "mode error": Metric("points", "lower", 1.0),  # total variation between found and true weights of modes
    "network evaluations": Metric("ratio", "lower", None),
    "suboptimality": Metric("ratio", "lower", None),  # of an objective, above its minimum
    "variance": Metric("ratio", "lower", None),
    "top Hessian eigenvalue": Metric("ratio", "lower", None),
    "samples seen": Metric("ratio", "lower", None),
    "time": Metric("ratio", "lower", None),
    "deviation": Metric("as stated", "lower", None),  # from what an exact claim states
}


@dataclass(frozen=True)
class Verdict:
    """Outcome of one claim; it speaks of that claim's task and scale only.

    `note` is "", "positive but below margin", "reverses", "not monotone: ..." or "irregular: ...".
    `effect` is the mean over `n` seeds and [`low`, `high`] its interval, in the metric's unit, positive
    being better. For a ratio they are method / baseline (geometric mean), for a trend the change from the
    lowest level to the highest, for exact the largest absolute of `n` deviations, without an interval.
    What is not finite is None.
    """

    outcome: Outcome
    note: str
    effect: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, str | int | float | None]:
        """The fields by name, as strict JSON takes them."""
        return asdict(self)


def threshold(
    kind: Kind,
    metric: str,
    *,
    margin: float | None = None,
    tolerance: float | None = None,
    levels: Sequence[float] | None = None,
    monotone: bool = False,
) -> float:
    """The number that a claim's effect is held against; refuses a registration that lacks something.

    Returns:
        The tolerance of an exact claim, the r of a ratio, otherwise the metric's margin.

    Raises:
        ValueError: unknown `kind` or `metric`; `margin` other than for a ratio, `tolerance` other than for
            exact, `levels` or `monotone` other than for a trend; one of these missing or out of range; a
            metric without a margin where the kind needs one.
    """
    for name, got, choices in (("kind", kind, get_args(Kind)), ("metric", metric, METRICS)):
        if got not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {got!r}")
    owned = (("margin", margin, "ratio"), ("tolerance", tolerance, "exact"), ("levels", levels, "trend"))
    for name, value, owner in owned:
        if (value is None) == (kind == owner):
            expected = "a value" if kind == owner else f"none (only kind {owner!r} takes one)"
            raise ValueError(f"{name}: expected {expected} for kind {kind!r}, got {value!r}")
    if monotone and kind != "trend":
        raise ValueError(f"monotone: expected False for kind {kind!r}, as only 'trend' takes it, got True")

    if margin is not None:
        if not 0 < margin < np.inf:
            raise ValueError(f"margin: expected a finite ratio > 0, got {margin!r}")
        return margin
    if tolerance is not None:
        if not 0 <= tolerance < np.inf:
            raise ValueError(f"tolerance: expected a finite number >= 0, got {tolerance!r}")
        return tolerance
    if levels is not None:
        steps = np.diff(np.atleast_1d(np.asarray(levels, dtype=np.float64)))
        if steps.ndim != 1 or not steps.size or not np.all((steps > 0) & np.isfinite(steps)):
            raise ValueError(f"levels: expected at least two finite increasing numbers, got {levels!r}")
    default = METRICS[metric].margin
    if default is None:
        raise ValueError(f"metric: expected one with a margin for kind {kind!r}, got {metric!r}")
    return default


def judge(
    kind: Kind,
    method: ArrayLike,
    baseline: ArrayLike | None,
    *,
    metric: str,
    margin: float | None = None,
    tolerance: float | None = None,
    levels: Sequence[float] | None = None,
    monotone: bool = False,
) -> Verdict:
    """Verdict of one look at a claim, by the rules at the head of this module.

    Zero variance, one seed with more than half the sum of squares about the mean, or a value that is not
    finite (in a ratio: not positive) make a claim inconclusive and "irregular", whatever its interval says.
    With three seeds the second nearly always applies: so few serve a smoke run only.

    Args:
        kind: one of `Kind`.
        method: (S,) one value per seed in the metric's unit, S >= 3; (S, L) for a trend; any shape for exact.
        baseline: like `method`, seed by seed on the same data and streams. For a trend None asks about the
            method alone, otherwise it is about the lead over the baseline; for exact it is the stated
            value, None for 0.
        metric: a key of `METRICS`, which gives direction and margin.
        margin: the registered ratio r > 0 of method to baseline, only for kind "ratio". Where lower is
            better the claim holds if the interval of the ratio ends below r, where higher is
            better if it begins above r.
        tolerance: largest absolute deviation, only for kind "exact". A NaN never holds.
        levels: (L,) increasing, only for kind "trend": going up the levels makes the metric better. The
            effect is the least-squares slope times (last level - first level), in the metric's unit.
        monotone: of a trend, also ask each step between adjacent levels to be noninferior. A step that
            surely is not refutes the claim, an undecided one leaves it undecided.

    Raises:
        ValueError: what `threshold` raises; shapes that differ or do not fit the kind; fewer than three
            seeds.
    """
    bound = threshold(kind, metric, margin=margin, tolerance=tolerance, levels=levels, monotone=monotone)
    method, baseline = _arms(kind, method, baseline, levels)
    sign = 1.0 if METRICS[metric].better == "higher" else -1.0
    rounding = ROUNDING * max(np.abs(method).max(), np.abs(baseline).max())

    with np.errstate(all="ignore"):  # what is not finite is reported as irregular
        if kind == "exact":
            return _exact(np.abs(method - baseline), bound)
        if kind == "ratio":
            logs = _inside(sign * (np.log(method) - np.log(baseline)), sign * np.log(bound), np.inf, ROUNDING)
            return _as_ratio(logs, sign)
        gain = sign * (method - baseline)
        if kind == "trend":
            return _trend(gain, np.asarray(levels, dtype=np.float64), bound, rounding, monotone)
        floor = bound if kind == "superiority" else -bound
        return _inside(gain, floor, bound if kind == "equality" else np.inf, rounding)


def decide(
    measure: Callable[[tuple[int, ...]], tuple[ArrayLike, ArrayLike | None]],
    kind: Kind,
    metric: str,
    **registered: Any,
) -> tuple[Verdict, Floats, Floats | None]:
    """Both planned looks: seeds 0 to 19 and, only if they are inconclusive for any reason, all of 0 to 39.

    Args:
        measure: takes seed ids and gives (method, baseline) as `judge` takes them, one row per id. The
            second look measures the new seeds only. An exact claim has one look.
        kind, metric: as in `judge`.
        **registered: `margin`, `tolerance`, `levels`, `monotone`, as in `judge`.

    Returns:
        The verdict and the values that it rests on, method and baseline: 20 or 40 rows, or None as measured.

    Raises:
        ValueError: what `judge` raises; other than one row per seed.
    """
    threshold(kind, metric, **registered)  # before a run is spent on it
    method, baseline = _measured(measure, FIRST_LOOK, kind)
    verdict = judge(kind, method, baseline, metric=metric, **registered)
    if verdict.outcome == "inconclusive":
        more_method, more_baseline = _measured(measure, SECOND_LOOK, kind)
        method = np.concatenate([method, more_method])
        baseline = None if baseline is None else np.concatenate([baseline, more_baseline])
        verdict = judge(kind, method, baseline, metric=metric, **registered)
    return verdict, method, baseline


def expected_by_chance(n_claims: int) -> float:
    """At most how many of `n_claims` would hold by chance, were every true effect only at its margin."""
    return CHANCE * n_claims


def _measured(measure: Callable[..., Any], seeds: tuple[int, ...], kind: Kind) -> tuple[Floats, Floats | None]:
    method, baseline = measure(seeds)
    method = _real("method", method)
    baseline = None if baseline is None else _real("baseline", baseline)
    for name, arm in (("method", method), ("baseline", baseline)):
        if kind != "exact" and arm is not None and arm.shape[:1] != (len(seeds),):
            raise ValueError(f"{name}: expected one row per seed, {len(seeds)} in all, got shape {arm.shape}")
    return method, baseline


def _real(name: str, values: ArrayLike) -> Floats:
    if np.iscomplexobj(values):  # numpy would drop the imaginary part
        raise ValueError(f"{name}: expected real numbers, got complex ones")
    return np.asarray(values, dtype=np.float64)


def _arms(
    kind: Kind, method: ArrayLike, baseline: ArrayLike | None, levels: Sequence[float] | None
) -> tuple[Floats, Floats]:
    method = _real("method", method)
    if baseline is None and kind not in ("trend", "exact"):
        raise ValueError(f"baseline: expected one value per seed for kind {kind!r}, got None")
    baseline = np.zeros_like(method) if baseline is None else _real("baseline", baseline)
    if kind == "exact":
        if not method.size:
            raise ValueError(f"method: expected at least one value, got shape {method.shape}")
    elif not method.ndim or method.shape[1:] != (() if levels is None else (len(levels),)) or len(method) < 3:
        expected = "(S,)" if levels is None else f"(S, {len(levels)})"
        raise ValueError(f"method: expected {expected}, S >= 3 seeds, for kind {kind!r}, got {method.shape}")
    if baseline.shape != method.shape:
        raise ValueError(f"baseline: expected the method's shape {method.shape}, got {baseline.shape}")
    return method, baseline


def _inside(effects: Floats, floor: float, ceiling: float, rounding: float) -> Verdict:
    """Does the mean of `effects` (S,) surely lie in (floor, ceiling)?"""
    n = len(effects)
    mean = effects.mean()
    squares = (effects - mean) ** 2
    half = stdtrit(n - 1, 1 - CHANCE / 2) * np.sqrt(squares.sum() / (n * (n - 1)))
    low, high = mean - half, mean + half

    outcome: Outcome = "inconclusive"
    note = ""
    if not np.isfinite(effects).all():
        note = f"irregular: {np.sum(~np.isfinite(effects))} of {n} seeds not finite"
    elif np.ptp(effects) <= rounding:
        note = "irregular: zero variance"
    elif squares.max() > squares.sum() / 2:
        share = squares.max() / squares.sum()
        note = f"irregular: seed {squares.argmax()} has {share:.0%} of the sum of squares"
    elif floor < low and high < ceiling:
        outcome = "holds"
    elif high < floor or low > ceiling:
        outcome = "does not hold"
        if ceiling == np.inf:  # equality has no direction
            note = "reverses" if high < 0 else "positive but below margin" if low > 0 else ""
    return Verdict(outcome, note, _number(mean), _number(low), _number(high), n)


def _as_ratio(logs: Verdict, sign: float) -> Verdict:
    ends = (logs.low, logs.high) if sign > 0 else (logs.high, logs.low)
    effect, low, high = (None if x is None else _number(np.exp(sign * x)) for x in (logs.effect, *ends))
    return replace(logs, effect=effect, low=low, high=high)


def _trend(gain: Floats, levels: Floats, margin: float, rounding: float, monotone: bool) -> Verdict:
    centred = levels - levels.mean()
    slope = gain @ centred / (centred @ centred)
    verdict = _inside(slope * (levels[-1] - levels[0]), margin, np.inf, rounding)
    if monotone:
        order = ("does not hold", "inconclusive", "holds").index
        steps = [_inside(step, -margin, np.inf, rounding) for step in np.diff(gain).T]
        worst = min(range(len(steps)), key=lambda i: order(steps[i].outcome))
        if order(steps[worst].outcome) < order(verdict.outcome):
            why = steps[worst].note or steps[worst].outcome
            note = f"not monotone: from level {levels[worst]:g} to {levels[worst + 1]:g} {why}"
            verdict = replace(verdict, outcome=steps[worst].outcome, note=note)
    return verdict


def _exact(deviations: Floats, tolerance: float) -> Verdict:
    worst = deviations.max()
    note = "" if np.isfinite(worst) else "irregular: not finite"
    outcome: Outcome = "holds" if worst <= tolerance else "does not hold"
    return Verdict(outcome, note, _number(worst), None, None, deviations.size)


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None
