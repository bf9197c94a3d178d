"""Centroid deferral: are the predictions that it accepts right, and more of them than at a threshold on confidence?

A network learns digits by 30 people; centroids come from its training images, thresholds from 1000 others. It is
asked about further images by the same people, as they are and under noise, and about those of 13 other people.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from lossary.claims import Arms, Seeds, claim
from lossary.tasks import cross_entropy, fit, optdigits_writers, stacked_mlp
from lossary.uncertainty import CentroidDeferral
from lossary.uncertainty._calibration import area_under_risk_coverage

TRAIN, VALIDATE = 800, 1000

Judged = tuple[CentroidDeferral, NDArray, NDArray]
"""A rejector for one seed, and softmax vectors and labels of test images."""


def _judged(seeds: Seeds, *, noise: float = 0.0, others: bool = False) -> list[Judged]:
    """For each seed test images by the same people, or by others, under Gaussian noise of this standard deviation."""
    data = optdigits_writers()
    home, away = (torch.nonzero(data.group == g).squeeze(1) for g in (0, 1))
    rows = torch.stack([home[torch.randperm(len(home), generator=g)] for g in seeds.torch("people")])
    model = stacked_mlp((64, 64, 10), seeds)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=rows[:, :TRAIN], steps=seeds.few(400))
    test = away.expand(len(seeds), -1) if others else rows[:, TRAIN + VALIDATE :]
    added = torch.stack([noise * torch.randn(test.shape[1], 64, generator=g) for g in seeds.torch("noise")])
    with torch.no_grad():
        usual = model(data.x.expand(len(seeds), -1, -1)).double().softmax(-1).numpy()
        asked = model(data.x[test] + added).double().softmax(-1).numpy()
    y, found = data.y.numpy(), []
    for p, q, own, new in zip(usual, asked, rows.numpy(), test.numpy()):
        train, validate = own[:TRAIN], own[TRAIN : TRAIN + VALIDATE]
        found.append((CentroidDeferral().fit(p[train], y[train]).fit_thresholds(p[validate], y[validate]), q, y[new]))
    return found


def _accepted(judged: list[Judged]) -> NDArray:
    """Percentage of the accepted predictions that are right, per seed; NaN where none is accepted."""
    values = []
    for deferral, p, y in judged:
        taken = deferral.predict(p) >= 0
        values.append(100 * np.mean(p.argmax(1)[taken] == y[taken]) if taken.any() else np.nan)
    return np.array(values)


def _as_many_by_confidence(judged: list[Judged]) -> NDArray:
    """The same for as many predictions as are accepted, those with the largest probabilities."""
    values = []
    for deferral, p, y in judged:
        taken = np.argsort(-p.max(1), kind="stable")[: (deferral.predict(p) >= 0).sum()]
        values.append(100 * np.mean(p.argmax(1)[taken] == y[taken]) if taken.size else np.nan)
    return np.array(values)


def _coverage(judged: list[Judged]) -> float:
    return float(np.mean([(deferral.predict(p) >= 0).mean() for deferral, p, _ in judged]))


@claim(
    says="Under noise, predictions accepted by distance to centroids are right more often than as many confident ones",
    kind="superiority",
    metric="accuracy",
    scale="optdigits 8x8 with noise 0.3 at test only, MLP 64-64-10 on 800 images, 1000 for thresholds; nothing to tune",
)
def centroids_accept_better_than_confidence(seeds: Seeds) -> Arms:
    judged = _judged(seeds, noise=0.3)
    return Arms(_accepted(judged), _as_many_by_confidence(judged), {"coverage": _coverage(judged)})


@claim(
    says="Under noise, accepted predictions are right as often as without it",
    kind="noninferiority",
    metric="accuracy",
    scale="optdigits 8x8 with and without noise 0.3, MLP 64-64-10 on 800 images, 1000 for thresholds; nothing to tune",
)
def accepted_stay_right_under_noise(seeds: Seeds) -> Arms:
    noisy, plain = _judged(seeds, noise=0.3), _judged(seeds)
    coverage = {"noisy": _coverage(noisy), "plain": _coverage(plain)}
    return Arms(_accepted(noisy), _accepted(plain), {"coverage": coverage})


@claim(
    says="For other writers, accepted predictions are right as often as for those of training",
    kind="noninferiority",
    metric="accuracy",
    scale="optdigits 8x8, 30 writers against 13 others, MLP 64-64-10 on 800 images, 1000 for thresholds; no tuning",
)
def accepted_stay_right_for_other_writers(seeds: Seeds) -> Arms:
    others, same = _judged(seeds, others=True), _judged(seeds)
    return Arms(
        _accepted(others), _accepted(same), {"coverage": {"others": _coverage(others), "same": _coverage(same)}}
    )


@claim(
    says="Deferring by distance to centroids leaves a lower risk over all coverages than by the largest probability",
    kind="superiority",
    metric="risk",
    scale="area under the risk-coverage curve, optdigits 8x8 with noise 0.3, MLP 64-64-10 on 800 images; no tuning",
)
def distance_ranks_better_than_confidence(seeds: Seeds) -> Arms:
    pairs = [
        [area_under_risk_coverage(s, p.argmax(1) == y) for s in (-deferral.anomaly_score(p), p.max(1))]
        for deferral, p, y in _judged(seeds, noise=0.3)
    ]
    return Arms(*np.array(pairs).T)


@claim(
    says="With two classes the distance is sqrt(2) times that of the largest probability to its class's mean",
    kind="exact",
    metric="deviation",
    scale="1000 random softmax vectors of two classes, fitted on 1000 others",
    tolerance=1e-12,
)
def two_classes_compare_probabilities(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("logits"):
        p, new = softmax(3 * rng.standard_normal((2, 1000, 2)), axis=-1)
        y = (p[:, 1] > rng.random(1000)).astype(int)
        right = p.argmax(1) == y
        usual = np.array([p[right & (y == c)].max(1).mean() for c in (0, 1)])
        distance = CentroidDeferral().fit(p, y).anomaly_score(new)
        deviations.append(distance - np.sqrt(2) * np.abs(new.max(1) - usual[new.argmax(1)]))
    return Arms(np.array(deviations))
