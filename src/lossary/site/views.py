"""Every page of the catalogue as text, from a snapshot; the same for the server and for the static site."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from lossary import catalogue
from lossary.catalogue import Entry
from lossary.site import plot, render
from lossary.site.docstrings import Module, pieces
from lossary.site.library import Claim, Snapshot, address, claims_module
from lossary.verdict import METRICS, expected_by_chance
from lossary.vocabulary import SYMPTOMS

NEWEST = 8  # verdicts on the first page
LONG = 400  # letters of a claim's chosen settings
ANSWERS, FIRST = 30, 7  # papers on a page of search results, and while one types
LEVELS = {"seconds": (10, 60, 300), "lines": (50, 100, 200)}  # at most, to choose from in a room's table


def every(now: Snapshot, *, static: bool = False) -> Iterator[tuple[str, Callable[[], str]]]:
    """The address of each page of the catalogue, and what makes it."""
    yield "", lambda: home(now, static=static)
    yield "evidence", lambda: evidence(now, static=static)
    for name in now.rooms:
        yield f"rooms/{name}", lambda name=name: room(now, name, static=static)
    for symptom in SYMPTOMS:
        yield f"symptoms/{symptom}", lambda symptom=symptom: trouble(now, symptom, static=static)
    for paper_ in now.papers:
        yield address(paper_), lambda it=paper_: paper(now, it, static=static)
    for module in now.engines:
        yield engine_address(module), lambda module=module: engine(now, module, static=static)


def home(now: Snapshot, *, static: bool = False) -> str:
    held = {symptom: [paper for paper in now.papers if symptom in paper["helps"]] for symptom in SYMPTOMS}
    return render.page(
        "home.html",
        static=static,
        symptoms=[(symptom, SYMPTOMS[symptom].split(", ")[1:4], papers) for symptom, papers in held.items() if papers],
        rooms=[(name, head(now, name), papers, now.state(papers)) for name, papers in now.rooms.items()],
        newest=now.events()[:NEWEST],
        papers=len(now.papers),
        address=address,
        **_state(now),
    )


def evidence(now: Snapshot, *, static: bool = False) -> str:
    old = [(paper, [claim for claim in now.claims(paper) if claim["stale"]]) for paper in now.papers]
    return render.page(
        "evidence.html",
        here="evidence",
        static=static,
        rooms=[(name, papers, now.state(papers)) for name, papers in now.rooms.items()],
        stale=[(paper, claims) for paper, claims in old if claims],
        metrics=METRICS,
        address=address,
        **_state(now),
    )


def _state(now: Snapshot) -> dict[str, Any]:
    """The state of the evidence: counts, and how many claims would hold by chance at most."""
    state = now.state()
    run = sum(state[outcome] for outcome in ("holds", "does not hold", "inconclusive"))
    return {"state": state, "run": run, "chance": expected_by_chance(run), "checked": now.stale is not None}


def room(now: Snapshot, name: str, *, static: bool = False) -> str:
    here, papers = f"rooms/{name}", now.rooms[name]
    to = render.addresses(here if static else None)
    about = catalogue.room_page(name, now.package).partition("\n\n")[2]
    held = {part["name"]: _share(now, paper) for paper in papers for part in paper["parts"]}
    rows = [row(now, paper) for paper in papers]
    return render.page(
        "room.html",
        here=here,
        static=static,
        room=name,
        head=head(now, name),
        about=render.prose(about, {part: to(where) for part, where in now.parts[name].items()}, held),
        engines=[
            (module, to(engine_address(module)), now.module(module).summary)
            for module in now.engines
            if module.startswith(f"lossary.{name}.")
        ],
        rows=rows,
        roles=sorted({role for r in rows for role in r["roles"]}),
        levels=LEVELS,
        state=now.state(papers),
    )


def trouble(now: Snapshot, symptom: str, *, static: bool = False) -> str:
    papers = sorted((p for p in now.papers if symptom in p["helps"]), key=lambda p: (-catalogue.held(p), p["id"]))
    rows = [row(now, paper) for paper in papers]
    return render.page(
        "symptom.html",
        here=f"symptoms/{symptom}",
        static=static,
        symptom=symptom,
        words=SYMPTOMS[symptom],
        rows=rows,
        roles=sorted({role for r in rows for role in r["roles"]}),
        levels=LEVELS,
        state=now.state(papers),
    )


def row(now: Snapshot, paper: Entry) -> dict[str, Any]:
    """What a table says of a paper."""
    return now.once(f"row of {address(paper)}", lambda: _row(now, paper))


def _row(now: Snapshot, paper: Entry) -> dict[str, Any]:
    claims = [claim for claim in now.claims(paper) if not claim["control"]]
    outcomes = [claim["run"]["outcome"] if claim["run"] else "not run" for claim in claims]
    return {
        "paper": paper,
        "address": address(paper),
        "roles": list(dict.fromkeys(part["role"] for part in paper["parts"] if part["role"])) or ["other"],
        "outcomes": {outcome: outcomes.count(outcome) for outcome in plot.BAR if outcome in outcomes},
        "held": catalogue.held(paper),
        "stale": sum(bool(claim["stale"]) for claim in claims),
        "plot": plot.small(claims),
        "cost": now.cost(paper),
        "size": now.size(paper),
    }


def paper(now: Snapshot, paper: Entry, *, static: bool = False) -> str:
    here, room_ = address(paper), paper["room"]
    to = render.addresses(here if static else None)
    links = {name: to(where) for name, where in now.parts[room_].items() if where != here}
    module = now.module(paper["module"])
    return render.page(
        "paper.html",
        here=here,
        static=static,
        paper=paper,
        summary=render.line(paper["summary"], links),
        about=render.prose(paper["about"], links),
        departs=[render.line(text, links) for text in paper["departs"]],
        parts=[_part(module, part, links) for part in paper["parts"]],
        claims=_claims(now, paper),
        file=_shown(module.name),
        registered=_shown(claims_module(paper)),
        source=render.code(module.source),
        engines=_engines(now, module, to),
        related=[row(now, other) for other in now.related(paper)],
        row=row(now, paper),
        state=now.state([paper]),
    )


def _part(module: Module, part: dict[str, Any], links: dict[str, str]) -> dict[str, Any]:
    told, sections = pieces(module.docstring(part["name"]))
    return {
        **part,
        "prose": render.prose(told, links),
        "sections": [
            {
                "heading": section.heading,
                "entries": [(name, render.line(text, links)) for name, text in section.entries],
                "prose": section.prose.strip(),
            }
            for section in sections
        ],
        "example": module.example(part["name"]),
    }


def _claims(now: Snapshot, paper: Entry) -> list[dict[str, Any]]:
    if not paper["claims"]:
        return []
    registration = now.module(claims_module(paper))
    return [_claim(registration, paper, claim) for claim in now.claims(paper)]


def _claim(registration: Module, paper: Entry, claim: Claim) -> dict[str, Any]:
    """A claim with its pictures, its numbers by seed, and the lines that registered it."""
    run = claim["run"]
    return {
        **claim,
        "asked": plot.asked_in_words(claim),
        "words": plot.in_words(claim) if run else "Not run yet.",
        "plot": plot.large(claim) if run else "",
        "table": _seeds(claim) if run else None,
        "settings": _told(run["details"][-1]) if run and run["details"] else "",
        "code": render.code(registration.excerpt([claim["name"]])),
        "command": f"lossary claim {paper['id']} --name {claim['name']}",
    }


def _seeds(claim: Claim) -> dict[str, Any] | None:
    """The results by seed: the table's columns and rows; of exact deviations a summary."""
    run = claim["run"]
    if claim["kind"] == "exact":
        return _deviations(_flat(run["method"]), _flat(run["baseline"]))
    if claim["kind"] == "trend":
        under = run["baseline"] or [[0.0] * len(claim["levels"])] * len(run["method"])
        return {
            "what": "the method's lead over the baseline" if run["baseline"] else claim["metric"],
            "columns": [f"{level:g}" for level in claim["levels"]],
            "rows": [
                [f"{a - b:.4g}" for a, b in zip(*pair, strict=True)] for pair in zip(run["method"], under, strict=True)
            ],
        }
    pairs = zip(run["method"], run["baseline"], plot.seed_effects(claim), strict=True)
    return {
        "what": claim["metric"],
        "columns": ["Method", "Baseline", "Method / baseline" if claim["kind"] == "ratio" else "Gain"],
        "rows": [[f"{method:.5g}", f"{baseline:.5g}", _signed(claim, effect)] for method, baseline, effect in pairs],
    }


def _deviations(method: list[float], stated: list[float]) -> dict[str, Any] | None:
    values = sorted(abs(a - b) for a, b in zip(method, stated or [0.0] * len(method), strict=True))
    if not values:
        return None
    return {"summary": f"{len(values):,} deviations: median {median(values):.3g}, largest {values[-1]:.3g}."}


def _signed(claim: Claim, effect: float) -> str:
    return (f"{effect:.4g}" if claim["kind"] == "ratio" else f"{effect:+.4g}").replace("-", "\N{MINUS SIGN}")


def _flat(values: Any) -> list[float]:
    if isinstance(values, list):
        return [x for inner in values for x in _flat(inner)]
    return [] if values is None else [values]


def _told(details: Any) -> str:
    """Chosen settings as one would write them, cut where they are long."""
    text = re.sub(r'[{}"\[\]]', "", json.dumps(details).replace("}, ", "; ").replace(": {", ": "))
    return text if len(text) <= LONG else text[:LONG].rsplit(" ", 1)[0] + " \N{HORIZONTAL ELLIPSIS}"


def _engines(now: Snapshot, module: Module, to: Callable[[str], str]) -> list[dict[str, Any]]:
    """Of each engine that the paper imports what it takes from there, and where the whole file is."""
    taken: dict[str, list[str]] = {}
    for name, names in module.engines():
        taken.setdefault(name, []).extend(names)
    return [
        {
            "file": _shown(name),
            "link": to(engine_address(name)),
            "names": names,
            "source": render.code(now.module(name).excerpt(names)),
        }
        for name, names in taken.items()
        if name in now.engines
    ]


def engine(now: Snapshot, name: str, *, static: bool = False) -> str:
    module = now.module(name)
    return render.page(
        "engine.html",
        here=engine_address(name),
        static=static,
        file=_shown(name),
        room=name.split(".")[1],
        about=render.prose(ast.get_docstring(module.tree) or ""),
        source=render.code(module.source),
        users=now.users[name],
        address=address,
    )


def search(now: Snapshot, query: str) -> str:
    """The page of answers."""
    hits = catalogue.search(query, now.index) if query.strip() else []
    return render.page(
        "search.html",
        here="search",
        query=query,
        rows=[(row(now, hit), [s for s in hit["why"] if s in hit["helps"]]) for hit in hits[:ANSWERS]],
        found=len(hits),
        symptoms=list(SYMPTOMS),
    )


def all_papers(now: Snapshot) -> str:
    """The page of answers of a static site, which a script turns into that of those that match."""
    rows = [(row(now, paper), []) for paper in now.papers]
    return render.page(
        "search.html", here="search", static=True, query="", rows=rows, found=len(rows), symptoms=list(SYMPTOMS)
    )


def counts(row: dict[str, Any]) -> str:
    """A paper's verdicts in words, as a table has them."""
    module: Any = render.environment().get_template("_verdict.html").module
    return str(module.counts(row["outcomes"]))


def answers(now: Snapshot, query: str) -> str:
    """The best few papers, to be shown while the query is being typed."""
    hits = catalogue.search(query, now.index, typing=True)[:FIRST]
    return render.page("_answers.html", rows=[row(now, hit) for hit in hits])


def head(now: Snapshot, room: str) -> tuple[str, str]:
    """A room's name and what it is, from the first lines of its docstring."""
    name, _, rest = catalogue.room_page(room, now.package).partition("\n\n")[0].replace("\n", " ").partition(":")
    return name, rest.strip()


def engine_address(module: str) -> str:
    """Of the page of an engine's file: lossary.losses._softmax is at engines/losses/softmax."""
    _, room, name = module.split(".")
    return f"engines/{room}/{name.lstrip('_')}"


def _shown(module: str) -> str:
    return "/".join(module.split(".")) + ".py"


def _share(now: Snapshot, paper: Entry) -> str:
    found = list(catalogue.outcomes(paper).values())
    return f"{found.count('holds')}/{len(found)}" if found else "not run"
