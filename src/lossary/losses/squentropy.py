"""Squentropy: cross-entropy plus the mean square of the wrong classes' logits.

Cross-entropy fixes only how far the true logit leads, and on separable data pushes that lead without end. The added
term holds the wrong logits near 0, so that the true one alone grows, and with it only as fast as its logarithm pays.
Try it as a replacement for cross-entropy under the same learning rate, where accuracy is what you want and
confidences should not run away; there is nothing to tune. It has no answer of its own to wrong labels, and a wrong
logit far below 0 costs as much as one far above. The rescaled square loss, its competitor, is here too.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Cut your Losses with Squentropy",
    year=2023,
    helps=("overconfidence",),
    equation=r"\ell=-\log\operatorname{softmax}(z)_y+\frac1{C-1}\sum_{j\ne y}z_j^2",
    url="https://arxiv.org/abs/2302.03952",
)


@loss(on="classes")
def squentropy_loss(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """-log softmax(z)_y + sum over j other than y of z_j^2 / (C - 1), in nats, per sample.

    Args:
        input: logits z of C classes; two of them for a binary task.
        target: class numbers y, 0 to C - 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> squentropy_loss(torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([0]))  # log(2 + e^3) + 9 / 2
    tensor([7.5949])
    """
    require.classes(input, target)
    return _Squentropy.apply(input, target)[0]


@loss(
    on="classes",
    examples=({}, {"k": 5.0, "M": 3.0}),
    tune={"k": (1.0, 5.0), "M": (1.0, 5.0)},
)
def rescaled_square_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    k: float | Tensor = 1.0,
    M: float | Tensor = 1.0,
) -> Float[Tensor, "*batch"]:
    """(k (z_y - M)^2 + sum over j other than y of z_j^2) / C, of Hui and Belkin (2020). Per sample.

    With k = M = 1, for few classes, it is the mean square distance to the one-hot code; more classes want larger ones.

    Args:
        input: outputs z of C classes, not passed through softmax.
        target: class numbers y, 0 to C - 1.
        k: weight of the true class, above 0.
        M: what the true class is to reach, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, k or M not above 0.

    >>> import torch
    >>> rescaled_square_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), k=2.0, M=4.0)  # (2 * 9 + 9) / 2
    tensor([13.5000])
    """
    require.classes(input, target)
    require.number("k", k, above=0.0)
    require.number("M", M, above=0.0)
    at_target = target.unsqueeze(-1)
    wrong = input.scatter(-1, at_target, 0)
    miss = input.gather(-1, at_target).squeeze(-1) - M
    return (k * miss**2 + torch.linalg.vecdot(wrong, wrong)) / input.shape[-1]


class _Squentropy(torch.autograd.Function):
    """One function, since separate ones would each fill, keep and add up a gradient of all logits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(input, -1)
        # log sum exp z = max z - log max p, cheaper than a second pass of exponentials.
        log_sum = input.amax(-1) - p.amax(-1).log()
        # Squares are summed in single precision at least: where the true logit dominates, taking its own off cancels.
        wide = torch.promote_types(input.dtype, torch.float32)
        true = input.gather(-1, target.unsqueeze(-1)).squeeze(-1).to(wide)
        wrong = (torch.linalg.vector_norm(input, dim=-1, dtype=wide) ** 2 - true**2).clamp_min(0)
        return (log_sum - true + wrong / (input.shape[-1] - 1)).to(input.dtype), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        input, target, p = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so p must depend on the input
            p = torch.softmax(input, -1)
        at_target, share = target.unsqueeze(-1), 2 / (input.shape[-1] - 1)
        slope = torch.add(p, input, alpha=share).scatter_add_(-1, at_target, -1 - share * input.gather(-1, at_target))
        return slope * grad.unsqueeze(-1), None
