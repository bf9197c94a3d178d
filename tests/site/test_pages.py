"""Pages of the catalogue: what they say, where they lead, and that no text of a file becomes markup."""

import html
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

from lossary import catalogue
from lossary.compare import charts
from lossary.site import docstrings, feed, plot, render, stale, views
from lossary.site.library import Library, address
from lossary.vocabulary import SYMPTOMS

ATOM = "{http://www.w3.org/2005/Atom}"


class Links(HTMLParser):
    """Every address that a page names, and every id that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        if tag != "form":  # a form's action may take no GET
            self.addresses += [given[name] for name in ("href", "src") if given.get(name)]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def get(client, path: str) -> str:
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.text[:500])
    return answer.text


def claim(kind: str, metric: str, threshold: float, effect, low=None, high=None, outcome="holds", **more) -> dict:
    run = {"outcome": outcome, "effect": effect, "low": low, "high": high, "threshold": threshold, "unit": "points"}
    run |= {"note": "", "n": 20, "method": [1.0], "baseline": [1.0]}
    return {"kind": kind, "metric": metric, "says": "", "run": run, **more}


@pytest.fixture(scope="module")
def pages(now) -> dict[str, str]:
    """Every page of the catalogue by its address."""
    return {f"/{name}": now.once(name, make) for name, make in views.every(now)}


def test_no_page_is_large(pages):
    """Without plots, which no one reads as text."""
    sizes = {path: len(re.sub(r"<svg.*?</svg>", "", page, flags=re.S).encode()) for path, page in pages.items()}
    assert {path: size for path, size in sizes.items() if size > 150_000} == {}


def test_every_page_leads_to_pages_that_are_there(pages, now):
    known = {*pages, "/compare", "/runs", "/search", "/feed.xml", *(f"/rooms/{room}.xml" for room in now.rooms)}
    ids = {name: set(Links(page).ids) for name, page in pages.items()}
    for name, page in pages.items():
        for link in Links(page).addresses:
            target, anchor = urlsplit(link).path or name, urlsplit(link).fragment
            if urlsplit(link).netloc or target.startswith(("/static/", "/pictures/")):
                continue
            assert target in known, f"{name} leads to {link}"
            if anchor and target in pages:
                assert anchor in ids[target], f"{name} leads to {link}"


@pytest.mark.parametrize("path", ["/", "/evidence", "/search", "/search?q=noisy", "/robots.txt", "/static/style.css"])
def test_pages_beside_the_papers(client, path):
    get(client, path)


def test_ids_are_unique_on_every_page(pages):
    for name, page in pages.items():
        ids = Links(page).ids
        assert len(ids) == len(set(ids)), name


@pytest.mark.parametrize(
    "path", ["/nothing", "/rooms/nothing", "/rooms/nothing.xml", "/papers/losses/nothing", "/papers/nothing/polyloss",
             "/symptoms/nothing", "/engines/losses/nothing", "/engines/losses/_softmax", "/rooms/%3Cscript%3E",
             "/pictures/losses/polyloss.svg", "/pictures/losses/nothing.svg", "/papers/losses/..%2f..%2fcli"],
)  # fmt: skip
def test_what_is_not_there_is_said_to_be_missing(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "<script>" not in answer.text
    assert "Back to the catalogue" in answer.text


def test_home_tells_the_state_of_the_evidence(client, now):
    page = text_of(get(client, "/"))
    claims = [
        (claim, catalogue.outcomes(paper).get(claim["name"], "not run"))
        for paper in now.papers
        for claim in paper["claims"]
        if not claim.get("control")
    ]
    outcomes = [outcome for claim, outcome in claims if claim["kind"] != "exact"]
    for outcome, word in (("holds", "hold"), ("does not hold", "do not hold"), ("inconclusive", "inconclusive")):
        assert re.search(rf"\b{word}\s+{outcomes.count(outcome)}\b", page), word
    assert f"{0.025 * (len(outcomes) - outcomes.count('not run')):.2g}" in page
    for symptom in {symptom for paper in now.papers for symptom in paper["helps"]}:
        assert symptom.replace("-", " ").capitalize() in page


def test_a_room_lists_every_paper_with_its_intervals(client, now):
    page = get(client, "/rooms/losses")
    rows = re.findall(r'<tr data-name="([^"]+)"', page)
    assert rows == [paper["id"] for paper in now.rooms["losses"]]
    assert page.count('<svg class="plot"') >= len(rows)
    assert 'href="/papers/losses/polyloss"><code>poly1_cross_entropy</code></a>' in page  # the table of troubles


def test_a_paper_shows_all_that_was_found(client, now):
    page = get(client, "/papers/losses/polyloss")
    said = html.unescape(re.sub(r"<[^>]*>", "", page))
    paper = now.paper("losses", "polyloss")
    for told in (paper["title"], *paper["departs"], *(claim["says"] for claim in paper["claims"])):
        assert told in said
    for claim in now.claims(paper):
        assert f'action="/papers/losses/polyloss/claims/{claim["name"]}/run"' in page
        assert claim["scale"] in said
        assert f'id="{claim["name"]}"' in page
    assert "from lossary.losses import poly1_cross_entropy" in said
    assert "lossary/losses/_softmax.py" in said
    source = re.search(r'aria-label="lossary/losses/polyloss.py"><code>(.*?)</code></pre>', page, re.S)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", source)) == now.module(paper["module"]).source


def test_an_equation_is_shown_as_its_source_until_a_script_sets_it(client, now):
    paper = next(paper for paper in now.papers if paper["equation"])
    box = re.search(r'<div class="equation"[^>]*><code>(.*?)</code></div>', get(client, f"/{address(paper)}"))
    assert html.unescape(box[1]) == paper["equation"]


def test_examples_import_all_they_need_and_run(now):
    for paper in now.papers:
        module = now.module(paper["module"])
        for part in paper["parts"]:
            example = module.example(part["name"])
            if example:
                assert not docstrings._free(example), (paper["id"], part["name"])
                assert part["name"] in example.partition("\n\n")[0]
    exec(now.module("lossary.losses.polyloss").example("poly1_cross_entropy"), {})


def test_docstrings_by_pieces():
    prose, sections = docstrings.pieces(
        "What it does.\n\nMore of it:\n\n    a formula\n\nArgs:\n    x: the input,\n        on two lines.\n"
        "    *more: others.\n\nReturns:\n    a number.\n\n>>> f(1)\n2\n\nAfterwards."
    )
    assert prose.split() == "What it does. More of it: a formula Afterwards.".split()
    assert "\n\n    a formula\n\n" in prose
    assert [(s.heading, s.entries, s.prose.strip()) for s in sections] == [
        ("arguments", [("x", "the input, on two lines."), ("*more", "others.")], ""),
        ("returns", [], "a number."),
    ]


def test_excerpts_are_of_the_names_asked_for():
    source = "import os\nA = 1\nB = 2\n\n@mark\ndef f():\n    return A\n\n# g\nclass C:\n    x = 1\n"
    module = docstrings.Module("m", source)
    assert module.excerpt(["f", "A"]) == "A = 1\n\n\n@mark\ndef f():\n    return A\n"
    assert module.excerpt(["none"]) == ""


def test_lines_of_code_leave_out_prose():
    source = '"""Doc."""\n\n# no\nx = 1\n\n\ndef f():\n    """Doc\n    more."""\n    return 1\n'
    assert docstrings.Module("m", source).lines == 3


def test_text_of_files_and_requests_never_becomes_markup(client):
    hostile = '<img src=x onerror="alert(1)"> **bold** [x](javascript:alert(1)) &lt;'
    for made in (render.prose(hostile), render.line(hostile), render.code(hostile), render.prose(f"`{hostile}`")):
        assert "<img" not in made
        assert "<a" not in made
        assert "javascript:" not in Links(str(made)).addresses
    for path in ("/search", "/answers"):
        page = client.get(path, params={"q": '"><script>alert(1)</script>'}).text
        assert "<script>alert" not in page
    assert 'value="&#34;&gt;&lt;script&gt;' in client.get("/search", params={"q": '"><script>'}).text


def test_prose_leaves_formulas_alone():
    assert "a * b * c_i and __all__ *x*" in render.prose("a * b * c_i and __all__ *x*")
    noted = render.prose("`f`", {"f": "/p"}, {"f": "1/2"})
    assert '<a href="/p"><code>f</code></a> <span class="note">1/2</span>' in noted


# Search


def test_search_finds_by_words_symptoms_names_and_beginnings(client):
    assert "/papers/losses/polyloss" in get(client, "/search?q=polyloss")
    assert "compress-feat-noisy-labels" in get(client, "/search?q=noisy+labels")
    assert "claims to help with label noise" in text_of(get(client, "/search?q=noisy+labels"))
    assert get(client, "/answers?q=polyl").index("polyloss") > 0
    assert "Nothing matches" in get(client, "/answers?q=zzzz")
    assert "No papers match" in text_of(get(client, "/search?q=zzzz"))
    assert client.get("/search", params={"q": "x" * 301}).status_code in (404, 422)


def test_an_index_finds_what_a_search_without_one_does(now):
    for query in ("noisy labels, few positives", "calibration", "polyloss", ""):
        quick, plain = catalogue.search(query, now.index), catalogue.search(query, now.papers)
        assert [hit["id"] for hit in quick] == [hit["id"] for hit in plain]
    started = catalogue.search("calibr", now.index, typing=True)
    assert started
    assert {hit["id"] for hit in catalogue.search("calibration", now.index)} <= {hit["id"] for hit in started}


# Intervals


@pytest.mark.parametrize(
    ("registered", "value", "margins", "asked"),
    [
        (claim("superiority", "accuracy", 0.5, 1.0), 1.0, 2.0, 1.0),
        (claim("noninferiority", "accuracy", 0.5, 1.0), -0.5, -1.0, -1.0),
        (claim("equality", "coverage", 0.5, 0.0), 0.25, 0.5, -1.0),
        (claim("ratio", "mean squared error", 0.5, 0.25), 0.25, 2.0, 1.0),  # lower is better
        (claim("ratio", "time", 1.25, 1.0), 1.25, -1.0, -1.0),  # no more than a quarter slower
        (claim("ratio", "accuracy", 1.25, 2.0), 1.25**2, 2.0, 1.0),
        (claim("exact", "deviation", 1e-6, 5e-7), 5e-7, 0.5, 0.0),
        (claim("exact", "deviation", 0.0, 0.0), 0.0, 0.0, 0.0),
    ],
)
def test_claims_of_every_kind_share_an_axis(registered, value, margins, asked):
    assert plot.in_margins(registered, value) == pytest.approx(margins)
    assert plot.asked(registered)[0] == pytest.approx(asked)


def test_an_interval_lies_in_the_shaded_part_exactly_where_its_claim_holds(now):
    for paper in now.papers:
        for registered in now.claims(paper):
            run = registered["run"]
            if not run or run["low"] is None or run["high"] is None or run["note"]:
                continue
            low, high = sorted(plot.in_margins(registered, run[end]) for end in ("low", "high"))
            least, most = plot.asked(registered)
            assert (least < low and high < most) == (run["outcome"] == "holds"), (paper["id"], registered["name"])


def test_seeds_average_to_the_effect(now):
    for paper in now.papers:
        for registered in now.claims(paper):
            effects = plot.seed_effects(registered) if registered["run"] else []
            if effects and registered["kind"] != "ratio":
                assert sum(effects) / len(effects) == pytest.approx(registered["run"]["effect"], abs=1e-3, rel=1e-3)


def test_what_is_not_finite_is_drawn_nowhere():
    lost = claim("superiority", "accuracy", 0.5, None, outcome="inconclusive")
    assert "nan" not in plot.large(lost)
    assert "nothing finite" in plot.in_words(lost)
    far = claim("superiority", "accuracy", 0.5, 4000.0, 3999.0, 4001.0)
    assert "arrow" in plot.small([far])
    assert plot.small([{**far, "run": None}]) == ""


# Feed


def test_the_feed_tells_new_and_changed_verdicts(client, now):
    answer = client.get("/feed.xml")
    assert answer.headers["content-type"] == "application/atom+xml"
    entries = ET.fromstring(answer.content).findall(f"{ATOM}entry")
    assert 0 < len(entries) <= feed.MOST
    dates = [entry.find(f"{ATOM}updated").text for entry in entries]
    assert dates == sorted(dates, reverse=True)
    names = [entry.find(f"{ATOM}id").text for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries[:3]:
        link = urlsplit(entry.find(f"{ATOM}link").get("href"))
        assert link.netloc == "127.0.0.1:8000"
        assert link.fragment in Links(get(client, link.path)).ids
    rooms = ET.fromstring(client.get("/rooms/losses.xml").content).findall(f"{ATOM}entry/{ATOM}category")
    assert {room.get("term") for room in rooms} == {"losses"}


def test_a_run_with_the_same_outcome_is_no_news(now):
    for event in now.events():
        assert event["before"] is None or event["before"]["outcome"] != event["run"]["outcome"]


# What changes


def test_a_changed_file_gives_new_pages(tmp_path):
    package = tmp_path / "lossary"
    for path in ("losses/_softmax.py", "losses/__init__.py", "losses/polyloss.py", "claims/losses/polyloss.py",
                 "verdicts/losses/polyloss.json", "roles/loss.py"):  # fmt: skip
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text((catalogue.PACKAGE / path).read_text("utf-8"), "utf-8")
    library = Library(package)
    before = library.now
    assert [paper["id"] for paper in before.papers] == ["polyloss"]
    library.refresh()
    assert library.now is before
    part = package / "losses/polyloss.py"
    part.write_text(part.read_text("utf-8").replace("year=2022", "year=2023"), "utf-8")
    library.refresh()
    assert library.now.papers[0]["year"] == 2023


def test_stale_verdicts_are_told(now):
    paper = now.paper("losses", "polyloss")
    moved = Library()
    moved.now.learn({"losses/polyloss": {"poly1_beats_cross_entropy": ["engine changed"]}})
    assert moved.now.state()["stale"] == 1
    assert "stale: engine changed since it ran" in text_of(views.paper(moved.now, paper))
    assert "1 stale" in text_of(views.room(moved.now, "losses"))
    assert "poly1 beats cross entropy (engine changed)" in text_of(views.evidence(moved.now))
    assert stale.known(catalogue.PACKAGE, "another stamp") is None


def test_the_colours_are_those_of_a_report():
    style = (render.HERE / "static/style.css").read_text("utf-8")
    for line in charts.css().splitlines():
        for variable in re.findall(r"--\w+: #\w+;", line):
            assert variable in style
    assert style.count("--page: ") == 2


def test_symptoms_without_a_paper_have_a_page(client, now):
    used = {symptom for paper in now.papers for symptom in paper["helps"]}
    for symptom in SYMPTOMS:
        assert ("No paper of the catalogue" in get(client, f"/symptoms/{symptom}")) == (symptom not in used)
