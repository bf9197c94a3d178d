"""LMPT: class vectors tuned on a long tail of labels, with captions as a second teacher and rare classes first.

Multi-label images are compared with one trainable vector for each class, as CLIP compares them with prompts. Besides
a distribution-balanced classification loss, every image's caption pulls the vectors of its classes towards its
embedding and pushes the other classes away up to a margin; rare classes have the wider margin and nearly all of the
weight. The distribution-balanced loss weighs a label by its share of the classes in its image, moves each logit by its
class's odds, and goes easy on negatives, which in multi-label data are in the great majority.

Try the distribution-balanced loss on any long-tailed multi-label data. The embedding loss needs texts of the images in
the embedding space of the classes, and a temperament for tails: at its exponent of 2 a class ten times as frequent as
another counts a hundredth.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.losses._blocks import at_once, blocks
from lossary.losses._sigmoid import CELLS, binary_losses
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="LMPT: Prompt Tuning with Class-Specific Embedding Loss for Long-tailed Multi-Label Visual Recognition",
    year=2024,
    helps=("class-imbalance",),
    departs=(
        "no CLIP towers; the losses take similarities and logits",
        "class-specific embedding loss rebuilt from its description as a hinge embedding loss, with counts relative to"
        " the rarest class: the released code turns its sign round, feeds it a softmax of raw counts, and stops at a"
        " sum over a missing dimension",
        "distribution-balanced loss of Wu et al., label by label; in the released code its focal factor and its"
        " weights act on means over the batch",
        "a class without positives counts as one with a single one",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\frac1C\sum_{c=1}^C w_c\bigl[y_c\,d_c+(1-y_c)\max(0,\,m_c-d_c)\bigr],\qquad "
        r"d_c=1-\cos(\text{caption},v_c)\\ "
        r"m_c&=m\,n_c^{-1/4},\qquad w_c=\frac{n_c^{-\gamma}}{\sum_k n_k^{-\gamma}},\qquad "
        r"n_c:\ \text{count relative to the rarest class} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/html/2305.04536v2",
)


@loss(on="multilabel", examples=({}, {"margin": 1.0, "gamma": 0.5}), tune={"gamma": (0.5, 1.0, 2.0)})
def class_specific_embedding_loss(
    input: Float[Tensor, "*batch classes"],
    target: Float[Tensor, "*batch classes"],
    *,
    class_counts: Sequence[int] | Tensor,
    margin: float = 0.2,
    gamma: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """Mean over classes of w_c x_c where the class is there, and w_c max(0, m_c - x_c) where it is not.

    x = 1 - input is the cosine distance of an image's caption to the class's vector. With n_c the class's count over
    that of the rarest class, m_c = margin / n_c^(1/4) and w_c = n_c^-gamma / sum_k n_k^-gamma. The paper compares
    token by token and takes the mean, `loss(cosines of each token, target.unsqueeze(-2), ...)`; here the embeddings may
    as well be pooled. It is added to a classification loss, half and half.

    Args:
        input: cosine similarity of caption and class vector, -1 to 1.
        target: 1 where the class is there, 0 where not.
        class_counts: training positives of each class, (classes,); 0 counts as 1.
        margin: distance beyond which the rarest class, if absent, is left alone, >= 0.
        gamma: exponent of the weights, >= 0; 0 weighs all classes alike.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> cosines, target = torch.tensor([[0.9, 0.9]]), torch.tensor([[1.0, 0.0]])
    >>> class_specific_embedding_loss(cosines, target, class_counts=(16, 1), gamma=0.0)  # (0.1 + (0.2 - 0.1)) / 4
    tensor([0.0500])
    """
    require.number("margin", margin, at_least=0.0)
    require.number("gamma", gamma, at_least=0.0)
    counts = _counts(class_counts, input, target)
    ratio = counts / counts.amin()
    weight = ratio**-gamma / (ratio**-gamma).sum()
    distance = 1 - input
    values = torch.where(target > 0.5, distance, F.relu(margin * ratio**-0.25 - distance))
    return (weight * values).mean(-1)


@loss(
    on="multilabel",
    examples=(
        {"class_counts": (50, 30, 20, 10, 6, 4, 2), "num_samples": 100},
        {"class_counts": (100, 30, 20, 10, 6, 4, 0), "num_samples": 100, "mu": 0.2, "negative_scale": 2.0},
    ),
    tune={"negative_scale": (2.0, 5.0), "mu": (0.2, 0.3)},
)
def distribution_balanced_loss(
    input: Float[Tensor, "*batch classes"],
    target: Float[Tensor, "*batch classes"],
    *,
    class_counts: Sequence[int] | Tensor,
    num_samples: int,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.3,
    negative_scale: float = 5.0,
    bias: float = 0.05,
    gamma: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """Distribution-balanced focal loss of Wu et al. (2020), mean over classes, in nats.

    With n_c positives among N samples, r = (1 / n_c) / sum over the present classes k of 1 / n_k, weights
    R = alpha + sigmoid(beta (r - mu)) and u = z - bias log(N / n_c - 1) / negative_scale, a class's value is
    2 R (1 - q)^gamma (-log q), where q = sigmoid(u) if it is there. If it is not, q = 1 - sigmoid(negative_scale u) and
    R is divided by negative_scale. A sample without classes has R = alpha + 1, the limit of large r.

    Args:
        input: logits z.
        target: 1 where the class is there, 0 where not.
        class_counts: n_c, training positives of each class, (classes,); kept between 1 and N - 1.
        num_samples: N, training samples, at least 2.
        alpha: least weight, >= 0.
        beta: steepness of the weights, >= 0.
        mu: r at which a weight is alpha + 1/2; 0.3 for 20 classes (VOC), 0.2 for 80 (COCO) in LMPT.
        negative_scale: k > 0, by which negatives are made steeper and lighter; 5 for VOC, 2 for COCO.
        bias: of the logits, per unit of the class's log-odds.
        gamma: focusing exponent, 0 or at least 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> z, y = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    >>> settings = {"class_counts": (50, 50), "num_samples": 100, "negative_scale": 1.0, "beta": 0.0}
    >>> distribution_balanced_loss(z, y, **settings)  # 2 (0.1 + 1/2) (1/2)^2 log 2
    tensor([0.2079])
    """
    require.whole("num_samples", num_samples, at_least=2)
    hyper = {"alpha": alpha, "beta": beta, "mu": mu, "negative_scale": negative_scale, "gamma": gamma}
    for name, value in hyper.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, got a tensor; no gradient flows to it")
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        require.number(name, value, at_least=0.0)
    if 0 < gamma < 1:
        raise ValueError(f"gamma: expected 0 or a number >= 1 (the slope is infinite at q = 1), got {gamma!r}")
    require.number("mu", mu)
    require.number("bias", bias)
    require.number("negative_scale", negative_scale, above=0.0)
    counts = _counts(class_counts, input, target).clamp(max=num_samples - 1)
    shift = bias / negative_scale * torch.log(num_samples / counts - 1)
    tensors = input, target, (1 / counts).expand_as(input), shift.expand_as(input)
    values = _plain(*tensors, *hyper.values()) if torch.compiler.is_compiling() else _apply(*tensors, *hyper.values())
    return 2 / input.shape[-1] * values


def _plain(
    input: Tensor,
    target: Tensor,
    rarity: Tensor,
    shift: Tensor,
    alpha: float,
    beta: float,
    mu: float,
    scale: float,
    gamma: float,
) -> Tensor:
    """The formula as it stands, for second derivatives and compilers."""
    present = torch.linalg.vecdot(target.to(input.dtype), rarity).unsqueeze(-1)
    share = rarity / present.clamp(min=torch.finfo(input.dtype).tiny)
    weight = alpha + torch.sigmoid(beta * (share - mu))
    logit = input - shift
    logit = torch.where(target > 0.5, logit, scale * logit)
    return binary_losses(logit, target, positive=gamma, negative=gamma, weight=weight, negative_weight=1 / scale)


def _apply(*inputs: Any) -> Tensor:
    value: Tensor = _Balanced.apply(*inputs)[0]
    return value


class _Balanced(torch.autograd.Function):
    """`_plain` and its slope by the logits, on rows that stay in the cache; the slope alone is kept."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, rarity: Tensor, shift: Tensor, *hyper: float) -> tuple[Tensor, Tensor]:
        alpha, beta, mu, scale, gamma = hyper
        labels, tiny = input.shape[-1], torch.finfo(input.dtype).tiny
        z, y, rarity, shift = (t.reshape(-1, labels) for t in (input, target.to(input.dtype), rarity, shift))
        value, slope = z.new_empty(len(z)), torch.empty_like(z)
        buffers = z.new_empty(5, min(at_once(z, CELLS), len(z)), labels)
        of_block = buffers.unbind()
        one, light, steep = (z.new_full((), number) for number in (1.0, 1 / scale, scale))
        offset = z.new_full((labels,), -beta * mu)  # a row: an operation is slow where two of its inputs are one number
        for rows in blocks(z, CELLS):
            there, by_z = y[rows], slope[rows]
            if len(there) < len(of_block[0]):
                of_block = buffers[:, : len(there)].unbind()
            weight, sign, u, q, log_q = of_block
            present = torch.mul(there, rarity[rows], out=u).sum(-1, keepdim=True).clamp_(min=tiny).reciprocal_()
            torch.addcmul(offset, rarity[rows], present, value=beta, out=weight).sigmoid_().add_(alpha)
            weight.mul_(torch.add(light, there, alpha=1 - 1 / scale, out=u))
            torch.add(steep, there, alpha=-1 - scale, out=sign)  # -1 where the label is there, scale where not
            torch.sub(shift[rows], z[rows], out=u).mul_(sign)
            torch.sigmoid(u, out=q).clamp_(min=tiny)
            torch.log(q, out=log_q)
            torch.minimum(log_q, u, out=log_q)  # u is larger, unless q is at its bound, where log sigmoid(u) is u
            miss = torch.sub(one, q, out=u)
            weight.mul_(torch.pow(miss, gamma, out=by_z))
            torch.sum(log_q.mul_(weight), -1, out=value[rows])
            torch.addcmul(weight.mul_(miss), log_q, q, value=-gamma, out=by_z).mul_(sign)
        return value.neg_().view(input.shape[:-1]), slope.view(input.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.hyper = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        *inputs, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the slope must depend on the input
            (slope,) = torch.autograd.grad(_plain(*inputs, *ctx.hyper).sum(), inputs[0], create_graph=True)
        by_input = slope * grad.unsqueeze(-1)
        return by_input, None, None, -by_input if ctx.needs_input_grad[3] else None, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Leading dimensions are independent, so the mapped one becomes one of them."""
        stacked = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(inputs[:4], in_dims)
        ]
        return _Balanced.apply(*stacked, *inputs[4:]), (0, 0)


def _counts(class_counts: Sequence[int] | Tensor, input: Tensor, target: Tensor) -> Float[Tensor, " classes"]:
    """The counts, at least 1, beside logits with 0/1 targets of the same shape."""
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, input.shape)
    if not isinstance(class_counts, Tensor):
        for count in class_counts:
            require.number("class_counts", count, at_least=0)
    counts = torch.as_tensor(class_counts).to(input)
    if counts.shape != input.shape[-1:]:
        raise ValueError(
            f"class_counts: expected {input.shape[-1]} counts, one for each class, got shape {tuple(counts.shape)}"
        )
    return counts.clamp(min=1)
