"""Charts of a comparison: functions from its records to Altair charts, the same on a page and as a picture.

They are drawn in the colours of `LIGHT`. In the SVG each becomes the CSS variable of its name, which `css` defines for
light and for dark, so that one picture serves both. `width` is that of the whole picture in pixels and text keeps
its size, so a phone gets a narrower chart, not a smaller one.

Every interval is a line, every estimate a dot; published parts are blue, what is conventional is brown.
"""

import math
import re
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
    known = [arm.against_baseline for arm in arms if has_lead(arm)]
    edge = median(e.difference for e in known) - 4 * median(e.high - e.low for e in known)
    rows = [
        {
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
        for arm in arms
        if has_lead(arm) and (effect := arm.against_baseline)
    ]
    narrow = width < NARROW
    x = _x(_titled(f"lead over {baseline}", unit), [row[end] for row in rows for end in ("low", "high")])
    base = alt.Chart(_rows(rows)).encode(alt.Y("arm:N", sort=None, title=None, axis=None if narrow else _names(330)))
    dot = base.transform_filter("datum.shown").mark_point(strokeWidth=2)
    arrow = base.transform_filter("datum.beyond").mark_point(shape="triangle-left", size=60, xOffset=2)
    layers = [
        _zero(x),
        base.mark_rule(strokeWidth=2.5).encode(x("low"), _given("colour"), x2="high:Q"),
        arrow.encode(x("low"), _given("colour"), _given("colour", alt.Fill)),
        dot.encode(x("lead"), _given("colour"), _given("fill", alt.Fill), size=alt.Size("size:Q", scale=None)),
    ]
    if narrow:
        above = base.mark_text(align="left", dy=-15, limit=width - 20, color=LIGHT["ink"], fontSize=13)
        layers.append(above.encode(x=alt.value(0), text="arm:N"))
    return _layers(*layers, width=width, height=(46 if narrow else 28) * len(rows) + 60)


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
    curves: Mapping[str, Sequence[Mapping[str, float]]], *, finalist: str, classes: bool, width: int = 440
) -> alt.LayerChart:
    """What was predicted against what came, binned; on the diagonal, predictions can be taken at their word.

    Args:
        curves: arm -> bins, each with `predicted` and `observed` (mean confidence and share right, 0 to 1, or mean
            prediction and mean target).
        finalist: the arm that is blue.
        classes: whether these are confidences.
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


def cost_gain(arms: Sequence[ArmResult], metric: Mapping[str, str], *, width: int = 860) -> alt.LayerChart:
    """Score against training time; the line joins the arms, filled, that no other beats in both (`pareto`)."""
    front = pareto(arms, metric["better"])
    rows = [
        {
            "arm": arm.name,
            "seconds": max(arm.seconds, FASTEST),
            "score": arm.score,
            "colour": _colour(arm),
            "fill": _colour(arm) if arm in front else LIGHT["page"],
            "best": arm in front,
            "above": arm not in front or (len(front) - front.index(arm)) % 2 == 1,  # so that neighbours do not collide
        }
        for arm in arms
        if not arm.dropped and math.isfinite(arm.score)
    ]
    fast, slow = min(row["seconds"] for row in rows), max(row["seconds"] for row in rows)
    ratio = max(slow / fast, 2.0)
    ends = (fast / ratio**0.06, slow * ratio**0.3)  # room for a name at the right of the slowest
    ticks = [step * 10.0**power for power in range(-3, 7) for step in (1, 3)]
    x = alt.X(
        "seconds:Q",
        title="seconds per fit",
        scale=alt.Scale(type="log", nice=False, domain=ends),
        axis=alt.Axis(values=[tick for tick in ticks if ends[0] <= tick <= ends[1]], format="~g"),
    )
    scale = alt.Scale(domain=_padded([row["score"] for row in rows], 0.12), nice=False)
    y = alt.Y("score:Q", title=_titled(metric["name"], metric["unit"]), scale=scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart(_rows(rows)).encode(x, y)
    best = base.transform_filter("datum.best")
    name = {"align": "left", "dx": 8, "limit": width // 3, "color": LIGHT["ink"]}
    return _layers(
        best.mark_line(interpolate="step-after", color=LIGHT["faint"], strokeDash=[4, 4]),
        base.mark_point(strokeWidth=2, size=80).encode(_given("colour"), _given("fill", alt.Fill)),
        best.transform_filter("datum.above").mark_text(**name, dy=-9).encode(text="arm:N"),
        best.transform_filter("!datum.above").mark_text(**name, dy=12).encode(text="arm:N"),
        width=width,
        height=320,
    )


def pareto(arms: Sequence[ArmResult], better: str) -> list[ArmResult]:
    """The arms, dropped ones aside, than which no other is both faster and better; fastest first."""
    sign = 1 if better == "higher" else -1
    front: list[ArmResult] = []
    finished = [arm for arm in arms if not arm.dropped and math.isfinite(arm.score)]
    for arm in sorted(finished, key=lambda arm: (arm.seconds, -sign * arm.score)):
        if not front or sign * arm.score > sign * front[-1].score:
            front.append(arm)
    return front


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


def finding(found: Finding, *, width: int = 290) -> alt.LayerChart:
    """The estimate with its interval, on an axis from zero; brown where it raised an alarm."""
    colour = LIGHT["plain" if found.raised else "muted"]
    base = alt.Chart(_rows([{"value": found.value, "low": found.low, "high": found.high}]))
    x = _x(None, [found.low, found.high], **({"format": "~%"} if is_share(found) else {}))
    return _layers(
        base.mark_rule(color=colour, strokeWidth=3).encode(x("low"), x2="high:Q"),
        base.mark_point(color=colour, fill=colour, size=90).encode(x("value")),
        width=width,
        height=50,
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


def _names(extent: int) -> alt.Axis:
    """A vertical axis of names, which takes as many pixels whatever they are."""
    room = {"labelLimit": extent - 8, "minExtent": extent, "maxExtent": extent}
    return alt.Axis(**room, labelColor=LIGHT["ink"], ticks=False, domain=False, grid=False)


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
