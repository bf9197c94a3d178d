"""Fetches from npm, when the site is built, what pages use of others: `python -m lossary.site.vendor`.

KaTeX goes to `static/vendor/katex`. `--axe FOLDER` fetches axe-core there instead, for the tests. Nothing is fetched
when a page is viewed; where KaTeX is missing, pages show the source of an equation.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

KATEX, AXE = "0.19.1", "4.14.1"
VENDOR = Path(__file__).parent / "static" / "vendor"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--axe", type=Path, metavar="FOLDER", help="only axe-core, into this folder")
    folder = parser.parse_args().axe
    try:
        if folder is None:
            print(katex(VENDOR / "katex"))
        else:
            print(axe(folder))
    except RuntimeError as error:
        sys.exit(f"vendor: {error}")


def katex(folder: Path) -> Path:
    """KaTeX's script, style sheet and fonts."""
    with tempfile.TemporaryDirectory() as place:
        dist = _package("katex", KATEX, Path(place)) / "dist"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "fonts").mkdir(parents=True)
        for name in ("katex.min.js", "katex.min.css"):
            shutil.copy(dist / name, folder)
        for font in dist.glob("fonts/*.woff2"):
            shutil.copy(font, folder / "fonts")
        shutil.copy(dist.parent / "LICENSE", folder)
    return folder


def axe(folder: Path) -> Path:
    """The script that finds faults of accessibility in a page."""
    with tempfile.TemporaryDirectory() as place:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(_package("axe-core", AXE, Path(place)) / "axe.min.js", folder))


def _package(name: str, version: str, place: Path) -> Path:
    """The unpacked package in a folder of `place`.

    Raises:
        RuntimeError: npm is missing, or has no such package for us.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            "npm is not installed; without it pages show equations as their source (apt-get install npm)"
        )
    command = [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"npm pack {name}@{version} failed: {reason}")
    with tarfile.open(next(place.glob("*.tgz"))) as archive:
        archive.extractall(place, filter="data")
    found = json.loads((place / "package" / "package.json").read_text("utf-8"))["version"]
    if found != version:
        raise RuntimeError(f"{name}: expected version {version}, got {found}")
    return place / "package"


if __name__ == "__main__":
    main()
