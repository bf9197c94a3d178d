"""The report of a comparison: one HTML file that works offline, its JSON, and its charts as pictures."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import altair as alt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lossary.compare import charts
from lossary.compare.profile import Finding
from lossary.compare.result import ArmResult, Comparison, Confirmation, Interval
from lossary.errors import BadInput

WIDE, NARROW = 940, 342  # pixels: a desktop's column, and a phone of 390 without its margins
MOST_CLASSES = 12  # with more, neither class counts nor confusion are drawn


def write(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Writes `report.html`, `result.json` and `charts/*.png` into the folder `out`, which is made where it is missing.

    A `winner.py` that is already there is shown in the report.

    Returns:
        the files by name: "report", "result" and the charts' names.

    Raises:
        BadInput: the folder cannot be written to.
    """
    pictures = dict(_pictures(comparison))
    try:
        (out / "charts").mkdir(parents=True, exist_ok=True)
        winner = out / "winner.py"
        script = winner.read_text("utf-8") if winner.exists() else ""
        files = {"report": out / "report.html", "result": out / "result.json"}
        files["report"].write_text(html(comparison, script), "utf-8")
        files["result"].write_text(to_json(comparison), "utf-8")
        for name, draw in pictures.items():
            files[name] = out / "charts" / f"{name}.png"
            files[name].write_bytes(charts.png(draw(WIDE)))
    except OSError as error:
        raise BadInput(f"--out: cannot write to {str(out)!r} ({error.strerror}); choose another folder") from None
    return files


def to_json(comparison: Comparison) -> str:
    """Strict JSON by the schema in `schema.md`: what is not finite is null."""
    return json.dumps(_plain(comparison.to_json()), ensure_ascii=False, allow_nan=False, indent=1)


def html(comparison: Comparison, winner: str = "") -> str:
    """The page. `winner` is the source of `winner.py`, shown where it is given."""
    env = Environment(
        loader=PackageLoader("lossary.compare"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters |= {
        "lead": lead,
        "span": span,
        "time": duration,
        "shown": shown,
        "value": value,
        "plain": charts.number,
        "quantity": quantity,
    }
    pictures = {name: _figure(draw, _says(comparison, name)) for name, draw in _pictures(comparison)}
    return env.get_template("report.html").render(
        c=comparison,
        css=Markup(charts.css()),
        pictures=pictures,
        verdict=verdict(comparison.confirmation),
        baseline=_baseline(comparison),
        typical=_typical(comparison),
        strips=_strips(comparison),
        findings=_findings(comparison),
        skipped=_by_reason(comparison.skipped),
        confusion=_confusion(comparison),
        winner=winner,
    )


def verdict(confirmation: Confirmation | None) -> str:
    """What the confirmation's interval allows to be said, in a word or two."""
    if confirmation is None:
        return "nothing to confirm"
    if confirmation.exploratory:
        return "exploratory only"
    if confirmation.effect.low > 0:
        return "confirmed"
    return "worse" if confirmation.effect.high < 0 else "not shown to help"


def lead(effect: Interval) -> str:
    """+1.9, as precise as its interval."""
    return charts.number(effect.difference, effect, sign=True)


def span(effect: Interval) -> str:
    """+0.7 to +3.1."""
    return f"{charts.number(effect.low, effect, sign=True)} to {charts.number(effect.high, effect, sign=True)}"


def quantity(amount: float, found: Finding) -> str:
    """A finding's number as precise as its interval, a share as a percentage."""
    scale, unit = (100, "%") if charts.is_share(found) else (1, "")
    like = Interval(amount, scale * found.low, scale * found.high)
    return charts.number(scale * amount, like) + unit


def duration(seconds: float) -> str:
    """0.02 s, 42 s, 2 min 5 s, 1 h 3 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def value(setting: Any) -> str:
    """A hyper-parameter as one would write it."""
    if isinstance(setting, float):
        return f"{setting:.4g}"
    if isinstance(setting, tuple | list):
        return ", ".join(map(value, setting))
    if isinstance(setting, Mapping):
        return ", ".join(f"{name} {value(entry)}" for name, entry in setting.items())
    return str(setting)


def shown(setting: Mapping[str, Any]) -> dict[str, str]:
    """What tuning chose and the data filled in, part and model aside, each as one would write it."""
    inner = {**setting.get("hyper", {}), **setting.get("facts", {})}
    outer = {name: entry for name, entry in setting.items() if name not in ("family", "part", "role", "hyper", "facts")}
    return {name: value(entry) for name, entry in {**inner, **outer}.items() if entry is not None}


# What the page shows


def _pictures(c: Comparison) -> Iterator[tuple[str, Callable[[int], alt.LayerChart]]]:
    """Name, and drawing for a width, of the charts that this comparison has."""
    unit, classes = c.metric["unit"], c.data["classes"]
    finalist = c.confirmation.finalist if c.confirmation else ""
    if c.confirmation:
        yield "confirmation", lambda width: charts.interval_plot(c.confirmation, unit, width=width)
    if any(map(charts.has_lead, c.arms)):
        baseline = "the baseline" if (held := _baseline(c)) is None else held.name
        yield (
            "leaderboard",
            lambda width: charts.forest(c.arms, unit, baseline=baseline, finalist=finalist, width=width),
        )
    if 0 < len(classes) <= MOST_CLASSES:
        counts = dict(zip(classes, c.profile.class_counts, strict=True))
        yield "classes", lambda width: charts.class_counts(counts, width=min(width, 440))
    if c.curves.get("reliability"):
        yield (
            "reliability",
            lambda width: charts.reliability(
                c.curves["reliability"], finalist=finalist, classes=bool(classes), width=min(width, 440)
            ),
        )
    yield "cost", lambda width: charts.cost_gain(c.arms, c.metric, width=width)


def _says(c: Comparison, name: str) -> str:
    """A chart in words, for those who cannot see it."""
    unit = c.metric["unit"]
    if name == "confirmation" and c.confirmation:
        sure = c.confirmation
        return (
            f"{sure.finalist} leads {sure.baseline} by {lead(sure.effect)} {unit} on the locked rows, 95% interval "
            f"{span(sure.effect)}; the smallest detectable lead is {charts.number(sure.detectable, sure.effect)}."
        )
    if name == "leaderboard":
        leads = "; ".join(f"{a.name} {lead(a.against_baseline)}" for a in c.arms if a.against_baseline)
        return f"Leads over the baseline in the search, {unit}: {leads}. The table below has the intervals."
    if name == "classes":
        pairs = zip(c.data["classes"], c.profile.class_counts, strict=True)
        return "Rows of each class: " + "; ".join(f"{label} {count:,}" for label, count in pairs) + "."
    if name == "reliability":
        return (
            "Predicted against observed, in bins: "
            + "; ".join(
                f"{arm} " + ", ".join(f"{bin['predicted']:.3g} against {bin['observed']:.3g}" for bin in bins)
                for arm, bins in c.curves["reliability"].items()
            )
            + "."
        )
    front = "; ".join(
        f"{arm.name} {duration(arm.seconds)} {arm.score:.4g}" for arm in charts.pareto(c.arms, c.metric["better"])
    )
    return f"{c.metric['name']} against seconds per fit. No other arm is both faster and better than: {front}."


def _figure(draw: Callable[[int], alt.LayerChart], says: str) -> Markup:
    """The chart for wide screens and for phones; style sheets show one of them."""
    wide, narrow = charts.svg(draw(WIDE), says), charts.svg(draw(NARROW), says)
    if wide == narrow:
        return Markup(wide)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


def _baseline(c: Comparison) -> ArmResult | None:
    """The arm that all others are held against."""
    if c.confirmation:
        return next(arm for arm in c.arms if arm.name == c.confirmation.baseline)
    return next((arm for arm in c.arms if arm.conventional and arm.against_baseline is None), None)


def _typical(c: Comparison) -> Interval:
    """The interval of middling width, by whose precision the scores are written."""
    intervals = [arm.against_baseline for arm in c.arms if arm.against_baseline] or [Interval(0.0, 0.0, 0.0)]
    return sorted(intervals, key=lambda interval: interval.high - interval.low)[len(intervals) // 2]


def _strips(c: Comparison) -> dict[str, Markup]:
    """Per arm its leads cell by cell, all on one axis, which is four times as long as a middling arm needs."""
    baseline = _baseline(c)
    if baseline is None:
        return {}
    better = c.metric["better"]
    leads = {arm.name: charts.cell_leads(arm, baseline, better) for arm in c.arms if arm is not baseline}
    sizes = [sum(map(abs, every)) / len(every) for every in leads.values() if every]
    furthest = max((abs(lead) for every in leads.values() for lead in every), default=0.0)
    reach = min(4 * median(sizes), furthest) if furthest else 1.0
    return {
        arm.name: Markup(
            charts.svg(
                charts.cells(arm, baseline, better, reach=reach),
                f"{sum(lead > 0 for lead in leads[arm.name])} of {len(leads[arm.name])} cells lie ahead.",
            )
        )
        for arm in c.arms
        if leads.get(arm.name)
    }


def _findings(c: Comparison) -> list[tuple[Any, Markup]]:
    return [
        (
            found,
            Markup(
                charts.svg(
                    charts.finding(found),
                    f"{found.title}: {found.value:.3g}, interval {found.low:.3g} to {found.high:.3g} {found.unit}.",
                )
            ),
        )
        for found in c.profile.findings
    ]


def _by_reason(skipped: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Reasons with the parts that share them, the most frequent first."""
    reasons: dict[str, list[str]] = {}
    for part, reason in skipped:
        reasons.setdefault(reason, []).append(part)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def _confusion(c: Comparison) -> dict[str, list[tuple[str, list[tuple[int, int]]]]]:
    """Per arm the rows of its table: true class, and for each predicted class the count and its percentage."""
    if len(c.data["classes"]) > MOST_CLASSES:
        return {}
    return {
        arm: [
            (label, [(count, round(100 * count / (sum(row) or 1))) for count in row])
            for label, row in zip(c.data["classes"], matrix, strict=True)
        ]
        for arm, matrix in c.curves.get("confusion", {}).items()
    }


def _plain(entry: Any) -> Any:
    """What strict JSON takes, in the same shape."""
    if isinstance(entry, Mapping):
        return {str(name): _plain(inner) for name, inner in entry.items()}
    if isinstance(entry, tuple | list):
        return [_plain(inner) for inner in entry]
    if hasattr(entry, "tolist"):  # numpy's scalars and arrays
        return _plain(entry.tolist())
    if isinstance(entry, float):
        return entry if math.isfinite(entry) else None
    return entry if entry is None or isinstance(entry, bool | int | str) else str(entry)
