"""Selectors: a `torch.utils.data.Sampler` that decides which samples an epoch sees."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler

from lossary.roles._battery import FACTS, Case, Fault, Role, demand, documented, quick, refuses_hyper, repeatable
from lossary.roles._mark import mark
from lossary.roles.weighting import ROLE as WEIGHTING

P = TypeVar("P")

EPOCHS = 3


def selector(
    *,
    weighs: bool = False,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a selector: a `torch.utils.data.Sampler` that yields positions, one epoch for each iteration.

    Its randomness comes from an argument `generator`. What it learns in training lives in a `state_dict`.

    Args:
        weighs: the same object is a weighting, called with the losses of each batch; it passes both batteries.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("selector", examples=examples, tune=tune, xfail=xfail, weighs=weighs, normalised=None)


class SelectorCase(Case):
    """Makes selectors over `num_samples` samples; calling one lists a few epochs."""

    def make(self, seed: int = 0, **override: Any) -> Any:
        """A fresh selector."""
        if "generator" in inspect.signature(self.part).parameters:
            override["generator"] = torch.Generator().manual_seed(seed)
        return super().build(**override)

    def build(self, **override: Any) -> Callable[..., Any]:
        made = self.make(**override)
        return lambda: epochs(made)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        return {}


def epochs(made: Any) -> list[torch.Tensor]:
    """The positions of a few epochs, a tensor each."""
    return [torch.tensor(list(made)) for _ in range(EPOCHS)]


def is_sampler(case: SelectorCase) -> None:
    """Is a torch.utils.data.Sampler."""
    demand(isinstance(case.make(), Sampler), f"{case.part.__name__} does not derive from torch.utils.data.Sampler")


def valid(case: SelectorCase) -> None:
    """Yields whole numbers from 0 to num_samples - 1."""
    for index in case.make():
        demand(isinstance(index, int), f"yielded {index!r}, a {type(index).__name__}")
        demand(0 <= index < FACTS["num_samples"], f"yielded {index} of {FACTS['num_samples']} samples")


def length(case: SelectorCase) -> None:
    """len() foretells how many positions the next epoch yields."""
    made = case.make()
    for epoch in range(EPOCHS):
        told = len(made)
        got = len(list(made))
        demand(told == got, f"len() is {told} before epoch {epoch}, which yields {got}")


def iterates_anew(case: SelectorCase) -> None:
    """Can be iterated again and again, an epoch each time."""
    for epoch, positions in enumerate(epochs(case.make())):
        demand(len(positions), f"yields nothing in epoch {epoch}")


def generator_decides(case: SelectorCase) -> None:
    """The same generator gives the same positions, in the same order."""
    first, second = epochs(case.make(seed=7)), epochs(case.make(seed=7))
    demand(all(torch.equal(a, b) for a, b in zip(first, second)), "equal generators gave different positions")


def resumes(case: SelectorCase) -> None:
    """A state_dict taken between epochs continues in a fresh object, whatever its generator, as in the old one."""
    running, resumed = case.make(), case.make(seed=1)
    if not hasattr(running, "state_dict"):
        return
    epochs(running)
    resumed.load_state_dict(copy.deepcopy(running.state_dict()))
    for a, b in zip(epochs(running), epochs(resumed)):
        demand(torch.equal(a, b), f"the old object yields {a.tolist()}, the resumed one {b.tolist()}")


def loads(case: SelectorCase) -> None:
    """A DataLoader gives out its positions."""
    positions: Any = range(FACTS["num_samples"])  # serves as the data set
    loader = DataLoader(positions, sampler=case.make(), batch_size=5)
    for expected in epochs(case.make()):
        got = torch.cat(list(loader))
        demand(torch.equal(got, expected), f"gave {got.tolist()} where the selector yields {expected.tolist()}")


def weighs(case: SelectorCase) -> None:
    """One that is a weighting too passes the weighting's battery."""
    if not case.mark.options["weighs"]:
        return
    as_weighting = WEIGHTING.case(case.part, case.mark, case.hyper)
    for check in WEIGHTING.checks:
        try:
            check(as_weighting)
        except Fault as fault:
            raise Fault(f"as a weighting, {check.__name__}: {fault}") from fault


ROLE = Role(
    name="selector",
    protocol="torch.utils.data.Sampler",
    case=SelectorCase,
    checks=(
        is_sampler,
        valid,
        length,
        iterates_anew,
        generator_decides,
        resumes,
        loads,
        weighs,
        quick,
        repeatable,
        refuses_hyper,
        documented,
    ),
)
