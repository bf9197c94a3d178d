"""Target score matching: where the clean score is known, regress on it rather than on the noise.

The score of noised data is the average of the clean score over what the data may have been. Denoising score matching
regresses on -noise / sigma, which explodes as the noise vanishes, just where the score is almost known; the clean
score as target is bounded there, and poor where noise hides everything. Any mixture of the two is unbiased, and one
that follows the noise level is good everywhere. For data with a known energy (physics, posteriors, other models'
densities); data alone, such as images, have no known clean score.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Target Score Matching",
    year=2024,
    helps=("density-estimation",),
    departs=(
        "additive noise only: no Lie groups, no general transition kernels, no bridge matching",
        "losses are means over a sample's entries rather than squared norms, as elsewhere in this room",
        "the estimate for one x proposes from the noise kernel; the paper leaves the sampler of the posterior open",
    ),
    equation=(
        r"\nabla\log p_t(x_t)=\tfrac1{\alpha_t}\,\mathbb E\bigl[\nabla\log p_0(x_0)\mid x_t\bigr],\qquad "
        r"\ell=\mathbb E\bigl\lVert s_\theta(x_t,t)-\alpha_t^{-1}\nabla\log p_0(x_0)\bigr\rVert^2"
    ),
    url="https://arxiv.org/abs/2402.08667",
)


def target_score_mixing(
    alpha: Float[Tensor, "*batch"], sigma: Float[Tensor, "*batch"], *, variance: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Share of the clean score at which the mixed target of Gaussian data is exact: a^2 v / (a^2 v + s^2), 0 to 1.

    Args:
        alpha, sigma: of x_t = alpha x_0 + sigma noise, not both 0.
        variance: v, of one coordinate of the data, > 0; of several separate modes rather that of one.

    Raises:
        ValueError: shapes that differ, or a variance that is not above 0.

    >>> target_score_mixing(torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.8]))
    tensor([1.0000, 0.3600])
    """
    require.floating("alpha", alpha)
    require.same_shape("sigma", sigma, tuple(alpha.shape))
    require.number("variance", variance, above=0.0)
    kept = alpha.square() * variance
    return kept / (kept + sigma.square())


def mixed_score_target(
    clean_score: Float[Tensor, "*batch_and_data"],
    noise: Float[Tensor, "*batch_and_data"],
    *,
    alpha: Float[Tensor, "*batch"],
    sigma: Float[Tensor, "*batch"],
    mixing: Float[Tensor, "*batch"] | float = 1.0,
) -> Float[Tensor, "*batch_and_data"]:
    """k clean_score / alpha - (1 - k) noise / sigma, whose mean given x_t is the score there, for any k.

    Args:
        clean_score: grad log p_0 at the clean data; p_0 need not be normalised.
        noise: of x_t = alpha x_0 + sigma noise, of the same shape.
        alpha, sigma: of the leading dimensions.
        mixing: k; 1 is target score matching, also where sigma is 0, and 0 denoising score matching.

    Raises:
        ValueError: shapes that do not fit.

    >>> one = torch.tensor([1.0])
    >>> mixed_score_target(torch.tensor([[3.0]]), torch.tensor([[4.0]]), alpha=one, sigma=2 * one, mixing=0.5)
    tensor([[0.5000]])
    """
    require.floating("clean_score", clean_score)
    require.same_shape("noise", noise, tuple(clean_score.shape))
    require.floating("alpha", alpha)
    require.same_shape("alpha", alpha, tuple(clean_score.shape[: alpha.ndim]))
    require.same_shape("sigma", sigma, tuple(alpha.shape))
    share = torch.as_tensor(mixing, dtype=alpha.dtype, device=alpha.device).expand_as(alpha)
    by_score = torch.where(share == 0, 0, share / alpha)
    by_noise = torch.where(share == 1, 0, (1 - share) / sigma)
    return over(by_score, noise) * clean_score - over(by_noise, noise) * noise


def target_score_matching_loss(
    input: Float[Tensor, "*batch_and_data"],
    clean_score: Float[Tensor, "*batch_and_data"],
    noise: Float[Tensor, "*batch_and_data"],
    *,
    alpha: Float[Tensor, "*batch"],
    sigma: Float[Tensor, "*batch"],
    mixing: Float[Tensor, "*batch"] | float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Mean squared distance of a predicted score from `mixed_score_target`, per sample.

    Weigh the samples so that all times count alike: by alpha^2 at mixing 1, sigma^2 at 0, and by
    alpha^2 v + sigma^2, which is 1 where variance is preserved, in between.

    Args:
        input: the network's score at x_t. One that predicts noise says -prediction / sigma.
        clean_score, noise, alpha, sigma, mixing: see `mixed_score_target`.

    Raises:
        ValueError: shapes that do not fit.

    >>> guess, half, zero = torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.zeros(1, 2)
    >>> target_score_matching_loss(guess, -guess, zero, alpha=half, sigma=half)  # (1 + 1 / 0.5)^2 / 2
    tensor([4.5000])
    """
    target = mixed_score_target(clean_score, noise, alpha=alpha, sigma=sigma, mixing=mixing)
    require.same_shape("input", input, tuple(target.shape))
    error = (input - target).square()
    return error.flatten(alpha.ndim).mean(-1) if error.ndim > alpha.ndim else error


def target_score_estimate(
    x: Float[Tensor, "batch d"],
    log_density: Callable[[Tensor], Tensor],
    clean_score: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    sigma: float,
    samples: int = 256,
    mixing: float = 1.0,
    generator: Generator | None = None,
) -> Float[Tensor, "batch d"]:
    """The score at x_t = x without training: the mean of `mixed_score_target` over guesses at x_0, by importance.

    Guesses are drawn as (x + sigma noise) / alpha and weigh p_0(guess). Good while a fair share of them is likely;
    the error falls with the square root of `samples`.

    Args:
        x: points.
        log_density: (..., d) -> (...), log p_0 up to a constant.
        clean_score: (..., d) -> (..., d), its gradient.
        alpha, sigma: of the noise, above 0.
        samples: guesses for each point.
        mixing: 1 weighs clean scores, 0 the noise; see `target_score_mixing`.
        generator: of the guesses.

    Raises:
        ValueError: x that is not (batch, d), or a number out of range.

    >>> x, k = torch.tensor([[1.0, -2.0]]), target_score_mixing(torch.tensor(0.6), torch.tensor(0.8))
    >>> def energy(y):  # a standard normal's, which stays one
    ...     return y.square().sum(-1) / 2
    >>> generator = torch.Generator().manual_seed(0)
    >>> target_score_estimate(
    ...     x, lambda y: -energy(y), lambda y: -y, alpha=0.6, sigma=0.8, samples=4, mixing=k.item(), generator=generator
    ... )
    tensor([[-1.0000,  2.0000]])
    """
    require.floating("x", x, dims=2)
    require.number("alpha", alpha, above=0.0)
    require.number("sigma", sigma, above=0.0)
    require.number("mixing", mixing)
    require.whole("samples", samples, at_least=1)
    drawn = noise(x.new_empty(samples, *x.shape), generator)
    guess = (x - sigma * drawn) / alpha
    levels = torch.tensor([alpha, sigma], dtype=x.dtype, device=x.device).view(2, 1, 1).expand(2, samples, len(x))
    target = mixed_score_target(clean_score(guess), drawn, alpha=levels[0], sigma=levels[1], mixing=mixing)
    return (log_density(guess).softmax(0)[..., None] * target).sum(0)
