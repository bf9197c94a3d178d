"""What is wrong with the data: each finding a number, its interval, how it was measured and what it means.

A detector looks at `fits.Seen` and gives a `finding.Measure`, None where its symptom does not apply, or why it was not
measured. Those that fit models share one pass of two families over a sample of the rows. Each has a p-value, of the
hypothesis that the truth is within the threshold that its `method` states, and a finding is raised where this p,
adjusted by Holm for all of them, is at most 5%: on data with which nothing is wrong, one profile in twenty or fewer
raises anything.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lossary.compare.encode import Encoder
from lossary.compare.problem import Problem
from lossary.compare.profile.errors import calibration, group_gaps, residual_tails, target_tails, uneven_errors
from lossary.compare.profile.finding import LEVEL, Finding, Measure, Profile
from lossary.compare.profile.fits import Seen, without_targets
from lossary.compare.profile.labels import disagreement, imbalance, missing_positives, unlabelled
from lossary.compare.profile.rows import copies, strange_rows
from lossary.compare.profile.shift import shift
from lossary.compare.profile.size import few_labels, redundancy

__all__ = ["LEVEL", "Finding", "Profile", "profile"]

Detector = Callable[[Seen], Measure | str | None]

PLAIN: dict[str, Detector] = {
    "class imbalance": imbalance,
    "rows without a target": unlabelled,
    "tails of the target": target_tails,
    "duplicates": copies,
    "shift": shift,
}
FITTED: dict[str, Detector] = {  # these share one pass of models
    "label disagreement": disagreement,
    "missing labels": missing_positives,
    "calibration": calibration,
    "tails of the errors": residual_tails,
    "uneven errors": uneven_errors,
    "group gaps": group_gaps,
    "strange rows": strange_rows,
    "the learning curve": redundancy,
    "the gain from more rows": few_labels,
}


def profile(
    problem: Problem,
    rows: NDArray[np.int64],
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Profile:
    """Measures every symptom on these rows of the problem, and on no others. Every class must be among them.

    Of rows that were set aside as a test the features alone are looked at, and only to see whether they are of the same
    kind.

    Args:
        problem: all there is.
        rows: those that may be looked at.
        seed: of everything random.
        progress: told (steps done, steps in all, what comes next).
    """
    from lossary.compare.statistics import holm  # not above: it imports the records of this package

    arrivals = None if problem.test is None else without_targets(problem.rows(problem.test))
    seen = Seen(problem.rows(rows), rows, len(problem), arrivals, seed)
    detectors = PLAIN | ({} if seen.obstacle else FITTED)
    measured: list[Measure] = []
    notes = []
    for place, (name, detect) in enumerate(detectors.items()):
        if progress is not None:
            progress(place, len(detectors), f"profile: {name}")
        result = detect(seen)
        if isinstance(result, Measure):
            measured.append(result)
        elif result is not None:
            notes.append(result)
    if seen.obstacle:
        notes.append(f"No model was fitted, as {seen.obstacle}; so {_listed(FITTED)} were not measured.")
    if seen.problem.weight is not None:
        notes.append("Every row counts the same in the profile, whatever its sample weight.")
    adjusted = holm({found.title: found.p for found in measured if found.p is not None})
    findings = tuple(found.finding(adjusted.get(found.title)) for found in measured)
    return Profile(
        num_samples=len(seen.problem),
        num_features=Encoder().fit(seen.problem.features).transform(seen.problem.features.head(1)).shape[1],
        num_classes=len(problem.classes) or None,
        class_counts=_counts(seen.problem),
        num_groups=None if problem.group is None else len(np.unique(seen.problem.group)),
        label_noise=next((finding.value for finding in findings if finding.symptom == "label-noise"), None),
        findings=findings,
        notes=tuple(notes),
    )


def _counts(problem: Problem) -> tuple[int, ...]:
    if problem.task == "real":
        return ()
    if problem.task == "multilabel":
        return tuple(problem.target.sum(0).tolist())
    return tuple(np.bincount(problem.target, minlength=len(problem.classes)).tolist())


def _listed(names: dict[str, Detector]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
