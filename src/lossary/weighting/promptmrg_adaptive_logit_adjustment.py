"""Adaptive logit adjustment: a label's margin follows how well its positives are recognised, not only how rare it is.

Logit adjustment adds log pi to a label's positive logit in training, with pi its frequency relative to the most
frequent label, so that the model has to score positives of rare labels that much higher; at inference nothing is
added. Here pi is refreshed after every epoch: it becomes the mean score that the label's positives get on validation
data, relative to the best label. A rare label that is easy loses its margin, a frequent one that is hard gains one. Use
it for multi-label diagnosis where the default threshold should serve and macro F1 counts. It wants validation
positives of every label, trades precision for recall, and spoils the calibration of the probabilities; where
thresholds may be chosen for each label on validation data, try that first.

PromptMRG turns the states so predicted (blank, positive, negative, uncertain) into tokens that stand before the
report that a decoder writes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="PromptMRG: Diagnosis-Driven Prompts for Medical Report Generation",
    year=2024,
    helps=("class-imbalance",),
    departs=(
        "no report generator and no retrieval of similar reports",
        "a label without positives keeps its prior, and no prior falls below a floor; the official code divides by"
        " zero there",
        "the 0/1 form, with one logit for each label, is not in the paper",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\frac1L\sum_{k=1}^L\log\operatorname{softmax}\bigl(z_k+e_+\log\pi_k\bigr)_{y_k},\qquad "
        r"\pi_k\leftarrow\bar s_k\,\big/\max_j\bar s_j\\ "
        r"&e_+:\ \text{the positive state},\quad "
        r"\bar s_k:\ \text{mean validation score of label }k\text{'s positives} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/html/2308.12604v2",
)


@loss(on="multilabel", examples=({}, {"class_counts": (90, 60, 30, 9, 3, 0), "auxiliary": 1, "floor": 0.01}))
class AdaptiveLogitAdjustedLoss(nn.Module):
    """Cross-entropy of every label, with log pi_k added to its positive logit in training; the mean over labels.

    In training mode the values are those of softmax cross-entropy between the states of label k, or of binary
    cross-entropy, after log pi_k was added to the logit of the positive state. In evaluation mode nothing is added.
    Where the loss is least, a positive logit stands -log pi_k higher than without.

        status = LearningStatusTracker(labels)
        for epoch in range(epochs):
            ...  # train with criterion
            for x, y in validation:
                status.update(model(x), y)
            criterion.update(status.compute())
            status.reset()

    Args:
        class_counts: training rows on which each label is positive; pi_k begins as class_counts[k] over the largest.
        auxiliary: how many further labels stand at the end, for which pi is always 1.
        positive: the positive state's number, where labels have states.
        floor: least pi, 0 < floor <= 1; also of labels that are never positive.

    Attributes:
        prior: (labels,), pi; a buffer.

    Raises:
        ValueError: counts that are negative or all 0, another argument out of range; shapes or dtypes that do not fit.

    >>> criterion = AdaptiveLogitAdjustedLoss((80, 20))
    >>> criterion(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))  # (log 2 + log 5) / 2
    tensor([1.1513])
    >>> criterion.update(torch.tensor([0.3, 0.6])).prior
    tensor([0.5000, 1.0000])
    >>> criterion.eval()(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([0.6931])
    """

    prior: Tensor

    def __init__(
        self, class_counts: Sequence[int], *, auxiliary: int = 0, positive: int = 1, floor: float = 1e-4
    ) -> None:
        super().__init__()
        for count in class_counts:
            require.number("class_counts", count, at_least=0)
        if not any(class_counts):
            raise ValueError(f"class_counts: expected a label with positives, got {tuple(class_counts)}")
        require.whole("auxiliary", auxiliary)
        require.whole("positive", positive)
        if isinstance(floor, Tensor):
            raise ValueError("floor: expected a number, got a tensor; no gradient flows to it")
        require.number("floor", floor, above=0.0, at_most=1.0)
        self.auxiliary, self.positive, self.floor = auxiliary, positive, floor
        self.register_buffer("prior", torch.ones(len(class_counts) + auxiliary))
        self.update(torch.tensor(class_counts, dtype=torch.float32))

    @torch.no_grad()
    def update(self, status: Float[Tensor, " labels"]) -> "AdaptiveLogitAdjustedLoss":
        """Make pi_k = status[k] / max status, not below the floor; where the status is NaN the prior stays.

        Args:
            status: (labels) or, without the auxiliary ones, (labels - auxiliary), each >= 0.
        """
        learned = len(self.prior) - self.auxiliary
        require.floating("status", status, dims=1)
        if len(status) not in (learned, len(self.prior)):
            raise ValueError(f"status: expected {learned} numbers, one for each label, got {len(status)}")
        status = status[:learned].to(self.prior)
        best = status.nan_to_num(nan=0.0).amax()
        known = ~status.isnan() & (best > 0)
        self.prior[:learned] = torch.where(known, (status / best).clamp(min=self.floor), self.prior[:learned])
        return self

    def forward(
        self,
        input: Float[Tensor, "*batch labels"] | Float[Tensor, "*batch labels states"],
        target: Float[Tensor, "*batch labels"] | Int[Tensor, "*batch labels"],
    ) -> Float[Tensor, "*batch"]:
        """From logits and 0/1 targets of the same shape, or logits of states and the numbers of the states, int64."""
        _require_labels(input, target, len(self.prior), self.positive)
        shift = self.prior.log().to(input.dtype) if self.training else None
        if target.is_floating_point():
            adjusted = input if shift is None else input + shift
            return F.binary_cross_entropy_with_logits(adjusted, target, reduction="none").mean(-1)
        if shift is not None:
            at_positive = torch.arange(input.shape[-1], device=input.device) == self.positive
            input = input + shift.unsqueeze(-1) * at_positive
        values = F.cross_entropy(input.flatten(0, -2), target.flatten(), reduction="none")
        return values.view(target.shape).mean(-1)

    def extra_repr(self) -> str:
        return f"{len(self.prior)}, auxiliary={self.auxiliary}, positive={self.positive}, floor={self.floor:g}"


class LearningStatusTracker(nn.Module):
    """Mean score of each label's positives over the batches it is shown: what `AdaptiveLogitAdjustedLoss` is fed.

    The score of a sample is the probability of the positive state, softmax(input)[positive] or sigmoid(input),
    without adjustment. `compute` sums over all processes of a `torch.distributed` run.

    Args:
        labels: how many, auxiliary ones included.
        positive: the positive state's number, where labels have states.

    Attributes:
        total, count: (labels,), float64, sum of the scores and number of the positives; buffers.

    Raises:
        ValueError: an argument out of range, shapes or dtypes that do not fit.

    >>> status = LearningStatusTracker(3)
    >>> status.update(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    >>> status.compute()  # the last label had no positives
    tensor([0.5000, 0.5000,    nan])
    """

    total: Tensor
    count: Tensor

    def __init__(self, labels: int, *, positive: int = 1) -> None:
        super().__init__()
        require.whole("labels", labels, at_least=1)
        require.whole("positive", positive)
        self.positive = positive
        self.register_buffer("total", torch.zeros(labels, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(labels, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        input: Float[Tensor, "*batch labels"] | Float[Tensor, "*batch labels states"],
        target: Float[Tensor, "*batch labels"] | Int[Tensor, "*batch labels"],
    ) -> None:
        """Take in a batch, in either layout of `AdaptiveLogitAdjustedLoss`."""
        _require_labels(input, target, len(self.total), self.positive)
        if target.is_floating_point():
            score, positive = input.sigmoid(), target > 0.5
        else:
            score, positive = input.softmax(-1)[..., self.positive], target == self.positive
        score, positive = score.reshape(-1, len(self.total)), positive.reshape(-1, len(self.total))
        self.total += score.double().masked_fill(~positive, 0.0).sum(0)
        self.count += positive.sum(0)

    def compute(self) -> Float[Tensor, " labels"]:
        """The status, 0 to 1, float32; NaN for labels that had no positives."""
        sums = torch.stack([self.total, self.count])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        return (sums[0] / sums[1]).float()

    def reset(self) -> None:
        """Forget all batches."""
        self.total.zero_()
        self.count.zero_()


def diagnosis_prompt_tokens(
    input: Float[Tensor, "*batch labels states"], *, state_tokens: Int[Tensor, " states"]
) -> Int[Tensor, "*batch labels"]:
    """The token of each label's most likely state, to be put before the report that a decoder writes.

    In training the tokens of the true states stand there, `state_tokens[target]`, and are left out of the language
    model's loss.

    Args:
        input: logits of the states, not adjusted.
        state_tokens: token number of each state, such as those of [BLA], [POS], [NEG] and [UNC].

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> logits = torch.tensor([[[0.2, 1.5, 0.0, -1.0], [2.0, 0.1, 0.3, 0.0]]])
    >>> diagnosis_prompt_tokens(logits, state_tokens=torch.tensor([30522, 30523, 30524, 30525]))
    tensor([[30523, 30522]])
    """
    require.floating("input", input, at_least_dims=2)
    require.integers("state_tokens", state_tokens, shape=input.shape[-1:])
    return state_tokens[input.argmax(-1)]


def _require_labels(input: Tensor, target: Tensor, labels: int, positive: int) -> None:
    require.floating("input", input, at_least_dims=1)
    if isinstance(target, Tensor) and target.is_floating_point():
        require.same_shape("target", target, input.shape)
    else:
        require.integers("target", target, shape=input.shape[:-1])
        if input.shape[-1] <= positive:
            raise ValueError(f"input: expected more than {positive} states, got shape {tuple(input.shape)}")
    if target.shape[-1:] != (labels,):
        raise ValueError(f"target: expected {labels} labels in the last dimension, got shape {tuple(target.shape)}")
