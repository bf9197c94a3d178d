"""PU-MLC: multi-label learning from positives alone; every other entry counts as unlabelled, never as a negative.

Where annotators stop after the salient labels, most wrong entries are negatives. This loss has no negatives: for each
label it raises the probability on the marked samples and lowers its mean over the batch, in logarithms, which without
its further factors is least where the score is proportional to the true probability. Try it where many positives are
missing and what counts is the ranking of samples within a label: the probabilities have no scale. It lives on its
batch: take large ones, as a label without positives in a batch is only pushed down there. Where few labels are missing,
cross-entropy or the asymmetric loss knows more.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from lossary import require
from lossary.losses._blocks import at_once, blocks
from lossary.losses._sigmoid import binary
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Positive Label Is All You Need for Multi-Label Classification",
    year=2023,
    helps=("missing-labels", "class-imbalance"),
    departs=(
        "the local-global convolution is left out",
        "temperatures stay at 0.01 or more, where the official code divides by 0 if a label's logits are all equal, and"
        " are 1 in a batch of one",
        "the logarithm of p is exact, that of a mean stops at 1e-10, where the official code adds 1e-10 to both",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\sum_c\Bigl[m_c^{\gamma}\log m_c-\frac1{n_c}\sum_{i:\,y_{ic}=1}\log p_{ic}\Bigr],\qquad "
        r"m_c=\frac1n\sum_{i=1}^n p_{ic}\\ "
        r"p_{ic}&=\sigma(z_{ic}/\tau_c),\quad\tau_c=\alpha\operatorname{std}_i(z_{ic})\in[0.01,1];\quad "
        r"m_c^{\gamma}\text{ and }\tau_c\text{ pass no gradient} "
        r"\end{aligned}"
    ),
    url="https://github.com/TAKELAMAG/PU-MLC",
)

_COLDEST, _RAREST = 0.01, 1e-10


@loss(
    on="multilabel",
    examples=({}, {"gamma": 0.0, "alpha": 2.0}),
    couples=True,
    xfail={"gradient": "temperatures and re-balance factors are constants to the gradient, as published"},
)
def pu_multilabel_loss(
    input: Float[Tensor, "*batch labels"],
    target: Float[Tensor, "*batch labels"],
    *,
    alpha: float = 1.0,
    gamma: float = 0.55,
) -> Float[Tensor, "*batch"]:
    """Sum over labels of m^gamma log m less the mean of log p over the label's positives. Per sample, as its share.

    p = sigmoid(z / tau), and m is the mean of p over the batch, all its dimensions, positives included. The temperature
    tau of a label is alpha times the standard deviation of its logits in the batch, 0.01 to 1; it and the re-balance
    factor m^gamma carry no gradient. A sample's value is the first term plus n / n_c times -log p for each of its
    positives, where n_c of the n samples have the label, so that the mean over samples is the loss. It may be
    negative. A label without positives has the first term alone.

    Args:
        input: logits z.
        target: 1 where a label is marked; 0 or -1, which is not looked at, where not.
        alpha: above 0; the official runs have 1 on COCO, 2 on VOC.
        gamma: at least 0; 0 leaves the factor out. Official: 0.55 on COCO, 0.85 on VOC.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> import torch
    >>> z, y = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    >>> pu_multilabel_loss(z, y, gamma=1.0)  # log(1/2) / 2, and 2 log 2 more
    tensor([ 1.0397, -0.3466])
    """
    binary(input, target)
    _number("alpha", alpha, above=0.0)
    _number("gamma", gamma, at_least=0.0)
    labels = input.shape[-1]
    value: Tensor = _PULoss.apply(input.reshape(-1, labels), target.reshape(-1, labels), alpha, gamma)[0]
    return value.view(input.shape[:-1])


def pu_mixup_consistency(
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch labels"],
    input: Float[Tensor, "batch labels"],
    *,
    generator: Generator,
    mix_alpha: float = 0.3,
) -> Float[Tensor, ""]:
    """Sum over labels of the mean of (log t - log p)^2 on mixtures of two half-batches, to add to the loss.

    A row of the first half, in random order, and its partner in the second are mixed as lam and 1 - lam; p is the
    sigmoid of model(mixture). Their targets are mixed likewise into t: 1 where a label is marked, otherwise the sigmoid
    of the logits. As in the official code the gradient flows through t too, no temperature is used here, 1e-10 is added
    under the logarithms, and the middle row of an odd batch is left out.

    Args:
        model: gives logits (rows, labels); called once, on half a batch.
        x: the batch, of any shape from the second dimension on.
        target: 1 where a label is marked.
        input: model(x), the logits of the batch.
        generator: of lam, one draw from Beta(mix_alpha, mix_alpha), and of the order.
        mix_alpha: above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, fewer than two rows, mix_alpha out of range.

    >>> import torch
    >>> x = torch.tensor([[0.0], [0.0]])
    >>> y = torch.zeros(2, 1)
    >>> pu_mixup_consistency(torch.nn.Identity(), x, y, x, generator=torch.Generator())  # p is 1/2 throughout
    tensor(0.)
    """
    require.floating("input", input, dims=2)
    require.same_shape("target", target, tuple(input.shape))
    require.floating("x", x, at_least_dims=1)
    if len(x) != len(input) or len(x) < 2:
        raise ValueError(f"x: expected as many rows as input, at least two, got {len(x)} and {len(input)}")
    _number("mix_alpha", mix_alpha, above=0.0)
    half = len(x) // 2
    order = torch.randperm(half, generator=generator, device=generator.device).to(x.device)
    concentration = torch.full((2,), mix_alpha, dtype=torch.float64, device=generator.device)
    lam = torch._sample_dirichlet(concentration, generator)[0].to(x)

    def mixed(rows: Tensor) -> Tensor:
        return lam * rows[:half][order] + (1 - lam) * rows[-half:]

    soft = mixed(torch.where(target == 1, 1.0, torch.sigmoid(input)))
    p = torch.sigmoid(model(mixed(x)))
    return ((soft + 1e-10).log() - (p + 1e-10).log()).square().mean(0).sum()


class _PULoss(torch.autograd.Function):
    """(rows, labels) logits and targets to the values (rows,); rows are gone over in blocks that stay in the cache."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, alpha: float, gamma: float) -> tuple[Tensor, ...]:
        n = len(input)
        heat = torch.ones_like(input[0], dtype=torch.promote_types(input.dtype, torch.float32))
        total, squares, count, m = (torch.zeros_like(heat) for _ in range(4))
        value, buffers = input.new_empty(n), _buffers(input, heat)
        start = input[0].to(heat.dtype)  # a variance taken about one of the values loses few digits
        for rows in blocks(input):
            apart, marks = buffers[:, : len(value[rows])]
            total += torch.sub(input[rows], start, out=apart).sum(0)
            squares += apart.square_().sum(0)
            count += _marks(target[rows], out=marks).sum(0)
        if n > 1:
            variance = (squares / n - (total / n).square()).clamp_(min=0)
            heat = (alpha * variance.sqrt()).clamp(_COLDEST, 1.0).reciprocal_()
        share = n / count.clamp(min=1)
        for rows in blocks(input):
            u, log_p = buffers[:, : len(value[rows])]
            p = torch.sigmoid(torch.mul(input[rows], heat, out=u), out=log_p)
            m += p.sum(0) / n
            p.clamp_(min=torch.finfo(p.dtype).tiny).log_()
            torch.minimum(log_p, u, out=log_p)  # u is larger, unless p was at its bound, where log sigmoid(u) is u
            value[rows] = -(log_p.mul_(_marks(target[rows], out=u)) @ share)
        m.clamp_(min=_RAREST)
        factor = m**gamma
        return value + (factor * m.log()).sum().to(value.dtype), heat, factor / (n * m), share

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.gamma = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        input, target, heat, push, share = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the slope must depend on the input
            u = input * heat
            m = torch.sigmoid(u).mean(0).clamp(min=_RAREST)
            pulled = (F.logsigmoid(u) * target.to(u.dtype).clamp(min=0) * share).sum(-1)
            value = (m.detach() ** ctx.gamma * m.log()).sum() - pulled
            return *torch.autograd.grad(value, input, grad, create_graph=True), None, None, None
        slope, buffers = torch.empty_like(input), _buffers(input, heat)
        push, pull = grad.sum() * push * heat, -share * heat
        for rows in blocks(input):
            p, by_log_p = buffers[:, : len(slope[rows])]
            torch.sigmoid(torch.mul(input[rows], heat, out=p), out=p)
            _marks(target[rows], out=by_log_p).mul_(grad[rows].unsqueeze(-1)).mul_(pull).addcmul_(p, push)
            torch.addcmul(by_log_p, by_log_p, p, value=-1, out=slope[rows])
        return slope, None, None, None


def _marks(target: Tensor, *, out: Tensor) -> Tensor:
    return torch.clamp(target.to(out.dtype), min=0, out=out)  # several times as fast as comparing


def _buffers(rows: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(2, min(at_once(rows), len(rows)), rows.shape[-1])


def _number(name: str, value: float, **bounds: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor")
    require.number(name, value, **bounds)
