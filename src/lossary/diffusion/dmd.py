"""DMD: a one-step generator follows the difference of two scores, held to a few of the teacher's own noise-image pairs.

The generator's samples are noised; what the teacher would denoise them to, less what a network trained on the
generator's own samples would, says which way to push them: down the KL divergence of generator to data. The push is
evened over noise levels by the teacher's error. That divergence likes to settle on a few modes, so a regression on
pairs, made once with a deterministic sampler, keeps the generator near the teacher's map from noise to images. Where
pairs are dear, DMD2 does without them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels, ScoreDistillation, conditions, karras_levels, needed
from lossary.diffusion._noise import Randomness
from lossary.diffusion._samplers import heun
from lossary.paper import Paper

PAPER = Paper(
    title="One-step Diffusion with Distribution Matching Distillation",
    year=2024,
    helps=("slow-sampling", "rare-modes"),
    departs=(
        "the regression is on squared errors; the paper has LPIPS, which goes by `distance`",
        "the fake network is trained at the levels at which scores are compared",
        "guidance of the teacher is the caller's: hand over a guided denoiser",
    ),
    equation=(
        r"\nabla_\theta=\mathbb E\Bigl[\frac{\mu_{\text{fake}}(x_t)-\mu_{\text{real}}(x_t)}"
        r"{\operatorname{mean}\lvert x-\mu_{\text{real}}(x_t)\rvert}\,\frac{\partial G}{\partial\theta}\Bigr]"
        r"+\lambda\nabla_\theta\,d\bigl(G(z_{\text{ref}}),y_{\text{ref}}\bigr),\qquad x=G_\theta(z)"
    ),
    url="https://arxiv.org/abs/2311.18828",
)


def distribution_matching_gradient(
    x: Float[Tensor, "*batch_and_data"],
    real: Float[Tensor, "*batch_and_data"],
    fake: Float[Tensor, "*batch_and_data"],
    *,
    dims: int = 1,
) -> Float[Tensor, "*batch_and_data"]:
    """(fake - real) / mean |x - real|, the mean over a sample; where x is the teacher's x_0, over 1e-5.

    Args:
        x: the generator's samples.
        real: the teacher's x_0 at x + sigma noise.
        fake: that of the network trained on the generator's samples.
        dims: number of leading dimensions that are batch.

    Raises:
        ValueError: shapes that differ.

    >>> distribution_matching_gradient(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]), torch.tensor([[3.0, -3.0]]))
    tensor([[1., 0.]])
    """
    require.floating("x", x, at_least_dims=dims + 1)
    for name, value in (("real", real), ("fake", fake)):
        require.same_shape(name, value, tuple(x.shape))
    error = (x - real).abs().mean(tuple(range(dims, x.ndim)), keepdim=True)
    return (fake - real) / error.clamp(min=1e-5)


@torch.no_grad()
def ode_pairs(teacher: Denoise, latent: Tensor, sigmas: Tensor, *condition: Tensor) -> Tensor:
    """What the teacher makes of each latent by Heun's method, deterministically: targets of the regression.

    Args:
        teacher: denoise(x, sigma (, condition)).
        latent: (*batch, ...), standard normals.
        sigmas: falling, see `karras_sigmas`; n levels and a 0 take 2 n - 1 evaluations.

    Raises:
        ValueError: levels that do not fall.

    >>> ode_pairs(lambda x, sigma: 0 * x + 3, torch.ones(1, 2), torch.tensor([80.0, 1.0, 0.0]))
    tensor([[3., 3.]])
    """
    require.floating("latent", latent, at_least_dims=1)
    return heun(lambda x, sigma: teacher(x, sigma, *condition), sigmas[0].to(latent) * latent, sigmas)


class DistributionMatchingDistillation(ScoreDistillation):
    """The procedure with players "fake" and "generator".

    A batch is {"latent": standard normals (, "condition")}, and, where the regression counts, as many pairs
    {"pair_latent", "pair_target" (, "pair_condition")}, made once by `ode_pairs`.

    Args:
        generator: latent (, condition) -> x; see `OneStepGenerator`.
        fake: denoise(x, sigma (, condition)), trained here; None copies the teacher.
        teacher: denoise(x, sigma (, condition)), frozen.
        regression_weight: lambda >= 0; with 0 no pairs are asked for.
        distance: distance(found, target) of a pair, entry by entry or per sample; None is the squared error.
        levels: where scores are compared; None is `karras_levels(first=0.02, last=0.98)`.
        fake_steps: updates of the fake network before each of the generator.

    Raises:
        ValueError: a weight below 0, a batch without pairs, or no fake for a teacher that is not a module.

    >>> dmd = DistributionMatchingDistillation(nn.Identity(), nn.Identity(), lambda x, sigma: x / 2)
    >>> dmd.turns(0)
    ('fake', 'generator')
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        *,
        regression_weight: float = 0.25,
        distance: Any = None,
        levels: Levels | None = None,
        fake_steps: int = 1,
    ) -> None:
        levels = levels or karras_levels(first=0.02, last=0.98)
        super().__init__(generator, fake, teacher, levels=levels, fake_steps=fake_steps)
        require.number("regression_weight", regression_weight, at_least=0.0)
        self.regression_weight, self.distance = regression_weight, distance

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return distribution_matching_gradient(x, real, fake, dims=sigma.ndim)

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """Mean over a sample's entries of the push's surrogate, plus the weighted distance of the pairs."""
        matching = super().generator_loss(x, x_t, sigma, batch, generator) / x[(0,) * sigma.ndim].numel()
        if not self.regression_weight:
            return matching
        found = self.generator(needed(batch, "pair_latent"), *conditions(batch, "pair_condition"))
        apart = (self.distance or _squared)(found, needed(batch, "pair_target"))
        return matching + self.regression_weight * apart.reshape(*sigma.shape, -1).mean(-1)


def _squared(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square()
