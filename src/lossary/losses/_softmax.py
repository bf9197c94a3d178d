"""The engine of the softmax losses: log p_y with a lean gradient.

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


class _LogProb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(input, -1)
        # log p_y = x_y - max x + log max p: exact where p_y itself underflows, and cheaper than a second
        # pass for the logarithm of the sum, since max p = 1 / sum exp(x - max x).
        top = p.amax(-1, keepdim=True).log() - input.amax(-1, keepdim=True)
        return (input.gather(-1, target.unsqueeze(-1)) + top).squeeze(-1), p

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
        grad = grad.unsqueeze(-1)
        return (p * -grad).scatter_add(-1, target.unsqueeze(-1), grad), None


def log_prob(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log softmax(input)[target], per sample, natural logarithm. Twice differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `require.classes`).
    """
    require.classes(input, target)
    return _LogProb.apply(input, target)[0]
