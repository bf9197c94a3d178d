"""PRESTO: are rare probabilities estimated better than by logistic regression and by proportional odds?

The data are the paper's: 2500 rows, 10 features uniform on [-1, 1], four categories with intercepts 0, 3 and 5, the
last of them at about 1%. "Sparse": a third of the slopes are 0.5, and from one boundary to the next a third of them
move by 0.5 either way; "dense": all slopes and all moves are uniform on [-0.5, 0.5]. Draws in which boundaries cross
are drawn again. Scored is the mean squared error of the last category's probability at the rows.
"""

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim
from lossary.weighting import PrestoOrdinalClassifier

INTERCEPTS = np.array([0.0, 3.0, 5.0])


def _draw(rng: np.random.Generator, n: int, kind: str) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Features (n, 10), categories 0 to 3, the last one's probabilities and the slopes (3, 10)."""
    while True:
        if kind == "sparse":
            present = rng.random((3, 10)) < 1 / 3
            moves = 0.5 * present * np.vstack([np.ones(10), rng.choice([-1.0, 1.0], (2, 10))])
        else:
            moves = rng.uniform(-0.5, 0.5, (3, 10))
        slopes = moves.cumsum(axis=0)
        x = rng.uniform(-1, 1, (n, 10))
        below = 1 / (1 + np.exp(-(INTERCEPTS + x @ slopes.T)))
        y = (rng.random((n, 1)) > below).sum(axis=1)
        if (np.diff(below) > 0).all() and (np.bincount(y, minlength=4) >= 2).all():
            return x, y, 1 - below[:, -1], slopes


def _errors(seeds: Seeds, kind: str, method: str) -> NDArray:
    """Mean squared errors of the rare probabilities, per seed."""
    tuned, errors = {"n_lambdas": seeds.few(10, smoke=2), "cv": seeds.few(5, smoke=2)}, []
    for rng in seeds.numpy(kind):
        x, y, rare, _ = _draw(rng, 2500, kind)
        if method == "proportional odds":
            model = PrestoOrdinalClassifier(base=0.0, lam=100.0).fit(x, y)
        else:  # of two categories PRESTO is logistic regression with an L1 penalty
            model = PrestoOrdinalClassifier(**tuned).fit(x, y == 3 if method == "logistic" else y)
        errors.append(np.mean((model.predict_proba(x)[:, -1] - rare) ** 2))
    return np.array(errors)


@claim(
    says="PRESTO has at most 0.9 of the error in rare probabilities of logistic regression on the rare category",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="the paper's sparse simulation, 2500 rows, about 1% rare; L1 logistic regression; 10 lambdas, 5 folds each",
)
def presto_beats_logistic_regression(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, "sparse", "presto"), _errors(seeds, "sparse", "logistic"))


@claim(
    says="PRESTO has at most 0.9 of the error in rare probabilities of proportional odds where differences are sparse",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="the paper's sparse simulation, 2500 rows, about 1% rare; 10 lambdas, 5 folds; the baseline has none",
)
def presto_beats_proportional_odds(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, "sparse", "presto"), _errors(seeds, "sparse", "proportional odds"))


@claim(
    says="PRESTO has at most 0.9 of the error of proportional odds where all slopes differ a little",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="the paper's dense simulation, 2500 rows, about 1% rare; 10 lambdas, 5 folds; the baseline has none",
)
def presto_beats_proportional_odds_with_dense_differences(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, "dense", "presto"), _errors(seeds, "dense", "proportional odds"))


@claim(
    says="The slopes are consistent: with four times the rows at most 0.7 of their error is left",
    kind="ratio",
    metric="relative error",
    margin=0.7,
    scale="the paper's sparse simulation, 10000 rows against 2500, lambda sqrt(log(10) / n) / 4, Frobenius norm",
)
def slopes_are_consistent(seeds: Seeds) -> Arms:
    found: dict[int, list[float]] = {10_000: [], 2500: []}
    for n, errors in found.items():
        for rng in seeds.numpy("sparse"):
            x, y, _, slopes = _draw(rng, n, "sparse")
            model = PrestoOrdinalClassifier(lam=0.25 * np.sqrt(np.log(10) / n)).fit(x, y)
            errors.append(float(np.linalg.norm(model.coef_ - slopes) / np.linalg.norm(slopes)))
    return Arms(np.array(found[10_000]), np.array(found[2500]))
