"""Verdicts as pictures: every claim on one axis, in units of what was asked of it.

The effect of a claim is divided by its margin (for a ratio, on the logarithm's scale; for an exact statement, by its
tolerance), so that claims of any metric share an axis: 0 is no difference, 1 is the margin. The axis is bent, fine near
the margin and coarse far from it, and ends at `FAR` margins.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from lossary.verdict import METRICS, threshold

FAR = 100.0  # margins; whatever lies further is drawn at the end of the axis, as an arrow
WIDTH, ROW = 168, 15  # pixels of a small plot and of each claim in it
LARGE, SEEDS = 620, 46  # of a claim's own plot, and of the strip of its seeds
SHAPES = {"holds": "h", "does not hold": "d", "inconclusive": "i"}  # classes in the style sheet
BAR = {"holds": "h", "inconclusive": "i", "does not hold": "d", "not run": "n"}

Claim = dict[str, Any]


def asked(claim: Claim) -> tuple[float, float]:
    """Where, in margins, the interval must lie for the claim to hold."""
    if claim["kind"] == "equality":
        return -1.0, 1.0
    if claim["kind"] == "exact":
        return 0.0, 1.0
    if claim["kind"] == "noninferiority":
        return -1.0, math.inf
    if claim["kind"] == "ratio" and _log_bound(claim) == 0:
        return 0.0, math.inf
    return (-1.0 if claim["kind"] == "ratio" and _log_bound(claim) < 0 else 1.0), math.inf


def in_margins(claim: Claim, value: float) -> float:
    """A value in the claim's unit, as its run has it, in margins; positive is better."""
    bound = claim["run"]["threshold"]
    if claim["kind"] == "ratio":
        return _sign(claim) * math.log(value) / (abs(_log_bound(claim)) or 0.1) if value > 0 else -math.inf
    return value / bound if bound else (0.0 if value == 0 else math.copysign(math.inf, value))


def small(claims: Sequence[Claim], *, says: str = "") -> Markup:
    """The intervals of several claims under one another, for a row of a table; those that were not run are left out."""
    run = [claim for claim in claims if claim["run"]]
    if not run:
        return Markup("")
    height = ROW * len(run)
    place = _axis(WIDTH, 5)
    parts = [f'<path class="zero" d="M{place(0)} 0V{height}"/>']
    for row, claim in enumerate(run):
        parts.append(_row(claim, place, ROW * row + ROW / 2, ROW, WIDTH))
    label = says or "; ".join(f"{claim['run']['outcome']}: {claim['says']}" for claim in run)
    return _svg(WIDTH, height, parts, label, "plot")


def large(claim: Claim) -> Markup:
    """One claim's interval, with what was asked of it, and a dot for every seed; none for an exact statement."""
    run = claim["run"]
    seeds = [in_margins(claim, value) for value in seed_effects(claim)]
    place = _axis(LARGE, 14)
    middle = 24
    height = middle + 22 + (SEEDS if seeds else 0)
    low, high = asked(claim)
    left, right = place(low), place(high)
    parts = [
        f'<rect class="asked" x="{left}" y="4" width="{_n(right - left)}" height="{height - 22}"/>',
        f'<path class="zero" d="M{place(0)} 4V{height - 18}"/>',
        _row(claim, place, middle, 18, LARGE, shade=False),
    ]
    for number, value in enumerate(seeds):
        level = middle + 22 + (number * 7 % 5) * 5  # spread out, so that seeds that agree stay apart
        parts.append(f'<circle class="seed" cx="{place(value)}" cy="{_n(level)}" r="2.6"/>')
    for tick in (-100, -10, -3, -1, 0, 1, 3, 10, 100):
        if run["low"] is None and tick < 0:
            continue
        text = "0" if tick == 0 else f"{tick:+d}".replace("-", "\N{MINUS SIGN}")
        parts.append(f'<text x="{place(tick)}" y="{height - 3}">{text}</text>')
    what = "tolerances" if claim["kind"] == "exact" else "margins"
    return _svg(LARGE, height, parts, f"{in_words(claim)} The axis is in {what}.", "plot large")


def seed_effects(claim: Claim) -> list[float]:
    """The effect of each seed in the claim's unit, as its interval has it; empty where seeds have no single one."""
    run = claim["run"]
    if claim["kind"] in ("exact", "trend") or run["baseline"] is None:
        return []
    pairs = zip(run["method"], run["baseline"], strict=True)
    if claim["kind"] == "ratio":
        return [method / baseline if baseline else math.inf for method, baseline in pairs]
    return [_sign(claim) * (method - baseline) for method, baseline in pairs]


def in_words(claim: Claim) -> str:
    """The outcome with its numbers, in a sentence."""
    run = claim["run"]
    if run["effect"] is None:
        return f"{run['outcome'].capitalize()}: nothing finite was measured."
    if run["low"] is None or run["high"] is None:
        return f"{run['outcome'].capitalize()}: the largest deviation is {figure(run['effect'])}."
    unit = {"ratio": " times the baseline's"}.get(claim["kind"], f" {run['unit']}")
    return (
        f"{run['outcome'].capitalize()}: {figure(run['effect'])}{unit}, "
        f"interval {figure(run['low'])} to {figure(run['high'])}, {run['n']} seeds."
    )


def figure(value: float) -> str:
    """Three digits, with a real minus sign."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def asked_in_words(claim: Claim) -> str:
    """What the claim had to show to hold."""
    bound = claim["run"]["threshold"] if claim["run"] else registered(claim)
    unit = METRICS[claim["metric"]].unit
    if claim["kind"] == "exact":
        return f"no deviation beyond {bound:g}"
    if claim["kind"] == "ratio":
        side = "above" if METRICS[claim["metric"]].better == "higher" else "below"
        return f"all of the interval {side} {bound:g} times the baseline's {claim['metric']}"
    if claim["kind"] == "equality":
        return f"all of the interval within {bound:g} {unit} of no difference"
    if claim["kind"] == "noninferiority":
        return f"all of the interval above \N{MINUS SIGN}{bound:g} {unit}: not worse by the margin"
    text = f"all of the interval above +{bound:g} {unit}"
    return f"{text}, from {claim['levels'][0]:g} to {claim['levels'][-1]:g}" if claim["kind"] == "trend" else text


def registered(claim: Claim) -> float:
    """The number that the claim is held against, from its registration."""
    own = {name: claim[name] for name in ("margin", "tolerance", "levels") if name in claim}
    return threshold(claim["kind"], claim["metric"], **own)


def bar(counts: Mapping[str, int], *, width: int = 620, height: int = 10) -> Markup:
    """How many hold, are inconclusive, do not hold and were not run, as one bar."""
    total = sum(counts.get(name, 0) for name in BAR)
    if not total:
        return Markup("")
    parts, left = [], 0.0
    for name, shape in BAR.items():
        share = width * counts.get(name, 0) / total
        if share:
            size = f'x="{_n(left)}" width="{_n(max(share - 1, 0.5))}" height="{height}"'
            parts.append(f'<rect class="{shape}" {size}/>')
            left += share
    label = ", ".join(f"{counts[name]} {name}" for name in BAR if counts.get(name))
    return _svg(width, height, parts, label, "bar")


def _row(
    claim: Claim, place: Callable[[float], float], middle: float, height: float, width: float, *, shade: bool = True
) -> str:
    run = claim["run"]
    low, high = asked(claim)
    parts = []
    if shade:
        left, right = place(low), place(high)
        box = f'x="{left}" y="{_n(middle - height / 2 + 2)}" width="{_n(right - left)}" height="{_n(height - 4)}"'
        parts.append(f'<rect class="asked" {box}/>')
    if run["effect"] is None:
        return "".join(parts)
    if run["low"] is not None and run["high"] is not None:
        ends = sorted(in_margins(claim, run[end]) for end in ("low", "high"))
        parts.append(
            f'<path class="line {SHAPES[run["outcome"]]}" d="M{place(ends[0])} {_n(middle)}H{place(ends[1])}"/>'
        )
    at, shape = in_margins(claim, run["effect"]), SHAPES[run["outcome"]]
    if abs(at) > FAR:
        x, step = (width - 4, 5) if at > 0 else (4, -5)
        head = f"M{x - step} {_n(middle - 4)}L{x} {_n(middle)}L{x - step} {_n(middle + 4)}"
        parts.append(f'<path class="arrow {shape}" d="{head}"/>')
    else:
        radius = 4.5 if height > 16 else 3.4
        parts.append(f'<circle class="dot {shape}" cx="{place(at)}" cy="{_n(middle)}" r="{radius}"/>')
    return "".join(parts)


def _axis(width: float, pad: float) -> Callable[[float], float]:
    """From margins to pixels."""

    def place(value: float) -> float:
        bent = math.asinh(min(max(value, -FAR), FAR)) / math.asinh(FAR)
        return round(pad + (width - 2 * pad) * (bent + 1) / 2, 1)

    return place


def _n(value: float) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _svg(width: float, height: float, parts: Sequence[str], label: str, name: str) -> Markup:
    size = f'width="{_n(width)}" height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}"'
    return Markup(f'<svg class="{name}" {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def _sign(claim: Claim) -> float:
    return 1.0 if METRICS[claim["metric"]].better == "higher" else -1.0


def _log_bound(claim: Claim) -> float:
    return _sign(claim) * math.log(claim["run"]["threshold"])
