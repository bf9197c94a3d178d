"""DisBack: the generator follows, backwards, the path on which its teacher came to know the untrained generator.

At first a teacher is asked about samples that it has never seen the like of, and its scores there are poor. So the
teacher is first trained on the untrained generator's samples, and kept at a few points on the way; from the last of
these, which knows the generator, targets then move back, one after the other, to the teacher itself. It wraps any
distillation by scores; it costs the recording and the memory of the path. Try it where distillation starts slowly.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lossary import require
from lossary.diffusion._distil import Frozen, Levels, ScoreDistillation
from lossary.diffusion._noise import Randomness
from lossary.paper import Paper

PAPER = Paper(
    title="Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion Distillation",
    year=2024,
    helps=("slow-sampling", "training-cost"),
    departs=(
        "every target is kept for the same number of steps, as in the official code",
        "the discriminator that the official text-to-image code inherits from DMD2 is left out",
    ),
    equation=(
        r"\nabla_\theta=\mathbb E\Bigl[w(t)\bigl(s_\psi(x_t,t)-s_i(x_t,t)\bigr)\frac{\partial x_t}{\partial\theta}"
        r"\Bigr],\qquad i=N-1,\dots,1,0,\qquad s_0=s_{\text{teacher}},\; s_N\approx s_{G_0}"
    ),
    url="https://github.com/SYZhang0805/DisBack",
)


def degradation_path(
    teacher: nn.Module,
    generator: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    every: int,
    levels: Levels,
    random: Randomness = None,
) -> list[nn.Module]:
    """Train a copy of the teacher on the untrained generator's samples, and keep it every so many batches.

    Args:
        teacher: denoise(x, sigma (, condition)).
        generator: latent (, condition) -> x, left as it is.
        batches: {"latent": standard normals (, "condition")}, one for each update.
        optimizer: called with the copy's parameters.
        every: updates between two points of the path, at least 1.
        levels: noise levels of the training.
        random: of levels and noise; a sequence has one for each replica.

    Returns:
        The path s_0, ..., s_N: the teacher, and its copies, of which the last knows the generator; frozen.

    Raises:
        ValueError: fewer batches than `every`.

    >>> import torch
    >>> batches = 6 * [{"latent": torch.ones(4, 2)}]
    >>> class Denoise(nn.Linear):
    ...     def forward(self, x, sigma):
    ...         return super().forward(x)
    >>> levels = lambda shape, generator: torch.ones(shape)
    >>> path = degradation_path(Denoise(2, 2), nn.Identity(), batches, torch.optim.Adam, every=3, levels=levels)
    >>> len(path)
    3
    """
    require.whole("every", every, at_least=1)
    recording = ScoreDistillation(generator, None, teacher, levels=levels)
    steps, path = optimizer(recording.fake.parameters()), [Frozen(teacher).network]
    for k, batch in enumerate(batches, 1):
        steps.zero_grad()
        recording.objective("fake", batch, step=k - 1, generator=random).mean(-1).sum().backward()
        steps.step()
        if k % every == 0:
            path.append(Frozen(recording.fake).network)
    if len(path) == 1:
        raise ValueError(f"batches: expected at least every = {every}, got fewer")
    return path


class DistributionBacktracking(ScoreDistillation):
    """The procedure with players "fake" and "generator"; a batch is {"latent": standard normals (, "condition")}.

    The targets are path[-2], path[-3], ..., path[0], the teacher, each for `interval` steps and the last for good.

    Args:
        generator: the one that the path was recorded with.
        path: from `degradation_path`; the teacher alone is plain distillation.
        interval: steps for each target, at least 1.
        levels: where scores are compared, see `log_uniform`.
        fake: denoise(x, sigma (, condition)), trained here; None copies the end of the path.
        fake_steps: updates of the fake network before each of the generator.

    Raises:
        ValueError: an empty path, or an interval below 1.

    >>> path = [nn.Identity(), nn.Identity(), nn.Identity()]
    >>> disback = DistributionBacktracking(nn.Linear(2, 2), path, interval=10, levels=None)
    >>> [disback.target(step) for step in (0, 9, 10, 99)]
    [1, 1, 0, 0]
    """

    def __init__(
        self,
        generator: nn.Module,
        path: Sequence[nn.Module],
        *,
        interval: int,
        levels: Levels,
        fake: nn.Module | None = None,
        fake_steps: int = 1,
    ) -> None:
        if not path:
            raise ValueError("path: expected at least the teacher, got nothing")
        require.whole("interval", interval, at_least=1)
        fake = copy.deepcopy(path[-1]).requires_grad_(True).train() if fake is None else fake
        super().__init__(generator, fake, _Path(path), levels=levels, fake_steps=fake_steps)
        self.last, self.interval = len(path) - 1, interval

    def target(self, step: int) -> int:
        """Which point of the path is the teacher in a step."""
        return max(0, self.last - 1 - step // self.interval)

    def objective(self, player: str, batch: Any, *, step: int, generator: Randomness = None) -> Tensor:
        self.teacher.network.now = self.target(step)  # type: ignore[union-attr]
        return super().objective(player, batch, step=step, generator=generator)


class _Path(nn.Module):
    """The denoisers on the path, one of which is asked."""

    def __init__(self, nodes: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nodes, self.now = nn.ModuleList(nodes), 0

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        return self.nodes[self.now](x, sigma, *condition)  # type: ignore[no-any-return]
