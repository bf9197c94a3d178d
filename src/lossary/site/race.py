"""Where the arms of a comparison stand while it runs, from the cells that are finished; for `worker`."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lossary.compare.report import lead, span, value
from lossary.compare.result import ArmResult, Comparison, Interval
from lossary.compare.run import Plan
from lossary.compare.statistics import over_cells

SETTLED = 2  # folds of a new partition by which every arm that is still in it has a cell there
PHASES = {"tune": "Tuning every arm alike", "cell": "Racing", "confirm": "Confirming on the locked rows"}

Cells = dict[str, dict[tuple[int, int], float]]


def plan_of(plan: Plan, seconds: float) -> dict[str, Any]:
    """What is going to be run, for people."""
    protocol = plan.protocol
    return {
        "seconds": seconds,
        "metric": plan.metric.name,
        "unit": plan.metric.unit,
        "better": plan.metric.better,
        "why": plan.why,
        "rows": len(plan.search),
        "locked": len(plan.locked),
        "partitions": protocol.partitions,
        "folds": protocol.folds,
        "seeds": protocol.seeds,
        "arms": len(plan.arms),
        "skipped": len(plan.skipped),
        "notes": [*plan.problem.notes, *plan.profile.notes, *plan.notes],
    }


def standing(store: Path, plan: Plan) -> dict[str, Any]:
    """The phase, and a row for each arm: its lead over the best conventional arm so far, on the cells of both."""
    last, cells = _read(store)
    arms = {arm.name: arm for arm in plan.arms}
    sign = plan.metric.sign
    plain = [name for name in cells if name in arms and arms[name].part is None]
    best = max(plain, key=lambda name: (sign * np.nanmean(list(cells[name].values())), name), default=None)
    newest = max((key for scores in cells.values() for key in scores), default=(0, 0))
    rows = []
    for name in dict.fromkeys([*arms, *cells]):
        scores, arm = cells.get(name, {}), arms.get(name)
        both = [key for key in scores if best is not None and key in cells[best]]
        interval = None
        if name != best and len(both) > 1:
            leads = sign * np.array([scores[key] - cells[best][key] for key in both])
            interval = over_cells(leads, plan.work.bench.ratio).interval
        out = arm is not None and bool(scores) and newest[1] >= SETTLED and newest[0] > max(scores)[0]
        rows.append(
            _row(
                name=name,
                paper=arm.paper if arm else None,
                part=arm.part if arm else name,
                reason=arm.reason if arm else "put together from the best so far",
                scores=list(scores.values()),
                interval=interval,
                state="baseline" if name == best else "out" if out else "",
            )
        )
    return {"phase": PHASES.get(last, PHASES["tune"]), "race": _ordered(rows)}


def final(found: Comparison) -> dict[str, Any]:
    """The same of a comparison that is finished."""
    finalist = found.confirmation.finalist if found.confirmation else None
    rows = [_row_of(arm, "finalist" if arm.name == finalist else "") for arm in found.arms]
    return {"race": _ordered(rows)}


def _row_of(arm: ArmResult, state: str) -> dict[str, Any]:
    if arm.dropped:
        state = "out"
    elif arm.conventional and arm.against_baseline is None:
        state = "baseline"
    return _row(arm.name, arm.paper, arm.part, arm.dropped or arm.reason, arm.cell_scores, arm.against_baseline, state)


def _row(
    name: str,
    paper: str | None,
    part: str | None,
    reason: str,
    scores: Any,
    interval: Interval | None,
    state: str,
) -> dict[str, Any]:
    shown = interval is not None and np.isfinite(interval.high - interval.low)
    known = [score for score in scores if np.isfinite(score)]
    row = {"name": name, "paper": paper, "part": part, "reason": reason, "state": state, "cells": len(scores)}
    row["score"] = value(float(np.mean(known))) if known else ""
    if shown:
        row |= {"lead": interval.difference, "low": interval.low, "high": interval.high}
        row |= {"said": lead(interval), "span": span(interval)}
    return row


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first; then those that have no lead yet, then those that are out."""

    def place(row: dict[str, Any]) -> tuple[bool, bool, float]:
        told = "lead" in row or row["state"] == "baseline"
        return row["state"] == "out", not told, -row.get("lead", 0.0)

    return sorted(rows, key=place)


def _read(store: Path) -> tuple[str, Cells]:
    """The kind of the job that was finished last, and the mean score of each finished cell by arm."""
    with closing(sqlite3.connect(store, timeout=10)) as db:
        found = db.execute("select arm, partition, fold, value from cells where kind = 'cell' order by rowid")
        cells: Cells = {}
        for arm, partition, fold, text in found:
            scores = json.loads(text)["scores"]
            cells.setdefault(arm, {})[partition, fold] = float(np.mean(scores)) if scores else float("nan")
        last = db.execute("select kind from cells order by rowid desc limit 1").fetchone()
    return (last[0] if last else ""), cells
