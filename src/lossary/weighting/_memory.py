"""What a weighting remembers of every sample, by the sample's position in the data.

The memory is a plain buffer of the part that owns it, with one row for each sample: it moves with the part, and its
state_dict resumes it. `record` writes what a batch has shown. Under `torch.distributed` every process records what all
of them have seen, so their memories stay alike, and like the one that a single process with all their samples has.
"""

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor


@torch.no_grad()
def record(memory: Tensor, index: Int[Tensor, " batch"], values: Tensor) -> None:
    """Write values (batch, ...) to the rows of `memory` (num_samples, ...) at these positions, from all processes.

    A sample that several processes show at once keeps one of its values.
    """
    memory.index_copy_(0, from_all(index), from_all(values.detach().to(memory.dtype)))


@torch.no_grad()
def from_all(tensor: Tensor) -> Tensor:
    """The tensors of all processes joined along the first dimension, in which they may differ; alone, its own."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, lengths[0].new_tensor([len(tensor)]))
    longest = int(torch.cat(lengths).max())
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths)])
