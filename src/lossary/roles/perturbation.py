"""Perturbations: `a(model, x, y, *, ...) -> x'`, inputs changed on purpose: attacks, maskers, augmentations."""

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
    quick,
    refuses_hyper,
    refuses_inputs,
    repeatable,
    same,
    unmutated,
)
from lossary.roles._mark import mark

P = TypeVar("P")

BATCH, FEATURES, CLASSES = 6, 5, 3
NORMS = {"inf": torch.inf, "1": 1, "2": 2}


def perturbation(
    *,
    norm: str | None = None,
    radius: str = "epsilon",
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a perturbation.

    It is called as a(model, x, y, ...) with rows x (batch, ...) and classes y (batch,), in whatever mode the model is,
    and gives new rows without a graph. Where it draws numbers it takes a `generator`.

    Args:
        norm: in which every row stays within the radius of where it was: "inf", "1" or "2"; None where there is
            no such promise.
        radius: name of the hyper-parameter that is the radius.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))} or None, got {norm!r}")
    return mark("perturbation", examples=examples, tune=tune, xfail=xfail, norm=norm, radius=radius)


class PerturbationCase(Case):
    """Feeds a small classifier in training mode, of which one layer is not, and rows between 0 and 1."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):  # torch draws weights from the global state, which stays as it was
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, CLASSES)
            )
        g = torch.Generator().manual_seed(0)
        model.to(dtype).train()[1].eval()
        inputs = {
            "model": model,
            "x": torch.rand(BATCH, FEATURES, generator=g, dtype=torch.float64).to(dtype),
            "y": torch.randint(CLASSES, (BATCH,), generator=g),
        }
        if "generator" in inspect.signature(self.part).parameters:
            inputs["generator"] = torch.Generator().manual_seed(1)
        return inputs

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        yield "x", {**good, "x": good["x"].long()}
        yield "y", {**good, "y": good["y"][:-1]}


def perturbs(case: PerturbationCase) -> None:
    """Gives changed inputs, shaped as before and without a graph."""
    x, got = case.inputs()["x"], case.call(case.inputs())
    demand(isinstance(got, Tensor) and got.shape == x.shape, f"expected shape {tuple(x.shape)}, got {_shape(got)}")
    demand(not got.requires_grad, "the result carries a graph; detach it")
    demand(not torch.equal(got, x), "nothing changed")


def inside_ball(case: PerturbationCase) -> None:
    """Where a norm is declared, no row moves farther than the radius."""
    norm, radius = case.mark.options["norm"], case.mark.options["radius"]
    if norm is None:
        return
    usual = case.hyper_parameters()[radius]
    for allowed in (usual, usual / 10):
        inputs = case.inputs()
        moved = torch.linalg.vector_norm(case.call(inputs, **{radius: allowed}) - inputs["x"], NORMS[norm], -1)
        demand(moved.max() <= allowed * (1 + 1e-9), f"a row moved by {moved.max():.6g} at {radius} = {allowed:.6g}")


def model_restored(case: PerturbationCase) -> None:
    """The model keeps its weights, buffers and modes, and no gradients stay behind."""
    inputs = case.inputs()
    model = inputs["model"]
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    case.call(inputs)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    demand(not changed, f"changed the model's {', '.join(changed)}")
    demand([module.training for module in model.modules()] == modes, "left a module of the model in another mode")
    demand(all(weight.requires_grad for weight in model.parameters()), "left weights that no longer require grad")
    left = [name for name, tensor in [*model.named_parameters(), ("x", inputs["x"])] if tensor.grad is not None]
    demand(not left, f"left gradients on {', '.join(left)}")


def works_without_grad(case: PerturbationCase) -> None:
    """Works the same inside torch.no_grad()."""
    with torch.no_grad():
        inside = case.call(case.inputs())
    demand(same(inside, case.call(case.inputs()), atol=1e-12), "gives something else inside torch.no_grad()")


def rows_apart(case: PerturbationCase) -> None:
    """What becomes of a row does not depend on the other rows."""
    inputs = case.inputs()
    others = {**case.inputs(), "x": torch.cat([inputs["x"][:1], 1 - inputs["x"][1:]])}
    demand(
        same(case.call(others)[0], case.call(inputs)[0], atol=1e-9),
        "the first row fares differently when the others change",
    )


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


ROLE = Role(
    name="perturbation",
    protocol="a(model, x, y, *, ...) -> x'",
    case=PerturbationCase,
    checks=(
        perturbs,
        inside_ball,
        model_restored,
        works_without_grad,
        rows_apart,
        quick,
        unmutated,
        repeatable,
        bfloat16_finite,
        dtype_follows,
        refuses_inputs,
        refuses_hyper,
        documented,
    ),
)
