"""Mahalanobis detector: does distance to the classes tell strange inputs better than confidence does?

A network learns digits 0 to 7. Strange are digits whose pixels have been shuffled, far off the data, or the digits
8 and 9, close to it. All detectors of a seed look at the same trained network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import MahalanobisClassifier, MahalanobisDetector
from lossary.tasks import auroc, cross_entropy, digits, fit, gaussian_blobs, split, stacked_mlp

KNOWN = 8  # digits 0 to 7

Detect = Callable[[nn.Sequential, Tensor, Tensor, Tensor], Tensor]
"""detect(network, training images, their labels, images to rate) -> anomaly scores."""


def _networks(seeds: Seeds) -> tuple[list[nn.Sequential], Tensor, Tensor]:
    """A network for each seed that knows the digits 0 to 7, and its training and test rows, all digits."""
    data, parts = digits(), split(digits(), seeds)
    model = stacked_mlp((64, 64, 64, KNOWN), seeds)
    known = _of_class(data.y, parts.train, lambda y: y < KNOWN)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=known, steps=seeds.few(600), lr=0.05)
    return [model.replica(s).eval() for s in range(len(seeds))], parts.train, parts.test


def _of_class(y: Tensor, rows: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows (S, m) of the wanted classes; splits are stratified, so every seed has as many."""
    return rows[wanted(y[rows])].view(len(rows), -1)


def _auroc(seeds: Seeds, detect: Detect, *, far: bool) -> Tensor:
    """How well a detector tells strange test images from ordinary ones, in percent, per seed."""
    data, (networks, train, test) = digits(), _networks(seeds)
    known = _of_class(data.y, train, lambda y: y < KNOWN)
    ordinary = _of_class(data.y, test, lambda y: y < KNOWN)
    new = _of_class(data.y, test, lambda y: y >= KNOWN)
    values = []
    for s, generator in enumerate(seeds.torch("shuffle")):
        usual = data.x[ordinary[s]]
        places = torch.rand(usual.shape, generator=generator).argsort(1)
        strange = usual.gather(1, places) if far else data.x[new[s]]
        scores = detect(networks[s], data.x[known[s]], data.y[known[s]], torch.cat([usual, strange]))
        values.append(auroc(scores, torch.arange(len(scores)) >= len(usual)))
    return torch.stack(values)


def _confidence(network: nn.Sequential, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
    """The usual baseline: minus the largest softmax probability."""
    with torch.no_grad():
        return -network(images).softmax(1).amax(1)


def _odin(temperature: float, epsilon: float) -> Detect:
    """Confidence at a temperature, after a step on the image that raises it."""

    def detect(network: nn.Sequential, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
        start = images.clone().requires_grad_()
        confidence = (network(start) / temperature).log_softmax(1).amax(1)
        (slope,) = torch.autograd.grad(confidence.sum(), start)
        with torch.no_grad():
            return -(network(images + epsilon * slope.sign()) / temperature).softmax(1).amax(1)

    return detect


def _mahalanobis(network: nn.Sequential, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
    """Distances between the features of the last hidden layer."""
    with torch.no_grad():
        return MahalanobisDetector().fit(network[:-1](x), y).anomaly_score(network[:-1](images))


def _layered(epsilon: float) -> Detect:
    """Distances in both hidden layers, each after a step on the image that shortens them."""

    def detect(network: nn.Sequential, x: Tensor, y: Tensor, images: Tensor) -> Tensor:
        def layers(x: Tensor) -> list[Tensor]:
            first = network[:2](x)
            return [first, network[2:4](first)]

        with torch.no_grad():
            detector = MahalanobisDetector().fit(layers(x), y)
        return detector.anomaly_score(detector.perturbed_features(layers, images, epsilon=epsilon))

    return detect


@claim(
    says="Mahalanobis distance in the last hidden layer tells shuffled digits better than softmax confidence does",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-7 8x8 against the same with pixels shuffled, MLP 64-64-64-8, 600 steps; nothing to tune",
)
def far_inputs_stand_out(seeds: Seeds) -> Arms:
    return Arms(_auroc(seeds, _mahalanobis, far=True), _auroc(seeds, _confidence, far=True))


@claim(
    says="Mahalanobis distance in the last hidden layer tells unseen digits better than softmax confidence does",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-7 8x8 against digits 8 and 9, MLP 64-64-64-8, 600 steps; nothing to tune",
)
def new_classes_stand_out(seeds: Seeds) -> Arms:
    return Arms(_auroc(seeds, _mahalanobis, far=False), _auroc(seeds, _confidence, far=False))


@claim(
    says="Mahalanobis distance over two layers with input preprocessing tells shuffled digits better than ODIN",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-7 8x8 against the same with pixels shuffled, MLP 64-64-64-8, 600 steps; 4 settings each",
)
def far_inputs_stand_out_more_than_under_odin(seeds: Seeds) -> Arms:
    def odin(seeds: Seeds, *, temperature: float, epsilon: float) -> Tensor:
        return _auroc(seeds, _odin(temperature, epsilon), far=True)

    def layered(seeds: Seeds, *, epsilon: float) -> Tensor:
        return _auroc(seeds, _layered(epsilon), far=True)

    plain = tune(odin, [{"temperature": t, "epsilon": e} for t in (10.0, 1000.0) for e in (0.0014, 0.01)], seeds)
    best = tune(layered, [{"epsilon": e} for e in (0.0, 0.0014, 0.005, 0.01)], seeds)
    return Arms(layered(seeds, **best), odin(seeds, **plain), {"method": best, "baseline": plain})


@claim(
    says="Digits 8 and 9 join a classifier trained without them better by Mahalanobis than by Euclidean class means",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, features of an MLP 64-64-64-8 trained on digits 0-7 for 600 steps, means of all ten; no tuning",
)
def classes_join_without_training(seeds: Seeds) -> Arms:
    data, (networks, train, test) = digits(), _networks(seeds)
    method, baseline = [], []
    for s, network in enumerate(networks):
        with torch.no_grad():
            features = network[:-1](data.x)
        x, y, new = features[train[s]], data.y[train[s]], features[test[s]]
        old = y < KNOWN
        joined = MahalanobisClassifier().fit(x[old], y[old]).partial_fit(x[~old], y[~old])
        for answers, arm in ((joined.predict(new), method), (_to_means(new, x, y).argmin(1), baseline)):
            arm.append(100 * (answers == data.y[test[s]]).double().mean())
    return Arms(torch.stack(method), torch.stack(baseline))


def _to_means(new: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, K) to the class means."""
    return torch.cdist(new, torch.stack([x[y == c].mean(0) for c in y.unique()]))


@claim(
    says="Control: Mahalanobis distance does not beat itself under other seeds",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-7 8x8 against digits 8 and 9, MLP 64-64-64-8, 600 steps; baseline under fresh seeds",
    control="A/A",
)
def mahalanobis_beats_itself(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_auroc(seeds, _mahalanobis, far=False), _auroc(other, _mahalanobis, far=False))


@claim(
    says="Planted: where classes are flat, Mahalanobis distance sees a step out of the plane that Euclid's does not",
    kind="superiority",
    metric="AUROC",
    scale="two Gaussian classes in 4 dimensions, one of them a tenth as wide; strange rows are 0.3 off along it",
    control="planted",
)
def planted_flat_classes(seeds: Seeds) -> Arms:
    blobs = gaussian_blobs(seeds, 900, dimensions=4, distance=4.0)
    x = blobs.x * torch.tensor([1.0, 1.0, 1.0, 0.1])
    x[:, 600:, 3] += 0.3
    strange = torch.arange(300, 900) >= 600
    method, baseline = [], []
    for rows, y in zip(x, blobs.y):
        known, labels, new = rows[:300], y[:300], rows[300:]
        method.append(auroc(MahalanobisDetector().fit(known, labels).anomaly_score(new), strange))
        baseline.append(auroc(_to_means(new, known, labels).amin(1), strange))
    return Arms(torch.stack(method), torch.stack(baseline))
