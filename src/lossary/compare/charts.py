"""Charts of a comparison: functions from its records to Altair charts, the same on a page and as a picture.

They are drawn in the colours of `LIGHT`. In the SVG each becomes the CSS variable of its name, which `css` defines for
light and for dark, so that one picture serves both. `width` is that of the whole picture in pixels and text keeps
its size, so a phone gets a narrower chart, not a smaller one.

Every interval is a line, every estimate a dot; published parts are blue, what is conventional is brown.
"""

import json
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import median

import altair as alt
import vl_convert

from lossary.compare.profile import Finding
from lossary.compare.result import ArmResult, Confirmation, Interval

LIGHT = {
    "page": "#fdfdfb",
    "panel": "#f4f4f0",
    "line": "#dfe0db",
    "faint": "#9aa2ab",
    "muted": "#59616c",
    "ink": "#1a1c20",
    "part": "#1c61a6",
    "plain": "#9c4f08",
}
DARK = {
    "page": "#15171a",
    "panel": "#1d2024",
    "line": "#343940",
    "faint": "#6d7681",
    "muted": "#a6aeb9",
    "ink": "#ebeae6",
    "part": "#7ab7f2",
    "plain": "#eda55f",
}
FONT = 'Inter, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
NARROW = 480  # pixels; below, the names of arms stand above their intervals instead of beside them
FASTEST = 1e-3  # seconds; quicker fits are drawn as if they took this long
LONGEST = 46  # letters in a line of an arm's name
COSTS = {"seconds": "seconds per fit", "memory": "megabytes per fit", "parameters": "parameters"}


def interval_plot(confirmation: Confirmation, unit: str, *, width: int = 640) -> alt.LayerChart:
    """The finalist's lead on the locked rows, over the band of leads too small for this comparison to see."""
    effect, least = confirmation.effect, confirmation.detectable
    row = {"lead": effect.difference, "low": effect.low, "high": effect.high, "from": -least, "to": least}
    row |= {f"{end} said": number(row[end], effect, sign=True) for end in ("lead", "low", "high")}
    x = _x(_titled("lead of the finalist", unit), [effect.low, effect.high, -least, least])
    base = alt.Chart(_rows([row]))
    end = base.mark_text(dy=20, fontSize=13, color=LIGHT["ink"])
    return _layers(
        base.mark_rect(color=LIGHT["line"], opacity=0.6).encode(x("from"), x2="to:Q"),
        _zero(x),
        base.mark_rule(color=LIGHT["part"], strokeWidth=4).encode(x("low"), x2="high:Q"),
        base.mark_point(color=LIGHT["part"], fill=LIGHT["part"], size=150).encode(x("lead")),
        end.encode(x("low"), text="low said:N"),
        end.encode(x("high"), text="high said:N"),
        base.mark_text(dy=-21, fontSize=15, fontWeight=600, color=LIGHT["part"]).encode(x("lead"), text="lead said:N"),
        width=width,
        height=128,
    )


def forest(
    arms: Sequence[ArmResult], unit: str, *, baseline: str, finalist: str = "", width: int = 860
) -> alt.LayerChart:
    """Each arm's lead over the baseline in the search with its interval, best first; hollow where it was dropped.

    The axis ends four widths of an interval below the middle arm, lest one that fails hide the others: what lies
    further below ends in an arrow.
    """
    drawn = [arm for arm in arms if has_lead(arm)]
    known = [arm.against_baseline for arm in drawn]
    edge = median(e.difference for e in known) - 4 * median(e.high - e.low for e in known)
    narrow, step = width < NARROW, 17
    rows, words, bottom = [], [], 0
    for arm, effect in zip(drawn, known, strict=True):
        lines = wrapped(arm.name, LONGEST)
        top, height = bottom, step * len(lines)
        bottom += height + (30 if narrow else 12)
        row = {"y": top + height + 10 if narrow else (top + bottom) / 2}
        first = top + step / 2 if narrow else row["y"] - (len(lines) - 1) * step / 2
        words += [{"line": line, "y": first + step * place} for place, line in enumerate(lines)]
        row |= {
            "arm": arm.name,
            "lead": max(effect.difference, edge),
            "low": max(effect.low, edge),
            "high": max(effect.high, edge),
            "colour": _colour(arm),
            "fill": LIGHT["page"] if arm.dropped else _colour(arm),
            "size": 130 if arm.name == finalist else 70,
            "beyond": effect.low < edge,
            "shown": effect.difference >= edge,
        }
        rows.append(row)
    x = _x(_titled(f"lead over {baseline}", unit), [row[end] for row in rows for end in ("low", "high")])
    y = alt.Y("y:Q", scale=alt.Scale(domain=[bottom, 0], nice=False), title=None)
    y = y.axis(None if narrow else _lines(words, 330))
    base = alt.Chart(_rows(rows)).encode(y)
    dot = base.transform_filter("datum.shown").mark_point(strokeWidth=2)
    arrow = base.transform_filter("datum.beyond").mark_point(shape="triangle-left", size=60, xOffset=2)
    layers = [
        _zero(x),
        base.mark_rule(strokeWidth=2.5).encode(x("low"), _given("colour"), x2="high:Q"),
        arrow.encode(x("low"), _given("colour"), _given("colour", alt.Fill)),
        dot.encode(x("lead"), _given("colour"), _given("fill", alt.Fill), size=alt.Size("size:Q", scale=None)),
    ]
    if narrow:
        above = alt.Chart(_rows(words)).mark_text(align="left", limit=width - 20, color=LIGHT["ink"], fontSize=13)
        layers.append(above.encode(y, x=alt.value(0), text="line:N"))
    return _layers(*layers, width=width, height=bottom + 60)


def has_lead(arm: ArmResult) -> bool:
    """Whether it has a lead that can be drawn."""
    return arm.against_baseline is not None and math.isfinite(arm.against_baseline.high - arm.against_baseline.low)


def cells(arm: ArmResult, baseline: ArmResult, better: str, *, reach: float, width: int = 290) -> alt.LayerChart:
    """The arm's lead over the baseline in each cell that both finished, on an axis from -`reach` to `reach`.

    What lies beyond stands at the edge.
    """
    leads = cell_leads(arm, baseline, better)
    mean, *leads = (min(max(lead, -reach), reach) for lead in (sum(leads) / len(leads), *leads))
    x = _x(None, [-reach, reach])
    dot = alt.Chart(_rows([{"lead": mean}]))
    tick = alt.Chart(_rows([{"lead": lead} for lead in leads]))
    return _layers(
        _zero(x),
        tick.mark_tick(color=_colour(arm), opacity=0.6, height=18, thickness=2).encode(x("lead")),
        dot.mark_point(color=LIGHT["page"], fill=_colour(arm), size=100, strokeWidth=1.5).encode(x("lead")),
        width=width,
        height=58,
    )


def cell_leads(arm: ArmResult, baseline: ArmResult, better: str) -> list[float]:
    """Differences from the baseline in each cell that both finished, positive where the arm is better."""
    sign = 1 if better == "higher" else -1
    leads = [sign * (own - other) for own, other in zip(arm.cell_scores, baseline.cell_scores, strict=False)]
    return [lead for lead in leads if math.isfinite(lead)]


def reliability(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    finalist: str,
    classes: bool,
    labels: bool = False,
    width: int = 440,
) -> alt.LayerChart:
    """What was predicted against what came, binned; on the diagonal, predictions can be taken at their word.

    Args:
        curves: arm -> bins, each with `predicted` and `observed` (mean confidence and share right, 0 to 1, or mean
            prediction and mean target).
        finalist: the arm that is blue.
        classes: whether these are probabilities.
        labels: whether they are those of each label, not of the class that is predicted.
        width: in pixels.
    """
    rows = [
        {**found, "arm": name, "colour": LIGHT["part" if name == finalist else "plain"]}
        for name, bins in curves.items()
        for found in bins
    ]
    values = [row[key] for row in rows for key in ("predicted", "observed")]
    ends = [min(0.9, math.floor(10 * min(values)) / 10), 1.0] if classes else _padded(values, 0.05)
    titles = ("confidence", "share that was right") if classes else ("mean prediction", "mean target")
    titles = ("probability of a label", "share of rows with it") if labels else titles
    x, y = (
        channel(
            f"{key}:Q",
            title=title,
            scale=alt.Scale(domain=ends, nice=False),
            axis=alt.Axis(tickCount=5, **({"format": ".0%"} if classes else {})),
        )
        for channel, key, title in zip((alt.X, alt.Y), ("predicted", "observed"), titles, strict=True)
    )
    diagonal = alt.Chart(_rows([{"predicted": end, "observed": end} for end in ends]))
    base = alt.Chart(_rows(rows)).encode(x, y, _given("colour"))
    return _layers(
        diagonal.mark_line(color=LIGHT["faint"], strokeDash=[4, 4]).encode(x, y),
        base.mark_line(strokeWidth=2).encode(detail="arm:N"),
        base.mark_point(filled=True, size=55),
        width=width,
        height=min(width, 380),
    )


def cost_gain(
    arms: Sequence[ArmResult], metric: Mapping[str, str], cost: str = "seconds", *, width: int = 860
) -> alt.LayerChart:
    """Score against one of `COSTS`; filled, numbered and joined by a line the arms that no other beats (`pareto`)."""
    front = pareto(arms, metric["better"], cost)
    rows = [
        {
            "cost": {"seconds": max(arm.seconds, FASTEST), "memory": arm.memory / 1e6}.get(cost, arm.parameters),
            "score": arm.score,
            "colour": _colour(arm),
            "fill": _colour(arm) if arm in front else LIGHT["page"],
            "place": front.index(arm) + 1 if arm in front else 0,
        }
        for arm in costed(arms, cost)
    ]
    least, most = min(row["cost"] for row in rows), max(row["cost"] for row in rows)
    ratio = max(most / least, 2.0)
    ends = (least / ratio**0.08, most * ratio**0.08)
    x = alt.X(
        "cost:Q",
        title=COSTS[cost],
        scale=alt.Scale(type="log", nice=False, domain=ends),
        axis=alt.Axis(values=_ticks(*ends), format="~s" if cost == "parameters" else "~g"),
    )
    scale = alt.Scale(domain=_padded([row["score"] for row in rows], 0.16), nice=False)
    y = alt.Y("score:Q", title=_titled(metric["name"], metric["unit"]), scale=scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart(_rows(rows)).encode(x, y)
    best = base.transform_filter("datum.place > 0")
    names = [wrapped(f"{place} {arm.name}", width // 7) for place, arm in enumerate(front, 1)]
    lines = [line for name in names for line in name]
    legend = {"text": lines, "orient": "bottom", "anchor": "start", "offset": 8, "color": LIGHT["ink"]}
    return _layers(
        best.mark_line(interpolate="step-after", color=LIGHT["faint"], strokeDash=[4, 4]),
        base.mark_point(strokeWidth=2, size=80).encode(_given("colour"), _given("fill", alt.Fill)),
        best.mark_text(dx=-9, dy=-9, fontWeight=600, color=LIGHT["ink"]).encode(text="place:N"),
        width=width,
        height=300 + 16 * len(lines),
    ).properties(title=alt.TitleParams(**legend, fontSize=12, fontWeight="normal", lineHeight=16))


def costed(arms: Sequence[ArmResult], cost: str) -> list[ArmResult]:
    """The arms, dropped ones aside, of which this cost is known: one of `COSTS`."""
    finished = [arm for arm in arms if not arm.dropped and math.isfinite(arm.score)]
    return [arm for arm in finished if cost == "seconds" or getattr(arm, cost)]


def pareto(arms: Sequence[ArmResult], better: str, cost: str = "seconds") -> list[ArmResult]:
    """Of the arms that are `costed` those than which no other is both cheaper and better; cheapest first."""
    sign = 1 if better == "higher" else -1
    front: list[ArmResult] = []
    for arm in sorted(costed(arms, cost), key=lambda arm: (getattr(arm, cost), -sign * arm.score)):
        if not front or sign * arm.score > sign * front[-1].score:
            front.append(arm)
    return front


def coverage(trust: Mapping[str, float], *, width: int = 640) -> alt.LayerChart:
    """How often sets or intervals held the truth, with its interval where it has one; dashed, what they promise."""
    row = {"promised": 1 - trust["alpha"], "share": trust["coverage"]}
    row |= {end: trust.get(end, row["share"]) for end in ("low", "high")}
    ends = [max(0.0, min(row.values()) - 0.05), 1.0]
    x = alt.X("promised:Q", title="share of truths within", scale=alt.Scale(domain=ends, nice=False))
    x = x.axis(alt.Axis(tickCount=5, format=".0%"))
    base = alt.Chart(_rows([row]))
    return _layers(
        base.mark_rule(color=LIGHT["muted"], strokeDash=[4, 4], strokeWidth=2).encode(x),
        base.mark_rule(color=LIGHT["part"], strokeWidth=4).encode(alt.X("low:Q"), x2="high:Q"),
        base.mark_point(color=LIGHT["part"], fill=LIGHT["part"], size=120).encode(alt.X("share:Q")),
        width=width,
        height=96,
    )


def class_counts(counts: Mapping[str, int], *, width: int = 460) -> alt.LayerChart:
    """Rows of each class, in the order given."""
    rows = [{"class": name, "rows": count, "said": f"{count:,}"} for name, count in counts.items()]
    y = alt.Y("class:N", sort=None, title=None, axis=_names(110))
    x = alt.X("rows:Q", axis=None, scale=alt.Scale(domain=[0, 1.18 * max(counts.values())], nice=False))
    base = alt.Chart(_rows(rows)).encode(x, y)
    return _layers(
        base.mark_bar(color=LIGHT["faint"], height={"band": 0.62}),
        base.mark_text(align="left", dx=6, color=LIGHT["ink"]).encode(text="said:N"),
        width=width,
        height=25 * len(rows) + 14,
    )


def is_share(found: Finding) -> bool:
    """Whether its numbers are read as percentages."""
    return found.unit.startswith("share")


def svg(chart: alt.LayerChart, says: str) -> str:
    """The chart as an SVG element for a page with `css` in it; `says` is what it tells those who cannot see it."""
    text = vl_convert.vegalite_to_svg(chart.to_dict())
    for name, colour in LIGHT.items():
        text = text.replace(f'"{colour}"', f'"var(--{name})"')
    own = re.match(r'<svg [^>]*width="(\d+)" height="(\d+)"[^>]*>', text)
    width, height = own.groups()
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'{start} role="img" aria-label="{escape(says)}">{text[own.end() :]}'


def png(chart: alt.LayerChart) -> bytes:
    """The chart as a picture in light colours, two pixels to one."""
    return vl_convert.vegalite_to_png(chart.properties(background=LIGHT["page"]).to_dict(), scale=2)


def css() -> str:
    """The colours as CSS variables, for light and for dark."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in theme.items()) for theme in (LIGHT, DARK))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def number(value: float, interval: Interval, *, sign: bool = False) -> str:
    """The value to two digits of the interval's half width, with its sign always written if asked for."""
    half = (interval.high - interval.low) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else 2
    return f"{value:{'+' if sign else ''}z,.{digits}f}".replace("-", "\N{MINUS SIGN}")


# Shared by all


def _rows(rows: Sequence[Mapping[str, object]]) -> alt.Data:
    return alt.Data(values=list(rows))


def _x(title: str | None, values: Sequence[float], **axis: str) -> Callable[[str], alt.X]:
    """A horizontal axis that takes in the values and zero: from a field to its channel."""
    scale = alt.Scale(domain=_padded([0.0, *values], 0.06), nice=False)
    return lambda field: alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6, **axis))


def _zero(x: Callable[[str], alt.X]) -> alt.Chart:
    """The line of no difference."""
    return alt.Chart(_rows([{"zero": 0}])).mark_rule(color=LIGHT["muted"]).encode(x("zero"))


def _names(extent: int, **axis: object) -> alt.Axis:
    """A vertical axis of names, which takes as many pixels whatever they are."""
    room = {"labelLimit": extent - 8, "minExtent": extent, "maxExtent": extent}
    return alt.Axis(**room, labelColor=LIGHT["ink"], ticks=False, domain=False, grid=False, **axis)


def wrapped(name: str, letters: int) -> list[str]:
    """The name in lines of at most so many letters."""
    return textwrap.wrap(name, letters, break_on_hyphens=False)


def _lines(words: Sequence[Mapping[str, object]], extent: int) -> alt.Axis:
    """A vertical axis with a `line` of words at each `y`."""
    said = json.dumps({f"{word['y']:g}": word["line"] for word in words})
    places = [word["y"] for word in words]
    return _names(extent, values=places, labelExpr=f"({said})[datum.value]", labelOverlap=False, labelBound=False)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends of a logarithmic axis: as few to the decade as give three."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [step * 10.0**power for power in range(-4, 13) for step in steps if low <= step * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found


def _given(field: str, channel: type[alt.Color] | type[alt.Fill] = alt.Color) -> alt.Color | alt.Fill:
    """Colours as they stand in the data."""
    return channel(f"{field}:N", scale=None)


def _colour(arm: ArmResult) -> str:
    return LIGHT["plain" if arm.conventional else "part"]


def _titled(name: str, unit: str) -> str:
    return f"{name}, {unit}" if unit else name


def _padded(values: Sequence[float], share: float) -> list[float]:
    low, high = min(values), max(values)
    margin = share * ((high - low) or abs(high) or 1.0)
    return [low - margin, high + margin]


def _layers(*layers: alt.Chart, width: int, height: int) -> alt.LayerChart:
    """The layers as one picture of exactly this size."""
    axis = alt.AxisConfig(
        labelColor=LIGHT["muted"],
        titleColor=LIGHT["muted"],
        titleFontWeight="normal",
        labelFontSize=12,
        titleFontSize=12,
        titlePadding=8,
        gridColor=LIGHT["line"],
        domainColor=LIGHT["line"],
        tickColor=LIGHT["line"],
    )
    return (
        alt.layer(*layers)
        .properties(width=width, height=height, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
        .configure(font=FONT, background="transparent", padding=6, aria=False, axis=axis)
        .configure_text(fontSize=12)
        .configure_point(opacity=1)
        .configure_view(stroke=None)
    )
