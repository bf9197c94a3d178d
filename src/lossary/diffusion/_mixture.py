"""A Gaussian mixture: at every noise level its score, posterior mean and log-density are known exactly.

Whatever denoises, samples, guides or distils is checked against it before any network comes in.
"""

import math

import torch
from torch import Generator, Tensor

from lossary.diffusion._discrete import multinomial
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over


class Mixture:
    """sum_k weight_k N(mean_k, scale_k^2 I), in any dimension.

    Args:
        means: (K, D).
        scales: standard deviations (K,), or one for all.
        weights: (K,), positive, of any sum; None for equal ones.
    """

    def __init__(self, means: Tensor, scales: Tensor | float, weights: Tensor | None = None) -> None:
        self.means = means
        self.scales = torch.as_tensor(scales, dtype=means.dtype, device=means.device).expand(len(means))
        self.weights = torch.ones_like(self.scales) if weights is None else weights.to(means)
        self.weights = self.weights / self.weights.sum()

    def sample(self, n: int, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """n points (n, D) and their components (n,)."""
        component = multinomial(self.weights, n, generator=generator)
        around = noise(self.means.new_empty(n, self.means.shape[1]), generator)
        return self.means[component] + self.scales[component, None] * around, component

    def component(self, c: int) -> "Mixture":
        """The Gaussian of one component: what a perfect condition leaves."""
        return Mixture(self.means[c : c + 1], self.scales[c : c + 1])

    def _log_joint(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """log weight_k N(x; mean_k, v_k) and v_k = scale_k^2 + sigma^2, both (*batch, K)."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        variance = self.scales.to(x) ** 2 + over(level, x) ** 2  # (*batch or 1, K)
        square = (x[..., None, :] - self.means.to(x)).square().sum(-1)
        dimension = x.shape[-1]
        log = -0.5 * square / variance - 0.5 * dimension * (2 * math.pi * variance).log()
        return log + self.weights.to(x).log(), variance.expand_as(square)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma at x (*batch, D), of the mixture with noise of standard deviation sigma: (*batch,)."""
        return self._log_joint(x, sigma)[0].logsumexp(-1)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """p(component | x), (*batch, K)."""
        return self._log_joint(x, sigma)[0].softmax(-1)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x_0 | x_0 + sigma noise = x], of the shape of x (*batch, D)."""
        log, variance = self._log_joint(x, sigma)
        shrink = (self.scales.to(x) ** 2 / variance)[..., None]
        centre = self.means.to(x) + shrink * (x[..., None, :] - self.means.to(x))
        return (log.softmax(-1)[..., None] * centre).sum(-2)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """grad log p_sigma(x), of the shape of x."""
        log, variance = self._log_joint(x, sigma)
        pull = (self.means.to(x) - x[..., None, :]) / variance[..., None]
        return (log.softmax(-1)[..., None] * pull).sum(-2)


def ring(modes: int = 8, *, radius: float = 4.0, scale: float = 0.3, weights: Tensor | None = None) -> Mixture:
    """Gaussians evenly on a circle in the plane."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], dim=1), scale, weights)
