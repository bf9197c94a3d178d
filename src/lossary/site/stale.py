"""Which verdicts no longer speak of the code at hand, and why.

To tell, torch is imported, which the server can do without: so this is also a program, `python -m lossary.site.stale`.
What it found is kept beside the catalogue's index until a file changes.
"""

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path

from lossary import cached, catalogue

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
    record = json.dumps({"stamp": stamp, "stale": found})
    cached.keep(_kept(package), lambda draft: draft.write_text(record, "utf-8"))
    return found


def _kept(package: Path) -> Path:
    return cached.folder() / f"stale-{hashlib.sha256(str(package).encode()).hexdigest()[:16]}.json"


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
