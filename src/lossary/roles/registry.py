"""Every role by name: whatever module of this folder defines a `ROLE`."""

import importlib
from pathlib import Path

from lossary.roles._battery import Result, Role, run
from lossary.roles._mark import mark_of

ROLES: dict[str, Role] = {
    path.stem: module.ROLE
    for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
    if path.stem != "registry" and hasattr(module := importlib.import_module(f"lossary.roles.{path.stem}"), "ROLE")
}


def check(part: object) -> list[Result]:
    """Run the battery of the part's role.

    Raises:
        ValueError: the part carries no role's mark.
    """
    found = mark_of(part)
    if found is None:
        raise ValueError(
            f"part: {getattr(part, '__name__', part)!r} carries no role's mark; decorate it, for "
            "instance with @lossary.roles.loss(on='classes')"
        )
    return run(part, ROLES[found.role])
