"""A run that is killed again and again ends like one that is left alone; memory does not grow with the cells."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossary.compare import compare
from tests.compare.test_run import ARMS, PROGRAM, TINY, committed, found, table, without_times  # noqa: F401 (fixtures)

# What is told after each job goes to a file: a job done twice would be told twice.
TELLING = PROGRAM.replace(
    "workers=2)", "workers=2, progress=lambda *told: print(*told, file=open(out + '.told', 'a'), flush=True))"
)


def program(folder: Path, protocol: Mapping[str, object], text: str = TELLING) -> Path:
    path = folder / "program.py"
    path.write_text(text.replace("{protocol}", repr(dict(protocol))))
    return path


def alive(session: int) -> list[str]:
    """Processes of a session that still run."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state != "Z":
            running.append(stat.parent.name)
    return running


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a busy machine
def test_killed_at_random_moments_it_ends_like_a_run_left_alone(found, table, tmp_path):  # noqa: F811
    rng, out, kept = np.random.default_rng(0), tmp_path / "out", {}
    command = [sys.executable, program(tmp_path, vars(TINY)), table, out, ",".join(ARMS)]
    kills = 3
    for _ in range(kills):
        running = subprocess.Popen(command, start_new_session=True)
        more, until = int(rng.integers(1, 9)), time.monotonic() + 250
        try:
            while len(committed(out / "cells.sqlite")) < len(kept) + more and time.monotonic() < until:
                assert running.poll() is None, "ended before it could be killed"
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        finally:
            running.send_signal(signal.SIGKILL)
            running.wait()
        now = committed(out / "cells.sqlite")
        assert len(now) >= len(kept) + more
        assert {key: now[key] for key in kept} == kept
        kept = now
        while alive(running.pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(running.pid), "its workers outlive it"
    # The profile tells of its own steps; between the commit of a job and the word of it a kill may fall.
    arms = {arm.name for arm in found.arms}
    told = sum(line.split(" ", 2)[2] in arms for line in Path(f"{out}.told").read_text().splitlines())
    assert len(kept) - kills <= told <= len(kept)

    rest: list[str] = []
    finished = compare(
        table, target="y", arms=ARMS, seeds=2, protocol=TINY, out=out, workers=0, progress=lambda *s: rest.append(s[2])
    )
    last = committed(out / "cells.sqlite")
    assert {key: last[key] for key in kept} == kept
    assert sum(name in arms for name in rest) == len(last) - len(kept)
    assert without_times(finished) == without_times(found)


def peak(command: list[object]) -> float:
    """MB that a program, or any process that it waited for, held at most."""
    running = subprocess.Popen([str(word) for word in command])
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0
    assert isinstance(used, resource.struct_rusage)
    return used.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(tmp_path):
    """A fold is 5 MB when encoded: twenty more of them that stayed would be 100 MB."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(8000, 160)).round(3)).add_prefix("c").assign(y=rng.integers(2, size=8000))
    frame.to_parquet(tmp_path / "data.parquet")
    few = vars(TINY) | {"folds": 5, "partitions": 2, "steps": 5, "settings": 1, "tune_splits": 1}
    peaks = []
    for partitions in (2, 6):
        file = program(tmp_path, few | {"partitions": partitions}, PROGRAM.replace("workers=2", "workers=0"))
        peaks.append(peak([sys.executable, file, tmp_path / "data.parquet", tmp_path / str(partitions), "network,sam"]))
        assert len(committed(tmp_path / str(partitions) / "cells.sqlite")) == 2 + 2 * 5 * partitions + 2
    assert peaks[1] <= 1.05 * peaks[0], peaks
