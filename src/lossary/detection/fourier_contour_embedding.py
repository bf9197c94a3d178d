"""Fourier contour embedding: an outline of any shape as a handful of Fourier coefficients, regressed like a box.

A closed outline walked at even speed is a periodic function of one complex variable, and its low frequencies hold
most of it: 22 numbers draw curved text closely. Starting point and direction are fixed, so a shape has one code; c_0
is its centre, c_1 its size. Try it where boxes and a few corners are too coarse and masks too much: curved text,
ribbons, smooth organic shapes. Regress through `fourier_contour_loss`, which compares points of the outlines rather
than coefficients. Sharp corners and thin spikes need more coefficients than a polygon needs corners.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.detection._overlap import POLYGON
from lossary.detection._suppress import hard, suppress
from lossary.paper import Paper

PAPER = Paper(
    title="Fourier Contour Embedding for Arbitrary-Shaped Text Detection",
    year=2021,
    helps=("odd-shapes",),
    departs=(
        "the outline starts at the rightmost crossing of the horizontal through its centre, as in the paper; the"
        " official code starts at the top of the vertical",
        "points are even along the whole outline; the official code spreads whole numbers of them over the edges",
        "the region loss mines hard negatives within an image; the official code within a batch",
        "no backbone, no feature levels, no centre-region targets and no loss of the centre region",
    ),
    equation=r"f(t) = \sum_{k=-K}^{K} c_k e^{2\pi i k t},\quad c_k = \frac1N \sum_{n=0}^{N-1} f(n/N) e^{-2\pi i k n/N}",
    url="https://arxiv.org/abs/2104.10442",
)


def fourier_contour_encode(
    contours: Float[Tensor, "*batch corners 2"], *, degree: int = 5, samples: int = 400
) -> Float[Tensor, "*batch coefficients 2"]:
    """Coefficients c_-K, ..., c_K of closed outlines as real and imaginary part: 2 (2 K + 1) numbers.

    The code of a shape is unique: f(0) is the rightmost point at the height of the centre c_0, and with y downwards
    the outline runs clockwise. A shape without area is taken in the direction given; a single point has c_0 alone.

    Args:
        contours: corners x, y of closed polygons, at least one, either way round and from any corner; repeat the last
            corner to fill a row.
        degree: K, at least 1.
        samples: N, points spread evenly over the outline, more than 2 K.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> square = torch.tensor([[3.0, 1.0], [3.0, 3.0], [1.0, 3.0], [1.0, 1.0]])
    >>> fourier_contour_encode(square, degree=1)[2, 0]  # c_1, a little above half the side
    tensor(1.1463)
    """
    require.floating("contours", contours, at_least_dims=2)
    if contours.shape[-1] != 2 or not contours.shape[-2]:
        raise ValueError(f"contours: expected corners (..., corners, 2), got shape {tuple(contours.shape)}")
    require.whole("degree", degree, at_least=1)
    require.whole("samples", samples, at_least=2 * degree + 1)
    points = _evenly(contours.double(), samples)
    x, y = points.unbind(-1)

    k = torch.arange(-degree, degree + 1, device=points.device)
    steps = torch.arange(samples, device=points.device, dtype=points.dtype) / samples
    code = torch.complex(x, y) @ torch.exp(-2j * math.pi * steps[:, None] * k) / samples

    area = (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1, keepdim=True)
    turned = area < 0
    code = torch.where(turned, code.flip(-1), code)
    height = y - y.mean(-1, keepdim=True)
    ahead = height.roll(-1, -1)
    share = height / torch.where(height == ahead, 1.0, height - ahead)
    crossed = (height > 0) != (ahead > 0)
    right, first = (x + share * (x.roll(-1, -1) - x)).masked_fill(~crossed, -math.inf).max(-1, keepdim=True)
    start = steps[first] + share.gather(-1, first) / samples
    start = torch.where(right.isfinite(), torch.where(turned, -start, start), 0.0)
    code = code * torch.exp(2j * math.pi * start * k)
    return torch.view_as_real(code).to(contours.dtype)


def fourier_contour_decode(
    coefficients: Float[Tensor, "*batch coefficients 2"], *, points: int = 50
) -> Float[Tensor, "*batch points 2"]:
    """Points f(0), f(1/N'), ... of the outline, x and y. With gradients.

    Args:
        coefficients: c_-K, ..., c_K as real and imaginary part.
        points: N', at least 3.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> circle = torch.tensor([[0.0, 0.0], [5.0, 5.0], [2.0, 0.0]])  # centre (5, 5), radius 2
    >>> fourier_contour_decode(circle, points=4).round(decimals=4)
    tensor([[7., 5.],
            [5., 7.],
            [3., 5.],
            [5., 3.]])
    """
    degree = _degree("coefficients", coefficients)
    require.whole("points", points, at_least=3)
    k = torch.arange(-degree, degree + 1, device=coefficients.device, dtype=torch.float64)
    angle = 2 * math.pi / points * k[:, None] * torch.arange(points, device=k.device)
    cos, sin = angle.cos().to(coefficients), angle.sin().to(coefficients)
    real, imaginary = coefficients.unbind(-1)
    return torch.stack([real @ cos - imaginary @ sin, real @ sin + imaginary @ cos], dim=-1)


def fourier_contour_loss(
    input: Float[Tensor, "*batch coefficients 2"],
    target: Float[Tensor, "*batch coefficients 2"],
    *,
    centre: Bool[Tensor, "*batch"] | None = None,
    points: int = 50,
) -> Float[Tensor, "*batch"]:
    """Smooth L1 between points of two outlines, in x and y, averaged over the points. Per pixel.

    Args:
        input: predicted coefficients of each pixel of the text, see `fourier_contour_encode`.
        target: true ones; where c_0 is relative to the pixel it is so in both.
        centre: pixels of the text's centre region, which weigh 1 and others 1/2; None: all weigh 1.
        points: N', at which the outlines are compared.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> circle = torch.tensor([[0.0, 0.0], [5.0, 5.0], [2.0, 0.0]])
    >>> moved = circle + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    >>> fourier_contour_loss(moved, circle)  # 3 off in x everywhere: 3 - 1/2
    tensor(2.5000)
    """
    _degree("input", input)
    require.same_shape("target", target, input.shape)
    gap = F.smooth_l1_loss(
        fourier_contour_decode(input, points=points), fourier_contour_decode(target, points=points), reduction="none"
    )
    values = gap.sum(-1).mean(-1)
    if centre is None:
        return values
    if centre.dtype is not torch.bool or centre.shape != values.shape:
        raise ValueError(f"centre: expected bool {tuple(values.shape)}, got {centre.dtype} {tuple(centre.shape)}")
    return values * (1.0 + centre) / 2


def text_region_loss(
    input: Float[Tensor, "*batch height width"],
    target: Float[Tensor, "*batch height width"],
    *,
    negative_ratio: float = 3.0,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy over an image's text pixels and its hardest others, `negative_ratio` times as many. Per image.

    An image without text has the loss 0, as in the official code.

    Args:
        input: logits that a pixel is text.
        target: 1 where it is, else 0.
        negative_ratio: others for each text pixel, at least 0; 3 in the paper.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> text_region_loss(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([[1.0, 0.0, 0.0]]), negative_ratio=1.0)
    tensor(0.6931)
    """
    require.floating("input", input, at_least_dims=2)
    require.same_shape("target", target, input.shape)
    require.number("negative_ratio", float(negative_ratio), at_least=0.0)
    values = F.binary_cross_entropy_with_logits(input, target, reduction="none").flatten(-2)
    text = target.flatten(-2) > 0.5
    found = text.sum(-1, keepdim=True)
    wanted = torch.minimum((found * negative_ratio).long(), (~text).sum(-1, keepdim=True))
    hardest = values.detach().masked_fill(text, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    used = text | (hardest < wanted)
    return (values * used).sum(-1) / (found + wanted).squeeze(-1).clamp(min=1)


def polygon_nms(
    polygons: Float[Tensor, "n corners 2"], scores: Float[Tensor, " n"], *, iou_threshold: float = 0.1
) -> Int[Tensor, " kept"]:
    """Indices of the polygons that stay, best first: those that overlap no better one by more than the threshold.

    As `torchvision.ops.nms`, with the exact overlap of simple polygons, convex or not. Of equal scores the lower index
    goes first. A polygon without area or with a coordinate that is not finite overlaps nothing; a score that is not a
    number is dropped. Without gradients.

    Args:
        polygons: corners x, y, either way round; repeat the last corner to fill a row.
        scores: >= 0.
        iou_threshold: 0 to 1; 0.1 in the official code.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
    >>> polygon_nms(torch.stack([square, square + 0.5, square + 3.0]), torch.tensor([0.8, 0.9, 0.7]))
    tensor([1, 2])
    """
    require.floating("polygons", polygons, dims=3)
    require.same_shape("polygons", polygons, (len(polygons), polygons.shape[1], 2))
    require.same_shape("scores", scores, (len(polygons),))
    require.number("iou_threshold", iou_threshold, at_least=0.0, at_most=1.0)
    keep, _ = suppress(
        polygons.flatten(1), scores, decay=hard, parameter=float(iou_threshold), floor=0.0, overlap=POLYGON
    )
    return keep


def _degree(name: str, coefficients: Tensor) -> int:
    require.floating(name, coefficients, at_least_dims=2)
    *_, count, parts = coefficients.shape
    if parts != 2 or count < 3 or count % 2 == 0:
        raise ValueError(f"{name}: expected (..., 2 K + 1, 2) with K >= 1, got shape {tuple(coefficients.shape)}")
    return count // 2


def _evenly(contours: Tensor, samples: int) -> Tensor:
    """Points (..., samples, 2) at equal distances along closed polygons, from their first corner on."""
    closed = torch.cat([contours, contours[..., :1, :]], dim=-2)
    edges = closed.diff(dim=-2)
    end = edges.norm(dim=-1).cumsum(-1)
    place = end[..., -1:] * torch.arange(samples, device=end.device, dtype=end.dtype) / samples
    edge = torch.searchsorted(end, place.contiguous(), right=True).clamp(max=edges.shape[-2] - 1)
    length = edges.norm(dim=-1).gather(-1, edge)
    share = 1 - (end.gather(-1, edge) - place) / torch.where(length == 0, 1.0, length)
    share = torch.where(length == 0, 0.0, share)[..., None]
    edge = edge[..., None].expand(*edge.shape, 2)
    return closed.gather(-2, edge) + share * edges.gather(-2, edge)
