"""Training of a stack of models, one for each seed, in one loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary import require
from lossary.tasks import task
from lossary.tasks.seeds import Seeds
from lossary.vocabulary import asked


def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (*batch, classes) and classes (*batch), in nats, one value for each of *batch."""
    return F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


@task(version=1)
def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[..., Tensor],
    seeds: Seeds,
    steps: int,
    batch: int = 64,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    train: Tensor | None = None,
    group: Tensor | None = None,
    weighting: Callable[..., Tensor] | None = None,
    selector: Sequence[Iterable[int]] | None = None,
    penalty: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Train a stack of models in place, each as it would be trained alone.

    The objective is the sum over seeds of the mean over the batch of weight * loss, plus the penalty; a sum,
    so that no seed changes the gradient of another.

    Args:
        model: (S, batch, ...) to (S, batch, ...): `stacked_mlp`, or any models joined by `per_seed`.
        x: (N, ...) shared by the seeds, or (S, N, ...).
        y: (N, ...) or (S, N, ...), whatever `x` is; labels may differ by seed.
        loss: loss(z, y) gives the values (S, batch), not reduced. One that names `index` is handed it, see `weighting`.
        seeds: stream "order".
        steps: optimizer steps.
        batch: rows of each seed in a step.
        optimizer: makes an optimizer of the parameters, from `torch.optim` or alike. Its `step` is handed a
            closure that computes the objective and its gradients, so those that evaluate it more than once
            work too. None is SGD with `lr`, `momentum` and `weight_decay`, which apply to nothing else.
        train: (S, n) row numbers of the training part; None is all rows.
        group: (N,) or (S, N), passed on to `weighting`.
        weighting: weighting(values, target=, group=, index=), all (S, batch), gives weights (S, batch); it is
            handed those that it names. The values carry no gradient; `group` is None where there is none. `index`
            counts within the training part, from 0 to n - 1. One that keeps a state or couples the batch: `per_seed`.
        selector: for each seed an iterable of positions within the training part, such as a
            `torch.utils.data.Sampler`; iterated anew whenever it ends. None runs through one permutation
            after another. Batches straddle their ends, so each has the full size.
        penalty: penalty(model, x, y) with the batch gives a scalar, summed over seeds, or (S,).

    Raises:
        ValueError: shapes that do not fit together, a loss that reduces, a selector that selects nothing.
    """
    require.whole("steps", steps)
    require.whole("batch", batch, at_least=1)
    stack = len(seeds)
    x_stacked, y_stacked = _stacked(x, y, stack)
    n = x.shape[1] if x_stacked else x.shape[0]
    if train is None:
        train = torch.arange(n).expand(stack, -1)
    elif train.ndim != 2 or len(train) != stack:
        raise ValueError(f"train: expected row numbers ({stack}, n), got shape {tuple(train.shape)}")
    if selector is not None and len(selector) != stack:
        raise ValueError(f"selector: expected one for each of {stack} seeds, got {len(selector)}")
    train = train.to(x.device)
    x_rows, y_rows = _gather(x, x_stacked), _gather(y, y_stacked)
    group_rows = None if group is None else _gather(group, group.ndim == 2)
    if optimizer is None:
        optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    made: Any = optimizer(model.parameters())

    batches = _shuffled(train.shape[1], seeds.torch("order"), batch) if selector is None else _selected(selector, batch)

    one = weighting[0] if isinstance(weighting, PerSeed) else weighting
    named = asked(one, dict.fromkeys(("target", "group", "index"))) if one is not None else {}
    indexed = "index" in signature(_call(loss[0] if isinstance(loss, PerSeed) else loss)).parameters

    @torch.enable_grad()
    def objective(index: Tensor) -> Tensor:
        made.zero_grad()
        rows = train.gather(1, index)
        inputs, target = x_rows(rows), y_rows(rows)
        values = loss(model(inputs), target, **({"index": index} if indexed else {}))
        if values.shape != index.shape:
            raise ValueError(f"loss: expected values per sample, {tuple(index.shape)}, got {tuple(values.shape)}")
        if weighting is not None:
            offered = {"target": target, "group": None if group_rows is None else group_rows(rows), "index": index}
            values = values * weighting(values.detach(), **{name: offered[name] for name in named})
        total = values.mean(1).sum()
        if penalty is not None:
            total = total + penalty(model, inputs, target).sum()
        torch.autograd.backward(total)
        return total

    model.train()
    for index in islice(batches, steps):
        made.step(partial(objective, index.to(x.device)))


def minimise(objective: Callable[[], Tensor], parameters: Iterable[nn.Parameter], *, steps: int, lr: float) -> None:
    """Adam with a cosine decay of the learning rate to 0, on an objective () that draws its own batch at each step."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(objective())
        optimizer.step()
        schedule.step()


def spread_times(n: int, generators: Sequence[Generator], *, dtype: torch.dtype = torch.float64) -> Tensor:
    """(S, n) times in 0 to 1, evenly spread from a random start drawn in this dtype."""
    start = torch.stack([torch.rand(1, generator=g, dtype=dtype) for g in generators])
    return (torch.arange(n) / n + start) % 1


def _call(part: Any) -> Any:
    return getattr(part, "forward", part)


class PerSeed(nn.Module):
    """One part for each seed, called as a single one on stacked tensors; see `per_seed`.

    It is iterable and indexed like a list of its parts, so it serves as a selector too.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        modules = [part for part in parts if isinstance(part, nn.Module)]
        self.parts: Any = nn.ModuleList(modules) if len(modules) == len(parts) else parts

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stack what part s returns for slice s of every tensor; what is no tensor goes to all parts."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.shape[:1] != (len(self),):
                raise ValueError(f"per_seed: expected {len(self)} seeds in front, got shape {tuple(value.shape)}")
        return torch.stack(
            [
                part(*(_slice(value, s) for value in args), **{name: _slice(kwargs[name], s) for name in kwargs})
                for s, part in enumerate(self.parts)
            ]
        )

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, s: int) -> Any:
        return self.parts[s]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)


def per_seed(make: Callable[[int], Any], seeds: Seeds) -> PerSeed:
    """Keep one copy for each seed of a part that couples the batch, has a state or does not stack.

    Such a part sees one replica, (batch, ...). It may be a loss, a weighting, a selector or a whole model: the
    result is a module whose parameters and buffers are those of all copies. A pure function needs no copies:
    `torch.vmap` stacks it faster.

    Args:
        make: gives the part for the seed at position s, 0 to S - 1.
        seeds: how many.

    Example:
        >>> from lossary.tasks import Seeds, per_seed
        >>> seeds = Seeds((0, 1, 2))
        >>> centred = per_seed(lambda s: lambda v: v - v.mean(), seeds)
        >>> centred(torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 6.0]]))
        tensor([[-1.0000,  1.0000],
                [ 0.0000,  0.0000],
                [-0.5000,  0.5000]])
    """
    return PerSeed([make(s) for s in range(len(seeds))])


def _slice(value: Any, s: int) -> Any:
    return value[s] if isinstance(value, Tensor) else value


def _stacked(x: Tensor, y: Tensor, stack: int) -> tuple[bool, bool]:
    """Whether x and y have a seed dimension in front: the reading under which their numbers of rows agree."""
    for x_stacked, y_stacked in ((True, True), (True, False), (False, True), (False, False)):
        x_rows = x.shape[: 1 + x_stacked]
        y_rows = y.shape[: 1 + y_stacked]
        if x_rows == ((stack,) * x_stacked + y_rows[-1:]) and y_rows == ((stack,) * y_stacked + x_rows[-1:]):
            return x_stacked, y_stacked
    raise ValueError(
        f"y: expected as many rows as x, each (N, ...) or ({stack}, N, ...),"
        f" got x {tuple(x.shape)} and y {tuple(y.shape)}"
    )


def _gather(tensor: Tensor, stacked: bool) -> Callable[[Tensor], Tensor]:
    """The rows (S, batch) of a tensor (N, ...) or (S, N, ...), as (S, batch, ...)."""
    if not stacked:
        return lambda rows: tensor.index_select(0, rows.flatten()).view(*rows.shape, *tensor.shape[1:])
    flat = tensor.flatten(0, 1)
    start = torch.arange(0, len(flat), tensor.shape[1], device=tensor.device).unsqueeze(1)
    return lambda rows: flat.index_select(0, (rows + start).flatten()).view(*rows.shape, *flat.shape[1:])


def _shuffled(n: int, generators: Sequence[Generator], batch: int) -> Iterator[Tensor]:
    """Endless batches (S, batch) of positions; each seed runs through permutation after permutation of n."""
    pool = torch.empty(len(generators), 0, dtype=torch.int64)
    while True:
        while pool.shape[1] < batch:
            permutations = torch.stack([torch.randperm(n, generator=g) for g in generators])
            pool = torch.cat([pool, permutations], dim=1)
        yield pool[:, :batch]
        pool = pool[:, batch:]


def _selected(selector: Sequence[Iterable[int]], batch: int) -> Iterator[Tensor]:
    streams = [_endless(sampler) for sampler in selector]
    while True:
        yield torch.tensor([list(islice(stream, batch)) for stream in streams])


def _endless(sampler: Iterable[int]) -> Iterator[int]:
    while True:
        empty = True
        for position in sampler:
            empty = False
            yield position
        if empty:
            raise ValueError("selector: expected at least one position in a round, got none")
