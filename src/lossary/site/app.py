"""The site as an application: pages of the catalogue, runs and comparisons, behind the guards of `security`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from lossary import __version__
from lossary.catalogue import PACKAGE
from lossary.site import pages, runs, runs_pages, security, stale, views
from lossary.site.library import Library, Snapshot

LOOK = 2.0  # seconds between looks at whether the catalogue's files changed


def create_app(
    folder: Path,
    *,
    token: str | None = None,
    package: Path = PACKAGE,
    limits: runs.Limits | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The whole site. `folder` holds all that it writes: uploads, runs, pictures.

    Args:
        folder: made where it is missing.
        token: what a visitor must show; None asks for nothing, which is only for the loopback address.
        package: where the catalogue lies.
        limits, protocol: of the runs, see `runs.Runs`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    app = FastAPI(title="Lossary", version=__version__, lifespan=_life, docs_url=None, redoc_url=None)
    app.state.folder = folder
    app.state.library = Library(package)
    app.state.runs = runs.Runs(folder, limits=limits, protocol=protocol)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    app.include_router(runs_pages.router)
    runs_pages.answer_errors(app)
    app.include_router(pages.router)
    pages.answer_missing(app)
    security.guard(app, token=token)
    return app


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    watch = asyncio.create_task(_watch(app.state.library))
    async with app.state.runs.working():
        yield
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def _watch(library: Library) -> None:
    """Reads the catalogue anew when it changes, and makes its pages before anyone asks."""
    done = ""
    while True:
        try:
            await asyncio.to_thread(library.refresh)
            if library.now.stamp != done:
                done = library.now.stamp
                await _prepare(library.now)
        except Exception:  # whatever is wrong with a file that is being edited, the other pages stay
            logging.getLogger("uvicorn.error").exception("lossary: the catalogue cannot be read as it is now")
        await asyncio.sleep(LOOK)


async def _prepare(now: Snapshot) -> None:
    if now.stale is None:
        now.learn(await stale.find(now.package, now.stamp))
    for address, make in views.every(now):
        await asyncio.to_thread(now.once, address, make)
