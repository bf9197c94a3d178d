"""Which verdicts no longer speak of the code at hand, and why.

To tell, torch is imported, which the server can do without: so this is also a program, `python -m lossary.site.stale`.
What it found is kept beside the catalogue's index until a file changes.
"""

import asyncio
import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from lossary import catalogue

Reasons = dict[str, dict[str, list[str]]]
"""By room/id and claim, of those that have any."""


def known(package: Path, stamp: str) -> Reasons | None:
    """What was found when the catalogue had this stamp; None where nothing was."""
    try:
        kept = json.loads(_kept(package).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return kept["stale"] if kept["stamp"] == stamp else None


async def find(package: Path, stamp: str) -> Reasons:
    """Looks, which takes seconds, and keeps what it found.

    Raises:
        RuntimeError: the program failed, for instance on a file that is being edited.
    """
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lossary.site.stale", env=environment, stdout=-1, stderr=-1
    )
    try:
        out, problem = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"cannot tell which verdicts are stale: {problem.decode().strip().splitlines()[-1]}")
    found: Reasons = json.loads(out)
    path = _kept(package)
    with suppress(OSError):  # a read-only home only costs the time to look again
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"stamp": stamp, "stale": found}), "utf-8")
        draft.replace(path)
    return found


def _kept(package: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    return Path(base) / "lossary" / f"stale-{hashlib.sha256(str(package).encode()).hexdigest()[:16]}.json"


def _look() -> Reasons:
    from lossary.claims import runner

    found = {}
    for paper in catalogue.entries():
        reasons = {name: why for name, run in runner.latest(paper).items() if (why := runner.stale(paper, run))}
        if reasons:
            found[f"{paper['room']}/{paper['id']}"] = reasons
    return found


if __name__ == "__main__":
    print(json.dumps(_look()))
