"""The engine of survival analysis: times until an event, of which some are only known to be longer.

Everything follows from a hazard h(t), the rate of the event among those who have been spared so far, and its integral
H(t): survival S = exp(-H), quantiles by inverting H, and the log-likelihood log h(t) - H(t) of an event at t, without
the first term where the observation ended at t (right censoring). `Lifetime` is such a distribution, and
`SurvivalRegressor` fits one whose parameters are linear in the covariates, by maximum likelihood. `kaplan_meier` is the
curve that assumes nothing, and `integrated_brier_score` says how good predicted curves are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints

from lossary.uncertainty._conformal import as_array, misshapen


class Lifetime(Distribution):
    """A distribution of the time until an event, told by hazard and cumulative hazard.

    A subclass gives `log_hazard`, `cumulative_hazard` and `inverse_cumulative_hazard`, elementwise in t > 0 and the
    batch. Where H stays finite as t grows, the event never comes for a share of exp(-H(infinity)): a quantile beyond
    the others is infinite, and so are samples.
    """

    support = constraints.positive

    def log_hazard(self, value: Tensor) -> Tensor:
        """log h(t)."""
        raise NotImplementedError

    def cumulative_hazard(self, value: Tensor) -> Tensor:
        """H(t), the integral of the hazard from 0 to t."""
        raise NotImplementedError

    def inverse_cumulative_hazard(self, value: Tensor) -> Tensor:
        """The time at which H is `value`; infinity where it never is."""
        raise NotImplementedError

    def hazard(self, value: Tensor) -> Tensor:
        """h(t), per unit of time."""
        return self.log_hazard(value).exp()

    def survival(self, value: Tensor) -> Tensor:
        """S(t) = exp(-H(t)), the probability that the event comes after t."""
        return (-self.cumulative_hazard(value)).exp()

    def cdf(self, value: Tensor) -> Tensor:
        """1 - S(t)."""
        return -torch.expm1(-self.cumulative_hazard(value))

    def icdf(self, value: Tensor) -> Tensor:
        """The time by which the event has come with probability `value`, 0 to 1."""
        return self.inverse_cumulative_hazard(-torch.log1p(-value))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density log h(t) - H(t)."""
        return self.log_likelihood(value, True)

    def log_likelihood(self, value: Tensor, event: Tensor | bool) -> Tensor:
        """log h(t) - H(t) where the event came at t, -H(t) where observation ended there; in nats."""
        happened = torch.as_tensor(event, dtype=torch.bool, device=value.device)
        return torch.where(happened, self.log_hazard(value), 0) - self.cumulative_hazard(value)

    def sample(self, sample_shape: Sequence[int] = torch.Size(), *, generator: Generator | None = None) -> Tensor:
        """Draw times, (*sample_shape, *batch); `generator` None is torch's global one."""
        shape = self._extended_shape(torch.Size(sample_shape))
        like: Tensor = getattr(self, next(iter(self.arg_constraints)))
        with torch.no_grad():
            uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
            return self.icdf(uniform)


def as_times(name: str, time: Any, *, above: float | None = None) -> NDArray[np.float64]:
    """Times of any shape in float64.

    Raises:
        ValueError: not numbers, NaN or infinite, below 0 or not above `above`.
    """
    times = as_array(name, time).astype(np.float64)
    if not np.isfinite(times).all():
        raise ValueError(f"{name}: contains NaN or infinite values")
    fine = times >= 0 if above is None else times > above
    if not fine.all():
        wanted = ">= 0" if above is None else f"> {above:g}"
        raise ValueError(f"{name}: expected finite numbers {wanted}, got {times[~fine][0]:g}")
    return times


def observations(time: Any, event: Any, *, above: float | None = None) -> tuple[NDArray, NDArray]:
    """Times (N,) in float64 and whether the event came then (N,) as booleans; `event` None is always.

    Raises:
        ValueError: other shapes, NaN or infinite times, times below 0 or not above `above`, events other than 0 and 1.
    """
    times = as_times("time", time, above=above)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"time: expected shape (N,), N >= 1, got {misshapen(times.shape)}")
    if event is None:
        return times, np.ones(len(times), dtype=bool)
    happened = as_array("event", event)
    if happened.shape != times.shape:
        raise ValueError(f"event: expected one for each of {len(times)} times, got shape {happened.shape}")
    if not ((happened == 0) | (happened == 1)).all():
        raise ValueError("event: expected 1 or True where it came, 0 or False where observation ended, got others")
    return times, happened.astype(bool)


@dataclass(frozen=True)
class KaplanMeier:
    """The product-limit curve: 1 before the first event, constant between events, right-continuous.

    Attributes:
        times: (J,) distinct times of events, increasing; empty where there was none.
        survival: (J,) from that time on.
        at_risk: (J,) how many were under observation just before it.
        events: (J,) how many had the event.
    """

    times: NDArray
    survival: NDArray
    at_risk: NDArray
    events: NDArray

    def __call__(self, t: Any, *, before: bool = False) -> NDArray:
        """S(t), or where `before` S just before t; beyond the last observation, the last value."""
        past = np.searchsorted(self.times, t, side="left" if before else "right")
        return np.concatenate([[1.0], self.survival])[past]


def kaplan_meier(time: Any, event: Any = None, *, censoring: bool = False) -> KaplanMeier:
    """S(t) = product over event times u <= t of 1 - d_u / n_u, in O(N log N).

    Args:
        time: (N,) not negative, an array or tensor.
        event: (N,) 1 where the event came, 0 where observation ended; at one time events come first.
        censoring: the curve of the end of observation instead, with those who have the event leaving before it.
    """
    times, happened = observations(time, event)
    counted = happened != censoring
    own, other = np.sort(times[counted]), np.sort(times[~counted])  # several times as fast as sorting rows
    first = np.flatnonzero(np.diff(own, prepend=-1.0))
    jumps, counts = own[first], np.diff(first, append=len(own))
    left = np.searchsorted(other, jumps, side="right" if censoring else "left")
    at_risk = len(own) - first + len(other) - left
    return KaplanMeier(jumps, np.cumprod(1 - counts / at_risk), at_risk, counts)


def integrated_brier_score(time: Any, event: Any, survival: Any, times: Any) -> float:
    """Mean over an interval of the expected (1{T > t} - S(t))^2, corrected for censoring; 0 to 1, lower is better.

    Those whose observation ended before t are left out, and the others weighed by the inverse of the chance to be
    still under observation, a Kaplan-Meier curve G of the same data: 1 / G(t) for those beyond t, 1 / G(T-) for an
    event at T <= t (Graf and others, 1999). Trapezoids between the `times`.

    Args:
        time: (N,).
        event: (N,) 1 where the event came, 0 where observation ended.
        survival: (N, J) predicted S(t) for each person at each time.
        times: (J,) increasing, J >= 2, before the end of all observation.

    Raises:
        ValueError: wrong shapes, probabilities outside 0 to 1, times at which nobody is under observation any more.
    """
    t, happened = observations(time, event)
    grid, predicted = as_array("times", times).astype(np.float64), as_array("survival", survival)
    if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) > 0).all():
        raise ValueError(f"times: expected at least two increasing numbers, got shape {grid.shape}")
    if predicted.shape != (len(t), len(grid)) or not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError(f"survival: expected probabilities {(len(t), len(grid))}, got shape {predicted.shape}")
    observed = kaplan_meier(t, happened, censoring=True)
    still = observed(grid)
    if not grid[-1] < t.max() or not still[-1] > 0:
        raise ValueError(f"times: expected all below {t.max():g}, where observation ends, got {grid[-1]:g}")
    beyond, own = t[:, None] > grid, np.where(happened, observed(t, before=True), 1.0)
    squares = beyond * (1 - predicted) ** 2 / still + (~beyond * happened[:, None]) * predicted**2 / own[:, None]
    return float(np.trapezoid(squares.mean(0), grid) / (grid[-1] - grid[0]))


class SurvivalRegressor(BaseEstimator):
    """Maximum likelihood for a lifetime whose parameters are linear in the covariates, each on a scale of its own.

    A subclass says which parameters there are, which depend on covariates, where to begin, and what they make:
    `_start(time, event, d)` says where to begin, by parameter (1,) or, where it depends on the d covariates, (1 + d,)
    with the intercept first. `_lifetime(eta)` turns linear predictors (N,) by name into a `Lifetime`.

    Newton steps in a trust region, with second derivatives by row and parameter, so that a step costs
    O(N coefficients^2). Covariates are standardised within; a constant one gets the coefficient 0.

    Attributes:
        intercept_, coef_: by parameter, a number and (d,), on the linear scale; parameters without covariates have no
            `coef_`.
        log_likelihood_: its maximum, summed over rows, in nats.
        n_parameters_: estimated.
    """

    def fit(self, X: Any, time: Any, event: Any = None) -> Self:
        """Fit rows (N, d) with times (N,) above 0; `event` (N,) is 1 where it came, 0 where observation ended.

        Raises:
            ValueError: wrong shapes, NaN, times that are not above 0, no event at all.
        """
        rows = validate_data(self, X, dtype=np.float64)
        t, happened = observations(time, event, above=0.0)
        if len(t) != len(rows):
            raise ValueError(f"time: expected one for each of {len(rows)} rows, got {len(t)}")
        if not happened.any():
            raise ValueError("event: expected at least one event; with none the likelihood has no maximum")
        centre, spread = rows.mean(0), rows.std(0)
        spread = np.where(
            spread > 1e-12 * np.abs(centre), spread, np.inf
        )  # a constant becomes 0, and so its coefficient
        design = torch.from_numpy(np.column_stack([np.ones(len(rows)), (rows - centre) / spread]))
        when, whether = torch.from_numpy(t), torch.from_numpy(happened)

        def log_likelihood(**eta: Tensor) -> Tensor:
            return self._lifetime(eta).log_likelihood(when, whether)

        start = self._start(t, happened, rows.shape[1])
        theta, self.log_likelihood_ = maximum_likelihood(log_likelihood, design, start)
        self.intercept_ = {name: float(b[0] - b[1:] @ (centre / spread)[: len(b) - 1]) for name, b in theta.items()}
        self.coef_ = {name: b[1:] / spread for name, b in theta.items() if len(b) > 1}
        self.n_parameters_ = sum(map(len, theta.values()))
        return self

    def predict_distribution(self, X: Any) -> Lifetime:
        """The lifetime of each row, a batch (N,) in float64: its `hazard`, `survival`, `icdf`, `sample`, ..."""
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=np.float64, reset=False)
        eta = {name: b + rows @ self.coef_.get(name, np.zeros(rows.shape[1])) for name, b in self.intercept_.items()}
        return self._lifetime({name: torch.from_numpy(value) for name, value in eta.items()})

    def predict_survival(self, X: Any, times: Any) -> NDArray:
        """S(t) of each row at times (J,), not negative: (N, J)."""
        grid, _ = observations(times, None)
        batch = self.predict_distribution(X)
        return batch.survival(torch.from_numpy(grid)[:, None]).numpy().T

    def predict_quantile(self, X: Any, q: float | Sequence[float] = 0.5) -> NDArray:
        """The time by which the event has come with probability q, (N,), or (N, J) for several; infinite if never."""
        share = np.asarray(q, dtype=np.float64)
        if share.ndim > 1 or not ((share > 0) & (share < 1)).all():
            raise ValueError(f"q: expected a probability between 0 and 1, or several, got {q!r}")
        batch = self.predict_distribution(X)
        return batch.icdf(torch.from_numpy(np.atleast_1d(share))[:, None]).numpy().T.reshape(-1, *share.shape)

    def predict(self, X: Any) -> NDArray:
        """Median times (N,)."""
        return self.predict_quantile(X, 0.5)

    def score(self, X: Any, time: Any, event: Any = None) -> float:
        """Mean log-likelihood of rows, in nats; higher is better."""
        t, happened = observations(time, event, above=0.0)
        check_consistent_length(X, t)
        batch = self.predict_distribution(X)
        return float(batch.log_likelihood(torch.from_numpy(t), torch.from_numpy(happened)).mean())

    def _start(self, time: NDArray, event: NDArray, features: int) -> dict[str, NDArray]:
        raise NotImplementedError

    def _lifetime(self, eta: dict[str, Tensor]) -> Lifetime:
        raise NotImplementedError


def maximum_likelihood(
    log_likelihood: Callable[..., Tensor], design: Tensor, start: dict[str, NDArray]
) -> tuple[dict[str, NDArray], float]:
    """Coefficients that maximise a sum over rows, and that maximum; a local one, near the start.

    Args:
        log_likelihood: called with one linear predictor (N,) for each parameter, by name; gives (N,).
        design: (N, 1 + d), ones first.
        start: by parameter (1,), for an intercept alone, or (1 + d,).
    """
    widths = [len(b) for b in start.values()]
    ends = np.cumsum(widths)[:-1]

    @cache  # value and gradient are asked for at one point, the Hessian at the same if the step is taken
    def at(point: bytes) -> tuple[float, NDArray, NDArray]:
        """Value, gradient and Hessian of minus the mean."""
        parts = np.split(np.frombuffer(point), ends)
        eta = [(design[:, : len(b)] @ torch.from_numpy(b.copy())).requires_grad_() for b in parts]
        with torch.enable_grad():
            values = -log_likelihood(**dict(zip(start, eta))) / len(design)
            slopes = torch.autograd.grad(values.sum(), eta, create_graph=True)
            blocks = []
            for slope, width in zip(slopes, widths):
                curves = torch.autograd.grad(slope.sum(), eta, retain_graph=True, materialize_grads=True)
                left = design[:, :width].mT
                blocks.append(torch.cat([left @ (c[:, None] * design[:, :w]) for c, w in zip(curves, widths)], 1))
            gradient = torch.cat([design[:, :w].mT @ slope for slope, w in zip(slopes, widths)])
        found = values.sum().item(), gradient.detach().numpy(), torch.cat(blocks).detach().numpy()
        if all(np.isfinite(part).all() for part in found):
            return found
        return np.inf, np.zeros(sum(widths)), np.eye(sum(widths))  # too far: the step will be taken back

    with np.errstate(over="ignore", invalid="ignore"):  # on steps that will be taken back
        found = minimize(
            lambda b: at(b.tobytes())[0],
            np.concatenate(list(start.values())),
            jac=lambda b: at(b.tobytes())[1],
            hess=lambda b: at(b.tobytes())[2],
            method="trust-exact",
            options={"gtol": 1e-9, "maxiter": 200},
        )
    return dict(zip(start, np.split(found.x, ends))), -found.fun * len(design)
