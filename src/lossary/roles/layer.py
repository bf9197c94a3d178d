"""Layers: an `nn.Module` or a plain function of a tensor, to put between others."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lossary.roles._battery import SHARED, Case, Role, demand, same, tensors
from lossary.roles._mark import mark

P = TypeVar("P")


def layer(
    *,
    shape: tuple[int, ...] = (4, 6),
    random: bool = False,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a layer.

    Args:
        shape: of the input that the battery feeds: normal numbers as the first argument of the function or of
            the module's `forward`.
        random: draws in train mode, like dropout. In eval mode it must not, and a function or a `forward` that
            takes `generator` must draw from that alone.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("layer", examples=examples, tune=tune, xfail=xfail, shape=shape, random=random)


class LayerCase(Case):
    """A call builds the layer, always with the same weights, in the input's dtype, and runs it once.

    It runs in train mode, unless it draws numbers there and takes no generator.
    """

    def signature(self) -> inspect.Signature:
        """Of what is called with the input."""
        return inspect.signature(getattr(self.part, "forward", self.part))

    def name(self) -> str:
        """The input's name, the first parameter that is not self."""
        return next(name for name in self.signature().parameters if name != "self")

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(*self.mark.options["shape"], generator=g, dtype=torch.float64)
        inputs: dict[str, Any] = {self.name(): x.to(dtype)}
        if "generator" in self.signature().parameters:
            inputs["generator"] = torch.Generator().manual_seed(1)
        return inputs

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        inputs = self.inputs()
        yield self.name(), {**inputs, self.name(): inputs[self.name()].long()}

    def build(self, **override: Any) -> Callable[..., Any]:
        """The layer; a module draws its weights from the global state, as torch's do, which is then put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(override.pop("seed", 0))
            made = super().build(**override)
        if isinstance(made, nn.Module):
            made.train(not self.mark.options["random"] or "generator" in self.signature().parameters)
        return made

    def call(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        made = self.build(**override)
        x = inputs[self.name()]
        if isinstance(made, nn.Module) and x.is_floating_point():
            made.to(x.dtype)
        return made(**inputs)

    def module(self, seed: int = 0) -> nn.Module | None:
        """The layer in eval mode and double precision, or None where it is a function."""
        made = self.build(seed=seed)
        return made.double().eval() if isinstance(made, nn.Module) else None


def gradient(case: LayerCase) -> None:
    """The gradients of input and weights agree with finite differences in float64."""
    made = case.module() or case.build()
    inputs = case.inputs()
    x = inputs.pop(case.name()).requires_grad_()
    weights = [w for w in made.parameters() if w.requires_grad] if isinstance(made, nn.Module) else []

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        fresh = {name: case.inputs()[name] for name in inputs}  # a generator starts anew
        return tuple(y for y in tensors(made(**{case.name(): x}, **fresh)) if y.is_floating_point())

    try:
        torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    except RuntimeError as error:
        demand(False, "the gradient disagrees with finite differences: " + " ".join(str(error).split())[:300])


def learns(case: LayerCase) -> None:
    """Every weight that asks for a gradient gets one."""
    made = case.module()
    if made is None or not any(w.requires_grad for w in made.parameters()):
        return
    torch.autograd.backward([y.sum() for y in tensors(made(**case.inputs())) if y.requires_grad])
    idle = [name for name, w in made.named_parameters() if w.requires_grad and w.grad is None]
    demand(not idle, f"no gradient reaches {', '.join(idle)}")


def restores(case: LayerCase) -> None:
    """A state_dict holds all that the output depends on."""
    made, other = case.module(seed=0), case.module(seed=1)
    if made is None or other is None:
        return
    made.train()
    made(**case.inputs())  # what a buffer gathers in training counts too
    other.load_state_dict(made.eval().state_dict())
    same_output = same(made(**case.inputs()), other(**case.inputs()))
    demand(same_output, "two copies with the same state_dict give different outputs")


def rests(case: LayerCase) -> None:
    """In eval mode the layer repeats itself, draws nothing and changes no state."""
    made = case.module()
    if made is None:
        return
    before = {name: value.clone() for name, value in made.state_dict().items() if isinstance(value, Tensor)}
    rng = torch.random.get_rng_state()
    first, second = made(**case.inputs()), made(**case.inputs())
    demand(torch.equal(rng, torch.random.get_rng_state()), "draws from the global random state in eval mode")
    demand(same(first, second), "two calls in eval mode gave different values")
    for name, value in made.state_dict().items():
        demand(not isinstance(value, Tensor) or torch.equal(value, before[name]), f"changes {name} in eval mode")


ROLE = Role(
    name="layer",
    protocol="an nn.Module, or f(input, *, <hyper>) on tensors",
    case=LayerCase,
    checks=(gradient, learns, restores, rests, *SHARED),
)
