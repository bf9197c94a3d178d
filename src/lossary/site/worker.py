"""One run, in a process of its own: `python -m lossary.site.worker FOLDER`, started by `runs`.

Here alone are uploaded files parsed and models trained. What is to be done is read from `given.json`; `progress.json`
tells how far it is, and `outcome.json`, written last, that it is done or why it was refused.
"""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lossary.errors import BadInput
from lossary.site.runs import too_much_memory

READING = ("target", "task", "group", "time", "id", "drop")
NAMES = ("target", "label", "class", "y", "outcome", "response", "result", "category")
MOST_COLUMNS = 500  # that a page lists
MOST_GUESSES = 3
SPARE = 4_000_000_000  # bytes of address space beside the memory that is held
OFTEN = 0.3  # seconds between two words of progress

Given = dict[str, Any]


def main(folder: Path) -> None:
    """Does what `given.json` in the folder says."""
    threading.Thread(target=_end_with_server, daemon=True).start()
    given = json.loads((folder / "given.json").read_text("utf-8"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = given["memory"] + SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # at once; the server looks at what is really held
    try:
        outcome = KINDS[given["kind"]](given, folder, Progress(folder))
    except BadInput as error:
        outcome = {"refused": worded(str(error), given)}
    except Exception as error:
        if not re.search("MemoryError|not enough memory|Cannot allocate memory", f"{type(error).__name__}: {error}"):
            raise
        outcome = {"refused": too_much_memory(given["memory"])}
    write(folder / "outcome.json", outcome)


class Progress:
    """Tells how far a run is, not too often."""

    def __init__(self, folder: Path) -> None:
        self._path, self._last = folder / "progress.json", 0.0

    def __call__(self, phase: str, done: int = 0, total: int = 0, detail: str = "", **more: Any) -> None:
        write(self._path, {"phase": phase, "done": done, "total": total, "detail": detail, **more})
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last > OFTEN


def write(path: Path, record: dict[str, Any]) -> None:
    """The record as JSON, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record, ensure_ascii=False, default=lambda array: array.tolist()), "utf-8")
    draft.replace(path)


def worded(message: str, given: Given) -> str:
    """The message without the server's path and the command line's words."""
    source = given.get("source") or ""
    for path in (repr(source), source):
        message = message.replace(path, repr(given.get("name", ""))) if path else message
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda option: f"“{option[1].replace('-', ' ').capitalize()}”", message)


# A profile


def profile(given: Given, folder: Path, tell: Progress) -> dict[str, Any]:
    """What columns there are, and what is found when one of them is the target: the one asked for, or a likely one."""
    tell("Reading the file")
    columns = look(given)
    found: dict[str, Any] = {key: columns[key] for key in ("rows", "columns", "more", "guesses", "notes")}
    from lossary.compare import metrics, profile_page  # after the first look: they take seconds to load
    from lossary.compare.load import load
    from lossary.compare.problem import lock
    from lossary.compare.profile import profile as measure

    asked = reading(given)
    for target in [asked["target"]] if asked["target"] else columns["guesses"]:
        try:
            problem = load(given["source"], **{**asked, "target": target})
        except BadInput as error:
            found |= {"target": target, "refusal": worded(str(error), given)}
            continue
        found = {key: value for key, value in found.items() if key != "refusal"}
        measured = measure(
            problem,
            lock(problem)[0],
            progress=lambda done, total, what: tell("Looking for trouble", done, total, what.removeprefix("profile: ")),
        )
        profile_page.write(problem, measured, folder / "out")
        return found | {
            "target": target,
            "task": problem.task,
            "metrics": [metric.name for metric in metrics.METRICS if problem.task in metric.tasks],
            "sentence": profile_page.sentence(measured),
            "looked": measured.num_samples,
            "classes": len(problem.classes),
            "notes": [*problem.notes, *measured.notes],
            "findings": [_finding(each) for each in profile_page.ordered(measured)],
        }
    return found


def _finding(found: Any) -> dict[str, Any]:
    from lossary.compare.report import quantity

    shown = {end: quantity(getattr(found, end), found) for end in ("value", "low", "high")}
    return {**shown, "title": found.title, "unit": found.unit, "means": found.means, "raised": found.raised}


def look(given: Given) -> dict[str, Any]:
    """The columns of the source, and those that are likely to be what is to be predicted."""
    from lossary.compare.bundled import BUNDLED
    from lossary.compare.load import read
    from lossary.compare.load.words import quote

    if "bundled" in given and given["bundled"] not in BUNDLED:
        raise BadInput(f"no bundled set {given['bundled']!r}; choose one of {', '.join(BUNDLED)}")
    table = read(given["source"])
    columns: list[dict[str, Any]] = []
    for name, values in list(table.frame.items())[:MOST_COLUMNS]:
        known = values.dropna()
        distinct = known.unique()
        kind = {"b": "yes or no", "i": "numbers", "u": "numbers", "f": "numbers", "M": "dates"}.get(values.dtype.kind)
        columns.append(
            {
                "name": name,
                "kind": kind or "words",
                "distinct": len(distinct),
                "missing": 1 - len(known) / max(len(values), 1),
                "examples": [quote(str(value))[1:-1] for value in distinct[:3]],
            }
        )
    more = len(table.columns) - len(columns)
    for name in [*table.dense, *table.lists][: MOST_COLUMNS - len(columns)]:
        columns.append({"name": name, "kind": "several numbers", "distinct": 0, "missing": 0, "examples": []})
        more -= 1
    named = [table.target] if table.target else []
    guesses = named or guess(columns, len(table))
    return {"rows": table.total, "columns": columns, "more": more, "guesses": guesses, "notes": list(table.notes)}


def guess(columns: Sequence[dict[str, Any]], rows: int) -> list[str]:
    """Names of the columns that are likely to be the target, the likeliest first.

    One called so; then the last and the first column, as tables have it there; then any. Each must tell rows apart
    without naming them: words have few values, and a whole column of different ones is an index.
    """

    def fit(column: dict[str, Any]) -> bool:
        few = 2 <= column["distinct"] <= max(20, rows // 20)
        return column["missing"] < 0.5 and (few or (column["kind"] == "numbers" and 2 < column["distinct"] < rows))

    def called(column: dict[str, Any]) -> int:
        words = re.split(r"[^a-z0-9]+", column["name"].casefold())
        return next((place for place, name in enumerate(NAMES) if name in words), len(NAMES))

    fitting = [column for column in columns if fit(column)]
    by_name = sorted((column for column in fitting if called(column) < len(NAMES)), key=called)
    ends = [column for column in (columns[-1:] + columns[:1]) if column in fitting]
    likely = [*by_name, *ends] or fitting
    return list(dict.fromkeys(column["name"] for column in likely))[:MOST_GUESSES]


def reading(given: Given) -> dict[str, Any]:
    """The arguments of `load`."""
    return {name: given.get(name) for name in READING} | {"drop": tuple(given.get("drop") or ())}


# A comparison


def compare(given: Given, folder: Path, tell: Progress) -> dict[str, Any]:
    """The comparison, and while it runs where each arm stands."""
    tell("Reading and profiling")
    from lossary.compare import metrics, report, run
    from lossary.compare.bundled import BUNDLED
    from lossary.compare.cells import Protocol
    from lossary.compare.result import winning
    from lossary.site.race import final, plan_of, standing

    if "bundled" in given and given["bundled"] not in BUNDLED:
        raise BadInput(f"no bundled set {given['bundled']!r}; choose one of {', '.join(BUNDLED)}")
    metric = given.get("metric")
    if metric is not None:
        metrics.named(metric)  # a name of ours; never one of code
    protocol = None if given["protocol"] is None else Protocol(**given["protocol"])
    options: dict[str, Any] = {
        **reading(given),
        "metric": metric,
        "budget": given.get("budget"),
        "seeds": (protocol or Protocol()).seeds,
        "out": folder / "out",
        "protocol": protocol,
    }
    (folder / "out").mkdir(exist_ok=True)

    plan, described = None, {}

    def planned(found: run.Plan, seconds: float) -> None:
        nonlocal plan, described
        plan, described = found, plan_of(found, seconds)
        tell("Tuning every arm alike", plan=described)

    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("profile: "):
            tell("Reading and profiling", done, total, what.removeprefix("profile: "))
        elif plan is None and tell.due:
            tell("Trying every arm once", done, total, what)
        elif plan is not None and (tell.due or done == total):
            at = standing(folder / "out" / run.STORE, plan)
            tell(at.pop("phase"), done, total, what, plan=described, **at)

    found = run.compare(given["source"], progress=progress, planned=planned, **options)
    tell("Done", plan=described, **final(found))
    sure = found.confirmation
    return {
        "sentence": found.sentence,
        "own": found.own,
        "verdict": report.verdict(sure),
        "winner": winning(found).name,
        "seconds": found.seconds,
        "rows": found.data["rows"],
        "locked": found.data["locked"],
        "notes": found.notes,
    }


# A claim


def claim(given: Given, folder: Path, tell: Progress) -> dict[str, Any]:
    """The claim in full, as `lossary claim` runs it; nothing is recorded in the catalogue."""
    tell("Loading")
    import torch

    from lossary import catalogue
    from lossary.claims import runner
    from lossary.verdict import judge

    torch.set_num_threads(1)  # small models only wait on a second thread
    where = (given["room"], given["paper"])
    paper = next(entry for entry in catalogue.entries() if (entry["room"], entry["id"]) == where)
    registered = next((each for each in runner.claims_of(paper) if each.name == given["name"]), None)
    if registered is None:
        raise BadInput(f"{given['paper']} has no claim {given['name']!r} any more")
    looks: list[Any] = []

    def told(seeds: Any) -> Any:
        first = not looks
        ids = list(seeds.ids)
        tell("First look" if first else "Second look, as the first was undecided", detail=_seeds(ids), looks=looks)
        arms = registered.measure(seeds)
        if first and registered.kind != "exact":
            at = judge(
                registered.kind, arms.method, arms.baseline, metric=registered.metric,
                **runner.registration(registered),
            )  # fmt: skip
            looks.append(at.to_json())
        return arms

    record = runner.run(paper, replace(registered, measure=told))
    write(folder / "record.json", record)
    return {"record": record, "looks": looks}


def _seeds(ids: Sequence[int]) -> str:
    return f"seeds {min(ids)} to {max(ids)}"


KINDS: dict[str, Callable[[Given, Path, Progress], dict[str, Any]]] = {
    "profile": profile,
    "compare": compare,
    "claim": claim,
}


def _end_with_server() -> None:
    """The server holds the other end of this pipe as long as it lives."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
