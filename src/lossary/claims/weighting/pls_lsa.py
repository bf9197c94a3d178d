"""PLS-LSA: is a better detector enough, or is it the alternation of two that helps?

A stand-in for labels from the web: the digits 0 to 5 are the classes, 20% of the training images have the label of
another class, and 30% are digits 6 to 9 under any label. A small network is pretrained by contrast on all images, then
trained with PLS for twelve epochs, the first four of them on the labels as they are. The arms differ only in what
detects the noisy images after each epoch from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import accuracy, auroc, cross_entropy, digits, split, stacked_mlp
from lossary.weighting import (
    AlternatingNoiseDetector,
    LinearSeparationDetector,
    PLSLoss,
    SmallLossGMMDetector,
    pseudo_label_confidence,
)

CLASSES, WIDTH, BATCH, WARM_UP = 6, 64, 64, 4
RATES = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class _Web:
    """Images (S, n, 64), their labels (S, n), which show no class of ours; and a clean test part."""

    x: Tensor
    y: Tensor
    strange: Tensor
    test_x: Tensor
    test_y: Tensor


def _web(seeds: Seeds) -> _Web:
    data = digits()
    parts = split(data, seeds)
    ours = data.y < CLASSES
    x, y, strange = [], [], []
    for rng, rows in zip(seeds.numpy("web"), parts.train):
        known, others = rows[ours[rows]], rows[~ours[rows]]
        others = others[torch.from_numpy(rng.permutation(len(others)))][: round(3 / 7 * len(known))]
        swapped = torch.from_numpy(rng.random(len(known)) < 2 / 7)
        shift = torch.from_numpy(rng.integers(1, CLASSES, len(known)))
        any_label = torch.from_numpy(rng.integers(CLASSES, size=len(others)))
        x.append(data.x[torch.cat([known, others])])
        y.append(torch.cat([(data.y[known] + swapped * shift) % CLASSES, any_label]))
        strange.append(torch.arange(len(y[-1])) >= len(known))
    test = torch.stack([rows[ours[rows]] for rows in parts.test])
    return _Web(torch.stack(x), torch.stack(y), torch.stack(strange), data.x[test], data.y[test])


class _Network(nn.Module):
    """Logits, projections for contrast, and the features between the two hidden layers, of a stack of networks."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.lower, self.upper = stacked_mlp((64, WIDTH), seeds), stacked_mlp((WIDTH, WIDTH), seeds)
        self.classifier, self.head = stacked_mlp((WIDTH, CLASSES), seeds), stacked_mlp((WIDTH, 32), seeds)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.lower(x).relu()
        last = self.upper(middle).relu()
        return self.classifier(last), self.head(last), middle


def _changed(x: Tensor, generators: Sequence[Generator], *, strong: bool) -> Tensor:
    """Views of images (S, batch, 64): with a little noise, or shifted by up to a pixel and with more noise."""
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
    if not strong:
        return x + 0.1 * noise
    shift = torch.stack([torch.randint(-1, 2, (2, x.shape[1], 1, 1), generator=g) for g in generators], 1)
    place = torch.arange(8)
    images = x.view(*x.shape[:2], 8, 8)
    images = images.take_along_dim((place.view(8, 1) + shift[0]) % 8, 2)
    images = images.take_along_dim((place + shift[1]) % 8, 3)
    return images.flatten(2) + 0.3 * noise


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows (S, batch) of a tensor (S, n, ...)."""
    return tensor[torch.arange(len(tensor)).unsqueeze(1), index]


def _pretrained(seeds: Seeds, x: Tensor) -> _Network:
    """A stack of networks after 200 steps of SimCLR at temperature 0.5."""
    network = _Network(seeds)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    generators = seeds.torch("contrast")
    for _ in range(seeds.few(200)):
        index = torch.stack([torch.randperm(x.shape[1], generator=g)[: 2 * BATCH] for g in generators])
        images = _rows(x, index)
        one, other = (F.normalize(network(_changed(images, generators, strong=True))[1], dim=-1) for _ in range(2))
        cosine = one @ other.mT / 0.5
        own = torch.arange(2 * BATCH).expand(len(seeds), -1)
        optimizer.zero_grad()
        (cross_entropy(cosine, own) + cross_entropy(cosine.mT, own)).mean(1).sum().backward()
        optimizer.step()
    return network


def _trained(seeds: Seeds, web: _Web, *, order: tuple[str, ...], lr: float) -> _Network:
    network, pls = _pretrained(seeds, web.x), PLSLoss(prior_penalty=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    detectors = [AlternatingNoiseDetector(order) for _ in seeds.ids]
    generators = seeds.torch("train")
    stack, n = web.y.shape
    given = F.one_hot(web.y, CLASSES).float()
    noisy, weight, guessed = torch.zeros(stack, n, dtype=torch.bool), torch.ones(stack, n), given.clone()

    def values(z: Tensor, t: Tensor, w: Tensor, partner: Tensor, lam: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return pls(z, t, weight=w, partner=partner, lam=lam, projections=(u, v))

    for epoch in range(seeds.few(12, smoke=5)):
        order_of_rows = torch.stack([torch.randperm(n, generator=g) for g in generators])
        for index in order_of_rows.split(BATCH, dim=1):
            images, hidden = _rows(web.x, index), _rows(noisy, index).unsqueeze(2)
            with torch.no_grad():
                own_labels = pls.pseudo_labels(network(_changed(images, generators, strong=False))[0])
            guessed[torch.arange(stack).unsqueeze(1), index] = own_labels
            target = torch.where(hidden, own_labels, _rows(given, index))
            weak, strong, second = (_changed(images, generators, strong=k > 0) for k in range(3))
            first = torch.where(hidden, strong, weak)
            partner = torch.stack([torch.randperm(index.shape[1], generator=g) for g in generators])
            lam = torch.cat([0.5 + torch.rand(1, generator=g) / 2 for g in generators])
            share = lam.view(-1, 1, 1)
            z, u, _ = network(share * first + (1 - share) * _rows(first, partner))
            v = network(second)[1]
            optimizer.zero_grad()
            torch.vmap(values)(z, target, _rows(weight, index), partner, lam, u, v).mean(1).sum().backward()
            optimizer.step()
        if epoch < WARM_UP - 1:
            continue
        with torch.no_grad():
            z, _, features = network(web.x)
            losses, own_losses = cross_entropy(z, web.y), -(guessed * z.log_softmax(-1)).sum(-1)
        for s, detector in enumerate(detectors):
            noisy[s] = detector.fit(losses[s], features[s], epoch=epoch).predict(losses[s], features[s])
            weight[s] = pseudo_label_confidence(own_losses[s], noisy[s])
    return network


@torch.no_grad()
def _accuracy(seeds: Seeds, *, order: tuple[str, ...], lr: float) -> Tensor:
    """Clean test accuracy in percent on the six classes, per seed."""
    web = _web(seeds)
    with torch.enable_grad():
        network = _trained(seeds, web, order=order, lr=lr)
    return accuracy(network(web.test_x)[0], web.test_y)


def _compare(seeds: Seeds, method: tuple[str, ...], baseline: tuple[str, ...]) -> Arms:
    ours, other = (tune(_accuracy, [{"order": o, "lr": lr} for lr in RATES], seeds) for o in (method, baseline))
    return Arms(_accuracy(seeds, **ours), _accuracy(seeds, **other), {"method": ours, "baseline": other})


@claim(
    says="On web-like noise, alternating the two detectors classifies better than the small loss alone",
    kind="superiority",
    metric="accuracy",
    scale="digits 0-5, 20% wrong labels, 30% other digits, SimCLR, MLP 64-64-64-6, 12 epochs of 64; 4 rates each",
)
def alternating_beats_the_small_loss(seeds: Seeds) -> Arms:
    return _compare(seeds, ("linear", "loss"), ("loss",))


@claim(
    says="On web-like noise, alternating the two detectors classifies better than linear separation alone",
    kind="superiority",
    metric="accuracy",
    scale="digits 0-5, 20% wrong labels, 30% other digits, SimCLR, MLP 64-64-64-6, 12 epochs of 64; 4 rates each",
)
def alternating_beats_linear_separation(seeds: Seeds) -> Arms:
    return _compare(seeds, ("linear", "loss"), ("linear",))


@claim(
    says="Linear separation alone does not raise accuracy: the small loss alone classifies as well",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 0-5, 20% wrong labels, 30% other digits, SimCLR, MLP 64-64-64-6, 12 epochs of 64; 4 rates each",
)
def linear_separation_does_not_raise_accuracy(seeds: Seeds) -> Arms:
    return _compare(seeds, ("loss",), ("linear",))


@claim(
    says="Linear separation finds images of no class better than the small loss does",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-5, 20% wrong labels, 30% other digits, SimCLR, MLP 64-64-64-6, 12 epochs of 64, lr 0.03",
)
def linear_separation_finds_strange_images(seeds: Seeds) -> Arms:
    web = _web(seeds)
    network = _trained(seeds, web, order=("linear", "loss"), lr=0.03)
    with torch.no_grad():
        z, _, features = network(web.x)
        losses = cross_entropy(z, web.y)
    by_plane, by_loss = (
        torch.stack([make().fit(a, b).probability(a, b) for a, b in zip(losses, features)])
        for make in (LinearSeparationDetector, SmallLossGMMDetector)
    )
    return Arms(auroc(by_plane, web.strange), auroc(by_loss, web.strange))
