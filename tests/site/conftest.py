"""The site in a temporary folder, behind a real server, in a real browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from lossary.catalogue import PACKAGE, ROOMS
from lossary.site import vendor
from lossary.site.app import create_app
from lossary.site.library import Library, Snapshot
from tests.site.serving import Served, served

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def now() -> Snapshot:
    """The catalogue as it is."""
    return Library().now


KEPT = {
    "losses": "polyloss comp_sum_loss pu_mlc",
    "ood": "neco",
    "weighting": "error_norm_truncation grand_el2n",
}
DRAW = """

def draw(seeds):
    from lossary.claims.draw import Panel

    return [Panel("a slope", [[0.0, 0.5, 1.0]], points=[[1.0, 0.5]])]
"""


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a handful of papers, one of which draws."""
    copy = tmp_path_factory.mktemp("package") / "lossary"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_index.json"))
    for room in ROOMS:
        for part in (copy / room).glob("[!_]*.py"):
            if part.stem.rstrip("_") not in KEPT.get(room, "").split():
                part.unlink()
    with (copy / "claims/losses/polyloss.py").open("a") as claims:
        claims.write(DRAW)
    return copy


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """The pages without a server; nothing that goes on in the background runs."""
    return TestClient(create_app(tmp_path_factory.mktemp("site")), base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator["object"]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}; name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """`open_page(**options of a browser's context)` gives a page; what it writes to the console fails the test."""
    contexts, problems = [], []

    def opened(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: problems.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page):
    return open_page()


@pytest.fixture(scope="session")
def axe(request: pytest.FixtureRequest) -> Callable[["object"], list[str]]:
    """`axe(page)` gives the serious and critical faults of accessibility that axe-core finds in a page."""
    folder = Path(request.config.cache.mkdir(f"axe-{vendor.AXE}"))
    script = folder / "axe.min.js"
    if not script.exists():
        try:
            vendor.axe(folder)
        except RuntimeError as error:
            pytest.skip(str(error))

    def faults(page):
        page.evaluate(script.read_text("utf-8"))
        found = page.evaluate("axe.run()")["violations"]
        return [
            f"{fault['id']}: {fault['help']}: {[node['html'][:120] for node in fault['nodes'][:3]]}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]

    return faults
