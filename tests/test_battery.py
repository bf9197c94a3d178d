"""Every marked part of every paper passes its role's battery."""

import importlib

import pytest

from lossary import catalogue
from lossary.roles import check

PARTS = [
    (paper["id"], paper["room"], part["name"])
    for paper in catalogue.entries()
    for part in paper["parts"]
    if part["role"]
]


@pytest.mark.parametrize(("paper_id", "room", "name"), PARTS)
def test_the_part_passes_its_battery(paper_id, room, name):
    failed = [r for r in check(getattr(importlib.import_module(f"lossary.{room}"), name)) if not r.passed]
    assert not failed, "\n".join(f"{r.check} {dict(r.example or {})}: {r.message}" for r in failed)
