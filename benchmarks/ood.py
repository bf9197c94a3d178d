"""Scores of 10,000 rows of 512 features for 10 classes, on one thread.

Mahalanobis distances, whitened once, against a loop over classes; each detector against a bare matrix product of the
size that whitening needs, which is the floor; and everything that pytorch-ood has too against pytorch-ood, on the same
rows. It fits in single precision, we in double: where some variances are thousands of times as large as others, its ViM
scores are off by more than a tenth of the largest. `make bench` installs pytorch-ood.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._peers import part_of
from benchmarks._timing import seconds
from lossary.ood import NECO, ConjNormDetector, MahalanobisDetector, WDiscOOD, class_conditional_gaussian
from lossary.ood._baselines import VirtualLogit, energy, max_logit, max_softmax, neighbour_distance

ROWS, FEATURES, CLASSES, ROUNDS = 10_000, 512, 10, 9
PRINCIPAL, NEIGHBOURS, ASKED = 256, 50, 2000  # dimensions of ViM; of ASKED rows the distance to the 50th neighbour


def class_by_class(x: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """What one writes by hand: a product with the precision matrix for every class."""
    residuals = (x - mean for mean in means)
    return torch.stack([((r @ precision) * r).sum(1) for r in residuals]).amin(0)


def contests(x: Tensor, labels: Tensor) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, what pytorch-ood does, and what we do, on the same input; scores that are the same are compared first."""
    peer = part_of("pytorch_ood", "pytorch_ood.detector")
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(CLASSES, FEATURES, generator=generator) / FEATURES**0.5
    bias = torch.randn(CLASSES, generator=generator)
    logits = torch.nn.functional.linear(x, weight, bias)
    asked = x[:ASKED] + 0.5

    vim, mahalanobis, neighbours = peer.ViM(None, PRINCIPAL, weight, bias), peer.Mahalanobis(None), peer.KNN(None)
    for detector in (vim, mahalanobis, neighbours):
        detector.fit_features(x, labels)
    virtual = VirtualLogit.of(x, weight, bias, dimension=PRINCIPAL)
    ours = MahalanobisDetector().fit(x, labels)
    same = [
        (peer.MaxSoftmax.score(logits), max_softmax(logits)),
        (peer.MaxLogit.score(logits), max_logit(logits)),
        (peer.EnergyBased.score(logits), energy(logits)),
        (2 * ROWS * mahalanobis.predict_features(x), ours.anomaly_score(x)),
        (neighbours.predict_features(asked), neighbour_distance(asked, x, k=NEIGHBOURS).double()),
    ]
    for theirs, found in same:
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)
    return [
        ("largest softmax", lambda: peer.MaxSoftmax.score(logits), lambda: max_softmax(logits)),
        ("largest logit", lambda: peer.MaxLogit.score(logits), lambda: max_logit(logits)),
        ("energy", lambda: peer.EnergyBased.score(logits), lambda: energy(logits)),
        ("scores by ViM", lambda: vim.predict_features(x), lambda: virtual.anomaly_score(x)),
        (
            "fit of ViM",
            lambda: vim.fit_features(x, labels),
            lambda: VirtualLogit.of(x, weight, bias, dimension=PRINCIPAL),
        ),
        ("scores by Mahalanobis", lambda: mahalanobis.predict_features(x), lambda: ours.anomaly_score(x)),
        (
            "fit of Mahalanobis",
            lambda: mahalanobis.fit_features(x, labels),
            lambda: MahalanobisDetector().fit(x, labels),
        ),
        (
            "fit and scores by Mahalanobis",
            lambda: mahalanobis.fit_features(x, labels).predict_features(x),
            lambda: MahalanobisDetector().fit(x, labels).anomaly_score(x),
        ),
        (
            "distance to the 50th neighbour",
            lambda: neighbours.predict_features(asked),
            lambda: neighbour_distance(asked, x, k=NEIGHBOURS),
        ),
    ]


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds), target and unit of each comparison."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    labels = torch.arange(ROWS) % CLASSES
    detector = MahalanobisDetector().fit(x, labels)
    means, covariance = class_conditional_gaussian(x, labels)
    precision = torch.linalg.inv(covariance)
    torch.testing.assert_close(detector.anomaly_score(x), class_by_class(x, means, precision), rtol=1e-3, atol=0.0)

    loop, floor = [], []
    for _ in range(ROUNDS + 1):  # they take turns, so that a busy machine slows all
        ours = seconds(lambda: detector.anomaly_score(x))
        loop.append(seconds(lambda: class_by_class(x, means, precision)) / ours)
        floor.append(ours / seconds(lambda: x @ precision))
    others = {
        "NECO": NECO(components=100),
        "WDiscOOD": WDiscOOD(),
        "ConjNorm at p = 2": ConjNormDetector(p=2.0),
        "ConjNorm at p = 2.2": ConjNormDetector(p=2.2),
    }
    beside = []
    for name, other in others.items():
        other.fit(x, labels)
        times = [seconds(lambda d=other: d.anomaly_score(x)) / seconds(lambda: x @ precision) for _ in range(ROUNDS)]
        row = {"name": f"scores by {name}, against one bare product", "ratio": statistics.median(times[1:])}
        beside.append({**row, "target": None, "unit": "times its time"})
    for name, theirs, own in contests(x, labels):
        ratios = [seconds(theirs) / seconds(own) for _ in range(ROUNDS)]
        row = {"name": f"{name}, against pytorch-ood", "ratio": statistics.median(ratios[1:])}
        beside.append({**row, "target": ">= 1", "unit": "times faster"})
    torch.set_num_threads(threads)
    return [
        {
            "name": "scores of ten classes, against one product a class",
            "ratio": statistics.median(loop[1:]),  # the first round warms up
            "target": ">= 8",
            "unit": "times faster",
        },
        {
            "name": "scores of ten classes, against one bare product",
            "ratio": statistics.median(floor[1:]),
            "target": "<= 2",
            "unit": "times its time",
        },
        *beside,
    ]
