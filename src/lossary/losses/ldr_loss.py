"""LDR: the label's mass goes to an adversary, who spreads it over the classes where the model errs most.

Moving label mass p_k to class k gains the gap d_k = f_k - f_y, plus a margin unless k is y; concentrating it costs
lam KL(p, uniform). At a low price (small lam) the largest gap is what counts, as in the multi-class SVM; lam = 1
without a margin is cross-entropy; at a high price (large lam) it is the mean gap, which is symmetric and so tolerates
wrong labels. ALDR-KL lets every sample find its own price. Try it when labels are noisy and you do not know how much,
with `normalize=True`: otherwise the model can undo any price by the scale of its logits. It does not tell you which
labels are wrong, and on clean labels it is one more knob beside weight decay.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._blocks import at_once
from lossary.losses._softmax import log_prob, scaled
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    year=2023,
    helps=("label-noise",),
    departs=(
        "aldr_kl_loss finds each sample's lambda anew at every call; the official code keeps a table of them, by "
        "sample index, and improves an entry once per visit, towards the same end",
        "ALDRKLLoss keeps that table, but takes the loss before it improves the entry, which saves the second softmax",
        "the margin enters that lambda; in the official code it does not",
        "normalising the logits is an option; the paper's experiments always do it",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell_\lambda&=\max_{p\in\Delta_K}\sum_k p_k d_k-\lambda\operatorname{KL}\bigl(p\,\|\,\tfrac1K\bigr) "
        r"=\lambda\log\frac1K\sum_k e^{d_k/\lambda},\qquad d_k=f_k-f_y+c\,[k\ne y]\\ "
        r"\ell_{\mathrm{ALDR}}&=\max_\lambda\ \ell_\lambda-\frac{\alpha\log K}{2\lambda_0}(\lambda-\lambda_0)^2 "
        r"\end{aligned}"
    ),
    url="https://proceedings.mlr.press/v202/zhu23o.html",
)

_NEWTON_STEPS = 4


@loss(
    on="classes",
    examples=({"lam": 1.0}, {"lam": 0.1, "margin": 1.0}, {"lam": 10.0, "normalize": True}),
    tune={"lam": (0.1, 1.0, 10.0), "normalize": (True,)},
)
def ldr_kl_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    lam: float | Tensor = 1.0,
    margin: float | Tensor = 0.1,
    normalize: bool = False,
) -> Float[Tensor, "*batch"]:
    """max over p of sum_k p_k d_k - lam KL(p, uniform), which is lam log mean_k exp(d_k / lam). Per sample.

    With margin 0 and lam 1 it is cross-entropy less log K, in general cross-entropy at temperature lam. It falls
    from max_k d_k at lam = 0 to mean_k d_k at lam = infinity, and is negative where the true class leads clearly.

    Args:
        input: logits f over K classes.
        target: class numbers y, 0 to K - 1.
        lam: price of concentrating on few classes, in units of the logits, above 0.
        margin: c in d_k = f_k - f_y + c for k other than y, at least 0. d_y is 0.
        normalize: divide each sample's logits by their mean absolute value, so that lam and margin keep their
            meaning however large the model's logits grow.

    Raises:
        ValueError: shapes or dtypes that do not fit, lam not above 0, margin below 0.

    >>> import torch
    >>> ldr_kl_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), margin=1.0)  # log((1 + e^4) / 2)
    tensor([3.3250])
    """
    require.number("lam", lam, above=0.0)
    unit = _unit(input, target, margin, normalize)
    return -lam * (log_prob(input, target, temperature=lam * unit, margin=margin / lam) + math.log(input.shape[-1]))


@loss(
    on="classes",
    examples=({"lam0": 1.0}, {"lam0": 0.3, "alpha": 4.0, "margin": 1.0}, {"lam0": 3.0, "normalize": True}),
    tune={"lam0": (0.1, 1.0, 10.0), "normalize": (True,)},
)
def aldr_kl_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    lam0: float | Tensor = 1.0,
    alpha: float | Tensor = 2.0,
    margin: float | Tensor = 0.1,
    normalize: bool = False,
) -> Float[Tensor, "*batch"]:
    """LDR-KL in which every sample finds its own lam:
    max over p and lam of sum_k p_k d_k - lam KL(p, uniform) - alpha log K / (2 lam0) (lam - lam0)^2. Per sample.

    The best lam is lam0 (1 - KL / (alpha log K)): lam0 where all gaps are alike, (1 - 1 / alpha) lam0 where one
    class stands out. Four safeguarded Newton steps find it, at alpha = 2 to 1e-5 lam0 and the loss to rounding. There
    it is the only maximum up to about 120 classes; with more, or alpha nearer 1, it may be a local one. It is then
    held fixed, which by Danskin's theorem leaves first derivatives exact; second derivatives do not see it move.

    The steps cost four softmaxes, so that with many classes it takes several times as long as `ldr_kl_loss`. Prefer
    `ALDRKLLoss` there, if samples carry an index and are visited often; prefer this one for few classes, for a
    stream, under augmentation, or where a sample's loss must not depend on what came before.

    Args:
        input: logits f over K classes.
        target: class numbers y, 0 to K - 1.
        lam0: largest lam, in units of the logits, above 0.
        alpha: how firmly lam is held at lam0, above 1; large values give `ldr_kl_loss`.
        margin, normalize: as in `ldr_kl_loss`.

    Raises:
        ValueError: shapes or dtypes that do not fit, lam0 not above 0, alpha not above 1, margin below 0.

    >>> import torch
    >>> aldr_kl_loss(torch.zeros(1, 4), torch.tensor([0]), margin=0.0)  # equal gaps: lam stays at lam0
    tensor([-0.])
    """
    require.number("lam0", lam0, above=0.0)
    require.number("alpha", alpha, above=1.0)
    unit = _unit(input, target, margin, normalize)
    log_classes = math.log(input.shape[-1])
    with torch.no_grad():
        lam = lam0 * _share_of_lam0(input, target, lam0 * unit, margin / lam0, alpha)
    gain = -lam * (log_prob(input, target, temperature=lam * unit, margin=margin / lam) + log_classes)
    return gain - alpha * log_classes / (2 * lam0) * (lam - lam0) ** 2


@loss(
    on="classes",
    examples=({"lam0": 1.0}, {"lam0": 0.3, "alpha": 4.0, "margin": 1.0}, {"lam0": 3.0, "normalize": True}),
    tune={"lam0": (0.1, 1.0, 10.0), "normalize": (True,)},
    xfail={"gradient": "in training mode a visit moves the lambda of the next, so repeated calls differ; see eval()"},
)
class ALDRKLLoss(nn.Module):
    """`aldr_kl_loss` with a table of every sample's lam, improved once per visit: one softmax a call.

    A visit takes the loss at the stored lam and then, in training mode, stores lam0 (1 - KL / (alpha log K)), where
    KL is the adversary's at the lam just used. Visits to unchanged logits rise to `aldr_kl_loss` wherever that has a
    single maximum. In evaluation mode the table is only read.

    Args:
        num_samples: N, length of the table.
        lam0, alpha, margin, normalize: as in `aldr_kl_loss`.
        input: logits f over K classes.
        target: class numbers y, 0 to K - 1.
        index: which samples of the N these are.

    Attributes:
        share: (N,), lam / lam0 of every sample, 1 before the first visit; a buffer.

    Raises:
        ValueError: shapes or dtypes that do not fit, num_samples below 1, lam0 not above 0, alpha not above 1, margin
            below 0.

    >>> import torch
    >>> criterion = ALDRKLLoss(3, margin=0.0)
    >>> for _ in range(2):
    ...     print(criterion(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), index=torch.tensor([2])))
    tensor([2.3554])
    tensor([2.4727])
    >>> criterion.share
    tensor([1.0000, 1.0000, 0.5370])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        lam0: float | Tensor = 1.0,
        alpha: float | Tensor = 2.0,
        margin: float | Tensor = 0.1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        require.whole("num_samples", num_samples, at_least=1)
        require.number("lam0", lam0, above=0.0)
        require.number("alpha", alpha, above=1.0)
        require.number("margin", margin, at_least=0.0)
        require.one_of("normalize", normalize, (True, False))
        self.lam0, self.alpha, self.margin, self.normalize = lam0, alpha, margin, normalize
        self.register_buffer("share", torch.ones(num_samples))

    def forward(
        self, input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, index: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """The loss of every sample, at its stored lam."""
        unit = _unit(input, target, self.margin, self.normalize)
        require.integers("index", index, shape=target.shape)
        share = self.share[index].to(input.dtype)
        lam = self.lam0 * share
        gain, kl, _ = _Gain.apply(input, target, lam * unit, self.margin / lam, 1)
        held = self.alpha * math.log(input.shape[-1])
        if self.training:
            with torch.no_grad():
                self.share[index] = (1 - kl / held).clamp(1 - 1 / self.alpha, 1).to(self.share.dtype)
        return lam * gain - held * self.lam0 / 2 * (share - 1) ** 2


@loss(
    on="classes",
    examples=({"k": 2}, {"k": 3, "lam": 0.1, "margin": 1.0}, {"k": 5, "lam": 10.0, "normalize": True}),
    tune={"k": (2, 5), "normalize": (True,)},
)
def ldr_top_k_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    k: int = 2,
    lam: float | Tensor = 1.0,
    margin: float | Tensor = 0.1,
    normalize: bool = False,
) -> Float[Tensor, "*batch"]:
    """LDR-KL whose adversary may put at most 1/k on a class, so that k classes must share the blame. Per sample.

    k = 1 is `ldr_kl_loss`. As lam goes to 0 it becomes the mean of the k largest gaps, the top-k SVM's. Most of
    its time goes into finding the k largest gaps.

    Args:
        input: logits f over K classes.
        target: class numbers y, 0 to K - 1.
        k: 1 to K.
        lam, margin, normalize: as in `ldr_kl_loss`.

    Raises:
        ValueError: shapes or dtypes that do not fit, k out of range, lam not above 0, margin below 0.

    >>> import torch
    >>> ldr_top_k_loss(torch.tensor([[0.0, 9.0, 5.0]]), torch.tensor([0]), k=2, lam=0.01, margin=0.0)  # (9 + 5) / 2
    tensor([6.9959])
    """
    require.number("lam", lam, above=0.0)
    unit = _unit(input, target, margin, normalize)
    require.whole("k", k, at_least=1, at_most=input.shape[-1])
    return lam * _Gain.apply(input, target, _tensor(lam * unit, input), _tensor(margin / lam, input), k)[0]


def _unit(input: Tensor, target: Tensor, margin: float | Tensor, normalize: bool) -> float | Tensor:
    """What gaps between the logits are measured in: 1, or for each sample the mean absolute logit."""
    require.classes(input, target)
    require.number("margin", margin, at_least=0.0)
    require.one_of("normalize", normalize, (True, False))
    if not normalize:
        return 1.0
    size = torch.linalg.vector_norm(input, 1, -1) / input.shape[-1]
    return size + (size == 0)  # logits that are all zero stay so


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((), value)


def _share_of_lam0(
    input: Tensor, target: Tensor, unit: float | Tensor, margin: float | Tensor, alpha: float | Tensor
) -> Float[Tensor, "*batch"]:
    """The t = lam / lam0 that maximises t log mean exp(u / t) - alpha log K / 2 (t - 1)^2, where u = d / lam0."""
    blocks = _blocks(input, target, _tensor(unit, input), _tensor(margin, input))
    return torch.cat([_newton(scaled(*block), alpha) for block in blocks]).view(target.shape)


def _blocks(input: Tensor, target: Tensor, *numbers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The samples in a row, cut into blocks that fit the cache of a CPU."""
    classes = input.shape[-1]
    samples = input.reshape(-1, classes)
    size = at_once(samples)
    flat = [number.expand(target.shape).reshape(-1).split(size) for number in (target, *numbers)]
    return zip(samples.split(size), *flat)


def _newton(u: Float[Tensor, "rows classes"], alpha: float | Tensor) -> Float[Tensor, " rows"]:
    """Root of g(t) = alpha log K (1 - t) - KL(softmax(u / t), uniform), g >= 0 at 1 - 1 / alpha, g <= 0 at 1.

    KL falls with t. So the t at which g would vanish, were KL what it is now, lies between here and the root: a new
    bound at every step, within which Newton's proposal is clamped.
    """
    log_classes = math.log(u.shape[-1])
    u = u - u.amax(-1, keepdim=True)
    high = u.new_ones(len(u))
    low = high * (1 - 1 / alpha)
    t = (low + high) / 2
    for _ in range(_NEWTON_STEPS):
        s = u / t.unsqueeze(-1)
        p = torch.softmax(s, -1)
        log_top = p.amax(-1).log()  # minus the log-sum of s, whose maximum is 0
        p *= s
        mean = p.sum(-1)
        kl = mean + log_top + log_classes
        variance = torch.linalg.vecdot(p, s) - mean**2
        g, slope = alpha * log_classes * (1 - t) - kl, variance / t - alpha * log_classes
        bound = 1 - kl / (alpha * log_classes)
        low, high = torch.where(g > 0, bound, low), torch.where(g > 0, high, bound)
        t = torch.where(slope < 0, (t - g / slope).clamp(low, high), (low + high) / 2)
    return t


class _Gain(torch.autograd.Function):
    """max over p <= 1 / cap of sum_k p_k s_k - KL(p, uniform), less s_y, and that KL, without a gradient, and p - y.

    s = input / temperature - margin * onehot(target). By Danskin's theorem first derivatives need none of p.
    """

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, temperature: Tensor, margin: Tensor, cap: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(input.dtype, temperature.dtype)
        moved = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)  # the mass a class receives
        gains, kls = [], []
        for (p, _), (f, y, unit, lead) in zip(
            _blocks(moved, target), _blocks(input, target, temperature, margin), strict=True
        ):
            at_y = y.unsqueeze(-1)
            s = (f / unit.unsqueeze(-1)).scatter_add_(-1, at_y, -lead.unsqueeze(-1))
            _, best = _capped(s, cap, out=p)
            kls.append(torch.linalg.vecdot(s, p) - best)
            gains.append(best - s.gather(-1, at_y).squeeze(-1))
            p.scatter_add_(-1, at_y, -torch.ones_like(p[..., :1]))
        return torch.cat(gains).view(target.shape), torch.cat(kls).view(target.shape), moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.cap = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        input, target, temperature, margin, gain, kl, moved = ctx.saved_tensors
        by_temperature = by_margin = None
        at_y = target.unsqueeze(-1)
        if torch.is_grad_enabled():  # a second derivative is wanted, so p must depend on the input
            s = scaled(input, target, temperature, margin)
            held = _capped(s.detach(), ctx.cap)[0] >= (1 - 4 * torch.finfo(s.dtype).eps) / ctx.cap
            rest = torch.softmax(s.masked_fill(held, torch.finfo(s.dtype).min), -1)
            p = torch.where(held, 1 / ctx.cap, (1 - held.sum(-1, keepdim=True) / ctx.cap) * rest)
            moved = p.scatter_add(-1, at_y, -torch.ones_like(p[..., :1]))
            kl = torch.linalg.vecdot(moved, s) - gain
        moved_y = moved.gather(-1, at_y).squeeze(-1)
        if ctx.needs_input_grad[2]:  # sum_k moved_k s_k = gain + kl
            by_temperature = (-grad * (gain + kl + margin * moved_y) / temperature).sum_to_size(temperature.shape)
        if ctx.needs_input_grad[3]:
            by_margin = (-grad * moved_y).sum_to_size(margin.shape)
        return moved * (grad / temperature).unsqueeze(-1), None, by_temperature, by_margin, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Leading dimensions are independent, so the mapped one becomes one of them."""
        *tensors, cap = inputs
        input, target, *numbers = (t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims))
        input, target = (
            t.expand(info.batch_size, *t.shape) if dim is None else t for t, dim in zip((input, target), in_dims)
        )
        for i, dim in enumerate(in_dims[2:4]):
            if dim is not None:  # one for a replica, or for each of its samples
                numbers[i] = numbers[i].reshape(*numbers[i].shape, *[1] * (target.ndim - numbers[i].ndim))
        return _Gain.apply(input, target, *numbers, cap), (0, 0, 0)


def _capped(
    s: Tensor, cap: int, out: Tensor | None = None
) -> tuple[Float[Tensor, "*batch classes"], Float[Tensor, "*batch"]]:
    """The p with p_k <= 1 / cap that maximises sum_k p_k s_k - KL(p, uniform), and that maximum.

    p_k = min(1 / cap, exp(s_k + level)). The m largest s are at the cap, where m is the first number at which the
    next largest, sharing 1 - m / cap with the rest in softmax proportions, stays below it.
    """
    if cap == 1:
        p = torch.softmax(s, -1, out=out)
        return p, s.amax(-1) - p.amax(-1).log() - math.log(s.shape[-1])
    ceiling = -math.log(cap)
    top, where = s.topk(cap, -1)
    rest = torch.softmax(s.scatter(-1, where[..., :-1], -torch.inf), -1, out=out)
    tail = top[..., -1:] - rest.gather(-1, where[..., -1:]).log()  # log-sum of all but the cap - 1 largest
    log_sums = torch.cat([tail, top[..., :-1].flip(-1)], -1).logcumsumexp(-1).flip(-1)  # of all but the m largest
    levels = torch.linspace(1, 1 / cap, cap, dtype=s.dtype, device=s.device).log() - log_sums
    m = (levels + top > ceiling)[..., :-1].long().cumprod(-1).sum(-1, keepdim=True)
    level = levels.gather(-1, m)
    p = rest.mul_((level + tail).exp())
    p.scatter_(-1, where[..., :-1], (level + top).clamp_max(ceiling).exp()[..., :-1])
    surplus = (level + top - ceiling).clamp_min(0).sum(-1) / cap
    return p, surplus - level.squeeze(-1) - math.log(s.shape[-1])
