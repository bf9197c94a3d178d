"""Simpson's bias: a loss averaged over samples is not the metric of the population, unless that metric is additive.

F1, Dice and BLEU are ratios of sums. Their mean over samples or small batches is another quantity, which a model may
improve while the ratio of the sums gets worse. `simpsons_bias` measures the gap on your predictions, at any batch
size. Of the Dice losses, `batch_dice_loss` sums over the batch before it divides, and its gap shrinks as batches
grow; `sample_dice_loss` divides within each sample and keeps it. Take the first where F1 is reported and a batch holds
several samples of the rare class. Neither gives calibrated probabilities. Cross-entropy and accuracy are additive and
have no such bias; cross-entropy with its threshold chosen on held-out data is the competitor to beat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.losses._blocks import at_once, blocks
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Simpson's Bias in NLP Training",
    year=2021,
    helps=("class-imbalance",),
    departs=(
        "the Dice losses are those of Li et al., Dice Loss for Data-imbalanced NLP Tasks, with squares below the line;"
        " which variants the paper trains with was not read",
        "F1 and BLEU are not built in: the diagnostic takes them as functions",
    ),
    equation=(
        r"\begin{aligned} "
        r"\operatorname{bias}(B)&=\sum_j\frac{|D_j|}{|D|}\,F(D_j)-F(D),\qquad "
        r"D=\bigcup_j D_j\text{ in parts of }B\text{ rows}\\ "
        r"F=\frac{\sum a}{\sum b}:\quad\operatorname{bias}(B)&=-\operatorname{Cov}_j(b_j,\,a_j/b_j)\,\big/\,\bar b "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2103.11795",
)


@loss(on="classes", examples=({"smooth": 1.0}, {"smooth": 0.01}), tune={"smooth": (0.01, 0.1, 1.0)})
def sample_dice_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, smooth: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Dice of each sample alone: the mean over classes of 1 - (2 p y + s) / (p^2 + y^2 + s). Per sample.

    p is the softmax and y the one-hot target, one class against the rest. The same is (p - y)^2 / (p^2 + y^2 + s): as
    s falls to 0, a class that is not the target costs 1 whatever p is, and teaches nothing.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        smooth: s, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, smooth not a number above 0.

    >>> import torch
    >>> sample_dice_loss(torch.zeros(1, 2), torch.tensor([0]), smooth=1.0)  # (1/4 / 9/4 + 1/4 / 5/4) / 2
    tensor([0.1556])
    """
    require.classes(input, target)
    _require_number("smooth", smooth)
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    value: Tensor = _SampleDice.apply(rows, labels, smooth)[0]
    return value.view(target.shape)


@loss(on="classes", examples=({"smooth": 1.0}, {"smooth": 0.01}), tune={"smooth": (0.01, 0.1, 1.0)}, couples=True)
def batch_dice_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, smooth: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Dice of the batch, class by class: the mean over classes of 1 - (2 sum p y + s) / (sum p^2 + sum y^2 + s).

    p is the softmax and y the one-hot target, and the sums run over the batch, all its dimensions. A sample's value is
    its share, n mean_k (p_k - y_k)^2 / (sum p_k^2 + sum y_k^2 + s) for a batch of n, so that the mean over the batch is
    the loss above. On a whole data set, with hard predictions and s near 0, that is 1 - macro F1. A class that the
    batch lacks is pushed down; small s does so without regard to how little it was predicted.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.
        smooth: s, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, smooth not a number above 0.

    >>> import torch
    >>> batch_dice_loss(torch.zeros(2, 2), torch.tensor([0, 0]), smooth=0.5)  # 2 (1/4 / 3 + 1/4 / 1) / 2
    tensor([0.3333, 0.3333])
    """
    require.classes(input, target)
    _require_number("smooth", smooth)
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    value: Tensor = _BatchDice.apply(rows, labels, smooth)[0]
    return value.view(target.shape)


def simpsons_bias(
    metric: Callable[..., Any],
    *data: Any,
    sizes: Sequence[int],
    surrogate: Callable[..., Any] | None = None,
) -> Float[Tensor, "sizes"]:
    """G_B - F: the mean of a surrogate over parts of B rows, less the metric of all rows, for each B.

    The parts are consecutive rows, the last one what is left, and count by their rows, so that a mean over rows has no
    bias at any B. A metric sum a / sum b has the bias -Cov(b, a / b) / mean(b), over the parts and by their number:
    none if a part's ratio has nothing to do with its denominator. Shuffle rows whose order means something.

    Args:
        metric: F, called with the data; returns a number.
        data: tensors, arrays or lists of one length N: rows of probabilities and labels, or hypotheses and references.
        sizes: the B, 1 to N each; 1 is the sample, N has no bias where the surrogate is the metric.
        surrogate: G, called with the rows of a part; None is the metric itself.

    Returns:
        float64, in the metric's unit.

    Raises:
        ValueError: no data, data of different lengths, a size out of range.

    >>> p, y = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    >>> def f1(p, y):
    ...     return 2 * (p * y).sum() / (p.sum() + y.sum())
    >>> simpsons_bias(f1, p, y, sizes=(2, 4))  # halves have F1 0 and 1, all rows 4/5
    tensor([-0.3000,  0.0000], dtype=torch.float64)
    """
    lengths = [len(rows) for rows in data]
    if not lengths or min(lengths) == 0 or min(lengths) < max(lengths):
        raise ValueError(f"data: expected rows of one length, at least one, got lengths {lengths}")
    n, whole = lengths[0], float(metric(*data))
    surrogate = metric if surrogate is None else surrogate
    bias = []
    for size in sizes:
        require.whole("sizes", size, at_least=1, at_most=n)
        parts = [[rows[start : start + size] for rows in data] for start in range(0, n, size)]
        mean = sum(len(part[0]) * float(surrogate(*part)) for part in parts) / n
        bias.append(mean - whole)
    return torch.tensor(bias, dtype=torch.float64)


# The two functions below go over the rows in blocks whose arrays stay in the cache, and keep no more than
# cross-entropy does. Second derivatives come from the formula as it stands.


def _plain(input: Tensor, target: Tensor, smooth: float, *, over_batch: bool) -> Tensor:
    p = torch.softmax(input, -1)
    y = torch.zeros_like(p).scatter(-1, target.unsqueeze(-1), 1.0)
    mass = p.square() + y
    if over_batch:
        return len(p) * ((p - y).square() / (mass.sum(0) + smooth)).mean(-1)
    return ((p - y).square() / (mass + smooth)).mean(-1)


class _SampleDice(torch.autograd.Function):
    """(rows, classes), (rows,) to the values (rows,) and their slopes by the logits over 2 smooth / classes."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, smooth: float) -> tuple[Tensor, Tensor]:
        value, slope = input.new_empty(len(input)), torch.empty_like(input)
        buffers = input.new_empty(2, min(at_once(input), len(input)), input.shape[-1])
        for rows in blocks(input):
            p, at = slope[rows], target[rows].unsqueeze(-1)
            cost, pull = buffers[:, : len(p)]
            p_y = torch.softmax(input[rows], -1, out=p).gather(-1, at)
            mass_y, miss = p_y.square() + (1 + smooth), 1 - p_y
            mass = torch.add(torch.square(p, out=cost), smooth, out=pull)
            cost.div_(mass)  # p^2 / (p^2 + s), right but for the target's class
            torch.div(cost, mass, out=pull)  # p times its slope by p, over 2 s
            share_y = miss / mass_y
            cost.scatter_(-1, at, miss * share_y)
            pull.scatter_(-1, at, p_y * share_y * (1 + share_y * p_y) / -smooth)
            torch.mean(cost, -1, out=value[rows])
            torch.addcmul(pull, p, pull.sum(-1, keepdim=True), value=-1, out=p)
        return value, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.smooth = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        input, target, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            value = _plain(input, target, ctx.smooth, over_batch=False)
            return *torch.autograd.grad(value, input, grad, create_graph=True), None, None
        return slope * (2 * ctx.smooth / input.shape[-1] * grad).unsqueeze(-1), None, None


class _BatchDice(torch.autograd.Function):
    """(rows, classes), (rows,) to the values (rows,), probabilities (rows, classes) and masses (classes,)."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, smooth: float) -> tuple[Tensor, Tensor, Tensor]:
        p, value = torch.empty_like(input), input.new_empty(len(input))
        mass = torch.full_like(input[0], smooth).scatter_add_(0, target, torch.ones_like(value))
        for rows in blocks(p):
            mass += torch.softmax(input[rows], -1, out=p[rows]).square().sum(0)
        share = len(p) / p.shape[-1] / mass
        for rows in blocks(p):
            torch.mv(_error(p[rows], target[rows]), share, out=value[rows])
        return value, p, mass

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.smooth = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        input, target, p, mass = ctx.saved_tensors
        if torch.is_grad_enabled():
            value = _plain(input, target, ctx.smooth, over_batch=True)
            return *torch.autograd.grad(value, input, grad, create_graph=True), None, None
        share, slope = 2 * len(p) / p.shape[-1] / mass, torch.empty_like(p)
        relief = torch.zeros_like(mass)  # by how much more mass lowers the loss
        for rows in blocks(p):
            relief += grad[rows] @ _error(p[rows], target[rows])
        relief *= share / mass
        for rows in blocks(p):
            own, at, weight = p[rows], target[rows].unsqueeze(-1), grad[rows].unsqueeze(-1)
            pull = torch.addcmul(-relief, weight, share).mul_(own)
            pull.scatter_add_(-1, at, -weight * share[at]).mul_(own)  # p times the slope by p
            torch.addcmul(pull, own, pull.sum(-1, keepdim=True), value=-1, out=slope[rows])
        return slope, None, None


def _error(p: Tensor, target: Tensor) -> Tensor:
    """(p - y)^2."""
    at = target.unsqueeze(-1)
    return p.square().scatter_(-1, at, (1 - p.gather(-1, at)).square())


def _require_number(name: str, value: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
    require.number(name, value, above=0.0)
