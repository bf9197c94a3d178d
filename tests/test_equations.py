"""Every paper's page has one formula, and KaTeX can set it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lossary import catalogue

KATEX = catalogue.PACKAGE / "site" / "static" / "vendor" / "katex" / "katex.min.js"
EQUATIONS = {paper["id"]: paper["equation"] for paper in catalogue.entries()}
SET_ALL = """
const katex = require(process.argv[1])
const refused = {}
for (const [id, tex] of Object.entries(JSON.parse(require("fs").readFileSync(0, "utf8")))) {
    try {
        katex.renderToString(tex, { displayMode: true, throwOnError: true, strict: "error", trust: false })
    } catch (error) {
        refused[id] = error.message
    }
}
console.log(JSON.stringify(refused))
"""


def refused(katex: Path, equations: dict[str, str]) -> dict[str, str]:
    """What KaTeX says of the equations that it does not set, by id."""
    command = ["node", "-e", SET_ALL, str(katex)]
    done = subprocess.run(command, input=json.dumps(equations), capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("paper_id", EQUATIONS)
def test_every_paper_has_a_formula_in_plain_tex(paper_id):
    tex = EQUATIONS[paper_id]
    assert tex.strip() == tex != ""
    assert tex.isascii()
    assert tex.isprintable()
    assert not re.search(r"[$%]", tex), "math without dollar signs and comments"
    assert not re.sub(r"\\([A-Za-z]+|[\\,;:!{}| ])", "", tex).count("\\"), "commands are of letters, or a space"


@pytest.mark.parametrize("paper_id", EQUATIONS)
def test_braces_and_environments_are_closed(paper_id):
    tex = EQUATIONS[paper_id]
    depth = 0
    for brace in re.findall(r"[{}]", re.sub(r"\\[\\{}]", "", tex)):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    open_ones: list[str] = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", tex):
        if what == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert not open_ones
    assert len(re.findall(r"\\left(?![a-z])", tex)) == len(re.findall(r"\\right(?![a-z])", tex))


def test_katex_sets_them_all():
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not KATEX.exists():
        pytest.skip(f"{KATEX.relative_to(catalogue.PACKAGE)} is not there")
    assert refused(KATEX, EQUATIONS) == {}
    assert set(refused(KATEX, {"sound": r"\ell=1", "broken": r"\frac{1}", "unknown": r"\nosuch"})) == {
        "broken",
        "unknown",
    }
