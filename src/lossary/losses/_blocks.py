"""Blocks of samples that stay in a CPU's cache while they are worked on, in place."""

from collections.abc import Iterator

from torch import Tensor

CELLS = 2**18  # numbers of a block


def at_once(rows: Tensor, cells: int = CELLS) -> int:
    """How many samples of (N, classes) make a block of so many numbers; all of them on a GPU."""
    return max(1, len(rows) if rows.is_cuda else cells // max(1, rows.shape[-1]))


def blocks(rows: Tensor, cells: int = CELLS) -> Iterator[slice]:
    """The samples, block by block."""
    size = at_once(rows, cells)
    return (slice(start, start + size) for start in range(0, len(rows), size))
