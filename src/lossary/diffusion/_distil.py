"""One- and few-step generators from a teacher's score: teacher, fake score and generator in turns.

The generator's samples are pushed along the difference of two scores at noised samples: the teacher's, which knows
the data, and that of a fake network, trained all the while on the generator's own samples. Methods differ in how
they weight or form that push (`push`), in what else they add, and in who the teacher is at which step.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import over
from lossary.roles.procedure import Procedure

Levels = Callable[[tuple[int, ...], Randomness], Tensor]
"""levels(shape, generator) -> noise levels of that shape."""


def batch_of(x: Tensor, generator: Randomness) -> tuple[int, ...]:
    """The leading dimensions of x that are batch: with a generator for each replica, the replicas come first."""
    return tuple(x.shape[: 1 + isinstance(generator, Sequence)])


def needed(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """What a batch must have."""
    if name not in batch:
        raise ValueError(f"batch: expected {name!r}, got {', '.join(map(repr, batch)) or 'nothing'}")
    return batch[name]


def conditions(batch: Mapping[str, Tensor], name: str = "condition") -> list[Tensor]:
    """What the networks are called with behind the level: the batch's "condition", if it has one.

    Under another name that of other samples, such as "real_condition" of data: a batch with "condition" needs it.
    """
    if name not in batch and "condition" in batch:
        raise ValueError(f"batch: expected {name!r} beside 'condition'")
    return [batch[name]] if name in batch else []


def falling(name: str, levels: Sequence[float]) -> tuple[float, ...]:
    """Noise levels of several steps, refused under the argument's name where they do not fall to one above 0."""
    found = tuple(float(level) for level in levels)
    if not found or found[-1] <= 0 or any(a <= b for a, b in pairwise(found)):
        raise ValueError(f"{name}: expected falling levels above 0, at least one, got {found}")
    return found


def log_uniform(low: float, high: float) -> Levels:
    """Noise levels evenly spread in their logarithm."""

    def levels(shape: tuple[int, ...], generator: Randomness) -> Tensor:
        return low * (high / low) ** noise(shape, generator, kind=torch.rand)

    return levels


def karras_levels(
    low: float = 0.002, high: float = 80.0, *, rho: float = 7.0, first: float = 0.0, last: float = 0.8
) -> Levels:
    """Noise levels evenly spread in sigma^(1 / rho), between the shares `first` and `last` of the way up.

    Args:
        low, high: the ends of the whole range.
        rho: see `karras_sigmas`.
        first, last: 0 is `low`, 1 is `high`; SiD leaves out the top fifth.

    Raises:
        ValueError: numbers out of order.

    >>> karras_levels(first=0.8 - 1e-9)((2,), torch.Generator())  # the highest
    tensor([24.4083, 24.4083])
    """
    require.number("low", low, above=0.0)
    require.number("high", high, above=low)
    require.number("rho", rho, above=0.0)
    require.number("first", first, at_least=0.0)
    require.number("last", last, above=first, at_most=1.0)
    ends = low ** (1 / rho), high ** (1 / rho)

    def levels(shape: tuple[int, ...], generator: Randomness) -> Tensor:
        share = first + (last - first) * noise(shape, generator, kind=torch.rand)
        return (ends[0] + share * (ends[1] - ends[0])) ** rho  # type: ignore[no-any-return]

    return levels


def pushed(x: Tensor, push: Tensor) -> Tensor:
    """1/2 (x - stopgrad(x) + push)^2, entry by entry: the gradient of its sum in x is `push`, in any precision."""
    return 0.5 * (x - x.detach() + push.detach()).square()


class OneStepGenerator(nn.Module):
    """latent -> denoise(sigma latent, sigma): a generator that starts as one step of the denoiser.

    Args:
        denoise: denoise(x, sigma (, condition)), to be trained; a copy of the teacher's.
        sigma: its noise level, 2.5 in SiD, for data of standard deviation 0.5.

    Raises:
        ValueError: a sigma that is not above 0.

    >>> OneStepGenerator(lambda x, sigma: x / 2)(torch.ones(1, 2))
    tensor([[1.2500, 1.2500]])
    """

    def __init__(self, denoise: Any, *, sigma: float = 2.5) -> None:
        super().__init__()
        require.number("sigma", sigma, above=0.0)
        self.denoise, self.sigma = denoise, sigma

    def forward(self, latent: Tensor, *condition: Tensor) -> Tensor:
        return self.denoise(self.sigma * latent, self.sigma, *condition)  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """A copy of a network that stays as it is: without gradients of its own, and always in evaluation mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network(*inputs, **named)


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
        fake_steps: updates of the fake network before each of the generator, >= 0.

    Raises:
        ValueError: no fake for a teacher that is not a module, fake_steps below 0, or a batch without "latent".
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
        require.whole("fake_steps", fake_steps, at_least=0)
        if fake is None:
            if not isinstance(teacher, nn.Module):
                raise ValueError("fake: expected a network, as the teacher is a function that cannot be copied")
            fake = copy.deepcopy(teacher).requires_grad_(True).train()
        self.generator, self.fake = generator, fake
        self.teacher = Frozen(teacher) if isinstance(teacher, nn.Module) else teacher
        self.levels, self.fake_steps = levels, fake_steps

    def players(self) -> Mapping[str, nn.Module]:
        return {"fake": self.fake, "generator": self.generator}

    def turns(self, step: int) -> Sequence[str]:
        return ("fake",) * self.fake_steps + ("generator",)

    def forward(self, latent: Tensor, *condition: Tensor) -> Tensor:
        return self.generator(latent, *condition)  # type: ignore[no-any-return]

    def objective(self, player: str, batch: Mapping[str, Tensor], *, step: int, generator: Randomness = None) -> Tensor:
        latent = needed(batch, "latent")
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
        return (1 + sigma**-2) * error  # type: ignore[no-any-return]

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], generator: Randomness
    ) -> Tensor:
        """(*replicas, B): a surrogate whose gradient in x is the push."""
        condition = conditions(batch)
        with torch.no_grad():
            real, fake = self.teacher(x_t, sigma, *condition), self.fake(x_t, sigma, *condition)
            push = self.push(x, x_t, sigma, real, fake, *condition)
        return pushed(x, push).flatten(sigma.ndim).sum(-1)

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        """Gradient in x of what the generator minimises, from both predictions of x_0; here score_fake - score_real."""
        return (fake - real) / over(sigma, x) ** 2
