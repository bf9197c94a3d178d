"""DMD2: distribution matching without pairs: a fake network ahead of its generator, a discriminator, several steps.

Without DMD's regression training is unstable because the fake network lags behind; five updates of it for one of the
generator cure that. A small head on the fake network's own features, which tells noised data from noised samples, lets
the generator correct what the teacher gets wrong, so it can become better than its teacher. And a generator of several
steps is trained on what it will really meet: the noised outcome of its own earlier steps. The first and the last need
no data; the head needs some.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._distil import Levels, batch_of, conditions, falling, karras_levels, needed
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.diffusion.dmd import DistributionMatchingDistillation
from lossary.paper import Paper

PAPER = Paper(
    title="Improved Distribution Matching Distillation for Fast Image Synthesis",
    year=2024,
    helps=("slow-sampling",),
    departs=(
        "each sample has a step of its own in backward simulation; officially one is drawn for the whole batch",
        "features come by a hook, so the rest of the fake network is evaluated in vain",
        "steps are given as noise levels sigma / alpha instead of times 999, 749, 499, 249",
        "the fake network's denoising loss is the error of v, EDM's weight for data of unit size",
    ),
    equation=(
        r"\mathcal L_G=\mathcal L_{\text{DMD}}+\lambda_G\operatorname{softplus}(-D(x_t)),\qquad"
        r"\mathcal L_{\text{fake}}=\mathcal L_{\text{denoise}}+\lambda_D\bigl[\operatorname{softplus}(D(x_t))"
        r"+\operatorname{softplus}(-D(x_t^{\text{real}}))\bigr]\quad\text{(5 times per step)}"
    ),
    url="https://github.com/tianweiy/DMD2",
)


@torch.no_grad()
def backward_simulation(
    generator: Denoise, latent: Tensor, sigmas: Sequence[float], *condition: Tensor, random: Randomness = None
) -> tuple[Float[Tensor, "*batch_and_data"], Float[Tensor, "*batch"]]:
    """What a generator of several steps meets at a random one of them, and that step's level, without gradient.

    From noise it takes its own earlier steps: x_0 = generator(x, sigma), then x = x_0 + next sigma times noise.

    Args:
        generator: denoise(x, sigma (, condition)); one evaluation for each step but the last.
        latent: standard normals, (B, ...), or (replicas, B, ...) with a sequence of generators.
        sigmas: levels of its steps, falling, above 0.
        random: of the steps and the noise; a sequence has one for each replica.

    Raises:
        ValueError: levels that do not fall to a value above 0.

    >>> x, sigma = backward_simulation(lambda x, sigma: x / 2, torch.ones(1, 2), [4.0])
    >>> x, sigma
    (tensor([[4., 4.]]), tensor([4.]))
    """
    levels = falling("sigmas", sigmas)
    batch = batch_of(latent, random)
    chosen = (len(levels) * noise(batch, random, kind=torch.rand)).to(latent.device).floor()
    x = levels[0] * latent
    start, level = x, latent.new_full(batch, levels[0])
    for k, (sigma, lower) in enumerate(pairwise(levels), 1):
        x = generator(x, sigma, *condition) + lower * noise(x, random)
        start = torch.where(over(chosen == k, x), x, start)
        level = torch.where(chosen == k, lower, level)
    return start, level


@torch.no_grad()
def few_step_samples(
    generator: Denoise, latent: Tensor, sigmas: Sequence[float], *condition: Tensor, random: Randomness = None
) -> Float[Tensor, "*batch_and_data"]:
    """Samples by denoising and noising in turn, one evaluation for each level; arguments as `backward_simulation`.

    >>> few_step_samples(lambda x, sigma: x / 2, torch.ones(1, 2), [4.0])
    tensor([[2., 2.]])
    """
    levels = falling("sigmas", sigmas)
    x = generator(levels[0] * latent, levels[0], *condition)
    for sigma in levels[1:]:
        x = generator(x + sigma * noise(x, random), sigma, *condition)
    return x


class DMD2(DistributionMatchingDistillation):
    """The procedure with players "fake", with the head, and "generator".

    A batch is {"latent": standard normals (, "condition")} and, where there is a head or steps are not simulated,
    {"real": data (, "real_condition")}; later steps from noised data go by its condition.

    Args:
        generator: latent (, condition) -> x, or, with `steps`, denoise(x, sigma (, condition)).
        fake: denoise(x, sigma (, condition)), trained here; None copies the teacher.
        teacher: denoise(x, sigma (, condition)), frozen.
        head: from features of the fake network to one logit a sample, high for data; None is no discriminator.
        features: name of the module within `fake` whose output the head sees, as in `nn.Module.get_submodule`.
        gan_weight, head_weight: of the generator's and of the discriminator's loss, >= 0.
        gan_levels: where data and samples are told apart; None is `karras_levels(last=1.0)`.
        steps: levels of a generator of several steps, see `backward_simulation`; None is one step from the latent.
        simulated: whether the inputs of later steps are its own, or noised data.
        levels: where scores are compared; None is `karras_levels(first=0.02, last=0.98)`.
        fake_steps: updates of the fake network before each of the generator.

    Raises:
        ValueError: weights below 0, a head without features, steps that do not fall, or a batch that lacks data, or
            their condition where the samples have one.

    >>> dmd2 = DMD2(nn.Identity(), nn.Identity(), lambda x, sigma: x / 2)
    >>> dmd2.turns(0)
    ('fake', 'fake', 'fake', 'fake', 'fake', 'generator')
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        *,
        head: nn.Module | None = None,
        features: str = "",
        gan_weight: float = 3e-3,
        head_weight: float = 1e-2,
        gan_levels: Levels | None = None,
        steps: Sequence[float] | None = None,
        simulated: bool = True,
        levels: Levels | None = None,
        fake_steps: int = 5,
    ) -> None:
        super().__init__(generator, fake, teacher, regression_weight=0.0, levels=levels, fake_steps=fake_steps)
        require.number("gan_weight", gan_weight, at_least=0.0)
        require.number("head_weight", head_weight, at_least=0.0)
        if head is not None and (not features or features not in dict(self.fake.named_modules())):
            raise ValueError(f"features: expected the name of a module within fake, got {features!r}")
        self.head, self.features = head, features
        self.gan_weight, self.head_weight = gan_weight, head_weight
        self.gan_levels = gan_levels or karras_levels(last=1.0)
        self.steps = None if steps is None else falling("steps", steps)
        self.simulated = simulated

    def players(self) -> Mapping[str, nn.Module]:
        fake = self.fake if self.head is None else nn.ModuleList([self.fake, self.head])
        return {"fake": fake, "generator": self.generator}

    def forward(self, latent: Tensor, *condition: Tensor, generator: Randomness = None) -> Tensor:
        if self.steps is None:
            return self.generator(latent, *condition)  # type: ignore[no-any-return]
        return few_step_samples(self.generator, latent, self.steps, *condition, random=generator)

    def logits(self, x: Tensor, generator: Randomness, *condition: Tensor) -> Float[Tensor, "*batch"]:
        """The discriminator's, at freshly noised x (*replicas, batch, d)."""
        sigma = self.gan_levels(batch_of(x, generator), generator).to(x)
        return self.logits_at(x + over(sigma, x) * noise(x, generator), sigma, *condition)

    def logits_at(self, x_t: Tensor, sigma: Tensor, *condition: Tensor) -> Float[Tensor, "*batch"]:
        """The discriminator's at x_t of noise level sigma."""
        seen: list[Tensor] = []
        module = self.fake.get_submodule(self.features)
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            self.fake(x_t, sigma, *condition)
        finally:
            handle.remove()
        return self.head(seen[-1]).reshape(sigma.shape)  # type: ignore[misc, no-any-return]

    def objective(self, player: str, batch: Any, *, step: int, generator: Randomness = None) -> Tensor:
        if self.steps is None:
            return super().objective(player, batch, step=step, generator=generator)
        latent = needed(batch, "latent")
        if self.simulated:
            start, level = backward_simulation(self.generator, latent, self.steps, *conditions(batch), random=generator)
        else:
            chosen = (len(self.steps) * noise(batch_of(latent, generator), generator, kind=torch.rand)).long()
            level = latent.new_tensor(self.steps)[chosen.to(latent.device)]
            noised = needed(batch, "real") + over(level, latent) * latent
            start = torch.where(over(chosen == 0, latent).to(latent.device), self.steps[0] * latent, noised)
            if given := conditions(batch, "real_condition"):
                batch = {**batch, "condition": given[0]}  # the samples are of what the data are of
        with torch.set_grad_enabled(player == "generator"):
            x = self.generator(start, level, *conditions(batch))
        sigma = self.levels(batch_of(latent, generator), generator).to(x)
        x_t = x + over(sigma, x) * noise(x, generator)
        loss = self.fake_loss if player == "fake" else self.generator_loss
        return loss(x, x_t, sigma, batch, generator)

    def fake_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """The denoising loss, plus the discriminator's."""
        loss = super().fake_loss(x, x_t, sigma, batch, generator)
        if self.head is None:
            return loss
        real = self.logits(needed(batch, "real"), generator, *conditions(batch, "real_condition"))
        fake = self.logits(x, generator, *conditions(batch))
        return loss + self.head_weight * (F.softplus(fake) + F.softplus(-real))

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Any, generator: Randomness
    ) -> Float[Tensor, "*batch"]:
        """DMD's, plus the non-saturating loss of being taken for a sample."""
        loss = super().generator_loss(x, x_t, sigma, batch, generator)
        if self.head is None:
            return loss
        return loss + self.gan_weight * F.softplus(-self.logits(x, generator, *conditions(batch)))
