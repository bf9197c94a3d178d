"""Detectors that look at the target's tails and at the errors of the baseline."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import norm
from sklearn.decomposition import PCA

from lossary.compare.encode import Encoder
from lossary.compare.profile.finding import Measure
from lossary.compare.profile.fits import MOST_ROWS, Floats, Seen

EXCESS_KURTOSIS = 1.0
UNEVEN = 1.5  # the error where it is largest that many times that where it is smallest
OVERCONFIDENCE = 0.02  # by which confidence exceeds the share that is right
GAP = 0.02  # by which the share that is wrong in a group exceeds that in all rows
RELATIVE_GAP = 0.1  # the same of a real target's mean error, as a share of it
FEWEST_OF_GROUP, MOST_GROUPS = 10, 500
RESAMPLES, PERMUTATIONS = 1_000, 999
BINS = 10


def target_tails(seen: Seen) -> Measure | None:
    """Excess kurtosis of a real target."""
    if seen.problem.task != "real" or not np.ptp(seen.problem.target):
        return None
    rng, n = seen.rng("target tails"), len(seen.problem)
    y = seen.problem.target.astype(np.float64)[rng.permutation(n)[:MOST_ROWS]]
    return _tails(
        y,
        rng,
        title="Heavy tails of the target",
        of="" if len(y) == n else f" on {len(y):,} of {n:,} rows",
        alarm="A few extreme values carry much of the squared error. This is the target; the errors of a good model "
        "may have lighter tails.",
        calm="No few values carry the squared error. This is the target; the errors of a model may have other tails.",
    )


def residual_tails(seen: Seen) -> Measure | None:
    """Excess kurtosis of the baseline's residuals, out of fold."""
    if seen.problem.task != "real":
        return None
    fits = seen.fits
    residual = fits.target - fits.prediction
    if not np.ptp(residual):
        return None
    return _tails(
        residual,
        seen.rng("residual tails"),
        title="Heavy tails of the errors",
        of=f", errors of {fits.baseline} on rows that it was not fitted on{fits.of(len(seen.problem))}",
        alarm=f"A few rows carry much of the squared error that {fits.baseline} makes: a loss that grows less than the "
        "square would not hang on them.",
        calm=f"No few rows carry the squared error that {fits.baseline} makes.",
    )


def _tails(values: Floats, rng: np.random.Generator, *, title: str, of: str, alarm: str, calm: str) -> Measure:
    """Excess kurtosis, percentile interval over bootstrap samples."""
    samples = np.array([_kurtosis(rng.choice(values, len(values))) for _ in range(RESAMPLES)])
    low, high = np.nanquantile(samples, (0.025, 0.975)).tolist()
    normal = ndtri((np.arange(len(values)) + 0.5) / len(values))
    shown = np.unique(np.linspace(0, len(values) - 1, min(len(values), 120)).round().astype(int))
    standard = np.sort((values - values.mean()) / abs(values - values.mean()).max())
    standard /= standard.std()
    return Measure(
        symptom="heavy-tails",
        title=title,
        value=_kurtosis(values),
        low=low,
        high=high,
        unit="excess kurtosis",
        method=f"Excess kurtosis (normal 0, Laplace 3), bootstrap interval{of}; raised above {EXCESS_KURTOSIS:g}",
        p=min(1.0, 2 * float((1 + (samples <= EXCESS_KURTOSIS).sum()) / (1 + RESAMPLES))),
        alarm=alarm,
        calm=calm,
        picture={
            "kind": "quantiles",
            "x": "a normal law's quantiles",
            "y": "deviations from the mean",
            "points": np.column_stack([normal[shown], standard[shown]]).tolist(),
        },
    )


def _kurtosis(values: Floats) -> float:
    """Fourth central moment over the squared second, less 3; nan where all values are equal."""
    away = values - values.mean()
    widest = abs(away).max()
    if not widest:
        return math.nan
    squares = (away / widest) ** 2  # in [0, 1], lest the fourth power overflow
    return float((squares**2).mean() / squares.mean() ** 2 - 3)


def uneven_errors(seen: Seen) -> Measure | None:
    """How much larger the baseline's errors are where they are expected to be large than where small.

    A Breusch-Pagan test as Koenker has it, R2 of the residuals' sizes regressed on the prediction, its square and the
    columns, but of absolute residuals (Glejser), which a few large ones do not drown, and by permutation of the
    residuals. The value is the mean size in the fifth of the rows with the largest expected over that in the fifth with
    the smallest, expected by the same regression, out of fold again.
    """
    if seen.problem.task != "real":
        return None
    fits, rng = seen.fits, seen.rng("uneven errors")
    residual, n = fits.target - fits.prediction, len(fits.target)
    x = Encoder().fit(fits.problem.features).transform(fits.problem.features).astype(float)
    most = max(1, n // 20)
    if x.shape[1] > most:
        x = PCA(most, svd_solver="randomized", random_state=0).fit_transform(x)
    x = np.column_stack([np.ones(n), fits.prediction, fits.prediction**2, x])
    size = abs(residual)
    if not size.any():
        return None
    axes = np.linalg.svd(x, full_matrices=False)[0][:, : np.linalg.matrix_rank(x)]
    dealt = np.column_stack([size, *(rng.permutation(size) for _ in range(PERMUTATIONS))]) - size.mean()
    explained = ((axes.T @ dealt) ** 2).sum(0)
    uneven = float((1 + (explained[1:] >= explained[0] * (1 - 1e-9)).sum()) / (1 + PERMUTATIONS))

    expected, fold = np.zeros(n), rng.permutation(n) % 5
    for number in range(5):
        train, test = fold != number, fold == number
        expected[test] = x[test] @ np.linalg.lstsq(x[train], size[train], rcond=1e-6)[0]
    fifths = np.array_split(np.argsort(expected, kind="stable"), 5)
    means = np.maximum([size[rows].mean() for rows in fifths], 1e-3 * size.mean())  # none, where values repeat
    errors = np.array([size[rows].std(ddof=1) / np.sqrt(len(rows)) for rows in fifths])
    ratio = float(means[-1] / means[0])
    off = max(1e-9, float(np.hypot(errors[0] / means[0], errors[-1] / means[-1])))
    return Measure(
        symptom="uncertainty",
        title="Uneven errors",
        value=ratio,
        low=ratio * math.exp(-1.96 * off),
        high=ratio * math.exp(1.96 * off),
        unit="times the error, noisiest to quietest fifth",
        method=f"Koenker's Breusch-Pagan test on the absolute residuals (Glejser) of {fits.baseline} on rows that it "
        f"was not fitted on{fits.of(len(seen.problem))}, by {PERMUTATIONS} permutations; their mean in fifths of the "
        f"rows by its expectation, interval by the delta method; raised above {UNEVEN:g}",
        p=max(uneven, min(1.0, 2 * float(norm.sf(math.log(ratio / UNEVEN) / off)))),
        alarm="The columns tell where errors will be large. One interval for all rows would be too wide for some and "
        "too narrow for others: predict the spread too, or weigh by it.",
        calm="Errors are about as large everywhere, as far as the columns tell.",
        picture={
            "kind": "curve",
            "x": "fifths of the rows, by the error that is expected",
            "y": "mean error, all rows 1",
            "points": [
                [place + 1, *((mean + side * error) / size.mean() for side in (0, -1.96, 1.96))]
                for place, (mean, error) in enumerate(zip(means.tolist(), errors.tolist(), strict=True))
            ],
        },
    )


def calibration(seen: Seen) -> Measure | None:
    """Expected calibration error of the baseline, ten bins of equally many predictions, out of fold.

    It is held against the values that a calibrated model of the same confidences would have by chance, 999 draws of
    what is right. The alarm is for overconfidence alone: by independent units, the mean of confidence less right must
    exceed `OVERCONFIDENCE`, and the error must exceed chance.
    """
    if seen.problem.task == "real":
        return None
    fits, rng = seen.fits, seen.rng("calibration")
    if seen.problem.task == "multilabel":
        sure, right = np.maximum(fits.prediction, 1 - fits.prediction), (fits.prediction > 0.5) == fits.target
    else:
        sure, right = fits.prediction.max(1, keepdims=True), (fits.prediction.argmax(1) == fits.target)[:, None]
    rank = np.argsort(np.argsort(sure, axis=None, kind="stable")).reshape(sure.shape)
    bins = rank * BINS // sure.size
    gap = sure - right
    by_unit = np.zeros((int(fits.units.max()) + 1, BINS))
    np.add.at(by_unit, (np.repeat(fits.units, sure.shape[1]), bins.ravel()), gap.ravel())
    value = float(abs(by_unit.sum(0)).sum() / sure.size)

    resampled = rng.multinomial(len(by_unit), np.full(len(by_unit), 1 / len(by_unit)), size=RESAMPLES) @ by_unit
    drawn = abs(resampled).sum(1) / sure.size
    low, high = np.quantile(drawn - (drawn.mean() - value), (0.025, 0.975)).tolist()  # resampling adds to the error
    by_chance = np.array([_by_chance(sure, bins, rng) for _ in range(PERMUTATIONS)])
    beyond = float((1 + (by_chance >= value).sum()) / (1 + PERMUTATIONS))
    over, units = by_unit.sum(1), len(by_unit)
    excess = float(gap.mean())
    error = float(np.sqrt(((over - excess * np.bincount(fits.units) * sure.shape[1]) ** 2).sum())) / sure.size
    surer = 2 * float(norm.sf((excess - OVERCONFIDENCE) / max(error, 1e-12)))
    told = (
        f"The mean confidence of {fits.baseline} is {sure.mean():.0%}, and {right.mean():.0%} are right; a calibrated "
        f"model would show an error of {by_chance.mean():.1%} by chance. "
    )
    return Measure(
        symptom="overconfidence",
        title="Calibration of the baseline",
        value=value,
        low=max(0.0, low),
        high=high,
        unit="share by which confidence is off",
        method=f"Expected calibration error of {fits.baseline}, {BINS} bins, on rows that it was not fitted on"
        f"{fits.of(len(seen.problem))}, bootstrap interval over {units:,} independent units; raised where confidence "
        f"exceeds what is right by more than {100 * OVERCONFIDENCE:g} points and the error exceeds chance",
        p=min(1.0, max(beyond, surer)),
        alarm=f"{told}It promises more than it keeps, and richer models mostly do so more: calibrate, or use a loss "
        "that does not reward certainty.",
        calm=told
        + (
            "It is rather too modest, which calibration would mend."
            if beyond <= 0.05 and excess < 0
            else "Its probabilities can be taken at their word, as far as this many rows tell."
        ),
        picture={
            "kind": "reliability",
            "lines": {
                fits.baseline: [
                    {"predicted": float(sure[bins == place].mean()), "observed": float(right[bins == place].mean())}
                    for place in range(BINS)
                    if (bins == place).any()
                ]
            },
        },
    )


def _by_chance(sure: Floats, bins: NDArray[np.int64], rng: np.random.Generator) -> float:
    """The calibration error of one draw in which every confidence is kept."""
    right = rng.random(sure.shape) < sure
    return float(abs(np.bincount(bins.ravel(), (sure - right).ravel(), BINS)).sum() / sure.size)


def group_gaps(seen: Seen) -> Measure | str | None:
    """How much larger the baseline's error is in its worst group than in all rows.

    No group is fitted on and predicted at once, for folds keep groups whole. Intervals hold for all groups together:
    the difference of each, in deviations, is held against the furthest of all groups when errors are dealt out
    anew, `PERMUTATIONS` times.
    """
    if seen.problem.group is None:
        return None
    fits, rng = seen.fits, seen.rng("group gaps")
    _, first, group, counts = np.unique(fits.problem.group, return_index=True, return_inverse=True, return_counts=True)
    large = np.flatnonzero(counts >= FEWEST_OF_GROUP)
    if len(large) < 2:
        return f"Gaps between groups were not measured: fewer than two groups have {FEWEST_OF_GROUP} rows or more."
    large = large[np.argsort(-counts[large], kind="stable")[:MOST_GROUPS]]
    relative = seen.problem.task == "real"
    loss = fits.error(fits.prediction)
    loss = loss / (loss.mean() or 1.0) if relative else loss
    threshold = RELATIVE_GAP if relative else GAP
    spread = np.maximum(loss.std() * np.sqrt(np.maximum(1 / counts[large] - 1 / len(loss), 0)), 1e-12)

    def gaps(values: Floats) -> Floats:
        return np.bincount(group, values)[large] / counts[large] - values.mean()

    gap = gaps(loss)
    furthest = np.array([abs(gaps(rng.permutation(loss)) / spread).max() for _ in range(PERMUTATIONS)])
    p = float((1 + (furthest >= ((gap - threshold) / spread).max()).sum()) / (1 + PERMUTATIONS))
    low, high = (gap + side * float(np.quantile(furthest, 0.95)) * spread for side in (-1, 1))
    order = np.argsort(-gap, kind="stable")
    names = [f"of row {seen.name(fits.rows[first[k]])}" for k in large]
    worst = int(order[0])
    shown = order if len(order) <= 12 else np.concatenate([order[:9], order[-3:]])
    size = f"The group {names[worst]} ({counts[large[worst]]:,} rows)"
    more = f"{gap[worst]:.0%} more than the mean" if relative else f"{100 * gap[worst]:.1f} points more than all rows"
    return Measure(
        symptom="worst-group",
        title="Group gaps",
        value=float(gap[worst]),
        low=float(low[worst]),
        high=float(high[worst]),
        unit="share of the mean error beyond it, worst group"
        if relative
        else "share of rows wrong beyond the mean, worst group",
        method=f"Error of {fits.baseline} in {len(large):,} groups of at least {FEWEST_OF_GROUP} rows, none of which "
        f"it was fitted on{fits.of(len(seen.problem))}; intervals that hold for all groups together, by "
        f"{PERMUTATIONS} permutations; raised above {100 * threshold:g}{'%' if relative else ' points'}",
        p=p,
        alarm=f"{size} is predicted worst: {more}. A mean over rows hides that: look at the worst group's error, and "
        "try what is for it.",
        calm=f"{size} comes out worst, {more}, as the worst of {len(large):,} groups may by chance or by little.",
        picture={
            "kind": "intervals",
            "names": [names[k] for k in shown],
            "values": gap[shown].tolist(),
            "lows": low[shown].tolist(),
            "highs": high[shown].tolist(),
            "x": "error beyond the mean" + ("" if relative else ", share wrong"),
        },
    )
