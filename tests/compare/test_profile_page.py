"""The profile as people see it: its page, its pictures, its record, and `lossary profile` as one types it."""

import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossary import cli
from lossary.compare import profile_page
from lossary.compare.problem import Problem
from lossary.compare.profile import Finding, Profile
from lossary.errors import BadInput
from tests.compare.test_cli_compare import BASE, one_line

HOSTILE = "<script>alert(1)</script>"
PICTURES = {
    "counts": {"names": ["often", HOSTILE], "values": [900, 30]},
    "reliability": {
        "lines": {
            "logistic regression": [{"predicted": 0.5, "observed": 0.45}, {"predicted": 0.9, "observed": 0.8}],
            "randomised trees": [{"predicted": 0.4, "observed": 0.6}, {"predicted": 0.8, "observed": 0.95}],
        }
    },
    "intervals": {
        "names": ["of row 3", "of row 1"], "values": [0.2, -0.1], "lows": [0.1, -0.2], "highs": [0.3, 0.0], "x": "more",
    },
    "limits": {"names": ["age", HOSTILE], "values": [0.4, 0.05], "limits": [0.1, 0.1], "x": "distance"},
    "histogram": {
        "edges": [-1.0, 0.0, 1.0, 6.0], "counts": [40, 50, 2], "law": [45.0, 45.0, 1.0], "cut": 1.0, "x": "distance",
    },
    "quantiles": {"points": [[-2.0, -1.5], [0.0, 0.1], [2.0, 4.0]], "x": "normal", "y": "observed"},
    "curve": {"points": [[0.1, 0.4, 0.3, 0.5], [1.0, 0.2, 0.2, 0.2]], "x": "share of the rows", "y": "share wrong"},
}  # fmt: skip


def finding(kind, **more):
    given = {
        "symptom": "class-imbalance", "title": f"A finding in {kind}", "value": 0.2, "low": 0.1, "high": 0.3,
        "unit": "share of rows", "method": "Counted", "means": f"What {kind} means.", "raised": False, "p": 0.4,
        "p_holm": 1.0, "picture": {"kind": kind, **PICTURES[kind]},
    }  # fmt: skip
    return Finding(**{**given, **more})


@pytest.fixture
def problem():
    features = pd.DataFrame({"age": np.arange(60.0)})
    return Problem(
        HOSTILE,
        "good.csv",
        features,
        np.arange(60) % 2,
        HOSTILE,
        "classes",
        ("up", HOSTILE),
        notes=(HOSTILE, "A note."),
    )


@pytest.fixture
def found():
    findings = [finding(kind) for kind in PICTURES]
    findings[2] = replace(findings[2], raised=True, p_holm=0.0012)
    findings.append(finding("curve", title="Rows to spare", p=None, p_holm=None, picture={}, high=float("inf")))
    return Profile(45, 3, 2, (30, 15), None, 0.1, tuple(findings), ("Something was not measured.",))


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.open, self.labels = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.labels += [value for name, value in attributes if name == "aria-label"]

    def handle_data(self, text):
        self.words.append(text)


class TestPage:
    def test_everything_is_on_it_and_nothing_harms_it(self, problem, found):
        page = profile_page.html(problem, found)
        parsed = Parsed(page)
        text = " ".join(" ".join(parsed.words).split())
        assert "script" not in parsed.tags
        assert not re.search(r'(?:src|href)="(?!#)', page)  # self-contained
        assert parsed.tags.count("svg") == len(PICTURES)
        for each in found.findings:
            assert each.title in text
            assert each.means in text
        for words in (
            "Found: a finding in intervals.",
            "45 of 60 rows",
            "A note.",
            "Something was not measured.",
            "0.0012",
        ):
            assert words in text
        assert text.index("A finding in intervals found") < text.index("A finding in counts")  # alarms first
        assert f"Rows: often 900; {HOSTILE} 30." in " ".join(parsed.labels)

    def test_sentence(self, found):
        assert profile_page.sentence(replace(found, findings=())) == "Nothing that was measured is an alarm."
        three = [replace(each, raised=True) for each in found.findings[:3]]
        said = profile_page.sentence(replace(found, findings=tuple(three)))
        assert said == "Found: a finding in counts, a finding in reliability and a finding in intervals."

    def test_record_is_strict_json(self, problem, found):
        record = json.loads(profile_page.to_json(problem, found), parse_constant=pytest.fail)
        assert record["data"]["rows"] == 60
        assert record["notes"] == [HOSTILE, "A note.", "Something was not measured."]
        assert record["num_samples"] == 45
        assert record["findings"][2]["raised"]
        assert record["findings"][0]["picture"]["values"] == [900, 30]
        assert record["findings"][-1]["high"] is None

    def test_pictures(self, found):
        drawn = profile_page.pictures(found, width=300)
        assert set(drawn) == {f"a-finding-in-{kind}" for kind in PICTURES}
        for chart in drawn.values():
            assert chart.to_dict()["width"] == 300

    def test_what_is_drawn(self, found):
        """Every number of a picture is in its chart."""
        for kind, drawn in zip(PICTURES, profile_page.pictures(found).values(), strict=True):
            data = json.dumps(drawn.to_dict())
            numbers = {
                "counts": (900, 30), "reliability": (0.45, 0.95), "intervals": (0.2, -0.2), "limits": (0.4, 0.05),
                "histogram": (50, 45.0), "quantiles": (4.0, 0.1), "curve": (0.4, 0.5),
            }[kind]  # fmt: skip
            for number in numbers:
                assert re.search(rf"[ :]{re.escape(str(number))}[,}}]", data), (kind, number)

    def test_writes_its_files(self, problem, found, tmp_path):
        files = profile_page.write(problem, found, tmp_path / "new" / "folder")
        assert files["page"].read_text("utf-8").startswith("<!doctype html>")
        assert json.loads(files["record"].read_text("utf-8"))["num_features"] == 3
        for kind in PICTURES:
            assert files[f"a-finding-in-{kind}"].read_bytes().startswith(b"\x89PNG")

    def test_a_folder_that_cannot_be(self, problem, found, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="--out: cannot write to"):
            profile_page.write(problem, found, tmp_path / "file")


@pytest.fixture
def lossary(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(BASE).to_csv("good.csv", index=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lossary", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


class TestCommand:
    def test_prints_a_table(self, lossary):
        code, out, err = lossary("profile", "good.csv", "--target", "y")
        text = " ".join(out.split())
        assert (code, err) == (0, "")
        for words in ("60 of 80 rows looked at", "Class imbalance", "Label disagreement", "Strange rows", "p by Holm"):
            assert words in text
        assert os.listdir() == ["good.csv"]

    def test_json_is_all_that_is_printed(self, lossary):
        code, out, _ = lossary("profile", "good.csv", "--target", "b", "--json", "--out", "new")
        assert code == 0
        record = json.loads(out)
        assert record["data"]["task"] == "real"
        assert {each["title"] for each in record["findings"]} >= {"Uneven errors", "Heavy tails of the errors"}
        assert json.loads(Path("new/profile.json").read_text("utf-8")) == record
        assert {"profile.html", "profile.json", "charts"} == set(os.listdir("new"))
        pictures = {f"{each['title'].lower().replace(' ', '-')}.png" for each in record["findings"] if each["picture"]}
        assert set(os.listdir("new/charts")) == pictures

    def test_again_into_the_same_folder(self, lossary):
        for _ in range(2):
            assert lossary("profile", "good.csv", "--target", "y", "--out", "mine")[0] == 0

    def test_groups_times_and_test_files(self, lossary):
        rng = np.random.default_rng(0)
        rows = pd.DataFrame(rng.normal(size=(400, 3)), columns=["a", "b", "c"])
        rows = rows.assign(where=rng.choice(["n", "e", "s", "w"], 400), when=np.arange(400))
        rows["y"] = np.where(rows["a"] > 0, "up", "down")
        rows.to_csv("rows.csv", index=False)
        rows.assign(a=rows["a"] + 2).head(150).to_csv("later.csv", index=False)

        def titles(*options):
            record = json.loads(lossary("profile", "rows.csv", "--target", "y", "--json", *options)[1])
            return {each["title"]: each for each in record["findings"]}

        assert "Group gaps" in titles("--group", "where")
        assert not titles("--time", "when")["Shift between early rows and late rows"]["raised"]
        moved = titles("--test", "later.csv", "--drop", "when", "--drop", "where")[
            "Shift between search rows and test rows"
        ]
        assert moved["raised"]
        assert "'a'" in moved["means"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["nothing.csv", "--target", "y"], "nothing.csv"),
            (["good.csv", "--target", "z"], "'z'"),
            (["good.csv"], "--target"),
            (["good.csv", "--target", "y", "--task", "ranking"], "ranking"),
            (["good.csv", "--target", "y", "--group", "nothing"], "nothing"),
            (["good.csv", "--target", "y", "--time", "nothing"], "nothing"),
            (["good.csv", "--target", "y", "--test", "nothing.csv"], "nothing.csv"),
            (["good.csv", "--target", "y", "--drop", "nothing"], "nothing"),
            (["good.csv", "--target", "y", "--out", "good.csv"], "is a file"),
            (["good.csv", "--target", "y", "--out", "."], "holds other files"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_bad_input_costs_one_line(self, lossary, arguments, words):
        before = {name: Path(name).read_bytes() for name in os.listdir()}
        assert words in one_line(*lossary("profile", *arguments))
        assert {name: Path(name).read_bytes() for name in os.listdir()} == before
