"""What is wrong with the data: each finding a number, its interval, how it was measured and what it means."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lossary.compare.encode import Encoder
from lossary.compare.problem import Problem, deal, folds
from lossary.vocabulary import PROFILE_FIELDS

RATIO = 3.0  # the largest class that many times the smallest: imbalance
DISAGREEMENT = 0.03  # share of labels that overlap cannot explain
EXCESS_KURTOSIS = 1.0
MOST_CLASSES = 100  # with more, label disagreement is not measured
MOST_WORK = 20_000_000  # rows x encoded columns x classes of the sample on which label disagreement is measured
MOST_ROWS = 5_000


@dataclass(frozen=True)
class Finding:
    """One symptom (a key of `vocabulary.SYMPTOMS`): value and interval [low, high] in `unit`, and what it means.

    `raised` says that even `low` is beyond the threshold, which `method` states.
    """

    symptom: str
    title: str
    value: float
    low: float
    high: float
    unit: str
    method: str
    means: str
    raised: bool


@dataclass(frozen=True)
class Profile:
    """Facts about the rows that may be looked at, and findings. Counts are None or empty where they do not apply.

    `label_noise` is the value of the finding on label disagreement; `notes` say what was not measured, and why.
    """

    num_samples: int
    num_features: int
    num_classes: int | None
    class_counts: tuple[int, ...]
    num_groups: int | None
    label_noise: float | None
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The fields that fill a part's hyper-parameters by name (`vocabulary.fill`)."""
        return {name: getattr(self, name) for name in PROFILE_FIELDS}


def profile(problem: Problem, rows: NDArray[np.int64], *, seed: int = 0) -> Profile:
    """Measures every symptom on these rows of the problem, and on no others. Every class must be among them."""
    seen = problem.rows(rows)
    measured = [detect(seen, np.random.default_rng((seed, place))) for place, detect in enumerate(DETECTORS)]
    findings = tuple(result for result in measured if isinstance(result, Finding))
    counts = np.bincount(seen.target, minlength=len(seen.classes)).tolist() if seen.classes else ()
    return Profile(
        num_samples=len(seen),
        num_features=Encoder().fit(seen.features).transform(seen.features.head(1)).shape[1],
        num_classes=len(seen.classes) or None,
        class_counts=tuple(counts),
        num_groups=None if seen.group is None else len(np.unique(seen.group)),
        label_noise=next((finding.value for finding in findings if finding.symptom == "label-noise"), None),
        findings=findings,
        notes=tuple(result for result in measured if isinstance(result, str)),
    )


# Detectors: (problem, rng) -> a finding, None where the symptom does not apply, or why it was not measured.


def imbalance(problem: Problem, rng: np.random.Generator) -> Finding | None:
    """Rows of the largest class over rows of the smallest.

    The interval follows from Wilson's for the share s of the smallest among these two classes, ratio = (1 - s) / s,
    at 95% over all pairs of a class with the largest (Bonferroni).
    """
    if problem.task != "classes":
        return None
    counts = np.bincount(problem.target, minlength=len(problem.classes))
    small, large = int(counts.min()), int(counts.max())
    share = binomtest(small, small + large).proportion_ci(1 - 0.05 / (len(counts) - 1), method="wilson")
    low, high = max(1.0, 1 / share.high - 1), 1 / share.low - 1
    fewest, most = problem.classes[counts.argmin()], problem.classes[counts.argmax()]
    raised = low > RATIO
    return Finding(
        symptom="class-imbalance",
        title="Class imbalance",
        value=large / small,
        low=low,
        high=high,
        unit="largest to smallest class",
        method=f"Ratio of class counts, Wilson interval (95% over all classes); raised above {RATIO:g}",
        means=f"{most!r} has {large:,} rows and {fewest!r} {small:,}. "
        + (
            "A model that is trained on the plain mean loss may give up the small class, and accuracy would hardly "
            "show it."
            if raised
            else "No class is so small that the mean loss would pass it over."
        ),
        raised=raised,
    )


def disagreement(problem: Problem, rng: np.random.Generator) -> Finding | str | None:
    """Share of labels that disagree with what two families of models say of rows they were not fitted on.

    The *high* end is what confident learning counts off the diagonal of its joint (Northcutt et al. 2021, by
    cleanlab), at most the family's own error. Where classes merely overlap it counts that too, so the value and
    the *low* end are what overlap cannot explain (`overlap_misfit`): the value fits both families together, the low
    end is the lower of their two bounds, the high end the higher of their two counts.
    """
    if problem.task != "classes":
        return None
    if len(problem.classes) > MOST_CLASSES:
        return (
            f"Label disagreement was not measured: {len(problem.classes):,} classes, at most {MOST_CLASSES} are taken."
        )
    sample = _sample(problem, rng)
    label = sample.strata  # the classes that are in the sample, numbered anew
    repeats = range(2 if len(sample) <= 1000 else 1)  # with few rows the luck of the folds shows
    by_family = list(zip(*(_out_of_fold(sample, rng) for _ in repeats), strict=True))
    rates = np.linspace(0, max(_error(probability, label) for family in by_family for probability in family), 61)
    misfits, counts = [], []
    for family in by_family:
        pooled = overlap_misfit(np.concatenate(family), np.tile(label, len(family)), rates)
        misfits.append(pooled / len(family))
        counts.append(float(np.mean([_flagged(probability, label) for probability in family])))
    value = float(rates[np.argmin(sum(misfits))])
    low = min(value, *(float(rates[np.argmax(misfit <= misfit.min() + 1.35)]) for misfit in misfits))
    high = max(value, *counts)
    raised = low > DISAGREEMENT
    of = "" if len(sample) == len(problem) else f" on {len(sample):,} of {len(problem):,} rows"
    return Finding(
        symptom="label-noise",
        title="Label disagreement",
        value=value,
        low=low,
        high=high,
        unit="share of labels",
        method="Confident learning (cleanlab) and the disagreement that stays where a model is surest, range over "
        f"logistic regression and randomised trees, 5 folds{of}; raised when the low end is above {DISAGREEMENT:.0%}",
        means=(
            f"At least {low:.0%} of the labels contradict both models even where these are surest, which classes that "
            "merely overlap would not do: wrong labels, or something that no column tells."
            if raised
            else f"Up to {high:.0%} of the labels contradict the models, but about as often as overlapping classes "
            "would; this is no evidence of wrong labels, nor does it rule them out."
        ),
        raised=raised,
    )


def heavy_tails(problem: Problem, rng: np.random.Generator) -> Finding | None:
    """Excess kurtosis of a real target, percentile interval over 1,000 bootstrap samples."""
    if problem.task != "real":
        return None
    y = problem.target.astype(np.float64)[rng.permutation(len(problem))[:MOST_ROWS]]
    samples = [_kurtosis(rng.choice(y, len(y))) for _ in range(1000)]
    low, high = np.nanquantile(samples, (0.025, 0.975)).tolist()
    raised = low > EXCESS_KURTOSIS
    of = "" if len(y) == len(problem) else f" on {len(y):,} of {len(problem):,} rows"
    return Finding(
        symptom="heavy-tails",
        title="Heavy tails of the target",
        value=_kurtosis(y),
        low=low,
        high=high,
        unit="excess kurtosis",
        method=f"Excess kurtosis (normal 0, Laplace 3), bootstrap interval{of}; raised above {EXCESS_KURTOSIS:g}",
        means=(
            "A few extreme values carry much of the squared error. This is the target; the errors of a good model may "
            "have lighter tails."
            if raised
            else "No few values carry the squared error. This is the target; the errors of a model may have other "
            "tails."
        ),
        raised=raised,
    )


def _kurtosis(values: NDArray[np.float64]) -> float:
    """Fourth central moment over the squared second, less 3; nan where all values are equal."""
    away = values - values.mean()
    widest = abs(away).max()
    if not widest:
        return math.nan
    squares = (away / widest) ** 2  # in [0, 1], lest the fourth power overflow
    return float((squares**2).mean() / squares.mean() ** 2 - 3)


DETECTORS = (imbalance, disagreement, heavy_tails)


def overlap_misfit(
    probability: NDArray[np.float64], label: NDArray[np.int64], rates: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How badly overlapping classes explain a model's errors if that share of labels, one of `rates`, is random too.

    Where classes overlap, a surer model is righter: the log-odds s of its first choice predict whether that choice
    is the label, P(right | s) = sigmoid(a + b s) with b >= 0, which tends to 1. Labels that nothing predicts cap it:
    P(right | s) = (1 - rate) sigmoid(a + b s), the psychometric curve with a lapse rate. Returned is the negative
    log-likelihood of each rate at its best a and b: a profile likelihood, whose minimum estimates the rate and whose
    first point within 1.35 of the minimum is a lower 95% bound. Where being surer makes the model no righter, for
    want of informative columns or of overlap, every rate below the error fits alike and that bound is 0.
    """
    choice = probability.argmax(1)
    sure = np.clip(probability.max(1), 1e-3, 1 - 1e-3)
    score, right = np.log(sure / (1 - sure)), choice == label
    bins = np.array_split(np.argsort(score, kind="stable"), min(200, len(label)))
    x = np.array([score[rows].mean() for rows in bins])
    hits = np.array([right[rows].sum() for rows in bins])
    misses = np.array([len(rows) for rows in bins]) - hits

    def loss(curve: NDArray[np.float64], rate: float) -> tuple[float, NDArray[np.float64]]:
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


def _flagged(probability: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """Share of labels that confident learning puts off the diagonal, at most the share that the model gets wrong."""
    from cleanlab.count import estimate_joint

    return min(1 - float(np.trace(estimate_joint(label, probability))), _error(probability, label))


def _error(probability: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    return float((probability.argmax(1) != label).mean())


def _out_of_fold(problem: Problem, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Class probabilities (rows, classes) of each row by models that were fitted without its fold, one per family."""
    families = LogisticRegression(C=0.1, max_iter=200), ExtraTreesClassifier(60, min_samples_leaf=5)
    families[1].set_params(random_state=int(rng.integers(2**31)))
    label, fold = problem.strata, folds(problem, 5, rng)
    probabilities = [np.zeros((len(label), int(label.max()) + 1)) for _ in families]
    for number in np.unique(fold):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        encoder = Encoder().fit(problem.features.iloc[train])
        seen, unseen = (encoder.transform(problem.features.iloc[rows]) for rows in (train, test))
        for model, probability in zip(families, probabilities, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a profile
                model.fit(seen, label[train])
            probability[np.ix_(test, model.classes_)] = model.predict_proba(unseen)
    return probabilities


def _sample(problem: Problem, rng: np.random.Generator) -> Problem:
    """Stratified rows, few enough for `MOST_ROWS` and `MOST_WORK`, at least 500."""
    columns = len(problem.features.columns)
    most = min(MOST_ROWS, max(500, MOST_WORK // (columns * len(problem.classes))))
    if len(problem) <= most:
        return problem
    share = most / len(problem)
    return problem.rows(np.flatnonzero(deal(problem, (share, 1 - share), rng) == 0))
