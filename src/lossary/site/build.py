"""The catalogue as a folder of files for any web host, or to open from disk: `lossary build-site DIR`."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lossary.catalogue import PACKAGE
from lossary.errors import BadInput
from lossary.site import feed, pictures, render, stale, views
from lossary.site.library import Library, Snapshot
from lossary.vocabulary import SYMPTOMS

T = TypeVar("T")
Progress = Callable[[int, int, str], object]
MARK = "static/search-index.js"  # by this file we know a folder of ours
SERVED = "compare"  # static files whose name begins so are of use on a server only


def build_site(folder: Path, *, url: str = "", package: Path = PACKAGE, progress: Progress | None = None) -> Path:
    """Writes the site; what an earlier build wrote into the folder is replaced.

    Args:
        folder: empty, missing, or of an earlier build.
        url: where it will be, for the links of the feeds; without it they are relative.
        package: where the catalogue lies.
        progress: called with pictures that are done, all of them, and whose is next; drawing the first time is what
            takes minutes.

    Returns:
        its first page.

    Raises:
        BadInput: the folder holds something else, or cannot be written; a claim's picture cannot be drawn. Those that
            were drawn are kept.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"folder: {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise BadInput(f"folder: {str(folder)!r} holds other files; name an empty or a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            draft = Path(place) / "site"
            _write(draft, Library(package).now, url if not url or url.endswith("/") else f"{url}/", progress)
            if folder.exists():
                folder.rename(Path(place) / "before")
            draft.rename(folder)
    except OSError as error:
        raise BadInput(f"folder: cannot write {str(folder)!r} ({error.strerror}); name another") from None
    return folder / "index.html"


def _write(folder: Path, now: Snapshot, url: str, progress: Progress | None) -> None:
    if now.stale is None:
        now.learn(_finished(stale.find(now.package, now.stamp)))
    for address, make in views.every(now, static=True):
        _put(folder / render.file_of(address), make())
    _put(folder / "search.html", views.all_papers(now))
    _put(folder / "compare.html", render.page("locally.html", here="compare", static=True))
    _put(folder / "feed.xml", feed.atom(now, url, static=True))
    for room in now.rooms:
        _put(folder / f"rooms/{room}.xml", feed.atom(now, url, room, static=True))
    ours = shutil.ignore_patterns(f"{SERVED}*", "search.js")
    shutil.copytree(render.HERE / "static", folder / "static", ignore=ours)
    script = (render.HERE / "static/search.js").read_text("utf-8")
    _put(folder / MARK, f"window.lossaryIndex = {json.dumps(_index(now), separators=(',', ':'))};\n{script}")
    _finished(_draw(folder, now, progress))


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """What comes of it, in a thread of its own: the caller's may have a loop that runs already, as in a notebook."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, work).result()


def _put(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _index(now: Snapshot) -> dict[str, Any]:
    papers = []
    for paper in now.papers:
        row = views.row(now, paper)
        papers.append(
            {
                **{name: paper[name] for name in ("id", "room", "summary")},
                "helps": [symptom for symptom in paper["helps"] if symptom in SYMPTOMS],
                "held": row["held"],
                "file": render.file_of(row["address"]),
                "counts": views.counts(row),
            }
        )
    return {"papers": papers, **now.index.to_json()}


async def _draw(folder: Path, now: Snapshot, progress: Progress | None) -> None:
    papers = [paper for paper in now.papers if paper["draws"]]
    for done, paper in enumerate(papers):
        if progress is not None:
            progress(done, len(papers), f"drawing {paper['id']}")
        try:
            drawn = await pictures.svg(now, paper, pictures.kept())
        except (RuntimeError, TimeoutError) as error:
            why = str(error) or f"not done after {pictures.LIMIT:.0f} s"
            raise BadInput(
                f"{paper['id']}: its picture cannot be drawn ({why}); `lossary claim {paper['id']} --draw` tells more"
            ) from None
        _put(folder / f"pictures/{paper['room']}/{paper['id']}.svg", drawn)
