"""Losses: `f(input, target, *, <tensors>, <hyper>) -> (*batch)`, one value per sample, never reduced."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.roles._battery import SHARED, Case, Role, demand, same
from lossary.roles._mark import mark
from lossary.vocabulary import asked

P = TypeVar("P")

BATCH, CLASSES = 6, 7


def loss(
    *,
    on: str,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    limits: Mapping[str, dict[str, Any]] | None = None,
    couples: bool = False,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a loss.

    A class may have `build(labels, batch_size, **hyper)`: a comparison then sets it up from the training labels.

    Args:
        on: what the target is: "classes" (logits with classes last, class numbers), "multilabel" (logits and
            0/1 targets of the same shape) or "real" (numbers and numbers). Names the battery's fixture and the
            head that `compare` builds.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        limits: name in `torch.nn.functional` -> hyper-parameters at which the loss equals it.
        couples: the value of a sample depends on its batch.
        xfail: check -> reason, for failures that are meant.
    """
    if on not in FIXTURES:
        raise ValueError(f"on: expected one of {', '.join(map(repr, FIXTURES))}, got {on!r}")
    return mark("loss", examples=examples, tune=tune, xfail=xfail, on=on, limits=dict(limits or {}), couples=couples)


def _classes(dtype: torch.dtype, lead: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    input = 2 * torch.randn(*lead, BATCH, CLASSES, generator=g, dtype=torch.float64)
    return {"input": input.to(dtype), "target": torch.randint(CLASSES, (*lead, BATCH), generator=g)}


def _multilabel(dtype: torch.dtype, lead: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    input = 2 * torch.randn(*lead, BATCH, CLASSES, generator=g, dtype=torch.float64)
    return {"input": input.to(dtype), "target": torch.randint(2, input.shape, generator=g).to(dtype)}


def _real(dtype: torch.dtype, lead: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    input, target = torch.randn(2, *lead, BATCH, generator=g, dtype=torch.float64)
    return {"input": input.to(dtype), "target": target.to(dtype)}


FIXTURES = {"classes": _classes, "multilabel": _multilabel, "real": _real}


class LossCase(Case):
    """Feeds a loss; keyword tensors are supplied by name where the signature asks for them."""

    def inputs(self, dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = ()) -> dict[str, Any]:
        inputs: dict[str, Any] = FIXTURES[self.mark.options["on"]](dtype, lead)
        further = {"index": torch.arange(BATCH), "perturbed": inputs["input"].flip(-1)}
        return inputs | asked(self.part, further)

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        yield "input", {**good, "input": good["input"].long()}
        yield "target", {**good, "target": good["target"][:-1]}
        if self.mark.options["on"] == "classes":
            yield "target", {**good, "target": good["target"].double()}
            yield "input", {**good, "input": good["input"][..., :1]}


def per_sample(case: LossCase) -> None:
    """One value per sample, never reduced."""
    inputs = case.inputs()
    shape = inputs["target"].shape[:1]
    got = case.call(inputs)
    demand(
        isinstance(got, Tensor) and got.shape == shape,
        f"expected shape {tuple(shape)}, got {tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__}",
    )


def gradient(case: LossCase) -> None:
    """The gradient agrees with finite differences in float64."""
    inputs = case.inputs()
    call = case.build()
    input = inputs.pop("input").requires_grad_()
    try:
        torch.autograd.gradcheck(lambda z: call(input=z, **inputs), (input,), fast_mode=False)
    except RuntimeError as error:
        demand(False, "the gradient disagrees with finite differences: " + " ".join(str(error).split())[:300])


def finite(case: LossCase) -> None:
    """Values and gradients stay finite at logits of +-1e4."""
    inputs = case.inputs(torch.float32)
    input = (inputs["input"].sign() * 1e4).requires_grad_()
    value = case.call({**inputs, "input": input})
    demand(value.isfinite().all(), f"logits of +-1e4 gave {value.detach().flatten()[:4].tolist()}")
    (grad,) = torch.autograd.grad(value.sum(), input)
    demand(grad.isfinite().all(), "logits of +-1e4 gave a gradient that is not finite")


def limits(case: LossCase) -> None:
    """Declared limits are reached."""
    for name, hyper in case.mark.options["limits"].items():
        inputs = case.inputs()
        expected = getattr(F, name)(inputs["input"], inputs["target"], reduction="none")
        demand(same(case.call(inputs, **hyper), expected, rtol=1e-9, atol=1e-9), f"is not {name} at {hyper}")


def order_free(case: LossCase) -> None:
    """Shuffling the batch shuffles the values."""
    inputs, order = case.inputs(), torch.arange(BATCH).flip(0)
    shuffled = {k: v[order] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    demand(same(case.call(shuffled), case.call(inputs)[order], rtol=1e-9, atol=1e-12), "depends on the batch order")


def stacks(case: LossCase) -> None:
    """f(stack) equals stack(f): leading dimensions are independent replicas."""
    if case.mark.options["couples"] or isinstance(case.part, type):
        return  # these see one replica at a time
    stack = case.inputs(lead=(3,))
    rows = [
        case.call({k: v[i] if isinstance(v, Tensor) and v.ndim and len(v) == 3 else v for k, v in stack.items()})
        for i in range(3)
    ]
    demand(same(case.call(stack), torch.stack(rows), rtol=1e-9, atol=1e-12), "a stack of batches is not treated as one")


ROLE = Role(
    name="loss",
    protocol="f(input, target, *, <tensors>, <hyper>) -> (*batch)",
    case=LossCase,
    checks=(per_sample, gradient, finite, limits, order_free, stacks, *SHARED),
)
