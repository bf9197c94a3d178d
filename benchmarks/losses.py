"""Forward and backward on logits [8192, 1000] in single precision, one thread, against the usual loss of torch.

That is F.cross_entropy for one class of 1000, and F.binary_cross_entropy_with_logits for 1000 labels of which a
twentieth is there, both without reduction. A time is CPU time; each turn of a loss follows one of the reference, and
the ratio is the median over turns. Memory is what a turn raises the peak of a fresh process by, over the same for the
reference. The top-k form waits for `torch.topk`, which alone takes as long as the reference. ALDR-KL without a table of
lambdas takes four more softmaxes, one for a Newton step; it is shown without a target. The sigmoid losses need a
sigmoid and a logarithm for every entry, as the reference does, and some twenty cheap operations besides, on blocks that
stay in the cache; the distribution-balanced one takes a second sigmoid, for its weights. The Dice loss of a batch goes
over all probabilities four times, since sums over the batch come before values, and others before slopes.

Then what timm, kornia, MONAI and pytorch-metric-learning have too, by their code on the same numbers: how many times as
long it takes. `make bench` installs them.

python -m benchmarks.losses
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._peers import part_of
from lossary.losses import (
    ALDRKLLoss,
    aldr_kl_loss,
    asymmetric_loss,
    asymmetric_loss_single_label,
    batch_dice_loss,
    circle_loss,
    comp_sum_loss,
    ldr_kl_loss,
    ldr_top_k_loss,
    multilabel_dice_loss,
    poly1_cross_entropy,
    poly1_focal_loss,
    pu_multilabel_loss,
    sample_dice_loss,
    sigmoid_focal_loss,
    squentropy_loss,
)
from lossary.weighting import ErrorNormTruncationLoss, class_balanced_loss, distribution_balanced_loss

ROWS, CLASSES, TURNS = 8192, 1000, 15
Contest = tuple[str, str, Callable[..., Tensor], Callable[..., Tensor]]
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "classes": partial(F.cross_entropy, reduction="none"),
    "labels": partial(F.binary_cross_entropy_with_logits, reduction="none"),
}
TABLE = ALDRKLLoss(ROWS)
COUNTS = torch.linspace(2000, 20, CLASSES)
# Functions of log p_y cost less than cross-entropy; what needs more passes over the logits, little more.
LOSSES: dict[str, tuple[Callable[..., Tensor], float | None, str]] = {
    "poly1_cross_entropy": (poly1_cross_entropy, 0.9, "classes"),
    "poly1_focal_loss": (poly1_focal_loss, 0.9, "classes"),
    "comp_sum_loss": (comp_sum_loss, 0.9, "classes"),
    "class_balanced_loss": (partial(class_balanced_loss, class_counts=COUNTS), 1.5, "classes"),
    "ErrorNormTruncationLoss": (ErrorNormTruncationLoss(), 1.5, "classes"),
    "squentropy_loss": (squentropy_loss, 1.5, "classes"),
    "sample_dice_loss": (sample_dice_loss, 1.5, "classes"),
    "batch_dice_loss": (batch_dice_loss, 1.5, "classes"),
    "asymmetric_loss_single_label": (asymmetric_loss_single_label, 1.5, "classes"),
    "ldr_kl_loss": (ldr_kl_loss, 1.5, "classes"),
    "ldr_top_k_loss, k = 5": (partial(ldr_top_k_loss, k=5), 1.5, "classes"),
    "ALDRKLLoss": (lambda input, target: TABLE(input, target, index=torch.arange(len(target))), 1.5, "classes"),
    "aldr_kl_loss": (aldr_kl_loss, None, "classes"),
    "asymmetric_loss": (asymmetric_loss, 1.2, "labels"),
    "multilabel_dice_loss": (multilabel_dice_loss, 1.2, "labels"),
    "pu_multilabel_loss": (pu_multilabel_loss, 1.2, "labels"),
    "distribution_balanced_loss": (
        partial(distribution_balanced_loss, class_counts=COUNTS, num_samples=40_000),
        1.2,
        "labels",
    ),
}


def measure() -> list[dict[str, str | float | None]]:
    """A row for the time and one for the memory of every loss, and one for every peer."""
    peers = contests()  # first, so that one that is missing is told before any time is spent
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = {family: _data(family) for family in REFERENCES}
    ratios: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(TURNS + 1):
        for name, (loss, _, family) in LOSSES.items():
            reference = _seconds(REFERENCES[family], *data[family])
            ratios[name].append(_seconds(loss, *data[family]) / reference)
    torch.set_num_threads(threads)
    peaks = {family: _peak(family) for family in REFERENCES}
    rows: list[dict[str, str | float | None]] = []
    for name, (_, most, family) in LOSSES.items():
        turns = ratios[name][1:]  # the first turn warms up
        rows += [
            {"name": name, "ratio": statistics.median(turns), "target": most and f"<= {most}", "unit": "x its time"},
            {"name": name, "ratio": _peak(name) / peaks[family], "target": "<= 1", "unit": "x its peak memory"},
        ]
    return rows + against(peers)


def against(peers: list[Contest]) -> list[dict[str, str | float | None]]:
    """How many times as long each peer takes as our own loss with the same sum, medians over turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, str | float | None]] = []
    for name, family, ours, peer in peers:
        data = _data(family)
        torch.testing.assert_close(ours(*data).sum(), peer(*data).sum(), rtol=1e-4, atol=0.0)
        ratios = [_seconds(peer, *data) / _seconds(ours, *data) for _ in range(TURNS // 2 + 1)]
        rows.append({"name": name, "ratio": statistics.median(ratios[1:]), "target": ">= 1", "unit": "times faster"})
    torch.set_num_threads(threads)
    return rows


def contests() -> list[Contest]:
    """Name, kind of data, our loss and the peer's, with the same settings."""
    timm = part_of("timm", "timm.loss")
    kornia = importlib.import_module("kornia.losses")
    monai = importlib.import_module("monai.losses")
    metric = importlib.import_module("pytorch_metric_learning.losses")
    focal = partial(poly1_focal_loss, gamma=2.0, epsilon=0.0)
    binary = partial(sigmoid_focal_loss, alpha=0.25, gamma=2.0)
    asymmetric = {"gamma_neg": 4.0, "gamma_pos": 1.0}
    circle: Any = metric.CircleLoss(m=0.25, gamma=256.0)
    softmax: Any = monai.FocalLoss(gamma=2.0, use_softmax=True, to_onehot_y=True, reduction="none")
    sigmoid: Any = monai.FocalLoss(gamma=2.0, alpha=0.25, reduction="none")
    several: Any = timm.AsymmetricLossMultiLabel(**asymmetric, clip=0.05, reduction="sum")
    single: Any = timm.AsymmetricLossSingleLabel(**asymmetric, eps=0.1, reduction="none")
    return [
        ("asymmetric_loss, against timm", "labels", partial(asymmetric_loss, **asymmetric), several),
        (
            "asymmetric_loss_single_label, against timm",
            "classes",
            partial(asymmetric_loss_single_label, **asymmetric, label_smoothing=0.1),
            single,
        ),
        (
            "poly1_focal_loss, epsilon 0, against kornia",
            "classes",
            focal,
            lambda z, y: kornia.focal_loss(z, y, alpha=None, gamma=2.0),
        ),
        ("poly1_focal_loss, epsilon 0, against MONAI", "classes", focal, lambda z, y: softmax(z, y.unsqueeze(1))),
        (
            "sigmoid_focal_loss, against kornia",
            "labels",
            binary,
            lambda z, y: kornia.binary_focal_loss_with_logits(z, y, alpha=0.25, gamma=2.0),
        ),
        ("sigmoid_focal_loss, against MONAI", "labels", binary, sigmoid),
        (
            "circle_loss, against pytorch-metric-learning",
            "embeddings",
            circle_loss,
            lambda z, y: circle(z, y) * len(y),
        ),
    ]


def _data(family: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "embeddings":
        input = torch.randn(1024, 128, generator=generator)
        return input.requires_grad_(), torch.randint(64, (1024,), generator=generator)
    input = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    if family == "classes":
        target = torch.randint(CLASSES, (ROWS,), generator=generator)
    else:
        target = (torch.rand(ROWS, CLASSES, generator=generator) < 0.05).float()
    return input.requires_grad_(), target


def _turn(loss: Callable[..., Tensor], input: Tensor, target: Tensor) -> None:
    input.grad = None
    loss(input, target).sum().backward()


def _seconds(loss: Callable[..., Tensor], input: Tensor, target: Tensor) -> float:
    start = time.process_time()
    _turn(loss, input, target)
    return time.process_time() - start


def _peak(name: str) -> float:
    """Megabytes by which the peak of a fresh process rises, measured there by `_print_peak`."""
    command = [sys.executable, "-m", "benchmarks.losses", name]
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # so that glibc gives back at once what is freed
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=returned).stdout)


def _print_peak(name: str) -> None:
    torch.set_num_threads(1)
    loss, _, family = (REFERENCES[name], None, name) if name in REFERENCES else LOSSES[name]
    input, target = _data(family)
    _turn(loss, input[:16].detach().requires_grad_(), target[:16])  # what is loaded late is loaded now
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # Linux: the peak starts again at what is in use
    before = _peak_resident()
    _turn(loss, input, target)
    print(_peak_resident() - before)


def _peak_resident() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    if sys.argv[1:]:
        _print_peak(sys.argv[1])
    else:
        for row in measure():
            print(f"{row['name']}: {row['ratio']:.2f} {row['unit']} (target {row['target'] or 'none'})")
