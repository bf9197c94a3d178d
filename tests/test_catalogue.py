"""The catalogue reads papers without importing them, refuses what would confuse, and finds what people ask for."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from lossary import catalogue
from lossary.catalogue import CatalogueError

PAPER = '''"""A test paper: it changes nothing.

More about it.
"""

from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(title="On Nothing", year=2020, helps=({helps}))


@loss(on="classes", tune={{"epsilon": (1.0, 2.0)}})
def {name}(input, target, *, epsilon: float = 1.0):
    """Nothing at all. Per sample."""
    raise RuntimeError("reading must not run this")


def _private():
    """Not a part."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pkg" / "losses").mkdir(parents=True)
    return tmp_path / "pkg"


def write(package: Path, stem: str, name: str, helps: str = '"label-noise",') -> Path:
    path = package / "losses" / f"{stem}.py"
    path.write_text(PAPER.format(name=name, helps=helps))
    return path


def test_a_paper_is_read_from_its_syntax_alone(package):
    write(package, "on_nothing", "nothing_loss")
    (paper,) = catalogue.entries(package)
    assert (paper["id"], paper["title"], paper["year"]) == ("on-nothing", "On Nothing", 2020)
    assert paper["summary"] == "A test paper: it changes nothing."
    assert paper["about"] == "More about it."
    (part,) = paper["parts"]
    assert part["signature"] == "nothing_loss(input, target, *, epsilon=1.0)"
    assert (part["role"], part["options"]) == ("loss", {"on": "classes", "tune": {"epsilon": (1.0, 2.0)}})


def test_the_cache_follows_the_files(package):
    path = write(package, "on_nothing", "nothing_loss")
    catalogue.entries(package)
    path.write_text(path.read_text().replace("On Nothing", "On Nothing, Revised"))
    assert catalogue.entries(package)[0]["title"] == "On Nothing, Revised"
    path.unlink()
    assert catalogue.entries(package) == []


def test_a_torn_cache_is_read_over(package, tmp_path):
    write(package, "on_nothing", "nothing_loss")
    catalogue.entries(package)
    (cached,) = (tmp_path / "cache" / "lossary").glob("index-*.json")
    cached.write_text(cached.read_text()[:-40])
    assert len(catalogue.entries(package)) == 1


def test_an_index_that_ships_is_enough(package):
    write(package, "on_nothing", "nothing_loss")
    found = catalogue.entries(package)
    (package / "_index.json").write_text(json.dumps(found))
    shutil.rmtree(package / "losses")
    assert [paper["id"] for paper in catalogue.entries(package)] == ["on-nothing"]


def test_a_name_exported_twice_is_refused(package):
    write(package, "first", "nothing_loss")
    write(package, "second", "nothing_loss")
    with pytest.raises(CatalogueError, match="nothing_loss is exported by both first and second"):
        catalogue.entries(package)


def test_a_part_called_like_its_file_is_refused(package):
    write(package, "nothing_loss", "nothing_loss")
    with pytest.raises(CatalogueError, match=r"call the file nothing_loss_\.py"):
        catalogue.entries(package)
    (package / "losses" / "nothing_loss.py").rename(package / "losses" / "nothing_loss_.py")
    assert catalogue.entries(package)[0]["id"] == "nothing-loss"


def test_arguments_that_are_not_literals_are_refused(package):
    write(package, "on_nothing", "nothing_loss", helps='str("label-noise"),')
    with pytest.raises(CatalogueError, match="must be literals"):
        catalogue.entries(package)


def test_a_file_without_a_paper_is_refused(package):
    (package / "losses" / "stray.py").write_text('"""No paper."""\n')
    with pytest.raises(CatalogueError, match="no PAPER"):
        catalogue.entries(package)


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("polyloss", {"polyloss"}),
        ("group dro", {"group-dro"}),
        ("noisy labels", {"ldr-loss", "comp-sum-loss", "compress-feat-noisy-labels"}),
        ("spurious correlation", {"group-dro", "subsample-tail-geometry"}),
        ("strange inputs", {"mahalanobis-ood"}),
        ("overlapping boxes nms", {"soft-nms"}),
        ("sharpness", {"sam"}),
        ("wasted data", {"infobatch", "grand-el2n", "cluster-sensitivity-sampling"}),
        ("conformal", {"conformal-risk-control"}),
    ],
)
def test_search_finds_what_people_ask_for(query, first):
    hits = catalogue.search(query)
    assert hits
    assert hits[0]["id"] in first


def test_search_says_why_and_finds_nothing_for_nonsense():
    hit = catalogue.search("noisy labels, few positives")[0]
    assert {"label-noise", "class-imbalance"} & set(hit["why"])
    assert catalogue.search("zzyzx quux") == []


def test_the_fingerprint_sees_code_and_nothing_else():
    base = 'def f(x):\n    """Doc."""\n    return x + 1\n'
    same = '# comment\nPAPER = Paper(title="x", year=2020)\n\ndef f(x):\n    """Other words."""\n\n    return (x + 1)\n'
    assert catalogue.fingerprint(ast.parse(base)) == catalogue.fingerprint(ast.parse(same))
    for changed in (base.replace("+ 1", "+ 2"), base.replace("+ 1", "- 1"), base.replace("f(x)", "f(x, y)")):
        assert catalogue.fingerprint(ast.parse(base)) != catalogue.fingerprint(ast.parse(changed))


@pytest.mark.parametrize("room", sorted({paper["room"] for paper in catalogue.entries()}))
def test_a_rooms_page_names_what_there_is(room):
    rows = [line for line in catalogue.room_page(room).split("\n") if line.startswith("|")]
    assert len(rows) > 2
    code = "\n".join(path.read_text("utf-8") for path in (catalogue.PACKAGE / room).glob("[!_]*.py"))
    for name in {name for row in rows for name in re.findall(r"`(\w+)`", row)}:
        assert re.search(rf"\b(def|class) {name}\b|\b{name}: ", code), name  # a part, a method or an argument
