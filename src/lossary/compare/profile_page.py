"""The profile for people: its findings as pictures, and as one HTML page that works offline."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import altair as alt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lossary.compare import charts
from lossary.compare.charts import LIGHT, _layers, _names, _padded, _rows
from lossary.compare.problem import Problem
from lossary.compare.profile import LEVEL, Finding, Profile
from lossary.compare.report import _plain, quantity
from lossary.errors import BadInput

PAGE = "profile.html"
WIDTH = 290  # pixels; of a card


def write(problem: Problem, profile: Profile, out: Path) -> dict[str, Path]:
    """Writes `profile.html`, `profile.json` and `charts/*.png` into the folder `out`, made where it is missing.

    Returns:
        the files by name: "page", "record" and the pictures' names.

    Raises:
        BadInput: the folder cannot be written to.
    """
    try:
        (out / "charts").mkdir(parents=True, exist_ok=True)
        files = {"page": out / PAGE, "record": out / "profile.json"}
        files["page"].write_text(html(problem, profile), "utf-8")
        files["record"].write_text(to_json(problem, profile), "utf-8")
        for name, chart in pictures(profile).items():
            files[name] = out / "charts" / f"{name}.png"
            files[name].write_bytes(charts.png(chart))
    except OSError as error:
        raise BadInput(f"--out: cannot write to {str(out)!r} ({error.strerror}); choose another folder") from None
    return files


def to_json(problem: Problem, profile: Profile) -> str:
    """Strict JSON: what was read, `notes` from reading, and the profile's own fields; what is not finite is null."""
    record = {"data": facts(problem), "notes": [*problem.notes, *profile.notes]}
    rest = {name: value for name, value in asdict(profile).items() if name != "notes"}
    return json.dumps(_plain(record | rest), ensure_ascii=False, allow_nan=False, indent=1)


def facts(problem: Problem) -> dict[str, Any]:
    """What was read, in plain values."""
    return {
        "name": problem.name,
        "source": problem.source,
        "target": problem.target_name,
        "task": problem.task,
        "rows": len(problem),
        "columns": len(problem.features.columns),
        "classes": problem.classes,
        "digest": problem.digest,
    }


def html(problem: Problem, profile: Profile) -> str:
    """The page."""
    env = Environment(
        loader=PackageLoader("lossary.compare"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters["quantity"] = quantity
    return env.get_template(PAGE).render(
        data=facts(problem),
        profile=profile,
        notes=(*problem.notes, *profile.notes),
        sentence=sentence(profile),
        level=LEVEL,
        css=Markup(charts.css()),
        findings=[(found, _figure(found)) for found in ordered(profile)],
    )


def sentence(profile: Profile) -> str:
    """What was found, in a sentence."""
    raised = [found.title.lower() for found in profile.findings if found.raised]
    if not raised:
        return "Nothing that was measured is an alarm."
    *most, last = raised
    return f"Found: {', '.join(most)}{' and ' if most else ''}{last}."


def ordered(profile: Profile) -> list[Finding]:
    """The findings, alarms first."""
    return sorted(profile.findings, key=lambda found: not found.raised)


def pictures(profile: Profile, *, width: int = WIDTH) -> dict[str, alt.LayerChart]:
    """A picture of each finding that has one, `width` pixels wide, by the name of its title."""
    return {
        found.title.lower().replace(" ", "-"): draw(found, width=width) for found in profile.findings if found.picture
    }


def draw(found: Finding, *, width: int = WIDTH) -> alt.LayerChart:
    """The picture of a finding that has one: brown where it is an alarm."""
    return DRAWN[found.picture["kind"]](found.picture, LIGHT["plain" if found.raised else "muted"], width)


def says(found: Finding) -> str:
    """The picture in words, for those who cannot see it."""
    numbers = (
        f"{quantity(found.value, found)} {found.unit}, {quantity(found.low, found)} to {quantity(found.high, found)}."
    )
    kind, picture = found.picture["kind"], found.picture
    if kind == "counts":
        pairs = zip(picture["names"], picture["values"], strict=True)
        return f"{numbers} Rows: " + "; ".join(f"{name} {value:,}" for name, value in pairs) + "."
    if kind in ("intervals", "limits"):
        pairs = zip(picture["names"], picture["values"], strict=True)
        return f"{numbers} {picture['x']}: " + "; ".join(f"{name} {value:.3g}" for name, value in pairs) + "."
    if kind == "curve":
        return f"{numbers} {picture['y']}: " + "; ".join(f"{x:.3g} {y:.3g}" for x, y, *_ in picture["points"]) + "."
    return numbers


def _figure(found: Finding) -> Markup | None:
    return Markup(charts.svg(draw(found), f"{found.title}: {says(found)}")) if found.picture else None


# One drawing for each kind of picture: (the picture, the colour of what is measured, pixels) to a chart


def _counts(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    return charts.class_counts(dict(zip(picture["names"], picture["values"], strict=True)), width=width)


def _reliability(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    """The last family, of two, is blue."""
    *first, last = picture["lines"]
    return charts.reliability(picture["lines"], finalist=last if first else "", classes=True, width=width)


def _intervals(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    columns = (picture[key] for key in ("names", "values", "lows", "highs"))
    rows = [dict(zip(("name", "value", "low", "high"), row, strict=True)) for row in zip(*columns, strict=True)]
    x = charts._x(picture["x"], [*picture["lows"], *picture["highs"]], format="~%")
    base = alt.Chart(_rows(rows)).encode(_by_name())
    return _layers(
        charts._zero(x),
        base.mark_rule(color=colour, strokeWidth=2.5).encode(x("low"), x2="high:Q"),
        base.mark_point(color=colour, fill=colour, size=60).encode(x("value")),
        width=width,
        height=24 * len(rows) + 50,
    )


def _limits(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    """Each value as a dot, over the grey band of what would be no alarm; hollow within it."""
    rows = [
        {"name": name, "value": value, "limit": limit, "zero": 0, "fill": colour if value > limit else LIGHT["page"]}
        for name, value, limit in zip(picture["names"], picture["values"], picture["limits"], strict=True)
    ]
    x = charts._x(picture["x"], [*picture["values"], *picture["limits"]], format="~%")
    base = alt.Chart(_rows(rows)).encode(_by_name())
    return _layers(
        base.mark_bar(color=LIGHT["line"], height={"band": 0.5}).encode(x("zero"), x2="limit:Q"),
        base.mark_point(color=colour, size=60, strokeWidth=2).encode(x("value"), charts._given("fill", alt.Fill)),
        width=width,
        height=24 * len(rows) + 50,
    )


def _histogram(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    """Square roots of the counts, so that a few rows far off can be seen; the law as a line."""
    edges = picture["edges"]
    rows = [
        {"from": low, "to": high, "zero": 0, "count": count, "law": law, "middle": (low + high) / 2}
        for low, high, count, law in zip(edges, edges[1:], picture["counts"], picture["law"], strict=False)
    ]
    for row in rows:
        row["colour"] = colour if row["from"] >= picture["cut"] - 1e-9 else LIGHT["faint"]
    x = alt.X("from:Q", title=picture["x"], scale=alt.Scale(domain=[edges[0], edges[-1]], nice=False))
    most = max(*picture["counts"], *picture["law"])
    scale = alt.Scale(type="sqrt", domain=[0, 1.05 * most], nice=False)
    ticks = [tick for power in range(7) for tick in (10**power, 3 * 10**power) if tick <= most]
    y = {"title": "rows", "scale": scale, "axis": alt.Axis(values=ticks, grid=False)}
    base = alt.Chart(_rows(rows))
    cut = alt.Chart(_rows([{"from": picture["cut"]}]))
    bars = base.mark_rect().encode(x, alt.Y("zero:Q", **y), charts._given("colour"), x2="to:Q", y2="count:Q")
    return _layers(
        bars,
        base.mark_line(color=LIGHT["part"], strokeWidth=2).encode(alt.X("middle:Q"), alt.Y("law:Q", **y)),
        cut.mark_rule(color=LIGHT["muted"], strokeDash=[4, 4]).encode(x),
        width=width,
        height=200,
    )


def _quantiles(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    """Against a normal law's, on whose line light tails stay."""
    rows = [{"x": x, "y": y} for x, y in picture["points"]]
    ends = _padded([row["x"] for row in rows], 0.03)
    x = alt.X("x:Q", title=picture["x"], scale=alt.Scale(domain=ends, nice=False))
    scale = alt.Scale(domain=_padded([*ends, *(row["y"] for row in rows)], 0.02), nice=False)
    y = alt.Y("y:Q", title=picture["y"], scale=scale)
    line = alt.Chart(_rows([{"x": end, "y": end} for end in ends]))
    return _layers(
        line.mark_line(color=LIGHT["faint"], strokeDash=[4, 4]).encode(x, y),
        alt.Chart(_rows(rows)).mark_point(filled=True, color=colour, size=22).encode(x, y),
        width=width,
        height=min(width, 260),
    )


def _curve(picture: Mapping[str, Any], colour: str, width: int) -> alt.LayerChart:
    rows = [dict(zip(("x", "y", "low", "high"), point, strict=True)) for point in picture["points"]]
    least, most = rows[0]["x"], rows[-1]["x"]
    x = alt.X("x:Q", title=picture["x"], scale=alt.Scale(domain=_padded([least, most], 0.04), nice=False))
    if most <= 1:  # shares
        ticks = [tick for tick in (0, 0.2, 0.4, 0.6, 0.8, 1) if tick >= least - 0.04]
        x = x.axis(alt.Axis(values=ticks, format="~%"))
    else:
        x = x.axis(alt.Axis(values=[row["x"] for row in rows], format="d"))
    scale = alt.Scale(domain=_padded([row[end] for row in rows for end in ("low", "high")], 0.08), nice=False)
    y = {"title": picture["y"], "scale": scale, "axis": alt.Axis(tickCount=5)}
    base = alt.Chart(_rows(rows)).encode(x)
    return _layers(
        base.mark_line(color=colour, strokeWidth=1.5, opacity=0.6).encode(alt.Y("y:Q", **y)),
        base.mark_rule(color=colour, strokeWidth=2.5).encode(alt.Y("low:Q", **y), y2="high:Q"),
        base.mark_point(color=colour, fill=colour, size=50).encode(alt.Y("y:Q", **y)),
        width=width,
        height=200,
    )


def _by_name() -> alt.Y:
    return alt.Y("name:N", sort=None, title=None, axis=_names(110))


DRAWN = {
    "counts": _counts,
    "reliability": _reliability,
    "intervals": _intervals,
    "limits": _limits,
    "histogram": _histogram,
    "quantiles": _quantiles,
    "curve": _curve,
}
