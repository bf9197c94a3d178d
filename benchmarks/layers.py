"""Softmax in two passes against torch.softmax, in single precision on one thread, results allocated anew by both.

The last row is their error, largest relative to double precision, in one row of ten million normal numbers times 3.
Needs `pip install lossary[fast]`.
"""

import statistics
import time
from collections.abc import Callable

import torch

from lossary.layers import two_pass_softmax

SHAPES = {(1, 10_000_000): 7, (1, 1_000_000): 31, (1000, 1000): 31}  # shape -> rounds
CACHE = 8_000_000  # elements in 32 MB, where the method has nothing to gain


def seconds(run: Callable[..., object], *arguments: object) -> float:
    start = time.thread_time()  # without the time for which a busy machine puts us aside
    run(*arguments)
    return time.thread_time() - start


def error(got: torch.Tensor, x: torch.Tensor) -> float:
    """Largest relative error."""
    return float((got.double() / torch.softmax(x.double(), -1) - 1).abs().max())


def measure() -> list[dict[str, str | float | None]]:
    """How many times faster than torch.softmax, medians over rounds in which both take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    rows: list[dict[str, str | float | None]] = []
    for shape, rounds in SHAPES.items():
        x = 3 * torch.randn(shape, generator=g)
        two_pass_softmax(x)  # compiles
        times = [(seconds(torch.softmax, x, -1), seconds(two_pass_softmax, x)) for _ in range(rounds)]
        theirs, ours = (statistics.median(t) for t in zip(*times))
        name, target = f"{shape[0]:,} x {shape[1]:,}", ">= 1" if shape[1] > CACHE else None
        rows.append({"name": name, "ratio": theirs / ours, "target": target, "unit": "times faster"})
    x = 3 * torch.randn(1, 10_000_000, generator=g)
    ratio = error(torch.softmax(x, -1), x) / error(two_pass_softmax(x), x)
    rows.append({"name": "1 x 10,000,000, error", "ratio": ratio, "target": ">= 1000", "unit": "times smaller"})
    torch.set_num_threads(threads)
    return rows
