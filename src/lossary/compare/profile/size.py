"""Is there more data than it takes, or less? Both by the baseline's learning curve."""

import numpy as np
from scipy.special import stdtr

from lossary.compare.profile.finding import Measure
from lossary.compare.profile.fits import FOLDS, Floats, Seen

GAIN = 0.02  # share wrong by which the error falls as the rows double
RELATIVE_GAIN = 0.05  # the same of a real target's mean error, as a share of it
RESAMPLES = 1_000


def redundancy(seen: Seen) -> Measure:
    """How many of the rows the baseline could do without.

    By the rule of one standard error: the smallest share of the rows, drawn at random, from which on the error stays
    within one standard error of that on all rows. The interval is that of the same rule on resampled rows.
    """
    fits = seen.fits
    shares, predictions = fits.curve
    errors = fits.square(predictions).mean(1)
    units = int(fits.units.max()) + 1
    sums = np.array([np.bincount(fits.units, every, units) for every in errors])
    sizes = np.bincount(fits.units, minlength=units)
    rng = seen.rng("redundancy")
    drawn = rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    resampled = (drawn @ sums.T) / (drawn @ sizes)[:, None]
    error = float(resampled[:, -1].std())
    means = errors.mean(1)
    value = 1 - shares[_enough(means, error)]
    dropped = [1 - shares[_enough(every, error)] for every in resampled]
    low, high = np.quantile(dropped, (0.025, 0.975), method="nearest").tolist()
    what = "squared error" if seen.problem.task == "real" else "Brier score"
    return Measure(
        symptom="training-cost",
        title="Rows to spare",
        value=value,
        low=low,
        high=high,
        unit="share of rows",
        method=f"Learning curve of {fits.baseline}, 5 folds{fits.of(len(seen.problem))}: the smallest share, drawn at "
        f"random, from which on the {what} is within one standard error of that on all rows, bootstrap interval over "
        "rows; no alarm",
        p=None,
        alarm="",
        calm=f"The {what} of {fits.baseline} on {1 - value:.0%} of the rows is within one standard error of that on "
        "all. "
        + (
            "Trials could be run on fewer; a richer model may make more of them."
            if low > 0
            else "Whether any can be spared so many rows do not settle."
            if high > 0
            else "Every row counts."
        ),
        picture=_curve(shares, errors, what),
    )


def few_labels(seen: Seen) -> Measure:
    """By how much the baseline's error fell when its rows doubled, from half of them to all."""
    from lossary.compare.statistics import over_cells  # not above: it imports the records of this package

    fits = seen.fits
    shares, predictions = fits.curve
    errors = fits.error(predictions)
    half, whole = errors[shares.index(0.5)], errors[-1]
    relative = seen.problem.task == "real"
    what = "mean error, deviations" if relative else "share wrong"
    scale, threshold = (float(whole.mean()) or 1.0, RELATIVE_GAIN) if relative else (1.0, GAIN)
    fall = [
        float((half - whole)[repeat, part.test].mean()) / scale
        for repeat, parts in enumerate(fits.parts)
        for part in parts
    ]
    gain = over_cells(np.array(fall), 1 / (FOLDS - 1))
    beyond = (gain.difference - threshold) / gain.error if gain.error else np.inf * (gain.difference - threshold)
    said = f"From half of the rows to all, the error of {fits.baseline} fell by " + (
        f"{gain.difference:.0%}. " if relative else f"{100 * gain.difference:.1f} points. "
    )
    return Measure(
        symptom="few-labels",
        title="Gain from more rows",
        value=gain.difference,
        low=gain.interval.low,
        high=gain.interval.high,
        unit="share of the mean error, less by twice the data"
        if relative
        else "share of rows, fewer wrong by twice the data",
        method=f"Learning curve of {fits.baseline}, {len(fall)} folds{fits.of(len(seen.problem))}, t interval "
        f"corrected for shared training rows; raised above {100 * threshold:g}{'%' if relative else ' points'}",
        p=min(1.0, 2 * float(stdtr(gain.freedom, -beyond))),
        alarm=f"{said}It is still falling: more labelled rows would help more than most methods, and what learns from "
        "few labels is worth a try.",
        calm=f"{said}No sign that more rows would help much.",
        picture=_curve(shares, errors.mean(1), what),
    )


def _enough(errors: Floats, margin: float) -> int:
    """The first place from which on all errors are within the margin of the last one."""
    beyond = np.flatnonzero(errors > errors[-1] + margin)
    return int(beyond[-1]) + 1 if len(beyond) else 0


def _curve(shares: tuple[float, ...], errors: Floats, what: str) -> dict[str, object]:
    """The mean error at each share, with the interval of its difference from that on all rows."""
    means = errors.mean(1)
    reach = 1.96 * (errors - errors[-1]).std(1) / np.sqrt(errors.shape[1])
    points = np.column_stack([shares, means, means - reach, means + reach])
    return {"kind": "curve", "x": "share of the rows", "y": what, "points": points.tolist()}
