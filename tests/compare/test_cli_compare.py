"""`lossary compare` as a person types it: what it prints, and that bad input costs one line and touches nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossary import cli
from lossary.compare import run
from lossary.compare.cells import Protocol
from tests.compare.test_report import sample
from tests.compare.test_run import committed

TINY = Protocol(partitions=1, folds=2, confirm_seeds=2, settings=1, tune_splits=2, tune_seeds=1, steps=5)
BASE = {"a": np.arange(80) % 7, "b": np.sin(np.arange(80)).round(3), "y": np.where(np.arange(80) % 7 > 3, "up", "down")}


@pytest.fixture
def lossary(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder, with a tiny protocol: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "Protocol", lambda: TINY)
    pd.DataFrame(BASE).to_csv("good.csv", index=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lossary", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call


def written(text: str | bytes, name: str = "bad.csv") -> None:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def frame(**columns: object) -> str:
    return pd.DataFrame({**BASE, **columns}).to_csv(index=False)


FILES = {
    "no such file": None,
    "empty": "",
    "a header alone": "a,b,y\n",
    "few rows": frame().partition("\n")[0] + "\n1,2,up\n2,3,down\n",
    "constant target": frame(y="up"),
    "missing target": frame(y=[None] * 80),
    "all-missing column": frame(gone=[None] * 80),
    "not UTF-8": frame().replace("up", "\xfcp").encode("latin1"),
    "ragged": frame() + "1,2,up,4\n",
    "duplicate columns": frame().replace("a,b,y", "a,a,y"),
    "infinite": frame(b=[np.inf] + [0.5] * 39 + [0.2] * 40),
    "class of one": frame(y=["lone"] + ["up", "down"] * 39 + ["up"]),
    "binary": b"\x00\x01\x02" * 100,
}


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2, err
    assert out == ""
    assert err.startswith("lossary: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", FILES)
def test_bad_files(lossary, name):
    if FILES[name] is not None:
        written(FILES[name])
    before = sorted(os.listdir())
    said = one_line(*lossary("compare", "bad.csv", "--target", "y"))
    assert "bad.csv" in said or "'y'" in said or "'gone'" in said or "'b'" in said
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "z"], "'z'"),
        (["--target", "y", "--drop", "nothing"], "nothing"),
        (["--target", "y", "--group", "nothing"], "nothing"),
        ([], "--target"),
        (["--target", "y", "--task", "ranking"], "task"),
        (["--target", "y", "--task", "real"], "--task classes"),
        (["--target", "y", "--arms", "poly1_cross_entropi"], "did you mean poly1_cross_entropy"),
        (["--target", "y", "--arms", "GroupDRO"], "num_groups"),
        (["--target", "y", "--baseline", "foo"], "no conventional arm 'foo'; choose one of"),
        (["--target", "y", "--predictions", "none.csv"], "--predictions"),
        (["--target", "y", "--metric", "beauty"], "choose one of accuracy"),
        (["--target", "y", "--metric", "rmse"], "not for a target of classes"),
        (["--target", "y", "--seeds", "-3"], "--seeds"),
        (["--target", "y", "--seeds", "0"], "--seeds"),
        (["--target", "y", "--budget", "soon"], "--budget"),
        (["--target", "y", "--budget", "-5m"], "--budget"),
        (["--target", "y", "--out", "good.csv"], "is a file"),
        (["--target", "y", "--out", "good.csv/sub"], "is a file"),
        (["--target", "y", "--out", "/proc/lossary"], "--out"),
        (["--target", "y", "--out", "."], "holds other files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(lossary, arguments, words):
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert words in one_line(*lossary("compare", "good.csv", *arguments))
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


@pytest.mark.parametrize("arguments", [["--baseline", "foo"], ["--id", "a", "--predictions", "good.csv"]])
def test_what_needs_no_profile_is_refused_before_it(lossary, monkeypatch, arguments):
    monkeypatch.setattr(run, "profile", lambda *_, **__: pytest.fail("profiled first"))
    frame = pd.DataFrame(BASE).assign(a=np.arange(80))
    frame.to_csv("good.csv", index=False)
    assert arguments[-2] in one_line(*lossary("compare", "good.csv", "--target", "y", *arguments))


def test_an_arm_of_several_lines_reads_like_no_other():
    assert cli._in_lines("sam: SAM", 30) == "sam: SAM"
    name = "class-prior-matching: ClassPriorMatching on boosting + sam: SAM"
    assert cli._in_lines(name, 30).split("\n") == [
        "class-prior-matching:",
        "    ClassPriorMatching on",
        "    boosting",
        "  + sam: SAM",
    ]
    assert all(len(line) <= 16 for line in cli._in_lines(name, 16).split("\n"))


@pytest.mark.parametrize("width", [70, 80, 120])
def test_the_table_fits_the_terminal(capsys, monkeypatch, width):
    """Every arm starts a line of its own, the others are indented; time and the detectable lead are there."""
    monkeypatch.setenv("COLUMNS", str(width))
    cli._print_comparison(sample(), Path("out"))
    lines = capsys.readouterr().out.split("\n")
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("arm ")) + 1 :]
    table = table[: next(i for i, line in enumerate(table) if line.startswith("Exploratory"))]
    starts = [line.split()[0] for line in table if not line.startswith(" ")]
    assert starts == [arm.name.split()[0] for arm in sample().arms]
    assert all(len(line) <= width for line in table)
    assert "…" not in "".join(table)
    assert any(line.startswith("  + sam: SAM ") for line in table)
    assert [line.split()[-2:] for line in table if line.startswith("logistic regression")] == [["0.03", "s"]]
    said = " ".join(" ".join(lines).split())
    assert "The smallest detectable lead over gradient boosting on these 1,368 rows is 1.8 points (2.8 standard" in said


def test_prints_a_table_and_the_answer(lossary):
    code, out, _ = lossary("compare", "good.csv", "--target", "y", "--arms", "sam,linear,network")
    assert code == 0
    for words in (
        "sam: SAM",
        "linear model",
        "baseline",
        "Exploratory",
        "60 rows searched",
        "lossary-out/good/report.html",
    ):
        assert words in " ".join(out.split()), words
    assert {"report.html", "result.json", "winner.py", "cells.sqlite"} <= set(os.listdir("lossary-out/good"))


def test_json_is_all_that_is_printed(lossary):
    code, out, _ = lossary("compare", "good.csv", "--target", "y", "--arms", "sam,linear", "--json", "--out", "new")
    found = json.loads(out)
    assert code == 0
    assert {arm["name"] for arm in found["arms"]} == {"sam: SAM", "linear model"}
    for arm in found["arms"]:
        assert {"name", "difference", "interval"} <= set(arm)
    assert found["command"] == "lossary compare good.csv --target y --arms sam,linear --out new"
    assert json.loads(Path("new/result.json").read_text("utf-8")) == found


def test_estimate_tells_and_stops(lossary):
    code, out, _ = lossary("compare", "good.csv", "--target", "y", "--arms", "sam,linear", "--estimate")
    assert code == 0
    assert out.startswith("About ")
    assert not Path("lossary-out/good/report.html").exists()
    code, out, _ = lossary("compare", "good.csv", "--target", "y", "--arms", "sam,linear", "--estimate", "--json")
    assert json.loads(out)["arms"] == ["linear model", "sam: SAM"]


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), (" 2h ", 7200)])
def test_budgets(text, seconds):
    assert cli._seconds(text) == seconds


def test_interrupted_it_says_how_to_go_on(tmp_path):
    pd.DataFrame(BASE).to_csv(tmp_path / "good.csv", index=False)
    command = [sys.executable, "-m", "lossary", "compare", "good.csv", "--target", "y"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store, until = tmp_path / "lossary-out" / "good" / "cells.sqlite", time.monotonic() + 120
    while not committed(store) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 130, err
    assert out == ""
    assert "the same command goes on from what is in lossary-out/good" in err
    assert "Traceback" not in err
    assert committed(store)
