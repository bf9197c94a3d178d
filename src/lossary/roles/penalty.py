"""Penalties: `p(module or features, ...) -> scalar`, added to the objective."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lossary.roles._battery import SHARED, Case, Role, demand, same
from lossary.roles._mark import mark

P = TypeVar("P")

BATCH, FEATURES, CLASSES = 6, 5, 3


def penalty(
    *,
    on: str,
    nonnegative: bool = True,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a penalty: a function, or a class whose `forward` is meant below.

    Its first argument is what it penalises; it asks by name for the batch it needs: x (batch, ...), y (batch,).

    Args:
        on: what the first argument is: "module" (any `nn.Module`, of which it looks at the weights or runs it on x)
            or "features" (batch, width).
        nonnegative: never below zero.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    if on not in ("module", "features"):
        raise ValueError(f"on: expected 'module' or 'features', got {on!r}")
    return mark("penalty", examples=examples, tune=tune, xfail=xfail, on=on, nonnegative=nonnegative)


class PenaltyCase(Case):
    """Feeds a smooth little classifier or its features, and the batch where the signature asks for it."""

    def parameters(self) -> list[str]:
        """Names of what is called, without self."""
        return [n for n in inspect.signature(getattr(self.part, "forward", self.part)).parameters if n != "self"]

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):  # torch draws weights from the global state, which stays as it was
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        g = torch.Generator().manual_seed(0)
        rows = torch.randn(2, BATCH, FEATURES, generator=g, dtype=torch.float64).to(dtype)
        batch = {"x": rows[0], "y": torch.randint(CLASSES, (BATCH,), generator=g)}
        first, *asked = self.parameters()
        penalised = module.to(dtype) if self.mark.options["on"] == "module" else rows[1]
        return {first: penalised, **{name: tensor for name, tensor in batch.items() if name in asked}}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good, first = self.inputs(), self.parameters()[0]
        yield first, {**good, first: torch.zeros(BATCH, FEATURES, dtype=torch.int64)}
        if "y" in good:
            yield "y", {**good, "y": good["y"][:-1]}


def scalar(case: PenaltyCase) -> None:
    """One finite number."""
    got = case.call(case.inputs())
    shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
    demand(shape == (), f"expected a tensor of shape (), got {shape}")
    demand(got.isfinite(), f"gave {got.item()}")


def nonnegative(case: PenaltyCase) -> None:
    """Where that is declared, never below zero."""
    got = case.call(case.inputs())
    demand(not case.mark.options["nonnegative"] or got >= 0, f"gave {got.item():.6g}")


def gradient(case: PenaltyCase) -> None:
    """The gradient reaches what is penalised and agrees with finite differences in float64."""
    inputs, call, first = case.inputs(), case.build(), case.parameters()[0]
    penalised = inputs[first]
    leaves = list(penalised.parameters()) if isinstance(penalised, nn.Module) else [penalised.requires_grad_()]
    demand(call(**inputs).requires_grad, f"{first} is cut from the graph")
    try:
        torch.autograd.gradcheck(lambda *_: call(**inputs), leaves)
    except RuntimeError as error:
        demand(False, "the gradient disagrees with finite differences: " + " ".join(str(error).split())[:300])


def module_untouched(case: PenaltyCase) -> None:
    """A module keeps its weights, buffers and mode, and no gradients stay behind."""
    inputs = case.inputs()
    module = inputs[case.parameters()[0]]
    if not isinstance(module, nn.Module):
        return
    before = copy.deepcopy(module.state_dict())
    case.call(inputs)
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    demand(not changed, f"changed the module's {', '.join(changed)}")
    demand(all(child.training for child in module.modules()), "left the module in another mode")
    demand(all(weight.grad is None for weight in module.parameters()), "left gradients on the module's weights")


def order_free(case: PenaltyCase) -> None:
    """The order of the batch does not matter."""
    inputs = case.inputs()
    shuffled = {name: value.flip(0) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    demand(same(case.call(shuffled), case.call(inputs), rtol=1e-9, atol=1e-12), "depends on the batch order")


ROLE = Role(
    name="penalty",
    protocol="p(module or features, ...) -> scalar",
    case=PenaltyCase,
    checks=(scalar, nonnegative, gradient, module_untouched, order_free, *SHARED),
)
