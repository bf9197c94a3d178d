"""How data become noise: x_t = alpha(t) x_0 + sigma(t) noise, and for some processes + end_weight(t) x_1.

Time runs from 0, data, to 1, noise, if not said otherwise. Samplers do not see alpha: they work on x_t / alpha(t),
which is data plus noise of standard deviation `ratio` = sigma / alpha, so one sampler serves every process.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Process:
    """alpha and sigma as functions of time, and the time at which sigma / alpha has a value.

    Attributes:
        alpha, sigma: (*batch) times to factors of data and of noise.
        time: (*batch) ratios sigma / alpha to times.
        end_weight: factor of a second end point, such as a degraded image; None where there is none.
    """

    alpha: Schedule
    sigma: Schedule
    time: Schedule
    end_weight: Schedule | None = None

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha, the noise level that samplers see."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def rates(self, t: Tensor) -> tuple[Tensor, ...]:
        """d alpha / dt, d sigma / dt and, where there is a second end point, d end_weight / dt."""
        schedules = [f for f in (self.alpha, self.sigma, self.end_weight) if f is not None]
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            return tuple(torch.autograd.grad((f(t) + 0 * t).sum(), t)[0] for f in schedules)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor, end: Tensor | None = None) -> Tensor:
        """x_t, of the shape of `clean`; t has its leading dimensions."""
        return self.ended(over(self.alpha(t), clean) * clean + over(self.sigma(t), clean) * noise, t, end)

    def ended(self, x: Tensor, t: Tensor, end: Tensor | None) -> Tensor:
        """x + end_weight end where the process has a second end point, else x."""
        if (end is None) != (self.end_weight is None):
            raise ValueError(f"end: this process has {'no' if self.end_weight is None else 'a'} second end point")
        return x if end is None or self.end_weight is None else x + over(self.end_weight(t), x) * end


def over(values: Tensor, like: Tensor) -> Tensor:
    """Values of the leading dimensions, with ones behind so that they broadcast over the rest of `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def variance_preserving(low: float = 0.1, high: float = 20.0) -> Process:
    """beta(t) = low + t (high - low), log alpha = -1/2 int beta, sigma^2 = 1 - alpha^2."""

    def log_alpha(t: Tensor) -> Tensor:
        return -0.25 * (high - low) * t**2 - 0.5 * low * t

    def time(ratio: Tensor) -> Tensor:
        area = ratio.square().log1p()  # int beta = -2 log alpha
        return 2 * area / (low + (low**2 + 2 * (high - low) * area).sqrt())

    return Process(lambda t: log_alpha(t).exp(), lambda t: (-(2 * log_alpha(t)).expm1()).sqrt(), time)


def cosine() -> Process:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    quarter = math.pi / 2
    return Process(lambda t: (quarter * t).cos(), lambda t: (quarter * t).sin(), lambda ratio: ratio.atan() / quarter)


def variance_exploding(low: float = 0.002, high: float = 80.0) -> Process:
    """alpha = 1, sigma = low (high / low)^t."""
    span = math.log(high / low)
    return Process(torch.ones_like, lambda t: low * (span * t).exp(), lambda ratio: (ratio / low).log() / span)


def plain() -> Process:
    """alpha = 1, sigma = t: time is the noise level itself."""
    return Process(torch.ones_like, lambda t: t, lambda ratio: ratio)


def flow() -> Process:
    """alpha = 1 - t, sigma = t: straight lines from data to noise, with velocity noise - data."""
    return Process(lambda t: 1 - t, lambda t: t, lambda ratio: ratio / (1 + ratio))


def tabulated(alphas_cumprod: Tensor) -> Process:
    """alpha^2 at the steps 0, 1, ..., T - 1 of a trained model; time is the step.

    Between the steps log(sigma / alpha) is linear in time. Before step 0 and after T - 1 alpha and sigma go on along
    the same lines; noise levels outside the table, 0 and infinity among them, are met at the nearest end, 0 or T - 1.

    Args:
        alphas_cumprod: (T,), T >= 2, falling, strictly between 0 and 1. At alpha 0 the noise level is infinite: a
            table that ends in pure noise needs something small there, such as 2**-24.

    Raises:
        ValueError: another shape or other values.
    """
    table = alphas_cumprod.double()
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"alphas_cumprod: expected shape (T,) with T >= 2, got {tuple(table.shape)}")
    ratios = ((1 - table) / table).sqrt().log()
    outside = table[~ratios.isfinite()].tolist()
    if outside:
        raise ValueError(
            f"alphas_cumprod: expected values strictly between 0 and 1, got {outside[0]:g};"
            " in the place of a 0 at the end put something small, such as 2**-24"
        )
    rises = (ratios.diff() <= 0).nonzero().flatten().tolist()
    if rises:
        here, after = table[rises[0]], table[rises[0] + 1]
        raise ValueError(
            f"alphas_cumprod: expected falling values, got {here:g} and then {after:g};"
            " the table is the product of 1 - beta over the steps up to each"
        )

    def log_ratio(t: Tensor) -> Tensor:
        grid = ratios.to(t.device)
        left = t.detach().floor().long().clamp(0, len(grid) - 2)
        return (grid[left] + (t - left) * (grid[left + 1] - grid[left])).to(t.dtype)

    def time(ratio: Tensor) -> Tensor:
        grid, value = ratios.to(ratio.device), ratio.double().log()
        left = (torch.searchsorted(grid, value.contiguous()) - 1).clamp(0, len(grid) - 2)
        step = left + (value - grid[left]) / (grid[left + 1] - grid[left])
        return step.clamp(0, len(grid) - 1).to(ratio.dtype)

    return Process(
        lambda t: torch.sigmoid(-2 * log_ratio(t)).sqrt(), lambda t: torch.sigmoid(2 * log_ratio(t)).sqrt(), time
    )


def bridge(scale: float = 1.0) -> Process:
    """Brownian bridge from data to an end point: (1 - t) x_0 + t x_1 + scale sqrt(t (1 - t)) noise."""

    def time(ratio: Tensor) -> Tensor:
        square = (ratio / scale).square()
        return square / (1 + square)

    return Process(lambda t: 1 - t, lambda t: scale * (t * (1 - t)).sqrt(), time, end_weight=lambda t: t)


def mean_reverting(rate: float = 5.0, noise: float = 1.0) -> Process:
    """Ornstein-Uhlenbeck: alpha = exp(-rate t), end weight 1 - alpha, sigma = noise sqrt(1 - alpha^2)."""
    return Process(
        lambda t: (-rate * t).exp(),
        lambda t: noise * (-(-2 * rate * t).expm1()).sqrt(),
        lambda ratio: (ratio / noise).square().log1p() / (2 * rate),
        end_weight=lambda t: -(-rate * t).expm1(),
    )
