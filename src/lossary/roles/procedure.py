"""Procedures: whatever trains several things in turn, with the caller in charge of data, optimizers and steps.

A procedure says who plays, whose turn it is, what that player minimises and what follows its step. It owns no
data, no optimizer and no step counter, so it can stand in anyone's training loop:

    for step, batch in enumerate(loader):
        advance(procedure, batch, optimizers, step=step, generator=generator)

Turns are sequential: the second player of a step meets the first as it has just become. What is updated
simultaneously is one player.
"""

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer

from lossary.roles._battery import (
    FACTS,
    Case,
    Role,
    bfloat16_finite,
    demand,
    documented,
    dtype_follows,
    dtypes_agree,
    quick,
    refuses_hyper,
    repeatable,
    same,
    tensors,
    unmutated,
)
from lossary.roles._mark import mark

P = TypeVar("P")

BATCH, STACK = 6, 2


class Procedure(nn.Module):
    """Base class of procedures. All state is parameters and buffers, so that `state_dict` holds a run whole.

    `forward(x)` is what one deploys.

    One that can be an arm of `compare` has besides

        @classmethod
        def build(cls, model: Callable[[str], nn.Module], loss, profile: Mapping, **hyper) -> Procedure

    where model(name) makes a fresh network, initialised differently for each name, loss(input, target) gives
    values per sample, and `profile` holds the facts of `lossary.vocabulary.PROFILE_FIELDS`.
    """

    def players(self) -> Mapping[str, nn.Module]:
        """What is trained, by name; each has an optimizer. Players share no parameters."""
        raise NotImplementedError

    def turns(self, step: int) -> Sequence[str]:
        """Who is updated in this step, in order; a name may come more than once. By default everyone, once."""
        return tuple(self.players())

    def objective(
        self, player: str, batch: Any, *, step: int, generator: Generator | Sequence[Generator] | None = None
    ) -> Tensor:
        """What the player minimises the mean of: (*replicas, batch), one value per sample.

        Replicas are the leading dimensions of stacked networks; none looks at another. Random numbers come
        from `generator`, or from a sequence of them, one for each replica; None is torch's global one.
        """
        raise NotImplementedError

    def after(self, player: str, *, step: int) -> None:
        """What follows the player's update: moving averages, copies, aggregation. By default nothing."""


def advance(
    procedure: Procedure,
    batch: Any,
    optimizers: Mapping[str, Optimizer],
    *,
    step: int,
    generator: Generator | Sequence[Generator] | None = None,
) -> dict[str, Tensor]:
    """One step of a procedure: every player whose turn it is, in order, takes an optimizer step.

    Args:
        procedure: in training mode.
        batch: whatever its `objective` takes.
        optimizers: by player; each `step` is handed a closure, so those that evaluate it twice work too.
        step: number of this step, from 0, counted by the caller.
        generator: of the procedure's random numbers; see `Procedure.objective`.

    Returns:
        The mean objective at each player's last turn, (*replicas), without gradient.

    Mixed precision, accumulation and clipping need a loop of one's own: these few lines, adapted.
    """
    means: dict[str, Tensor] = {}
    for name in procedure.turns(step):
        own = [p for p in procedure.players()[name].parameters() if p.requires_grad]

        @torch.enable_grad()
        def closure(name: str = name, own: list[nn.Parameter] = own) -> Tensor:
            optimizers[name].zero_grad()
            mean = procedure.objective(name, batch, step=step, generator=generator).mean(-1)
            # The sum over replicas, so that none changes another's gradient; into no other player's gradients.
            torch.autograd.backward(mean.sum(), inputs=own)
            means[name] = mean.detach()
            return mean.detach().sum()

        optimizers[name].step(closure)  # type: ignore[arg-type]
        procedure.after(name, step=step)
    return means


def procedure(
    *,
    on: str,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a procedure.

    Args:
        on: what a batch is: "classes" (inputs and class numbers), for a procedure with `build`. Names the
            battery's fixture.
        examples: hyper-parameters for the battery, as `build` takes them.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    if on not in FIXTURES:
        raise ValueError(f"on: expected one of {', '.join(map(repr, FIXTURES))}, got {on!r}")
    return mark("procedure", examples=examples, tune=tune, xfail=xfail, on=on)


# --- the battery ----------------------------------------------------------------------------------------------


class _Stacked(nn.Module):
    """Linear layers of weights (S, out, in) side by side: (S, batch, in) to (S, batch, out)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(weight.shape[:2]))

    def forward(self, input: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), input, self.weight.mT)


def _network(name: str, stack: int | None = None) -> nn.Module:
    """A small perceptron whose initial weights depend on the name; or a stack of them, (S, batch, ...)."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def layer(wide: int, narrow: int) -> nn.Module:
        weight = torch.randn(stack or 1, narrow, wide, generator=g) / wide**0.5
        if stack is not None:
            return _Stacked(weight)
        linear = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")  # torch's own weights are drawn globally
        linear.load_state_dict({"weight": weight[0], "bias": torch.zeros(narrow)})
        return linear

    return nn.Sequential(layer(FACTS["num_features"], 8), nn.ReLU(), layer(8, FACTS["num_classes"]))


def _classes(dtype: torch.dtype, lead: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, BATCH, FACTS["num_features"], generator=g, dtype=torch.float64)
    return {"x": x.to(dtype), "y": torch.randint(FACTS["num_classes"], (*lead, BATCH), generator=g)}


def _cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


FIXTURES = {"classes": _classes}


class ProcedureCase(Case):
    """Builds a procedure on small networks; calling it gives the objectives of the first step's turns."""

    def make(self, dtype: torch.dtype = torch.float64, stack: int | None = None, **override: Any) -> Procedure:
        """A fresh procedure, with its networks in `dtype`."""
        hyper = {**self.hyper, **override}
        made: Procedure = self.part.build(lambda name: _network(name, stack), _cross_entropy, FACTS, **hyper)
        return made.to(dtype)

    def build(self, **override: Any) -> Callable[..., Any]:
        def call(**batch: Tensor) -> dict[str, Tensor]:
            return objectives(self.make(batch["x"].dtype, **override), tuple(batch.values()))

        return call

    def inputs(self, dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = ()) -> dict[str, Any]:
        """What makes up a batch, in order; `x` is what `forward` takes."""
        return FIXTURES[self.mark.options["on"]](dtype, lead)

    def run(self) -> "Run":
        """A fresh procedure, about to begin."""
        return Run(self.make(), tuple(self.inputs().values()))


def objectives(made: Procedure, batch: Any, *, step: int = 0) -> dict[str, Tensor]:
    """The objective of every player, under one generator."""
    g = torch.Generator().manual_seed(0)
    return {name: made.objective(name, batch, step=step, generator=g) for name in made.players()}


class Run:
    """A procedure under way, with an optimizer with momentum for each player."""

    def __init__(self, made: Procedure, batch: Any) -> None:
        self.made, self.batch, self.step = made, batch, 0
        self.generator = torch.Generator().manual_seed(0)
        self.optimizers = {n: SGD(p.parameters(), lr=0.1, momentum=0.9) for n, p in made.players().items()}

    def go(self, steps: int) -> "Run":
        """Some steps further."""
        for _ in range(steps):
            advance(self.made, self.batch, self.optimizers, step=self.step, generator=self.generator)
            self.step += 1
        return self

    def handed_to(self, made: Procedure) -> "Run":
        """The run as another process would take it up: from the state_dicts alone."""
        made.load_state_dict(copy.deepcopy(self.made.state_dict()))
        other = Run(made, self.batch)
        other.step, other.generator = self.step, copy.deepcopy(self.generator)
        for name, optimizer in other.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(self.optimizers[name].state_dict()))
        return other


def _parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def per_sample(case: ProcedureCase) -> None:
    """Every player has a finite objective, one value per sample, never reduced."""
    for name, values in case.call(case.inputs()).items():
        demand(values.shape == (BATCH,), f"{name}: expected shape {(BATCH,)}, got {tuple(values.shape)}")
        demand(values.isfinite().all(), f"{name}: gave {values.tolist()}")


def stacks(case: ProcedureCase) -> None:
    """Stacked networks give (replicas, batch), and no replica looks at another."""
    made = case.make(stack=STACK)
    x, *rest = case.inputs(lead=(STACK,)).values()
    values = objectives(made, (x, *rest))
    other = objectives(made, (torch.cat([x[:1], x[1:].flip(1)]), *rest))  # replica 1 sees something else
    for name in values:
        got = tuple(values[name].shape)
        demand(got == (STACK, BATCH), f"{name}: expected shape {(STACK, BATCH)}, got {got}")
        demand(same(values[name][0], other[name][0]), f"{name}: a replica's objective depends on its neighbour's data")


def disjoint(case: ProcedureCase) -> None:
    """Players share no parameters."""
    owner: dict[int, str] = {}
    for name, player in case.make().players().items():
        for parameter in player.parameters():
            other = owner.setdefault(id(parameter), name)
            demand(other == name, f"{other} and {name} share a parameter of shape {tuple(parameter.shape)}")


def only_looks(case: ProcedureCase) -> None:
    """Computing an objective changes no parameter and no module's mode."""
    made = case.make().train()
    before, modes = _parameters(made), [m.training for m in made.modules()]
    objectives(made, tuple(case.inputs().values()))
    demand(same(_parameters(made), before), "computing an objective changed parameters; that belongs in `after`")
    demand([m.training for m in made.modules()] == modes, "computing an objective left modules in another mode")


def moves_its_players(case: ProcedureCase) -> None:
    """Turns name players, and a few steps move each of them to finite values."""
    run = case.run()
    before = {name: _parameters(player) for name, player in run.made.players().items()}
    run.go(3)
    for name, player in run.made.players().items():
        demand(not same(_parameters(player), before[name]), f"three steps left {name} as it was")
        demand(all(p.isfinite().all() for p in player.parameters()), f"{name} is not finite after three steps")


def resumes(case: ProcedureCase) -> None:
    """State is parameters and buffers: a state_dict from mid-run continues in a fresh object as in the old one."""
    run = case.run().go(2)
    state = run.made.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    demand(not odd, f"{', '.join(odd)} in the state_dict is neither a parameter nor a buffer")
    resumed = run.handed_to(case.make())
    run.go(2)
    resumed.go(2)
    demand(
        same(tensors(run.made.state_dict()), tensors(resumed.made.state_dict())),
        "a run resumed from its state_dict went another way",
    )


def deploys(case: ProcedureCase) -> None:
    """After training, forward gives one finite output per row, and draws nothing in evaluation mode."""
    run = case.run().go(2)
    x, made = run.batch[0], run.made.eval()
    with torch.no_grad():
        first, second = made(x), made(x)
    demand(len(first) == BATCH and first.isfinite().all(), f"gave {first}")
    demand(same(first, second), "two calls in evaluation mode gave different outputs")


ROLE = Role(
    name="procedure",
    protocol="Procedure: players(), turns(step), objective(player, batch, *, step, generator) -> (*replicas, batch),"
    " after(player, *, step), forward(x)",
    case=ProcedureCase,
    checks=(
        per_sample,
        stacks,
        disjoint,
        only_looks,
        moves_its_players,
        resumes,
        deploys,
        quick,
        unmutated,
        repeatable,
        dtypes_agree,
        bfloat16_finite,
        dtype_follows,
        refuses_hyper,
        documented,
    ),
)
