"""Samplers: s(denoise, x, sigmas, *, generator) -> x_0, from x of noise level sigmas[0] down to sigmas[-1].

x is data plus noise (see `_denoiser`), drawn as sigmas[0] * noise, and sigmas (n + 1,) fall; the last may be 0. Each
says how many evaluations of the network it takes. The arithmetic is that of x, so a network in bfloat16 costs no
precision here.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Generator, Tensor

from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import noise
from lossary.diffusion._process import Process


def karras_sigmas(steps: int, *, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) float64, from high to low evenly in sigma^(1 / rho), then 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return torch.cat([(first + ramp * (last - first)) ** rho, torch.zeros(1, dtype=torch.float64)])


def process_sigmas(process: Process, steps: int, *, first: float = 1.0, last: float = 0.0) -> Tensor:
    """(steps + 1,) float64: sigma / alpha at evenly spaced times from `first` to `last`.

    Where alpha is 0 at the first time, as at the end of a flow, start a little before it.
    """
    sigmas = process.ratio(torch.linspace(first, last, steps + 1, dtype=torch.float64))
    if not bool(sigmas.isfinite().all()):
        raise ValueError(f"first: sigma / alpha is infinite at time {first:g}; start a little before it")
    return sigmas


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Tensor:
    """The probability-flow ODE by Euler's method, which is DDIM: n evaluations, error of order 1 / n."""
    for sigma, lower in _steps(sigmas):
        x = x + (x - denoise(x, sigma)) * ((lower - sigma) / sigma)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Tensor:
    """The same ODE by Heun's method: 2n evaluations, one fewer where the last sigma is 0; error of order 1 / n^2."""
    for sigma, lower in _steps(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (lower - sigma)
        if lower > 0:
            slope = (slope + (ahead - denoise(ahead, lower)) / lower) / 2
            ahead = x + slope * (lower - sigma)
        x = ahead
    return x


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None, eta: float = 1.0
) -> Tensor:
    """DDPM's posterior steps at eta = 1, DDIM at eta = 0: n evaluations."""
    for sigma, lower in _steps(sigmas):
        up = min(lower, eta * lower * math.sqrt(max(0.0, 1 - (lower / sigma) ** 2)))
        down = math.sqrt(lower**2 - up**2)
        clean = denoise(x, sigma)
        x = clean + (x - clean) * (down / sigma)
        if up > 0:
            x = x + up * noise(x, generator)
    return x


def dpm_solver_pp(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Tensor:
    """DPM-Solver++(2M), the ODE in log sigma with x_0 extrapolated: n evaluations, error of order 1 / n^2."""
    before, last = None, 0.0
    for sigma, lower in _steps(sigmas):
        clean = denoise(x, sigma)
        if lower == 0:
            return clean
        step = math.log(sigma / lower)
        ahead = clean if before is None else clean + (clean - before) * (step / (2 * last))
        x = (lower / sigma) * x - math.expm1(-step) * ahead
        before, last = clean, step
    return x


def sde(denoise: Denoise, x: Tensor, sigmas: Tensor, *, generator: Generator | None = None) -> Tensor:
    """The reverse SDE by Euler and Maruyama: dx = (sigma^2 - lower^2) score + noise of that variance; n evaluations."""
    for sigma, lower in _steps(sigmas):
        share = 1 - (lower / sigma) ** 2
        x = x + share * (denoise(x, sigma) - x)
        if lower > 0:
            x = x + sigma * math.sqrt(share) * noise(x, generator)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generator | None = None,
    corrections: int = 1,
    step_size: float = 0.1,
) -> Tensor:
    """`sde` with Langevin steps of size step_size sigma^2 at each new level: n (1 + corrections) evaluations."""
    for sigma, lower in _steps(sigmas):
        x = sde(denoise, x, torch.tensor([sigma, lower], dtype=torch.float64), generator=generator)
        for _ in range(corrections if lower > 0 else 0):
            x = x + step_size * (denoise(x, lower) - x)
            x = x + lower * math.sqrt(2 * step_size) * noise(x, generator)
    return x


def _steps(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    levels = sigmas.tolist()
    if sigmas.ndim != 1 or len(levels) < 2 or levels[-1] < 0 or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas: expected at least two falling values, none below 0, got {_shown(levels)}")
    return pairwise(levels)


def _shown(levels: object) -> str:
    text = str(levels)
    return text if len(text) < 60 else text[:57] + "..."
