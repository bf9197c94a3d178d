"""Guidance: `g(cond, uncond, state) -> (guided, state)`, on predictions of x_0; a state of None starts anew.

All predictions have one shape, (B, ...). What is remembered from step to step is the state, so that one guidance
serves many runs at a time. One that can do without the unconditional prediction in some state says so by a method
`needs(state) -> bool`; it may then be None.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossary.roles._battery import SHARED, Case, Role, demand, same
from lossary.roles._mark import mark

P = TypeVar("P")


def guidance(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a guidance: a class whose instances are called, or a function; hyper-parameters with a default by keyword.

    Args:
        examples: hyper-parameters for the battery, which guides four samples of six numbers for three steps.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("guidance", examples=examples, tune=tune, xfail=xfail)


class GuidanceCase(Case):
    """Predictions of three steps, (3, 4, 6), that come nearer to each other."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        cond, apart = torch.randn(2, 3, 4, 6, generator=g, dtype=torch.float64)
        uncond = cond + apart * torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)[:, None, None]
        return {"cond": cond.to(dtype), "uncond": uncond.to(dtype)}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        inputs = self.inputs()
        yield "cond", {"cond": inputs["cond"].long(), "uncond": inputs["uncond"].long()}
        yield "uncond", {**inputs, "uncond": inputs["uncond"][..., :-1]}

    def call(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        """What each step is guided to, and the last state."""
        return self.walk(self.build(**override), inputs)

    @staticmethod
    def walk(guide: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        needs = getattr(guide, "needs", lambda state: True)
        found, state = [], None
        for cond, uncond in zip(inputs["cond"], inputs["uncond"]):
            guided, state = guide(cond=cond, uncond=uncond if needs(state) else None, state=state)
            found.append(guided)
        return torch.stack(found), state  # one tensor: what shows at a later step only is seen by shared checks, too


def shaped(case: GuidanceCase) -> None:
    """What it returns has the shape of the predictions."""
    inputs = case.inputs()
    for guided in case.call(inputs)[0]:
        demand(guided.shape == (4, 6), f"predictions (4, 6) are guided to {tuple(guided.shape)}")


def content(case: GuidanceCase) -> None:
    """Where both predictions are the same in all steps, there is nothing to guide."""
    cond = case.inputs()["cond"]
    for expected, guided in zip(cond, case.call({"cond": cond, "uncond": cond.clone()})[0]):
        demand(same(expected, guided, rtol=1e-9, atol=1e-9), "moves a prediction on which both agree")


def stateless(case: GuidanceCase) -> None:
    """All that it remembers is its state: a run between two steps of another changes neither."""
    guide, inputs = case.build(), case.inputs()
    cond, uncond = inputs["cond"], inputs["uncond"]
    alone, _ = case.walk(guide, inputs)
    _, state = guide(cond=cond[0], uncond=uncond[0], state=None)
    case.walk(guide, {"cond": uncond, "uncond": cond})
    needs = getattr(guide, "needs", lambda state: True)
    second, _ = guide(cond=cond[1], uncond=uncond[1] if needs(state) else None, state=state)
    demand(same(alone[1], second), "another run has an influence: it keeps what belongs into the state")


def separate(case: GuidanceCase) -> None:
    """Each sample of a batch is guided as it would be alone."""
    inputs = case.inputs()
    together, _ = case.call(inputs)
    for row in range(4):
        alone, _ = case.call({name: value[:, row : row + 1] for name, value in inputs.items()})
        for step, guided in enumerate(alone):
            demand(same(together[step][row : row + 1], guided, rtol=1e-9, atol=1e-12), "samples of a batch mix")


def spared(case: GuidanceCase) -> None:
    """Where it says that it does not need the unconditional prediction, it does not look at it; else it asks for it."""
    guide, inputs = case.build(), case.inputs()
    needs, state = getattr(guide, "needs", lambda state: True), None
    for cond, uncond in zip(inputs["cond"], inputs["uncond"]):
        if needs(state):
            try:
                guide(cond=cond, uncond=None, state=state)
            except ValueError as error:
                demand("uncond" in str(error), f"asks for the unconditional prediction without naming it: {error}")
            else:
                demand(False, "takes None for an unconditional prediction that it needs")
        else:
            without, with_it = (guide(cond=cond, uncond=u, state=state)[0] for u in (None, uncond))
            demand(same(without, with_it), "looks at an unconditional prediction that it says it does not need")
        _, state = guide(cond=cond, uncond=uncond if needs(state) else None, state=state)


def keyworded(case: GuidanceCase) -> None:
    """Hyper-parameters with a default are keyword-only: those are the ones that the battery turns wrong."""
    for name, parameter in inspect.signature(case.part).parameters.items():
        plain = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is parameter.empty
        demand(plain or name == "state", f"{name} has a default and can be given by position")


ROLE = Role(
    name="guidance",
    protocol="g(cond (B, ...), uncond (B, ...) or None, state) -> (guided (B, ...), state); None starts anew",
    case=GuidanceCase,
    checks=(shaped, content, stateless, separate, spared, keyworded, *SHARED),
)
