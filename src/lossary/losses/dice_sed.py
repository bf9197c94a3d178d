"""The Sørensen-Dice loss for frame-wise detection of several events at once, scored by seconds.

Most frames of a recording are silent in most classes, and cross-entropy spends its gradient on them. Dice is a ratio of
sums, hits over predictions plus references, in which a frame that is rightly silent appears nowhere: rare events weigh
as much as the F1 score says. Try it where F1 or the error rate is reported and activity is a few per cent, and where
nobody will choose thresholds: its probabilities are pushed towards 0 and 1, so that 0.5 does, and they are not
calibrated. Sums over a batch with hardly any activity are noisy, so take large batches; with cross-entropy and a
threshold chosen on held-out data one may get as far.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.losses._sigmoid import CELLS, binary
from lossary.paper import Paper
from lossary.roles import loss, measure

PAPER = Paper(
    title=(
        "Improving Polyphonic Sound Event Detection on Multichannel Recordings with the Sørensen-Dice Coefficient Loss"
        " and Transfer Learning"
    ),
    year=2021,
    helps=("class-imbalance",),
    departs=(
        "over what the paper sums and how it smooths was not read: sums over the whole batch and s = 1 are the usual",
        "transfer learning, recording formats and augmentation are left out",
        "scores count all frames of a second, as sed_eval does; the group's earlier code leaves out the last",
    ),
    equation=(
        r"\ell=1-\frac{2\sum_{t,c}p_{tc}\,y_{tc}+s}{\sum_{t,c}p_{tc}+\sum_{t,c}y_{tc}+s}, "
        r"\qquad p_{tc}=\sigma(z_{tc}),\quad t,c:\ \text{frames and classes of the batch}"
    ),
    url="https://arxiv.org/abs/2107.10471",
)


@loss(
    on="multilabel",
    examples=({}, {"smooth": 0.01, "squared": True}, {"dims": (-1,)}, {"dims": (0,), "smooth": 0.1}),
    couples=True,
)
def multilabel_dice_loss(
    input: Float[Tensor, "*batch labels"],
    target: Float[Tensor, "*batch labels"],
    *,
    smooth: float = 1.0,
    squared: bool = False,
    dims: tuple[int, ...] | None = None,
) -> Float[Tensor, "*batch"]:
    """1 - (2 sum p y + s) / (sum p + sum y + s), over the batch. Per sample, as each one's share.

    p is the sigmoid. The loss equals sum (p + y - 2 p y) / (sum p + sum y + s), and a sample's value is its part of
    the upper sum times the number of samples: the mean over samples is the loss. With dims the sums run over these
    dimensions only, and the mean of the losses is taken over the others, labels included. Batches without a positive
    push everything down, by a slope of s / (sum p + s)^2.

    Args:
        input: logits, say (clips, frames, labels).
        target: 1 where a label is there, 0 where not, or probabilities.
        smooth: s, above 0.
        squared: squares of p and y in the lower sum, and so (p - y)^2 in the upper one.
        dims: summed over; None is all. With (-2, -1) each clip has a loss of its own, with all but -1 each label.

    Raises:
        ValueError: shapes or dtypes that do not fit, smooth not a number above 0, dims out of range or repeated.

    >>> import torch
    >>> z, y = torch.tensor([[0.0, 0.0], [99.0, -99.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> multilabel_dice_loss(z, y, smooth=1.0)  # 2 (1/2 + 1/2) / (2 + 2 + 1) and 0; in all 1 - (3 + 1) / (4 + 1)
    tensor([0.4000, 0.0000])
    """
    binary(input, target)
    if isinstance(smooth, Tensor):
        raise ValueError("smooth: expected a number, got a tensor")
    require.number("smooth", smooth, above=0.0)
    value: Tensor = _Dice.apply(input, target, smooth, squared, _summed(dims, input.ndim))[0]
    return value


@measure(
    known=(
        {
            "inputs": {
                "score": [[[0.9, 0.2], [0.1, 0.3], [0.2, 0.9], [0.1, 0.8], [0.7, 0.1]]],
                "target": [[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]],
            },
            "hyper": {"frames": 2},
            "value": 0.6666666666666666,
        },
        {
            "inputs": {"score": [[[0.4, 0.4]], [[0.1, 0.4]]], "target": [[[0.0, 1.0]], [[1.0, 0.0]]]},
            "hyper": {"frames": 1, "threshold": 0.3},
            "value": 0.4,
        },
    ),
)
def segment_based_f1_er(
    score: Float[Tensor, "clips frames classes"],
    target: Float[Tensor, "clips frames classes"],
    *,
    frames: int = 10,
    threshold: float = 0.5,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """F1 and error rate over segments, mostly of a second: a class is active in a segment if in any of its frames.

    Over all clips, segments and classes, F1 = 2 TP / (2 TP + FP + FN). Within a segment a wrong class in place of a
    right one is one substitution, S = min(FN, FP); further misses are deletions, D = max(0, FN - FP), and further
    alarms insertions, I = max(0, FP - FN). The error rate is sum (S + D + I) / sum (TP + FN), which may exceed 1. What
    a clip lacks to a full last segment counts as silent. With neither positives nor alarms both are NaN.

    Report F1 and error rate at a threshold fixed beforehand, and at one chosen on other data, or say which.

    Args:
        score: probabilities, or any scores.
        target: 1 where a class is active, 0 where not.
        frames: in a segment; 10 where labels come ten a second.
        threshold: scores above it are detections.

    Returns:
        F1, 0 to 1, and error rate, at least 0.

    Raises:
        ValueError: not both floating-point of one shape with three dimensions, frames below 1.

    >>> import torch
    >>> target = torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> segment_based_f1_er(torch.tensor([[[0.2, 0.9, 0.9]]]), target)  # one substitution and one insertion
    (tensor(0.), tensor(2.))
    """
    require.floating("score", score, dims=3)
    require.floating("target", target, dims=3)
    require.same_shape("target", target, tuple(score.shape))
    require.whole("frames", frames, at_least=1)
    require.number("threshold", threshold)
    found, active = (_segments(roll, frames) for roll in (score > threshold, target > 0.5))
    hits = (found & active).sum().double()
    misses, alarms = ((a & ~b).sum(-1).double() for a, b in ((active, found), (found, active)))
    f1 = 2 * hits / (2 * hits + misses.sum() + alarms.sum())
    error_rate = torch.maximum(misses, alarms).sum() / (hits + misses.sum())  # S + D + I = max(FN, FP)
    return f1.to(score.dtype), error_rate.to(score.dtype)


def _segments(roll: Tensor, frames: int) -> Tensor:
    """(clips, frames, classes) to (clips, segments, classes): any of each segment's frames."""
    return F.pad(roll, (0, 0, 0, -roll.shape[1] % frames)).unflatten(1, (-1, frames)).any(2)


def _summed(dims: tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    if dims is None:
        return tuple(range(ndim))
    fit = isinstance(dims, tuple) and all(isinstance(d, int) and -ndim <= d < ndim for d in dims)
    if not fit or not dims or len({d % ndim for d in dims}) < len(dims):
        raise ValueError(f"dims: expected different dimensions from {-ndim} to {ndim - 1}, at least one, got {dims!r}")
    return tuple(d % ndim for d in dims)


# Sigmoids are computed anew in each of three passes, on blocks that stay in the cache: nothing is kept for the gradient
# but the two arguments. Second derivatives come from the formula as it stands.


def _blocks(input: Tensor) -> Iterator[slice]:
    rows = len(input)
    at_once = rows if input.is_cuda else max(1, CELLS * rows // max(1, input.numel()))
    return (slice(start, start + at_once) for start in range(0, rows, at_once))


def _mass(p: Tensor, y: Tensor, squared: bool) -> Tensor:
    return p.square().add_(y.square()) if squared else p + y


def _sign(y: Tensor) -> Tensor:
    return torch.rsub(y, 1.0, alpha=2)  # 1 - 2 y


def _error(p: Tensor, y: Tensor, squared: bool) -> Tensor:
    return (p - y).square() if squared else torch.addcmul(y, p, _sign(y))


def _at(sums: Tensor, rows: slice, dims: tuple[int, ...]) -> Tensor:
    return sums if 0 in dims else sums[rows]


def _share(error: Tensor, mass: Tensor) -> Tensor:
    return error.mean(-1) / mass.squeeze(-1) if mass.shape[-1] == 1 else (error / mass).mean(-1)


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, target: Tensor, smooth: float, squared: bool, dims: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        sums = [1 if d in dims else size for d, size in enumerate(input.shape)]
        mass = torch.full(sums, smooth, dtype=torch.promote_types(input.dtype, torch.float32), device=input.device)
        value = input.new_empty(input.shape[:-1])
        for rows in _blocks(input):
            cells = _mass(torch.sigmoid(input[rows]), target[rows].to(input.dtype), squared)
            _at(mass, rows, dims).add_(cells.sum(dims, keepdim=True, dtype=mass.dtype))
        for rows in _blocks(input):
            error = _error(torch.sigmoid(input[rows]), target[rows].to(input.dtype), squared)
            value[rows] = _share(error, _at(mass, rows, dims)) * (input.numel() / mass.numel())
        return value, mass

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.hyper = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        input, target, mass = ctx.saved_tensors
        smooth, squared, dims = ctx.hyper
        if torch.is_grad_enabled():
            p, target = torch.sigmoid(input), target.to(input.dtype)
            mass = _mass(p, target, squared).sum(dims, keepdim=True) + smooth
            value = _share(_error(p, target, squared), mass) * (input.numel() / mass.numel())
            return *torch.autograd.grad(value, input, grad, create_graph=True), None, None, None, None
        weight, slope = grad.unsqueeze(-1), torch.empty_like(input)
        relief = torch.zeros_like(mass)  # by how much more mass lowers the loss
        for rows in _blocks(input):
            error = _error(torch.sigmoid(input[rows]), target[rows].to(input.dtype), squared).mul_(weight[rows])
            _at(relief, rows, dims).add_(error.sum(dims, keepdim=True, dtype=mass.dtype))
        share = (input.numel() / mass.numel() / input.shape[-1] / mass).to(input.dtype)
        relief = (share * relief / mass).to(input.dtype)
        for rows in _blocks(input):
            p, y = torch.sigmoid(input[rows]), target[rows].to(input.dtype)
            by_error, by_mass = (2 * (p - y), 2 * p) if squared else (_sign(y), 1)
            by_p = (by_error * (weight[rows] * _at(share, rows, dims))).sub_(_at(relief, rows, dims) * by_mass)
            torch.mul(by_p, p.mul_(1 - p), out=slope[rows])
        return slope, None, None, None, None
