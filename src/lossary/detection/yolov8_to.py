"""YOLOv8-TO: read a picture of a truss back as bars, by drawing the predicted bars and comparing pictures.

A density image from topology optimisation is made of bars, but CAD wants their end points and thickness. Each
detection predicts five numbers in its box; they are drawn as a smooth bar, and the Dice loss between that drawing and
the detection's mask trains them, so no one has to annotate bars. Try it wherever shapes are built of a few simple
parts and only masks are known: put your own part's equation in place of the bar's. With a sharp edge the gradient
lives within a fraction of a pixel of the outline: widen it where bars start far off.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="From Density to Geometry: YOLOv8 Instance Segmentation for Reverse Engineering of Optimized Structures",
    year=2024,
    helps=("odd-shapes",),
    departs=(
        "bars are drawn at the size of the masks; the official code draws 201 x 201 and takes the nearest pixels",
        "a structure is the sum of its bars, clipped to 1, with gradients; the official code only draws it so",
        "the bar's equation is evaluated in logarithms, so a bar of no length or thickness keeps finite gradients",
        "pixels of a picture that is not square lie equally far apart both ways",
        "no YOLOv8: the numbers may come from any head, or be fitted directly",
    ),
    equation=r"\varphi(x', y') = 1 - \left[ \left( \frac{x'}{L/2} \right)^6 + \left( \frac{y'}{t/2} \right)^6"
    r" \right]^{1/6},\qquad H = \sigma(\varphi / \epsilon)",
    url="https://arxiv.org/abs/2404.18763",
)

_THINNEST, _THICKEST = 0.001, 0.2


def mmc_topology_description(
    input: Float[Tensor, "*batch 5"], boxes: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch 5"]:
    """Bars from five numbers between 0 and 1 in each box: centre x, y, length, thickness, angle.

    The first four place two end points x1, y1, x2, y2 within the box, the fifth the thickness between 0.001 and 0.2;
    the length is the distance of the end points plus 0.0001 and the angle, in radians, that from the first to the
    second, 0 where they coincide. With gradients.

    Args:
        input: 0 to 1, after the sigmoid.
        boxes: x1, y1, x2, y2 in units of the picture's shorter side.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> mmc_topology_description(torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5]), torch.tensor([0.1, 0.2, 0.4, 0.6]))
    tensor([0.2500, 0.4000, 0.5001, 0.1005, 0.9273])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("input", input, (*input.shape[:-1], 5))
    require.same_shape("boxes", boxes, (*input.shape[:-1], 4))
    corner, side = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    first, second = (corner + side * input[..., k : k + 2] for k in (0, 2))
    along = second - first
    length, angle = along.norm(dim=-1) + 1e-4, torch.atan2(along[..., 1], along[..., 0])
    thickness = _THINNEST + (_THICKEST - _THINNEST) * input[..., 4]
    return torch.cat([(first + second) / 2, torch.stack([length, thickness, angle], dim=-1)], dim=-1)


def render_components(
    bars: Float[Tensor, "*batch 5"], height: int, width: int, *, epsilon: float = 0.001
) -> Float[Tensor, "*batch height width"]:
    """A picture of each bar, 1 inside and 0 outside: H = sigmoid(phi / epsilon). With gradients.

    phi = 1 - ((x' / (L / 2))^6 + (y' / (t / 2))^6)^(1/6), x' along the bar and y' across it: a rectangle with slightly
    rounded corners. Pixels lie at i / (n - 1), n the smaller of height and width, from 0 to 1 along the shorter side.

    Args:
        bars: centre x, y, length L, thickness t, angle in radians; y runs down the rows.
        height: of the picture in pixels, at least 2.
        width: of the picture in pixels, at least 2.
        epsilon: width of the edge, > 0; 0.001 in the official code, which is nearly a step.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> bar = torch.tensor([0.5, 0.5, 0.8, 0.3, 0.0])
    >>> render_components(bar, 5, 5).round()
    tensor([[0., 0., 0., 0., 0.],
            [0., 0., 0., 0., 0.],
            [0., 1., 1., 1., 0.],
            [0., 0., 0., 0., 0.],
            [0., 0., 0., 0., 0.]])
    """
    require.floating("bars", bars, at_least_dims=1)
    require.same_shape("bars", bars, (*bars.shape[:-1], 5))
    require.whole("height", height, at_least=2)
    require.whole("width", width, at_least=2)
    require.number("epsilon", epsilon, above=0.0)
    step = 1 / (min(height, width) - 1)
    y, x = (step * torch.arange(n, device=bars.device, dtype=bars.dtype) for n in (height, width))
    centre_x, centre_y, length, thickness, angle = bars[..., None, None].unbind(-3)
    right, down = x - centre_x, y[:, None] - centre_y
    cos, sin = angle.cos(), angle.sin()
    tiny = 1e-9
    along = (cos * right + sin * down).abs() / (length / 2 + tiny)
    across = (cos * down - sin * right).abs() / (thickness / 2 + tiny)
    logs = 6 * torch.stack([along, across]).clamp(min=tiny).log()
    return torch.sigmoid((1 - (logs.logsumexp(0) / 6).exp()) / epsilon)


def render_structure(pictures: Float[Tensor, "*batch bars height width"]) -> Float[Tensor, "*batch height width"]:
    """The picture of a whole structure: the sum of its bars' pictures, at most 1.

    Args:
        pictures: of each bar, from `render_components`.

    Raises:
        ValueError: not floating-point, or fewer than three dimensions.

    >>> render_structure(torch.tensor([[[0.2, 0.9]], [[0.3, 0.8]]]))
    tensor([[0.5000, 1.0000]])
    """
    require.floating("pictures", pictures, at_least_dims=3)
    return pictures.sum(-3).clamp(max=1.0)


def dice_reconstruction_loss(
    input: Float[Tensor, "*batch height width"], target: Float[Tensor, "*batch height width"], *, smooth: float = 1.0
) -> Float[Tensor, "*batch"]:
    """1 - (2 sum(a b) + smooth) / (sum a + sum b + smooth) of a drawing and a mask; per picture.

    Args:
        input: a drawing from `render_components` or `render_structure`, 0 to 1.
        target: the mask, 0 to 1; in training each detection's true mask within its predicted box, 0 elsewhere.
        smooth: > 0; it keeps empty pictures defined, whose loss is 0. 1 in the official code, in pixels.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> mask = torch.tensor([[1.0, 1.0, 0.0]])
    >>> dice_reconstruction_loss(torch.tensor([[1.0, 0.0, 1.0]]), mask)  # 1 - (2 + 1) / (4 + 1)
    tensor(0.4000)
    """
    require.floating("input", input, at_least_dims=2)
    require.same_shape("target", target, input.shape)
    require.number("smooth", smooth, above=0.0)
    common, total = (input * target).sum((-2, -1)), (input + target).sum((-2, -1))
    return 1 - (2 * common + smooth) / (total + smooth)
