"""Pages of a catalogue of 427 papers: the time to their first byte, warm, over one connection; their size; a search.

The catalogue is this one, copied under other names until there are 427 papers, the copies in the rooms that have none
yet. Each page is asked for once before the clock runs, then three times, of which the median counts. Sizes are without
the plots of intervals.

python -m benchmarks site
"""

import http.client
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote_plus

from benchmarks._timing import seconds
from lossary import catalogue
from lossary.catalogue import PACKAGE, ROOMS
from lossary.site import views
from lossary.site.library import Library

PAPERS = 427
QUERIES = ("noisy labels", "long tail few positives", "calibration", "out of distribution", "nothing like it", "poly")
PROGRAM = """
import sys
from pathlib import Path
import uvicorn
from lossary.site.app import create_app
app = create_app(Path(sys.argv[1]), package=Path(sys.argv[2]))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
"""


def measure() -> list[dict]:
    with tempfile.TemporaryDirectory() as place:
        package = many(Path(place) / "lossary")
        now = Library(package).now
        pages = {f"/{name}": make() for name, make in views.every(now)}
        with _served(Path(place) / "data", package) as connection:
            first = {path: _first_byte(connection, path) for path in (*pages, "/feed.xml")}
            searches = [_first_byte(connection, f"/search?q={quote_plus(query)}") for query in QUERIES]
            typing = [_first_byte(connection, f"/answers?q={quote_plus(query)}") for query in QUERIES]
        found = [seconds(partial(catalogue.search, query, now.index)) for query in QUERIES]
    sizes = {path: len(re.sub(r"<svg.*?</svg>", "", page, flags=re.S).encode()) / 1000 for path, page in pages.items()}
    slowest, largest = max(first, key=first.__getitem__), max(sizes, key=sizes.__getitem__)
    return [
        _times(f"a page of {len(now.papers)} papers, median of {len(first)}", first.values()),
        _times(f"the slowest page, {slowest}", [first[slowest]], 50),
        _times("a page of search results, the slowest", [max(searches)], 50),
        _times("answers while one types, the slowest", [max(typing)], 50),
        _times("the search in it, the slowest", [max(found)], 30),
        {"name": f"the largest page, {largest}", "ratio": sizes[largest], "target": "<= 150", "unit": "kB"},
        {"name": "the first page", "ratio": sizes["/"], "target": "<= 150", "unit": "kB"},
    ]


def many(package: Path) -> Path:
    """A package of `PAPERS` papers."""
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "vendor", "_index.json"))
    real = catalogue.entries()
    rooms = [room for room in ROOMS if not any(paper["room"] == room for paper in real)] or list(ROOMS)
    for number in range(PAPERS - len(real)):
        _copy(package, real[number % len(real)], rooms[number % len(rooms)], f"copy_{number}")
    return package


def _copy(package: Path, paper: catalogue.Entry, room: str, name: str) -> None:
    stem, target = paper["id"].replace("-", "_"), f"{paper['id'].replace('-', '_')}_{name}"

    def renamed(text: str) -> str:
        for part in paper["parts"]:
            text = re.sub(rf"\b{part['name']}\b", f"{part['name']}_of_{name}", text)
        return text

    (package / room).mkdir(exist_ok=True)
    head = package / room / "__init__.py"
    if not head.exists():
        head.write_text((package / paper["room"] / "__init__.py").read_text("utf-8"), "utf-8")
    part = package / paper["room"] / f"{paper['module'].rpartition('.')[2]}.py"
    for source, goal, change in (
        (part, package / room / f"{target}.py", renamed),
        (package / "claims" / paper["room"] / f"{stem}.py", package / "claims" / room / f"{target}.py", renamed),
        (_verdict(package, paper["room"], paper["id"]), _verdict(package, room, target.replace("_", "-")), str),
    ):
        if source.exists():
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_text(change(source.read_text("utf-8")), "utf-8")


def _verdict(package: Path, room: str, id: str) -> Path:
    return package / "verdicts" / room / f"{id}.json"


@contextmanager
def _served(data: Path, package: Path) -> Iterator[http.client.HTTPConnection]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", PROGRAM, str(data), str(package), str(port)])
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(600):
            try:
                connection.connect()
                break
            except OSError:
                time.sleep(0.1)
        yield connection
    finally:
        server.terminate()
        server.wait()


def _first_byte(connection: http.client.HTTPConnection, path: str) -> float:
    """Seconds, the median of three after one that does not count."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read(1)
        taken.append(time.perf_counter() - start)
        answer.read()
        assert answer.status == 200, path
    return statistics.median(taken[1:])


def _times(name: str, times: Collection[float], most: float | None = None) -> dict:
    target = None if most is None else f"<= {most}"
    return {"name": name, "ratio": 1000 * statistics.median(times), "target": target, "unit": "ms"}
