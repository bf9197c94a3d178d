"""What is missing, stale or out of order: parts without a reference, claims without a verdict, and the like."""

import ast
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lossary import catalogue
from lossary.catalogue import PACKAGE, Entry
from lossary.claims import runner
from lossary.vocabulary import SYMPTOMS

ROOT = PACKAGE.parents[1]
REFERENCES = ROOT / "tests" / "references"

Finding = dict[str, str]
"""id, room, and what is the matter; id "*" is the room as a whole."""


def audit(room: str | None = None) -> list[Finding]:
    """All findings, by paper. In an installed wheel, tests and history are absent and their checks are skipped."""
    papers = [paper for paper in catalogue.entries() if room in (None, paper["room"])]
    found = [{"id": paper["id"], "room": paper["room"], "finding": text} for paper in papers for text in _paper(paper)]
    return [*found, *_controls(papers)]


def _controls(papers: Sequence[Entry]) -> Iterator[Finding]:
    """Rooms without an effect that must be found, or without two equal arms that must not differ."""
    held = {(paper["room"], claim.get("control")) for paper in papers for claim in paper["claims"]}
    for name in sorted({paper["room"] for paper in papers}):
        for kind in ("planted", "A/A"):
            if (name, kind) not in held:
                yield {"id": "*", "room": name, "finding": f"no claim of the room has control={kind!r}"}


def _paper(paper: Entry) -> Iterator[str]:
    yield from (f"helps: {symptom!r} is not in the vocabulary" for symptom in paper["helps"] if symptom not in SYMPTOMS)
    if not paper["parts"]:
        yield "has no public part"
    if REFERENCES.is_dir():
        yield from _references(paper)
    if not paper["claims"]:
        yield "registers no claim"
    latest = runner.latest(paper)
    for claim in paper["claims"]:
        if claim["name"] not in latest:
            yield f"claim {claim['name']} has no verdict"
        else:
            yield from (
                f"verdict of {claim['name']} is stale: {why}" for why in runner.stale(paper, latest[claim["name"]])
            )
    if (ROOT / ".git").exists():
        yield from _late_registrations(paper)


def _references(paper: Entry) -> Iterator[str]:
    path = REFERENCES / paper["room"] / f"test_{paper['id'].replace('-', '_')}.py"
    if not path.exists():
        yield f"has no reference test ({path.relative_to(ROOT)})"
        return
    tree = ast.parse(path.read_text("utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    yield from (f"part {part['name']} has no reference test" for part in paper["parts"] if part["name"] not in used)


def _late_registrations(paper: Entry) -> Iterator[str]:
    """Runs whose claim, as it was run, was not yet committed in the commit before the one that brought the result."""
    claim, verdict = (str(p.relative_to(ROOT)) for p in (catalogue.claim_file(paper), catalogue.verdict_file(paper)))
    before: list[Any] = []
    steps = [(commit, f"{commit}^") for commit in _git("log", "--reverse", "--format=%H", "--", verdict).split()]
    for commit, parent in [*steps, ("", "HEAD")]:
        runs = _runs_at(commit, verdict)
        registered = _fingerprint_at(parent, claim)
        for record in runs[len(before) :]:
            if record["code"]["claim"] != registered:
                yield f"claim {record['claim']} was registered after the fact: commit a claim before its full run"
        before = runs


def _runs_at(commit: str, path: str) -> list[Any]:
    text = _git("show", f"{commit}:{path}") if commit else _text(ROOT / path)
    return list(json.loads(text)["runs"]) if text else []


def _fingerprint_at(commit: str, path: str) -> str:
    text = _git("show", f"{commit}:{path}")
    return catalogue.fingerprint(ast.parse(text)) if text else ""


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _git(*arguments: str) -> str:
    """Git's answer, or nothing where it has none (a file that did not exist yet, a first commit's parent)."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
