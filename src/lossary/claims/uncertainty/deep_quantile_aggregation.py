"""Deep quantile aggregation: does a local mix of quantile models beat the best of them and their average?

Three models give quantiles at five levels: linear, boosted and of the nearest neighbours. The weights are fitted on
predictions for rows that the models were not fitted on; the score is the weighted interval score on new rows.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import QuantileRegressor
from sklearn.neighbors import NearestNeighbors

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import diabetes, split
from lossary.uncertainty import (
    DeepQuantileAggregator,
    conformalize_quantiles,
    isotonic_quantiles,
    weighted_interval_score,
)

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
FOLDS = 3
METHOD = [{"lr": lr, "steps": steps} for lr in (0.001, 0.003) for steps in (150, 500)]
BASELINE: list[dict[str, Any]] = [{"which": which} for which in ("linear", "boosted", "nearest", "average")]

Table = tuple[NDArray, NDArray]
"""Features (N, D) and targets (N,)."""


def _made_up(seed: Seeds, rows: int) -> Table:
    """A line with even noise for x_1 < 0; waves whose noise grows with x_2 beyond; x uniform from -1 to 1."""
    rng = seed.numpy("data")[0]
    x = rng.uniform(-1, 1, (rows, 3))
    flat, waves = x[:, 0] + x[:, 2], np.sin(6 * x[:, 0]) + x[:, 1] ** 2
    noise = np.where(x[:, 0] < 0, 0.3, 0.2 + 0.8 * np.abs(x[:, 1]))
    return x, np.where(x[:, 0] < 0, flat, 2 * waves) + noise * rng.normal(size=rows)


def _draw(seed: Seeds, task: str) -> tuple[Table, Table]:
    """Rows to fit everything on, and new ones."""
    if task == "made up":
        x, y = _made_up(seed, 1400)
        rows = np.arange(1400)
        known, new = rows[:400], rows[400:]
    else:
        data = diabetes()
        x, y = data.x.double().numpy(), data.y.double().numpy()
        parts = split(data, seed, test=0.3)
        known, new = parts.train[0].numpy(), parts.test[0].numpy()
    if seed.smoke:
        known, new = known[:60], new[:60]
    return (x[known], y[known]), (x[new], y[new])


def _base(x: NDArray, y: NDArray, new: NDArray, *, smoke: bool) -> NDArray:
    """Quantiles (rows, 3 models, 5 levels) of the three models, fitted on x, y."""
    boost = {"max_iter": 5 if smoke else 40, "max_leaf_nodes": 8, "min_samples_leaf": 10}
    linear, boosted = [], []
    for level in LEVELS:
        linear.append(QuantileRegressor(quantile=level, alpha=0.0).fit(x, y).predict(new))
        forest = HistGradientBoostingRegressor(loss="quantile", quantile=level, random_state=0, **boost)
        boosted.append(forest.fit(x, y).predict(new))
    near = NearestNeighbors(n_neighbors=min(30, len(x))).fit(x).kneighbors(new, return_distance=False)
    nearest = np.quantile(y[near], LEVELS, axis=1)
    return np.stack([np.stack(linear, 1), np.stack(boosted, 1), nearest.T], axis=1)


@cache
def _prepared(seed: Seeds, task: str) -> tuple[Table, Table, NDArray, NDArray]:
    """Both tables, the models' quantiles for the first by cross-fitting, and for the second."""
    (x, y), (new, target) = _draw(seed, task)
    inside, fold = np.empty((len(x), 3, len(LEVELS))), np.arange(len(x)) % FOLDS
    for k in range(FOLDS):
        inside[fold == k] = _base(x[fold != k], y[fold != k], x[fold == k], smoke=seed.smoke)
    return (x, y), (new, target), inside, _base(x, y, new, smoke=seed.smoke)


def _aggregated(seeds: Seeds, *, task: str, **hyper: Any) -> NDArray:
    """Mean weighted interval score of the aggregate on new rows, (S,)."""
    scores = []
    for s in range(len(seeds)):
        (x, y), (new, target), inside, outside = _prepared(seeds.one(s), task)
        model = DeepQuantileAggregator(levels=LEVELS, hidden=32, random_state=seeds.ids[s], **hyper)
        model.set_params(steps=seeds.few(model.steps)).fit_weights(x, inside, y)
        scores.append(weighted_interval_score(model.aggregate(new, outside), target, levels=LEVELS).mean())
    return np.array(scores)


def _usual(seeds: Seeds, *, task: str, which: str) -> NDArray:
    """The same of one model, or of the average of all; crossed quantiles are sorted."""
    scores = []
    for s in range(len(seeds)):
        _, (_, target), _, outside = _prepared(seeds.one(s), task)
        kind = {"linear": 0, "boosted": 1, "nearest": 2}
        q = outside.mean(1) if which == "average" else outside[:, kind[which]]
        scores.append(weighted_interval_score(np.sort(q, axis=1), target, levels=LEVELS).mean())
    return np.array(scores)


def _compare(seeds: Seeds, task: str) -> Arms:
    ours = tune(partial(_aggregated, task=task), METHOD, seeds, better="lower")
    theirs = tune(partial(_usual, task=task), BASELINE, seeds, better="lower")
    every = {b["which"]: float(_usual(seeds, task=task, **b).mean()) for b in BASELINE}
    details = {"method": ours, "baseline": theirs, "mean score of each baseline": every}
    return Arms(_aggregated(seeds, task=task, **ours), _usual(seeds, task=task, **theirs), details)


@claim(
    says="Where different models are best in different places, the local fine mix scores at least 2% lower than the"
    " best of the models and their average",
    kind="ratio",
    metric="mean absolute error",
    scale="made-up rows in 3 features, 400 for training, 3 models at 5 levels, weights MLP 3-32-32-75; 4 settings each",
    margin=0.98,
)
def mix_beats_models_and_average(seeds: Seeds) -> Arms:
    return _compare(seeds, "made up")


@claim(
    says="On real data the local fine mix scores at least 2% lower than the best of the models and their average",
    kind="ratio",
    metric="mean absolute error",
    scale="diabetes, 309 rows for training, 3 models at 5 levels, weights MLP 10-32-32-75; 4 settings each",
    margin=0.98,
)
def mix_beats_models_and_average_on_diabetes(seeds: Seeds) -> Arms:
    return _compare(seeds, "diabetes")


@claim(
    says="Weights that depend on input and level score at least 2% lower than one weight for each model",
    kind="ratio",
    metric="mean absolute error",
    scale="as mix_beats_models_and_average; both are trained aggregators, 4 settings each",
    margin=0.98,
)
def local_fine_beats_global_coarse(seeds: Seeds) -> Arms:
    fine = partial(_aggregated, task="made up")
    coarse = partial(_aggregated, task="made up", resolution="coarse", local=False)
    slow = [{"lr": lr, "steps": steps} for lr in (0.01, 0.03) for steps in (150, 500)]
    ours, theirs = tune(fine, METHOD, seeds, better="lower"), tune(coarse, slow, seeds, better="lower")
    return Arms(fine(seeds, **ours), coarse(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Sorting or pooling quantiles that cross raises no row's weighted interval score",
    kind="exact",
    metric="deviation",
    scale="normal numbers as quantiles and targets: 2000 rows at 5, 9 and 19 levels; the largest rise a seed",
    tolerance=1e-9,
)
def mending_raises_no_score(seeds: Seeds) -> Arms:
    rises = np.zeros((len(seeds), 3, 2))
    for s, rng in enumerate(seeds.numpy("crossed")):
        for k, count in enumerate((5, 9, 19)):
            levels = np.arange(1, count + 1) / (count + 1)
            q, y = rng.normal(size=(2000, count)), 2 * rng.normal(size=2000)
            before = weighted_interval_score(q, y, levels=levels)
            for m, mended in enumerate((np.sort(q, axis=1), isotonic_quantiles(q))):
                rises[s, k, m] = (weighted_interval_score(mended, y, levels=levels) - before).max().clip(min=0)
    return Arms(rises.max((1, 2)))


@claim(
    says="After the shift, pairs at 5% and 95% cover the nine tenths that were asked for, no less and hardly more",
    kind="equality",
    metric="coverage",
    scale="made-up rows, linear quantiles by 400, 1000 others split 50 times into 200 for the shift and 800 for test",
)
def pairs_cover_as_asked(seeds: Seeds) -> Arms:
    covered = []
    for s, rng in enumerate(seeds.numpy("resplit")):
        _, (_, y), _, outside = _prepared(seeds.one(s), "made up")
        q, n, hits = outside[:, 0], len(y) // 5, []
        for _ in range(seeds.few(50, smoke=2)):
            order = rng.permutation(len(y))
            held_out, rest = order[:n], order[n:]
            shifted = conformalize_quantiles(q[held_out], y[held_out], q[rest], levels=LEVELS)
            hits.append(((shifted[:, 0] <= y[rest]) & (y[rest] <= shifted[:, -1])).mean())
        covered.append(100 * np.mean(hits))
    return Arms(np.array(covered), np.full(len(seeds), 90.0))
