"""CenterNet3D: an object seen from above is the peak of a heatmap, and the boundary points vouch for its box.

Laser points lie on the outside of objects, so that centres are often empty. A second heatmap of the four corners makes
the network look at boundaries; when boxes are decoded, each is scored by its centre and by what the second heatmap says
where its own corners fall, so that the score tells how well the box sits. Peaks need no anchors and no suppression.
Try it for rotated boxes in a bird's-eye view, where objects do not overlap; of two centres in one cell only one is
found. Everything here counts in cells of the map, cell i reaching from i to i + 1.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="CenterNet3D: An Anchor Free Object Detector for Point Cloud",
    year=2020,
    helps=("odd-shapes", "inference-cost"),
    departs=(
        "the official code is followed: squared error of the heatmaps by default, and its keypoint-sensitive warping",
        "losses are means over an image, where the official code takes means over a batch",
        "all lengths count in cells of the map, where the official code has sizes and heights in metres",
        "true boxes centred outside of the map, and found ones that are not finite or without area, are left out",
        "corners are read in the very cell where they lie; the official code's sampling is up to half a cell off in"
        " today's PyTorch",
        "with several classes the corners of each have a heatmap, and its boxes are scored by that one",
    ),
    equation=r"s_i = c_i + \tfrac14 \sum_{k=1}^{4} q\bigl(\lfloor p_k(b_i) \rfloor\bigr)",
    url="https://arxiv.org/abs/2007.07214",
)


class CenterTargets(NamedTuple):
    """What a network should say about B images with up to T objects, from `gaussian_heatmap_targets`.

    Attributes:
        centers: (B, C, H, W), 1 at the cells of centres, Gaussian around them.
        corners: (B, C, H, W), the same of corners.
        cells: (B, T) int64, y W + x of the cell of each centre, 0 where there is none.
        regression: (B, T, 6 or 8) dx, dy from the cell's own corner, 0 to 1; width, height; sine, cosine; [z, depth].
        mask: (B, T) bool, which objects there are.

    >>> CenterTargets(*torch.zeros(5, 1)).mask
    tensor([0.])
    """

    centers: Tensor
    corners: Tensor
    cells: Tensor
    regression: Tensor
    mask: Tensor


class CenterBoxes(NamedTuple):
    """Objects found in an image, best first, from `decode_center_peaks`.

    Attributes:
        boxes: (K, 5 or 7) as `gaussian_heatmap_targets` takes them.
        scores: (K,).
        labels: (K,) int64.

    >>> CenterBoxes(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).scores
    tensor([])
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def gaussian_heatmap_targets(
    boxes: Float[Tensor, "n t columns"],
    mask: Bool[Tensor, "n t"],
    *,
    height: int,
    width: int,
    labels: Int[Tensor, "n t"] | None = None,
    classes: int = 1,
    min_overlap: float = 0.01,
) -> CenterTargets:
    """Heatmaps of centres and corners, and what to regress in the centres' cells.

    A Gaussian is exp(-(dx^2 + dy^2) / (2 sigma^2)) of whole cells dx and dy, at most r either way, and 0 beyond; where
    several meet, the largest counts. sigma = (2 r + 1) / 6, and r is the largest whole number by which corners of an
    upright box of this size may be off while it keeps an IoU of `min_overlap` with itself, be it shifted, shrunk or
    grown (CornerNet's rule).

    Args:
        boxes: true boxes cx, cy, width, height, angle in radians, the width running along (cos, sin) of the angle;
            with [z, depth] for solid ones, in any unit. Those that are not finite, without area or centred outside of
            the map are left out.
        mask: which of them there are.
        height: of the map.
        width: of the map.
        labels: class of each box, 0 to classes - 1 where there is one; None: all 0.
        classes: heatmaps of each kind.
        min_overlap: above 0 and below 1.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> box = torch.tensor([[[2.5, 1.2, 4.0, 2.0, 0.0]]])
    >>> targets = gaussian_heatmap_targets(box, torch.ones(1, 1, dtype=torch.bool), height=4, width=6)
    >>> targets.centers.flatten().argmax(), targets.regression
    (tensor(8), tensor([[[0.5000, 0.2000, 4.0000, 2.0000, 0.0000, 1.0000]]]))
    """
    require.floating("boxes", boxes, dims=3)
    if boxes.shape[2] not in (5, 7):
        raise ValueError(f"boxes: expected 5 or 7 columns, got shape {tuple(boxes.shape)}")
    if mask.dtype is not torch.bool or mask.shape != boxes.shape[:2]:
        raise ValueError(f"mask: expected bool {tuple(boxes.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    for name, value in (("height", height), ("width", width), ("classes", classes)):
        require.whole(name, value, at_least=1)
    require.number("min_overlap", min_overlap, above=0.0, below=1.0)
    if labels is not None:
        require.integers("labels", labels, shape=tuple(mask.shape))
    kinds = torch.zeros(mask.shape, dtype=torch.int64, device=boxes.device) if labels is None else labels

    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, sides = boxes[..., :2], boxes[..., 2:4]
    within = ((centre >= 0) & (centre < centre.new_tensor([width, height]))).all(-1)
    mask = mask & within & (sides > 0).all(-1) & boxes.isfinite().all(-1)
    boxes = boxes.masked_fill(~mask.unsqueeze(-1), 0.0)
    kinds = kinds.masked_fill(~mask, 0)
    radius = _radius(boxes[..., 2], boxes[..., 3], min_overlap).floor()

    cells = boxes[..., :2].floor()
    corners = _corners(boxes[..., :2], boxes[..., 2:4], boxes[..., 4]).floor()
    size = (classes, height, width)
    heat = _splat(cells, radius, mask, kinds, size=size)
    edge = _splat(corners.flatten(1, 2), *(each.repeat_interleave(4, 1) for each in (radius, mask, kinds)), size=size)
    angle = boxes[..., 4:5]
    regression = torch.cat([boxes[..., :2] - cells, boxes[..., 2:4], angle.sin(), angle.cos(), boxes[..., 5:]], -1)
    index = (cells[..., 1] * width + cells[..., 0]).long()
    return CenterTargets(heat, edge, index, regression.masked_fill(~mask.unsqueeze(-1), 0.0), mask)


def center_heatmap_loss(
    input: Float[Tensor, "n classes height width"],
    target: Float[Tensor, "n classes height width"],
    *,
    kind: Literal["square", "focal"] = "square",
) -> Float[Tensor, " n"]:
    """Error of a heatmap for each image, p = sigmoid(input): of centres, or of corners.

    "square" is the sum of (p - t)^2 over the sum of t, or over 1 where that is less. "focal" is the sum of
    -(1 - p)^2 log p where t = 1 and of -(1 - t)^4 p^2 log(1 - p) elsewhere, over the number of cells with t = 1, at
    least 1.

    Args:
        input: logits; the official code starts them at a bias of -7.94.
        target: `centers` or `corners` of `CenterTargets`, 0 to 1.
        kind: "square" as in the released configuration, or the coded alternative, CornerNet's.

    Raises:
        ValueError: shapes, dtypes or a kind that do not fit.

    >>> target = torch.tensor([[[[1.0, 0.6]]]])
    >>> center_heatmap_loss(torch.zeros(1, 1, 1, 2), target)  # (0.25 + 0.01) / 1.6
    tensor([0.1625])
    """
    require.floating("input", input, dims=4)
    require.same_shape("target", target, input.shape)
    require.one_of("kind", kind, ("square", "focal"))
    p = input.sigmoid()
    if kind == "square":
        return (p - target).square().sum((1, 2, 3)) / target.sum((1, 2, 3)).clamp(min=1)
    peak = target == 1
    here = (1 - p).square() * F.softplus(-input)
    elsewhere = (1 - target) ** 4 * p.square() * F.softplus(input)
    return torch.where(peak, here, elsewhere).sum((1, 2, 3)) / peak.sum((1, 2, 3)).clamp(min=1)


def center_box_loss(
    input: Float[Tensor, "n channels height width"],
    targets: CenterTargets,
    *,
    offset: float = 1.0,
    size: float = 2.0,
    yaw: float = 0.5,
    level: float = 1.0,
) -> Float[Tensor, " n"]:
    """Weighted balanced L1 error in the cells of the centres, for each image; 0 where it has no objects.

    With d the error of a number and b = e^3 - 1 it is (b |d| + 1) log(b |d| + 1) / (2 b) - |d| / 2 below |d| = 1, and
    3 |d| / 2 + 3 / (2 b) - 1 / 2 from there on: its slope rises fast and stops at 3 / 2. Means over the objects and the
    numbers of a group are weighted and summed.

    Args:
        input: dx, dy, width, height, sine, cosine[, z, depth] of each cell; in the paper dx and dy are a sigmoid's,
            sine and cosine a tanh's, and the others a layer's plain output.
        targets: of as many numbers.
        offset: weight of dx and dy, at least 0.
        size: of width, height and depth.
        yaw: of sine and cosine.
        level: of z.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> box = torch.tensor([[[2.5, 1.2, 4.0, 2.0, 0.0]]])
    >>> targets = gaussian_heatmap_targets(box, torch.ones(1, 1, dtype=torch.bool), height=4, width=6)
    >>> center_box_loss(targets.regression.mT[..., None].expand(-1, -1, 4, 6), targets)
    tensor([0.])
    """
    weights = {"offset": offset, "size": size, "yaw": yaw, "level": level}
    for name, value in weights.items():
        require.number(name, value, at_least=0.0)
    _check_regression("input", input)
    expected = (targets.regression.shape[2], *targets.centers.shape[2:])
    if len(input) != len(targets.mask) or tuple(input.shape[1:]) != expected:
        raise ValueError(f"input: expected shape {(len(targets.mask), *expected)}, got {tuple(input.shape)}")
    found = input.flatten(2).mT.take_along_dim(targets.cells.unsqueeze(-1), 1)
    error = _balanced_l1(torch.where(targets.mask.unsqueeze(-1), found - targets.regression, 0.0))
    error = error.sum(1) / targets.mask.sum(1, keepdim=True).clamp(min=1)
    groups = {"offset": [0, 1], "size": [2, 3, 7], "yaw": [4, 5], "level": [6]}
    columns = {name: [c for c in own if c < error.shape[1]] for name, own in groups.items()}
    return sum(weights[name] * error[:, own].mean(1) for name, own in columns.items() if own)  # type: ignore[return-value]


def keypoint_sensitive_warp(
    centers: Float[Tensor, "n classes height width"],
    corners: Float[Tensor, "n classes height width"],
    regression: Float[Tensor, "n channels height width"],
) -> Float[Tensor, "n classes height width"]:
    """Scores that also ask the corners: at every cell the centre's probability plus the mean of four corners'.

    Each cell's box is decoded, and the heatmap of corners read in the cells where its corners lie; corners outside of
    the map are moved to its border. The scores run from 0 to 2. A cell whose box is not finite has no score (NaN).

    Args:
        centers: probabilities, after the sigmoid.
        corners: the same.
        regression: as `center_box_loss` takes it.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> corners = torch.zeros(1, 1, 4, 6)
    >>> corners[..., 0, 0], corners[..., 2, 4] = 0.8, 0.4  # of the four only these two are seen
    >>> numbers = torch.tensor([0.5, 0.2, 4.0, 2.0, 0.0, 1.0])  # in cell (2, 1): a box from (0.5, 0.2) to (4.5, 2.2)
    >>> maps = numbers[:, None, None].expand(1, -1, 4, 6)
    >>> keypoint_sensitive_warp(torch.full((1, 1, 4, 6), 0.5), corners, maps)[..., 1, 2]
    tensor([[0.8000]])
    """
    _check_regression("regression", regression)
    for name, heat in (("centers", centers), ("corners", corners)):
        require.floating(name, heat, dims=4)
        require.same_shape(name, heat, (len(regression), corners.shape[1], *regression.shape[2:]))
    height, width = centers.shape[2:]
    boxes = _boxes(regression)
    places = _corners(boxes[..., :2], boxes[..., 2:4], boxes[..., 4])  # (n, H W, 4, 2)
    x, y = places.nan_to_num(0.0).floor().unbind(-1)
    cell = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).long().flatten(1)
    seen = corners.flatten(2).take_along_dim(cell.unsqueeze(1), 2).reshape(*corners.shape, 4).mean(-1)
    sound = places.isfinite().all(-1).all(-1).view(-1, 1, height, width)
    return torch.where(sound, centers + seen, math.nan)


def decode_center_peaks(
    scores: Float[Tensor, "n classes height width"],
    regression: Float[Tensor, "n channels height width"],
    *,
    limit: int = 50,
    threshold: float = 0.1,
) -> list[CenterBoxes]:
    """Boxes of the cells whose score none of the eight cells around exceeds: for each image, best first.

    Without suppression. Of equal scores the lower class and cell go first; neighbours with equal scores both stay. A
    score that is not a number finds nothing and lets no cell around find anything; nor do boxes that are not finite or
    have a side that is not above 0. Without gradients.

    Args:
        scores: probabilities of centres, or those of `keypoint_sensitive_warp`.
        regression: as `center_box_loss` takes it.
        limit: at most so many boxes an image.
        threshold: scores above it count, at least 0.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> box = torch.tensor([[[2.5, 1.2, 4.0, 2.0, 0.0]]])
    >>> targets = gaussian_heatmap_targets(box, torch.ones(1, 1, dtype=torch.bool), height=4, width=6)
    >>> decode_center_peaks(targets.centers, targets.regression.mT[..., None].expand(-1, -1, 4, 6))[0].boxes
    tensor([[2.5000, 1.2000, 4.0000, 2.0000, 0.0000]])
    """
    _check_regression("regression", regression)
    require.floating("scores", scores, dims=4)
    require.same_shape("scores", scores, (len(regression), scores.shape[1], *regression.shape[2:]))
    require.whole("limit", limit, at_least=1)
    require.number("threshold", threshold, at_least=0.0)
    scores = scores.detach()
    around = F.max_pool2d(scores, 3, stride=1, padding=1)
    peaks = torch.where(scores == around, scores, -math.inf).flatten(1)
    best, order = peaks.sort(dim=1, descending=True, stable=True)
    area = scores.shape[2] * scores.shape[3]
    found = []
    for own, value, place in zip(_boxes(regression.detach()), best[:, :limit], order[:, :limit]):
        box = own[place % area]
        keep = (value > threshold) & box.isfinite().all(1) & (box[:, 2:4] > 0).all(1)
        found.append(CenterBoxes(box[keep], value[keep], (place // area)[keep]))
    return found


def _check_regression(name: str, value: Tensor) -> None:
    require.floating(name, value, dims=4)
    if value.shape[1] not in (6, 8):
        raise ValueError(f"{name}: expected 6 or 8 channels, got shape {tuple(value.shape)}")


def _balanced_l1(error: Tensor) -> Tensor:
    d, b = error.abs(), math.exp(3) - 1
    near = (b * d + 1) * torch.log1p(b * d) / (2 * b) - d / 2
    return torch.where(d < 1, near, 1.5 * d + 1.5 / b - 0.5)


def _boxes(regression: Tensor) -> Tensor:
    """Of (n, 6 or 8, H, W) the boxes (n, H W, 5 or 7) of all cells."""
    regression = regression.to(torch.promote_types(regression.dtype, torch.float32))
    height, width = regression.shape[2:]
    y, x = (torch.arange(n, dtype=regression.dtype, device=regression.device) for n in (height, width))
    dx, dy, w, h, sine, cosine, *solid = regression.unbind(1)
    return torch.stack([dx + x, dy + y[:, None], w, h, torch.atan2(sine, cosine), *solid], -1).flatten(1, 2)


def _corners(centre: Tensor, sides: Tensor, angle: Tensor) -> Tensor:
    """(..., 4, 2), one after the other."""
    along = torch.stack([angle.cos(), angle.sin()], -1) * sides[..., :1] / 2
    across = torch.stack([-angle.sin(), angle.cos()], -1) * sides[..., 1:] / 2
    return torch.stack(
        [centre - along - across, centre + along - across, centre + along + across, centre - along + across], -2
    )


def _radius(w: Tensor, h: Tensor, overlap: float) -> Tensor:
    """r with (w - 2 r)(h - 2 r) = overlap w h.

    CornerNet takes the least of three such radii, but those of shifted and of grown boxes are never less: with
    a = 1 - 2 r / w and b = 1 - 2 r / h it is (1 + a)(1 + b)(1 + a b) >= 8 a b and (2 - a)(2 - b) a b <= 1.
    """
    total = w + h
    return (total - (total**2 - 4 * w * h * (1 - overlap)).sqrt()) / 4


def _splat(cells: Tensor, radius: Tensor, mask: Tensor, kinds: Tensor, *, size: tuple[int, int, int]) -> Tensor:
    """Of cells (n, T, 2) the heatmaps (n, *size), one object after the other, as maps are large and objects few."""
    n = torch.arange(len(cells), device=cells.device)
    heat = cells.new_zeros(len(cells), *size)
    y, x = (torch.arange(k, dtype=cells.dtype, device=cells.device) for k in size[1:])
    for (cx, cy), r, there, kind in zip(cells.permute(1, 2, 0), radius.T, mask.T, kinds.T):
        dx, dy, r = x - cx[:, None], y - cy[:, None], r[:, None]
        sigma = (2 * r + 1) / 6
        across, down = (torch.where(d.abs() <= r, (-(d**2) / (2 * sigma**2)).exp(), 0.0) for d in (dx, dy))
        one = (down[:, :, None] * across[:, None, :]).masked_fill(~there[:, None, None], 0.0)
        heat[n, kind] = torch.maximum(heat[n, kind], one)
    return heat
