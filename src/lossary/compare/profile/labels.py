"""Detectors that look at the labels: how many of each, which contradict the columns, and which are missing."""

import re

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest, norm

from lossary.compare.profile.finding import Measure
from lossary.compare.profile.fits import Floats, Seen

RATIO = 3.0  # the largest class that many times the smallest: imbalance
DISAGREEMENT = 0.03  # share of labels that overlap cannot explain
MISSING = 0.1  # share of a label's rows that do not carry it
UNLABELLED = 0.05  # share of rows without a target
LEFT_OUT = re.compile(r"([\d,]+) rows? left out because the target is missing")  # a note of `load`
FEWEST_POSITIVES = 30
MOST_POSITIVES = 10  # labels whose missing is measured
WITHIN = 1.35  # of the best log-likelihood: a one-sided 95% bound


def imbalance(seen: Seen) -> Measure | None:
    """Rows of the largest class over rows of the smallest, or of the commonest label over the rarest.

    The interval follows from Wilson's for the share s of the smallest among these two classes, ratio = (1 - s) / s,
    at 95% over all pairs of a class with the largest (Bonferroni).
    """
    problem = seen.problem
    if problem.task == "real":
        return None
    several = problem.task == "multilabel"
    counts = problem.target.sum(0) if several else np.bincount(problem.target, minlength=len(problem.classes))
    small, large = int(counts.min()), int(counts.max())
    pairs, n = len(counts) - 1, small + large
    if not pairs:
        return None
    share = binomtest(small, n).proportion_ci(1 - 0.05 / pairs, method="wilson")
    limit = 1 / (1 + RATIO)
    off = (small / n - limit) / np.sqrt(limit * (1 - limit) / n)  # what Wilson's interval inverts
    fewest, most = problem.classes[counts.argmin()], problem.classes[counts.argmax()]
    what, kind = ("label", "labels") if several else ("class", "classes")
    size = f"{most!r} has {large:,} rows and {fewest!r} {small:,}. "
    return Measure(
        symptom="class-imbalance",
        title="Label imbalance" if several else "Class imbalance",
        value=large / small if small else np.inf,
        low=max(1.0, 1 / share.high - 1),
        high=1 / share.low - 1 if share.low else np.inf,
        unit="commonest to rarest label" if several else "largest to smallest class",
        method=f"Ratio of {what} counts, Wilson interval (95% over all {kind}); raised above {RATIO:g}",
        p=min(1.0, 2 * pairs * float(norm.cdf(off))),
        alarm=f"{size}A model that is trained on the plain mean loss may give up the small {what}, and accuracy would "
        "hardly show it.",
        calm=f"{size}No {what} is so small that the mean loss would pass it over.",
        picture=_counts(problem.classes, counts),
    )


def disagreement(seen: Seen) -> Measure | None:
    """Share of labels that disagree with what two families of models say of rows they were not fitted on.

    The *high* end is what confident learning counts off the diagonal of its joint (Northcutt et al. 2021, by
    cleanlab), at most the family's own error. Where classes merely overlap it counts that too, so the value and
    the *low* end are what overlap cannot explain (`overlap_misfit`): the value fits both families together, the low
    end is the lower of their two bounds, the high end the higher of their two counts.
    """
    if seen.problem.task not in ("classes", "ordinal"):
        return None
    fits, label = seen.fits, seen.fits.target
    most = max(_error(probability, label) for family in fits.predictions.values() for probability in family)
    rates = np.append(np.linspace(0, most, 61), DISAGREEMENT)  # the last one for p
    misfits, counts = [], []
    for family in fits.predictions.values():
        pooled = overlap_misfit(np.concatenate(family), np.tile(label, len(family)), rates)
        misfits.append(pooled / len(family))
        counts.append(float(np.mean([_flagged(probability, label) for probability in family])))
    value, low, p = _rate(misfits, rates[:-1], DISAGREEMENT)
    high = max(value, *counts)
    return Measure(
        symptom="label-noise",
        title="Label disagreement",
        value=value,
        low=low,
        high=high,
        unit="share of labels",
        method="Confident learning (cleanlab) and the disagreement that stays where a model is surest, range over "
        f"{' and '.join(fits.predictions)}, 5 folds{fits.of(len(seen.problem))}; raised when the low end is above "
        f"{DISAGREEMENT:.0%}",
        p=p,
        alarm=f"At least {low:.0%} of the labels contradict both models even where these are surest, which classes "
        "that merely overlap would not do: wrong labels, or something that no column tells.",
        calm=f"Up to {high:.0%} of the labels contradict the models, but about as often as overlapping classes would; "
        "this is no evidence of wrong labels, nor does it rule them out.",
        picture={
            "kind": "reliability",
            "lines": {
                name: _agreement(family[0].max(1), family[0].argmax(1) == label)
                for name, family in fits.predictions.items()
            },
        },
    )


def missing_positives(seen: Seen) -> Measure | str | None:
    """Share of the rows to which a label applies that do not carry it.

    Were every label recorded, a label would be there in nearly every row in which a model is surest of it. So the cap
    of the psychometric curve of `overlap_misfit`, on the side of the label alone, estimates the share that is missing,
    if what is missing is missing at random. Of a multilabel target each of the commonest labels has a curve of its own
    and all share the rate; of two classes the rarer one is taken for the label. Wrong labels on the other side too
    make the estimate too low: they are for `disagreement`.
    """
    problem, several = seen.problem, seen.problem.task == "multilabel"
    if not several and (problem.task != "classes" or len(problem.classes) != 2):
        return None
    fits = seen.fits
    if several:
        known = fits.target.sum(0)
        labels = [k for k in np.argsort(-known, kind="stable") if known[k] >= FEWEST_POSITIVES][:MOST_POSITIVES]
        if not labels:
            return f"Missing labels were not measured: every label is in fewer than {FEWEST_POSITIVES} rows."
        names = [problem.classes[fits.labels[k]] for k in labels]
        sides = [(fits.target[:, k] == 1, [family[:, :, k] for family in fits.predictions.values()]) for k in labels]
    else:
        known = np.bincount(fits.target, minlength=2)
        rarer = int(known.argmin())
        if known[rarer] < FEWEST_POSITIVES:
            return f"Missing labels were not measured: a class has fewer than {FEWEST_POSITIVES} rows."
        names = [problem.classes[rarer]]
        sides = [(fits.target == rarer, [family[:, :, rarer] for family in fits.predictions.values()])]
    rates = np.append(np.arange(0, 0.8, 0.03), MISSING)
    curves = np.array([[_capped(family, there, rates) for family in families] for there, families in sides])
    value, low, p = _rate(list(curves.sum(0)), rates[:-1], MISSING)
    high = max(value, *(_bound(misfit[:-1], rates[:-1], last=True) for misfit in curves.sum(0)))
    each = [float(rates[:-1][of_label.sum(0)[:-1].argmin()]) for of_label in curves]
    empty = (
        f"{int((~problem.target.any(1)).sum()):,} of {len(problem):,} rows carry no label at all. " if several else ""
    )
    told = (
        "Whether a label that is absent is missing or does not apply, no single row can tell; the estimate holds if "
        "labels are missing at random and the columns leave no doubt in some rows."
    )
    return Measure(
        symptom="missing-labels",
        title="Missing positives",
        value=value,
        low=low,
        high=high,
        unit="share of positives that are not marked",
        method=f"How often {_named(names)} is absent where {' and '.join(fits.predictions)} are surest of it, lapse "
        f"rate of a psychometric curve, 5 folds{fits.of(len(problem))}; raised when the low end is above {MISSING:.0%}",
        p=p,
        alarm=f"{empty}Even where both models are surest that a label applies, at least {low:.0%} of the rows lack it: "
        f"an absent label is no safe 'no'. {told}",
        calm=f"{empty}Where the models are surest that a label applies, it is not clearly rarer than overlapping "
        f"classes would make it. {told}",
        picture={
            "kind": "limits",
            "names": names,
            "values": each,
            "limits": [MISSING] * len(names),
            "x": "share of positives that are not marked",
        },
    )


def unlabelled(seen: Seen) -> Measure | None:
    """Rows whose target is missing, which loading left out, as a share of all that the file has."""
    gone = sum(int(note[1].replace(",", "")) for note in map(LEFT_OUT.match, seen.problem.notes) if note)
    if not gone:
        return None
    total = gone + seen.total
    share = binomtest(gone, total, UNLABELLED, alternative="greater")
    interval = binomtest(gone, total).proportion_ci(method="wilson")
    said = (
        f"{gone:,} of {total:,} rows have no target and are left out. Nothing here tells whether they differ from the "
        "others: if they do, scores do not speak for them."
    )
    return Measure(
        symptom="missing-labels",
        title="Rows without a target",
        value=gone / total,
        low=interval.low,
        high=interval.high,
        unit="share of rows",
        method=f"Count over all rows of the file, Wilson interval; raised above {UNLABELLED:.0%}",
        p=float(share.pvalue),
        alarm=f"{said} A method that learns from rows without a label could use them.",
        calm=said,
        picture={"kind": "counts", "names": ["with a target", "without"], "values": [seen.total, gone]},
    )


def overlap_misfit(probability: Floats, label: NDArray[np.int64], rates: Floats) -> Floats:
    """How badly overlapping classes explain a model's errors if that share of labels, one of `rates`, is random too.

    Where classes overlap, a surer model is righter: the log-odds s of its first choice predict whether that choice
    is the label, P(right | s) = sigmoid(a + b s) with b >= 0, which tends to 1. Labels that nothing predicts cap it:
    P(right | s) = (1 - rate) sigmoid(a + b s), the psychometric curve with a lapse rate. Returned is the negative
    log-likelihood of each rate at its best a and b: a profile likelihood, whose minimum estimates the rate and whose
    first point within 1.35 of the minimum is a lower 95% bound. Where being surer makes the model no righter, for
    want of informative columns or of overlap, every rate below the error fits alike and that bound is 0.
    """
    return _lapses(probability.max(1), probability.argmax(1) == label, rates)


def _lapses(chance: Floats, hit: NDArray[np.bool_], rates: Floats) -> Floats:
    """The negative log-likelihood of each rate at which `hit` fails however near to 1 its `chance` is."""
    sure = np.clip(chance, 1e-3, 1 - 1e-3)
    score = np.log(sure / (1 - sure))
    bins = np.array_split(np.argsort(score, kind="stable"), min(200, len(hit)))
    x = np.array([score[rows].mean() for rows in bins])
    hits = np.array([hit[rows].sum() for rows in bins])
    misses = np.array([len(rows) for rows in bins]) - hits

    def loss(curve: Floats, rate: float) -> tuple[float, Floats]:
        """Negative log-likelihood and its gradient in (a, b)."""
        inner = np.clip(expit(curve[0] + curve[1] * x), 1e-12, 1 - 1e-12)
        p = (1 - rate) * inner
        slope = (misses * p / (1 - p) - hits) * (1 - inner)
        return -float(hits @ np.log(p) + misses @ np.log1p(-p)), np.array([slope.sum(), slope @ x])

    curve, misfit = np.array([0.0, 1.0]), []
    for rate in rates:  # each starts from the best curve of the rate before it
        fit = minimize(loss, curve, (rate,), "L-BFGS-B", jac=True, bounds=((-50, 50), (0, 50)))
        curve = fit.x
        misfit.append(fit.fun)
    return np.array(misfit)


def _rate(misfits: list[Floats], rates: Floats, threshold: float) -> tuple[float, float, float]:
    """The rate that fits all together; the lowest of their lower bounds; the highest of their p of `threshold`.

    Each of `misfits` has the misfit of the threshold behind those of `rates`.
    """
    value = float(rates[np.argmin(sum(misfits)[:-1])])
    low = min(value, *(_bound(misfit[:-1], rates) for misfit in misfits))
    p = max(
        float(norm.sf(np.sqrt(2 * max(misfit[-1] - misfit[:-1].min(), 0))))
        if rates[misfit[:-1].argmin()] > threshold
        else 1.0
        for misfit in misfits
    )
    return value, low, p


def _bound(misfit: Floats, rates: Floats, *, last: bool = False) -> float:
    within = np.flatnonzero(misfit <= misfit.min() + WITHIN)
    return float(rates[within[-1 if last else 0]])


def _capped(family: Floats, there: NDArray[np.bool_], rates: Floats) -> Floats:
    """The misfit of each rate, all repeats of a family together."""
    return _lapses(np.concatenate(family), np.tile(there, len(family)), rates) / len(family)


def _agreement(sure: Floats, right: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Ten bins of equally many rows: how sure, and how often right."""
    bins = np.array_split(np.argsort(sure, kind="stable"), 10)
    return [
        {"predicted": float(sure[rows].mean()), "observed": float(right[rows].mean())} for rows in bins if len(rows)
    ]


def _flagged(probability: Floats, label: NDArray[np.int64]) -> float:
    """Share of labels that confident learning puts off the diagonal, at most the share that the model gets wrong."""
    from cleanlab.count import estimate_joint

    return min(1 - float(np.trace(estimate_joint(label, probability))), _error(probability, label))


def _error(probability: Floats, label: NDArray[np.int64]) -> float:
    return float((probability.argmax(1) != label).mean())


def _counts(names: tuple[str, ...], counts: NDArray[np.int64]) -> dict[str, object]:
    """The commonest and the rarest, twelve at most, commonest first."""
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= 12 else np.concatenate([order[:6], order[-6:]])
    return {"kind": "counts", "names": [names[k] for k in shown], "values": counts[shown].tolist()}


def _named(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} or one of {len(names) - 3} more"
