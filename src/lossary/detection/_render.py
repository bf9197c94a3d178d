"""Outlines to pixels."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def polygon_mask(polygons: Float[Tensor, "n p 2"], height: int, width: int) -> Bool[Tensor, "n height width"]:
    """Which pixels' centres, at whole numbers, lie inside: where the outline winds around them.

    A centre on the outline is inside on the left and at the top and outside on the right and at the bottom, so polygons
    that share an edge share no pixel. Without gradients; a polygon with a coordinate that is not finite is empty.

    Args:
        polygons: corners x, y in pixels, either way round; repeat the last corner to fill a row.
        height: of the image.
        width: of the image.
    """
    x, y = polygons.detach().double().unbind(-1)
    sound = (x.isfinite() & y.isfinite()).all(1)[:, None, None]
    x_next, y_next = x.roll(-1, 1), y.roll(-1, 1)
    rows = torch.arange(height, device=x.device, dtype=x.dtype)
    # Edges crossed by the line through each row's centres, and where: what lies to the right has one turn more or less.
    turn = (y_next[..., None] > rows).to(torch.int8) - (y[..., None] > rows).to(torch.int8)
    slope = (x_next - x) / torch.where(y_next == y, 1.0, y_next - y)
    cross = x[..., None] + (rows - y[..., None]) * slope[..., None]
    column = cross.nan_to_num(nan=width).ceil().clamp(0, width).long()
    turns = torch.zeros(len(x), height, width + 1, dtype=torch.int8, device=x.device)
    turns.scatter_add_(2, column.mT, turn.mT)
    return (turns.cumsum(2, dtype=torch.int8)[..., :width] != 0) & sound
