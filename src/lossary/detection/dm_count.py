"""DM-Count: train a density map by transporting it onto the annotated dots, instead of onto dots blurred by hand.

Counting networks used to regress the dots smoothed with Gaussians, whose width is a guess that costs accuracy. Here
the predicted density, divided by its sum, is compared with the dots themselves: by entropic optimal transport, by the
total variation that settles what transport leaves loose, and its sum with the number of dots. Use it wherever objects
are marked by points and are too many or too close for boxes: people, cells, cars, grains. It costs a Sinkhorn
iteration per image, n points by h w cells. Where objects are few and apart, smoothed targets do as well.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Distribution Matching for Crowd Counting",
    year=2020,
    helps=("counting", "crowded-scenes"),
    departs=(
        "total variation has the paper's factor 1/2, which the official code leaves out",
        "Sinkhorn runs on logarithms for a fixed number of iterations; the official code's kernel underflows for cells"
        " far from all points, and it stops early once the marginals agree",
        "the transport term's value is the entropic cost that its gradient belongs to; the official code's value is 0",
        "values per image: the official code sums transport over the batch and averages the other terms",
        "points fall into cells as they are, the official code rounds them to pixels first; no coordinates scaled to -1"
        " to 1, which is the same as another regularisation",
    ),
    equation=r"\bigl|\|\hat z\|_1 - n\bigr| + \lambda_1 \mathcal W_\varepsilon\!\left(\frac{\hat z}{\|\hat z\|_1},"
    r" \frac{z}{n}\right) + \frac{\lambda_2 n}{2} \left\|\frac{\hat z}{\|\hat z\|_1} - \frac{z}{n}\right\|_1",
    url="https://arxiv.org/abs/2009.13077",
)

EMPTY = 1e-16  # of the whole: the mass of a cell without any, whose logarithm Sinkhorn needs


def count_loss(density: Float[Tensor, "b 1 h w"], points: Sequence[Float[Tensor, "n 2"]]) -> Float[Tensor, " b"]:
    """How far the density's sum is from the number of points, |sum z - n|, for each image.

    Args:
        density: z >= 0, objects in each cell.
        points: of each image, x and y in pixels; any number of them.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> count_loss(torch.full((1, 1, 2, 2), 0.5), [torch.zeros(3, 2)])
    tensor([1.])
    """
    _check(density, points)
    return (density.sum((1, 2, 3)) - _counts(density, points)).abs()


def sinkhorn_ot_loss(
    density: Float[Tensor, "b 1 h w"],
    points: Sequence[Float[Tensor, "n 2"]],
    *,
    stride: int = 8,
    reg: float = 10.0,
    iterations: int = 100,
) -> Float[Tensor, " b"]:
    """Entropic cost of transport from the density to the points, both of mass 1, for each image.

    min over plans P of <C, P> + reg sum P log P, C the squared distance in pixels between a cell's centre and a
    point. With beta the dual potential of the cells after `iterations` of Sinkhorn, held constant, the gradient is
    beta / |z| - <beta, z> / |z|^2, |z| being the density's sum. An image without points, or without density, gets 0
    and no gradient. The value may be negative.

    Args:
        density: z >= 0, objects in each cell.
        points: of each image, x and y in pixels; any number of them.
        stride: pixels of the image to a cell, along each axis.
        reg: of the entropy, in squared pixels, > 0.
        iterations: of Sinkhorn, at least 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a number out of range.

    >>> density = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])  # all of it 4 pixels beside the point
    >>> sinkhorn_ot_loss(density, [torch.tensor([[8.0, 4.0]])])
    tensor([16.])
    """
    _check(density, points)
    require.whole("stride", stride, at_least=1)
    _plain("reg", reg, above=0.0)
    require.whole("iterations", iterations, at_least=1)
    values = 0 * density.sum((1, 2, 3))
    seen = [i for i, p in enumerate(points) if len(p)]
    if not seen:
        return values
    with torch.no_grad():
        z = density[seen].flatten(1).to(torch.promote_types(density.dtype, torch.float32))
        total = z.sum(1, keepdim=True)
        given = [points[i].to(z) for i in seen]
        cost = _cost(given, density, stride, z)
        there = pad_sequence([torch.ones_like(p[:, 0]) for p in given], batch_first=True)
        share, mass = there / there.sum(1, keepdim=True), z / total.where(total > 0, torch.inf)
        u, v = _sinkhorn(share.log(), mass.clamp_min(EMPTY).log(), -cost / reg, iterations)
        cost_of_plan = (share * u.where(there > 0, 0)).sum(1) + (mass * v).sum(1)
        damped = total.square() + 1e-8  # as in the official code: nearly no density, nearly no gradient
        slope = reg * (total * v - (z * v).sum(1, keepdim=True)) / damped
    flat = density[seen].flatten(1)
    pull = ((flat - flat.detach()) * slope).sum(1)
    found = (reg * cost_of_plan * (total > 0).squeeze(1) + pull).to(values.dtype)
    return values.index_add(0, torch.tensor(seen, device=values.device), found)


def total_variation_loss(
    density: Float[Tensor, "b 1 h w"], points: Sequence[Float[Tensor, "n 2"]], *, stride: int = 8
) -> Float[Tensor, " b"]:
    """Half the sum over cells of |z / |z| - dots / n|, for each image: 0 to 1, and 0 for one without points.

    Args:
        density: z >= 0, objects in each cell.
        points: of each image, x and y in pixels; any number of them.
        stride: pixels of the image to a cell, along each axis.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a stride out of range.

    >>> density = torch.tensor([[[[3.0, 1.0], [0.0, 0.0]]]])
    >>> total_variation_loss(density, [torch.tensor([[4.0, 4.0]])])  # a quarter is in the wrong cell
    tensor([0.2500])
    """
    _check(density, points)
    require.whole("stride", stride, at_least=1)
    dots = torch.stack([dot_map(p.to(density), density.shape[-2:], stride=stride) for p in points]).flatten(1)
    z, n = density.flatten(1), _counts(density, points)
    predicted = z / (z.sum(1, keepdim=True) + 1e-6)
    return (predicted - dots / n.clamp_min(1).unsqueeze(1)).abs().sum(1) / 2 * (n > 0)


def dm_count_loss(
    density: Float[Tensor, "b 1 h w"],
    points: Sequence[Float[Tensor, "n 2"]],
    *,
    stride: int = 8,
    transport_weight: float = 0.1,
    variation_weight: float = 0.01,
    reg: float = 10.0,
    iterations: int = 100,
) -> Float[Tensor, " b"]:
    """`count_loss` + lambda_1 `sinkhorn_ot_loss` + lambda_2 n `total_variation_loss`, for each image.

    Args:
        density: z >= 0, objects in each cell; end the network in a ReLU or softplus.
        points: of each image, x and y in pixels; any number of them, also none.
        stride: pixels of the image to a cell, along each axis.
        transport_weight: lambda_1, >= 0.
        variation_weight: lambda_2, >= 0.
        reg: see `sinkhorn_ot_loss`.
        iterations: see `sinkhorn_ot_loss`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a number out of range.

    >>> dm_count_loss(torch.full((1, 1, 2, 2), 0.5), [torch.zeros(0, 2)])  # nothing to find: the sum alone
    tensor([2.])
    """
    _plain("transport_weight", transport_weight, at_least=0.0)
    _plain("variation_weight", variation_weight, at_least=0.0)
    count = count_loss(density, points)
    transport = sinkhorn_ot_loss(density, points, stride=stride, reg=reg, iterations=iterations)
    variation = _counts(density, points) * total_variation_loss(density, points, stride=stride)
    return count + transport_weight * transport + variation_weight * variation


def dot_map(points: Float[Tensor, "n 2"], size: tuple[int, int], *, stride: int = 8) -> Float[Tensor, "h w"]:
    """How many points fall into each cell; those outside the image count for the nearest cell.

    Args:
        points: x and y in pixels.
        size: h and w, in cells.
        stride: pixels of the image to a cell, along each axis.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a stride out of range.

    >>> dot_map(torch.tensor([[9.0, 1.0], [15.0, 7.9], [0.0, 99.0]]), (2, 2))
    tensor([[0., 2.],
            [1., 0.]])
    """
    require.floating("points", points, dims=2)
    require.same_shape("points", points, (len(points), 2))
    require.whole("stride", stride, at_least=1)
    height, width = size
    column, row = (points / stride).floor().long().unbind(1)
    cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return points.new_zeros(height * width).index_add(0, cell, torch.ones_like(points[:, 0])).view(height, width)


def _sinkhorn(log_a: Tensor, log_b: Tensor, kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Logarithms u (B, P) and v (B, M) of the scalings that give exp(kernel (B, P, M)) its marginals."""
    u = log_a
    for _ in range(iterations):
        v = log_b - (kernel + u.unsqueeze(2)).logsumexp(1)
        u = log_a - (kernel + v.unsqueeze(1)).logsumexp(2)
    return u, v


def _cost(points: Sequence[Tensor], density: Tensor, stride: int, like: Tensor) -> Tensor:
    """Squared distances (B, P, h w) from points, padded to equal numbers, to the centres of cells."""
    across, down = (
        stride * (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) for n in density.shape[:1:-1]
    )
    x, y = pad_sequence(list(points), batch_first=True).unsqueeze(2).unbind(-1)
    return ((x - across).square().unsqueeze(-2) + (y - down).square().unsqueeze(-1)).flatten(2)


def _counts(density: Tensor, points: Sequence[Tensor]) -> Tensor:
    return torch.tensor([float(len(p)) for p in points], dtype=density.dtype, device=density.device)


def _plain(name: str, value: float, **bounds: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor, which would get no gradient")
    require.number(name, value, **bounds)


def _check(density: Tensor, points: Sequence[Tensor]) -> None:
    require.floating("density", density, dims=4)
    require.same_shape("density", density, (len(density), 1, *density.shape[2:]))
    if isinstance(points, Tensor) or len(points) != len(density):
        raise ValueError(f"points: expected a list of {len(density)} tensors (n, 2), one an image, got {len(points)}")
    for p in points:
        require.floating("points", p, dims=2)
        require.same_shape("points", p, (len(p), 2))
