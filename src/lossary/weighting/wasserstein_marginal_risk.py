"""Marginal problems under model risk: what two distributions, known only roughly and apart, say about the two together.

Two quantities are never seen together: a patient's outcome with and without treatment, the losses of two portfolios
in a crisis. Makarov's bounds hold for the distribution of their sum whatever their dependence, if both marginals are
right. Here each marginal may lie anywhere within a Wasserstein ball around the observed one, as after a shift of
population or with few rows, and the bounds widen accordingly; for any other payoff the same worst case is computed.

Use it where a statement must survive both an unknown dependence and marginals that are a little off. The price is
width: already Makarov's bounds are wide. For the difference of two quantities pass the second with its sign changed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Quantifying Distributional Model Risk in Marginal Problems via Optimal Transport",
    year=2023,
    helps=("uncertainty", "train-test-shift"),
    departs=(
        "the formulas are derived here and checked against primal linear programs; the full text was not reachable",
        "marginals are samples of equally likely points, and the second half of the paper, marginals that overlap in a"
        " covariate, is left out",
        "for a general payoff mass may move to a finite set of places",
    ),
    equation=(
        r"P(S_1+S_2\le z)\ \le\ \min_{\kappa\ge0}\Bigl\{\kappa\,(r_1+r_2)^p "
        r"+\max_{\pi}\,\mathbb E_\pi\max\bigl(0,\;1-\kappa\,(S_1+S_2-z)_+^p\bigr)\Bigr\},\quad "
        r"\pi:\ \text{couplings}"
    ),
    url="https://arxiv.org/abs/2307.00779",
)

Array = Any  # whatever numpy turns into an array
_ROUNDING = 1e-9  # of probabilities and payoffs
_CUTS = 500  # at most; the least upper bound so far is then returned


def makarov_bounds(first: Array, second: Array, z: Array) -> tuple[NDArray, NDArray]:
    """Sharp bounds on P(S1 + S2 <= z) for given marginals and any dependence.

    Lower: max(0, sup_x F1(x) + F2(z - x) - 1); upper: 1 + min(0, inf_x F1(x-) + F2(z - x) - 1), both at the points
    of the first sample, which is where they are attained.

    Args:
        first: (n,) equally likely points of S1.
        second: (m,) of S2.
        z: thresholds, of any shape.

    Returns:
        lower and upper, of the shape of z, 0 to 1.

    Raises:
        ValueError: samples that are not one or more finite numbers in a row, thresholds that are not finite.

    >>> makarov_bounds([0.0, 1.0], [0.0, 1.0], [-0.5, 0.0, 1.0, 2.0])
    (array([0. , 0. , 0.5, 1. ]), array([0. , 0.5, 1. , 1. ]))
    """
    s1, s2, at = np.sort(_sample("first", first)), np.sort(_sample("second", second)), _thresholds(z)
    below = np.searchsorted(s2, at[..., None] - s1, side="right") / len(s2)
    up_to, before = (np.searchsorted(s1, s1, side=side) / len(s1) for side in ("right", "left"))
    lower, upper = (up_to + below - 1).max(-1), (before + below).min(-1)
    return lower.clip(min=0), upper.clip(max=1)


def wasserstein_makarov_bounds(
    first: Array, second: Array, z: Array, *, radius: float | tuple[float, float], order: float = 1.0
) -> tuple[NDArray, NDArray]:
    """Bounds on P(S1 + S2 <= z) if each marginal is only known to be near its sample, in Wasserstein distance.

    The upper bound is the minimum over kappa >= 0 of kappa (r1 + r2)^p plus the largest mean, over couplings of the
    samples, of max(0, 1 - kappa D^p) with D = max(s1 + s2 - z, 0), which is what a pair would have to be moved. This
    is the strong dual with its two multipliers minimised in closed form: of the radii only their sum counts. The
    lower bound is 1 minus the same with D = max(z - s1 - s2, 0). With radius 0 they are `makarov_bounds`; as the
    radius falls to 0, the lower bound tends to that on P(S1 + S2 < z), which is lower where sums tie with z.

    Args:
        first: (n,) equally likely points.
        second: (m,); with m = n a bound is a dozen assignment problems, otherwise as many linear programs.
        z: thresholds, of any shape.
        radius: r >= 0 in units of the points, one for both marginals or (r1, r2).
        order: p >= 1 of the distance.

    Returns:
        lower and upper, of the shape of z, 0 to 1.

    Raises:
        ValueError: as `makarov_bounds`, a radius below 0, an order below 1.

    >>> wasserstein_makarov_bounds([0.0, 1.0], [0.0, 1.0], [-0.5, 1.5], radius=0.1)
    (array([0. , 0.3]), array([0.4, 1. ]))
    """
    total = sum(_radii(radius))
    require.number("order", order, at_least=1.0)
    lower, upper = (np.array(bound) for bound in makarov_bounds(first, second, z))
    if total == 0:
        return lower, upper
    beyond = np.add.outer(_sample("first", first), _sample("second", second)) - _thresholds(z)[..., None, None]
    for place in np.ndindex(upper.shape):
        upper[place] = _reached(beyond[place].clip(min=0) ** order, total**order)
        lower[place] = 1 - _reached((-beyond[place]).clip(min=0) ** order, total**order)
    return lower, upper


def marginal_model_risk(
    payoff: Callable[[NDArray, NDArray], NDArray],
    first: Array,
    second: Array,
    *,
    support: tuple[Array, Array],
    radius: float | tuple[float, float],
    order: float = 1.0,
) -> float:
    """The largest mean payoff E f(S1, S2) over all laws whose marginals are near the samples.

    Minimises the dual lambda_1 r1^p + lambda_2 r2^p + sup over couplings of E f_lambda, where f_lambda(s1, s2) is the
    largest f(a, b) - lambda_1 |s1 - a|^p - lambda_2 |s2 - b|^p over the places (a, b) to which mass may move, by
    cutting planes. For the smallest mean take minus the payoff.

    Args:
        payoff: payoff(a, b) of arrays that broadcast, finite.
        first: (n,) equally likely points.
        second: (m,).
        support: (places of S1, places of S2) to which mass may move, besides the points themselves; the finer, the
            nearer is the result, from below, to that of the whole line.
        radius: r >= 0, one for both marginals or (r1, r2).
        order: p >= 1 of the distance.

    Raises:
        ValueError: as `wasserstein_makarov_bounds`, or a payoff that is not finite.

    >>> both_large = lambda a, b: np.minimum(a, b)
    >>> marginal_model_risk(both_large, [0.0, 2.0], [1.0, 3.0], support=([], []), radius=0.0)  # (0, 1) and (2, 3)
    1.0
    >>> round(marginal_model_risk(both_large, [0.0, 2.0], [1.0, 3.0], support=([0.5, 2.5], []), radius=(0.25, 0.0)), 6)
    1.25
    """
    from scipy.optimize import linprog

    points = _sample("first", first), _sample("second", second)
    radii = np.array(_radii(radius))
    require.number("order", order, at_least=1.0)
    places = [np.unique(np.concatenate([s, np.ravel(more)])) for s, more in zip(points, support)]
    gains = np.asarray(payoff(places[0][:, None], places[1][None, :]), dtype=np.float64)
    if gains.shape != (len(places[0]), len(places[1])) or not np.isfinite(gains).all():
        raise ValueError(f"payoff: expected finite numbers that broadcast, got shape {gains.shape}")
    costs = [np.abs(np.subtract.outer(s, a)) ** order for s, a in zip(points, places)]
    for cost in (cost for cost, r in zip(costs, radii) if r == 0):
        cost[cost > 0] = np.inf  # nothing moves, whatever the multiplier
    budget, spread = radii**order, float(np.ptp(gains))
    # no multiplier at the minimum exceeds spread / budget; that of an empty budget is idle
    most = [spread / b if b > 0 else 1.0 for b in budget]
    bounds = [(0.0 if b > 0 else 1.0, top) for b, top in zip(budget, most)]
    at, best, cuts = np.array(most), np.inf, []
    for _ in range(_CUTS):
        mean, spent = _moved(gains, costs, at)
        value, slope = float(mean + at @ budget), budget - spent
        best = min(best, value)
        cuts.append([*slope, -1.0, slope @ at - value])
        rows = np.array(cuts)
        lowest = linprog([0, 0, 1], A_ub=rows[:, :3], b_ub=rows[:, 3], bounds=[*bounds, (None, None)])
        if best - lowest.fun <= _ROUNDING * max(1.0, spread):
            break
        at = lowest.x[:2]
    return best


def _moved(gains: NDArray, costs: list[NDArray], multipliers: NDArray) -> tuple[float, NDArray]:
    """The largest mean over couplings of f_lambda, and what the moves behind it cost on average, per marginal."""
    halfway = [gains - multipliers[0] * cost[:, None] for cost in costs[0]]
    to_first, reached = np.array([h.argmax(0) for h in halfway]), np.array([h.max(0) for h in halfway])
    to_second = np.array([(reached - multipliers[1] * cost).argmax(1) for cost in costs[1]]).T
    rows, columns = np.ogrid[: len(costs[0]), : len(costs[1])]
    spent = costs[0][rows, to_first[rows, to_second]], costs[1][columns, to_second]
    plan = _coupling(reached[rows, to_second] - multipliers[1] * spent[1])
    mean = (plan * (reached[rows, to_second] - multipliers[1] * spent[1])).sum()
    return float(mean), np.array([(plan * cost).sum() for cost in spent])


def _reached(cost: NDArray, budget: float) -> float:
    """The minimum over kappa >= 0 of kappa budget + the largest mean over couplings of max(0, 1 - kappa cost).

    It is convex and piecewise linear in kappa: two lines that touch it on either side of its minimum meet below it,
    and touch it there in turn, until nothing is left between.
    """
    slope = budget - float((_coupling(-cost) * cost).sum())
    if slope >= 0:
        return 1.0
    left, right = (1.0, slope), (np.inf, budget)  # a line's value at 0, and its slope
    kappa, best = 1 / cost[cost > 0].min(), 1.0
    for _ in range(_CUTS):
        plan = _coupling(np.maximum(0.0, 1 - kappa * cost))
        held = plan * (kappa * cost < 1 - _ROUNDING)
        line = float(held.sum()), budget - float((held * cost).sum())
        best = min(best, line[0] + line[1] * kappa)
        if line[0] - left[0] + (line[1] - left[1]) * kappa <= _ROUNDING:
            break
        left, right = (line, right) if line[1] < 0 else (left, line)
        kappa = (right[0] - left[0]) / (left[1] - right[1])
    return best


def _coupling(gain: NDArray) -> NDArray:
    """The coupling (n, m) of equally likely rows and columns with the largest mean gain."""
    from scipy.optimize import linear_sum_assignment, linprog
    from scipy.sparse import eye_array, kron, vstack

    n, m = gain.shape
    if n == m:
        plan = np.zeros((n, m))
        plan[linear_sum_assignment(gain, maximize=True)] = 1 / n
        return plan
    sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
    shares = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return linprog(-gain.ravel(), A_eq=sums, b_eq=shares).x.reshape(n, m)


def _sample(name: str, values: Array) -> NDArray:
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 1 or not points.size or not np.isfinite(points).all():
        raise ValueError(f"{name}: expected one or more finite numbers in a row, got shape {points.shape}")
    return points


def _thresholds(z: Array) -> NDArray:
    at = np.asarray(z, dtype=np.float64)
    if not np.isfinite(at).all():
        raise ValueError("z: expected finite numbers, got NaN or infinite ones")
    return at


def _radii(radius: float | tuple[float, float]) -> tuple[float, float]:
    first, second = radius if isinstance(radius, tuple) else (radius, radius)
    require.number("radius", first, at_least=0.0)
    require.number("radius", second, at_least=0.0)
    return first, second
