"""The engine of the softmax losses: log p_y at a temperature and with a margin, with a lean gradient.

Nearly every loss for one-of-K classification is a function of z = log p_y, the log-probability of the true
class. `log_prob` does the only work that touches all K logits: one softmax forward, one scaled
(onehot - p) backward. What a paper adds is then arithmetic on a vector of length N, which autograd
differentiates for free, hyper-parameters and second derivatives included.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require


def log_prob(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    temperature: float | Tensor = 1.0,
    margin: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """log softmax(input / temperature - margin * onehot(target))[target], in nats. Twice differentiable.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        temperature: above 0; a tensor holds one for all samples, (), or one for each, (*batch).
        margin: taken off the true class, shaped as `temperature`.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `require.classes`), a number out of range.
    """
    require.classes(input, target)
    require.number("temperature", temperature, above=0.0)
    require.number("margin", margin)
    return _LogProb.apply(input, target, _unless(1.0, temperature, input), _unless(0.0, margin, input))[0]


def scaled(input: Tensor, target: Tensor, temperature: Tensor | None, margin: Tensor | None) -> Tensor:
    """input / temperature - margin * onehot(target); None leaves out its step, and with both the input is returned."""
    if temperature is not None:
        input = input / temperature.unsqueeze(-1)
    if margin is not None:
        input = input.scatter_add(-1, target.unsqueeze(-1), -margin.expand(target.shape).unsqueeze(-1))
    return input


class _LogProb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, temperature: Tensor | None, margin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        s = scaled(input, target, temperature, margin)
        p = torch.softmax(s, -1)
        # log p_y = s_y - max s + log max p: exact where p_y itself underflows, and cheaper than a second
        # pass for the logarithm of the sum, since max p = 1 / sum exp(s - max s).
        top = p.amax(-1, keepdim=True).log() - s.amax(-1, keepdim=True)
        return (s.gather(-1, target.unsqueeze(-1)) + top).squeeze(-1), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        input, target, temperature, margin, p = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so p must depend on the input
            p = torch.softmax(scaled(input, target, temperature, margin), -1)
        at_target = target.unsqueeze(-1)
        by_temperature = by_margin = None
        if ctx.needs_input_grad[3]:
            by_margin = (grad * (p.gather(-1, at_target).squeeze(-1) - 1)).sum_to_size(margin.shape)
        if temperature is not None:
            grad = grad / temperature
        if ctx.needs_input_grad[2]:
            lead = input.gather(-1, at_target).squeeze(-1) - torch.linalg.vecdot(p, input)
            by_temperature = (-grad * lead / temperature).sum_to_size(temperature.shape)
        grad = grad.unsqueeze(-1)
        return (p * -grad).scatter_add_(-1, at_target, grad), None, by_temperature, by_margin


def _unless(default: float, value: float | Tensor, like: Tensor) -> Tensor | None:
    """The value as a tensor, or None where it is a number equal to the default."""
    if isinstance(value, Tensor):
        return value
    return None if value == default else like.new_full((), value)
