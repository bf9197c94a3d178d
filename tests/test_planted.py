"""Each check of each role's battery catches the fault planted for it in tests/planted/<role>.py."""

import importlib

import pytest

from lossary.roles._battery import run
from lossary.roles.registry import ROLES


@pytest.mark.parametrize("name", ROLES)
def test_every_check_has_a_planted_fault(name):
    faults = importlib.import_module(f"tests.planted.{name}").FAULTS
    assert set(faults) == {check.__name__ for check in ROLES[name].checks}


@pytest.mark.parametrize(
    ("name", "check"), [(name, check.__name__) for name, role in ROLES.items() for check in role.checks]
)
def test_the_check_catches_its_fault(name, check):
    part = importlib.import_module(f"tests.planted.{name}").FAULTS[check]
    (result,) = run(part, ROLES[name], only=[check])
    assert not result.passed, f"{check} did not catch {part.__name__}"
    assert result.message
