"""GOL: the classifier of a detector reads its logits by the Gumbel distribution instead of by the sigmoid.

In long-tailed detection nearly every class is absent nearly everywhere, and a sigmoid, which treats presence and
absence alike, is slow to believe in a rare class. The Gumbel distribution function is lopsided: a positive pulls with
a gradient that grows without bound, a negative's fades faster than the sigmoid's. Swap it in where classes are rare
and most proposals are background, for the class scores and, as the paper also does, for masks; the scores at inference
are `gumbel_activation` of the logits. With balanced classes expect nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer, loss

PAPER = Paper(
    title="Long-tailed Instance Segmentation using Gumbel Optimized Loss",
    year=2022,
    helps=("class-imbalance",),
    departs=(
        "the official code cuts the reduced loss at 20; not done here",
        "classification alone, not the normalised mask head or the sampler of the full detector",
    ),
    equation=(
        r"\eta(z) = \exp(-e^{-z}), \qquad \ell = -\sum_c \bigl( y_c \log \eta(z_c)"
        r" + (1 - y_c) \log(1 - \eta(z_c)) \bigr)"
    ),
    url="https://arxiv.org/abs/2207.10936",
)

_LOW, _HIGH = -4.0, 10.0  # where the official code cuts logits before the loss


@layer()
def gumbel_activation(input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """exp(-exp(-z)), the standard Gumbel distribution function: 1 / e at 0, 0 to 1.

    Start a classifier's bias at -2 for first scores of 0.0006.

    Args:
        input: logits z.

    Raises:
        ValueError: no floating-point tensor.

    >>> import torch
    >>> gumbel_activation(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([6.1798e-04, 3.6788e-01, 8.7342e-01])
    """
    require.floating("input", input)
    return (-(-input).exp()).exp()


@loss(on="multilabel")
def gumbel_binary_cross_entropy(
    input: Float[Tensor, "*batch classes"], target: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy of `gumbel_activation`, summed over classes. Per sample, natural logarithm.

    A class that is there costs exp(-z), one that is not -log(1 - exp(-exp(-z))). Logits are cut to -4 and 10 before, as
    in the official code; beyond that nothing has a gradient.

    Args:
        input: logits z.
        target: 1 where a class is there, else 0; a background proposal is all 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> gumbel_binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # 1 - log(1 - 1 / e)
    tensor([1.4587])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape))
    return _terms(input, target).sum(-1)


def gumbel_optimized_loss(
    input: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    rare: Bool[Tensor, " classes"],
    *,
    generator: Generator | None = None,
) -> Float[Tensor, " batch"]:
    """`gumbel_binary_cross_entropy` with DropLoss (Hsieh et al. 2021): rare classes are spared most of their negatives.

    A proposal of another class says nothing against a rare class; a background proposal does so with a chance equal to
    the share of rare classes among the batch's objects, and surely where the batch has no object. Per sample.

    Args:
        input: logits of the classes, background not among them.
        target: class of each proposal, from 0; the number of classes is background.
        rare: which classes are rare; in the paper those in less than 0.11% of LVIS v1's images.
        generator: draws which background proposals count against which rare class; None is torch's own.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> z, rare = torch.zeros(2, 2), torch.tensor([False, True])
    >>> gumbel_optimized_loss(z, torch.tensor([0, 2]), rare)  # no object is rare, so nothing counts against class 1
    tensor([1.0000, 0.4587])
    """
    require.floating("input", input, dims=2)
    require.integers("target", target, shape=input.shape[:1])
    if not isinstance(rare, Tensor) or rare.dtype is not torch.bool or rare.shape != input.shape[1:]:
        raise ValueError(f"rare: expected a bool tensor ({input.shape[1]},), got {rare!r}")
    there = F.one_hot(target, input.shape[1] + 1)[:, :-1].to(input)
    present = there.sum(1, keepdim=True) > 0
    objects = present.sum()
    share = torch.where(objects > 0, (there * rare).sum() / objects.clamp(min=1), 1.0)
    chance = torch.rand(input.shape, generator=generator, device=input.device, dtype=input.dtype)
    dropped = rare & (there == 0) & (present | (chance > share))
    return (_terms(input, there) * ~dropped).sum(-1)


def _terms(input: Tensor, target: Tensor) -> Tensor:
    cost = (-input.clamp(_LOW, _HIGH)).exp()
    # log(1 - exp(-cost)), each form where it loses no digits.
    absent = torch.where(cost > 0.7, torch.log1p(-(-cost).exp()), (-torch.expm1(-cost)).log())
    return target * cost - (1 - target) * absent
