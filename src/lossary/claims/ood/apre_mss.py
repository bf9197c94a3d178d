"""APRE and mean-shift scoring: do they find outliers in a contaminated table that an autoencoder and neighbours miss?

Ordinary are nine digits, outliers the tenth, which is another one by turns; a few of its images hide among the
training rows. Settings are chosen with labels, as in the paper, but on other seeds.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import MeanShiftOutlierScorer, mean_shift_transform
from lossary.tasks import auroc, digits, split

HIDDEN, RATE = 8, 0.005
EPOCHS = [{"epochs": epochs} for epochs in (50, 100, 200, 400)]
NEIGHBOURS = [{"neighbors": k} for k in (5, 10, 20, 40)]
BOTH = [{"epochs": epochs, "neighbors": k} for epochs in (100, 300) for k in (10, 30)]


def _tables(seeds: Seeds) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """For each seed training rows, test rows, which of these are outliers, and a seed for the weights."""
    data, parts = digits(), split(digits(), seeds, test=0.75)
    for s, id in enumerate(seeds.ids):
        train, test = parts.train[s], parts.test[s]
        outlier = data.y[train] == id % 10
        hidden = outlier & (outlier.cumsum(0) <= HIDDEN)
        yield data.x[train[~outlier | hidden]], data.x[test], data.y[test] == id % 10, id


def _auroc(
    seeds: Seeds, *, epochs: int = 300, neighbors: int = 2, times: int = 0, probabilistic: bool = False
) -> Tensor:
    """How well the outliers are told from the rest, in percent, per seed."""
    values = []
    for train, test, outlier, id in _tables(seeds):
        scorer = MeanShiftOutlierScorer(
            neighbors=neighbors,
            times=times,
            probabilistic=probabilistic,
            epochs=seeds.few(epochs, smoke=2),
            lr=RATE,
            random_state=id,
        )
        values.append(auroc(scorer.fit(train).anomaly_score(test), outlier))
    return torch.stack(values)


def _plain(seeds: Seeds, *, epochs: int) -> Tensor:
    return _auroc(seeds, epochs=epochs)


def _shifted(seeds: Seeds, *, neighbors: int) -> Tensor:
    return _auroc(seeds, neighbors=neighbors, times=1)


def _weighted(seeds: Seeds, *, epochs: int) -> Tensor:
    return _auroc(seeds, epochs=epochs, probabilistic=True)


def _pair(seeds: Seeds, *, epochs: int, neighbors: int) -> Tensor:
    return _auroc(seeds, epochs=epochs, neighbors=neighbors, times=1, probabilistic=True)


def _distance(seeds: Seeds, *, neighbors: int) -> Tensor:
    """Distance to the k-th nearest training row."""
    return torch.stack(
        [
            auroc(torch.cdist(test, train).kthvalue(neighbors, dim=1).values, outlier)
            for train, test, outlier, _ in _tables(seeds)
        ]
    )


def _moved(seeds: Seeds, *, neighbors: int) -> Tensor:
    """Distance to a row's own mean shift, without an autoencoder."""
    return torch.stack(
        [
            auroc((test - mean_shift_transform(train, test, neighbors=neighbors)).norm(dim=1), outlier)
            for train, test, outlier, _ in _tables(seeds)
        ]
    )


@claim(
    says="Mean-shift scoring finds outliers better than an autoencoder's own squared error does",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, one as outlier, 8 of it in some 410 training rows, autoencoder 64-32-16-32-64; 4 settings each",
)
def mean_shift_improves_an_autoencoder(seeds: Seeds) -> Arms:
    shifted, plain = tune(_shifted, NEIGHBOURS, seeds, n=2), tune(_plain, EPOCHS, seeds, n=2)
    details = {"method": shifted, "baseline": plain, "no autoencoder": _moved(seeds, **shifted).mean().item()}
    return Arms(_shifted(seeds, **shifted), _plain(seeds, **plain), details)


@claim(
    says="Adjustable probabilistic reconstruction error finds outliers better than squared error does",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, one as outlier, 8 of it in some 410 training rows, autoencoder 64-32-16-32-64 or -128;"
    " 4 settings each",
)
def apre_beats_squared_error(seeds: Seeds) -> Arms:
    weighted, plain = tune(_weighted, EPOCHS, seeds, n=2), tune(_plain, EPOCHS, seeds, n=2)
    return Arms(_weighted(seeds, **weighted), _plain(seeds, **plain), {"method": weighted, "baseline": plain})


@claim(
    says="Both together find outliers better than the distance to the k-th nearest neighbour does",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, one as outlier, 8 of it in some 410 training rows, autoencoder 64-32-16-32-128; 4 settings each",
)
def the_pair_beats_nearest_neighbours(seeds: Seeds) -> Arms:
    pair, distance = tune(_pair, BOTH, seeds, n=2), tune(_distance, NEIGHBOURS, seeds)
    return Arms(_pair(seeds, **pair), _distance(seeds, **distance), {"method": pair, "baseline": distance})
