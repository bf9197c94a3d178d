"""Tilted Gaussians: distributions whose diffusion score is known, and can be learned, in any dimension.

Write a density as the standard normal times exp F. Under the Ornstein-Uhlenbeck noise its score at every time is an
average of exp F over a Gaussian (Mehler's formula), and where F is well approximated by a shallow network, so is the
score, without the dimension in the rate: the paper's account of how diffusion models escape its curse. Here are that
formula, for any F by sampling and for F along one direction by quadrature, and such a target with exact samples: an
oracle in high dimension that is not a mixture.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._discrete import multinomial
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Score-based generative models break the curse of dimensionality in learning a family of sub-Gaussian"
    " probability distributions",
    year=2024,
    helps=("density-estimation",),
    departs=(
        "the error bounds themselves are not computed, only what they are about",
        "exact samples and quadrature for F along one direction only; any F by self-normalised Monte Carlo",
    ),
    equation=(
        r"\nabla\log p_t(x)=-x+\frac{e^{-t}}{s}\, "
        r"\frac{\mathbb E\,U e^{F(e^{-t}x+sU)}}{\mathbb E\,e^{F(e^{-t}x+sU)}},\qquad "
        r"p_0\propto e^{-\lVert x\rVert^2/2+F},\ s^2=1-e^{-2t}"
    ),
    url="https://arxiv.org/abs/2402.08082",
)


def mehler_score(
    x: Float[Tensor, "batch d"],
    t: float,
    tilt: Callable[[Tensor], Tensor],
    *,
    samples: int = 1000,
    generator: Generator | None = None,
) -> Float[Tensor, "batch d"]:
    """Score at time t of exp(-|x|^2 / 2 + F) under dX = -X dt + sqrt 2 dW, by an average over Gaussian draws.

    The draws are shared by all points and come in opposite pairs, so that F = 0 gives exactly -x. The error falls with
    the square root of `samples`, and grows as t nears 0 and where exp F varies over many orders.

    Args:
        x: points.
        t: time, above 0.
        tilt: F, (..., d) -> (...), needed up to a constant.
        samples: even number of draws.
        generator: of the draws.

    Raises:
        ValueError: x that is not (batch, d), t that is not above 0, or an odd number of samples.

    >>> mehler_score(torch.tensor([[1.0, -2.0]]), 0.5, lambda x: 0 * x[..., 0], samples=4)
    tensor([[-1.,  2.]])
    """
    require.floating("x", x, dims=2)
    require.number("t", t, above=0.0)
    require.whole("samples", samples, at_least=2)
    if samples % 2:
        raise ValueError(f"samples: expected an even number, got {samples}")
    half = noise(x.new_empty(samples // 2, 1, x.shape[1]), generator)
    draws = torch.cat([half, -half])
    alpha, s = _levels(x.new_tensor(t))
    weight = tilt(alpha * x + s * draws).softmax(0).unsqueeze(-1)
    return alpha / s * (weight * draws).sum(0) - x


class RidgeTilt:
    """exp(-|x|^2 / 2 + F(w . x)) up to a constant, w of length 1: a target with exact samples and scores.

    All that is not along w is standard normal and independent. Use `denoise` with any sampler as its perfect network.

    Args:
        direction: w (d,), of any length but 0; it is normalised.
        tilt: F as a function of w . x, of any shape; it must stay below u^2 / 2 far out.
        reach: where densities along w are cut off, and the quadrature's normal numbers, > 0.
        nodes: of the quadrature, evenly spaced: exact to all digits for smooth F, and good where F has kinks.

    Raises:
        ValueError: a direction that is not (d,), or a reach that is not above 0.

    >>> target = RidgeTilt(torch.tensor([0.0, 2.0], dtype=torch.float64), lambda u: 3 * u)  # a Gaussian about 3 w
    >>> target.score(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5])) / torch.tensor(-0.5).exp()
    tensor([[0.0000, 3.0000]], dtype=torch.float64)
    """

    def __init__(
        self, direction: Float[Tensor, " d"], tilt: Callable[[Tensor], Tensor], *, reach: float = 12.0, nodes: int = 601
    ) -> None:
        require.floating("direction", direction, dims=1)
        require.number("reach", reach, above=0.0)
        require.whole("nodes", nodes, at_least=8)
        self.direction, self.tilt, self.reach = direction / direction.norm(), tilt, reach
        self.nodes = torch.linspace(-reach, reach, nodes, dtype=direction.dtype, device=direction.device)

    def log_density(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log p_0 up to a constant."""
        return self.tilt(x @ self.direction.to(x)) - 0.5 * x.square().sum(-1)

    def sample(self, n: int, *, generator: Generator | None = None) -> Float[Tensor, "n d"]:
        """Exact up to a grid of 4096 places along w."""
        w = self.direction
        grid = torch.linspace(-self.reach, self.reach, 4097, dtype=torch.float64, device=w.device)
        middle = (grid[1:] + grid[:-1]) / 2
        mass = (self.tilt(middle) - 0.5 * middle.square()).softmax(0)
        cell = multinomial(mass, n, generator=generator)
        u = middle[cell] + (noise(middle.new_empty(n), generator, kind=torch.rand) - 0.5) * (grid[1] - grid[0])
        x = noise(w.new_empty(n, len(w)), generator)
        return x + (u.to(x) - x @ w).unsqueeze(-1) * w

    def score(self, x: Float[Tensor, "*batch d"], t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        """At times t > 0, (*batch), by quadrature along w: Mehler's formula in one dimension."""
        alpha, s = (over(level, x) for level in _levels(t.to(x)))
        w, nodes = self.direction.to(x), self.nodes.to(x)
        u = alpha * (x @ w).unsqueeze(-1) + s * nodes
        weight = (self.tilt(u) - 0.5 * nodes.square()).softmax(-1)
        pull = (weight * nodes).sum(-1, keepdim=True)
        return alpha / s * pull * w - x

    def denoise(self, x: Float[Tensor, "*batch d"], sigma: Tensor | float) -> Float[Tensor, "*batch d"]:
        """E[x_0 | x_0 + sigma noise = x]; t is where sigma = s / e^-t."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        level = level.expand(x.shape[:-1])
        alpha = over((1 + level.square()).rsqrt(), x)
        score = alpha * self.score(alpha * x, 0.5 * level.square().log1p())
        return x + over(level, x).square() * score


def _levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """e^-t and sqrt(1 - e^-2t)."""
    return (-t).exp(), (-(-2 * t).expm1()).sqrt()
