"""Every marked part of every paper passes its role's battery."""

import doctest
import importlib
import inspect

import pytest

from lossary import catalogue
from lossary.roles import check

PARTS = [
    (paper["id"], paper["room"], part["name"])
    for paper in catalogue.entries()
    for part in paper["parts"]
    if part["role"]
]
PLAIN = [
    (paper["id"], paper["room"], part["name"])
    for paper in catalogue.entries()
    for part in paper["parts"]
    if not part["role"]
]


@pytest.mark.parametrize(("paper_id", "room", "name"), PARTS)
def test_the_part_passes_its_battery(paper_id, room, name):
    failed = [r for r in check(getattr(importlib.import_module(f"lossary.{room}"), name)) if not r.passed]
    assert not failed, "\n".join(f"{r.check} {dict(r.example or {})}: {r.message}" for r in failed)


@pytest.mark.parametrize(("paper_id", "room", "name"), PLAIN)
def test_a_part_without_a_role_is_documented_and_its_example_runs(paper_id, room, name):
    part = getattr(importlib.import_module(f"lossary.{room}"), name)
    tests = doctest.DocTestFinder(recurse=False).find(part, name, globs=dict(vars(inspect.getmodule(part))))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert sum(runner.run(test).attempted for test in tests), "the docstring has no example (>>>)"
    assert not runner.failures
