"""Weightings: `w(losses, *, target, group, index) -> (*batch)`, one weight per sample; the user multiplies."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lossary.roles._battery import (
    Case,
    Role,
    bfloat16_finite,
    demand,
    documented,
    dtype_follows,
    dtypes_agree,
    quick,
    refuses_hyper,
    refuses_inputs,
    repeatable,
    same,
    unmutated,
)
from lossary.roles._mark import mark

P = TypeVar("P")

BATCH = 6


def weighting(
    *,
    normalised: str | None = None,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a weighting: a function, or an `nn.Module` where it keeps a state.

    It is called with the losses (*batch), which carry no gradient, and asks by keyword for what else it needs:
    `target`, `group` (numbers from 0) or `index` (the samples' positions in the data), each (*batch). A state
    lives in buffers and moves in training mode only.

    Args:
        normalised: what holds in every batch: the weights' "mean" is 1, their "sum" is 1, or neither.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    if normalised not in ("mean", "sum", None):
        raise ValueError(f"normalised: expected 'mean', 'sum' or None, got {normalised!r}")
    return mark("weighting", examples=examples, tune=tune, xfail=xfail, normalised=normalised)


class WeightingCase(Case):
    """Feeds a weighting with six losses and whatever else its signature asks for."""

    def build(self, **override: Any) -> Callable[..., Any]:
        if "generator" in inspect.signature(self.part).parameters:
            override.setdefault("generator", torch.Generator().manual_seed(0))
        return super().build(**override)

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        offered = {
            "target": torch.tensor([0, 1, 1, 2, 0, 6]),
            "group": torch.tensor([0, 1, 1, 2, 0, 1]),
            "index": torch.tensor([7, 2, 11, 0, 5, 3]),
        }
        asked = inspect.signature(getattr(self.part, "forward", self.part)).parameters
        losses = torch.tensor([0.1, 2.5, 0.7, 0.0, 4.0, 1.2], dtype=dtype)
        return {"losses": losses, **{name: tensor for name, tensor in offered.items() if name in asked}}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        yield "losses", {**good, "losses": good["losses"].long()}
        yield "losses", {**good, "losses": good["losses"].mean()}
        for name in good.keys() - {"losses"}:
            yield name, {**good, name: good[name][:-1]}
            yield name, {**good, name: good[name].double()}


def per_sample(case: WeightingCase) -> None:
    """One weight per sample."""
    weights = case.call(case.inputs())
    got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    demand(got == (BATCH,), f"expected shape {(BATCH,)}, got {got}")


def non_negative(case: WeightingCase) -> None:
    """Weights are finite and not below zero."""
    weights = case.call(case.inputs())
    demand(weights.isfinite().all() and (weights >= 0).all(), f"gave {weights.tolist()}")


def normalised(case: WeightingCase) -> None:
    """Where a normalisation is declared, it holds in every batch."""
    declared = case.mark.options["normalised"]
    if declared is None:
        return
    inputs = case.inputs()
    for batch in (inputs, {name: tensor[:4] for name, tensor in inputs.items()}):
        got = getattr(case.call(batch), declared)().item()
        demand(abs(got - 1) < 1e-6, f"declares that the {declared} is 1, it is {got:.6g}")


def fair(case: WeightingCase) -> None:
    """Samples that differ in nothing but their index weigh the same."""
    alike = {name: tensor if name == "index" else torch.ones_like(tensor) for name, tensor in case.inputs().items()}
    weights = case.call(alike)
    demand(same(weights, weights[0].expand(BATCH), rtol=1e-9), f"equal samples got {weights.tolist()}")


def order_free(case: WeightingCase) -> None:
    """Shuffling the batch shuffles the weights."""
    inputs, order = case.inputs(), torch.arange(BATCH).flip(0)
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    demand(same(case.call(shuffled), case.call(inputs)[order], rtol=1e-9), "depends on the batch order")


def detached(case: WeightingCase) -> None:
    """Weights carry no gradient, even where the losses do."""
    inputs = case.inputs()
    inputs["losses"].requires_grad_()
    demand(not case.call(inputs).requires_grad, "the weights are part of the graph; detach the losses")


def resumes(case: WeightingCase) -> None:
    """A state_dict taken in mid-run continues in a fresh object as in the old one."""
    running = case.build()
    if not isinstance(running, nn.Module):
        return
    inputs = case.inputs()
    running(**inputs)
    resumed: Any = case.build()
    resumed.load_state_dict(copy.deepcopy(running.state_dict()))
    for turn in range(2):
        inputs = {**inputs, "losses": inputs["losses"].flip(0)}
        demand(same(running(**inputs), resumed(**inputs)), f"differs {turn + 1} calls after the state was loaded")


def evaluation(case: WeightingCase) -> None:
    """In evaluation mode a call leaves the state as it was."""
    module = case.build()
    if not isinstance(module, nn.Module):
        return
    module.eval()
    before = copy.deepcopy(module.state_dict())
    module(**case.inputs())
    for name, value in module.state_dict().items():
        demand(same(value, before[name]), f"changed {name} in evaluation mode")


ROLE = Role(
    name="weighting",
    protocol="w(losses, *, target, group, index) -> (*batch)",
    case=WeightingCase,
    checks=(
        per_sample,
        non_negative,
        normalised,
        fair,
        order_free,
        detached,
        resumes,
        evaluation,
        quick,
        unmutated,
        repeatable,
        dtypes_agree,
        bfloat16_finite,
        dtype_follows,
        refuses_inputs,
        refuses_hyper,
        documented,
    ),
)
