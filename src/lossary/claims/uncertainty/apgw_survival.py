"""APGW: does one family do the work of many, and is a power that depends on covariates worth having?

Log-loss is minus the mean censored log-likelihood of new people. The breast-cancer data (GBSG2, 686 women) and the
log-normal and Cox fits are lifelines'.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from lossary.claims import Arms, Seeds, claim, tune
from lossary.uncertainty import APGW, APGWRegressor
from lossary.uncertainty._survival import integrated_brier_score

FAMILIES = {"cure": -0.5, "log-logistic": 0.0, "Weibull": 1.0, "Gompertz-like": 20.0}
TEST = 1000

People = tuple[NDArray, NDArray, NDArray]
"""Covariates (n, d), times (n,) and whether the event came then (n,)."""


@claim(
    says="At kappa 0, 1, 2 and infinity APGW is Burr XII, Weibull, a linear hazard, Gompertz; below 0 some are cured",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="survival at 50 times, random scales and powers, against scipy's distributions and closed forms",
)
def special_cases(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("parameters"):
        t = rng.exponential(2, 50)
        phi, lam, gamma = np.exp(rng.normal(0, 0.5, 3))
        cured = np.exp(-lam * 0.5 / 0.5)
        expected = {
            (gamma, 0.0): stats.burr12(c=gamma, d=lam, scale=1 / phi).sf(t),
            (gamma, 1.0): stats.weibull_min(c=gamma, scale=lam ** (-1 / gamma) / phi).sf(t),
            (1.0, 2.0): np.exp(-lam * phi * (t + phi * t**2 / 6)),
            (1.0, 1e9): stats.gompertz(c=lam, scale=1 / phi).sf(t),
            (gamma, -0.5): cured ** (1 - (1 + 2 * (phi * t) ** gamma) ** -0.5),
        }
        for (power, kappa), curve in expected.items():
            family = APGW(phi, lam, torch.tensor(power, dtype=torch.float64), kappa)
            deviations.append(np.abs(family.survival(torch.from_numpy(t)).numpy() - curve).max())
    return Arms(np.array(deviations))


def _people(rng: np.random.Generator, n: int, *, kappa: float) -> People:
    """Two covariates that stretch time; follow-up ends between 0.5 and 5 times a typical time."""
    X = rng.normal(size=(n, 2))
    phi = torch.from_numpy(np.exp(X @ [0.5, -0.3]))
    time = APGW(phi, 1.0, 1.5, kappa).icdf(torch.from_numpy(rng.random(n))).numpy()
    end = rng.uniform(0.5, 5.0, n) * np.median(time[np.isfinite(time)])
    return X, np.minimum(time, end), time <= end


def _log_loss(model: APGWRegressor, people: People, train: int) -> float:
    """On those after the first `train`, of a model fitted to these."""
    X, time, event = people
    return -model.fit(X[:train], time[:train], event[:train]).score(X[train:], time[train:], event[train:])


@claim(
    says="With kappa free APGW predicts new people as well as the family that made the data, whichever it was",
    kind="noninferiority",
    metric="log-loss",
    scale="300 people to fit and 1000 new ones, two covariates, four families from cure to Gompertz, averaged",
)
def one_family_does_for_all(seeds: Seeds) -> Arms:
    train = seeds.few(300, smoke=60)
    losses = np.array(
        [
            [
                [_log_loss(APGWRegressor(power=False, kappa=k), people, train) for k in (None, kappa)]
                for kappa in FAMILIES.values()
                for people in [_people(rng, train + TEST, kappa=kappa)]
            ]
            for rng in seeds.numpy("people")
        ]
    )
    each = dict(zip(FAMILIES, (losses[..., 0] - losses[..., 1]).mean(0).tolist()))
    return Arms(*losses.mean(1).T, {"excess log-loss by family": each})


def _crossing(rng: np.random.Generator, n: int) -> People:
    """A treatment that is risky at first and protective later, and a covariate that stretches time."""
    X = np.column_stack([rng.integers(0, 2, n), rng.normal(size=n)]).astype(float)
    phi, gamma = np.exp(-0.1 * X[:, 0] + 0.4 * X[:, 1]), np.exp(0.6 - 0.8 * X[:, 0])
    times = APGW(torch.from_numpy(phi), 1.0, torch.from_numpy(gamma), 0.5)
    time = times.icdf(torch.from_numpy(rng.random(n))).numpy()
    end = rng.uniform(0.5, 5.0, n) * np.median(time)
    return X, np.minimum(time, end), time <= end


@claim(
    says="Where hazards cross, a power that depends on covariates predicts better than a scale alone",
    kind="superiority",
    metric="log-loss",
    scale="300 people with crossing hazards to fit, 1000 new ones; 2 scales each, kappa free in both arms",
)
def power_helps_where_hazards_cross(seeds: Seeds) -> Arms:
    def loss(seeds: Seeds, **setting: Any) -> NDArray:
        train = seeds.few(300, smoke=60)
        return np.array(
            [_log_loss(APGWRegressor(**setting), _crossing(rng, train + TEST), train) for rng in seeds.numpy("people")]
        )

    ours, theirs = (
        tune(loss, [{"scale": scale, "power": power} for scale in ("phi", "lam")], seeds, better="lower")
        for power in (True, False)
    )
    return Arms(loss(seeds, **ours), loss(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Where hazards cross, APGW's curves have at most 0.97 of the integrated Brier score of a Cox model's",
    kind="ratio",
    metric="mean squared error",
    margin=0.97,
    scale="300 people with crossing hazards to fit, 1000 new ones; both untuned, 30 times up to the 90th percentile",
)
def curves_beat_cox_where_hazards_cross(seeds: Seeds) -> Arms:
    import pandas as pd
    from lifelines import CoxPHFitter

    train, scores = seeds.few(300, smoke=60), []
    for rng in seeds.numpy("people"):
        X, time, event = _crossing(rng, train + TEST)
        new = X[train:], time[train:], event[train:]
        grid = np.quantile(time, np.linspace(0.05, 0.9, 30))
        ours = APGWRegressor().fit(X[:train], time[:train], event[:train]).predict_survival(new[0], grid)
        table = pd.DataFrame(X, columns=["treatment", "covariate"])
        cox = CoxPHFitter().fit(table[:train].assign(time=time[:train], event=event[:train]), "time", "event")
        theirs = cox.predict_survival_function(table[train:], grid).to_numpy().T
        scores.append([integrated_brier_score(new[1], new[2], curves, grid) for curves in (ours, theirs)])
    return Arms(*np.array(scores).T)


@claim(
    says="On breast-cancer data APGW with covariates in phi and gamma predicts as well as the family that AIC chooses",
    kind="noninferiority",
    metric="log-loss",
    scale="GBSG2 from lifelines, 686 women, 8 covariates, a quarter held out; the choice is among Weibull, log-logistic"
    " and log-normal accelerated failure times",
)
def chooses_the_family_on_breast_cancer(seeds: Seeds) -> Arms:
    import pandas as pd
    from lifelines import LogNormalAFTFitter
    from lifelines.datasets import load_gbsg2

    women = pd.get_dummies(load_gbsg2(), drop_first=True, dtype=float)
    X = women.drop(columns=["time", "cens"])
    women[X.columns] = (X - X.mean()) / X.std()
    women["time"] /= 365.25
    people = women[X.columns].to_numpy(), women["time"].to_numpy(), women["cens"].to_numpy()
    losses, chosen = [], []
    for rng in seeds.numpy("split"):
        order = rng.permutation(len(women))
        train = len(order) * 3 // 4
        shuffled = tuple(part[order] for part in people)
        fixed = [APGWRegressor(power=False, kappa=kappa) for kappa in (1.0, 0.0)]
        held = [_log_loss(model, shuffled, train) for model in fixed]
        normal = LogNormalAFTFitter().fit(women.iloc[order[:train]], "time", "cens")
        held.append(-normal.score(women.iloc[order[train:]], scoring_method="log_likelihood"))
        best = int(np.argmin([*(model.aic_ for model in fixed), normal.AIC_]))
        chosen.append(("Weibull", "log-logistic", "log-normal")[best])
        losses.append([_log_loss(APGWRegressor(), shuffled, train), held[best]])
    return Arms(*np.array(losses).T, {"chosen": {name: chosen.count(name) for name in sorted(set(chosen))}})
