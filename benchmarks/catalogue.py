"""`lossary find "noisy labels" --json` as a cold process, ten times; the index cache is warm."""

import statistics
import subprocess
import sys
import time


def measure() -> list[dict]:
    command = [sys.executable, "-m", "lossary", "find", "noisy labels", "--json"]
    subprocess.run(command, capture_output=True, check=True)  # fills the cache
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return [{"name": "find, median of ten", "ratio": statistics.median(seconds), "target": "<= 0.4", "unit": "s"}]
