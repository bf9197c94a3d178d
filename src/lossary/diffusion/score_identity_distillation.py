"""SiD: distil a one-step generator by the teacher's and the fake's disagreement alone, differentiated through both.

Generator and data have the same scores at all noise levels where the two denoisers agree. SiD minimises their squared
difference, less an inner product that knows what the generator really drew, and lets the gradient pass through both
networks down to the generator. No data, no pairs, no discriminator. For a trained denoiser that is to sample in one
evaluation; where memory is short or the networks are not smooth, the plain difference of scores, which is not
differentiated through any network, costs about half.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels, ScoreDistillation, conditions, karras_levels
from lossary.diffusion._noise import Randomness
from lossary.paper import Paper

PAPER = Paper(
    title="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step"
    " Generation",
    year=2024,
    helps=("slow-sampling",),
    departs=(
        "the fake network is trained at the levels at which scores are compared, not at log-normal ones of its own",
        "the moving average of the generator is the caller's, e.g. `torch.optim.swa_utils.AveragedModel`",
        "errors of the fake network count 1 + 1 / sigma^2, which is EDM's weight for data of unit deviation",
        "samples with NaN are not dropped",
    ),
    equation=(
        r"\mathcal L=\omega\Bigl[(1-\alpha)\lVert f_\phi(x_t)-f_\psi(x_t)\rVert^2"
        r"+\bigl(f_\phi(x_t)-f_\psi(x_t)\bigr)^{\!\top}\bigl(f_\psi(x_t)-x_g\bigr)\Bigr],\qquad"
        r" \omega=\frac{C}{\operatorname{sg}\lVert x_g-f_\phi(x_t)\rVert_1}"
    ),
    url="https://github.com/mingyuanzhou/SiD",
)


def score_identity_loss(
    x: Float[Tensor, "*batch_and_data"],
    real: Float[Tensor, "*batch_and_data"],
    fake: Float[Tensor, "*batch_and_data"],
    *,
    alpha: float = 1.2,
    dims: int = 1,
) -> Float[Tensor, "*batch"]:
    """(1 - alpha) |real - fake|^2 + (real - fake) . (fake - x), sums over what is not batch; it may be below 0.

    Once `fake` is the generator's exact denoiser, the second term has mean 0, and alpha = 0 has the squared
    difference as its mean. As gradients see the fake network as a constant, half the gradient of that squared
    difference is alpha = 1/2; alpha = 1 differentiates it at fixed x_t.

    Args:
        x: the generator's samples.
        real: the teacher's x_0 at x + sigma noise.
        fake: that of the network trained on the generator's samples.
        alpha: the paper finds 1.0 and 1.2 best, 1.2 the faster.
        dims: number of leading dimensions that are batch.

    Raises:
        ValueError: shapes that differ, or an alpha that is not finite.

    >>> import torch
    >>> score_identity_loss(torch.tensor([[0.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0]]), alpha=0.5)
    tensor([4.])
    """
    require.floating("x", x, at_least_dims=dims)
    for name, value in (("real", real), ("fake", fake)):
        require.same_shape(name, value, tuple(x.shape))
    require.number("alpha", alpha)
    apart = real - fake
    values = apart * ((1 - alpha) * apart + fake - x)
    return values.flatten(dims).sum(-1) if values.ndim > dims else values


class ScoreIdentityDistillation(ScoreDistillation):
    """The procedure with players "fake" and "generator"; a batch is {"latent": standard normals (, "condition")}.

    Args:
        generator: latent (, condition) -> x.
        fake: denoise(x, sigma (, condition)), trained here; None copies the teacher.
        teacher: denoise(x, sigma (, condition)), frozen, differentiable in x.
        alpha: see `score_identity_loss`.
        levels: where the denoisers are compared; None is `karras_levels()`.
        fake_steps: updates of the fake network before each of the generator.

    Raises:
        ValueError: an alpha that is not finite, or no fake for a teacher that is not a module.

    >>> sid = ScoreIdentityDistillation(nn.Identity(), nn.Identity(), lambda x, sigma: x / 2)  # fake is a network
    >>> sid.turns(0)
    ('fake', 'generator')
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        *,
        alpha: float = 1.2,
        levels: Levels | None = None,
        fake_steps: int = 1,
    ) -> None:
        super().__init__(generator, fake, teacher, levels=levels or karras_levels(), fake_steps=fake_steps)
        require.number("alpha", alpha)
        self.alpha = alpha

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """`score_identity_loss` over the teacher's mean absolute error, a constant."""
        condition = conditions(batch)
        real, fake = self.teacher(x_t, sigma, *condition), self.fake(x_t, sigma, *condition)
        error = (x - real).detach().abs().flatten(sigma.ndim).mean(-1)
        return score_identity_loss(x, real, fake, alpha=self.alpha, dims=sigma.ndim) / error.clamp(min=1e-5)
