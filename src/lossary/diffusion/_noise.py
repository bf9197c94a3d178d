"""Random numbers, drawn where their generator is and brought to where they are wanted."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Randomness = Generator | Sequence[Generator] | None


def noise(like: Tensor | Sequence[int], generator: Randomness, *, kind: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Standard normal (or other) numbers shaped like a tensor; a sequence of generators has one for each replica.

    They are drawn where the generator is, and brought to where the tensor is.
    """
    tensor = like if isinstance(like, Tensor) else torch.empty(tuple(like))
    if isinstance(generator, Sequence):
        return torch.stack([noise(part, g, kind=kind) for part, g in zip(tensor, generator, strict=True)])
    device = tensor.device if generator is None else generator.device
    return kind(tensor.shape, generator=generator, dtype=tensor.dtype, device=device).to(tensor.device)
