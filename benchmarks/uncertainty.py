"""The room's hot paths, checks included, against the bare numpy that they stand for and against peers.

Conformal risk control of 1,000 samples at 1,000 lambdas; intervals and sets of 100,000 rows from 100,000 others against
crepes and MAPIE, of 100 rows where crepes goes through them one by one; risk control of 200 rows of 10 labels at 101
lambdas against MAPIE; one temperature of 100,000 x 10 logits against scikit-learn; scores of 100,000 forecasts against
scoringrules; Kaplan-Meier of 100,000 and Weibull regression of 10,000 x 3 against lifelines. Evidential losses, forward
and backward on logits [8192, 10], against the textbook's formula, which loses its digits where alpha is large.
"""

import math
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from torch import Tensor

from benchmarks._timing import seconds
from lossary.uncertainty import (
    APGWRegressor,
    ConformalRiskControl,
    conformal_risk_control,
    conformalize_quantiles,
    evidential_mse_loss,
    uce_loss,
    weighted_conformal_risk_control,
)
from lossary.uncertainty._calibration import temperature
from lossary.uncertainty._conformal import p_values, quantile, set_scores, split_interval, threshold_scores
from lossary.uncertainty._quantile import interval_score, pinball
from lossary.uncertainty._scoring import brier_score, log_score
from lossary.uncertainty._survival import kaplan_meier

PEER_ROWS, FEW, CLASSES = 100_000, 100, 10
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


class Told(RegressorMixin, BaseEstimator):
    """A regressor whose prediction is one of its columns, so that a peer's own work is all that is timed."""

    def __init__(self, column: int = 0) -> None:
        self.column = column

    def fit(self, x: NDArray, y: NDArray) -> "Told":
        self.n_features_in_ = x.shape[1]
        return self

    def predict(self, x: NDArray) -> NDArray:
        return x[:, self.column]


class ToldChances(ClassifierMixin, BaseEstimator):
    """A classifier whose probabilities are its columns."""

    def fit(self, x: NDArray, y: NDArray) -> "ToldChances":
        self.classes_, self.n_features_in_ = np.arange(x.shape[1]), x.shape[1]
        return self

    def predict_proba(self, x: NDArray) -> NDArray:
        return x

    def predict(self, x: NDArray) -> NDArray:
        return x.argmax(1)


def contests() -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, what a peer does, and what we do, on the same input."""
    from crepes import WrapRegressor
    from lifelines import KaplanMeierFitter
    from mapie.classification import SplitConformalClassifier
    from mapie.regression import SplitConformalRegressor
    from sklearn.calibration import _TemperatureScaling

    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(2, PEER_ROWS, 1))
    y = known[:, 0] + rng.normal(size=PEER_ROWS)
    logits = 2 * rng.normal(size=(2, PEER_ROWS, CLASSES))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (chances[0].cumsum(1) > rng.random((PEER_ROWS, 1))).argmax(1)
    u, rows = rng.random((2, PEER_ROWS)), np.arange(PEER_ROWS)
    time, event = rng.exponential(10, PEER_ROWS), rng.random(PEER_ROWS) < 0.6

    def crepes() -> object:
        model = WrapRegressor(Told().fit(known, y))
        model.calibrate(known, y)
        return model.predict_int(new, confidence=1 - ALPHA)

    def mapie() -> object:
        model = SplitConformalRegressor(Told().fit(known, y), confidence_level=1 - ALPHA, prefit=True)
        return model.conformalize(known, y).predict_interval(new)

    def mapie_sets(score: str) -> Callable[[], object]:
        def run() -> object:
            model = SplitConformalClassifier(
                ToldChances().fit(chances[0], labels), confidence_level=1 - ALPHA, prefit=True, conformity_score=score
            )
            return model.conformalize(chances[0], labels).predict_set(chances[1])

        return run

    def interval() -> object:
        return split_interval(new[:, 0], y - known[:, 0], ALPHA)

    def smallest() -> object:
        scores = threshold_scores(chances[0])[rows, labels]
        return threshold_scores(chances[1]) <= quantile(scores, ALPHA)

    def adaptive() -> object:
        scores = set_scores(chances[0], u[0])[rows, labels]
        return set_scores(chances[1], u[1]) <= quantile(scores, ALPHA)

    return [
        ("intervals, against crepes", crepes, interval),
        ("intervals, against MAPIE", mapie, interval),
        ("smallest sets, against MAPIE", mapie_sets("lac"), smallest),
        ("adaptive sets, against MAPIE", mapie_sets("aps"), adaptive),
        (
            "a temperature, against scikit-learn",
            lambda: _TemperatureScaling().fit(logits[0], labels),
            lambda: temperature(logits[0], labels),
        ),
        (
            "Kaplan-Meier, against lifelines",
            lambda: KaplanMeierFitter().fit(time, event),
            lambda: kaplan_meier(time, event),
        ),
    ]


def more_contests() -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """The same for p-values, quantiles, risks, scores and times."""
    import pandas as pd
    import scoringrules
    from crepes import ConformalClassifier
    from lifelines import WeibullAFTFitter
    from mapie.regression import ConformalizedQuantileRegressor
    from mapie.risk_control import MultiLabelClassificationController

    rng = np.random.default_rng(1)
    chances = rng.dirichlet(np.ones(CLASSES), (2, PEER_ROWS))
    labels = (chances[0].cumsum(1) > rng.random((PEER_ROWS, 1))).argmax(1)
    own, new = threshold_scores(chances[0])[np.arange(PEER_ROWS), labels], threshold_scores(chances[1, :FEW])
    y, bands = rng.normal(size=PEER_ROWS), np.sort(rng.normal(size=(2, PEER_ROWS, 3)))
    levels, grid = (ALPHA / 2, 0.5, 1 - ALPHA / 2), np.linspace(0.1, 0.9, 9)
    found = np.sort(rng.random((200, CLASSES)))
    true = rng.random(found.shape) < found
    true[:, -1] = True  # MAPIE wants a label in every row
    quantiles, p, happened = (
        np.sort(rng.normal(size=(PEER_ROWS, 9))),
        rng.random(PEER_ROWS),
        rng.integers(0, 2, PEER_ROWS),
    )
    pair, outcome = torch.from_numpy(np.stack([1 - p, p], axis=1)), torch.from_numpy(happened)
    x = rng.normal(size=(10_000, 3))
    time = rng.weibull(1.5, len(x)) * np.exp(x @ [0.5, -0.5, 0.2])
    event = rng.random(len(x)) < 0.6
    table = pd.DataFrame({**{f"x{i}": x[:, i] for i in range(3)}, "time": time, "event": event})

    def mapie_quantiles() -> object:
        given = [Told(column).fit(bands[0], y) for column in (0, 2, 1)]
        model = ConformalizedQuantileRegressor(given, confidence_level=1 - ALPHA, prefit=True)
        return model.conformalize(bands[0], y).predict_interval(bands[1], symmetric_correction=True)

    def mapie_risk() -> object:
        steps = np.linspace(0, 1, 101)
        control = MultiLabelClassificationController(
            lambda scores: scores, risk="recall", method="crc", target_level=1 - ALPHA, predict_params=steps
        )
        return control.calibrate(found, true.astype(int))

    return [
        (
            "smallest sets of 100 rows, against crepes",
            lambda: ConformalClassifier().fit(own).predict_set(new, confidence=1 - ALPHA, smoothing=False),
            lambda: new <= quantile(own, ALPHA),
        ),
        (
            "p-values of 100 rows, against crepes",
            lambda: ConformalClassifier().fit(own).predict_p(new, smoothing=False),
            lambda: p_values(new, own),
        ),
        (
            "calibrated quantiles, against MAPIE",
            mapie_quantiles,
            lambda: conformalize_quantiles(bands[0], y, bands[1], levels=levels),
        ),
        (
            "risk control, against MAPIE",
            mapie_risk,
            lambda: ConformalRiskControl(alpha=ALPHA, grid=101).fit(found, true),
        ),
        (
            "nine pinball losses, against scoringrules",
            lambda: scoringrules.quantile_score(y[:, None], quantiles, grid),
            lambda: pinball(quantiles, y, grid),
        ),
        (
            "interval scores, against scoringrules",
            lambda: scoringrules.interval_score(y, quantiles[:, 0], quantiles[:, 8], 0.2),
            lambda: interval_score(quantiles[:, 0], quantiles[:, 8], y, 0.2),
        ),
        (
            "log scores of two classes, against scoringrules",
            lambda: scoringrules.log_score(happened, p),
            lambda: log_score(pair, outcome),
        ),
        (
            "Brier scores of two classes, against scoringrules",
            lambda: scoringrules.brier_score(happened, p),
            lambda: brier_score(pair, outcome),
        ),
        (
            "Weibull regression, against lifelines",
            lambda: WeibullAFTFitter().fit(table, "time", "event"),
            lambda: APGWRegressor(power=False, kappa=1.0).fit(x, time, event),
        ),
    ]


def kl_to_flat(alpha: Tensor) -> Tensor:
    """As the textbook has it."""
    total = alpha.sum(-1, keepdim=True)
    normaliser = torch.lgamma(total).squeeze(-1) - torch.lgamma(alpha).sum(-1) - math.lgamma(alpha.shape[-1])
    return normaliser + ((alpha - 1) * (torch.digamma(alpha) - torch.digamma(total))).sum(-1)


def mse_by_hand(z: Tensor, y: Tensor) -> Tensor:
    """Evidential squared error with the KL of what speaks for other classes."""
    alpha, own = 1 + F.softplus(z), F.one_hot(y, z.shape[-1])
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    squares = (own - mean).square() + mean * (1 - mean) / (total + 1)
    return squares.sum(-1) + kl_to_flat(own + (1 - own) * alpha)


def uce_by_hand(z: Tensor, y: Tensor) -> Tensor:
    """Expected cross-entropy with a little entropy, which is minus the KL to flat up to a constant."""
    alpha = 1 + z.exp()
    gap = torch.digamma(alpha.sum(-1)) - torch.digamma(alpha.gather(-1, y[:, None]).squeeze(-1))
    return gap + 1e-5 * (kl_to_flat(alpha) + math.lgamma(z.shape[-1]))


def against_formulas() -> list[dict[str, str | float | None]]:
    """How many times the time of the bare formula each evidential loss takes, median over rounds."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(8192, CLASSES, generator=generator)
    y = torch.randint(CLASSES, (8192,), generator=generator)

    def time(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        leaf = z.clone().requires_grad_()
        return seconds(lambda: loss(leaf, y).sum().backward())

    rows: list[dict[str, str | float | None]] = []
    for ours, bare in ((evidential_mse_loss, mse_by_hand), (uce_loss, uce_by_hand)):
        torch.testing.assert_close(ours(z.double(), y), bare(z.double(), y))
        ratios = [time(ours) / time(bare) for _ in range(3 * ROUNDS)]
        row = {"name": f"{ours.__name__}, against the bare formula", "ratio": statistics.median(ratios[1:])}
        rows.append({**row, "target": None, "unit": "times its time"})
    return rows


def against_peers() -> list[dict[str, str | float | None]]:
    """How many times as fast as each peer, median over rounds."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, peer, ours in contests() + more_contests():
            ratios = [seconds(peer) / seconds(ours) for _ in range(ROUNDS)]
            found.append(
                {"name": name, "ratio": statistics.median(ratios[1:]), "target": ">= 1", "unit": "times faster"}
            )
    return found


def measure() -> list[dict[str, str | float | None]]:
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
        *against_peers(),
        *against_formulas(),
    ]
