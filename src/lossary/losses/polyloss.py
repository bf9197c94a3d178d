"""PolyLoss: cross-entropy read as a power series in 1 - p_y, with its first coefficients retuned.

Cross-entropy is the sum of (1 - p_y)^j / j over j >= 1. PolyLoss moves the first few of these coefficients,
most often only the first (Poly-1), which multiplies cross-entropy's pull on a sample by 1 + epsilon p_y: a positive
epsilon favours samples that already lean the right way, a negative one those that do not, as the focal loss does.
Try it when plain cross-entropy is what you have and three or four values of epsilon can be tried; the paper finds
about 2 for ImageNet and -1 for heavily imbalanced detection heads. The best value depends on the task, and no
single one is safe to adopt untried.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    year=2022,
    helps=("class-imbalance",),
    departs=(
        "no label smoothing inside the loss",
        "the focal form is the softmax one; the paper's detectors use sigmoids",
        "class weights multiply the returned values instead of being an argument",
    ),
    equation=(
        r"\ell=-\log p_y+\epsilon\,(1-p_y) "
        r"=(1+\epsilon)(1-p_y)+\sum_{j\ge2}\frac{(1-p_y)^j}{j}"
    ),
)


@loss(
    on="classes",
    examples=({"epsilon": 1.0}, {"epsilon": -0.5}),
    tune={"epsilon": (-1.0, 0.5, 2.0, 5.0)},
    limits={"cross_entropy": {"epsilon": 0.0}},
)
def poly1_cross_entropy(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, epsilon: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Cross-entropy plus epsilon * (1 - p_y), eq. 6: -log p_y + epsilon (1 - p_y). In nats, per sample.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        epsilon: shift of the leading coefficient; 0 is cross-entropy, at least -1 keeps the loss monotone.

    Raises:
        ValueError: shapes or dtypes that do not fit, or epsilon below -1.

    >>> import torch
    >>> poly1_cross_entropy(torch.zeros(1, 4), torch.tensor([2]), epsilon=1.0)  # log 4 + 3/4
    tensor([2.1363])
    """
    require.number("epsilon", epsilon, at_least=-1.0)
    log_p = log_prob(input, target)
    return epsilon * -log_p.expm1() - log_p


@loss(
    on="classes",
    examples=({"gamma": 2.0, "epsilon": 1.0}, {"gamma": 1.5, "epsilon": -0.5}),
    tune={"epsilon": (-1.0, 1.0), "gamma": (1.0, 2.0)},
    limits={"cross_entropy": {"gamma": 0.0, "epsilon": 0.0}},
)
def poly1_focal_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, gamma: float = 2.0, epsilon: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Focal loss with its leading coefficient shifted: -(1 - p_y)^gamma log p_y + epsilon (1 - p_y)^(gamma + 1).

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        gamma: focusing exponent, 0 or at least 1 (between them the gradient is infinite at p_y = 1).
        epsilon: shift of the leading coefficient, at least -1.

    Raises:
        ValueError: shapes or dtypes that do not fit, gamma below 0 or between 0 and 1, epsilon below -1.

    >>> import torch
    >>> poly1_focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0, epsilon=2.0)  # log 2 / 2 + 2 / 4
    tensor([0.8466])
    """
    require.number("gamma", gamma, at_least=0.0)
    if 0.0 < gamma < 1.0:
        raise ValueError(f"gamma: expected 0 or at least 1, got {gamma}")
    require.number("epsilon", epsilon, at_least=-1.0)
    log_p = log_prob(input, target)
    miss = -log_p.expm1()
    return miss**gamma * (epsilon * miss - log_p)


@loss(
    on="classes",
    examples=({"epsilons": (1.0,)}, {"epsilons": (-0.5, 0.25, 2.0)}),
    limits={"cross_entropy": {"epsilons": ()}},
)
def poly_n_cross_entropy(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, epsilons: Sequence[float] = (1.0,)
) -> Float[Tensor, "*batch"]:
    """Cross-entropy with its first N coefficients shifted, eq. 5: -log p_y + sum_j epsilon_j (1 - p_y)^j.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        epsilons: shift of the coefficient 1/j of (1 - p_y)^j for j = 1, ..., N; each at least -1/j.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an epsilon that turns its coefficient negative.

    >>> import torch
    >>> poly_n_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), epsilons=(1.0, 2.0))  # log 2 + 1/2 + 2/4
    tensor([1.6931])
    """
    if isinstance(epsilons, str):
        raise ValueError(f"epsilons: expected a sequence of numbers, got {epsilons!r}")
    for j, epsilon in enumerate(epsilons, start=1):
        require.number("epsilons", epsilon, at_least=-1.0 / j)
    log_p = log_prob(input, target)
    miss = -log_p.expm1()
    return sum((epsilon * miss**j for j, epsilon in enumerate(epsilons, start=1)), start=-log_p)
