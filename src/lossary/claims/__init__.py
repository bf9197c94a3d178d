"""Claims: each paper's headline as a small experiment, registered before it is run.

A claim is a function of `Seeds` that returns `Arms`: what the method and its baseline scored under each seed,
on the same data, initialisation and order. Kind, metric and scale are registered in the decorator's literals;
the margin comes from the metric's row in `lossary.verdict.METRICS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lossary.tasks.seeds import Seeds

__all__ = ["Arms", "Claim", "Seeds", "claim", "tune"]


@dataclass(frozen=True)
class Arms:
    """What was measured, one number per seed.

    Attributes:
        method: (S,); for "trend" (S, levels); for "exact" the deviations, of any shape.
        baseline: (S,), or None for "trend" and "exact".
        details: anything JSON-able worth keeping: settings that were chosen, further measures.
    """

    method: Any
    baseline: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim's registration beside the function that measures it."""

    name: str
    measure: Callable[[Seeds], Arms]
    says: str
    kind: str
    metric: str
    scale: str
    margin: float | None = None
    tolerance: float | None = None
    levels: tuple[float, ...] = ()
    control: str = ""


def claim(
    *,
    says: str,
    kind: str,
    metric: str,
    scale: str,
    margin: float | None = None,
    tolerance: float | None = None,
    levels: tuple[float, ...] = (),
    control: str = "",
) -> Callable[[Callable[[Seeds], Arms]], Callable[[Seeds], Arms]]:
    """Register a claim. All arguments are literals.

    Args:
        says: the statement, in a sentence.
        kind: "superiority", "noninferiority", "equality", "ratio", "trend" or "exact".
        metric: a row of `lossary.verdict.METRICS`, which supplies unit, direction and margin.
        scale: data, model and length of training, in a line.
        margin: the ratio for "ratio" claims; elsewhere the table's margin holds.
        tolerance: the largest deviation for "exact" claims.
        levels: the settings that a "trend" goes over.
        control: "planted" for an effect that must hold, "A/A" for two equal arms that must not; empty otherwise.
    """

    def register(measure: Callable[[Seeds], Arms]) -> Callable[[Seeds], Arms]:
        measure.__lossary_claim__ = Claim(  # type: ignore[attr-defined]
            measure.__name__, measure, says, kind, metric, scale, margin, tolerance, levels, control
        )
        return measure

    return register


def tune(
    score: Callable[..., Any],
    grid: Sequence[Mapping[str, Any]],
    seeds: Seeds,
    *,
    better: str = "higher",
    n: int = 4,
) -> dict[str, Any]:
    """The setting in `grid` with the best mean score over `n` tuning seeds, which no claim reports.

    Both arms of a claim call it with grids of the same length, learning rates included.

    Args:
        score: called as score(tuning_seeds, **setting); returns one number per seed.
        grid: the settings.
        seeds: the claim's seeds; only their smoke flag matters here.
        better: "higher" or "lower".
        n: number of tuning seeds.
    """
    tuning = seeds.tuning(1 if seeds.smoke else n)
    candidates = grid[:1] if seeds.smoke else grid
    sign = 1.0 if better == "higher" else -1.0
    means = [sign * float(np.mean(np.asarray(score(tuning, **setting)))) for setting in candidates]
    return dict(candidates[int(np.nanargmax(means))])
