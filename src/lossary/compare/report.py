"""The report of a comparison: one HTML file that works offline, its JSON, and its charts as pictures."""

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import altair as alt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lossary.compare import charts
from lossary.compare.profile import Finding
from lossary.compare.result import ArmResult, Comparison, Confirmation, Interval, winning
from lossary.errors import BadInput

WIDE, NARROW = 940, 342  # pixels: a desktop's column, and a phone of 390 without its margins
MOST_CLASSES = 12  # with more, no confusion is shown
COSTS = {"seconds": "cost", "memory": "memory", "parameters": "parameters"}  # and the names of their charts
NEW = "new.csv"  # stands for rows to predict


def write(comparison: Comparison, out: Path) -> dict[str, Path]:
    """Writes `report.html`, `result.json` and `charts/*.png` into the folder `out`, which is made where it is missing.

    The page shows a `winner.py` that is already there.

    Returns:
        the files by name: "report", "result" and the charts' names.

    Raises:
        BadInput: the folder cannot be written to.
    """
    drawn = {name: draw(WIDE) for name, draw in _pictures(comparison)} | _findings_page().pictures(comparison.profile)
    try:
        (out / "charts").mkdir(parents=True, exist_ok=True)
        winner = out / "winner.py"
        script = winner.read_text("utf-8") if winner.exists() else ""
        files = {"report": out / "report.html", "result": out / "result.json"}
        files["report"].write_text(html(comparison, script, out), "utf-8")
        files["result"].write_text(to_json(comparison), "utf-8")
        for name, chart in drawn.items():
            files[name] = out / "charts" / f"{name}.png"
            files[name].write_bytes(charts.png(chart))
    except OSError as error:
        raise BadInput(f"--out: cannot write to {str(out)!r} ({error.strerror}); choose another folder") from None
    return files


def to_json(comparison: Comparison) -> str:
    """Strict JSON by the schema in `schema.md`: what is not finite is null."""
    return json.dumps(_plain(comparison.to_json()), ensure_ascii=False, allow_nan=False, indent=1)


def html(comparison: Comparison, winner: str = "", folder: Path | None = None) -> str:
    """The page. `winner` is the source of `winner.py`, `folder` where the model lies, both shown where given."""
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
        "memory": memory,
        "capital": capital,
        "share": share,
        "shown": shown,
        "value": value,
        "plain": charts.number,
        "quantity": quantity,
        "runs": runs,
    }
    pictures = {name: _figure(draw, _says(comparison, name)) for name, draw in _pictures(comparison)}
    return env.get_template("report.html").render(
        c=comparison,
        css=Markup(charts.css()),
        pictures=pictures,
        winning=winning(comparison),
        brought=_brought(comparison),
        predict=_predict(comparison, folder),
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


def runs(confirmation: Confirmation) -> str:
    """20 seeds each; 20 seeds against one run, where the baseline draws nothing."""
    words = [f"{seeds} seeds" if seeds > 1 else "one run" for seeds in confirmation.seeds]
    return f"{words[0]} each" if words[0] == words[1] else " against ".join(words)


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


def memory(size: int) -> str:
    """66 kB, 1.9 MB, 34 MB, 2.1 GB."""
    unit, amount = next(
        (u, size / per) for u, per in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= per or u == "kB"
    )
    return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"


def capital(name: str) -> str:
    """With a capital at its beginning, unless it has its own, as mAP."""
    return name if name[1:2].isupper() else name[:1].upper() + name[1:]


def share(amount: float, low: float | None = None, high: float | None = None) -> str:
    """A share as a percentage, as precise as its interval where it has one."""
    return charts.number(100 * amount, Interval(0.0, 100 * (low or 0.0), 100 * (high or 0.03))) + "%"


def value(setting: Any) -> str:
    """A hyper-parameter as one would write it."""
    if isinstance(setting, float):
        return f"{setting:.4g}"
    if isinstance(setting, tuple | list):
        return ", ".join(map(value, setting))
    if isinstance(setting, Mapping):
        return ", ".join(f"{name} {value(entry)}" for name, entry in setting.items())
    return str(setting)


def shown(setting: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """What tuning chose and the data filled in, as one would write it: of each part by name, then of the model."""
    model = {name: entry for name, entry in setting.items() if name not in ("family", "parts")}
    parts = [
        (part["part"].rpartition(".")[2], {**part.get("hyper", {}), **part.get("facts", {})})
        for part in setting.get("parts", ())
    ]
    return [
        (name, {key: value(entry) for key, entry in entries.items() if entry is not None})
        for name, entries in (*parts, ("", model))
    ]


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
    if brought := _brought(c):
        yield "brought", lambda width: charts.interval_plot(brought, unit, width=width)
    if c.curves.get("reliability"):
        yield (
            "reliability",
            lambda width: charts.reliability(
                c.curves["reliability"],
                finalist=finalist,
                classes=bool(classes),
                labels=c.data["task"] == "multilabel",
                width=min(width, 440),
            ),
        )
    for cost, name in COSTS.items():
        several = {getattr(arm, cost) for arm in charts.costed(c.arms, cost)}
        if len(several) > (cost != "seconds"):  # time is always shown, the others where arms differ in them
            most = WIDE if cost == "seconds" else 440
            yield (
                name,
                lambda width, cost=cost, most=most: charts.cost_gain(c.arms, c.metric, cost, width=min(width, most)),
            )
    if c.trust:
        yield "trust", lambda width: charts.coverage(c.trust, width=min(width, 640))


def _says(c: Comparison, name: str) -> str:
    """A chart in words, for those who cannot see it."""
    unit = c.metric["unit"]
    if name in ("confirmation", "brought"):
        sure = c.confirmation if name == "confirmation" else _brought(c)
        return (
            f"{sure.finalist} leads {sure.baseline} by {lead(sure.effect)} {unit} on the locked rows, 95% interval "
            f"{span(sure.effect)}; the smallest detectable lead is {charts.number(sure.detectable, sure.effect)}."
        )
    if name == "leaderboard":
        leads = "; ".join(f"{a.name} {lead(a.against_baseline)}" for a in c.arms if a.against_baseline)
        return f"Leads over the baseline in the search, {unit}: {leads}. The table below has the intervals."
    if name == "reliability":
        return (
            "Predicted against observed, in bins: "
            + "; ".join(
                f"{arm} " + ", ".join(f"{bin['predicted']:.3g} against {bin['observed']:.3g}" for bin in bins)
                for arm, bins in c.curves["reliability"].items()
            )
            + "."
        )
    if name == "trust":
        return (
            f"{share(c.trust['coverage'])} of the truths were within, {100 * (1 - c.trust['alpha']):g}% was promised."
        )
    cost = next(cost for cost, chart in COSTS.items() if chart == name)
    tell = {"seconds": duration, "memory": memory, "parameters": "{:,}".format}[cost]
    front = "; ".join(
        f"{arm.name} {tell(getattr(arm, cost))} {arm.score:.4g}"
        for arm in charts.pareto(c.arms, c.metric["better"], cost)
    )
    return f"{c.metric['name']} against {charts.COSTS[cost]}. No other arm is both cheaper and better than: {front}."


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


def _brought(c: Comparison) -> Confirmation | None:
    """The finalist against what the user brought."""
    if not c.brought:
        return None
    held = c.brought["against"]
    return Confirmation(**{**held, "effect": Interval(**held["effect"])})


def _predict(c: Comparison, folder: Path | None) -> str:
    """The command that applies the winner."""
    words = ["lossary", "predict", str(folder), NEW, *(["--with-sets"] if c.trust else [])]
    return "" if folder is None else shlex.join(words)


def _findings_page() -> ModuleType:
    from lossary.compare import profile_page  # not above: it imports this module

    return profile_page


def _findings(c: Comparison) -> list[tuple[Finding, Markup | None]]:
    page = _findings_page()
    return [
        (
            found,
            Markup(charts.svg(page.draw(found), f"{found.title}: {page.says(found)}")) if found.picture else None,
        )
        for found in page.ordered(c.profile)
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
