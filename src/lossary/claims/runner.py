"""Runs registered claims, and keeps their verdict files: every full run is appended, none replaced."""

import ast
import functools
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lossary
from lossary import catalogue, tasks
from lossary.catalogue import PACKAGE, Entry
from lossary.claims import Arms, Claim, Seeds
from lossary.verdict import METRICS, decide, threshold

Record = dict[str, Any]
"""One full run of one claim, as the verdict file holds it."""


def claims_of(paper: Entry) -> list[Claim]:
    """The paper's claims, in the order of their file; empty where none is registered."""
    if not paper["claims"]:
        return []
    module = import_module(f"lossary.claims.{paper['room']}.{catalogue.claim_file(paper).stem}")
    return [vars(module)[registered["name"]].__lossary_claim__ for registered in paper["claims"]]


def run(paper: Entry, claim: Claim) -> Record:
    """Measure a claim in full, at both planned looks if the first is undecided."""
    tasks.forget()
    details: list[Any] = []

    def measure(ids: tuple[int, ...]) -> tuple[Any, Any]:
        arms = claim.measure(Seeds(ids))
        details.append(dict(arms.details))
        return arms.method, arms.baseline

    start = time.perf_counter()
    verdict, method, baseline = decide(measure, claim.kind, claim.metric, **registration(claim))
    return {
        "claim": claim.name,
        "says": claim.says,
        "kind": claim.kind,
        "metric": claim.metric,
        "unit": METRICS[claim.metric].unit,
        "threshold": threshold(claim.kind, claim.metric, **registration(claim)),
        "scale": claim.scale,
        **verdict.to_json(),
        "method": _rounded(method),
        "baseline": _rounded(baseline),
        "details": details,
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"lossary": lossary.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "tasks": tasks.used(),
        "code": code(paper),
    }


def smoke(claim: Claim) -> Arms:
    """Run a claim tiny, to see that it runs. Three seeds, a handful of steps, no verdict."""
    arms = claim.measure(Seeds((0, 1, 2), smoke=True))
    shapes = {np.shape(side)[:1] for side in (arms.method, arms.baseline) if side is not None}
    if claim.kind != "exact" and shapes != {(3,)}:
        raise ValueError(f"{claim.name}: expected one number per seed from each arm, got shapes {sorted(shapes)}")
    if not all(np.isfinite(np.asarray(side)).all() for side in (arms.method, arms.baseline) if side is not None):
        raise ValueError(f"{claim.name}: measured a value that is not finite")
    return arms


def runs(paper: Entry, package: Path = PACKAGE) -> list[Record]:
    """All full runs of the paper's claims, oldest first."""
    path = catalogue.verdict_file(paper, package)
    return list(json.loads(path.read_text("utf-8"))["runs"]) if path.exists() else []


def append(paper: Entry, record: Record) -> Path:
    """Add a run to the paper's verdict file."""
    path = catalogue.verdict_file(paper)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) for r in [*runs(paper), record]]
    draft = path.with_suffix(".draft")
    draft.write_text('{"runs": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")
    draft.replace(path)
    return path


def latest(paper: Entry, package: Path = PACKAGE) -> dict[str, Record]:
    """The newest run of each claim, by the claim's name."""
    return {record["claim"]: record for record in runs(paper, package)}


def stale(paper: Entry, record: Record) -> list[str]:
    """Why a run no longer speaks of the code at hand; empty when it does."""
    now = code(paper)
    moved = [f"{name} changed" for name in now if now[name] != record["code"].get(name)]
    known = tasks.versions()
    return moved + [
        f"task {name} is now version {known.get(name)}"
        for name, version in record["tasks"].items()
        if known.get(name) != version
    ]


def code(paper: Entry) -> dict[str, str]:
    """Hashes of the syntax trees that a verdict rests on: the part, what of the rooms it builds on, its claim."""
    claim = catalogue.claim_file(paper)
    part = PACKAGE / paper["room"] / f"{paper['module'].rpartition('.')[2]}.py"
    engine = sorted({m for start in (part, claim) for m in _builds_on(start)} - {paper["module"]})
    hashes = "".join(_fingerprint(_file(module)) for module in engine)
    return {"part": paper["code"], "engine": hashes, "claim": _fingerprint(claim)}


def registration(claim: Claim) -> dict[str, Any]:
    """What the claim registers beyond its kind and metric, as the statistics take it."""
    given = {"margin": claim.margin, "tolerance": claim.tolerance, "levels": claim.levels or None}
    return {name: value for name, value in given.items() if value is not None}


def _rounded(values: Any) -> Any:
    return None if values is None else json.loads(json.dumps(np.asarray(values).tolist()), parse_float=_short)


def _short(number: str) -> float:
    return float(f"{float(number):.7g}")


def _fingerprint(path: Path) -> str:
    return _fingerprint_at(path, path.stat().st_mtime_ns)


@functools.cache
def _fingerprint_at(path: Path, _: int) -> str:
    return catalogue.fingerprint(ast.parse(path.read_text("utf-8")))


def _file(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _builds_on(path: Path, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Modules of rooms that a file reaches by import; a name taken from a room leads to the file that defines it."""
    for module in _room_modules(path, path.stat().st_mtime_ns) - seen:
        yield module
        yield from _builds_on(_file(module), seen | {module})


@functools.cache
def _owners() -> dict[tuple[str, str], str]:
    return {(e["room"], p["name"]): e["module"] for e in catalogue.entries() for p in e["parts"]}


@functools.cache
def _room_modules(path: Path, _: int) -> frozenset[str]:
    return frozenset(_imported(ast.parse(path.read_text("utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    owners = _owners()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("lossary."):
            continue
        path = (node.module or "").split(".")
        if path[1] not in catalogue.ROOMS:
            continue
        if len(path) == 3:
            yield str(node.module)
        else:
            yield from (owners[path[1], a.name] for a in node.names if (path[1], a.name) in owners)
