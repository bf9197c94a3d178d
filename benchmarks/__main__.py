"""`make bench`: every benchmark in one go, as ratios taken in the same run, and docs/performance.md from them.

A benchmark is a module here whose `measure()` gives rows with `name`, `ratio`, `target` (or None) and `unit`.
"""

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


def main() -> None:
    names = sys.argv[1:] or sorted(p.stem for p in HERE.glob("[!_]*.py"))
    sections = []
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.measure()
        table = "\n".join(f"| {r['name']} | {r['ratio']:.3g} | {_target(r)} | {r['unit']} |" for r in rows)
        sections.append(
            f"## {name}\n\n{(module.__doc__ or '').strip()}\n\n"
            f"| what | measured | target | unit |\n|---|---|---|---|\n{table}\n"
        )
        print(sections[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(_head() + "\n".join(sections), "utf-8")
        print(f"wrote {PAGE.relative_to(HERE.parent)}")


def _target(row: dict) -> str:
    return "" if row.get("target") is None else str(row["target"])


def _head() -> str:
    import torch

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    return (
        "# Performance\n\nWritten by `make bench`; do not edit. Ratios compare medians taken interleaved in one run on "
        f"one thread.\n\n{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"commit {commit.strip()}.\n\n"
    )


if __name__ == "__main__":
    main()
