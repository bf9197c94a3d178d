"""One- and few-step generators from a teacher's score: teacher, fake score and generator in turns.

The generator's samples are pushed along the difference of two scores at noised samples: the teacher's, which knows
the data, and that of a fake network, trained all the while on the generator's own samples. Methods differ in how
they weight or form that push (`push`), in what else they add, and in who the teacher is at which step.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.roles.procedure import Procedure

Randomness = Generator | Sequence[Generator] | None
Levels = Callable[[tuple[int, ...], Randomness], Tensor]
"""levels(shape, generator) -> noise levels of that shape."""


def noise(like: Tensor | Sequence[int], generator: Randomness, *, kind: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Standard normal (or other) numbers shaped like a tensor; a sequence of generators has one for each replica.

    They are drawn where the generator is, and brought to where the tensor is.
    """
    tensor = like if isinstance(like, Tensor) else torch.empty(tuple(like))
    if isinstance(generator, Sequence):
        return torch.stack([noise(part, g, kind=kind) for part, g in zip(tensor, generator, strict=True)])
    device = tensor.device if generator is None else generator.device
    return kind(tensor.shape, generator=generator, dtype=tensor.dtype, device=device).to(tensor.device)


def batch_of(x: Tensor, generator: Randomness) -> tuple[int, ...]:
    """The leading dimensions of x that are batch: with a generator for each replica, the replicas come first."""
    return tuple(x.shape[: 1 + isinstance(generator, Sequence)])


def conditions(batch: Mapping[str, Tensor]) -> list[Any]:
    """What the networks are called with behind the level: the batch's "condition", if it has one."""
    return [batch["condition"]] if "condition" in batch else []


def log_uniform(low: float, high: float) -> Levels:
    """Noise levels evenly spread in their logarithm."""

    def levels(shape: tuple[int, ...], generator: Randomness) -> Tensor:
        return low * (high / low) ** noise(shape, generator, kind=torch.rand)

    return levels


def pushed(x: Tensor, push: Tensor) -> Tensor:
    """1/2 (x - stopgrad(x - push))^2, entry by entry: the gradient of its sum in x is `push`."""
    return 0.5 * (x - (x - push).detach()).square()


class ScoreDistillation(Procedure):
    """A generator distilled from a teacher's denoiser by the difference of scores.

    A batch is a mapping with "latent" (B, ...), of standard normals, or (replicas, B, ...) where there is a generator
    of random numbers for each replica; "condition" is handed to all three networks where it is there. A variant may
    use more ("real", "target").

    Args:
        generator: latent (, condition) -> x.
        fake: denoise(x, sigma (, condition)), trained here; None copies the teacher, if it is a module.
        teacher: denoise(x, sigma (, condition)), frozen.
        levels: where the scores are compared, see `log_uniform`.
        fake_steps: updates of the fake network before each of the generator.
    """

    def __init__(
        self,
        generator: nn.Module,
        fake: nn.Module | None,
        teacher: Denoise,
        *,
        levels: Levels,
        fake_steps: int = 1,
    ) -> None:
        super().__init__()
        if fake is None:
            if not isinstance(teacher, nn.Module):
                raise ValueError("fake: expected a network, as the teacher is a function that cannot be copied")
            fake = copy.deepcopy(teacher).requires_grad_(True)
        if isinstance(teacher, nn.Module):
            teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.generator, self.fake, self.teacher = generator, fake, teacher
        self.levels, self.fake_steps = levels, fake_steps

    def players(self) -> Mapping[str, nn.Module]:
        return {"fake": self.fake, "generator": self.generator}

    def turns(self, step: int) -> Sequence[str]:
        return ("fake",) * self.fake_steps + ("generator",)

    def forward(self, latent: Tensor, *condition: Tensor) -> Tensor:
        return self.generator(latent, *condition)  # type: ignore[no-any-return]

    def objective(self, player: str, batch: Mapping[str, Tensor], *, step: int, generator: Randomness = None) -> Tensor:
        latent = batch["latent"]
        with torch.set_grad_enabled(player == "generator"):
            x = self.generator(latent, *conditions(batch))
        sigma = self.levels(batch_of(latent, generator), generator).to(x)
        x_t = x + over(sigma, x) * noise(x, generator)
        if player == "fake":
            return self.fake_loss(x, x_t, sigma, batch, generator)
        return self.generator_loss(x, x_t, sigma, batch, generator)

    def fake_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], generator: Randomness
    ) -> Tensor:
        """The error of v of the fake network on the generator's samples, (*replicas, B)."""
        error = (self.fake(x_t, sigma, *conditions(batch)) - x).square().flatten(sigma.ndim).mean(-1)
        return (1 + sigma**-2) * error

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], generator: Randomness
    ) -> Tensor:
        """(*replicas, B): a surrogate whose gradient in x is the push."""
        with torch.no_grad():
            real = self.teacher(x_t, sigma, *conditions(batch))
            fake = self.fake(x_t, sigma, *conditions(batch))
            push = self.push(x, x_t, sigma, real, fake)
        return pushed(x, push).flatten(sigma.ndim).sum(-1)

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Gradient in x of what the generator minimises, from both predictions of x_0; here score_fake - score_real."""
        return (fake - real) / over(sigma, x) ** 2
