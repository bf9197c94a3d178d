"""Log-variance loss: train a diffusion to sample from an unnormalised density, without differentiating its paths.

A controlled diffusion samples a density rho if the ratio of its path's probability to that of the path reweighted by
rho is the same for all paths. The reverse KL divergence takes the mean log-ratio, through the simulation, and likes
to settle on a few modes; the log-variance takes the variance of the log-ratio over a batch of paths, which may come
from anywhere, so that they are constants: less memory, a gradient without noise at the optimum, fewer lost modes.
For densities that can be evaluated but not sampled; where there are samples, train a denoiser instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._noise import Randomness, noise
from lossary.paper import Paper

PAPER = Paper(
    title="Improved sampling via learned diffusions",
    year=2023,
    helps=("density-estimation", "rare-modes"),
    departs=(
        "two of the paper's settings: Brownian from a point (PIS) and Ornstein-Uhlenbeck that stays put (DDS); the"
        " time-reversed one (DIS) and general bridges with a second control are left out",
        "the Ornstein-Uhlenbeck one starts and stays at the law that its Euler-Maruyama steps keep, so that exp(-R) is"
        " unbiased for the normalising constant with any number of steps",
        "KL is without the Ito integral, as in the official code's 'kl'",
        "no filtering of paths with large ratios",
    ),
    equation=(
        r"\mathcal L_{\mathrm{LV}}=\operatorname{Var}\Bigl[\int\!\bigl(u\cdot v-\tfrac12\lVert u\rVert^2\bigr)dt"
        r"+\int\! u\cdot dW+\log\frac{p_{\mathrm{ref}}(X_T)}{\rho(X_T)}\Bigr],\qquad dX=(f+\sigma v)\,dt+\sigma\,dW"
    ),
    url="https://arxiv.org/abs/2307.01198",
)

Control = Callable[[Tensor, Tensor], Tensor]
"""control(x (*batch, D), t, a number as a tensor) -> u (*batch, D)."""

Divergence = Literal["log_variance", "kl"]


@dataclass(frozen=True)
class _Paths:
    """What became of a batch of paths, each field with its leading dimensions.

    Attributes:
        x: (*batch, D), where they end.
        log_ratio: R (*batch), log of the path's probability over that of the reweighted reference.
        ito: (*batch), the integral of u dW within R, of mean 0.
    """

    x: Tensor
    log_ratio: Tensor
    ito: Tensor


@dataclass(frozen=True)
class ControlledSDE:
    """dX = (-rate X + scale u(X, t)) dt + scale dW from time 0 to `horizon`, in Euler-Maruyama steps.

    With rate 0 paths start at the origin and end, without control, in N(0, scale^2 horizon I); with a rate above 0
    they start, and without control stay, in a Gaussian of variance about scale^2 / (2 rate).

    Args:
        scale: sigma > 0.
        horizon: T > 0.
        rate: beta >= 0, beta T / steps below 1.
        steps: number of steps, one evaluation of the control each.

    Raises:
        ValueError: a number out of range.

    >>> ControlledSDE(scale=0.5, horizon=4.0).reference_variance, ControlledSDE(rate=0.5).reference_variance
    (1.0, 1.002506265664160...)
    """

    scale: float = 1.0
    horizon: float = 1.0
    rate: float = 0.0
    steps: int = 100

    def __post_init__(self) -> None:
        require.number("scale", self.scale, above=0.0)
        require.number("horizon", self.horizon, above=0.0)
        require.whole("steps", self.steps, at_least=1)
        require.number("rate", self.rate, at_least=0.0, below=self.steps / self.horizon)

    @property
    def reference_variance(self) -> float:
        """Of each coordinate at the end without control, exact for the discrete steps."""
        if not self.rate:
            return self.scale**2 * self.horizon
        return self.scale**2 / (2 * self.rate - self.rate**2 * self.horizon / self.steps)

    def paths(
        self,
        control: Control,
        log_density: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        *,
        follow: Control | None = None,
        generator: Randomness = None,
        like: Tensor | None = None,
    ) -> _Paths:
        """Simulate and weigh a batch of paths.

        Args:
            control: u, whose log-ratio it is.
            log_density: (*batch, D) -> (*batch), log rho up to a constant.
            shape: (*replicas, batch, D).
            follow: v, which steers the paths, taken as constants; None steers by u, differentiably.
            generator: of starts and increments; a sequence has one for each replica.
            like: its dtype and device are those of the paths; default float32 on the CPU.
        """
        like = torch.empty(0) if like is None else like
        blank = like.new_empty(shape)
        x = noise(blank, generator) * math.sqrt(self.reference_variance) if self.rate else torch.zeros_like(blank)
        dt = self.horizon / self.steps
        running, ito = blank.new_zeros(shape[:-1]), blank.new_zeros(shape[:-1])
        for step in range(self.steps):
            t = torch.tensor(step * dt, dtype=x.dtype, device=x.device)
            u = control(x, t)
            if follow is None:
                v = u
            else:
                with torch.no_grad():
                    v = u if follow is control else follow(x, t)
                v = v.detach()
            dw = math.sqrt(dt) * noise(blank, generator)
            running = running + ((u * v).sum(-1) - u.square().sum(-1) / 2) * dt
            ito = ito + (u * dw).sum(-1)
            x = x + (self.scale * v - self.rate * x) * dt + self.scale * dw
        variance = self.reference_variance
        reference = -0.5 * (x.square().sum(-1) / variance + shape[-1] * math.log(2 * math.pi * variance))
        return _Paths(x, running + ito + reference - log_density(x), ito)


def log_variance_loss(log_ratio: Float[Tensor, "*replicas batch"]) -> Float[Tensor, "*replicas batch"]:
    """Squared deviations of the log-ratios from their batch's mean, whose mean is their unbiased variance.

    Args:
        log_ratio: of two paths or more, which were simulated as constants.

    Raises:
        ValueError: fewer than two paths.

    >>> log_variance_loss(torch.tensor([1.0, 3.0]))
    tensor([2., 2.])
    """
    require.floating("log_ratio", log_ratio, at_least_dims=1)
    n = log_ratio.shape[-1]
    if n < 2:
        raise ValueError(f"log_ratio: expected at least 2 paths, got {n}")
    return (log_ratio - log_ratio.mean(-1, keepdim=True)).square() * (n / (n - 1))


class PathIntegralSampler(nn.Module):
    """A control with its diffusion, trained by `loss` to sample the density.

    Args:
        control: u, called as control(x, t); usually a network beside the density's own score.
        log_density: (*batch, D) -> (*batch), log rho up to a constant.
        sde: the diffusion.

    >>> sde = ControlledSDE(steps=10)  # what Brownian motion reaches by itself needs no control
    >>> sampler = PathIntegralSampler(lambda x, t: 0 * x, lambda x: -0.5 * x.square().sum(-1), sde)
    >>> sampler.log_normaliser((100, 2), generator=torch.Generator().manual_seed(0))  # log 2 pi
    tensor(1.8379)
    """

    def __init__(self, control: Control, log_density: Callable[[Tensor], Tensor], sde: ControlledSDE) -> None:
        super().__init__()
        self.control, self.log_density, self.sde = control, log_density, sde

    def loss(
        self,
        shape: tuple[int, ...],
        *,
        divergence: Divergence = "log_variance",
        generator: Randomness = None,
        like: Tensor | None = None,
    ) -> Float[Tensor, "*replicas batch"]:
        """A value for each path, whose batch mean is the divergence up to a constant.

        Args:
            shape: (*replicas, batch, D).
            divergence: "log_variance", or "kl", which differentiates through the simulation.
            generator, like: see `ControlledSDE.paths`.

        Raises:
            ValueError: another divergence, or fewer than two paths for the log-variance.
        """
        require.one_of("divergence", divergence, get_args(Divergence))
        follow = self.control if divergence == "log_variance" else None
        found = self.sde.paths(self.control, self.log_density, shape, follow=follow, generator=generator, like=like)
        return log_variance_loss(found.log_ratio) if follow else found.log_ratio - found.ito

    @torch.no_grad()
    def forward(self, shape: tuple[int, ...], *, generator: Randomness = None, like: Tensor | None = None) -> Tensor:
        """Samples of that shape, `sde.steps` evaluations of the control."""
        return self.sde.paths(self.control, self.log_density, shape, generator=generator, like=like).x

    @torch.no_grad()
    def log_normaliser(
        self, shape: tuple[int, ...], *, generator: Randomness = None, like: Tensor | None = None
    ) -> Float[Tensor, "*replicas"]:
        """log of the mean of exp(-R) over the batch, unbiased before the logarithm whatever the control."""
        found = self.sde.paths(self.control, self.log_density, shape, generator=generator, like=like)
        return (-found.log_ratio).logsumexp(-1) - math.log(shape[-2])
