"""A real server with a tiny protocol, in a process of its own, and small data."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil

TINY = {
    "partitions": 2, "folds": 3, "seeds": 2, "confirm_seeds": 3, "settings": 1, "tune_splits": 1, "tune_seeds": 1,
    "steps": 15,
}  # fmt: skip
PROGRAM = """
import sys
from pathlib import Path
from lossary.site.runs import Limits
from lossary.site.serve import serve
serve(Path(sys.argv[1]), port=0, token={token!r}, limits=Limits(**{limits!r}), protocol={protocol!r})
"""
LONGEST = 400  # seconds that any run here may take on a busy machine


@dataclass
class Served:
    """A running server."""

    url: str
    folder: Path
    process: "subprocess.Popen[str]"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"origin": self.url}, timeout=30)


@contextmanager
def served(
    folder: Path, *, token: str | None = None, protocol: dict | None = None, **limits: float
) -> Iterator[Served]:
    """Serves from the folder until the block is left; a server that is still there is then interrupted."""
    program = PROGRAM.format(token=token, limits=limits, protocol=protocol or TINY)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said = process.stdout.readline()
        assert "http://" in said, said
        yield Served(said.split()[3].partition("/?")[0].rstrip("/"), folder, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.stdout.close()


def table(rows: int = 240, *, first: str = "a", word: str = "x") -> str:
    """CSV of classes that two of the columns tell; `first` is the name of a column, `word` one of its values."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(rows, 3)).round(4), columns=[first, "b", "c"])
    frame["kind"] = rng.choice([word, "other"], rows)
    frame["y"] = np.where(frame[first] - frame.b + 0.5 * rng.normal(size=rows) > 0, "yes", "no")
    return frame.to_csv(index=False)


def upload(client: httpx.Client, name: str, content: bytes | str) -> str:
    """The address of the run that profiles the file."""
    answer = client.post("/compare", files={"file": (name, content)})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def wait(client: httpx.Client, run: str, *states: str, seconds: float = LONGEST) -> str:
    """Waits until the run is in one of the states, done unless told; what its page then shows."""
    states, until = states or ("done",), time.monotonic() + seconds
    while (status := client.get(f"{run}/live").headers["run-status"]) not in states:
        assert status in ("queued", "running"), client.get(run).text
        assert time.monotonic() < until, f"{run} is still {status}\n{client.get(run).text}"
        time.sleep(0.2)
    return client.get(run).text


def workers(folder: Path) -> list[psutil.Process]:
    """Processes that work in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder / "runs"):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def gone(folder: Path, seconds: float = 10) -> bool:
    """Whether no process works in the folder, within a while."""
    until = time.monotonic() + seconds
    while workers(folder):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
