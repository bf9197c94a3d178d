"""Metrics by task, in one convention: metric(input, target), predictions first, as fractions and never percent.

A metric of something that the data lack, such as precision without alarms, is NaN.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossary import require
from lossary.losses._pixels import boundary, gaussian_window, images, matched_segments, near, ssim_map
from lossary.losses._softmax import log_prob
from lossary.losses._tokens import common_subsequence, ngrams
from lossary.roles import measure

_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: (x - y).square().mean(-1),
    "mae": lambda x, y: (x - y).abs().mean(-1),
    "rmse": lambda x, y: (x - y).square().mean(-1).sqrt(),
    "mape": lambda x, y: ((x - y) / y).abs().mean(-1),
    "smape": lambda x, y: (2 * (x - y).abs() / (x.abs() + y.abs()).clamp(min=torch.finfo(x.dtype).tiny)).mean(-1),
    "r2": lambda x, y: 1 - (x - y).square().sum(-1) / (y - y.mean(-1, keepdim=True)).square().sum(-1),
}


@measure(
    known=(
        {
            "inputs": {"input": [1.0, 2.0, 4.0], "target": [1.0, 3.0, 2.0]},
            "hyper": {"score": "rmse"},
            "value": 1.29099445,
        },
        {"inputs": {"input": [1.0, 2.0, 5.0], "target": [1.0, 4.0, 4.0]}, "hyper": {"score": "mape"}, "value": 0.25},
        {"inputs": {"input": [1.0, 2.0, 5.0], "target": [1.0, 3.0, 5.0]}, "value": 0.875},
        {
            "inputs": {"input": [1.0, 2.0, 5.0], "target": [1.0, 3.0, 5.0]},
            "hyper": {"predictors": 1},
            "value": 0.75,
        },
    ),
    within=None,
)
def regression_score(
    input: Float[Tensor, "*batch n"], target: Float[Tensor, "*batch n"], *, score: str = "r2", predictors: int = 0
) -> Float[Tensor, "*batch"]:
    """MSE, MAE, RMSE, MAPE, SMAPE or R^2 of n predictions; with `predictors` the adjusted R^2.

    MAPE is the mean of |x - y| / |y|, infinite where a target is 0, and SMAPE that of 2 |x - y| / (|x| + |y|), with
    0/0 as 0. R^2 = 1 - sum (x - y)^2 / sum (y - mean y)^2 is not finite for a constant target; adjusted
    it is 1 - (1 - R^2) (n - 1) / (n - p - 1). Fractions, not percent.

    Args:
        input: predictions.
        target: numbers, shaped as the predictions.
        score: "mse", "mae", "rmse", "mape", "smape" or "r2".
        predictors: p, 0 to n - 2; for R^2 alone.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown score, p out of range.

    >>> regression_score(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), score="mape")
    tensor(0.2500)
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape))
    require.one_of("score", score, _SCORES)
    n = input.shape[-1]
    require.whole("predictors", predictors, at_most=max(n - 2, 0) if score == "r2" else 0)
    value = _SCORES[score](input, target)
    return 1 - (1 - value) * (n - 1) / (n - predictors - 1) if predictors else value


_RATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "accuracy": lambda tp, fp, fn, tn: (tp + tn) / (tp + fp + fn + tn),
    "precision": lambda tp, fp, fn, tn: tp / (tp + fp),
    "recall": lambda tp, fp, fn, tn: tp / (tp + fn),
    "f1": lambda tp, fp, fn, tn: 2 * tp / (2 * tp + fp + fn),
    "fpr": lambda tp, fp, fn, tn: fp / (fp + tn),
    "npv": lambda tp, fp, fn, tn: tn / (tn + fn),
    "fdr": lambda tp, fp, fn, tn: fp / (fp + tp),
    "iou": lambda tp, fp, fn, tn: tp / (tp + fp + fn),
}


@measure(
    known=(
        {
            "inputs": {"input": [0.9, 0.8, 0.3, 0.6, 0.2, 0.1, 0.7], "target": [1, 1, 1, 0, 0, 0, 0]},
            "value": 0.5714285714285714,
        },
        {
            "inputs": {"input": [0.9, 0.8, 0.3, 0.6, 0.2, 0.1, 0.7], "target": [1, 1, 1, 0, 0, 0, 0]},
            "hyper": {"rate": "npv"},
            "value": 0.6666666666666666,
        },
        {
            "inputs": {"input": [0.9, 0.8, 0.3, 0.6, 0.2, 0.1, 0.7], "target": [1, 1, 1, 0, 0, 0, 0]},
            "hyper": {"rate": "fpr", "threshold": 0.65},
            "value": 0.25,
        },
    ),
    within=(0.0, 1.0),
)
def binary_rate(
    input: Float[Tensor, "*batch n"], target: Int[Tensor, "*batch n"], *, rate: str = "f1", threshold: float = 0.5
) -> Float[Tensor, "*batch"]:
    """A rate of the confusion matrix over the last dimension: samples, or the pixels of a mask. NaN for 0/0.

    accuracy; precision TP / (TP + FP), also called true discovery rate; recall TP / (TP + FN), true positive rate; F1,
    which on masks is Dice; FPR FP / (FP + TN); NPV TN / (TN + FN); FDR FP / (FP + TP); IoU TP / (TP + FP + FN).

    Args:
        input: scores.
        target: 1 for positives, 0 for negatives.
        rate: "accuracy", "precision", "recall", "f1", "fpr", "npv", "fdr" or "iou".
        threshold: scores above it are positive.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown rate.

    >>> binary_rate(torch.tensor([0.9, 0.7, 0.1]), torch.tensor([1, 0, 1]), rate="precision")
    tensor(0.5000)
    """
    _scored(input, target)
    require.one_of("rate", rate, _RATES)
    require.number("threshold", threshold)
    found, true = input > threshold, target > 0
    counts = [(a & b).sum(-1).double() for a, b in ((found, true), (found, ~true), (~found, true), (~found, ~true))]
    return _RATES[rate](*counts).to(input.dtype)


@measure(
    known=({"inputs": {"input": [0.1, 0.4, 0.4, 0.8], "target": [0, 0, 1, 1]}, "value": 0.875},), within=(0.0, 1.0)
)
def roc_auc(input: Float[Tensor, "*batch n"], target: Int[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half. NaN without both.

    Args:
        input: scores, higher is more positive.
        target: 1 for positives, 0 for negatives.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> roc_auc(torch.tensor([0.2, 0.3, 0.9]), torch.tensor([0, 1, 0]))
    tensor(0.5000)
    """
    _scored(input, target)
    input = input.contiguous()
    ordered, positive = input.sort(-1).values, target.double()
    rank = (torch.searchsorted(ordered, input) + torch.searchsorted(ordered, input, right=True) + 1).double() / 2
    positives, n = positive.sum(-1), input.shape[-1]
    wins = (rank * positive).sum(-1) - positives * (positives + 1) / 2
    return (wins / (positives * (n - positives))).to(input.dtype)


@measure(
    known=({"inputs": {"input": [0.1, 0.4, 0.35, 0.8], "target": [0, 0, 1, 1]}, "value": 0.8333333333333333},),
    within=(0.0, 1.0),
)
def pr_auc(input: Float[Tensor, "*batch n"], target: Int[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Area under the precision-recall curve as average precision, without interpolation. NaN without positives.

    The mean over positives of the precision among all that score at least as high. Its chance level is the share of
    positives, so compare it on one data set only.

    Args:
        input: scores, higher is more positive.
        target: 1 for positives, 0 for negatives.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> pr_auc(torch.tensor([0.2, 0.3, 0.9]), torch.tensor([0, 1, 0]))
    tensor(0.5000)
    """
    _scored(input, target)
    input, positive, n = input.contiguous(), target > 0, input.shape[-1]
    found = n - torch.searchsorted(input.sort(-1).values, input)
    right = n - torch.searchsorted(input.masked_fill(~positive, -torch.inf).sort(-1).values, input)
    precision = (right.double() / found).masked_fill(~positive, 0.0)
    return (precision.sum(-1) / positive.sum(-1)).to(input.dtype)


def boundary_f1(
    input: Bool[Tensor, "n h w"], target: Bool[Tensor, "n h w"], *, tolerance: float = 2.0
) -> Float[Tensor, "n"]:
    """F1 of the boundaries of masks, a boundary pixel being right if the other boundary is near. Per image, 0 to 1.

    Csurka et al. 2013. Boundaries are the masks' pixels with a neighbour outside, among four; the edge of the image is
    none. One boundary only gives 0, none at all NaN.

    Args:
        input: predicted masks.
        target: true masks, shaped as the predicted ones.
        tolerance: the largest Euclidean distance that is near, in pixels, at least 0; often 0.75% of the diagonal.

    Raises:
        ValueError: shapes or dtypes that do not fit, a tolerance below 0.

    >>> masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    >>> masks[0, :, 2:5, 2:5], masks[1, :, 2:5, 3:6] = True, True
    >>> boundary_f1(*masks, tolerance=1.0), boundary_f1(*masks, tolerance=0.0)  # 4 of the 8 pixels lie on the other
    (tensor([1.]), tensor([0.5000]))
    """
    for name, mask in (("input", input), ("target", target)):
        if mask.dtype is not torch.bool or mask.ndim != 3 or mask.shape != input.shape:
            raise ValueError(f"{name}: expected bool masks (n, h, w), got {mask.dtype} {tuple(mask.shape)}")
    require.number("tolerance", tolerance, at_least=0.0)
    found, true = boundary(input), boundary(target)
    precision = (found & near(true, tolerance)).sum((1, 2)) / found.sum((1, 2))
    recall = (true & near(found, tolerance)).sum((1, 2)) / true.sum((1, 2))
    f1 = 2 * precision * recall / (precision + recall)
    return torch.where((found | true).any(2).any(1), f1.nan_to_num(nan=0.0), torch.nan)


def panoptic_quality(input: Int[Tensor, "n *pixels 2"], target: Int[Tensor, "n *pixels 2"]) -> Float[Tensor, ""]:
    """Mean over categories of sum IoU of the matches / (TP + FP / 2 + FN / 2), over all images. float64, 0 to 1.

    Kirillov et al. 2019. A segment is what shares category and instance in an image; two of one category match where
    their IoU exceeds 1/2. Categories in neither are left out.

    Args:
        input: predicted category and instance of each pixel, from 0; give stuff the instance 0 throughout.
        target: the true ones, shaped as the predicted ones.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> true = torch.tensor([[[0, 0], [0, 0], [1, 1], [1, 1], [1, 2]]])
    >>> found = torch.tensor([[[0, 0], [0, 0], [0, 0], [1, 1], [1, 2]]])
    >>> panoptic_quality(found, true)  # 2/3 and 1 / (1 + 1/2 + 1/2), as half of an object is no match
    tensor(0.5833, dtype=torch.float64)
    """
    require.integers("input", input)
    if input.ndim < 3 or input.shape[-1] != 2:
        raise ValueError(f"input: expected (n, pixels, 2), category and instance, got shape {tuple(input.shape)}")
    require.integers("target", target, shape=tuple(input.shape))
    categories = 1 + int(torch.stack((input, target))[..., 0].max())
    counts = [matched_segments(x, y, categories) for x, y in zip(input.flatten(1, -2), target.flatten(1, -2))]
    summed, right, alarms, misses = torch.stack(counts).sum(0)
    quality: Tensor = summed / (right + (alarms + misses) / 2)
    return quality.nanmean()


@measure(
    known=(
        {
            "inputs": {"input": [[[[0.5, 0.5]]], [[[1.0, 1.0]]]], "target": [[[[0.5, 0.4]]], [[[0.0, 0.0]]]]},
            "value": [23.010299956639813, 0.0],
        },
    ),
    order_free=False,
)
def psnr(
    input: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"], *, data_range: float = 1.0
) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / mean (x - y)^2), in decibels. Per image; inf where equal.

    Args:
        input: images.
        target: images, shaped alike.
        data_range: largest possible value less the smallest, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a data_range not above 0.

    >>> psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2))
    tensor([20.])
    """
    images(input, target)
    require.number("data_range", data_range, above=0.0)
    return -10 * ((input - target).square().mean((1, 2, 3)) / data_range**2).log10()


@measure(
    known=(
        {
            "inputs": {
                "input": [[[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]]],
                "target": [[[[0.25, 0.25, 0.25], [0.25, 0.25, 0.25], [0.25, 0.25, 0.25]]]],
            },
            "hyper": {"window": 3},
            "value": [0.8000639795265515],
        },
    ),
    order_free=False,
    within=(-1.0, 1.0),
)
def ssim(
    input: Float[Tensor, "n c h w"],
    target: Float[Tensor, "n c h w"],
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
) -> Float[Tensor, "n"]:
    """Structural similarity under a Gaussian window, the mean over windows that lie inside the image. Per image.

    Wang et al. 2004, K1 = 0.01 and K2 = 0.03; channels each by themselves. 1 where equal, -1 at the least.
    scikit-image's value with gaussian_weights and without use_sample_covariance; torchmetrics counts windows over a
    padded edge too.

    Args:
        input: images of at least window x window pixels.
        target: images, shaped alike.
        data_range: largest possible value less the smallest, above 0.
        window: side of the window in pixels, odd.
        sigma: of the Gaussian, in pixels, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> ssim(torch.full((1, 1, 11, 11), 0.5), torch.full((1, 1, 11, 11), 0.25))  # (1/4 + 1e-4) / (5/16 + 1e-4)
    tensor([0.8001])
    """
    require.whole("window", window, at_least=1)
    if window % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    images(input, target, window=window)
    require.number("data_range", data_range, above=0.0)
    require.number("sigma", sigma, above=0.0)
    return ssim_map(input, target, gaussian_window(window, sigma, input), data_range).mean((1, 2, 3))


def bleu(
    input: Sequence[Sequence[Hashable]], target: Sequence[Sequence[Sequence[Hashable]]], *, order: int = 4
) -> float:
    """BLEU of a corpus (Papineni et al. 2002), 0 to 1: geometric mean of clipped n-gram precisions, times brevity.

    Counts are summed over the corpus first. Brevity is exp(1 - r / c) where the translations' length c falls short of
    r, that of the references nearest in length, the shorter of two. Without smoothing: 0 where no n-gram of some order
    matches, as is common for single sentences. Scores hang on the tokens; report those of sacreBLEU.

    Args:
        input: the translations' tokens.
        target: for each translation its references' tokens, at least one.
        order: the longest n-gram.

    Raises:
        ValueError: a translation without reference, lists of different lengths.

    >>> bleu(["a b c d e".split()], [["a b c d f".split(), "a b c".split()]])  # (4/5 3/4 2/3 1/2)^(1/4)
    0.6687...
    """
    require.whole("order", order, at_least=1)
    if len(input) != len(target) or not all(target):
        raise ValueError(f"target: expected references for each of {len(input)} translations, got {len(target)} lists")
    hits, totals, length, wanted = [0] * order, [0] * order, 0, 0
    for found, references in zip(input, target):
        length += len(found)
        wanted += min((len(reference) for reference in references), key=lambda n: (abs(n - len(found)), n))
        for n in range(1, order + 1):
            best: Counter[Any] = Counter()
            for reference in references:
                best |= ngrams(reference, n)
            hits[n - 1] += (ngrams(found, n) & best).total()
            totals[n - 1] += max(len(found) - n + 1, 0)
    if not all(hits):
        return 0.0
    precision = math.fsum(math.log(hit / total) for hit, total in zip(hits, totals)) / order
    return math.exp(precision + min(0.0, 1 - wanted / length))


def rouge_l(input: Sequence[Hashable], target: Sequence[Hashable], *, beta: float = 1.0) -> float:
    """ROUGE-L of a summary (Lin 2004), 0 to 1: F-measure of the longest common subsequence, over both lengths.

    (1 + beta^2) P R / (R + beta^2 P), P being the subsequence's share of the summary, R its share of the reference. 0
    where nothing is common.

    Args:
        input: the summary's tokens.
        target: the reference's tokens.
        beta: how many times recall counts as much as precision, above 0.

    Raises:
        ValueError: beta not above 0.

    >>> rouge_l("police kill the gunman".split(), "police killed the gunman".split())
    0.75
    """
    require.number("beta", beta, above=0.0)
    common = common_subsequence(input, target)
    return (1 + beta**2) * common / (len(input) + beta**2 * len(target)) if common else 0.0


def perplexity(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """exp of the mean cross-entropy of tokens: as hesitant as between so many equally likely ones. At least 1.

    Args:
        input: logits.
        target: token numbers.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> perplexity(torch.zeros(3, 5), torch.tensor([0, 2, 4]))
    tensor(5.)
    """
    return (-log_prob(input, target)).mean().exp()


def class_accuracy(input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Share of samples, or pixels, whose largest logit is the true class's.

    Args:
        input: logits.
        target: class numbers.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> class_accuracy(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    require.classes(input, target)
    return (input.argmax(-1) == target).to(input.dtype).mean()


def _scored(input: Tensor, target: Tensor) -> None:
    """Scores with 0/1 targets of the same shape."""
    require.floating("input", input, at_least_dims=1)
    require.integers("target", target, shape=tuple(input.shape))
