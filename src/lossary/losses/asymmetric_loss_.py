"""Asymmetric loss: many labels of which few are there; easy and doubtful negatives lose their say, positives do not.

Binary cross-entropy lets the many labels that are not there drown the few that are. The focal loss fades easy entries
of both kinds; here the exponent of the negatives is the larger one, and their probabilities are shifted, so that a
negative below the margin counts nothing at all, and the gradient fades on one that the model is sure is there, likely
a label that was missed. Try it when each sample has few of many labels, or some positives are unmarked, and ranking
(mean average precision) is what counts: its probabilities are too high. With balanced labels stay with cross-entropy.
`AdaptiveAsymmetricLoss` finds the exponent while training; `asymmetric_loss_single_label` is the softmax form.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._blocks import at_once, blocks
from lossary.losses._sigmoid import binary, binary_losses
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Asymmetric Loss For Multi-Label Classification",
    year=2021,
    helps=("class-imbalance", "missing-labels"),
    departs=(
        "exact where the official code clamps probabilities at 1e-8",
        "targets are 0 or 1; no label smoothing in the multi-label form",
        "the sizes of the adaptive step and of its first exponent are ours; the paper names none",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\sum_{k:\,y_k=1}(1-p_k)^{\gamma_+}\log p_k-\sum_{k:\,y_k=0}q_k^{\gamma_-}\log(1-q_k)\\ "
        r"p_k&=\sigma(z_k),\qquad q_k=\max(p_k-m,\,0),\qquad\gamma_->\gamma_+ "
        r"\end{aligned}"
    ),
    url="https://github.com/Alibaba-MIIL/ASL",
)


@loss(
    on="multilabel",
    examples=({}, {"gamma_pos": 1.0}, {"gamma_neg": 2.5, "gamma_pos": 1.5, "clip": 0.2}),
    tune={"gamma_neg": (1.0, 2.0, 4.0), "clip": (0.0, 0.05)},
)
def asymmetric_loss(
    input: Float[Tensor, "*batch labels"],
    target: Float[Tensor, "*batch labels"],
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    detach_focus: bool = False,
) -> Float[Tensor, "*batch"]:
    """Sum over labels of -(1 - p)^gamma_pos log p where a label is there, else -q^gamma_neg log(1 - q). Per sample.

    p = sigmoid(z) and q = max(p - clip, 0), eq. 7. With both gammas and clip 0 it is binary cross-entropy, summed over
    labels; with equal gammas and clip 0 the focal loss.

    Args:
        input: logits z.
        target: 1 where a label is there, 0 where not.
        gamma_neg: exponent of the negatives, 0 or at least 1.
        gamma_pos: exponent of the positives, likewise, at most gamma_neg to be asymmetric; 0 in the paper and the
            official training script, 1 in the official class and in timm.
        clip: margin m of the shift, 0 <= m < 1.
        detach_focus: no gradient through the powers, which the official training script asks for.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> z, y = torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> asymmetric_loss(z, y, gamma_neg=2.0, clip=0.25)  # log 2 - log(3/4) / 16, and nothing below the margin
    tensor([0.7111])
    """
    for name, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        _exponent(name, gamma)
    _number("clip", clip, at_least=0.0, below=1.0)
    return binary_losses(input, target, positive=gamma_pos, negative=gamma_neg, margin=clip, frozen=detach_focus)


@loss(
    on="multilabel",
    examples=({}, {"gamma_neg": 2.0, "gamma_pos": 1.0, "target_gap": 0.2}),
    xfail={"gradient": "in training mode a call moves gamma_neg for the next, so repeated calls differ; see eval()"},
)
class AdaptiveAsymmetricLoss(nn.Module):
    """`asymmetric_loss` whose gamma_neg follows the gap in confidence between positives and negatives.

    The gap of a batch is mean p over its positives less mean 1 - p over its negatives, eq. 8, mostly below 0 under
    cross-entropy. In training mode every call, after its values are taken, moves gamma_neg by
    step (target_gap - gap), eq. 11, not below 1. A batch that lacks positives or negatives moves nothing.

    Args:
        target_gap: -1 to 1; the paper has 0 to 0.2.
        step: at least 0; larger for fewer training steps.
        gamma_neg: where it starts, at least 1.
        gamma_pos, clip, detach_focus: as in `asymmetric_loss`.
        input: logits.
        target: 1 where a label is there, 0 where not.

    Attributes:
        gamma_neg: a buffer; under DDP the first process's is everyone's.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> criterion = AdaptiveAsymmetricLoss(target_gap=0.1, step=0.5)
    >>> values = criterion(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # a gap of 1/2 - 1/2
    >>> criterion.gamma_neg
    tensor(1.0500)
    """

    gamma_neg: Tensor

    def __init__(
        self,
        *,
        target_gap: float = 0.1,
        step: float = 0.01,
        gamma_neg: float = 1.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        detach_focus: bool = False,
    ) -> None:
        super().__init__()
        _number("target_gap", target_gap, at_least=-1.0, at_most=1.0)
        _number("step", step, at_least=0.0)
        _number("gamma_neg", gamma_neg, at_least=1.0)
        _exponent("gamma_pos", gamma_pos)
        _number("clip", clip, at_least=0.0, below=1.0)
        self.target_gap, self.step = target_gap, step
        self.gamma_pos, self.clip, self.detach_focus = gamma_pos, clip, detach_focus
        self.register_buffer("gamma_neg", torch.tensor(gamma_neg))

    def forward(
        self, input: Float[Tensor, "*batch labels"], target: Float[Tensor, "*batch labels"]
    ) -> Float[Tensor, "*batch"]:
        """The loss of every sample, at gamma_neg as it stands."""
        binary(input, target)
        gamma = self.gamma_neg.clone() if self.gamma_neg.is_cuda else self.gamma_neg.item()
        values = binary_losses(
            input, target, positive=self.gamma_pos, negative=gamma, margin=self.clip, frozen=self.detach_focus
        )
        if self.training:
            self._adapt(input.detach(), target)
        return values

    @torch.no_grad()
    def _adapt(self, input: Tensor, target: Tensor) -> None:
        dtype, p = self.gamma_neg.dtype, torch.sigmoid(input)
        positives, total = target.sum(dtype=dtype), p.sum(dtype=dtype)
        hits = p.mul_(target).sum(dtype=dtype)
        gap = hits / positives - (1 - (total - hits) / (p.numel() - positives))
        moved = (self.gamma_neg + self.step * (self.target_gap - gap)).clamp(min=1.0)
        self.gamma_neg.copy_(torch.where(gap.isfinite(), moved, self.gamma_neg))


@loss(
    on="classes",
    examples=({}, {"gamma_neg": 2.0, "gamma_pos": 1.0, "label_smoothing": 0.3}, {"label_smoothing": 0.0}),
    tune={"gamma_pos": (0.0, 1.0, 2.0), "label_smoothing": (0.0, 0.1)},
    limits={"cross_entropy": {"gamma_neg": 0.0, "gamma_pos": 0.0, "label_smoothing": 0.0}},
)
def asymmetric_loss_single_label(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    label_smoothing: float = 0.1,
) -> Float[Tensor, "*batch"]:
    """-(1 - e + e / K) (1 - p_y)^gamma_pos log p_y - e / K sum_{k != y} p_k^gamma_neg log p_k. Per sample.

    The official single-label form, p being the softmax: without smoothing e it is the focal loss, and gamma_neg has no
    part in it; with gamma_neg well above 0 the smoothing no longer pulls at the classes that the model rules out, but
    pushes down the runners-up.

    Args:
        input: logits of K classes.
        target: class numbers y, 0 to K - 1.
        gamma_neg: exponent of the other classes, 0 or at least 1.
        gamma_pos: exponent of the target's class, likewise.
        label_smoothing: e, 0 to below 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> asymmetric_loss_single_label(torch.zeros(1, 2), torch.tensor([0]), gamma_neg=1.0, label_smoothing=0.5)
    tensor([0.6065])
    """
    require.classes(input, target)
    for name, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        _exponent(name, gamma)
    _number("label_smoothing", label_smoothing, at_least=0.0, below=1.0)
    if not label_smoothing:
        log_p = log_prob(input, target)
        return -((-log_p.expm1()) ** gamma_pos) * log_p
    spread = label_smoothing / input.shape[-1]
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    value: Tensor = _SingleLabel.apply(rows, labels, 1 - label_smoothing + spread, spread, gamma_pos, gamma_neg)[0]
    return value.view(target.shape)


class _SingleLabel(torch.autograd.Function):
    """-a (1 - p_y)^g log p_y - b sum_{k != y} p_k^h log p_k and its slope by the logits, on rows that stay in cache."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, own: float, spread: float, gamma_pos: float, gamma_neg: float
    ) -> tuple[Tensor, Tensor]:
        value, slope = input.new_empty(len(input)), torch.empty_like(input)
        buffers = input.new_empty(2, min(at_once(input), len(input)), input.shape[-1])
        for rows in blocks(input):
            z, p, at = input[rows], slope[rows], target[rows].unsqueeze(-1)
            power, term = buffers[:, : len(z)]
            torch.softmax(z, -1, out=p)
            log_p = torch.sub(z, z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_(), out=term)
            p_y, log_p_y = p.gather(-1, at), log_p.gather(-1, at)
            miss = -log_p_y.expm1()
            focus = own * miss**gamma_pos
            fading = own * gamma_pos * miss ** max(gamma_pos - 1, 0.0) * p_y * log_p_y
            _raise(p, gamma_neg, out=power).mul_(-spread).scatter_(-1, at, 0.0)
            term.mul_(power)
            value[rows] = term.sum(-1) - (focus * log_p_y).squeeze(-1)
            pull = power.add_(term, alpha=gamma_neg).scatter_(-1, at, fading - focus)  # p times the slope by p
            torch.addcmul(pull, p, pull.sum(-1, keepdim=True), value=-1, out=p)
        return value, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.hyper = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        input, target, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the slope must depend on the input
            own, spread, gamma_pos, gamma_neg = ctx.hyper
            log_p = torch.log_softmax(input, -1)
            at = target.unsqueeze(-1)
            log_p_y = log_p.gather(-1, at)
            others = ((gamma_neg * log_p).exp() * log_p).scatter(-1, at, 0.0).sum(-1, keepdim=True)
            value = -own * (-log_p_y.expm1()) ** gamma_pos * log_p_y - spread * others
            (slope,) = torch.autograd.grad(value.sum(), input, create_graph=True)
        return slope * grad.unsqueeze(-1), None, None, None, None, None


def _raise(p: Tensor, gamma: float, *, out: Tensor) -> Tensor:
    if gamma == 4:  # a general power takes as long as ten products
        return torch.square(p, out=out).square_()
    return torch.pow(p, gamma, out=out)


def _exponent(name: str, value: float) -> None:
    _number(name, value, at_least=0.0)
    if 0 < value < 1:
        raise ValueError(f"{name}: expected 0 or a number >= 1, got {value!r}")


def _number(name: str, value: float, **bounds: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
    require.number(name, value, **bounds)
