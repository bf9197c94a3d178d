"""A part as its page shows it: its docstring by pieces, and its doctest as lines that one can paste and run."""

import ast
import builtins
import doctest
import re
from dataclasses import dataclass, field
from functools import cached_property

HEADINGS = {
    "Args": "arguments",
    "Attributes": "attributes",
    "Returns": "returns",
    "Raises": "errors",
    "Yields": "yields",
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\s*$")
ENTRY = re.compile(r"^ {4}(\*{0,2}[A-Za-z_][\w, *]*):\s+(.*)$")


@dataclass
class Section:
    """Arguments, returns, errors: named entries, or prose where it has none."""

    heading: str
    entries: list[tuple[str, str]] = field(default_factory=list)
    prose: str = ""


def pieces(text: str) -> tuple[str, list[Section]]:
    """The prose of a docstring, without its doctest, and its sections."""
    prose: list[str] = []
    sections: list[Section] = []
    inside, example = False, False
    for row in text.split("\n"):
        heading = SECTION.match(row)
        if heading:
            sections.append(Section(HEADINGS[heading[1]]))
            inside, example = True, False
        elif row.startswith(">>>") or (example and row.strip()):
            inside, example = False, True
        elif inside and (row.startswith(" ") or not row):
            _add(sections[-1], row)
        else:
            inside = example = False
            prose.append(row)
    return "\n".join(prose).strip(), sections


def _add(section: Section, row: str) -> None:
    entry = ENTRY.match(row)
    if entry:
        section.entries.append((entry[1], entry[2]))
    elif section.entries and row.strip():
        name, told = section.entries[-1]
        section.entries[-1] = (name, f"{told} {row.strip()}")
    else:
        section.prose += f"{row.strip()}\n"


class Module:
    """A file of the package, for the docstrings and the examples of its parts and for excerpts of its code."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.tree = ast.parse(source)

    def docstring(self, part: str) -> str:
        node = next(n for n in self.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        return ast.get_docstring(node) or ""

    def example(self, part: str) -> str:
        """The part's doctest with the imports it needs, what is printed as comments; "" where it has none."""
        steps = doctest.DocTestParser().get_examples(self.docstring(part))
        if not steps:
            return ""
        body = "".join(step.source + "".join(f"# {row}\n" for row in step.want.splitlines()) for step in steps)
        own = [row for row in body.splitlines() if re.match(r"(from|import) .*\w$", row)]
        rest = "".join(f"{row}\n" for row in body.splitlines() if row not in own)
        needed = [line for name in sorted(_free(body) | {part}) if (line := self._origins.get(name))]
        return "\n".join([*_joined([*own, *needed]), "", rest])

    @cached_property
    def _origins(self) -> dict[str, str]:
        """For each name of the module the line that imports it from where a user would."""
        room = self.name.rpartition(".")[0]
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                public = not node.name.startswith("_")
                found[node.name] = f"from {room if public else self.name} import {node.name}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    single = ast.Import([alias]) if isinstance(node, ast.Import) else _from(node, alias)
                    found[alias.asname or alias.name.split(".")[0]] = ast.unparse(single)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = f"from {self.name} import {node.targets[0].id}"
        return found

    @cached_property
    def lines(self) -> int:
        """Lines of code: neither blank nor comment nor docstring."""
        prose: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
                prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        return sum(
            number not in prose and bool(line.strip()) and not line.lstrip().startswith("#")
            for number, line in enumerate(self.source.splitlines(), 1)
        )

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join((ast.get_docstring(self.tree) or "").partition("\n\n")[0].split())

    def engines(self) -> list[tuple[str, list[str]]]:
        """The engine modules that it imports, and which names of each."""
        return [
            (node.module, [alias.name for alias in node.names])
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module and re.match(r"lossary\.\w+\._\w+$", node.module)
        ]

    def excerpt(self, names: list[str]) -> str:
        """The source of these names of the module, in its order."""
        rows = self.source.splitlines()
        kept = []
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            own = {getattr(node, "name", "")} | {target.id for target in targets if isinstance(target, ast.Name)}
            if own & set(names):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                kept.append("\n".join(rows[first - 1 : node.end_lineno]))
        return "\n\n\n".join(kept) + "\n" if kept else ""


def _from(node: ast.ImportFrom, alias: ast.alias) -> ast.ImportFrom:
    return ast.ImportFrom(module=node.module, names=[alias], level=node.level)


def _free(body: str) -> set[str]:
    """Names that the lines use and neither they nor Python define."""
    tree = ast.parse(body)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return used - bound - set(dir(builtins))


def _joined(lines: list[str]) -> list[str]:
    """Imports from one module on one line; plain imports first."""
    modules: dict[str, list[str]] = {}
    plain = []
    for line in lines:
        module, _, names = line.removeprefix("from ").partition(" import ")
        if line.startswith("from "):
            modules.setdefault(module, []).append(names)
        elif line not in plain:
            plain.append(line)
    ours = sorted(modules, key=lambda module: (module.startswith("lossary"), module))
    return [*plain, *(f"from {module} import {', '.join(dict.fromkeys(modules[module]))}" for module in ours)]
