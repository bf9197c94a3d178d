"""torch's own losses in the room's convention: one value per sample, classes last, labels summed."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def each(call: Callable[..., Tensor], *inputs: Tensor, **hyper: Any) -> Tensor:
    """A loss as it comes, not reduced."""
    return call(*inputs, reduction="none", **hyper)


def rows(call: Callable[..., Tensor], input: Tensor, target: Tensor, **hyper: Any) -> Tensor:
    """A loss of rows of logits, with any dimensions before the classes; targets are class numbers or probabilities."""
    flat = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
    return call(input.flatten(0, -2), flat, reduction="none", **hyper).view(input.shape[:-1])


def bce(input: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of logits, summed over labels."""
    return F.binary_cross_entropy_with_logits(input, target, reduction="none").sum(-1)


def weighted_bce(input: Tensor, target: Tensor, *, pos_weight: Tensor) -> Tensor:
    """The same, positives weighted: () or (labels,)."""
    return F.binary_cross_entropy_with_logits(input, target, pos_weight=pos_weight, reduction="none").sum(-1)


def smoothed_cross_entropy(input: Tensor, target: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with a share of the label spread over all classes."""
    return rows(F.cross_entropy, input, target, label_smoothing=label_smoothing)


def box_smooth_l1(input: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    """Smooth L1, summed over the coordinates of a box."""
    return F.smooth_l1_loss(input, target, reduction="none", beta=beta).sum(-1)
