"""ReTaSA: are its weights nearer to the truth than kernel mean matching's, and do they help to predict?

Source targets are Beta(2, 3), new ones Beta(3, 2); the two features are sin(3 y) and y with noise of 0.3. A linear
regression on them is fitted to the source with the weights and asked about new rows.
"""

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import diabetes, split
from lossary.weighting import ReTaSAWeights, nadaraya_watson_operator

Rows = tuple[NDArray, NDArray]
"""x (n, d) and y (n,)."""

RETASA = [{"method": "retasa", "bandwidth": width, "alpha": a} for width in (1.0, 2.0, 3.0) for a in (0.003, 0.03)]
MATCHING = [{"method": "matching", "ridge": r, "most": most} for r in (0.001, 0.01, 0.1) for most in (4.0, 10.0)]


def _draw(rng: np.random.Generator, n: int, a: float, b: float) -> Rows:
    y = rng.beta(a, b, n)
    return np.column_stack([np.sin(3 * y), y]) + 0.3 * rng.standard_normal((n, 2)), y


def _truth(y: NDArray) -> NDArray:
    """The ratio of Beta(3, 2) to Beta(2, 3)."""
    return y / (1 - y)


def _kernel(a: NDArray, b: NDArray) -> NDArray:
    """Gaussian, as wide as the median distance."""
    from scipy.spatial.distance import cdist

    squares = cdist(a, b, "sqeuclidean")
    return np.exp(-squares / np.median(squares))


def _matched(x: NDArray, y: NDArray, x_new: NDArray, *, ridge: float, most: float) -> NDArray:
    """Kernel mean matching under target shift (Zhang et al., 2013): weights smooth in y and at most `most`, whose mix
    of the embedded p(x | y) comes nearest to the embedded new x."""
    from scipy.optimize import minimize

    n, near = len(y), _kernel(y[:, None], y[:, None])
    smooth = nadaraya_watson_operator(y[:, None], y[:, None], bandwidth=y.std() * n**-0.2)
    mix = np.linalg.solve(near + ridge * n * np.eye(n), near) @ smooth
    square, pull = mix.T @ _kernel(x, x) @ mix / n, mix.T @ _kernel(x, x_new).mean(1)

    def objective(rough: NDArray) -> tuple[float, NDArray]:
        slope = square @ rough - pull
        return float(rough @ (slope - pull)) / 2, slope

    found = smooth @ minimize(objective, np.ones(n), jac=True, bounds=[(0, most)] * n).x
    return np.asarray(found / found.mean())


def _weights(source: Rows, x_new: NDArray, *, method: str, **how: float) -> NDArray:
    if method == "retasa":
        return ReTaSAWeights(**how).fit(*source, x_new).weights_
    return _matched(*source, x_new, **how)


def _weight_error(seeds: Seeds, **how: object) -> NDArray:
    """Root of the mean squared error of the weights over the mean square of the true ones, per seed."""
    errors = []
    for rng in seeds.numpy("rows"):
        source, (x_new, _) = _draw(rng, seeds.few(400, smoke=40), 2, 3), _draw(rng, seeds.few(400, smoke=40), 3, 2)
        truth = _truth(source[1])
        errors.append(np.sqrt(np.mean((_weights(source, x_new, **how) - truth) ** 2) / np.mean(truth**2)))
    return np.array(errors)


def _loss(source: Rows, new: Rows, weights: NDArray | None, chance: NDArray | None = None) -> float:
    """Mean squared error on new rows of a linear regression on weighted source rows."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1.0).fit(*source, sample_weight=weights)
    return float(np.average((new[1] - model.predict(new[0])) ** 2, weights=chance))


def _losses(seeds: Seeds) -> dict[str, NDArray]:
    """Mean squared errors on 5000 new rows, by the weights that were used."""
    found: dict[str, list[float]] = {"retasa": [], "none": [], "true": []}
    for rng in seeds.numpy("rows"):
        source, (x_new, _) = _draw(rng, seeds.few(400, smoke=40), 2, 3), _draw(rng, seeds.few(400, smoke=40), 3, 2)
        test = _draw(rng, 5000, 3, 2)
        found["retasa"].append(_loss(source, test, ReTaSAWeights().fit(*source, x_new).weights_))
        found["none"].append(_loss(source, test, None))
        found["true"].append(_loss(source, test, _truth(source[1])))
    return {name: np.array(values) for name, values in found.items()}


@claim(
    says="ReTaSA's weights have at most 0.9 of the error of kernel mean matching's",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="Beta(2, 3) to Beta(3, 2), two noisy features, 400 source and 400 new rows; 6 settings each",
)
def retasa_weighs_better_than_matching(seeds: Seeds) -> Arms:
    method, baseline = (tune(_weight_error, grid, seeds, better="lower") for grid in (RETASA, MATCHING))
    plain = {"error with the default": _weight_error(seeds, method="retasa").mean()}
    arms = _weight_error(seeds, **method), _weight_error(seeds, **baseline)
    return Arms(*arms, {"method": method, "baseline": baseline, **plain})


@claim(
    says="Weighted by ReTaSA a regression errs by at most 0.9 of what it errs by without weights",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="Beta(2, 3) to Beta(3, 2), two noisy features, 400 source and 400 new rows, linear regression, no tuning",
)
def retasa_predicts_better_than_no_weights(seeds: Seeds) -> Arms:
    found = _losses(seeds)
    return Arms(found["retasa"], found["none"], {"with the true weights": found["true"].mean()})


def _normal_error(seeds: Seeds, n: int) -> NDArray:
    """Relative error of the weights with n rows of either kind, where their true ratio is bounded, per seed.

    Targets N(0, 1) become N(0.7, 0.8^2), and x = y + 3 tanh(y) + N(0, 1).
    """
    errors = []
    for rng in seeds.numpy("rows"):
        y, y_new = rng.standard_normal(n), 0.7 + 0.8 * rng.standard_normal(n)
        x, x_new = (v + 3 * np.tanh(v) + rng.standard_normal(n) for v in (y, y_new))
        truth = np.exp(y**2 / 2 - (y - 0.7) ** 2 / 1.28) / 0.8
        found = ReTaSAWeights().fit(x[:, None], y, x_new[:, None]).weights_
        errors.append(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))
    return np.array(errors)


@claim(
    says="Weights of bounded ratio are consistent: with 8 times the rows at most 0.8 of the error is left",
    kind="ratio",
    metric="relative error",
    margin=0.8,
    scale="N(0, 1) to N(0.7, 0.8^2), x = y + 3 tanh(y) + N(0, 1), 1200 rows of either kind against 150, no tuning",
)
def error_falls_with_more_rows(seeds: Seeds) -> Arms:
    return Arms(_normal_error(seeds, seeds.few(1200, smoke=80)), _normal_error(seeds, seeds.few(150, smoke=40)))


@claim(
    says="Where patients who fare worse have become common, ReTaSA lowers a regression's error to at most 0.9",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="diabetes, half the rows as source, the others drawn by exp(y), predictions as the one feature, no tuning",
)
def retasa_helps_on_diabetes(seeds: Seeds) -> Arms:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_predict

    data = diabetes()
    x, y, parts = data.x.double().numpy(), data.y.double().numpy(), split(data, seeds, test=0.5)
    method, baseline = [], []
    for train, test, rng in zip(parts.train.numpy(), parts.test.numpy(), seeds.numpy("shift")):
        source, new = (x[train], y[train]), (x[test], y[test])
        chance = np.exp(new[1])
        drawn = rng.choice(len(test), len(test), p=chance / chance.sum())
        guess = cross_val_predict(Ridge(), *source)[:, None]
        guess_new = Ridge().fit(*source).predict(new[0][drawn])[:, None]
        weights = ReTaSAWeights().fit(guess, source[1], guess_new).weights_
        method.append(_loss(source, new, weights, chance))
        baseline.append(_loss(source, new, None, chance))
    return Arms(np.array(method), np.array(baseline))
