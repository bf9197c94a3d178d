"""Active diffusion subsampling: let the samples of a posterior say where to measure next.

While a group of particles is denoised together under the measurements so far, those places are measured on which the
particles disagree most: the entropy of a Gaussian mixture around them bounds what is still unknown. One run of one
unconditional model therefore both chooses the measurements and reconstructs, for any budget. For inpainting,
columns or lines of k-space, where each measurement costs; with a budget near the number of places, a fixed pattern
does as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.paper import Paper

PAPER = Paper(
    title="Active Diffusion Subsampling",
    year=2024,
    helps=("inverse-problems",),
    departs=(
        "particles disagree by the official code's score, exp(+d), by default; the entropy's bound has exp(-d)",
        "no overwriting of what was measured at the end (the code's hard consistency, for MRI); what was measured is"
        " returned",
        "measurements are evenly spaced from the window's start; the code takes multiples of the spacing",
    ),
    equation=(
        r"\ell^*=\arg\max_\ell\sum_i\log\sum_j\exp\frac{\pm\lVert\hat y^{(i)}_\ell-\hat y^{(j)}_\ell\rVert^2}"
        r"{2\varsigma^2},\qquad x_{t-1}=\alpha'\hat x_0+\sigma'\hat\varepsilon"
        r"-\omega\nabla_{x_t}\lVert y-\hat y\rVert,\quad\hat y=A\hat x_0"
    ),
    url="https://github.com/active-diffusion-subsampling/ads",
)

Kernel = Literal["positive", "negative"]


@dataclass(frozen=True)
class _Acquired:
    """What an active run leaves.

    Attributes:
        particles: (*problems, particles, *data), samples of the posterior.
        order: (*problems, measurements), the places in the order in which they were measured.
        values: (*problems, places, channels), what was measured, 0 elsewhere.
        measured: (*problems, places), where.
    """

    particles: Tensor
    order: Int[Tensor, "*problems measurements"]
    values: Float[Tensor, "*problems places channels"]
    measured: Bool[Tensor, "*problems places"]


def max_entropy_acquisition(
    particles: Float[Tensor, "*problems particles places channels"],
    measured: Bool[Tensor, "*problems places"],
    *,
    sigma: float = 10.0,
    kernel: Kernel = "positive",
) -> Int[Tensor, "*problems"]:
    """The place not yet measured that scores sum_i log sum_j exp(+-d_ij / (2 sigma^2)) highest, minus that if negative.

    d_ij is the squared distance of particles i and j there. For large sigma either is the place where the particles
    vary most; for a small one "positive" follows the two that are farthest apart, "negative" counts the clusters.
    Where all places are measured it is -1.

    Args:
        particles: their predicted measurements.
        measured: places that are out of the question.
        sigma: width > 0; 10 for pixels between -1 and 1 in the paper, 50 for k-space.
        kernel: see above.

    Raises:
        ValueError: shapes that do not fit, sigma not above 0, another kernel.

    >>> particles = torch.tensor([[[0.0], [1.0], [5.0]], [[0.0], [2.0], [9.0]]])  # 2 particles, 3 places
    >>> max_entropy_acquisition(particles, torch.tensor([False, False, True]))
    tensor(1)
    """
    require.floating("particles", particles, at_least_dims=3)
    require.number("sigma", sigma, above=0.0)
    require.one_of("kernel", kernel, get_args(Kernel))
    wanted = (*particles.shape[:-3], particles.shape[-2])
    if measured.dtype is not torch.bool or tuple(measured.shape) != wanted:
        raise ValueError(f"measured: expected bool of shape {wanted}, got {measured.dtype} {tuple(measured.shape)}")
    square = (particles.unsqueeze(-3) - particles.unsqueeze(-4)).square().sum(-1)  # (*problems, i, j, places)
    sign = 1.0 if kernel == "positive" else -1.0
    score = sign * (sign * square.double() / (2 * sigma**2)).logsumexp(-2).sum(-2)
    best = score.masked_fill(measured, -torch.inf).argmax(-1)
    return torch.where(measured.all(-1), -1, best)


def dps_step(
    denoise: Denoise,
    x: Tensor,
    sigma: float,
    lower: float,
    error: Callable[[Tensor], Tensor],
    *,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A deterministic step to a lower level, pulled along the gradient of the length of the residual: (x, x_0).

    The pull is `weight` times the gradient for a variance-preserving network, where alpha^2 = 1 / (1 + sigma^2).

    Args:
        denoise: denoise(x, sigma) -> x_0, through which the gradient goes.
        x: of noise level sigma.
        sigma, lower: levels, lower < sigma.
        error: of x_0, the squared length of the residual y - A x_0 of each problem, any shape.
        weight: omega; 1 in the paper for pixels.

    Raises:
        ValueError: levels or a weight out of range.

    >>> x, x_0 = dps_step(lambda x, sigma: x / 2, torch.tensor([8.0]), 1.0, 0.0, lambda x_0: (x_0 - 1).square())
    >>> x_0, x  # 4 - sqrt(2) / 2
    (tensor([4.]), tensor([3.2929]))
    """
    require.number("sigma", sigma, above=0.0)
    require.number("lower", lower, at_least=0.0, below=sigma)
    require.number("weight", weight, at_least=0.0)
    with torch.enable_grad():
        here = x.detach().requires_grad_()
        clean = denoise(here, sigma)
        length = _root(error(clean))
        slope = torch.autograd.grad(length.sum(), here, allow_unused=True)[0] if length.requires_grad else None
    clean = clean.detach()
    ahead = clean + (x - clean) * (lower / sigma)
    if slope is not None:
        ahead = ahead - weight * math.sqrt((1 + sigma**2) * (1 + lower**2)) * slope
    return ahead, clean


@dataclass(frozen=True)
class ActiveDiffusionSampler:
    """Chooses measurements and samples what they leave open, in one evaluation of the network for each step.

    Args:
        measure: x_0 (*batch, *data) -> (*batch, places, channels), noiseless: pixels, columns, a Fourier transform
            with real and imaginary part as channels.
        budget: number of measurements to choose, 0 for none.
        window: shares of the steps between which to measure.
        weight: omega, of the pull towards the measurements.
        sigma, kernel: of `max_entropy_acquisition`.
        data_dims: how many trailing dimensions make one sample; None is all but the first, the particles'.

    Raises:
        ValueError: numbers out of range; a budget beyond the places or the steps of the window.

    >>> sampler = ActiveDiffusionSampler(lambda x: x.unsqueeze(-1), budget=1)
    >>> wide, truth = torch.tensor([0.1, 3.0]), torch.tensor([0.0, 1.0])  # data N(0, diag(wide^2))
    >>> found = sampler(
    ...     lambda x, sigma: x * wide**2 / (wide**2 + sigma**2),
    ...     20 * torch.randn(8, 2),
    ...     torch.tensor([20.0, 5.0, 1.0, 0.2, 0.0]),
    ...     lambda place: truth[place].unsqueeze(-1),
    ... )
    >>> found.order
    tensor([1])
    """

    measure: Callable[[Tensor], Tensor]
    budget: int
    window: tuple[float, float] = (0.0, 0.8)
    weight: float = 1.0
    sigma: float = 10.0
    kernel: Kernel = "positive"
    data_dims: int | None = None

    def __post_init__(self) -> None:
        require.whole("budget", self.budget)
        require.number("weight", self.weight, at_least=0.0)
        require.number("sigma", self.sigma, above=0.0)
        require.one_of("kernel", self.kernel, get_args(Kernel))
        require.number("window[0]", self.window[0], at_least=0.0, below=self.window[1])
        require.number("window[1]", self.window[1], at_most=1.0)

    def __call__(
        self,
        denoise: Denoise,
        x: Float[Tensor, "*problems_particles_and_data"],
        sigmas: Float[Tensor, " levels"],
        observe: Callable[[Int[Tensor, "*problems"]], Float[Tensor, "*problems channels"]],
        *,
        initial: Int[Tensor, "*problems given"] | None = None,
    ) -> _Acquired:
        """Run from noise of level sigmas[0].

        Args:
            denoise: denoise(x, sigma) -> x_0.
            x: the noise, particles being the dimension before the data.
            sigmas: falling; the last may be 0.
            observe: measures one place of each problem.
            initial: places that are measured before the first step.

        Raises:
            ValueError: see the class.
        """
        require.floating("x", x, at_least_dims=2)
        dims = x.ndim - 1 if self.data_dims is None else self.data_dims
        require.whole("data_dims", dims, at_least=1, at_most=x.ndim - 1)
        problems = x.shape[: -dims - 1]
        with torch.no_grad():
            places, channels = self.measure(x).shape[-2:]
        measured = torch.zeros(*problems, places, dtype=torch.bool, device=x.device)
        values = x.new_zeros(*problems, places, channels)
        order: list[Tensor] = []

        def add(place: Tensor) -> None:
            nonlocal measured, values
            at = place[..., None]
            measured = measured.scatter(-1, at, True)
            values = values.scatter(-2, at[..., None].expand(*at.shape, channels), observe(place).to(x).unsqueeze(-2))
            order.append(place)

        def error(clean: Tensor) -> Tensor:
            residual = (self.measure(clean) - values.unsqueeze(-3)) * measured[..., None, :, None]
            return residual.square().flatten(len(problems)).sum(-1)

        for k in range(0 if initial is None else initial.shape[-1]):
            add(initial[..., k])  # type: ignore[index]
        moments = self._moments(len(sigmas) - 1)
        if self.budget + len(order) > places:
            raise ValueError(f"budget: expected at most {places - len(order)} more places, got {self.budget}")
        clean = x
        for step, (sigma, lower) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist())):
            x, clean = dps_step(denoise, x, sigma, lower, error, weight=self.weight)
            if step in moments:
                guess = self.measure(clean)
                add(max_entropy_acquisition(guess, measured, sigma=self.sigma, kernel=self.kernel))
        return _Acquired(clean, torch.stack(order, -1) if order else x.new_zeros(*problems, 0).long(), values, measured)

    def _moments(self, steps: int) -> range:
        start, stop = (round(share * steps) for share in self.window)
        if self.budget > stop - start:
            raise ValueError(f"budget: expected at most {stop - start} for {steps} steps, got {self.budget}")
        spacing = max(1, (stop - start) // max(1, self.budget))
        return range(start, start + spacing * self.budget, spacing)


def _root(square: Tensor) -> Tensor:
    """Its gradient at 0 is 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
