"""The static site: complete, without a broken link, and useful without a server."""

import json
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote, urlsplit

import pytest

from lossary import catalogue
from lossary.errors import BadInput
from lossary.site import build, feed, views
from lossary.site.build import build_site
from lossary.site.library import Library
from tests.site.test_pages import ATOM, Links

QUERIES = (
    "noisy labels, few positives",
    "calibration",
    "polyloss",
    "Out of distribution!",
    "class_imbalance",
    "zzz",
    "",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory, package):
    folder = tmp_path_factory.mktemp("static") / "under" / "site"
    build_site(folder, package=package)
    return folder


@pytest.fixture(scope="module")
def built(package):
    """The catalogue that the site shows."""
    return Library(package).now


def test_no_link_is_broken(site):
    pages = {path: Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.addresses:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            assert not link.startswith("/"), f"{path.relative_to(site)}: {link} leaves the folder it may be put in"
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(site)} leads to {link}"
            assert target.is_relative_to(site)
            if parts.fragment and target in pages:
                assert parts.fragment in pages[target].ids, f"{path.relative_to(site)} leads to {link}"


def test_every_page_of_the_server_is_there(site, built):
    for address, _ in views.every(built):
        assert (site / (f"{address}.html" if address else "index.html")).is_file()


def test_nothing_needs_a_server(site):
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        assert 'method="post"' not in page
        assert not re.search(r'(src|href)="(https?:)?//[^"]*\.(js|css)', page)
    assert "lossary serve" in (site / "compare.html").read_text("utf-8")
    assert "lossary claim polyloss" in (site / "papers/losses/polyloss.html").read_text("utf-8")


def test_pictures_are_drawn(site):
    assert (site / "pictures/losses/polyloss.svg").read_text("utf-8").startswith("<svg")
    assert 'src="../../pictures/losses/polyloss.svg"' in (site / "papers/losses/polyloss.html").read_text("utf-8")


def test_a_picture_that_fails_is_named_and_progress_is_told(tmp_path, package, monkeypatch):
    async def fails(*_):
        raise RuntimeError("no ink")

    told = []
    monkeypatch.setattr(build.pictures, "svg", fails)
    with pytest.raises(BadInput, match=r"^[\w-]+: its picture cannot be drawn \(no ink\)"):
        build_site(tmp_path / "site", package=package, progress=lambda *state: told.append(state))
    ((done, total, text),) = told
    assert done == 0 < total
    assert text.startswith("drawing ")
    assert not (tmp_path / "site").exists()


def test_style_sheets_and_scripts_name_files_that_are_there(site):
    for path in site.rglob("*.css"):
        for name in re.findall(r"url\(([^)]*\.woff2)\)", path.read_text("utf-8")):
            assert (path.parent / name).is_file()


def test_links_of_the_feeds_lead_to_pages(site, built):
    for path in (site / "feed.xml", *(site / f"rooms/{room}.xml" for room in built.rooms)):
        for entry in ET.fromstring(path.read_bytes()).findall(f"{ATOM}entry"):
            link = urlsplit(entry.find(f"{ATOM}link").get("href"))
            assert link.fragment in Links((path.parent / link.path).read_text("utf-8")).ids


def test_the_index_of_the_search_is_that_of_the_catalogue(site, built):
    script = (site / build.MARK).read_text("utf-8").splitlines()[0]
    index = json.loads(script.removeprefix("window.lossaryIndex = ").removesuffix(";"))
    assert [paper["id"] for paper in index["papers"]] == [paper["id"] for paper in built.papers]
    assert index["words"].keys() == built.index.words.keys()


def test_a_page_searches_as_the_catalogue_does(site, page, built):
    page.goto((site / "search.html").as_uri())
    page.wait_for_function("window.lossarySearch !== undefined")
    for query in QUERIES:
        for typing in (False, True):
            found = page.evaluate("([query, typing]) => window.lossarySearch.search(query, typing)", [query, typing])
            expected = catalogue.search(query, built.index, typing=typing)
            assert [(hit["id"], hit["score"]) for hit in found] == [
                (hit["id"], pytest.approx(hit["score"], abs=2e-3)) for hit in expected
            ], query


def test_the_search_works_from_disk(site, page):
    page.goto((site / "index.html").as_uri())
    page.fill("#q", "polylo")
    page.click(".answers a >> nth=0")
    assert page.url == (site / "papers/losses/polyloss.html").as_uri()
    page.fill("#q-top", "noisy labels")
    page.press("#q-top", "Enter")
    page.wait_for_selector("#results p")
    assert urlsplit(page.url).path.endswith("search.html")
    assert "match" in page.inner_text("[role=status]")
    page.click("#results a >> nth=0")
    assert "/papers/" in page.url


def test_building_again_replaces_what_was_built(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(build, "_write", lambda folder, now, url, progress: (folder / "static").mkdir(parents=True))
    build_site(folder)
    (folder / build.MARK).write_text("", "utf-8")
    (folder / "old.html").write_text("", "utf-8")
    build_site(folder)
    assert not (folder / "old.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("", "utf-8")
    with pytest.raises(BadInput, match="holds other files"):
        build_site(tmp_path)
    with pytest.raises(BadInput, match="is a file"):
        build_site(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_links_of_feeds_are_whole_where_the_address_is_told(now):
    told = feed.atom(now, "https://example.org/lossary/", static=True).decode()
    assert f'href="https://example.org/lossary/papers/{now.events()[0]["paper"]["room"]}/' in told
