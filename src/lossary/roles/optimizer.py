"""Optimizers: subclasses of `torch.optim.Optimizer`, stepped with a closure as any of torch's can be."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

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
    repeatable,
    same,
    tensor_hyper,
)
from lossary.roles._mark import mark

P = TypeVar("P")


def optimizer(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark an optimizer.

    One that uses a norm over all parameters, or anything else that couples them, takes `replicas=True` for
    parameters that carry a stack of independent models in their leading dimension.

    Args:
        examples: hyper-parameters for the battery, with a learning rate at which a quadratic of curvatures
            0.5 to 2 converges in 300 steps.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("optimizer", examples=examples, tune=tune, xfail=xfail)


class Descent:
    """An optimizer at work on copies of some tensors, on quadratics with their minimum at 1."""

    def __init__(self, case: "OptimizerCase", start: Sequence[Tensor], **override: Any) -> None:
        self.parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        self.optimizer = case.make(self.parameters, **override)

    def loss(self) -> Tensor:
        """Sum over the tensors, and over a stack of them; curvatures run from 0.5 to 2 in trailing dimensions."""
        terms = []
        for p in self.parameters:
            curvature = torch.linspace(0.5, 2.0, p.shape[-1], dtype=p.dtype)
            terms.append(0.5 * (curvature * (p - 1.0) ** 2).sum())
        return torch.stack(terms).sum()

    def closure(self) -> Tensor:
        """Clear the gradients, and compute the loss and its gradients."""
        self.optimizer.zero_grad()
        loss = self.loss()
        torch.autograd.backward(loss)
        return loss

    def run(self, steps: int) -> list[Tensor]:
        """Take steps and return the parameters."""
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return [p.detach() for p in self.parameters]


class OptimizerCase(Case):
    """A call is ten steps from the inputs, and returns the parameters."""

    def make(self, parameters: Any, **override: Any) -> Any:
        """The optimizer of these parameters or groups."""
        return self.part(parameters, **{**self.hyper, **override})

    def inputs(self, dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = ()) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        shapes = {"weight": (4, 3), "bias": (4,)}
        return {
            name: torch.randn(*lead, *shape, generator=g, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }

    def call(self, inputs: Mapping[str, Any], **override: Any) -> Any:
        return Descent(self, list(inputs.values()), **override).run(10)

    def descent(self, **override: Any) -> Descent:
        """Fresh parameters and their optimizer."""
        return Descent(self, list(self.inputs().values()), **override)


def converges(case: OptimizerCase) -> None:
    """A quadratic's loss falls a hundredfold within 300 steps."""
    descent = case.descent()
    before = descent.loss().item()
    descent.run(300)
    after = descent.loss().item()
    demand(after <= before / 100, f"a quadratic's loss went from {before:.3g} to {after:.3g} in 300 steps")


def resumes(case: OptimizerCase) -> None:
    """A state_dict saved in mid-run and loaded into a fresh optimizer continues identically."""
    whole = case.descent()
    whole.run(5)
    saved = io.BytesIO()
    torch.save(whole.optimizer.state_dict(), saved)
    saved.seek(0)
    resumed = Descent(case, [p.detach() for p in whole.parameters])
    resumed.optimizer.load_state_dict(torch.load(saved, weights_only=True))
    demand(same(whole.run(5), resumed.run(5)), "a run resumed from its state_dict goes another way")


def missing_gradients(case: OptimizerCase) -> None:
    """A parameter without a gradient stays where it is."""
    descent = case.descent()
    idle = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    descent.optimizer.add_param_group({"params": [idle]})
    descent.run(3)
    demand((idle == 2.0).all(), f"moved a parameter that has no gradient, by {(idle - 2.0).abs().max():.3g}")


def groups(case: OptimizerCase) -> None:
    """Each parameter group keeps its own learning rate."""
    descent = case.descent()
    held = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    descent.optimizer.add_param_group({"params": [held], "lr": 0.0})
    descent.parameters.append(held)
    before = [p.detach().clone() for p in descent.parameters]
    *moved, still = descent.run(3)
    demand((still == 2.0).all(), "moved a parameter whose group has learning rate 0")
    for start, end in zip(before, moved):
        demand(not torch.equal(start, end), "a group with learning rate 0 stopped the others too")


def returns_loss(case: OptimizerCase) -> None:
    """step(closure) returns the loss before the step, and enables gradients for the closure itself."""
    descent = case.descent()
    expected = descent.loss().item()
    with torch.no_grad():
        got = descent.optimizer.step(descent.closure)
    demand(isinstance(got, Tensor | float), f"step(closure) returned {type(got).__name__}, not the loss")
    value = float(torch.as_tensor(got).detach())
    demand(abs(value - expected) < 1e-9, f"step(closure) returned {value:.6g}, the loss was {expected:.6g}")


def schedules(case: OptimizerCase) -> None:
    """A learning-rate schedule of torch takes effect."""
    descent = case.descent()
    schedule = LambdaLR(descent.optimizer, lambda epoch: 0.0 if epoch else 1.0)
    before = [p.clone() for p in descent.run(1)]
    schedule.step()
    demand(same(before, descent.run(3)), "went on although a schedule had set the learning rate to 0")


def stacks(case: OptimizerCase) -> None:
    """A stack of models in the leading dimension is trained as each would be alone."""
    stack = list(case.inputs(lead=(3,)).values())
    override = {"replicas": True} if "replicas" in case.hyper_parameters() else {}
    alone = [Descent(case, [tensor[i] for tensor in stack]).run(10) for i in range(3)]
    together = Descent(case, stack, **override).run(10)
    for i in range(3):
        got = [tensor[i] for tensor in together]
        demand(same(got, alone[i], rtol=1e-9, atol=1e-12), "the models of a stack influence each other")


ROLE = Role(
    name="optimizer",
    protocol="torch.optim.Optimizer(params, ..., **hyper), stepped with step(closure)",
    case=OptimizerCase,
    checks=(
        converges,
        resumes,
        missing_gradients,
        groups,
        returns_loss,
        schedules,
        stacks,
        quick,
        repeatable,
        dtypes_agree,
        bfloat16_finite,
        dtype_follows,
        refuses_hyper,
        tensor_hyper,
        documented,
    ),
)
