"""The statistics of a comparison: intervals over cells, intervals over locked rows, Holm, and futility.

Two kinds of interval, both two-sided at 95%, of a lead that is positive where the arm is better:

- Over cells (partition, fold), on rows that chose the arms, so exploratory. Cells share training rows, which the
  plain t interval ignores: it rejects true nulls about half of the time. Nadeau and Bengio's correction,
  SE^2 = s_d^2 (1/J + n_test/n_train), t with J - 1 degrees of freedom, rejects them 1.5 to 5.5% of the time.
- Over locked rows, once, which the final sentence rests on: SE^2 = variance over rows + variance over seeds.

All p-values are two-sided, so that p < 0.05 says just what an interval without 0 says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from lossary.compare.metrics import Metric
from lossary.compare.result import Interval

Floats = NDArray[np.float64]

DETECTABLE = 2.8  # SEs: a true lead of that size leaves the interval above 0 four times in five
RESAMPLES = 1000
FEWEST_ROWS, FEWEST_OF_CLASS = 100, 10


@dataclass(frozen=True)
class Estimate:
    """A difference with its standard error and degrees of freedom."""

    difference: float
    error: float
    freedom: float

    @property
    def interval(self) -> Interval:
        """Two-sided, 95%."""
        half = float(stdtrit(self.freedom, 0.975)) * self.error if self.error else 0.0
        return Interval(self.difference, self.difference - half, self.difference + half)

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if not self.error:
            return 1.0 if self.difference == 0 else 0.0
        return float(2 * stdtr(self.freedom, -abs(self.difference) / self.error))

    @property
    def detectable(self) -> float:
        """The smallest true difference that would most likely have been seen."""
        return DETECTABLE * self.error


def over_cells(lead: Floats, ratio: float) -> Estimate:
    """The lead over J cells, each averaged over its seeds: SE^2 = s^2 (1/J + ratio), J - 1 degrees of freedom.

    Args:
        lead: (J,), J >= 2; cells in which the metric is not defined, NaN, do not count.
        ratio: rows of a test fold over rows of its training part.
    """
    lead = lead[np.isfinite(lead)]
    count = len(lead)
    if count < 2:
        return Estimate(float(lead.mean()) if count else 0.0, float("inf"), 1.0)
    return Estimate(float(lead.mean()), float(lead.std(ddof=1) * np.sqrt(1 / count + ratio)), count - 1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for all of them together: the chance of any false rejection stays below the level."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - place) * p[name]))
        adjusted[name] = largest
    return adjusted


def over_rows(
    metric: Metric,
    first: Floats,
    second: Floats,
    target: NDArray,
    units: NDArray[np.int64],
    rng: np.random.Generator,
    weight: Floats | None = None,
) -> Estimate:
    """The lead of the first arm's predictions over the second's on rows that neither was trained on.

    A metric that is a mean over rows: SE^2 = s_z^2 / n + s_seed^2 / S, where z is the difference in each row, averaged
    over seeds, and s_seed the deviation of the S seeds' own differences. Rows of one unit (group, exact copies) are
    summed before the variance is taken; for a mean of class means, s_z^2 is taken within classes. Degrees of freedom
    by Welch and Satterthwaite. Another metric: the deviation over `RESAMPLES` joint bootstrap samples of units and
    seeds. Either way what a row does under one seed only is counted more than once, which errs on the wide side.

    Args:
        metric: which; its sign makes a positive lead good.
        first, second: predictions (S, n, ...); one that has no seeds, S = 1, goes with each seed of the other.
        target: (n,), or (n, labels).
        units: (n,), a number per row that those share which are not independent.
        rng: for the bootstrap.
        weight: (n,) what each row counts; None is 1.
    """
    units = np.unique(units, return_inverse=True)[1]
    if metric.rows is None:
        return _bootstrapped(metric, first, second, target, units, rng, weight)
    lead = metric.sign * (metric.rows(first, target) - metric.rows(second, target))  # (S, n)
    share = metric.shares(target, weight)
    by_seed = lead @ share
    seeds = len(by_seed)
    parts = [(float(by_seed.var(ddof=1)) / seeds, seeds - 1)] if seeds > 1 else []

    row, influence = lead.mean(0), np.zeros(len(target))
    for stratum in np.unique(target) if metric.balanced else (None,):
        member = np.ones(len(target), dtype=bool) if stratum is None else target == stratum
        count = len(np.unique(units[member]))
        mean = np.average(row[member], weights=share[member] if share[member].any() else None)
        own = share[member] * (row[member] - mean)
        influence[member] = own * np.sqrt(count / max(count - 1, 1))
        parts.append((float((influence[member] ** 2).sum()), max(count - 1, 1)))
    variance = float((np.bincount(units, influence) ** 2).sum()) + (parts[0][0] if seeds > 1 else 0.0)
    spread = sum(part**2 / freedom for part, freedom in parts)
    freedom = sum(part for part, _ in parts) ** 2 / spread if spread else len(target) - 1
    return Estimate(float(by_seed.mean()), float(np.sqrt(variance)), freedom)


def too_few(target: NDArray, task: str, classes: Sequence[str]) -> str:
    """Why so few locked rows confirm nothing, or nothing where they are enough."""
    if len(target) < FEWEST_ROWS:
        return f"only {len(target)} rows were locked, at least {FEWEST_ROWS} are needed"
    if task == "real":
        return ""
    if task == "multilabel":
        counts, what = target.sum(0), "label"
    else:
        counts, what = np.bincount(target, minlength=len(classes)), "level" if task == "ordinal" else "class"
    if counts.min() < FEWEST_OF_CLASS:
        return (
            f"the rarest {what}, {classes[counts.argmin()]!r}, has only {counts.min()} locked rows, at least "
            f"{FEWEST_OF_CLASS} are needed"
        )
    return ""


def _bootstrapped(
    metric: Metric,
    first: Floats,
    second: Floats,
    target: NDArray,
    units: NDArray,
    rng: np.random.Generator,
    weight: Floats | None,
) -> Estimate:
    seeds, count = max(len(first), len(second)), int(units.max()) + 1
    leads = []
    for start in range(0, RESAMPLES, 50):  # in pieces, which keeps the memory small
        chance = np.full(count, 1 / count)
        weights = rng.multinomial(count, chance, size=min(50, RESAMPLES - start))[:, units].astype(float)
        if weight is not None:
            weights = weights * weight
        one, other = (np.array([metric.weighted(p, target, weights) for p in arm]) for arm in (first, second))
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=weights.shape[0]).T / seeds
        leads.append((metric.sign * (one - other) * drawn).sum(0) if seeds > 1 else metric.sign * (one - other)[0])
    scores = [metric.score(arm, target, weight) for arm in (first, second)]
    lead = float(np.nanmean(metric.sign * (scores[0] - scores[1])))
    return Estimate(lead, float(np.nanstd(np.concatenate(leads), ddof=1)), count - 1)
