"""Private Kaplan-Meier curves of the lung data: the published figure, what its accounting leaves out, and a sound way.

The data are those of the paper, 228 patients with advanced lung cancer (NCCTG, in lifelines). The published noise is a
stand-in (see the part), at the times of the events and at its nominal epsilon, which leaves out that the 139 releases
of the curve compose, that a record's effect grows along it, and that the times themselves are given away. The sound
way is noise on monthly counts at the same total epsilon. Errors are root mean squares over the times of the events
against the curve without noise; a seed has the mean over 50 releases.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossary.claims import Arms, Seeds, claim
from lossary.uncertainty import DPKaplanMeierFitter, audited_privacy_loss, membership_inference_survival
from lossary.uncertainty._survival import kaplan_meier

MONTHS = np.arange(30.0, 1081.0, 30.0)  # three years of follow-up, fixed without looking


def _lung() -> tuple[NDArray, NDArray]:
    """Days (228,) and whether death came then (228,)."""
    from lifelines.datasets import load_lung

    lung = load_lung()
    return lung["time"].to_numpy(float), lung["status"].to_numpy() == 1


def _errors(seeds: Seeds, make: Callable[[], DPKaplanMeierFitter], stream: str = "noise") -> NDArray:
    """Root mean squared error of the released curve of the lung data, per seed."""
    time, event = _lung()
    curve, errors = kaplan_meier(time, event), []
    for rng in seeds.numpy(stream):
        releases = [make().fit(time, event, generator=rng).predict(curve.times) for _ in range(seeds.few(50, smoke=3))]
        errors.append(np.sqrt(((np.stack(releases) - curve.survival) ** 2).mean(1)).mean())
    return np.array(errors)


def _published(epsilon: float, **setting: Any) -> Callable[[], DPKaplanMeierFitter]:
    return lambda: DPKaplanMeierFitter(epsilon=epsilon, mechanism="time-indexed", **setting)


def _sound(epsilon: float) -> Callable[[], DPKaplanMeierFitter]:
    return lambda: DPKaplanMeierFitter(epsilon=epsilon, grid=MONTHS)


@claim(
    says="At nominal epsilon 10 the published release, as far as known, has the published error of 0.04 on its data",
    kind="exact",
    metric="deviation",
    tolerance=0.01,
    scale="lung data, 228 patients; stand-in for the noise scale; the accounting does not cover composition over times",
)
def published_error_at_epsilon_10(seeds: Seeds) -> Arms:
    error = _errors(seeds, _published(10.0))
    others = {
        "by the share at risk": _published(10.0, schedule="risk"),
        "without clipping": _published(10.0, clip=False),
        "without smoothing": _published(10.0, window=1),
    }
    details = {name: _errors(seeds, make).mean() for name, make in others.items()}
    return Arms(error - 0.04, details={"error": error.mean(), **details})


@claim(
    says="The error of the published release at epsilon 10 is at most half of that at epsilon 1",
    kind="ratio",
    metric="deviation",
    margin=0.5,
    scale="lung data, 228 patients, nominal epsilon; stand-in for the noise scale",
)
def error_falls_with_the_budget(seeds: Seeds) -> Arms:
    between = {f"error at {epsilon}": _errors(seeds, _published(epsilon)).mean() for epsilon in (0.1, 3.0, 6.0)}
    return Arms(_errors(seeds, _published(10.0)), _errors(seeds, _published(1.0)), between)


@claim(
    says="The published release loses more than ten times the privacy that its epsilon says",
    kind="ratio",
    metric="deviation",
    margin=0.1,
    scale="nominal epsilon over the audited loss of a record that is left out; lung data, 228 patients drawn anew per"
    " seed with replacement; stand-in for the noise scale",
)
def nominal_is_not_what_is_spent(seeds: Seeds) -> Arms:
    time, event = _lung()
    losses = {schedule: [] for schedule in ("index", "risk")}
    for rng in seeds.numpy("patients"):
        rows = rng.integers(0, len(time), len(time))
        for schedule, found in losses.items():
            found.append(audited_privacy_loss(time[rows], event[rows], epsilon=1.0, schedule=schedule))
    real = {f"lung data, {name}": audited_privacy_loss(time, event, epsilon=1.0, schedule=name) for name in losses}
    details = {"loss at nominal epsilon 1": real, "by the share at risk, mean": float(np.mean(losses["risk"]))}
    return Arms(np.ones(len(seeds)), np.array(losses["index"]), details)


@claim(
    says="Noise on monthly counts, private at a total of 10, errs no more than the published release at nominal 10",
    kind="ratio",
    metric="deviation",
    margin=1.0,
    scale="lung data, 228 patients; 36 months fixed beforehand against the times of the events; stand-in for the"
    " published noise scale",
)
def sound_counts_are_as_accurate(seeds: Seeds) -> Arms:
    time, event = _lung()
    releases = len(kaplan_meier(time, event).times)
    factor = audited_privacy_loss(time, event, epsilon=1.0)
    details = {
        "published, 10 over all releases": _errors(seeds, _published(10.0 / releases)).mean(),
        "published, 10 by audit": _errors(seeds, _published(10.0 / factor)).mean(),
        **{f"counts at {epsilon}": _errors(seeds, _sound(epsilon)).mean() for epsilon in (0.3, 1.0, 3.0, np.inf)},
    }
    return Arms(_errors(seeds, _sound(10.0)), _errors(seeds, _published(10.0)), details)


@claim(
    says="Influential points become fewer at epsilon 6: records move the released curve at most half as far as at 1",
    kind="ratio",
    metric="deviation",
    margin=0.5,
    scale="lung data, 228 patients, each left out once, nominal epsilon; fewest without any privacy, so this measures"
    " the noise of the curve and not the risk of its members",
)
def influence_shrinks_with_epsilon(seeds: Seeds) -> Arms:
    time, event = _lung()
    times, rows = np.arange(10.0, 1020.0, 10.0), slice(seeds.few(len(time), smoke=20))

    def influence(epsilon: float) -> NDArray:
        moved = [
            membership_inference_survival(_published(epsilon)(), time[rows], event[rows], times=times, generator=rng)
            for rng in seeds.numpy("noise")
        ]
        counts[f"influential at 0.05, epsilon {epsilon:g}"] = float((np.stack(moved) > 0.05).sum(1).mean())
        return np.mean(moved, axis=1)

    counts: dict[str, float] = {}
    low, high, _ = (influence(epsilon) for epsilon in (1.0, 6.0, np.inf))
    return Arms(high, low, counts)
