"""Minimax rates of diffusion: how fast the generated law can near the truth, and a diffusion that does so.

Over densities with s derivatives in d dimensions no estimator's total variation error falls faster than
n^(-s / (2 s + d)); a diffusion whose score is learned from n samples and stopped in time reaches it up to logarithms.
The regularisation is the point: the score of the samples themselves, followed to the end, only gives them back. Here
are the exponents, the fit of one to measured errors, and a closed-form estimator: the exact score of the samples
smoothed by a bandwidth that shrinks at the right rate, which shows what early stopping at that noise does.
"""

from typing import Literal, Self

from jaxtyping import Float
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._noise import noise
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.paper import Paper

PAPER = Paper(
    title="Diffusion Models are Minimax Optimal Distribution Estimators",
    year=2023,
    helps=("density-estimation",),
    departs=(
        "the score is that of the kernel-smoothed samples instead of a network fitted to them",
        "a Gaussian kernel, so no rate beyond two derivatives",
        "densities may vanish; the paper bounds them below on a cube",
        "logarithms and the delta lost in W1 are left out of the exponents",
    ),
    equation=(
        r"\mathbb E\,\mathrm{TV}(\hat p,p)\lesssim n^{-\frac{s}{2s+d}},\qquad "
        r"\mathbb E\,W_1(\hat p,p)\lesssim n^{-\frac{s+1-\delta}{2s+d}}"
    ),
    url="https://arxiv.org/abs/2303.01861",
)


def minimax_exponent(smoothness: float, dimension: int, *, distance: Literal["tv", "w1"] = "tv") -> float:
    """r of the best rate n^-r: s / (2 s + d) in total variation, (s + 1) / (2 s + d) in W1, never above 1 / 2.

    Args:
        smoothness: s > 0, derivatives of the density (in L1).
        dimension: d >= 1; for data on a plane that of the plane (theorem 6).
        distance: "tv" or "w1".

    Raises:
        ValueError: an argument out of range.

    >>> minimax_exponent(2, 1), minimax_exponent(2, 16), minimax_exponent(2, 16, distance="w1")
    (0.4, 0.1, 0.15)
    """
    require.number("smoothness", smoothness, above=0.0)
    require.whole("dimension", dimension, at_least=1)
    require.one_of("distance", distance, ("tv", "w1"))
    return min(0.5, (smoothness + (distance == "w1")) / (2 * smoothness + dimension))


def empirical_rate(sizes: Float[Tensor, " levels"], errors: Float[Tensor, "*batch levels"]) -> Float[Tensor, "*batch"]:
    """r of errors proportional to sizes^-r, by least squares of their logarithms.

    Args:
        sizes: sample sizes, at least two different ones, above 0.
        errors: measured at each, above 0.

    Raises:
        ValueError: shapes that do not fit.

    >>> import torch
    >>> empirical_rate(torch.tensor([10.0, 100.0, 1000.0]), torch.tensor([8.0, 4.0, 2.0])).item()
    0.30103...
    """
    require.floating("sizes", sizes, dims=1)
    require.floating("errors", errors, at_least_dims=1)
    if len(sizes) < 2 or errors.shape[-1] != len(sizes):
        raise ValueError(f"errors: expected (..., {len(sizes)}) and two sizes or more, got {tuple(errors.shape)}")
    at = sizes.log() - sizes.log().mean()
    return -(errors.log() * at).sum(-1) / at.square().sum()


class KernelScoreDiffusion:
    """A diffusion model without training: the exact score of the samples smoothed at bandwidth c n^(-1 / (2 s + d)).

    Its probability flow ends at that smoothed law. Adding noise smooths as well, so it is also the law of the samples'
    own score, stopped at noise equal to the bandwidth.

    Args:
        smoothness: s > 0 of the density, at most 2 with effect.
        constant: c >= 0, in standard deviations of the data; 0 memorises the samples.

    Attributes:
        law_: after `fit`, the smoothed law, a mixture with one Gaussian for each sample.
        bandwidth_: its standard deviation.

    Raises:
        ValueError: an argument out of range, data of a wrong shape, or use before `fit`.

    >>> import torch
    >>> x = torch.linspace(-1.5, 1.5, 64)[:, None]
    >>> round(KernelScoreDiffusion(2.5).fit(x).bandwidth_, 4)  # 64^(-1/6) of the standard deviation, times 0.5
    0.2217
    """

    def __init__(self, smoothness: float = 2.0, *, constant: float = 0.5) -> None:
        require.number("smoothness", smoothness, above=0.0)
        require.number("constant", constant, at_least=0.0)
        self.smoothness, self.constant = smoothness, constant

    def fit(self, x: Float[Tensor, "n d"]) -> Self:
        """Keep the samples, n >= 2 of them."""
        require.floating("x", x, dims=2)
        if len(x) < 2:
            raise ValueError(f"x: expected at least 2 samples, got {len(x)}")
        spread = x.var(0).mean().sqrt().item()
        self.bandwidth_ = self.constant * spread * len(x) ** (-1 / (2 * self.smoothness + x.shape[1]))
        self.law_ = Mixture(x, self.bandwidth_)
        return self

    def denoise(self, x: Float[Tensor, "*batch d"], sigma: Tensor | float) -> Float[Tensor, "*batch d"]:
        """E[x_0 | x_0 + sigma noise = x] under the smoothed law, for any sampler."""
        return self._law().denoise(x, sigma)

    def log_density(self, x: Float[Tensor, "*batch d"], sigma: Tensor | float = 0.0) -> Float[Tensor, "*batch"]:
        """Of the smoothed law with noise sigma added; at 0 of what is generated."""
        return self._law().log_density(x, sigma)

    def sample(self, n: int, *, steps: int = 40, generator: Generator | None = None) -> Float[Tensor, "n d"]:
        """n points by Heun's method, 2 steps - 1 evaluations, from noise of twenty times the data's spread."""
        law = self._law()
        spread = law.means.var(0).mean().sqrt().item()
        sigmas = karras_sigmas(steps, low=0.002 * spread, high=20 * spread)
        start = noise(law.means.new_empty(n, law.means.shape[1]), generator)
        return heun(law.denoise, law.means.mean(0) + sigmas[0].item() * start, sigmas)

    def _law(self) -> Mixture:
        if not hasattr(self, "law_"):
            raise ValueError("fit: expected samples first, by fit(x)")
        return self.law_
