"""Detectors that look at whole rows: those that repeat, and those that are unlike all others."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from sklearn.decomposition import PCA

from lossary.compare.profile.finding import Measure
from lossary.compare.profile.fits import Floats, Part, Seen
from lossary.ood import MahalanobisDetector

COPIES = 0.01  # share of rows that repeat another
AGREE = 0.75  # share of rows of equal columns whose targets are equal too: below, they are no copies
BEYOND = 5.0  # deviations of the logarithm of a distance, from which a row is strange
STRANGE = 0.001  # share of such rows
RARE = 0.2  # a column of which fewer rows leave its commonest value only marks those
MOST_COMPONENTS = 50
RIDGE = 0.5  # about the variance of a column, in quartile ranges: no column, however even, outweighs the others
TRIMMED = 0.2  # share of rows, the furthest, that the fit leaves out


def copies(seen: Seen) -> Measure:
    """Rows that are the same as an earlier one, target and all.

    Copies agree in their target; where many rows of the same columns differ in it, the columns are so coarse that rows
    coincide.
    """
    problem = seen.problem
    target = pd.util.hash_pandas_object(pd.DataFrame(problem.target), index=False).to_numpy()
    both = pd.DataFrame({"pattern": problem.patterns, "target": target})
    repeats = both.duplicated()
    exact, alike = int(repeats.sum()), int(both["pattern"].duplicated().sum())
    pattern, code = (values.to_numpy() for _, values in both.sort_values("pattern", kind="stable").items())
    agree = int(((pattern[1:] == pattern[:-1]) & (code[1:] == code[:-1])).sum())  # with the row before of these columns
    often = both.groupby(["pattern", "target"]).size()
    interval = binomtest(exact, len(problem)).proportion_ci(method="wilson")
    p = float(binomtest(exact, len(problem), COPIES, alternative="greater").pvalue)
    said = f"{exact:,} of {len(problem):,} rows are the same as an earlier one" + (
        f", {alike - exact:,} more have its columns but another target. " if alike > exact else ". "
    )
    return Measure(
        symptom="training-cost",
        title="Exact duplicates",
        value=exact / len(problem),
        low=interval.low,
        high=interval.high,
        unit="share of rows",
        method=f"Count of equal rows, Wilson interval; raised above {COPIES:.0%}, unless more than "
        f"{1 - AGREE:.0%} of the rows that follow one of the same columns differ from it in their target",
        p=p if agree >= AGREE * alike else 1.0,
        alarm=f"{said}Copies cost time and teach nothing new, and where a split parts them they flatter every score. "
        f"{problem.repeats}",
        calm=f"{said}Too few to matter, or such as coarse columns bring about by chance."
        if exact
        else f"{said}Nothing to remove.",
        picture={
            "kind": "counts",
            "names": ["once", "twice", "three or more"],
            "values": [int((often == 1).sum()), int((often == 2).sum()), int((often > 2).sum())],
        },
    )


def strange_rows(seen: Seen) -> Measure:
    """Rows whose distance from the others is beyond what the law of all distances explains.

    The distance of a row is the squared Mahalanobis distance to the nearest class (or to the centre, without classes)
    by `lossary.ood.MahalanobisDetector`, fitted without the row's fold and without the furthest fifth of the rest, so
    that outliers neither hide themselves nor others. Its logarithm is about normal on ordinary tables, with light
    columns and heavy ones; the law is the normal one through its median and upper quartile.
    """
    fits = seen.fits
    classes = fits.target if fits.problem.task in ("classes", "ordinal") else np.zeros(len(fits.problem), dtype=int)
    distance = np.zeros(len(fits.problem))
    for part in fits.parts[0]:
        distance[part.test] = _distances(part, classes)
    logarithm = np.log(np.maximum(distance, 1e-9))
    middle, upper = np.quantile(logarithm, (0.5, 0.75))
    off = (logarithm - middle) / (max(upper - middle, 1e-9) / norm.ppf(0.75))
    count, n = int((off > BEYOND).sum()), len(off)
    share = binomtest(count, n)
    interval = share.proportion_ci(method="wilson")
    furthest = [seen.name(fits.rows[row]) for row in np.argsort(-off)[: min(count, 5)]]
    where = f" The furthest: rows {', '.join(furthest)}." if furthest else ""
    said = f"{count:,} of {n:,} rows lie beyond {BEYOND:g} deviations, where the law expects {n * norm.sf(BEYOND):.1g}."
    return Measure(
        symptom="strange-inputs",
        title="Strange rows",
        value=count / n,
        low=interval.low,
        high=interval.high,
        unit="share of rows",
        method="Mahalanobis distance (lossary.ood.MahalanobisDetector) to the nearest class, of rows that it was not "
        f"fitted on{fits.of(len(seen.problem))}; beyond {BEYOND:g} deviations of the normal law through median and "
        f"upper quartile of its logarithm, Wilson interval; raised above {STRANGE:.1%}",
        p=float(binomtest(count, n, STRANGE, alternative="greater").pvalue),
        alarm=f"{said}{where} Look at them first: broken records, other units, or inputs of another kind, which any "
        "model will answer at random.",
        calm=f"{said}{where} No sign of broken records.",
        picture=_histogram(off),
    )


def _distances(part: Part, classes: NDArray[np.int64]) -> Floats:
    """Of the part's unseen rows, squared."""
    x, unseen = part.x.astype(float), part.unseen.astype(float)
    for column in range(x.shape[1]):
        values, counts = np.unique(x[:, column], return_counts=True)
        common = values[counts.argmax()]
        if counts.max() > (1 - RARE) * len(x):  # standardised, what is rare would look far away
            x[:, column], unseen[:, column] = x[:, column] != common, unseen[:, column] != common
        elif width := np.subtract(*np.quantile(x[:, column], (0.75, 0.25))):  # outliers have widened the deviation
            x[:, column], unseen[:, column] = x[:, column] / width, unseen[:, column] / width
    if x.shape[1] > MOST_COMPONENTS:
        reduced = PCA(min(MOST_COMPONENTS, len(x) // 2), svd_solver="randomized", random_state=0).fit(x)
        x, unseen = reduced.transform(x), reduced.transform(unseen)
    label, kept = classes[part.train], np.arange(len(x))
    for _ in range(4):
        detector = MahalanobisDetector(ridge=RIDGE).fit(x[kept], label[kept])
        distance = detector.anomaly_score(x)
        kept = np.flatnonzero(distance <= np.quantile(distance, 1 - TRIMMED))
    return detector.anomaly_score(unseen)


def _histogram(off: Floats) -> dict[str, object]:
    """Rows by their distance, those expected by the law, and where strangeness begins."""
    edges = np.linspace(-5, max(8.0, float(np.ceil(off.max()))), 53)
    counts = np.histogram(np.clip(off, edges[0], edges[-1]), edges)[0]
    return {
        "kind": "histogram",
        "x": "logarithm of the distance, in deviations",
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "law": (len(off) * np.diff(norm.cdf(edges))).tolist(),
        "cut": BEYOND,
    }
