"""FathomNet 2023: name the animals in an image, and say whether the image is from outside the training data.

A protocol for networks that go on from where their training data end: train on images from shallow water, test on
shallow and deep ones, where species overlap and differ. Each image gets a ranked list of categories, judged by
average precision, and a score that it is out-of-sample, judged by its ROC curve; both count alike. Use it, or its
parts, for multi-label recognition under a shift along depth, time or place, where a model should know its limits.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import measure

PAPER = Paper(
    title="The FathomNet2023 Competition Dataset",
    year=2023,
    helps=(),
    departs=(
        "the metrics; neither the images nor a loader for them",
        "average precision is divided by the number of true labels, at most k, as in the competition's code; its text"
        " prints the sum alone",
    ),
    equation=(
        r"\tfrac12\bigl(\mathrm{MAP@}k+2\,\mathrm{AUROC}-1\bigr),\qquad "
        r"\mathrm{AP@}k=\frac1{\min(m,k)}\sum_{i=1}^{k}\mathrm{hit}_i\,\frac{\text{hits up to }i}{i},\qquad "
        r"m:\ \text{true labels}"
    ),
)


@measure(
    known=(
        {
            "inputs": {
                "ranked": [[2, 0, 1], [1, 1, 0], [3, -1, -1]],
                "target": [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
            },
            "value": 0.6111111111111112,  # (1, (1 + 2/3) / 2 and 0) / 3
        },
        {
            "inputs": {"ranked": [[2, 0, 1], [1, 1, 0]], "target": [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]},
            "hyper": {"k": 1},
            "value": 1.0,
        },
    ),
    within=(0.0, 1.0),
)
def multilabel_map_at_k(
    ranked: Int[Tensor, "images ranks"], target: Float[Tensor, "images categories"], *, k: int = 20
) -> Float[Tensor, ""]:
    """MAP@k: mean over images of the average precision of a ranked list of categories, cut after k, 0 to 1.

    AP = sum_i hit_i (hits up to i) / i / min(m, k), i the rank and m the number of true labels. A category that was
    named before is no hit but keeps its rank. An image without a true label has 0, and counts.

    Args:
        ranked: category numbers from 0, the likeliest first; shorter lists are filled up with -1, which is never a
            hit. Any number beyond the categories is a miss.
        target: 1 where a category is there, 0 where not, floating point, (images, categories).
        k: where lists are cut, at least 1.

    Returns:
        A scalar in the dtype of `target`. Without images NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, or k out of range.

    >>> multilabel_map_at_k(torch.tensor([[1, 2, 0]]), torch.tensor([[1.0, 1.0, 0.0]]))  # hits at ranks 1 and 3
    tensor(0.8333)
    """
    return _precision(ranked, target, k).mean().to(target.dtype)


@measure(
    known=(
        {"inputs": {"score": [0.1, 0.4, 0.35, 0.8], "target": [0, 0, 1, 1]}, "value": 0.5},  # AUROC 0.75
        {"inputs": {"score": [1.0, 1.0, 0.0], "target": [1, 0, 0]}, "value": 0.5},  # a tie counts half
    ),
    within=(-1.0, 1.0),
)
def scaled_auroc(score: Float[Tensor, " images"], target: Int[Tensor, " images"]) -> Float[Tensor, ""]:
    """sAUC = 2 AUROC - 1: 1 for a perfect order, 0 at random, below if turned round.

    It is the share of pairs in the right order less that in the wrong one, so ties count nothing.

    Args:
        score: higher means more surely out-of-sample.
        target: 1 where it is, 0 where not.

    Returns:
        A scalar, NaN where all images are of one kind.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> scaled_auroc(torch.tensor([0.2, 0.9, 0.3]), torch.tensor([0, 1, 1]))
    tensor(1.)
    """
    require.floating("score", score, dims=1)
    _flags("target", target, len(score))
    inside, outside = score[target == 0].sort().values, score[target != 0]
    below = torch.searchsorted(inside, outside.contiguous())
    above = len(inside) - torch.searchsorted(inside, outside.contiguous(), right=True)
    pairs = score.new_tensor(len(inside) * len(outside), dtype=torch.float64)
    return ((below - above).sum() / pairs).to(score.dtype)


class FathomNetScore:
    """The competition's score, (MAP@k + sAUC) / 2, gathered batch by batch; -0.5 to 1.

    It keeps average precisions added up, and every image's out-of-sample score and flag, on the CPU. Methods are those
    of torchmetrics.

    Args:
        k: where lists of categories are cut, at least 1.

    >>> score = FathomNetScore()
    >>> score.update(torch.tensor([[0], [2]]), torch.eye(3)[:2], torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    >>> score.compute()  # one list right of two; the order of the images right
    tensor(0.7500)
    """

    def __init__(self, *, k: int = 20) -> None:
        require.whole("k", k, at_least=1)
        self.k = k
        self.reset()

    def update(
        self,
        ranked: Int[Tensor, "images ranks"],
        target: Float[Tensor, "images categories"],
        score: Float[Tensor, " images"],
        outside: Bool[Tensor, " images"],
    ) -> None:
        """Take a batch.

        Args:
            ranked, target: as for `multilabel_map_at_k`.
            score: higher means more surely out-of-sample.
            outside: 1 where it is, 0 where not.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        require.floating("score", score, dims=1)
        require.same_shape("score", score, (len(ranked),))
        _flags("outside", outside, len(ranked))
        self._precision += float(_precision(ranked, target, self.k).sum())
        self._scores.append(score.detach().cpu())
        self._outside.append(outside.detach().cpu() != 0)

    def compute(self) -> Float[Tensor, ""]:
        """The score of all batches; NaN where all images are of one kind.

        Raises:
            ValueError: before `update`.
        """
        if not self._scores:
            raise ValueError("compute: expected at least one batch in update, got none")
        scores = torch.cat(self._scores)
        return (self._precision / len(scores) + scaled_auroc(scores, torch.cat(self._outside))) / 2

    def reset(self) -> None:
        """Forget all batches."""
        self._precision = 0.0
        self._scores: list[Tensor] = []
        self._outside: list[Tensor] = []


def _precision(ranked: Tensor, target: Tensor, k: int) -> Tensor:
    """Average precision of each image, float64."""
    require.whole("k", k, at_least=1)
    require.integers("ranked", ranked)
    if ranked.ndim != 2:
        raise ValueError(f"ranked: expected (images, ranks), got shape {tuple(ranked.shape)}")
    require.floating("target", target, dims=2)
    require.same_shape("target", target, (len(ranked), target.shape[1]))
    named, true = ranked[:, :k], target != 0
    known = (named >= 0) & (named < true.shape[1])
    before = (named.unsqueeze(2) == named.unsqueeze(1)).tril(-1).any(2)
    hit = true.gather(1, named.where(known, 0)) & known & ~before
    rank = torch.arange(1, named.shape[1] + 1, device=hit.device)
    return (hit * hit.cumsum(1) / rank.double()).sum(1) / true.sum(1).clamp(1, k)


def _flags(name: str, flags: Tensor, rows: int) -> None:
    if not isinstance(flags, Tensor) or flags.shape != (rows,):
        raise ValueError(
            f"{name}: expected one flag an image, shape ({rows},), got {tuple(getattr(flags, 'shape', ()))}"
        )
