"""Throwing away majority data: does it help the worst group, and is it the tails that decide?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim, tune
from lossary.weighting import BalancedSubsample, relative_displacement, tail_asymmetry_experiment

SOFT = (0.0001, 0.001, 0.01, 0.1)


def _one_dimension(seeds: Seeds, noise: Any) -> list[dict[str, float]]:
    """Two groups of 5000 and 50 points on a line, 1000 draws for each seed."""
    draws = seeds.few(1000, smoke=50)
    return [tail_asymmetry_experiment(noise, draws=draws, generator=rng) for rng in seeds.numpy("tails")]


def _column(found: list[dict[str, float]], name: str) -> NDArray:
    return np.array([row[name] for row in found])


@claim(
    says="With tails of Student's t3, subsampling at least halves the worst group's error",
    kind="ratio",
    metric="error rate",
    margin=0.5,
    scale="max-margin on a line, 5000 against 50 points, gap at the median separable one, 1000 draws a seed",
)
def subsampling_halves_the_error_with_heavy_tails(seeds: Seeds) -> Arms:
    from scipy import stats

    found = _one_dimension(seeds, stats.t(3))
    lean = {name: _column(found, name).mean() for name in ("displacement", "subsampled displacement")}
    return Arms(100 * _column(found, "subsampled error"), 100 * _column(found, "error"), lean)


@claim(
    says="Of the worst group's error, subsampling leaves at most half as large a share with t3 as with uniform noise",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="max-margin on a line, 5000 against 50 points, gap at the median separable one, 1000 draws a seed",
)
def tails_decide_what_subsampling_gains(seeds: Seeds) -> Arms:
    from scipy import stats

    kinds = {
        "uniform": stats.uniform(-1, 2),
        "normal": stats.norm(),
        "laplace": stats.laplace(),
        "t6": stats.t(6),
        "t3": stats.t(3),
    }
    found = {name: _one_dimension(seeds, noise) for name, noise in kinds.items()}
    left = {name: _column(rows, "subsampled error") / _column(rows, "error") for name, rows in found.items()}
    lean = {f"displacement {name}": _column(rows, "displacement").mean() for name, rows in found.items()}
    return Arms(left["t3"], left["uniform"], {**lean, **{f"left {name}": v.mean() for name, v in left.items()}})


@claim(
    says="The displacement tends to (r^(1/a) - 1) / (r^(1/a) + 1) for tails of index a, and to 0 for bounded noise",
    kind="exact",
    metric="deviation",
    tolerance=1e-3,
    scale="medians of the extremes of 10^15 and r 10^15 draws, r 10 and 100; Student's t of index 2, 3, 4 and uniform",
)
def displacement_has_its_limit(seeds: Seeds) -> Arms:
    from scipy import stats

    size, off = 10**15, []
    for ratio in (10, 100):
        for index in (2, 3, 4):
            root = ratio ** (1 / index)
            found = relative_displacement(stats.t(index), majority=ratio * size, minority=size)
            off.append(found - (root - 1) / (root + 1))
        off.append(relative_displacement(stats.uniform(-1, 2), majority=ratio * size, minority=size))
    return Arms(np.array(off))


def _linear(seeds: Seeds, *, arm: str, cost: float) -> NDArray:
    """Worst-group accuracy in percent of a linear SVM in 20 dimensions, t3 noise, groups 3 from the origin, per seed.

    "subsampled" discards rows of the larger class, "weighted" weighs the classes inversely to their size.
    """
    import torch
    from sklearn.svm import SVC

    scores = []
    for rng, generator in zip(seeds.numpy("rows"), seeds.torch("subsample")):
        y = np.repeat([0, 1], (seeds.few(1000, smoke=40), seeds.few(20, smoke=8)))
        x, new = rng.standard_t(3, (len(y), 20)), rng.standard_t(3, (seeds.few(20000, smoke=200), 20))
        x[:, 0] += np.where(y == 1, 3.0, -3.0)
        kept = np.arange(len(y))
        if arm == "subsampled":
            kept = BalancedSubsample(torch.from_numpy(y), generator=generator).kept.numpy()
        svm = SVC(kernel="linear", C=cost, class_weight="balanced").fit(x[kept], y[kept])
        right = []
        for centre, sign in ((-3.0, -1.0), (3.0, 1.0)):
            shifted = new + np.eye(1, 20) * centre
            right.append(100 * np.mean(sign * svm.decision_function(shifted) > 0))
        scores.append(min(right))
    return np.array(scores)


@claim(
    says="With heavy tails a nearly hard margin in 20 dimensions serves the worst class better after subsampling",
    kind="superiority",
    metric="worst-group accuracy",
    scale="20 dimensions, Student's t3 noise, 1000 against 20 rows, linear SVM with C 10 and balanced class weights",
)
def subsampling_helps_in_20_dimensions(seeds: Seeds) -> Arms:
    soft = {}
    for arm in ("subsampled", "weighted"):
        chosen = tune(_linear, [{"arm": arm, "cost": cost} for cost in SOFT], seeds)
        soft[arm] = {**chosen, "mean": _linear(seeds, **chosen).mean()}
    method, baseline = (_linear(seeds, arm=arm, cost=10.0) for arm in ("subsampled", "weighted"))
    return Arms(method, baseline, {"with a soft margin": soft})
