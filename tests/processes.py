"""Work that two processes share, as under DistributedDataParallel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What work(rank), a function of a module, returns in each of two processes that gloo joins."""
    mp.start_processes(_one, (work, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _one(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = work(rank)
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")
