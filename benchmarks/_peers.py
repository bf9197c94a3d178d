"""Peers whose own `__init__` wants torchvision, which what is timed does without."""

import importlib
import importlib.util
import sys
from types import ModuleType


def part_of(package: str, module: str) -> ModuleType:
    """A module of a package, whose own `__init__` is not run."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ModuleNotFoundError(f"{package} is missing: run `make bench`, which installs it")
        bare = ModuleType(package)
        bare.__path__ = list(found.submodule_search_locations or ())
        sys.modules[package] = bare
    return importlib.import_module(module)
