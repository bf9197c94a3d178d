"""DeeDiff (AdaDiff): leave the denoiser after as many blocks as the step needs, by a learned certainty.

Some steps of sampling are easy: at high noise the first blocks of a network already say what the last ones do. Every
block gets the network's own output head and a small head of its own that predicts how near that output is to the
truth; sampling stops at the first block that is certain enough. Training charges all blocks' outputs, the more the more
certain they are. For residual backbones with a shared output, transformers above all; the certainty speaks of the error
of the prediction, part of which no further block can remove, so choose the threshold by the depth that it leads to.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model Generation",
    year=2023,
    helps=("slow-sampling", "inference-cost"),
    departs=(
        "layers are weighted as in the official code, by their mean certainty over the batch; the paper's weights are"
        " one less the uncertainty, element by element",
        "the embedding of time is an option of the head, as in the paper; the code has none",
    ),
    equation=(
        r"\mathcal L=\lVert\varepsilon-\varepsilon_L\rVert^2+\frac1L\sum_i\bigl\lVert c_i-(1-\tanh|\varepsilon_i-"
        r"\varepsilon|)\bigr\rVert^2+\sum_i\frac{\bar c_i}{\sum_j\bar c_j}\lVert\varepsilon-\varepsilon_i\rVert^2"
    ),
    url="https://github.com/Tangshengku/AdaDiff",
)


class UncertaintyExitHead(nn.Module):
    """c = sigmoid(W [h, time] + b) of a block's features, which get no gradient: 1 is certain, 1 - c the uncertainty.

    h is (*batch, features) or (*batch, tokens, features), time (*batch, time_features), the same for all tokens.

    Args:
        features: last dimension of h.
        outputs: values for each token: those of a patch, or of the sample.
        time_features: last dimension of the embedding of time, 0 for none.

    Raises:
        ValueError: numbers below their least, or an embedding where none, or another, is expected.

    >>> head = UncertaintyExitHead(8, 3)
    >>> head(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, features: int, outputs: int, *, time_features: int = 0) -> None:
        super().__init__()
        require.whole("features", features, at_least=1)
        require.whole("outputs", outputs, at_least=1)
        require.whole("time_features", time_features)
        self.time_features = time_features
        self.linear = nn.Linear(features + time_features, outputs)

    def forward(
        self, h: Float[Tensor, "*batch features"], time: Float[Tensor, "*leading time_features"] | None = None
    ) -> Float[Tensor, "*batch outputs"]:
        require.floating("h", h, at_least_dims=1)
        if (0 if time is None else time.shape[-1]) != self.time_features:
            got = "None" if time is None else f"shape {tuple(time.shape)}"
            raise ValueError(f"time: expected {self.time_features} features, got {got}")
        h = h.detach()
        if time is not None:
            leading = time.shape[:-1]
            if len(leading) >= h.ndim or any(n not in (1, size) for n, size in zip(leading, h.shape)):
                raise ValueError(f"time: expected leading dimensions of {tuple(h.shape[:-1])}, got {tuple(time.shape)}")
            time = time.detach().reshape(*leading, *[1] * (h.ndim - time.ndim), -1)
            h = torch.cat([h, time.expand(*h.shape[:-1], -1)], dim=-1)
        return self.linear(h).sigmoid()  # type: ignore[no-any-return]


def deediff_loss(
    predictions: Float[Tensor, "layers *batch_and_data"],
    certainty: Float[Tensor, "layers *batch_and_data"],
    target: Float[Tensor, "*batch_and_data"],
    *,
    certainty_weight: float = 1.0,
    layer_weight: float = 1.0,
    detach: bool = False,
    batch_dims: int = 1,
) -> Float[Tensor, "*batch"]:
    """The squared error of the last layer, of the certainties, and of all layers by their certainty; per sample.

    Where all certainties are 0, layers weigh the same.

    Args:
        predictions: of each layer, the last one the network's.
        certainty: c of each layer, 0 to 1.
        target: the noise, or whatever is predicted.
        certainty_weight, layer_weight: of the second and third term; the paper has 1.
        detach: leave the weights of the layers out of the gradient; the official code does not, so that layers gain
            from being unsure of what they do badly.
        batch_dims: leading dimensions of the target that are not data; mean certainties are over the last of them.

    Raises:
        ValueError: shapes that do not fit, or a weight below 0.

    >>> guess = torch.tensor([[[2.0]], [[1.0]]])  # 2 layers, 1 sample
    >>> deediff_loss(guess, torch.ones(2, 1, 1), torch.zeros(1, 1), certainty_weight=0.0)  # 1 + (4 + 1) / 2
    tensor([3.5000])
    """
    require.floating("target", target, at_least_dims=1)
    require.whole("batch_dims", batch_dims, at_least=1, at_most=target.ndim)
    require.floating("predictions", predictions)
    if predictions.ndim != target.ndim + 1 or predictions.shape[1:] != target.shape or not len(predictions):
        raise ValueError(f"predictions: expected (layers, *{tuple(target.shape)}), got {tuple(predictions.shape)}")
    require.same_shape("certainty", certainty, tuple(predictions.shape))
    require.number("certainty_weight", certainty_weight, at_least=0.0)
    require.number("layer_weight", layer_weight, at_least=0.0)

    def mean(values: Tensor) -> Tensor:
        return values.flatten(batch_dims + 1).mean(-1) if values.ndim > batch_dims + 1 else values

    error = mean((predictions - target).square())  # (layers, *batch)
    truth = 1 - (predictions - target).abs().tanh().detach()
    unsure = mean((certainty - truth).square()).mean(0)
    share = mean(certainty).mean(-1, keepdim=True)
    total = share.sum(0)
    share = torch.where(total > 0, share / torch.where(total > 0, total, 1.0), 1 / len(share))
    if detach:
        share = share.detach()
    return error[-1] + certainty_weight * unsure + layer_weight * (share * error).sum(0)


def early_exit_denoise(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    heads: Sequence[Callable[[Tensor], Tensor]],
    output: Callable[[Tensor], Tensor],
    h: Float[Tensor, "*batch_and_features"],
    *,
    threshold: float = 0.92,
    hesitant: int = 0,
    per_sample: bool = False,
    batch_dims: int = 1,
) -> tuple[Tensor, Int[Tensor, "*batch"]]:
    """Run blocks until one is certain: (prediction, number of blocks it took).

    The prediction after block i is output(h); it is taken if the mean of heads[i](h) exceeds the threshold. All
    samples are computed until the last has left.

    Args:
        blocks: h -> h. heads: h -> certainty (*batch, ...), one for each block, the last one's unused.
        output: h -> prediction (*batch, ...), shared by all blocks.
        h: embedded input.
        threshold: of the mean certainty; at 1 all blocks run.
        hesitant: among the first so many blocks, a sample leaves only at its second certain one (the U-ViT's first
            half in the official code).
        per_sample: decide for each sample; otherwise by the mean over the last batch dimension, together.
        batch_dims: leading dimensions that are not data.

    Raises:
        ValueError: no block, another number of heads, or numbers out of range.

    >>> double, sure = (lambda h: 2 * h), (lambda h: (h / 8).clamp(max=1))
    >>> early_exit_denoise([double] * 4, [sure] * 4, lambda h: -h, torch.ones(1, 1), threshold=0.4)
    (tensor([[-4.]]), tensor([2]))
    """
    require.floating("h", h, at_least_dims=1)
    require.number("threshold", threshold)
    require.whole("hesitant", hesitant)
    require.whole("batch_dims", batch_dims, at_least=1, at_most=h.ndim)
    if not len(blocks) or len(heads) != len(blocks):
        raise ValueError(f"heads: expected one for each of at least one block, got {len(heads)} for {len(blocks)}")
    left = torch.zeros(h.shape[:batch_dims], dtype=torch.bool, device=h.device)
    depth = torch.full(left.shape, len(blocks), device=h.device)
    sure_before = torch.zeros_like(left)
    found: Tensor | None = None
    for i, (block, head) in enumerate(zip(blocks, heads)):
        h = block(h)
        if i == len(blocks) - 1:
            break
        certainty = head(h)
        mean = certainty.flatten(batch_dims).mean(-1) if certainty.ndim > batch_dims else certainty
        sure = (mean if per_sample else mean.mean(-1, keepdim=True).expand_as(mean)) > threshold
        leaves = sure & ~left & (sure_before | (i >= hesitant))
        sure_before = sure_before | sure
        if leaves.any():
            found = _taken(leaves, output(h), found)
            depth = torch.where(leaves, i + 1, depth)
            left = left | leaves
            if left.all():
                return found, depth
    return _taken(~left, output(h), found), depth


def _taken(where: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """`new` for the samples chosen, `old` for the others."""
    return new if old is None else torch.where(over(where, new), new, old)
