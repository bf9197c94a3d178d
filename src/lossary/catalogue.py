"""Every paper, read from its file by `ast`: nothing is imported, so search needs neither torch nor a build step.

A room is a folder with papers; a paper is a file `<room>/<id>.py` that assigns `PAPER = Paper(...)`. Parts are
the file's public functions and classes; a role's decorator marks those that fit a role. What is read is cached
by modification time and size, and a wheel carries it as `_index.json`.
"""

import ast
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

from lossary import cached
from lossary.vocabulary import SYMPTOMS

PACKAGE = Path(__file__).parent

# In the order in which a room may build on another: only on those to its left.
ROOMS = (
    "layers",
    "optim",
    "losses",
    "weighting",
    "representation",
    "distillation",
    "compression",
    "uncertainty",
    "ood",
    "detection",
    "diffusion",
    "generative",
    "restoration",
    "robustness",
    "adaptation",
    "federated",
    "reinforcement",
    "recommendation",
    "timeseries",
    "graphs",
    "language",
    "geometry",
    "attribution",
    "dynamics",
)

_READER = Path(__file__).stat().st_mtime_ns  # of the code that runs, should its file be replaced meanwhile

Entry = dict[str, Any]
"""One paper: id, room, module, title, year, summary, about, helps, departs, equation, url, parts, claims, draws and
verdict."""


class CatalogueError(ValueError):
    """A paper's file breaks a rule of the house; the message names the file and the rule."""


def identify(stem: str) -> str:
    """The id of the paper in the file with this stem: soft_nms_ -> soft-nms."""
    return stem.rstrip("_").replace("_", "-")


def entries(package: Path = PACKAGE) -> list[Entry]:
    """All papers, in room order, then by id."""
    shipped = package / "_index.json"
    if shipped.exists():
        found: list[Entry] = json.loads(shipped.read_text("utf-8"))
        return found
    cache = _Cache(package)
    found = []
    for room in ROOMS:
        papers = [cache.read(path, room) for path in _paper_files(package / room)]
        _refuse_clashes(room, papers)
        found += sorted(papers, key=lambda paper: paper["id"])
    for paper in found:
        paper["claims"] = cache.claims(paper)
        paper["draws"] = cache.draws(paper)
        paper["verdict"] = cache.verdict(paper)
    cache.save()
    return found


def entry(id: str, package: Path = PACKAGE) -> Entry:
    """The paper with this id.

    Raises:
        KeyError: no such paper; the message suggests the nearest ids.
    """
    everything = {e["id"]: e for e in entries(package)}
    if id not in everything:
        import difflib

        near = difflib.get_close_matches(id, everything, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lossary find`"
        raise KeyError(f"{id}: no such paper; {hint}")
    return everything[id]


def outcomes(paper: Entry) -> dict[str, str]:
    """The outcome of every claim of the paper that was run, by its name, controls left out."""
    real = {claim["name"] for claim in paper["claims"] if not claim.get("control")}
    return {name: run["outcome"] for name, run in (paper["verdict"] or {}).items() if name in real}


def room_page(room: str, package: Path = PACKAGE) -> str:
    """What a room says of itself: its engine, and a table from symptom to part."""
    source = (package / room / "__init__.py").read_text("utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def held(paper: Entry) -> float:
    """The share of a paper's claims that hold; exact statements say nothing about what helps, nor do controls."""
    names = [claim["name"] for claim in paper["claims"] if claim["kind"] != "exact" and not claim.get("control")]
    found = outcomes(paper)
    return sum(found.get(name) == "holds" for name in names) / max(1, len(names))


@dataclass(frozen=True)
class Index:
    """Papers by their words, for many searches.

    Attributes:
        papers: in the order of the catalogue.
        held: of each paper the share of its claims that hold.
        words: for each word how much it counts in each paper that has it, by the paper's place in `papers`.
    """

    papers: list[Entry]
    held: list[float]
    words: dict[str, dict[int, float]]

    def to_json(self) -> dict[str, Any]:
        """What a page needs to search by itself: paper and score by turns for each word, and the symptoms."""
        words = {
            word: [x for place, score in places.items() for x in (place, round(score, 4))]
            for word, places in self.words.items()
        }
        symptoms = {symptom: [_words(phrase) for phrase in _phrases(symptom)] for symptom in SYMPTOMS}
        return {"words": words, "symptoms": symptoms, "stop": sorted(_STOP)}


def index(papers: Iterable[Entry]) -> Index:
    """Reads the papers' words once, so that each `search` over them is quick."""
    papers = list(papers)
    words: dict[str, dict[int, float]] = {}
    for place, paper in enumerate(papers):
        for word, weight in _document(paper).items():
            words.setdefault(word, {})[place] = weight
    for places in words.values():
        rarity = math.log(1 + len(papers) / len(places))
        for place in places:
            places[place] *= rarity
    return Index(papers, [held(paper) for paper in papers], words)


def search(query: str, found: Iterable[Entry] | Index | None = None, *, typing: bool = False) -> list[Entry]:
    """Papers that match the query, best first. Each gains `score` and `why`, the words or symptoms that matched.

    Of papers that match alike, those of whose claims a larger share held come first. With `typing` the last word may
    be the beginning of one.
    """
    known = found if isinstance(found, Index) else index(entries() if found is None else found)
    asked, name = _asked_symptoms(query), query.strip().lower().replace("_", "-")
    found_by = [_best(meant, known.words) for meant in _terms(query, known.words, typing)]
    hits = []
    for place, paper in enumerate(known.papers):
        symptoms = [symptom for symptom in asked if symptom in paper["helps"]]
        matched = [scores[place] for scores in found_by if place in scores]
        score = 12.0 * len(symptoms) + sum(score for score, _ in matched) + 100.0 * (paper["id"] == name)
        if score:
            why = symptoms + [word for _, word in matched if word not in symptoms]
            hits.append((-round(score, 3), -known.held[place], paper["id"], place, why))
    return [{**known.papers[place], "score": -score, "why": why} for score, _, _, place, why in sorted(hits)]


def lazy_room(
    name: str, engine: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) for the room package `name`: a part is imported when it is first used.

    `engine` gives the modules of what the room offers besides its papers' parts.
    """
    room = name.rpartition(".")[2]

    @functools.cache
    def where() -> dict[str, str]:
        papers = [paper for paper in entries() if paper["room"] == room]
        return {p["name"]: paper["module"] for paper in papers for p in paper["parts"]} | dict(engine or {})

    def get(attribute: str) -> Any:
        if attribute.startswith("__") or attribute not in where():
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        part = getattr(import_module(where()[attribute]), attribute)
        setattr(sys.modules[name], attribute, part)
        return part

    return get, lambda: sorted(where())


def stubs(package: Path = PACKAGE) -> dict[Path, str]:
    """For each room the text of `__init__.pyi`, for editors and type checkers. Generated, never committed."""
    texts = {}
    for room in ROOMS:
        lines = [
            f"from {paper['module']} import {part['name']} as {part['name']}"
            for paper in entries(package)
            if paper["room"] == room
            for part in paper["parts"]
        ]
        if lines:
            texts[package / room / "__init__.pyi"] = "\n".join(lines) + "\n"
    return texts


def fingerprint(tree: ast.AST) -> str:
    """A hash of a module's syntax tree without its docstrings, comments, layout and `PAPER` record.

    That is, of what it computes: to word a departure better makes no verdict stale.
    """
    digest = hashlib.sha256()
    for token in _tokens(tree):
        digest.update(token.encode() + b"\0")
    return digest.hexdigest()[:16]


# --- reading a file -------------------------------------------------------------------------------------------


def _paper_files(room: Path) -> Iterator[Path]:
    return (path for path in sorted(room.glob("[!_]*.py"))) if room.is_dir() else iter(())


def _read_paper(path: Path, room: str) -> Entry:
    tree = ast.parse(path.read_text("utf-8"), str(path))
    record = _paper_record(tree, path)
    summary, _, about = (ast.get_docstring(tree) or "").partition("\n\n")
    if not summary:
        raise CatalogueError(f"{path}: the module needs a docstring whose first paragraph says what the idea changes")
    return {
        "id": identify(path.stem),
        "room": room,
        "module": f"lossary.{room}.{path.stem}",
        "title": record["title"],
        "year": record["year"],
        "summary": " ".join(summary.split()),
        "about": about.strip(),
        "helps": list(record.get("helps", ())),
        "departs": list(record.get("departs", ())),
        "equation": record.get("equation", ""),
        "url": record.get("url", ""),
        "parts": [_read_part(node, path) for node in tree.body if _is_part(node)],
        "code": fingerprint(tree),
    }


def _paper_record(tree: ast.Module, path: Path) -> dict[str, Any]:
    for node in tree.body:
        if _is_record(node):
            return _literals(node.value, path)
    raise CatalogueError(f"{path}: no PAPER = Paper(...); a file without a leading underscore is a paper")


def _is_record(node: ast.AST) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "PAPER" for t in node.targets)


def _is_part(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def _read_part(node: Any, path: Path) -> Entry:
    role, options = "", {}
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id in _roles():
            role, options = decorator.func.id, _literals(decorator, path)
    docstring = ast.get_docstring(node) or ""
    return {
        "name": node.name,
        "role": role,
        "line": node.lineno,
        "signature": _signature(node),
        "summary": " ".join(docstring.partition("\n\n")[0].split()),
        "options": options,
    }


def _signature(node: Any) -> str:
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not made:
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            shown = ("*" if ast.unparse(n.annotation) == "KW_ONLY" else ast.unparse(n.target) for n in fields)
            return f"{node.name}({', '.join(shown)})"
        arguments = ast.parse(ast.unparse(made[0])).body[0].args  # type: ignore[attr-defined]
        arguments.args = arguments.args[1:]
    else:
        arguments = ast.parse(ast.unparse(ast.Module([node], []))).body[0].args  # type: ignore[attr-defined]
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    return f"{node.name}({ast.unparse(arguments)})"


def _literals(call: ast.expr, path: Path) -> dict[str, Any]:
    if not isinstance(call, ast.Call) or call.args:
        raise CatalogueError(f"{path}:{call.lineno}: expected a call with keyword arguments only")
    try:
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except ValueError as error:
        raise CatalogueError(
            f"{path}:{call.lineno}: arguments here must be literals, so that they can be read without importing"
        ) from error


@functools.cache
def _roles() -> frozenset[str]:
    return frozenset(p.stem for p in (PACKAGE / "roles").glob("[!_]*.py"))


def _refuse_clashes(room: str, papers: list[Entry]) -> None:
    owner: dict[str, str] = {}
    for paper in papers:
        stem = paper["module"].rpartition(".")[2]
        for part in paper["parts"]:
            if part["name"] in owner:
                raise CatalogueError(
                    f"{room}: {part['name']} is exported by both {owner[part['name']]} and {paper['id']}; rename one"
                )
            owner[part["name"]] = paper["id"]
    for paper in papers:
        stem = paper["module"].rpartition(".")[2]
        if stem in owner:
            raise CatalogueError(
                f"{room}/{stem}.py: a part is also called {stem}, which importing the module would "
                f"shadow; call the file {stem}_.py"
            )


def _tokens(node: ast.AST) -> Iterator[str]:
    # Only non-empty fields count, so that the hash does not move with the Python version's ast.
    yield type(node).__name__
    for name, value in ast.iter_fields(node):
        if name in ("ctx", "type_comment", "kind", "type_params"):
            continue
        items = value if isinstance(value, list) else [value]
        if name == "body" and isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            items = items[1:]
        for item in items:
            if _is_record(item):
                continue
            if isinstance(item, ast.AST):
                yield name
                yield from _tokens(item)
            elif item is not None:
                yield f"{name}={item!r}"


# --- claims and verdicts --------------------------------------------------------------------------------------


def _read_claims(path: Path) -> dict[str, Any]:
    tree = ast.parse(path.read_text("utf-8"), str(path))
    claims = [
        {"name": node.name, **_literals(decorator, path)}
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "claim"
    ]
    draws = any(isinstance(node, ast.FunctionDef) and node.name == "draw" for node in tree.body)
    return {"claims": claims, "draws": draws, "code": fingerprint(tree)}


def _read_verdict(path: Path) -> dict[str, Any]:
    """The outcome of each claim's latest run."""
    latest: dict[str, Any] = {}
    for record in json.loads(path.read_text("utf-8"))["runs"]:
        latest[record["claim"]] = {k: record.get(k) for k in ("outcome", "note", "effect", "low", "high", "unit", "n")}
    return latest


class _Cache:
    """What was read from each file, by path, valid while its modification time and size stand."""

    def __init__(self, package: Path) -> None:
        key = hashlib.sha256(f"{package}{_READER}".encode()).hexdigest()[:16]
        self.path = cached.folder() / f"index-{key}.json"
        self.package = package
        self.known: dict[str, Any] = {}
        self.fresh = False
        try:
            self.known = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            self.known = {}  # no cache, or a torn one: read the files again

    def read(self, path: Path, room: str) -> Entry:
        return dict(self._get(path, lambda: _read_paper(path, room)))

    def claims(self, paper: Entry) -> list[dict[str, Any]]:
        path = claim_file(paper, self.package)
        return list(self._get(path, lambda: _read_claims(path))["claims"]) if path.exists() else []

    def draws(self, paper: Entry) -> bool:
        path = claim_file(paper, self.package)
        return bool(path.exists() and self._get(path, lambda: _read_claims(path))["draws"])

    def verdict(self, paper: Entry) -> dict[str, Any] | None:
        path = verdict_file(paper, self.package)
        return dict(self._get(path, lambda: _read_verdict(path))) if path.exists() else None

    def save(self) -> None:
        if self.fresh:
            cached.keep(self.path, lambda draft: draft.write_text(json.dumps(self.known), "utf-8"))

    def _get(self, path: Path, read: Callable[[], Any]) -> Any:
        status = path.stat()
        stamp = [status.st_mtime_ns, status.st_size]
        held = self.known.get(str(path))
        if held is None or held[0] != stamp:
            self.known[str(path)] = held = [stamp, read()]
            self.fresh = True
        return held[1]


def claim_file(paper: Entry, package: Path = PACKAGE) -> Path:
    """Where the paper's claims are registered."""
    return package / "claims" / str(paper["room"]) / f"{paper['id'].replace('-', '_')}.py"


def verdict_file(paper: Entry, package: Path = PACKAGE) -> Path:
    """Where all full runs of the paper's claims are kept."""
    return package / "verdicts" / str(paper["room"]) / f"{paper['id']}.json"


# --- search ---------------------------------------------------------------------------------------------------

_STOP = frozenset(
    "a an and are as at be by for from in is it my of on or that the their this to what when with".split()
)
_FIELDS = {"id": 4.0, "parts": 3.0, "helps": 3.0, "title": 2.0, "summary": 2.0, "room": 1.0, "about": 0.5}


def _words(text: str) -> list[str]:
    return [_stem(w) for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in _STOP]


def _stem(word: str) -> str:
    for ending in ("isation", "ization", "ising", "izing", "ies", "ing", "ed", "es", "y", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _spaced(name: str) -> str:
    """A CamelCase name as words."""
    return re.sub(r"([a-z])([A-Z])", r"\1 \2", name)


def _document(paper: Entry) -> dict[str, float]:
    texts = {
        "id": paper["id"],
        "parts": " ".join(f"{_spaced(p['name'])} {p['summary']}" for p in paper["parts"]),
        "helps": " ".join(f"{s} {SYMPTOMS[s]}" for s in paper["helps"]),
        **{name: paper[name] for name in ("title", "summary", "room", "about")},
    }
    weights: dict[str, float] = {}
    for name, text in texts.items():
        for word in _words(text):
            weights[word] = max(weights.get(word, 0.0), _FIELDS[name])
    return weights


def _terms(query: str, known: Iterable[str], typing: bool) -> list[list[str]]:
    """For each word of the query the words of the catalogue that it may mean."""
    terms = [[word] for word in dict.fromkeys(_words(query)) if word in known]
    last = re.findall(r"[a-z0-9]+", query.lower())[-1:]
    if typing and last and query[-1:].isalnum() and [_stem(last[0])] not in terms:
        terms.append([word for word in known if word.startswith(last[0])])
    return terms


def _best(meant: list[str], known: Mapping[str, Mapping[int, float]]) -> dict[int, tuple[float, str]]:
    """For each paper that has any of these words, the one that counts most in it, and how much."""
    best: dict[int, tuple[float, str]] = {}
    for word in meant:
        for place, score in known[word].items():
            best[place] = max(best.get(place, (0.0, "")), (score, word))
    return best


def _asked_symptoms(query: str) -> list[str]:
    """Symptoms of which one phrase occurs in the query, word for word after stemming."""
    asked = _words(query)
    found = []
    for symptom in SYMPTOMS:
        for phrase in _phrases(symptom):
            words = _words(phrase)
            if words and all(w in asked for w in words):
                found.append(symptom)
                break
    return found


def _phrases(symptom: str) -> list[str]:
    return [symptom.replace("-", " "), *SYMPTOMS[symptom].split(",")]
