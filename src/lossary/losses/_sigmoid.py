"""The engine of the sigmoid losses: focal terms of every label, summed over labels, at about the cost of BCE.

Most losses for independent labels are sums over labels of w (1 - q)^gamma (-log q), where q is the probability that
the model gives to the label's true value, and the exponent differs between labels that are there and labels that are
not. Written with plain operations this takes a dozen passes over memory, and as many arrays are kept for the
gradient. Here value and slope are computed together for a few rows at a time, which stay in the cache; what is kept
is the slope alone.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.losses._blocks import at_once, blocks

Numbers = tuple[float, float, float, float, bool]

CELLS = 2**17  # entries computed at a time: the buffers stay in the cache, and calls cost little beside them


def binary_losses(
    input: Float[Tensor, "*batch labels"],
    target: Float[Tensor, "*batch labels"],
    *,
    positive: float | Tensor = 0.0,
    negative: float | Tensor = 0.0,
    margin: float = 0.0,
    weight: Tensor | None = None,
    negative_weight: float = 1.0,
    frozen: bool = False,
) -> Float[Tensor, "*batch"]:
    """Sum over labels of w (1 - q)^gamma (-log q), in nats.

    For a label that is there q = sigmoid(z) and gamma = positive; for one that is not q = min(1 - sigmoid(z) + margin,
    1), gamma = negative, and w is multiplied by negative_weight. Exact where the sigmoid underflows. With everything
    at its default this is binary cross-entropy. Twice differentiable in the input alone.

    Args:
        input: logits.
        target: 1 where a label is there, 0 where not; nothing between.
        positive: exponent, 0 or at least 1; a tensor holds one for each label, (labels,), or any shape that broadcasts.
        negative: likewise.
        margin: m, 0 <= m < 1.
        weight: of every term, broadcast to the input; None is 1.
        negative_weight: at least 0.
        frozen: pass no gradient through (1 - q)^gamma.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.
    """
    binary(input, target)
    for name, exponent in (("positive", positive), ("negative", negative)):
        require.number(name, exponent, at_least=0.0)
        if not isinstance(exponent, Tensor) and 0 < exponent < 1:
            raise ValueError(f"{name}: expected 0 or a number >= 1 (the slope is infinite at q = 1), got {exponent!r}")
    require.number("margin", margin, at_least=0.0, below=1.0)
    require.number("negative_weight", negative_weight, at_least=0.0)
    tensors = [
        value.expand(input.shape) if isinstance(value, Tensor) else None for value in (positive, negative, weight)
    ]
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "weight, positive, negative: expected tensors without gradient, which is passed to none of them"
        )
    numbers = (
        0.0 if isinstance(positive, Tensor) else float(positive),
        0.0 if isinstance(negative, Tensor) else float(negative),
        float(margin),
        float(negative_weight),
        frozen,
    )
    if torch.compiler.is_compiling():  # it fuses the passes by itself
        return _plain(input, target, *tensors, numbers)
    value: Tensor = _BinaryLosses.apply(input, target, *tensors, numbers)[0]
    return value


def binary(input: Any, target: Any) -> None:
    """Logits (*batch, labels) with 0/1 targets of the same shape and a floating-point dtype, the arguments of all."""
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape))


def _plain(
    input: Tensor,
    target: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    weight: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """The formula as it stands, for second derivatives and compilers."""
    gamma_positive, gamma_negative, margin, negative_weight, frozen = numbers
    u = (2 * target - 1) * input
    log_q = torch.nn.functional.logsigmoid(u)
    q = log_q.exp()
    if margin:
        q = (q + margin * (1 - target)).clamp(max=1.0)
        log_q = torch.where(target > 0.5, log_q, q.log())
    miss = 1 - q
    at_positive = miss ** (gamma_positive if positive is None else positive)
    at_negative = negative_weight * miss ** (gamma_negative if negative is None else negative)
    focus = torch.where(target > 0.5, at_positive, at_negative)
    focus = focus.detach() if frozen else focus
    return -(focus * log_q * (1.0 if weight is None else weight)).sum(-1)


class _BinaryLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        positive: Tensor | None,
        negative: Tensor | None,
        weight: Tensor | None,
        numbers: Numbers,
    ) -> tuple[Tensor, Tensor]:
        gamma_positive, gamma_negative, margin, negative_weight, frozen = numbers
        labels = input.shape[-1]
        z, y = input.reshape(-1, labels), target.to(input.dtype).reshape(-1, labels)
        exponents_positive, exponents_negative, weights = (
            None if t is None else t.to(z.dtype).reshape(-1, labels) for t in (positive, negative, weight)
        )
        value, slope = z.new_empty(len(z)), torch.empty_like(z)
        buffers = z.new_empty(8, min(at_once(z, CELLS), len(z)), labels)
        of_block = buffers.unbind()
        tiny = torch.finfo(z.dtype).tiny
        margin = torch.tensor(margin, dtype=z.dtype).item()  # as it is in this precision, to add exactly 0 to positives
        minus_one, zero, one, shift = (z.new_full((), number) for number in (-1.0, 0.0, 1.0, margin))
        alike = positive is negative is None and gamma_positive == gamma_negative and negative_weight == 1
        for rows in blocks(z, CELLS):
            there, by_z = y[rows], slope[rows]
            if len(there) < len(of_block[0]):
                of_block = buffers[:, : len(there)].unbind()
            sign, u, q, shifted, log_q, derivative, *spare = of_block
            torch.add(minus_one, there, alpha=2, out=sign)
            torch.mul(sign, z[rows], out=u)
            torch.sigmoid(u, out=q).clamp_(min=tiny)  # the probability of the label's true value
            if margin:
                torch.add(shift, there, alpha=-margin, out=shifted).add_(q).clamp_(max=1)
                u.mul_(there)  # a shifted q does not come to the bound
            else:
                shifted = q
            torch.log(shifted, out=log_q)
            torch.minimum(log_q, u, out=log_q)  # u is larger, unless q was at its bound, where log sigmoid(u) is u
            miss, focus = torch.sub(one, shifted, out=u), by_z
            _raised(miss, gamma_negative if exponents_negative is None else exponents_negative[rows], focus, derivative)
            if negative_weight != 1:
                focus.mul_(negative_weight)
                derivative.mul_(negative_weight)
            if not alike:
                if exponents_positive is None and gamma_positive in (0, 1):  # the usual ones, without another power
                    power, by_power = (one, zero) if gamma_positive == 0 else (miss, one)
                else:
                    power, by_power = spare
                    _raised(miss, gamma_positive if exponents_positive is None else exponents_positive[rows], *spare)
                focus.lerp_(power, there)
                derivative.lerp_(by_power, there)
            if weights is not None:
                focus.mul_(weights[rows])
            torch.sum(torch.mul(focus, log_q, out=u), -1, out=value[rows])
            if frozen:
                by_q = focus.div_(shifted).neg_()
            else:
                if weights is not None:
                    derivative.mul_(weights[rows])
                by_q = derivative.mul_(log_q).addcdiv_(focus, shifted, value=-1)
            if margin and not gamma_negative:
                by_q.mul_(shifted < 1)  # elsewhere (1 - q)^gamma is 0 where q no longer moves
            torch.ops.aten.sigmoid_backward(by_q, q, grad_input=by_z).mul_(sign)
        return value.neg_().view(input.shape[:-1]), slope.view(input.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.numbers = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        *inputs, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the slope must depend on the input
            (slope,) = torch.autograd.grad(_plain(*inputs, ctx.numbers).sum(), inputs[0], create_graph=True)
        return slope * grad.unsqueeze(-1), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Leading dimensions are independent, so the mapped one becomes one of them."""
        *tensors, numbers = inputs
        stacked = [
            t if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims)
        ]
        return _BinaryLosses.apply(*stacked, numbers), (0, 0)


def _raised(miss: Tensor, gamma: float | Tensor, value: Tensor, slope: Tensor) -> None:
    """Write miss^gamma and gamma miss^(gamma - 1), 0 where gamma is 0, to the two buffers."""
    if isinstance(gamma, Tensor):
        torch.pow(miss, gamma - 1, out=slope)
        torch.pow(miss, gamma, out=value)
        slope.mul_(gamma).masked_fill_(gamma == 0, 0.0)
    elif gamma == 0:
        value.fill_(1)
        slope.zero_()
    else:
        torch.pow(miss, gamma - 1, out=slope)  # as cheap as products where the exponent is 1, 2 or 3
        torch.mul(slope, miss, out=value)
        slope.mul_(gamma)
