"""Do the rows to learn from and those to come differ? A classifier two-sample test."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from lossary.compare.encode import Encoder
from lossary.compare.profile.finding import Measure
from lossary.compare.profile.fits import Floats, Seen

PERMUTATIONS = 999
FEWEST_ROWS, MOST_ROWS = 30, 1_000  # of each side
MOST_COMPONENTS = 50
MOST_COLUMNS = 300  # with more, those that carry the shift are not named
WAVES = 100
FOLDS = 5


def shift(seen: Seen) -> Measure | str | None:
    """How well a classifier tells search rows from test rows, or with a time early rows from late ones, by columns.

    The classifier is ridge regression on the side, over the standardised columns, their squares and `WAVES` random
    cosines of them. Its AUROC is measured out of fold. Sides are then dealt out anew, and the classifier is fitted
    anew, `PERMUTATIONS` times: p = (1 + b) / (1 + B) with b of the B as good or better. No target is used. Groups and
    copies give one row each.
    """
    rng, problem = seen.rng("shift"), seen.problem
    if seen.arrivals is not None:
        first, second = _single(problem.units, rng), _single(seen.arrivals.units, rng)
        frames = problem.features.iloc[first], seen.arrivals.features.iloc[second]
        sides = "search rows", "test rows"
    elif problem.time is not None:
        rows, sides = _single(problem.units, rng), ("early rows", "late rows")
        late = problem.time[rows] > np.median(problem.time[rows])
        frames = problem.features.iloc[rows[~late]], problem.features.iloc[rows[late]]
    else:
        return None
    frames = [frame.iloc[rng.permutation(len(frame))[:MOST_ROWS]] for frame in frames]
    counts = [len(frame) for frame in frames]
    if min(counts) < FEWEST_ROWS:
        return (
            f"Shift between {sides[0]} and {sides[1]} was not measured: {min(counts)} independent rows on one side, at "
            f"least {FEWEST_ROWS} are taken."
        )
    frame = pd.concat(frames, ignore_index=True)
    side = np.repeat([0.0, 1.0], counts)
    dealt = np.column_stack([side, *(rng.permutation(side) for _ in range(PERMUTATIONS))])
    areas = _areas(_inputs(frame, rng), dealt, rng)
    value, p = float(areas[0]), float((1 + (areas[1:] >= areas[0]).sum()) / (1 + PERMUTATIONS))
    error = _area_error(value, *counts)
    carriers, picture = _columns(frame, dealt)
    told = f"{sides[0].capitalize()} and {sides[1]}"
    by = (
        f"By itself, each of these tells them apart: {', '.join(map(repr, carriers[:5]))}."
        if carriers
        else "No single column tells them apart; it is in how they go together."
    )
    return Measure(
        symptom="train-test-shift",
        title="Shift between " + " and ".join(sides),
        value=value,
        low=max(0.0, value - 1.96 * error),
        high=min(1.0, value + 1.96 * error),
        unit="AUROC of telling them apart",
        method=f"Classifier two-sample test (ridge on columns, squares and {WAVES} random cosines, 5 folds) on "
        f"{counts[0]:,} {sides[0]} and {counts[1]:,} {sides[1]}, refitted in each of {PERMUTATIONS} permutations; "
        "their features alone, no target; Hanley-McNeil interval, 0.5 is chance",
        p=p,
        alarm=f"{told} can be told apart. {by} A score on rows like those to learn from may not hold on those to come: "
        "look at these columns, weigh or adapt.",
        calm=f"{told} cannot be told apart by their columns. Whether the same columns mean the same targets, this "
        "does not say.",
        picture=picture,
    )


def _single(units: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """One row of each unit, at random."""
    order = rng.permutation(len(units))
    return np.sort(order[np.unique(units[order], return_index=True)[1]])


def _inputs(frame: pd.DataFrame, rng: np.random.Generator) -> Floats:
    """What the classifier sees, standardised; made without a look at the sides."""
    x = np.clip(StandardScaler().fit_transform(Encoder().fit(frame).transform(frame).astype(float)), -5, 5)
    if x.shape[1] > MOST_COMPONENTS:
        x = PCA(min(MOST_COMPONENTS, len(x) // 2), svd_solver="randomized", random_state=0).fit_transform(x)
    some = rng.permutation(len(x))[:200]
    apart = ((x[some, None] - x[some]) ** 2).sum(2)
    width = np.sqrt(np.median(apart[apart > 0])) if apart.any() else 1.0
    waves = np.cos(x @ rng.normal(0, 1 / width, (x.shape[1], WAVES)) + rng.uniform(0, 2 * np.pi, WAVES))
    return StandardScaler().fit_transform(np.hstack([x, x**2, waves]))


def _areas(x: Floats, dealt: Floats, rng: np.random.Generator) -> Floats:
    """AUROC of the classifier for each column of `dealt`, mean over folds."""
    fold = rng.permutation(len(x)) % FOLDS
    areas = []
    for number in range(FOLDS):
        train, test = x[fold != number], x[fold == number]
        centred = dealt[fold != number] - dealt[fold != number].mean(0)
        gram = train.T @ train + 0.1 * len(train) * np.eye(x.shape[1])
        rank = rankdata(test @ np.linalg.solve(gram, train.T @ centred), axis=0)
        late = dealt[fold == number]
        ones = late.sum(0)
        zeros = len(late) - ones
        with np.errstate(invalid="ignore"):
            areas.append(((rank * late).sum(0) - ones * (ones + 1) / 2) / (ones * zeros))
    return np.nanmean(areas, axis=0)


def _area_error(area: float, first: int, second: int) -> float:
    """Hanley and McNeil's standard error."""
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (first - 1) * (one - area**2) + (second - 1) * (two - area**2)
    return float(np.sqrt(max(spread, 0.0) / (first * second)))


def _columns(frame: pd.DataFrame, dealt: Floats) -> tuple[list[str], dict[str, object]]:
    """The columns that by themselves differ between the sides, at 5% over all, and how far each does.

    Numbers by the Kolmogorov-Smirnov distance, text by the share of values that would have to change (total
    variation); each in deviations from what the permutations give, held against the furthest of all columns in each.
    """
    if len(frame.columns) > MOST_COLUMNS:
        return [], {}
    weight = dealt / dealt.sum(0) - (1 - dealt) / (1 - dealt).sum(0)
    distances = np.array([_distance(frame[column], weight) for column in frame])
    spread = distances.std(1)
    spread[spread == 0] = np.inf
    off = (distances - distances.mean(1, keepdims=True)) / spread[:, None]
    furthest = float(np.quantile(off[:, 1:].max(0), 0.95))
    order = np.argsort(-off[:, 0], kind="stable")
    names = [str(column) for column in frame]
    limits = distances.mean(1) + furthest * np.where(np.isfinite(spread), spread, 0.0)
    shown = order[:10]
    picture = {
        "kind": "limits",
        "names": [names[k] for k in shown],
        "values": distances[shown, 0].tolist(),
        "limits": limits[shown].tolist(),
        "x": "distance between the sides",
    }
    return [names[k] for k in order if off[k, 0] > furthest], picture


def _distance(values: pd.Series, weight: Floats) -> Floats:
    """For each dealing, how far the column's values on one side are from those on the other, 0 to 1."""
    ordered = values.dtype.kind in "biufM"
    codes = pd.factorize(values, sort=ordered)[0]  # missing is a value of its own, -1
    order = np.argsort(codes, kind="stable")
    first = np.flatnonzero(np.diff(codes[order], prepend=-2))
    moved = np.add.reduceat(weight[order], first, axis=0)
    return abs(moved.cumsum(0)).max(0) if ordered else abs(moved).sum(0) / 2
