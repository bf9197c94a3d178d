"""Adaptive projected guidance: large guidance scales without the colours burning out.

Classifier-free guidance moves the prediction along its difference from the unconditional one. The part of that
difference parallel to the prediction itself only makes it larger, which is where saturation comes from; the orthogonal
part is what follows the condition. This guidance drops the first, limits the length of the difference, and subtracts
part of the earlier differences (a negative momentum), so that each step follows what is new. It costs no evaluation.
For scales well above those of faithful sampling; data should be centred, since "larger" is meant from the origin.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import guidance

PAPER = Paper(
    title="Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models",
    year=2024,
    helps=("guidance",),
    departs=("the lengths and angles of a sample are over all its entries; no choice of single dimensions",),
    equation=(
        r"\hat D=D_c+(w-1)\bigl(\bar\Delta_\perp+\eta\,\bar\Delta_\parallel\bigr),\qquad "
        r"\bar\Delta=\min\Bigl(1,\frac r{\lVert\Delta\rVert}\Bigr)\Delta,\quad "
        r"\Delta=D_c-D_u+\beta\,\Delta_{\mathrm{previous}}"
    ),
    url="https://arxiv.org/abs/2410.02416",
)


def project_parallel_orthogonal(
    v: Float[Tensor, "*batch_and_data"], onto: Float[Tensor, "*batch_and_data"], *, data_dims: int | None = None
) -> tuple[Tensor, Tensor]:
    """v as its part parallel to `onto`, <v, onto> / <onto, onto> onto, and the rest, in the dtype of v.

    Computed in double precision. Onto a zero, the parallel part is zero.

    Args:
        v, onto: of one shape.
        data_dims: how many trailing dimensions make one sample; None is all but the first.

    Raises:
        ValueError: shapes that differ, or data_dims beyond them.

    >>> project_parallel_orthogonal(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]))
    (tensor([[3., 0.]]), tensor([[0., 4.]]))
    """
    require.floating("v", v, at_least_dims=1)
    require.same_shape("onto", onto, tuple(v.shape))
    dims = _data(v, data_dims)
    wide, axis = v.double(), onto.double()
    square = axis.square().sum(dims, keepdim=True)
    share = (wide * axis).sum(dims, keepdim=True) / torch.where(square > 0, square, 1.0)
    parallel = share * axis
    return parallel.to(v.dtype), (wide - parallel).to(v.dtype)


@guidance(examples=({"scale": 4.0}, {"scale": 8.0, "eta": 0.5, "momentum": -0.75, "radius": 0.5}))
@dataclass(frozen=True)
class AdaptiveProjectedGuidance:
    """g(cond, uncond, state) -> (guided, state), see the equation, on predictions of x_0.

    The state is the sum of differences before it was limited. eta 1, momentum 0 and radius None are classifier-free
    guidance of that scale.

    Args:
        scale: w >= 0; 1 is plain conditional sampling.
        eta: share of the parallel part that stays.
        momentum: beta, above -1 and below 1; about -0.75 to -0.5.
        radius: r > 0, the largest length of the difference, None for any; 2.5 to 15 on images and latents.
        data_dims: how many trailing dimensions make one sample; None is all but the first.

    Raises:
        ValueError: a number out of range, predictions of different shapes, or no unconditional one.

    >>> cond, uncond = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    >>> guided, state = AdaptiveProjectedGuidance(scale=4.0)(cond, uncond, None)
    >>> guided, state
    (tensor([[2., 3.]]), tensor([[1., 1.]]))
    """

    scale: float
    _: KW_ONLY
    eta: float = 0.0
    momentum: float = -0.5
    radius: float | None = 15.0
    data_dims: int | None = None

    def __post_init__(self) -> None:
        require.number("scale", self.scale, at_least=0.0)
        require.number("eta", self.eta, at_least=0.0)
        require.number("momentum", self.momentum, above=-1.0, below=1.0)
        if self.radius is not None:
            require.number("radius", self.radius, above=0.0)

    def __call__(self, cond: Tensor, uncond: Tensor | None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        require.floating("cond", cond, at_least_dims=1)
        require.same_shape("uncond", uncond, tuple(cond.shape))
        running = cond - uncond if state is None else cond - uncond + self.momentum * state
        update = running
        if self.radius is not None:
            # double: squares overflow in float16; vector_norm: its gradient at 0 is 0
            length = torch.linalg.vector_norm(running.double(), dim=_data(running, self.data_dims), keepdim=True)
            update = running * (self.radius / length.clamp(min=self.radius)).to(running.dtype)
        parallel, orthogonal = project_parallel_orthogonal(update, cond, data_dims=self.data_dims)
        return cond + (self.scale - 1) * (orthogonal + self.eta * parallel), running


def _data(v: Tensor, data_dims: int | None) -> tuple[int, ...]:
    number = v.ndim - 1 if data_dims is None else data_dims
    require.whole("data_dims", number, at_least=1, at_most=v.ndim)
    return tuple(range(-number, 0))
