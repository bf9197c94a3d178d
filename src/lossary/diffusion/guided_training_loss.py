"""Guided training loss: train the prediction that classifier-free guidance samples with, not its two parts apart.

Networks learn a conditional and an unconditional prediction; samples are drawn with a third, extrapolated from both,
that no loss ever saw. Here the loss is the error of that one. What follows, and is checked: at the optimum the
sampler draws from the true conditional at the w of training, and at any other w it is ordinary guidance with the
scale (1 + w) / (1 + w of training). So the usual range of w becomes gentler and its default right; what one scale can
reach, the other reaches, too. Training takes two evaluations of the network instead of one.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title=("Bridging the Gap: Addressing Discrepancies in Diffusion Model Training for Classifier-Free Guidance"),
    year=2023,
    helps=("guidance", "slow-sampling"),
    departs=(
        "only abstract and introduction could be read: this loss is what they describe, its form is a derivation",
        "how w is drawn, the weight of the unconditional term and the stopped gradient are options of ours",
    ),
    equation=(
        r"\bigl\lVert\epsilon-\bigl((1+w)\,\epsilon_\theta(x_t,c)-w\,\epsilon_\theta(x_t,\varnothing)\bigr)"
        r"\bigr\rVert^2+\lambda\,\lVert\epsilon-\epsilon_\theta(x_t,\varnothing)\rVert^2"
    ),
    url="https://ar5iv.labs.arxiv.org/html/2311.00938",
)


def guided_noise_loss(
    denoise: Denoise,
    clean: Float[Tensor, "*batch_and_data"],
    sigma: Float[Tensor, "*batch"],
    noise: Float[Tensor, "*batch_and_data"],
    condition: Any,
    *,
    null: Any = None,
    w: Float[Tensor, "*batch"] | float = 1.0,
    uncond_weight: float = 0.1,
    detach_uncond: bool = False,
) -> Float[Tensor, "*batch"]:
    """|eps - ((1 + w) eps(x, c) - w eps(x, null))|^2 + uncond_weight |eps - eps(x, null)|^2, means over the data.

    Two evaluations of the network. The second term is what tells the unconditional prediction from the conditional
    one where w is always the same: without it, only their combination is determined.

    Args:
        denoise: denoise(x, sigma, condition) -> x_0, called with `condition` and with `null`.
        clean: x_0.
        sigma: standard deviation of the noise, > 0, of the leading dimensions.
        noise: eps, standard normal.
        condition: of each sample.
        null: what the network takes for no condition.
        w: strength of guidance in training, one number or one for each sample, such as uniform draws.
        uncond_weight: lambda, >= 0.
        detach_uncond: no gradient of the first term in eps(x, null).

    Raises:
        ValueError: shapes that do not fit, or a negative weight.

    >>> import torch
    >>> denoise = lambda x, sigma, c: torch.zeros_like(x) if c is None else x / 2
    >>> one = torch.ones(1, 1)
    >>> guided_noise_loss(denoise, one, torch.ones(1), one, "c", w=2.0)  # x = 2, guided x_0 = 3: error 2^2 + 0.1 * 1
    tensor([4.1000])
    """
    require.floating("clean", clean)
    require.same_shape("noise", noise, tuple(clean.shape))
    require.floating("sigma", sigma)
    require.same_shape("sigma", sigma, tuple(clean.shape[: sigma.ndim]))
    require.number("w", w)
    if isinstance(w, Tensor):
        require.same_shape("w", w, tuple(sigma.shape))
    require.number("uncond_weight", uncond_weight, at_least=0.0)
    level = over(sigma, clean)
    x = clean + level * noise
    cond, uncond = denoise(x, sigma, condition), denoise(x, sigma, null)
    base = uncond.detach() if detach_uncond else uncond
    strength = over(w, clean) if isinstance(w, Tensor) else w

    def error(found: Tensor) -> Tensor:
        square = ((found - clean) / level).square()
        return square.flatten(sigma.ndim).mean(-1) if square.ndim > sigma.ndim else square

    return error(cond + strength * (cond - base)) + uncond_weight * error(uncond)


def effective_guidance_scale(w: float, *, trained: float | tuple[float, float]) -> float:
    """s of uncond + s (cond - uncond), in true predictions, that a network of the guided loss samples with at w.

    (1 + w) E[1 + v] / E[(1 + v)^2], v being the w of training: 1 is the true conditional. It follows from minimising
    the loss at each x: the unconditional prediction is the true one, and the conditional lies between.

    Args:
        w: in sampling.
        trained: w in training, above -1, or the ends of its uniform distribution.

    Raises:
        ValueError: numbers that are not finite, or a range whose ends are in the wrong order.

    >>> effective_guidance_scale(3.0, trained=1.0)
    2.0
    >>> round(effective_guidance_scale(0.0, trained=(0.0, 4.0)), 4)  # 3 / (9 + 4 / 3)
    0.2903
    """
    require.number("w", w)
    low, high = trained if isinstance(trained, tuple) else (trained, trained)
    require.number("trained", low, above=-1.0)
    require.number("trained", high, at_least=low)
    mean = 1 + (low + high) / 2
    return (1 + w) * mean / (mean**2 + (high - low) ** 2 / 12)
