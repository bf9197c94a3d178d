"""The rules that keep the house easy to live in: who may import whom, and where names live."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lossary
from lossary import catalogue

SOURCE = Path(lossary.__file__).parent
LEFT_OF = {room: set(catalogue.ROOMS[:i]) for i, room in enumerate(catalogue.ROOMS)}
# Who may import whom, inside the package. Rooms besides obey LEFT_OF.
BASE = {"vocabulary", "paper", "require", "errors"}
ARROWS = {
    "vocabulary": set(),
    "errors": set(),
    "require": set(),
    "paper": {"vocabulary"},
    "criterion": {"require", "vocabulary", "losses"},
    "roles": BASE,
    "cached": set(),
    "catalogue": {"cached", "vocabulary"},
    "verdict": set(),
    "tasks": {*BASE, "cached", "roles", *catalogue.ROOMS},
    "claims": {*BASE, "roles", *catalogue.ROOMS, "tasks", "verdict", "catalogue", "criterion"},
    "compare": {*BASE, "roles", *catalogue.ROOMS, "tasks", "catalogue", "criterion"},
    "audit": {"catalogue", "claims", "vocabulary"},
    "scaffold": {"catalogue", "audit", "errors"},
    "site": {*BASE, "cached", "catalogue", "claims", "compare", "audit", "verdict"},
    "cli": {*BASE, "roles", "catalogue", "claims", "compare", "site", "audit", "scaffold", "verdict"},
}


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it, as dotted paths below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lossary":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lossary."):
            found.add(node.module.removeprefix("lossary."))
    return {
        name
        for name in found
        if (SOURCE / f"{name.split('.')[0]}.py").exists() or (SOURCE / name.split(".")[0]).is_dir()
    }


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.stem not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path):
    home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imports(path):
        target = module.split(".")[0]
        if target == home:
            continue
        if home in LEFT_OF:
            allowed = {*BASE, "roles", *LEFT_OF[home]} | ({"catalogue"} if path.name == "__init__.py" else set())
        else:
            allowed = ARROWS[home]
        assert target in allowed, f"{path.relative_to(SOURCE)} imports lossary.{module}"


@pytest.mark.parametrize("room", [r for r in catalogue.ROOMS if (SOURCE / r / "__init__.py").exists()])
def test_an_engine_is_private_to_its_room_and_names_no_paper(room):
    ids = {e["id"].replace("-", "_") for e in catalogue.entries() if e["room"] == room}
    engines = {p.stem for p in (SOURCE / room).glob("_[!_]*.py")}
    assert not {name for name in engines if name.strip("_") in ids}


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, lossary.cli, lossary.catalogue as c; c.search('noisy labels'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "sklearn", "scipy", "pandas", "rich"} & set(loaded)


def test_rooms_are_lazy():
    code = "import sys, lossary.losses as room; dir(room); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded
    assert "lossary.losses.polyloss" not in loaded


def test_importing_a_module_does_not_shadow_a_part():
    """After `import lossary.<room>.<file>` every public name of the room is still the part, not a module."""
    import importlib
    from types import ModuleType

    for paper in catalogue.entries():
        importlib.import_module(paper["module"])
        room = importlib.import_module(f"lossary.{paper['room']}")
        assert not [p["name"] for p in paper["parts"] if isinstance(getattr(room, p["name"]), ModuleType)]
