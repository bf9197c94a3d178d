"""A new paper is its part, claim and reference test (and later a verdict); nothing else is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lossary
from lossary import scaffold
from lossary.errors import BadInput

SOURCE = Path(lossary.__file__).parent

PART = '''"""Half cross-entropy: cross-entropy, halved, for the test of how a paper joins the house.

It never helps.
"""

from jaxtyping import Float, Int
from torch import Tensor

from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(title="Half the Truth", year=2031, helps=("label-noise",))


@loss(on="classes")
def half_cross_entropy(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """-log p_y / 2, per sample, from logits `input` and class numbers `target`.

    >>> import torch
    >>> half_cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.3466])
    """
    return -log_prob(input, target) / 2
'''

CLAIM = '''"""Half the truth: is half of cross-entropy half of it?"""

import torch

from lossary.claims import Arms, Seeds, claim
from lossary.losses import half_cross_entropy


@claim(says="Twice the half is the whole", kind="exact", metric="deviation", scale="two classes", tolerance=1e-6)
def twice_the_half(seeds: Seeds) -> Arms:
    return Arms(2 * half_cross_entropy(torch.zeros(1, 2), torch.tensor([0])) - torch.tensor(2.0).log())
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source with one more paper in it."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(SOURCE, root / "src" / "lossary", ignore=shutil.ignore_patterns("__pycache__"))
    package = root / "src" / "lossary"
    (package / "losses" / "half_truth.py").write_text(PART)
    (package / "claims" / "losses" / "half_truth.py").write_text(CLAIM)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "XDG_CACHE_HOME": str(root / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=root, env=environment, timeout=120
    )  # fmt: skip


def test_it_is_found(tree):
    hits = json.loads(run(tree, "-m", "lossary", "find", "half the truth", "--json").stdout)
    assert hits[0]["id"] == "half-truth"
    assert hits[0]["part"] == "half_cross_entropy"


def test_it_is_shown(tree):
    shown = json.loads(run(tree, "-m", "lossary", "show", "half-truth", "--json").stdout)
    assert shown["summary"].startswith("Half cross-entropy")
    assert shown["claims"][0]["name"] == "twice_the_half"


def test_it_can_be_imported_from_its_room(tree):
    done = run(tree, "-c", "from lossary.losses import half_cross_entropy; print(half_cross_entropy.__module__)")
    assert done.stdout.strip() == "lossary.losses.half_truth"


def test_it_passes_its_battery(tree):
    done = run(tree, "-m", "lossary", "check", "lossary.losses:half_cross_entropy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_claim_runs_and_is_recorded(tree):
    done = run(tree, "-m", "lossary", "claim", "half-truth", "--record", "--json")
    assert json.loads(done.stdout)[0]["outcome"] == "holds", done.stderr
    recorded = json.loads((tree / "src/lossary/verdicts/losses/half-truth.json").read_text())
    assert [r["claim"] for r in recorded["runs"]] == ["twice_the_half"]
    shown = json.loads(run(tree, "-m", "lossary", "show", "half-truth", "--json").stdout)
    assert shown["verdict"]["twice_the_half"]["outcome"] == "holds"


def test_every_run_is_appended(tree):
    run(tree, "-m", "lossary", "claim", "half-truth", "--record")
    before = json.loads((tree / "src/lossary/verdicts/losses/half-truth.json").read_text())["runs"]
    run(tree, "-m", "lossary", "claim", "half-truth", "--record")
    after = json.loads((tree / "src/lossary/verdicts/losses/half-truth.json").read_text())["runs"]
    assert after[:-1] == before


def test_stubs_of_a_new_paper_pass_lint(tmp_path):
    written = scaffold.write("losses", "new-idea", tmp_path / "pkg", tmp_path / "references")
    assert len(written) == 4  # the room's own page too, as this package has no rooms yet
    config = SOURCE.parents[1] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(config), *map(str, written)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("room", "id"), [("attic", "new-idea"), ("losses", "New_Idea"), ("losses", "polyloss")])
def test_a_bad_room_or_id_is_refused(room, id):
    with pytest.raises(BadInput):
        scaffold.write(room, id)
