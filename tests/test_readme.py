"""What the README shows works as shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "line", [line for block in blocks("") for line in block.splitlines() if "lossary f" in line or "lossary s" in line]
)
def test_the_commands_run(line):
    done = subprocess.run([sys.executable, "-m", *shlex.split(line, comments=True)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "poly" in done.stdout.lower()


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
