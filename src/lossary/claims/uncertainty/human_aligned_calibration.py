"""Human-aligned calibration: does confidence calibrated at each level of the person's own make for better decisions?

In each seed's world a model sees evidence x. The person sees her own, and a cue of the kind of case: in some kinds, a
fifth to a half of all cases, x tells less than the model thinks, or the opposite. Her confidence is the lower in these
kinds, and noisy. The model is calibrated, by construction, and both are recalibrated on 3000 cases.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lossary.claims import Arms, Seeds, claim
from lossary.uncertainty import (
    HumanAlignedCalibrator,
    alignment_error,
    best_monotone_decisions,
    multicalibrate_by_group,
)
from lossary.uncertainty._calibration import mass_edges

LEARN, LEVELS, BINS = 3000, 3, 8

World = tuple[NDArray, NDArray, NDArray]
"""b, h and y of many cases, the first LEARN of them to learn from."""


def _worlds(seeds: Seeds) -> list[World]:
    found = []
    for rng in seeds.numpy("world"):
        n, share, slope = LEARN + seeds.few(30_000, smoke=3000), rng.uniform(0.2, 0.5), rng.uniform(-2.0, 1.0)
        x, odd = rng.standard_normal(n), rng.random(n) < share
        y = rng.random(n) < expit(np.where(odd, slope * x, 2 * x))
        b = (1 - share) * expit(2 * x) + share * expit(slope * x)
        h = expit(np.where(odd, -1.0, 1.0) + x / 2 + rng.standard_normal(n))
        found.append((b, h, y))
    return found


def _told(world: World, *, aligned: bool) -> NDArray:
    """What the person is told: b recalibrated at each level of h, or without regard to it."""
    b, h, y = world
    calibrator = HumanAlignedCalibrator(human_bins=LEVELS if aligned else 1, confidence_bins=5 if aligned else 15)
    return calibrator.fit(b[:LEARN], h[:LEARN], y[:LEARN]).transform(b, h)


def _error(world: World, told: NDArray) -> tuple[float, float]:
    """Expected and maximal alignment error on new cases, in percent."""
    _, h, y = world
    maximum, expected = alignment_error(told[LEARN:], h[LEARN:], y[LEARN:], human_bins=LEVELS, confidence_bins=BINS)
    return 100 * expected, 100 * maximum


def _right(world: World, told: NDArray, *, monotone: bool = True) -> float:
    """Percentage of new cases decided rightly by the rule on (h, b) that was best on the cases to learn from."""
    _, h, y = world
    cell = np.searchsorted(mass_edges(h[:LEARN], LEVELS), h) * BINS + np.minimum((told * BINS).astype(int), BINS - 1)
    mass = np.bincount(cell[:LEARN], minlength=LEVELS * BINS)
    share = np.bincount(cell[:LEARN], weights=y[:LEARN], minlength=LEVELS * BINS) / mass.clip(min=1)
    shape = (LEVELS, BINS)
    rule = best_monotone_decisions(share.reshape(shape), mass.reshape(shape)).ravel() if monotone else share > 0.5
    return float(100 * (rule[cell[LEARN:]] == y[LEARN:]).mean())


@claim(
    says="Calibration at each level of human confidence leaves a lower alignment error than calibration over all",
    kind="superiority",
    metric="calibration error",
    scale="synthetic cases with a cue that only the person sees, 3 levels of h, 15 bins of b in all in either arm",
)
def levels_align(seeds: Seeds) -> Arms:
    worlds = _worlds(seeds)
    (method, most), (baseline, most_before) = (
        np.array([_error(w, _told(w, aligned=aligned)) for w in worlds]).T for aligned in (True, False)
    )
    return Arms(method, baseline, {"mean maximum": {"method": most.mean(), "baseline": most_before.mean()}})


@claim(
    says="With it the best monotone rule decides better",
    kind="superiority",
    metric="accuracy",
    scale="synthetic cases with a cue that only the person sees, 3 levels of h, 15 bins of b in all in either arm",
)
def monotone_rules_decide_better(seeds: Seeds) -> Arms:
    worlds = _worlds(seeds)
    method, baseline = ([_right(w, _told(w, aligned=aligned)) for w in worlds] for aligned in (True, False))
    return Arms(np.array(method), np.array(baseline))


@claim(
    says="With it the best monotone rule decides as well as the best of all rules does with the model's own confidence",
    kind="noninferiority",
    metric="accuracy",
    scale="synthetic cases with a cue that only the person sees, 3 levels of h, 15 bins of b; 8 bins for the rules",
)
def monotone_rules_lose_nothing(seeds: Seeds) -> Arms:
    worlds = _worlds(seeds)
    method = [_right(w, _told(w, aligned=True)) for w in worlds]
    return Arms(np.array(method), np.array([_right(w, w[0], monotone=False) for w in worlds]))


@claim(
    says="Where each level is calibrated within alpha, the alignment error is at most 2 alpha and a bin's width",
    kind="exact",
    metric="deviation",
    scale="excess over the bound on 3000 synthetic cases, alpha 0.02, 0.05 and 0.1, 10 bins",
    tolerance=0.0,
)
def multicalibration_bounds_misalignment(seeds: Seeds) -> Arms:
    excess = []
    for b, h, y in _worlds(seeds):
        b, y, level = b[:LEARN], y[:LEARN], np.searchsorted(mass_edges(h[:LEARN], LEVELS), h[:LEARN])
        for alpha in (0.02, 0.05, 0.1):
            told = multicalibrate_by_group(b, level, y, b, level, alpha=alpha, bins=10)
            maximum, _ = alignment_error(told, level, y, human_bins=None, confidence_bins=10)
            excess.append(max(0.0, maximum - 2 * alpha - 0.1))
    return Arms(np.array(excess))
