"""Marginal problems under model risk: is the dual the primal, and do the robust bounds hold where Makarov's fail?"""

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim
from lossary.weighting import makarov_bounds, marginal_model_risk, wasserstein_makarov_bounds

Z = np.linspace(-2.5, 3.5, 13)

PAYOFFS = {
    "threshold": lambda a, b: 1.0 * (a + b <= -0.5),
    "call": lambda a, b: np.maximum(a + b - 1, 0.0),
    "product": lambda a, b: -a * b,
}


def _primal(gains: NDArray, costs: list[NDArray], budgets: NDArray) -> float:
    """The worst case as one linear program: two plans that move the samples, and a law whose marginals they make."""
    from scipy.optimize import linprog
    from scipy.sparse import block_array, csr_array, eye_array, kron

    (n, g), (m, h) = (cost.shape for cost in costs)

    def sums(a: int, b: int, axis: int) -> csr_array:
        """Row (axis 1) or column (axis 0) sums of a flattened (a, b) matrix."""
        return kron(eye_array(a), np.ones((1, b))) if axis else kron(np.ones((1, a)), eye_array(b))

    equal = block_array([
        [sums(n, g, 1), None, csr_array((n, g * h))],
        [None, sums(m, h, 1), None],
        [sums(n, g, 0), None, -sums(g, h, 1)],
        [None, sums(m, h, 0), -sums(g, h, 0)],
    ])  # fmt: skip
    right = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m), np.zeros(g + h)])
    spent = block_array([
        [csr_array(costs[0].reshape(1, -1)), None, csr_array((1, g * h))],
        [None, csr_array(costs[1].reshape(1, -1)), None],
    ])  # fmt: skip
    objective = np.concatenate([np.zeros(n * g + m * h), -gains.ravel()])
    return float(-linprog(objective, A_ub=spent, b_ub=budgets, A_eq=equal, b_eq=right).fun)


@claim(
    says="Strong duality: the dual's worst case is that of a linear program over all laws in the balls",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="8 points and 12 more places each; 3 payoffs, orders 1 and 2, radii 0, 0.1 and (0.5, 0.2)",
)
def dual_is_the_primal(seeds: Seeds) -> Arms:
    off, more = [], np.linspace(-3, 3, seeds.few(12, smoke=3))
    for rng in seeds.numpy("points"):
        points = rng.normal(size=8), rng.normal(size=8)
        places = [np.union1d(s, more) for s in points]
        for payoff in PAYOFFS.values():
            gains = payoff(places[0][:, None], places[1])
            for order in (1.0, 2.0)[: seeds.few(2, smoke=1)]:
                costs = [np.abs(np.subtract.outer(s, a)) ** order for s, a in zip(points, places)]
                for radius in ((0.0, 0.0), (0.1, 0.1), (0.5, 0.2)):
                    dual = marginal_model_risk(payoff, *points, support=(more, more), radius=radius, order=order)
                    off.append(dual - _primal(gains, costs, np.array(radius) ** order))
    return Arms(np.array(off))


def _drift(rng: np.random.Generator) -> tuple[tuple[NDArray, NDArray], NDArray]:
    """Two samples of 60; and P(S1 + S2 <= Z), (4, Z), after all points have drifted up, by 0.2 on average.

    The dependence is a normal copula of correlation -0.9, 0 or 0.9, or, for each threshold, the one that makes its
    probability smallest.
    """
    samples = rng.normal(size=60), rng.normal(size=60)
    drifts = rng.standard_exponential((2, 60))
    first, second = (np.sort(s + 0.2 * d / d.mean()) for s, d in zip(samples, drifts))
    shares = [makarov_bounds(first, second, Z)[0]]
    for correlation in (-0.9, 0.0, 0.9):
        normals = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 60)
        a, b = normals.argsort(axis=0).argsort(axis=0).T
        shares.append(((first[a] + second[b])[:, None] <= Z).mean(axis=0))
    return samples, np.array(shares)


@claim(
    says="After a drift the robust bounds hold the sum's distribution more often than Makarov's",
    kind="superiority",
    metric="coverage",
    scale="60 points of each marginal, drift 0.2, radius 0.2, order 1; 13 thresholds under 3 copulas and the worst one",
)
def robust_bounds_cover_after_a_drift(seeds: Seeds) -> Arms:
    covered: dict[float, list[float]] = {0.2: [], 0.0: []}
    width: dict[float, list[float]] = {0.2: [], 0.0: []}
    for rng in seeds.numpy("drift"):
        samples, shares = _drift(rng)
        for radius in covered:
            lower, upper = wasserstein_makarov_bounds(*samples, Z, radius=radius)
            covered[radius].append(100 * np.mean((lower - 1e-8 <= shares) & (shares <= upper + 1e-8)))
            width[radius].append(float(np.mean(upper - lower)))
    widths = {f"mean width at radius {radius}": float(np.mean(values)) for radius, values in width.items()}
    return Arms(np.array(covered[0.2]), np.array(covered[0.0]), widths)


@claim(
    says="No law in the balls leaves the robust bounds, whatever its dependence",
    kind="exact",
    metric="deviation",
    tolerance=1e-8,
    scale="60 points of each marginal, drift 0.2, radius 0.2, order 1; 13 thresholds under 3 copulas and the worst one",
)
def robust_bounds_are_never_left(seeds: Seeds) -> Arms:
    off = []
    for rng in seeds.numpy("drift"):
        samples, shares = _drift(rng)
        lower, upper = wasserstein_makarov_bounds(*samples, Z, radius=0.2)
        off.append(np.maximum(0.0, np.maximum(lower - shares, shares - upper)).max())
    return Arms(np.array(off))


@claim(
    says="The risk is continuous in the radius: at 1e-9 the bounds are Makarov's",
    kind="exact",
    metric="deviation",
    tolerance=1e-4,
    scale="60 points of each of two normal marginals, order 1, 13 thresholds",
)
def bounds_tend_to_makarovs(seeds: Seeds) -> Arms:
    off = []
    for rng in seeds.numpy("points"):
        samples = rng.normal(size=60), rng.normal(size=60)
        near, limit = wasserstein_makarov_bounds(*samples, Z, radius=1e-9), makarov_bounds(*samples, Z)
        off.append(np.abs(np.array(near) - np.array(limit)).max())
    return Arms(np.array(off))
