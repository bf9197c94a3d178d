"""Error norm truncation: leave out of the loss what the model, sure of something else, holds to be wrong.

A token's error is the distance between the predicted distribution and the one-hot target. It comes near sqrt(2)
only where nearly all probability lies on one other token. Where the model has no opinion it is near 1, however
improbable the target: the negative log-likelihood cannot tell these two apart, and truncating by it throws out
rare words and hard contexts along with mistakes. Use it on noisy text, or any noisy classes, once the model is
better than its labels: what is cut teaches nothing more, so a model that is confidently wrong stays so. With many
wrong labels a model that fits them is never sure of itself, and a lower threshold is needed (at a share r of
wrong labels errors hardly exceed sqrt(1 + (1 - r)^2)).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.losses._blocks import at_once
from lossary.losses._softmax import _LogProb
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Error Norm Truncation: Robust Training in the Presence of Data Noise for Text Generation Models",
    year=2024,
    helps=("label-noise",),
    departs=(
        "whole sequences are not dropped by their mean error (the official code's fraction for language models)",
        "no label smoothing, which the translation experiments add",
        "an ignored token does not count towards the fraction; in the official code it does",
    ),
    equation=(
        r"\ell=-\bigl[\,\lVert p-e_y\rVert_2\le t\,\bigr]\log p_y,\qquad "
        r"e_y:\ \text{the one-hot target}"
    ),
    url="https://arxiv.org/abs/2310.00840",
)


@torch.no_grad()
def error_norm(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """|softmax(input) - onehot(target)|_2 per sample, 0 to sqrt(2): sqrt(sum_v p_v^2 - 2 p_y + 1). No gradient.

    Args:
        input: logits.
        target: class numbers, 0 to classes - 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [20.0, 0.0, 0.0, 0.0]])
    >>> error_norm(logits, torch.tensor([1, 1]))  # no opinion, sqrt(1 - 1/4), and the wrong one
    tensor([0.8660, 1.4142])
    """
    require.classes(input, target)
    return _distance(input.softmax(-1), target)


@loss(
    on="classes",
    examples=({}, {"threshold": 1.1}, {"fraction": 0.2}, {"warmup": 1_000_000}),
    tune={"threshold": (1.1, 1.2, 1.3), "warmup": (0, 200)},
    limits={"cross_entropy": {"threshold": 1.5, "fraction": None}},
    couples=True,
)
class ErrorNormTruncationLoss(nn.Module):
    """Cross-entropy, 0 for samples whose `error_norm` exceeds a cut. In nats, per sample.

    The cut is `threshold` or, with a `fraction`, the value that this fraction of the batch exceeds. The first
    `warmup` calls in training mode and all in evaluation mode are plain cross-entropy. As in the official code,
    the mean is over all tokens, so the fewer are kept, the smaller the step. To take it over those kept instead:
    `values.sum() / (values > 0).sum()`.

    Args:
        threshold: largest error that is kept, >= 0; the paper uses 1.1 to 1.4.
        fraction: of the batch, or of what is not ignored in it, to be cut, 0 <= fraction < 1; takes the threshold's
            place. No more than this is cut: of equal errors all are kept.
        warmup: number of calls without truncation; thousands, for the paper's transformers.
        ignore_index: a target that stands for no token (padding): its value is 0.

    Attributes:
        steps: calls so far in training mode; a buffer.

    Raises:
        ValueError: a hyper-parameter out of range, shapes or dtypes that do not fit.

    >>> truncated = ErrorNormTruncationLoss(threshold=1.3)
    >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [20.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    >>> truncated(logits, torch.tensor([1, 1, -100]))
    tensor([1.3863, 0.0000, 0.0000])
    """

    steps: Tensor

    def __init__(
        self,
        *,
        threshold: float = 1.3,
        fraction: float | None = None,
        warmup: int = 0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("fraction", fraction)):
            if isinstance(value, Tensor):
                raise ValueError(f"{name}: expected a number, got a tensor; a cut passes no gradient back to it")
        require.number("threshold", threshold, at_least=0.0)
        if fraction is not None:
            require.number("fraction", fraction, at_least=0.0, below=1.0)
        require.whole("warmup", warmup)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index: expected a whole number, got {ignore_index!r}")
        self.threshold, self.fraction, self.warmup, self.ignore_index = threshold, fraction, warmup, ignore_index
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Values of a batch, all of whose leading dimensions are one batch."""
        require.classes(input, target)
        ignored = target == self.ignore_index
        token = target.masked_fill(ignored, 0)
        log_p_y, p = _LogProb.apply(input, token, None, None)
        value = -log_p_y
        if not self.training:
            return value.masked_fill(ignored, 0)
        with torch.no_grad():
            error = _distance(p, token)
            cut = self.threshold if self.fraction is None else _exceeded_by(self.fraction, error, ignored)
            truncated = (error > cut) & (self.steps >= self.warmup)
            self.steps += 1
        return value.masked_fill(truncated | ignored, 0)

    def extra_repr(self) -> str:
        cut = f"threshold={self.threshold}" if self.fraction is None else f"fraction={self.fraction}"
        return f"{cut}, warmup={self.warmup}"


def _distance(p: Tensor, target: Tensor) -> Tensor:
    """|p - onehot(target)|_2, in blocks for the cache. Exact where p_y is near 1, unlike the expanded square."""
    flat = p.reshape(-1, p.shape[-1])
    parts = zip(*(t.split(at_once(flat)) for t in (flat, target.reshape(-1, 1))))
    norms = [torch.linalg.vector_norm(q.scatter_add(-1, y, -torch.ones_like(q[:, :1])), dim=-1) for q, y in parts]
    return torch.cat(norms).view(target.shape)


def _exceeded_by(fraction: float, error: Tensor, ignored: Tensor) -> Tensor:
    """The error that at most this fraction of those not ignored exceed."""
    falling = error.masked_fill(ignored, -1.0).flatten().sort(descending=True).values
    return falling[(fraction * (~ignored).sum()).long()]
