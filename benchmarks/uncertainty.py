"""Conformal risk control of 1,000 samples at 1,000 lambdas, checks included, against the bare numpy it stands for."""

import statistics

import numpy as np
from numpy.typing import NDArray

from benchmarks._timing import seconds
from lossary.uncertainty import conformal_risk_control, weighted_conformal_risk_control

SAMPLES, GRID, TESTS, ALPHA, ROUNDS = 1000, 1000, 500, 0.1, 9


def by_hand(losses: NDArray, lambdas: NDArray) -> float:
    """Two lines, with no look at the values and no care for losses that rise again."""
    bound = (losses.sum(0) + 1) / (len(losses) + 1)
    return float(lambdas[np.argmax(bound <= ALPHA)])


def sample_by_sample(losses: NDArray, lambdas: NDArray, weights: NDArray, tests: NDArray) -> list[float]:
    """The weighted form, one test sample after another."""
    found = []
    for test in tests:
        bound = (weights @ losses + test) / (weights.sum() + test)
        found.append(float(lambdas[np.argmax(bound <= ALPHA)]))
    return found


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds), target and unit of each comparison."""
    rng = np.random.default_rng(0)
    losses = np.sort(rng.random((SAMPLES, GRID)), axis=1)[:, ::-1].copy()
    losses[:, -1] = 0
    lambdas, weights, tests = np.linspace(0, 1, GRID), rng.random(SAMPLES), rng.random(TESTS)
    assert conformal_risk_control(losses, lambdas, alpha=ALPHA) == by_hand(losses, lambdas)
    arguments = (losses, lambdas, weights, tests)
    assert weighted_conformal_risk_control(*arguments, alpha=ALPHA).tolist() == sample_by_sample(*arguments)

    plain, weighted = [], []
    for _ in range(ROUNDS + 1):  # they take turns, so that a busy machine slows all
        ours = seconds(lambda: conformal_risk_control(losses, lambdas, alpha=ALPHA))
        plain.append(ours / seconds(lambda: by_hand(losses, lambdas)))
        slow = seconds(lambda: sample_by_sample(*arguments))
        weighted.append(slow / seconds(lambda: weighted_conformal_risk_control(*arguments, alpha=ALPHA)))
    return [
        {
            "name": "lambda of a million losses, against two lines of numpy",
            "ratio": statistics.median(plain[1:]),  # the first round warms up
            "target": "<= 15",
            "unit": "times its time",
        },
        {
            "name": "lambdas of 500 weighted test samples, against one after another",
            "ratio": statistics.median(weighted[1:]),
            "target": ">= 10",
            "unit": "times faster",
        },
    ]
