"""Distributional alignment: fine-tune a generator until what it draws has the shares of classes that one asks for.

A batch is drawn, a frozen classifier looks at it, and optimal transport gives every sample the class that it can
take at the least cost so that the batch as a whole has the target distribution; each is then trained by
cross-entropy towards its own class, except where another batch might as well have assigned another. The gradient
passes through the sampler on its linear path only, with every step's share made equal, instead of through the chain
of network Jacobians, which explodes. For biased generators of which a classifier can see the bias; it needs no data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Finetuning Text-to-Image Diffusion Models for Fairness",
    year=2024,
    helps=("worst-group", "rare-modes"),
    departs=(
        "how far a sample drifts from the frozen model's (CLIP and DINO in the paper) is the caller's number, as are"
        " the face detector and the term that keeps faces real",
        "steps are made equal by their widths in sigma, exactly for DDIM; the official code takes the derivative of"
        " the schedule, the limit of many steps, with any solver",
        "the uncertainty of class 1 is 1 - P(Bin(N, r_0) <= rank); the official code has 1 - r_0 there, which differs"
        " only off 50/50",
        "dropped samples count 0 in the loss, not -1; LoRA, prompt tokens and the moving average are the caller's",
        "the claims tune a small network beside an exact denoiser in the plane: one prompt, no guidance, no images",
    ),
    equation=(
        r"\mathcal L=\frac1N\sum_i \mathbb 1[u_i\le C]\,\mathrm{CE}(h(x_i),y_i)+\lambda\,s_i\,d(x_i,o_i),\quad"
        r" y_i=\arg\max_k q_{ik},\; u_i=1-\max_k q_{ik},\quad"
        r" q=\mathbb E_{y_{1..N}\sim D}\Bigl[\arg\min_{\pi}\sum_i\lVert p_i-e_{y_{\pi(i)}}\rVert\Bigr];\qquad"
        r" \frac{\partial x_0}{\partial\theta}:=-g\sum_t\frac{\partial\epsilon_\theta(x_t,t)}{\partial\theta}"
    ),
    url="https://github.com/sail-sg/finetune-fair-diffusion",
)


def optimal_target_assignment(
    probabilities: Float[Tensor, "*replicas batch classes"],
    distribution: Float[Tensor, " classes"],
    *,
    draws: int = 100,
    generator: Generator | None = None,
) -> tuple[Int[Tensor, "*replicas batch"], Float[Tensor, "*replicas batch"]]:
    """A class for each sample, so that all have the distribution and are moved least, and how uncertain that is.

    Of many label sets drawn from the distribution, each is matched to the samples at the least sum of distances
    |p_i - one-hot|; the class that a sample gets most often is its target. For two classes the mean over all label
    sets is known: the sample of rank k by p_1, from 0, gets class 0 if more than k labels are 0, hence

        target 1 where k >= N r_0,     uncertainty P(Bin(N, r_0) > k) for target 1, P(Bin(N, r_0) <= k) for target 0.

    Args:
        probabilities: of the classes for each sample, by a frozen classifier.
        distribution: the shares that are asked for, >= 0; they are divided by their sum.
        draws: of label sets; two classes need none.
        generator: of those; CPU.

    Returns:
        Target, and the chance that a random label set gives the sample another class, 0 to about 1/2 for two classes.

    Raises:
        ValueError: shapes or dtypes that do not fit, shares below 0 or none above it.

    >>> p = torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.2, 0.8], [0.0, 1.0]])
    >>> optimal_target_assignment(p, torch.tensor([0.5, 0.5]))
    (tensor([0, 1, 0, 1]), tensor([0.0625, 0.3125, 0.3125, 0.0625]))
    """
    require.floating("probabilities", probabilities, at_least_dims=2)
    require.same_shape("distribution", distribution, tuple(probabilities.shape[-1:]))
    with torch.no_grad():
        shares = _shares(distribution)
        if probabilities.shape[-1] == 2:
            return _by_rank(probabilities[..., 1], shares[0])
        samples = probabilities.flatten(0, -3) if probabilities.ndim > 2 else probabilities[None]
        corners = torch.eye(probabilities.shape[-1], dtype=torch.float64)
        plans = [_mean_plan(p, corners, shares, draws, generator) for p in samples]
        plan = torch.stack(plans).view(probabilities.shape) if plans else torch.zeros_like(probabilities)
        most = plan.to(probabilities).max(-1)
        return most.indices, 1 - most.values


def joint_target_assignment(
    probabilities: Sequence[Float[Tensor, "batch _"]],
    distribution: Tensor,
    *,
    draws: int = 100,
    generator: Generator | None = None,
) -> list[tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]]:
    """`optimal_target_assignment` for several attributes at once, whose combinations have a distribution.

    The cost of a combination is the root of the attributes' summed squared distances; each attribute has its
    own target and uncertainty, from its margin of the mean plan.

    Args:
        probabilities: (N, K_a) for each attribute a.
        distribution: (K_1, ..., K_m), >= 0, divided by its sum.
        draws, generator: of label sets.

    Raises:
        ValueError: no attribute, shapes that do not fit, shares below 0 or none above it.

    >>> sure = torch.eye(2)
    >>> joint_target_assignment([sure, sure], torch.eye(2) / 2)[1][0]
    tensor([0, 1])
    """
    if not probabilities:
        raise ValueError("probabilities: expected at least one attribute, got none")
    for p in probabilities:
        require.floating("probabilities", p, dims=2)
    shape = tuple(p.shape[1] for p in probabilities)
    require.same_shape("distribution", distribution, shape)
    one_hots = [torch.eye(k, dtype=torch.float64) for k in shape]
    corners = torch.stack(
        [
            torch.cat([eye[i] for eye, i in zip(one_hots, place)])
            for place in torch.cartesian_prod(*[torch.arange(k) for k in shape]).view(-1, len(shape))
        ]
    )
    with torch.no_grad():
        shares = _shares(distribution).flatten()
        plan = _mean_plan(torch.cat(list(probabilities), dim=1), corners, shares, draws, generator)
        plan = plan.to(probabilities[0]).view(-1, *shape)
        found = []
        for a in range(len(shape)):
            others = [d + 1 for d in range(len(shape)) if d != a]
            most = (plan.sum(others) if others else plan).max(-1)
            found.append((most.indices, 1 - most.values))
    return found


def _shares(distribution: Tensor) -> Tensor:
    """Of sum 1, in double precision."""
    shares = distribution.double()
    total = shares.sum()
    if not bool((shares >= 0).all() & (total > 0) & total.isfinite()):
        raise ValueError("distribution: expected finite shares >= 0, at least one of them above 0")
    return shares / total


def _by_rank(p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Two classes: p is the probability of class 1, share that of class 0."""
    n = p.shape[-1]
    rank = p.argsort(dim=-1, stable=True).argsort(-1)
    count = torch.arange(n + 1, dtype=torch.float64, device=p.device)
    total = torch.tensor(n + 1.0, dtype=torch.float64, device=p.device).lgamma()
    ways = total - (count + 1).lgamma() - (n - count + 1).lgamma()
    r = share.to(ways)
    below = (ways + torch.xlogy(count, r) + torch.xlogy(n - count, 1 - r)).exp().cumsum(0)  # P(Bin(n, r) <= k)
    target = (rank >= n * r - 1e-6 * n).long()  # as a float32 share times n may lie just above a whole number
    chance = below[rank]
    return target, torch.where(target == 1, 1 - chance, chance).clamp(0, 1).to(p.dtype)


def _mean_plan(samples: Tensor, corners: Tensor, share: Tensor, draws: int, generator: Generator | None) -> Tensor:
    """How often each sample (N, F) is matched to each corner (K, F): (N, K), rows sum to 1."""
    from scipy.optimize import linear_sum_assignment

    require.whole("draws", draws, at_least=1)
    n, found = len(samples), torch.zeros(len(samples) * len(corners), dtype=torch.float64)
    if n:
        cost = torch.cdist(samples.detach().cpu().double(), corners).numpy()
        labels = torch.multinomial(share.cpu(), draws * n, replacement=True, generator=generator)
        matched = [row[linear_sum_assignment(cost[:, row])[1]] for row in labels.view(draws, n).numpy()]
        cells = torch.from_numpy(np.stack(matched)) + len(corners) * torch.arange(n)
        found = torch.bincount(cells.flatten(), minlength=len(found)) / draws
    return found.double().view(n, len(corners))


def distributional_alignment_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    uncertainty: Float[Tensor, "*batch"],
    drift: Float[Tensor, "*batch"],
    original: Int[Tensor, "*batch"],
    threshold: float = 0.2,
    weight: float = 8.0,
    eased: float = 0.2,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy to the assigned class where that is certain, and a price on leaving the frozen model's sample.

    Args:
        input: logits of the frozen classifier for the samples.
        target, uncertainty: as `optimal_target_assignment` gives them. A target of -1 has no cross-entropy.
        drift: how far the sample is from the frozen model's, from the same noise: in the paper the sum of
            1 - cosine in two image embeddings.
        original: class of the frozen model's sample; -1 where nothing was found in it to classify.
        threshold: C, the largest uncertainty that still counts.
        weight: lambda.
        eased: s of samples that have to change class, or may; others have 1.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    >>> sure, one = torch.tensor([0.1, 0.4]), torch.ones(2)
    >>> target, original = torch.tensor([1, 1]), torch.tensor([1, 1])
    >>> distributional_alignment_loss(torch.zeros(2, 2), target, uncertainty=sure, drift=one, original=original)
    tensor([8.6931, 1.6000])
    """
    require.classes(input, target)
    shape = tuple(target.shape)
    require.same_shape("uncertainty", uncertainty, shape)
    require.same_shape("drift", drift, shape)
    require.integers("original", original, shape=shape)
    require.number("threshold", threshold, at_least=0.0)
    require.number("weight", weight, at_least=0.0)
    require.number("eased", eased, at_least=0.0, at_most=1.0)
    kept = torch.where(uncertainty > threshold, -1, target)
    missed = F.cross_entropy(input.flatten(0, -2), kept.flatten(), reduction="none", ignore_index=-1).view(shape)
    stays = (kept == original) | (original < 0)
    return missed + weight * torch.where(stays, 1.0, eased).to(drift) * drift


def step_weights(sigmas: Float[Tensor, " levels"]) -> Float[Tensor, " steps"]:
    """c_t: what a step's gradient is multiplied by, 1 / (sigma_t - sigma_{t-1}) over the geometric mean of those.

    A DDIM step adds (sigma_{t-1} - sigma_t) eps_t to x / alpha, so early steps, which are wide, would be all that
    counts.

    Args:
        sigmas: falling noise levels, as samplers take them.

    Raises:
        ValueError: fewer than two levels, or one that does not fall.

    >>> step_weights(torch.tensor([13.0, 5.0, 3.0, 1.0, 0.0]))
    tensor([0.2973, 1.1892, 1.1892, 2.3784])
    """
    require.floating("sigmas", sigmas, dims=1)
    widths = -sigmas.diff()
    if len(widths) < 1 or not bool((widths > 0).all()):
        raise ValueError("sigmas: expected at least two falling values")
    return (widths.log().mean() - widths.log()).exp()


def adjusted_direct_finetune(denoise: Denoise, sigmas: Float[Tensor, " levels"]) -> Denoise:
    """The same denoiser with another gradient, to be handed to a sampler whose samples a loss is put on.

    The network sees x as a constant, so no gradient goes through its Jacobians, and what reaches its prediction of
    the noise is multiplied by c_t: after DDIM (`euler`) dx_0 = -g sum_t d eps_t, g the geometric mean of the steps'
    widths. Other samplers keep their linear path likewise.

    Args:
        denoise: denoise(x, sigma, *conditions), the network that is tuned.
        sigmas: the levels that the sampler will take; others have the weight of the nearest.

    Raises:
        ValueError: see `step_weights`.

    >>> shift = torch.zeros(1, requires_grad=True)
    >>> sigmas = torch.tensor([4.0, 1.0, 0.0])
    >>> tuned = adjusted_direct_finetune(lambda x, sigma: x - sigma * shift, sigmas)
    >>> x = torch.ones(1)
    >>> for high, low in ((4.0, 1.0), (1.0, 0.0)):
    ...     x = x + (x - tuned(x, high)) * (low - high) / high
    >>> x.backward()
    >>> shift.grad  # -2 sqrt(3); -(3 + 1) without it
    tensor([-3.4641])
    """
    weights, levels = step_weights(sigmas), sigmas[:-1]

    def adjusted(x: Tensor, sigma: Tensor | float, *conditions: Any, **named: Any) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        near = (levels.to(level)[:, None] - level.reshape(-1)).abs().argmin(0).view(level.shape)
        still, level = x.detach(), over(level, x)
        noise = (still - denoise(still, sigma, *conditions, **named)) / level
        constant = noise.detach()
        return x - level * (constant + over(weights.to(level)[near], x) * (noise - constant))

    return adjusted
