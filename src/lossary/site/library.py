"""The catalogue as the site shows it: read once, read anew when its files change, its pages rendered ahead."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lossary import catalogue
from lossary.catalogue import PACKAGE, ROOMS, Entry
from lossary.site import stale
from lossary.site.docstrings import Module

T = TypeVar("T")
RELATED = 6  # papers named at the foot of a paper's page
READ = ("roles", "tasks", "claims", "verdicts", *ROOMS)  # folders on which a verdict or a page rests

Claim = dict[str, Any]
"""A registered claim; `run` is its latest run or None, `earlier` those before it, `stale` why it no longer counts."""


class Library:
    """The newest snapshot of the catalogue in `package`."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self.package = package
        self.now = Snapshot(package, _stamp(package))

    def refresh(self) -> None:
        """Takes another snapshot if a file changed."""
        stamp = _stamp(self.package)
        if stamp != self.now.stamp:
            self.now = Snapshot(self.package, stamp)


class Snapshot:
    """All papers at one moment. What is derived from them is made when it is first asked for, and kept."""

    def __init__(self, package: Path, stamp: str) -> None:
        self.package, self.stamp = package, stamp
        self.papers = catalogue.entries(package)
        self.stale = stale.known(package, stamp)
        self._made: dict[str, Any] = {}
        # Pages parse code, and Python 3.11 fails where two threads build syntax trees at once (its issue 106905).
        self._making = threading.RLock()
        self._by_id = {(paper["room"], paper["id"]): paper for paper in self.papers}
        self._runs: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def paper(self, room: str, id: str) -> Entry:
        """Raises KeyError where there is none."""
        return self._by_id[room, id]

    @cached_property
    def rooms(self) -> dict[str, list[Entry]]:
        """The rooms that have papers, in their order."""
        return {room: held for room in ROOMS if (held := [p for p in self.papers if p["room"] == room])}

    @cached_property
    def index(self) -> catalogue.Index:
        return catalogue.index(self.papers)

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """For each room, the address of the paper that a part belongs to, by the part's name."""
        return {
            room: {part["name"]: address(paper) for paper in papers for part in paper["parts"]}
            for room, papers in self.rooms.items()
        }

    def claims(self, paper: Entry) -> list[Claim]:
        """The paper's claims with their runs, those about the method before the controls."""
        runs = self.runs(paper)
        old = (self.stale or {}).get(f"{paper['room']}/{paper['id']}", {})
        found = []
        for claim in paper["claims"]:
            own = [run for run in runs if run["claim"] == claim["name"]]
            found.append(
                {
                    **claim,
                    "control": claim.get("control", ""),
                    "run": own[-1] if own else None,
                    "earlier": own[:-1],
                    "stale": old.get(claim["name"], []),
                }
            )
        return sorted(found, key=lambda claim: bool(claim["control"]))

    def runs(self, paper: Entry) -> list[dict[str, Any]]:
        """Every full run of the paper's claims, oldest first."""
        key = (paper["room"], paper["id"])
        if key not in self._runs:
            path = catalogue.verdict_file(paper, self.package)
            self._runs[key] = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else []
        return self._runs[key]

    def state(self, papers: list[Entry] | None = None) -> Counter[str]:
        """How the claims came out: by outcome, "not run", and of these "stale"; controls as "planted held" and so on.

        Exact statements, which no chance can make hold, are counted apart as "exact holds" and so on.
        """
        counted: Counter[str] = Counter()
        for paper in self.papers if papers is None else papers:
            for claim in self.claims(paper):
                outcome = claim["run"]["outcome"] if claim["run"] else "not run"
                if claim["control"]:
                    counted[f"{claim['control']} {outcome}"] += 1
                    continue
                counted[outcome if claim["kind"] != "exact" else f"exact {outcome}"] += 1
                counted["claims" if claim["kind"] != "exact" else "exact"] += 1
                counted["stale"] += bool(claim["stale"])
        return counted

    def related(self, paper: Entry) -> list[Entry]:
        """Papers on the same symptoms, of the same room and role before others."""
        roles = {part["role"] for part in paper["parts"]} - {""}

        def nearness(other: Entry) -> tuple[float, str]:
            shared = len(set(paper["helps"]) & set(other["helps"]))
            alike = bool(roles & {part["role"] for part in other["parts"]})
            return (-(2.0 * shared + 1.5 * (other["room"] == paper["room"]) + alike), other["id"])

        near = sorted((other for other in self.papers if other is not paper), key=nearness)
        return [other for other in near if nearness(other)[0] <= -2.5][:RELATED]

    def cost(self, paper: Entry) -> float | None:
        """Seconds that the latest runs of the paper's claims took; None where none was run."""
        took = [claim["run"]["seconds"] for claim in self.claims(paper) if claim["run"]]
        return sum(took) if took else None

    def size(self, paper: Entry) -> int:
        """Lines of code in the paper's file, without its documentation."""
        return self.module(paper["module"]).lines

    def module(self, name: str) -> Module:
        """A module of the package, by its dotted name, as its file stands."""
        return Module(name, module_file(name, self.package).read_text("utf-8"))

    @cached_property
    def engines(self) -> list[str]:
        """The modules of the rooms' engines."""
        return [
            f"lossary.{room}.{path.stem}"
            for room in self.rooms
            for path in sorted((self.package / room).glob("_[!_]*.py"))
        ]

    @cached_property
    def users(self) -> dict[str, list[Entry]]:
        """For each engine the papers that import it."""
        found: dict[str, list[Entry]] = {name: [] for name in self.engines}
        for paper in self.papers:
            source = module_file(paper["module"], self.package).read_text("utf-8")
            for name in set(re.findall(r"^from (lossary\.\w+\._\w+) import", source, re.M)) & found.keys():
                found[name].append(paper)
        return found

    def events(self) -> list[dict[str, Any]]:
        """Every new or changed verdict, the newest first: paper, claim, run, and the run `before` it or None."""
        found = []
        for paper in self.papers:
            before: dict[str, Any] = {}
            for run in self.runs(paper):
                known = next((claim for claim in paper["claims"] if claim["name"] == run["claim"]), None)
                former = before.get(run["claim"])
                before[run["claim"]] = run
                if known and not known.get("control") and (former is None or former["outcome"] != run["outcome"]):
                    found.append({"paper": paper, "run": run, "before": former})
        found.sort(key=lambda event: (event["paper"]["room"], event["paper"]["id"]))
        return sorted(found, key=lambda event: event["run"]["date"], reverse=True)

    def learn(self, found: stale.Reasons) -> None:
        """Takes up which verdicts are stale; every page is then made anew."""
        self.stale = found
        self._made.clear()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made when it is first asked for under this name, and kept."""
        if name not in self._made:
            with self._making:
                if name not in self._made:
                    self._made[name] = make()
        made: T = self._made[name]
        return made


def address(paper: Entry) -> str:
    """Of the paper's page, without the leading slash."""
    return f"papers/{paper['room']}/{paper['id']}"


def module_file(module: str, package: Path = PACKAGE) -> Path:
    return package.joinpath(*module.split(".")[1:]).with_suffix(".py")


def claims_module(paper: Entry) -> str:
    """The module that registers the paper's claims."""
    return f"lossary.claims.{paper['room']}.{catalogue.claim_file(paper).stem}"


def _stamp(package: Path) -> str:
    """Changes when a file does that a page or a verdict rests on."""
    digest = hashlib.sha256(str(package).encode())
    for path in sorted(_files(package)):
        status = path.stat()
        digest.update(f"{path}{status.st_mtime_ns}{status.st_size}".encode())
    return digest.hexdigest()


def _files(package: Path) -> Iterator[Path]:
    yield from package.glob("*.py")
    for folder in READ:
        yield from (package / folder).rglob("*.py")
    yield from (package / "verdicts").rglob("*.json")
