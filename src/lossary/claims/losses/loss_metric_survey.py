"""The survey's list: is each entry what it says, and does its advice on outliers, rare classes and boxes hold?"""

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import loss_registry, metric_registry, sigmoid_focal_loss
from lossary.tasks import diabetes, fit, mean_average_precision, split, stacked_mlp, winequality_red

# --- each loss at a perfect prediction ------------------------------------------------------------------------


def _perfect(g: Generator) -> dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any], Any]]:
    """For each loss: a perfect first argument, another one, the further arguments, keywords, and the known minimum."""
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    n, k, zero = 6, 5, torch.zeros(6, dtype=torch.float64)
    real, y, labels = draw(n), torch.randint(k, (n,), generator=g), (draw(n, k) > 0).double()
    onehot, sure = F.one_hot(y, k).double(), 200 * (2 * labels - 1)
    q, smooth = draw(n, k).softmax(-1), 0.9 * onehot + 0.1 / k
    counts = torch.randint(1, 9, (n,), generator=g).double()
    low, size, low_2, size_2 = draw(n, 2), draw(n, 2).exp(), draw(n, 2), draw(n, 2).exp()
    box, other_box = torch.cat((low, low + size), 1), torch.cat((low_2, low_2 + size_2), 1)
    pixels = torch.randint(k, (3, n), generator=g)
    centers, same = draw(k, 4), torch.tensor([True, False] * 3)
    features, depth, image = draw(n, 4), draw(n, 9).exp(), draw(2, 3, 8, 8).sigmoid()
    far = torch.where(same.unsqueeze(1), features, features + 5)
    square = torch.tensor([[a, b, c] for a, b, c in product((1.0, -1.0), repeat=3)], dtype=torch.float64)
    path = torch.stack([1 + torch.randperm(k - 1, generator=g) for _ in range(n)])
    emitted = 200 * F.one_hot(path.T, k).double()
    lengths = torch.full((n,), k - 1)
    cases: dict[str, Any] = {
        "poisson_nll": (counts.log(), real, (counts,), {}, counts - counts * counts.log()),
        "weighted_bce": (sure, draw(n, k), (labels,), {"pos_weight": torch.tensor(3.0)}, zero),
        "soft_cross_entropy": (q.log(), draw(n, k), (q,), {}, -(q * q.log()).sum(1)),
        "label_smoothing": (smooth.log(), draw(n, k), (y,), {}, -(smooth * smooth.log()).sum(1)),
        "lovasz_softmax": (200 * F.one_hot(pixels, k).double(), draw(3, n, k), (pixels,), {}, zero[:3]),
        "center": (centers[y], features, (y,), {"centers": centers}, zero),
        "contrastive": (far, draw(n, 4), (features,), {"same": same}, zero),
        "triplet": (features, draw(n, 4), (features, features + 5), {}, zero),
        "circle": (onehot, draw(n, k), (y,), {}, zero),
        "barlow_twins": (square, draw(8, 3), (square,), {}, torch.zeros(8, dtype=torch.float64)),
        "simsiam": (2 * features, draw(n, 4), (features,), {}, zero - 1),
        "scale_invariant_log": (depth, draw(n, 9).exp(), (depth,), {}, zero),
        "photometric": (image, draw(2, 3, 8, 8).sigmoid(), (image,), {}, zero[:2]),
        "smoothness": (torch.ones_like(image[:, :1]), draw(2, 1, 8, 8), (image,), {}, zero[:2]),
        "gaussian_kl": (0 * features, features, (0 * features,), {}, zero),
        "negative_elbo": (sure, draw(n, k), (labels,), {"mean": 0 * features, "log_variance": 0 * features}, zero),
        "adversarial": (sure[:, 0], real, (labels[:, 0],), {}, zero),
        "gradient_penalty": (
            lambda x: x.sum(1) / math.sqrt(4),
            lambda x: x.square().sum(1),
            (features, draw(n, 4)),
            {"generator": g},
            zero,
        ),
        "ctc": (emitted.log_softmax(-1), draw(k - 1, n, k).log_softmax(-1), (path, lengths, lengths), {}, zero),
    }
    for name in ("mse", "mae", "huber", "log_cosh", "quantile"):
        cases[name] = (real, draw(n), (real,), {}, zero)
    for name in ("bce", "focal", "hinge", "dice", "tversky", "lovasz_hinge"):
        cases[name] = (sure, draw(n, k), (labels,), {}, zero)
    for name in ("cross_entropy", "softmax_focal", "poly1", "multiclass_hinge", "token_cross_entropy"):
        cases[name] = (200 * onehot, draw(n, k), (y,), {}, zero)
    for name in ("smooth_l1", "iou", "giou", "diou", "ciou"):
        cases[name] = (box, other_box, (box,), {}, zero)
    for name in ("a_softmax", "cosface", "arcface"):
        cases[name] = (2 * onehot - 1, draw(n, k).tanh(), (y,), {}, zero)
    return cases


@claim(
    says="Every loss of the registry gives one value per sample, in its range, and is at its known minimum at a perfect"
    " prediction",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="43 losses, random targets, a perfect prediction and a random one, float64",
)
def every_loss_is_least_at_a_perfect_prediction(seeds: Seeds) -> Arms:
    worst = {}
    for g in seeds.torch("cases"):
        cases = _perfect(g)
        for name, entry in loss_registry().items():
            perfect, other, rest, hyper, minimum = cases[name]
            at_best, elsewhere = (entry.call(first, *rest, **hyper) for first in (perfect, other))
            if at_best.shape != minimum.shape:
                raise AssertionError(f"{name}: expected {tuple(minimum.shape)} values, got {tuple(at_best.shape)}")
            if name == "barlow_twins":  # shares of one loss: their mean has a minimum, they have not
                at_best, elsewhere, minimum = at_best.mean(), elsewhere.mean(), minimum.mean()
            below = (minimum - elsewhere).clamp(min=0)
            outside = torch.cat((entry.range[0] - elsewhere.view(-1), elsewhere.view(-1) - entry.range[1])).clamp(min=0)
            found = torch.cat(((at_best - minimum).abs().view(-1), below.view(-1), outside)).max().item()
            worst[name] = max(found, worst.get(name, 0.0))
    return Arms(np.array(list(worst.values())), None, {"worst": max(worst, key=lambda name: worst[name])})


# --- each metric against a peer -------------------------------------------------------------------------------


def _references(rng: np.random.Generator) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """For each metric: arguments, keywords, and what scikit-learn, torchmetrics, scipy or a slow loop make of them."""
    from sklearn import metrics as sk
    from torchmetrics import functional as tm
    from torchmetrics.functional.detection import panoptic_quality
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.functional.text import bleu_score, perplexity

    x, y = rng.normal(size=(2, 40))
    y[:5] = x[:5]
    score, target = rng.integers(0, 12, 60) / 12, rng.integers(0, 2, 60)
    hit = score > 0.5
    tn, fp, fn, tp = sk.confusion_matrix(target, hit).ravel()
    real, scored = (torch.from_numpy(x), torch.from_numpy(y)), (torch.from_numpy(score), torch.from_numpy(target))
    logits, tokens = torch.from_numpy(rng.normal(size=(50, 7))), torch.from_numpy(rng.integers(0, 7, 50))
    low, size = rng.normal(size=(2, 2, 9, 2))
    boxes = tuple(torch.from_numpy(np.concatenate((a, a + np.exp(b)), 1)) for a, b in zip(low, size))
    masks = _blobs(rng)
    segments = tuple(torch.from_numpy(_segments(rng)) for _ in range(2))
    picture = torch.from_numpy(rng.random((2, 3, 20, 24)))
    noisy = (picture + torch.from_numpy(rng.normal(scale=0.1, size=picture.shape))).clamp(0, 1)
    _, windows = structural_similarity_index_measure(noisy, picture, data_range=1.0, return_full_image=True)
    found, true = rng.integers(0, 4, (2, 5, 12)).tolist()
    true = [[a, b[:9]] for a, b in zip(true, reversed(true))]
    texts = [" ".join(map(str, line)) for line in found], [[" ".join(map(str, r)) for r in rs] for rs in true]
    common = _subsequence(tuple(found[0]), tuple(true[0][0]))
    return {
        "mse": (real, {}, sk.mean_squared_error(y, x)),
        "mae": (real, {}, sk.mean_absolute_error(y, x)),
        "rmse": (real, {}, sk.root_mean_squared_error(y, x)),
        "mape": (real, {}, sk.mean_absolute_percentage_error(y, x)),
        "smape": (real, {}, tm.symmetric_mean_absolute_percentage_error(*real)),
        "r2": (real, {}, sk.r2_score(y, x)),
        "adjusted_r2": (real, {"predictors": 3}, tm.r2_score(*real, adjusted=3)),
        "accuracy": ((logits, tokens), {}, sk.accuracy_score(tokens, logits.argmax(1))),
        "precision": (scored, {}, sk.precision_score(target, hit)),
        "recall": (scored, {}, sk.recall_score(target, hit)),
        "f1": (scored, {}, sk.f1_score(target, hit)),
        "fpr": (scored, {}, fp / (fp + tn)),
        "npv": (scored, {}, tn / (tn + fn)),
        "fdr": (scored, {}, fp / (fp + tp)),
        "roc_auc": (scored, {}, sk.roc_auc_score(target, score)),
        "pr_auc": (scored, {}, sk.average_precision_score(target, score)),
        "box_iou": (boxes, {}, [_box_iou(a.tolist(), b.tolist()) for a, b in zip(*boxes)]),
        "pixel_accuracy": ((logits, tokens), {}, sk.accuracy_score(tokens, logits.argmax(1))),
        "iou": (scored, {}, sk.jaccard_score(target, hit)),
        "dice": (scored, {}, sk.f1_score(target, hit)),
        "boundary_f1": (masks, {}, [_boundary_f1(a, b) for a, b in zip(*(m.numpy() for m in masks))]),
        "panoptic_quality": (segments, {}, panoptic_quality(*segments, things={1, 2}, stuffs={0})),
        "psnr": (
            (noisy, picture),
            {},
            [-10 * math.log10(sk.mean_squared_error(b.ravel(), a.ravel())) for a, b in zip(noisy, picture)],
        ),
        "ssim": ((noisy, picture), {}, windows[..., 5:-5, 5:-5].mean((1, 2, 3))),  # without those over the edge
        "bleu": ((found, true), {"order": 2}, bleu_score(*texts, n_gram=2)),
        "rouge_l": ((found[0], true[0][0]), {}, 2 * common / (len(found[0]) + len(true[0][0]))),
        "perplexity": ((logits, tokens), {}, perplexity(logits[None], tokens[None])),
    }


def _blobs(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two batches of masks (3, 24, 24) with smooth outlines that cross now and then, some over the edge."""
    from scipy.ndimage import gaussian_filter

    smooth = partial(gaussian_filter, sigma=(0, 3, 3))
    field, change = smooth(rng.normal(size=(3, 24, 24))), smooth(rng.normal(size=(3, 24, 24)))
    return torch.from_numpy(field > 0), torch.from_numpy(field + change / 2 > 0)


def _boundary_f1(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.ndimage import binary_erosion, distance_transform_edt

    edges = [m & ~binary_erosion(m, border_value=1) for m in (a, b)]
    near = [distance_transform_edt(~edge) <= 2 for edge in edges]
    precision, recall = near[1][edges[0]].mean(), near[0][edges[1]].mean()
    return float(2 * precision * recall / (precision + recall))


def _segments(rng: np.random.Generator) -> np.ndarray:
    """(2, 64, 2): category 0 to 2 and instance of pixels in runs of two to sixteen."""
    runs = np.repeat(rng.permutation(8), 8).reshape(-1, 1)
    segments = np.concatenate((runs % 3, np.where(runs % 3 > 0, runs, 0)), 1)
    shifts = rng.integers(0, 4, 2)
    return np.stack([np.roll(np.sort(segments, 0), shift, 0) for shift in shifts])


def _box_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def _subsequence(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest subsequence of a that b contains, by trying all."""
    best = 0
    for chosen in product((False, True), repeat=len(a)):
        rest = iter(b)
        kept = [token for token, keep in zip(a, chosen) if keep]
        if len(kept) > best and all(token in rest for token in kept):
            best = len(kept)
    return best


@claim(
    says="Every metric of the registry agrees with scikit-learn, torchmetrics, scipy or a slow loop",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="27 metrics on random predictions, float64",
)
def every_metric_agrees_with_its_reference(seeds: Seeds) -> Arms:
    worst: dict[str, float] = {}
    for rng in seeds.numpy("metrics"):
        references = _references(rng)
        for name, entry in metric_registry().items():
            inputs, hyper, expected = references[name]
            got = np.asarray(entry.call(*inputs, **hyper), dtype=np.float64)
            gap = np.abs(got - np.asarray(expected, dtype=np.float64)).max()
            worst[name] = max(float(gap), worst.get(name, 0.0))
    return Arms(np.array(list(worst.values())), None, {"worst": max(worst, key=lambda name: worst[name])})


# --- advice ---------------------------------------------------------------------------------------------------


def _outlier_error(seeds: Seeds, *, loss: str, lr: float, decay: float = 0.0, **hyper: float) -> Tensor:
    """Mean absolute error on clean test rows, per seed, in the target's standard deviations; 10% bad targets."""
    data, model = diabetes(), stacked_mlp((10, 32, 1), seeds)
    parts, y = split(data, seeds), data.y
    bad = [
        torch.where(torch.rand(len(y), generator=g) < 0.1, 10 * torch.randn(len(y), generator=g), y)
        for g in seeds.torch("outliers")
    ]
    call = partial(loss_registry()[loss].call, **hyper)
    fit(
        model,
        data.x,
        torch.stack(bad),
        loss=lambda z, t: call(z.squeeze(-1), t),
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(300),
        lr=lr,
        weight_decay=decay,
    )
    with torch.no_grad():
        return (model(data.x[parts.test]).squeeze(-1) - y[parts.test]).abs().mean(1)


HUBER = [{"loss": "huber", "delta": delta, "lr": lr} for delta in (0.3, 1.0) for lr in (0.03, 0.1)]


def _robust(baseline: list[dict[str, Any]], seeds: Seeds) -> Arms:
    settings = [tune(_outlier_error, grid, seeds, better="lower") for grid in (HUBER, baseline)]
    errors = [_outlier_error(seeds, **setting) for setting in settings]
    return Arms(*errors, {"method": settings[0], "baseline": settings[1]})


@claim(
    says="With a tenth of the targets gone wild, the Huber loss leaves at most 0.9 of the squared loss's error",
    kind="ratio",
    metric="mean absolute error",
    margin=0.9,
    scale="diabetes, 10% of training targets drawn from 10 N(0, 1), MLP 10-32-1, 300 steps of 64; 4 settings each",
)
def huber_beats_squared_error_with_outliers(seeds: Seeds) -> Arms:
    return _robust([{"loss": "mse", "decay": decay, "lr": lr} for decay in (0.0, 0.03) for lr in (0.003, 0.01)], seeds)


@claim(
    says="With a tenth of the targets gone wild, the Huber loss leaves at most 1.02 times the absolute loss's error",
    kind="ratio",
    metric="mean absolute error",
    margin=1.02,
    scale="diabetes, 10% of training targets drawn from 10 N(0, 1), MLP 10-32-1, 300 steps of 64; 4 settings each",
)
def huber_is_no_worse_than_absolute_error_with_outliers(seeds: Seeds) -> Arms:
    return _robust([{"loss": "mae", "lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)], seeds)


def _rare_precision(seeds: Seeds, *, gamma: float, lr: float, decay: float = 0.0) -> Tensor:
    """Average precision of the good wines in percent, per seed; gamma 0 is binary cross-entropy."""
    data, model = winequality_red(), stacked_mlp((11, 32, 1), seeds)
    parts, y = split(data, seeds, test=0.5), (data.y >= 4).float().unsqueeze(-1)
    loss = partial(sigmoid_focal_loss, alpha=0.5, gamma=gamma)
    fit(
        model,
        data.x,
        y,
        loss=lambda z, t: 2 * loss(z, t),
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(400),
        lr=lr,
        weight_decay=decay,
    )
    with torch.no_grad():
        return mean_average_precision(model(data.x[parts.test]), y[parts.test])


@claim(
    says="The focal loss ranks a rare class better than binary cross-entropy",
    kind="superiority",
    metric="average precision",
    scale="red wines of quality 7 or 8 (14%), 800 for training, MLP 11-32-1, 400 steps of 64; 4 settings each",
)
def focal_beats_cross_entropy_on_a_rare_class(seeds: Seeds) -> Arms:
    focal = tune(_rare_precision, [{"gamma": gamma, "lr": lr} for gamma in (1.0, 2.0) for lr in (0.1, 0.3)], seeds)
    grid = [{"gamma": 0.0, "decay": decay, "lr": lr} for decay in (0.0, 0.003) for lr in (0.1, 0.3)]
    plain = tune(_rare_precision, grid, seeds)
    return Arms(_rare_precision(seeds, **focal), _rare_precision(seeds, **plain), {"method": focal, "baseline": plain})


def _moved_boxes(seeds: Seeds, *, loss: str, lr: float) -> Tensor:
    """Mean 1 - IoU, per seed, of 500 boxes after 100 gradient steps towards targets that mostly lie elsewhere."""
    call, n = loss_registry()[loss].call, seeds.few(500, smoke=20)
    centre, sides = (
        torch.stack([draw(2, n, 2, generator=g) for g in seeds.torch(name)])
        for draw, name in ((torch.rand, "centres"), (torch.randn, "sides"))
    )
    half = (0.5 * sides).exp() / 10
    start, target = torch.cat((centre - half, centre + half), -1).unbind(1)
    box = start.clone().requires_grad_()
    for step in range(seeds.few(100)):
        (slope,) = torch.autograd.grad(call(box, target).sum(), box)
        box = (box - lr * (1 - step / 100) * slope).detach().requires_grad_()
    return loss_registry()["iou"].call(box, target).detach().mean(1)


@claim(
    says="Boxes moved by the gradient of the DIoU loss end with at most 0.8 of the 1 - IoU of those moved by GIoU's",
    kind="ratio",
    metric="relative error",
    margin=0.8,
    scale="500 pairs of boxes, centres in the unit square, sides near 0.2, 100 gradient steps at a falling rate;"
    " 4 rates each",
)
def diou_moves_boxes_closer_than_giou(seeds: Seeds) -> Arms:
    rates = (0.003, 0.01, 0.03, 0.1)
    settings = [
        tune(_moved_boxes, [{"loss": name, "lr": lr} for lr in rates], seeds, better="lower")
        for name in ("diou", "giou")
    ]
    ends = [_moved_boxes(seeds, **setting) for setting in settings]
    return Arms(*ends, {"method": settings[0], "baseline": settings[1]})
