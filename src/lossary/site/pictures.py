"""What the claims of a paper draw, as SVG files: drawn once by a process of its own, kept until the claim changes."""

import asyncio
import hashlib
import os
import sys
from pathlib import Path

from lossary import cached, catalogue
from lossary.catalogue import Entry
from lossary.site.library import Snapshot

LIMIT = 600.0  # seconds for the pictures of one paper, and a network of its claims that is trained first
_one = asyncio.Lock()  # at a time


def kept() -> Path:
    """Where pictures are kept between builds of a static site, beside the catalogue's index."""
    return cached.folder() / "pictures"


async def svg(now: Snapshot, paper: Entry, folder: Path) -> bytes:
    """The paper's picture from `folder`, or drawn.

    Raises:
        KeyError: its claims draw nothing.
        RuntimeError: they fail to.
        TimeoutError: they take longer than `LIMIT`.
    """
    if not paper["draws"]:
        raise KeyError(paper["id"])
    claims = catalogue.claim_file(paper, now.package)
    key = hashlib.sha256(f"{paper['code']}{claims.read_text('utf-8')}".encode()).hexdigest()[:16]
    path = folder / f"{paper['room']}-{paper['id']}-{key}.svg"
    async with _one:
        if not path.exists():
            await asyncio.wait_for(_draw(now, paper, path), LIMIT)
    return path.read_bytes()


async def _draw(now: Snapshot, paper: Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    environment = {**os.environ, "PYTHONPATH": str(now.package.parent), "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lossary.site.pictures", paper["id"], str(draft), env=environment, stderr=-1
    )
    try:
        _, problem = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise RuntimeError(problem.decode().strip().splitlines()[-1])
    draft.replace(path)


def _main() -> None:
    from lossary.claims import Seeds
    from lossary.claims.draw import drawer
    from lossary.claims.draw import svg as picture

    paper = catalogue.entry(sys.argv[1])
    draw = drawer(paper)
    if draw is None:
        raise SystemExit(f"{paper['id']} draws nothing")
    Path(sys.argv[2]).write_text(picture(draw(Seeds((0,)))), "utf-8")


if __name__ == "__main__":
    _main()
