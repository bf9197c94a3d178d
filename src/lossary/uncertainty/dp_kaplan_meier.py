"""Private Kaplan-Meier curves: noise that falls along the curve, as published, and counts with noise, as it should be.

The paper adds Laplace noise to the survival curve itself, less of it the later the time, then keeps the curve between 0
and its last value and smooths it. Its abstract is all that could be had: the noise scale here is a stand-in of the form
it describes. Such a release is not differentially private at its epsilon. What the accounting leaves out: every time of
the curve is one more release of the same records, and their losses add up; one record moves the curve more, not less,
as fewer remain at risk; and the times of the events are published as they are. `audited_privacy_loss` says how much is
really lost on given data. The default mechanism needs no such excuse: it counts events and ends of observation within
intervals fixed beforehand, adds noise to each count, of which one record touches one, and computes the curve from
these. Take that one. It wants a few hundred people, and an epsilon of about 1 or more.
"""

import math
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from lossary import require
from lossary.paper import Paper
from lossary.uncertainty._survival import as_times, kaplan_meier, observations

PAPER = Paper(
    title="A Differentially Private Kaplan-Meier Estimator for Privacy-Preserving Survival Analysis",
    year=2024,
    helps=("uncertainty",),
    url="https://arxiv.org/html/2412.05164",
    departs=(
        "known from its abstract: noise scale, clipping and smoothing are a stand-in of the form described there",
        "noise on counts is ours, as the baseline that keeps its promise",
        "the membership attack compares whole curves; the paper's thresholds are left to the caller",
    ),
    equation=(
        r"\begin{aligned} "
        r"\text{paper: }\ \tilde S_j&=\min\Bigl(\tilde S_{j-1},\, "
        r"\max\bigl(0,\;S_j+\tfrac{\eta_j}{\varepsilon\,(j+1)}\bigr)\Bigr),\qquad "
        r"\eta_j\sim\operatorname{Laplace}(1),\quad\text{then smoothed}\\ "
        r"\text{counts: }\ \tilde S_k&=\prod_{l\le k}\bigl(1-\tilde d_l/\tilde n_l\bigr),\qquad "
        r"\tilde d_l=\max(0,\,d_l+\zeta_l),\quad P(\zeta)\propto e^{-\varepsilon|\zeta|},\quad "
        r"\tilde n_l\text{ from such counts} "
        r"\end{aligned}"
    ),
)


class DPKaplanMeierFitter(BaseEstimator):
    """A survival curve for publication; `fit(time, event, generator=...)`, then `survival_function_` or `predict`.

    mechanism "counts" is epsilon-differentially private for adding or removing one record (twice epsilon for changing
    one): events and ends of observation are counted within (grid[k-1], grid[k]] and beyond the last; each count gets
    the noise of a difference of two geometric variables, P(k) proportional to exp(-epsilon |k|), and is cut at 0; the
    curve is the product of 1 - d / n at the grid's times, linear between. Only `grid` must not come from the data.

    mechanism "time-indexed" is the paper's, `time_indexed_laplace` at the times of the events. It is not
    differentially private at this epsilon: see `audited_privacy_loss`.

    Args:
        epsilon: privacy budget, above 0; infinity adds no noise.
        mechanism: "counts" or "time-indexed".
        grid: increasing times above 0 up to the end of follow-up, known without looking at the data; for "counts".
        schedule, clip, window: of `time_indexed_laplace`, for "time-indexed".

    Attributes:
        times_: (J,) where the curve is given.
        survival_: (J,) its values, not increasing unless `clip` is off.

    Raises:
        ValueError: a parameter out of range, wrong shapes, negative or NaN times; asked before `fit` (scikit-learn's
            NotFittedError).

    >>> fitter = DPKaplanMeierFitter(epsilon=math.inf, grid=[1.0, 2.0, 3.0])
    >>> fitter.fit([0.5, 1.5, 1.7, 2.5], [1, 1, 0, 1], generator=np.random.default_rng(0)).predict([1.0, 1.5, 2.0])
    array([0.75 , 0.625, 0.5  ])
    """

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        mechanism: str = "counts",
        grid: Any = None,
        schedule: str = "index",
        clip: bool = True,
        window: int = 3,
    ) -> None:
        self.epsilon, self.mechanism, self.grid = epsilon, mechanism, grid
        self.schedule, self.clip, self.window = schedule, clip, window

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, False
        return tags

    def fit(self, time: Any, event: Any = None, *, generator: Generator) -> Self:
        """Release the curve of times (N,); `event` (N,) is 1 where it came, 0 where observation ended. Once only.

        Noise comes from `generator`. Each fit on the same people spends epsilon anew.
        """
        require.one_of("mechanism", self.mechanism, ("counts", "time-indexed"))
        _budget(self.epsilon)
        if self.mechanism == "counts":
            self.times_ = _grid(self.grid)
            self.survival_ = _from_counts(*observations(time, event), self.times_, self.epsilon, generator)
            return self
        curve = kaplan_meier(time, event)
        self.times_, self.survival_ = curve.times, curve.survival
        if len(curve.times):
            self.survival_ = time_indexed_laplace(
                curve.survival,
                curve.at_risk,
                epsilon=self.epsilon,
                schedule=self.schedule,
                clip=self.clip,
                window=self.window,
                generator=generator,
            )
        return self

    def predict(self, times: Any) -> NDArray:
        """Survival at times, not negative, of any shape."""
        check_is_fitted(self)
        asked = as_times("times", times)
        if self.mechanism == "counts":
            return np.interp(asked, np.r_[0.0, self.times_], np.r_[1.0, self.survival_])
        return np.r_[1.0, self.survival_][np.searchsorted(self.times_, asked, side="right")]

    @property
    def survival_function_(self) -> Any:
        """The curve as lifelines gives it, a pandas DataFrame with the times, from 0, as its index."""
        check_is_fitted(self)
        import pandas as pd

        timeline = pd.Index(np.r_[0.0, self.times_], name="timeline")
        return pd.DataFrame({"KM_estimate": np.r_[1.0, self.survival_]}, index=timeline)


def time_indexed_laplace(
    survival: Float[NDArray, " times"],
    at_risk: Float[NDArray, " times"],
    *,
    epsilon: float,
    schedule: str = "index",
    clip: bool = True,
    window: int = 3,
    generator: Generator,
) -> Float[NDArray, " times"]:
    """The curve plus Laplace noise of scale D_j / epsilon at its j-th time, j = 1, 2, ..., clipped and smoothed.

    A stand-in for the paper's algorithm, of which only the form is known. It is not epsilon-differentially private:
    D_j falls along the curve although a record's effect does not, and the releases of all times compose.

    Args:
        survival: a Kaplan-Meier curve at its times.
        at_risk: how many were at risk just before each.
        epsilon: nominal budget, above 0; infinity adds no noise.
        schedule: D_j: "index", 1 / (j + 1), or "risk", the share n_j / n_1 still at risk.
        clip: whether values are kept between 0 and the value before.
        window: odd width of a centred moving average, cut off at the ends; 1 is none.
        generator: of the noise.

    Raises:
        ValueError: shapes that differ, a parameter out of range.

    >>> curve, at_risk = np.array([0.9, 0.6, 0.3]), np.array([10, 7, 4])
    >>> time_indexed_laplace(curve, at_risk, epsilon=math.inf, generator=np.random.default_rng(0))
    array([0.75, 0.6 , 0.45])
    """
    _budget(epsilon)
    require.one_of("clip", clip, (False, True))
    require.whole("window", window, at_least=1)
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    released = survival + generator.laplace(size=np.shape(survival)) * _scale(survival, at_risk, schedule) / epsilon
    if clip:  # clip(x_j, 0, r_{j-1}) for all j at once
        released = np.minimum.accumulate(released.clip(0.0, 1.0))
    ones = np.ones(window)
    summed, counted = (np.convolve(part, ones)[window // 2 :][: len(part)] for part in (released, 0 * released + 1))
    return summed / counted


def audited_privacy_loss(time: Any, event: Any = None, *, epsilon: float, schedule: str = "index") -> float:
    """What `time_indexed_laplace` really loses on these data, to be held against the epsilon it was asked for.

    The largest over all records i of sum_j |S_j - S_j(without i)| epsilon / D_j, the logarithm of how much likelier
    some released curve is with the record than without, or the other way round. Clipping does not lower it, since a
    noisy curve that decreases passes unchanged, nor does a moving average that can be undone. It speaks of these data;
    others may lose more. Publishing the times of the events, which this leaves out, loses more still: whoever has one
    to himself is surely there.

    Args:
        time: (N,) not negative.
        event: (N,) 1 where the event came, 0 where observation ended.
        epsilon: nominal, above 0.
        schedule: as in `time_indexed_laplace`.

    Raises:
        ValueError: wrong shapes, a parameter out of range.

    >>> audited_privacy_loss([1.0, 2.0], epsilon=1.0)  # S is 1/2, 0; without the first 1, 0; without the second 0, 0
    1.0
    """
    require.number("epsilon", epsilon, above=0.0)
    times, happened = observations(time, event)
    curve = kaplan_meier(times, happened)
    if not len(curve.times):
        return 0.0
    there = times[:, None] >= curve.times
    left = curve.at_risk - there
    events = curve.events - (times[:, None] == curve.times) * happened[:, None]
    without = np.cumprod(1 - events / left.clip(min=1), axis=1)
    moved = np.abs(without - curve.survival) * epsilon / _scale(curve.survival, curve.at_risk, schedule)
    return float(moved.sum(1).max())


def membership_inference_survival(
    fitter: DPKaplanMeierFitter, time: Any, event: Any = None, *, times: Any, generator: Generator
) -> Float[NDArray, " rows"]:
    """How far the released curve moves when a record is left out, for each: the largest difference, (N,), 0 to 1.

    The paper's attack: records that move it by more than a threshold count as influential. Every release has noise of
    its own, so the number falls as epsilon grows, because there is less noise to take for influence, and is least
    where there is no privacy at all. It says how noisy the curve is, not how safe a member is.

    Args:
        fitter: with `fit(time, event, generator=)` and `predict(times)`; left as it is.
        time: (N,) not negative, N >= 2.
        event: (N,) 1 where the event came, 0 where observation ended.
        times: (J,) at which the curves are compared.
        generator: of the noise of all N + 1 releases.

    Raises:
        ValueError: wrong shapes, fewer than two records.

    >>> fitter = DPKaplanMeierFitter(epsilon=math.inf, grid=[1.0, 2.0])
    >>> membership_inference_survival(
    ...     fitter, [0.5, 1.5, 1.7], [1, 1, 0], times=[1.0, 2.0], generator=np.random.default_rng(0)
    ... ).round(3)
    array([0.333, 0.167, 0.333])
    """
    t, happened = observations(time, event)
    if len(t) < 2:
        raise ValueError(f"time: expected at least two records, got {len(t)}")

    def curve(rows: NDArray) -> NDArray:
        return clone(fitter).fit(t[rows], happened[rows], generator=generator).predict(times)

    whole, everyone = curve(np.arange(len(t))), np.arange(len(t))
    return np.array([np.abs(curve(np.delete(everyone, i)) - whole).max() for i in range(len(t))])


def _from_counts(time: NDArray, event: NDArray, grid: NDArray, epsilon: float, generator: Generator) -> NDArray:
    cell, end = (
        np.searchsorted(grid, time),
        len(grid),
    )  # (grid[k-1], grid[k]]; the last is beyond, whatever became of it
    counts = np.bincount(np.where(event & (cell < end), cell, end + cell), minlength=2 * end + 1)
    up, down = generator.geometric(-math.expm1(-epsilon), size=(2, len(counts)))  # both 1 where epsilon is infinite
    counts = (counts + up - down).clip(min=0)
    events, ends = np.append(counts[:end], 0), counts[end:]
    at_risk = (events + ends)[::-1].cumsum()[::-1]
    return np.cumprod(1 - events / at_risk.clip(min=1))[:-1]


def _scale(survival: NDArray, at_risk: NDArray, schedule: str) -> NDArray:
    require.one_of("schedule", schedule, ("index", "risk"))
    if np.ndim(survival) != 1 or not np.size(survival) or np.shape(at_risk) != np.shape(survival):
        raise ValueError(f"at_risk: expected the curve's shape {np.shape(survival)}, (J,), got {np.shape(at_risk)}")
    return 1 / np.arange(2, len(survival) + 2) if schedule == "index" else at_risk / at_risk[0]


def _grid(grid: Any) -> NDArray:
    found = np.asarray(grid, dtype=np.float64)
    if found.ndim != 1 or not found.size or not (np.diff(found, prepend=0.0) > 0).all() or not np.isfinite(found).all():
        raise ValueError(f"grid: expected increasing times above 0, fixed without looking at the data, got {grid!r}")
    return found


def _budget(epsilon: float) -> None:
    if epsilon != math.inf:
        require.number("epsilon", epsilon, above=0.0)
