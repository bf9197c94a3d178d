"""The commands as a person types them: what they print, and what they exit with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

STRANGER = '''
import torch
import torch.nn.functional as F

def my_loss(prediction, label, *, strength: float = 1.0):
    """Scaled cross-entropy of `prediction` and `label`, with a `strength`.

    >>> my_loss(torch.zeros(1, 2), torch.tensor([0])).shape
    torch.Size([1])
    """
    return strength * F.cross_entropy(prediction.movedim(-1, 1), label, reduction="none")

def mean_loss(input, target):
    return F.cross_entropy(input, target)
'''


def lossary(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lossary", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )  # fmt: skip


@pytest.mark.parametrize(
    "command", ["compare", "find", "show", "claim", "serve", "build-site", "digest", "check", "new", "audit"]
)
def test_every_command_helps_with_an_example(command):
    done = lossary(command, "--help")
    assert done.returncode == 0
    assert f"Example: lossary {command}" in done.stdout


def test_find_prints_what_machines_need():
    hits = json.loads(lossary("find", "class imbalance", "--json").stdout)
    assert {"id", "room", "role", "part", "title", "year", "summary", "verdict"} <= set(hits[0])


def test_find_without_a_match_says_so():
    done = lossary("find", "zzyzx")
    assert done.returncode == 0
    assert "Nothing matches" in done.stdout


def test_show_reads_like_a_page():
    text = lossary("show", "polyloss").stdout
    for wanted in ("PolyLoss: A Polynomial Expansion", "from lossary.losses import poly1_cross_entropy", "departs"):
        assert wanted in text


def test_show_of_a_room_has_the_evidence_beside_the_advice():
    text = lossary("show", "losses").stdout
    assert "rare classes" in text
    assert re.search(r"poly1_focal_loss \(\d/\d\)", " ".join(text.split()))
    assert "claims hold; at most" in text
    page = json.loads(lossary("show", "losses", "--json").stdout)
    assert page["room"] == "losses"
    assert {"polyloss", "sam"} & {paper["id"] for paper in page["papers"]} == {"polyloss"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "polylos"), "did you mean polyloss"),
        (("find", "x", "--room", "attic"), "--room: expected one of"),
        (("find", "x", "--role", "wizard"), "--role: expected one of"),
        (("claim",), "give one paper's id, or --all"),
        (("claim", "polyloss", "--name", "nope"), "is no claim of polyloss"),
        (("claim", "polyloss", "--smoke", "--record"), "no verdict to record"),
        (("check", "nowhere"), "expected MODULE:NAME"),
        (("check", "no.such.module:f"), "no module"),
        (("check", "lossary.losses:nope"), "has no 'nope'"),
        (("check", "json:dumps", "--role", "wizard"), "--role: expected one of"),
        (("new", "attic", "x"), "room: expected one of"),
        (("audit", "--room", "attic"), "--room: expected one of"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, words):
    done = lossary(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_strangers_loss_is_checked(tmp_path):
    (tmp_path / "mine.py").write_text(STRANGER)
    done = lossary("check", "mine:my_loss", "--json", cwd=tmp_path)
    results = {r["check"]: r for r in json.loads(done.stdout)}
    assert results["gradient"]["passed"]
    assert results["per_sample"]["passed"]
    assert not results["refuses_inputs"]["passed"]
    assert done.returncode == 1


def test_a_strangers_fault_is_told_in_plain_words(tmp_path):
    (tmp_path / "mine.py").write_text(STRANGER)
    done = lossary("check", "mine:mean_loss", cwd=tmp_path)
    assert done.returncode == 1
    assert "expected shape (6,), got ()" in done.stdout
