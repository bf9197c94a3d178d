"""What heads and losses on boxes x1, y1, x2, y2 share: decoding, where a box is for a network, how far off one is."""

import math

import torch
from torch import Tensor


def around(points: Tensor, sides: Tensor) -> Tensor:
    """Boxes (*batch, A, 4) from points (A, 2) and distances (*batch, A, 4) to the left, top, right and bottom side."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)


def corners(boxes: Tensor) -> Tensor:
    """Boxes x1, y1, x2, y2 of centres and sizes cx, cy, w, h: (..., 4)."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([centre - half, centre + half], -1)


def sine_position(values: Tensor, width: int, *, temperature: float = 10_000.0) -> Tensor:
    """Sines and cosines of numbers (..., D) in 0 to 1: (..., D * width), `width` for each number, as DETR has it.

    Number v gives sin and cos of 2 pi v / temperature^(2 i / width), i = 0 to width / 2 - 1; width is even.
    """
    power = torch.arange(width // 2, dtype=values.dtype, device=values.device) * (2 / width)
    angle = 2 * math.pi * values.unsqueeze(-1) / temperature**power
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def box_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes, (..., 4) with (..., 4), broadcast; -1 to 1, with gradients.

    The intersection over union, less the share of the smallest box around both that neither covers. Of two boxes
    without any extent it is 0.
    """
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    common, hull = _area(inner), _area(outer)
    union = sum(_area((box[..., 2:] - box[..., :2]).clamp(min=0)) for box in (a, b)) - common
    iou, cover = (part / whole.masked_fill(whole == 0, 1.0) for part, whole in ((common, union), (union, hull)))
    return iou + cover - (hull > 0).to(iou)


def _area(side: Tensor) -> Tensor:
    return side[..., 0] * side[..., 1]
