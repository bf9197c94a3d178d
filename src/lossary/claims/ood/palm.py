"""PALM: do several prototypes a class let unseen digits stand out, where each class is of two kinds?

Three classes are pairs of digits, 0 or 1, 2 or 3, 4 or 5; strange are the digits 6 to 9. Every arm trains the same
network and is scored as the paper's code does: Mahalanobis distance of the last hidden layer, scaled to length 1, to
one Gaussian for all classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import MahalanobisDetector, PALMLoss
from lossary.tasks import auroc, cross_entropy, digits, fit, per_seed, split, stacked_mlp

KNOWN, CLASSES, WIDTH = 6, 3, 32
MIXTURE = [{"lr": lr, "momentum": momentum} for lr in (0.03, 0.1) for momentum in (0.9, 0.99)]
RATES = [{"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)]


def _auroc(seeds: Seeds, loss: Callable[[Tensor, Tensor], Tensor], outputs: int, lr: float) -> Tensor:
    """How well digits 6 to 9 are told from 0 to 5 after training with a loss, in percent, per seed."""
    data, parts = digits(), split(digits(), seeds)
    model = stacked_mlp((64, 128, 64, outputs), seeds)
    known = _of_class(data.y, parts.train, new=False)
    fit(model, data.x, data.y // 2, loss=loss, seeds=seeds, train=known, steps=seeds.few(400), batch=128, lr=lr)
    ordinary, new = (_of_class(data.y, parts.test, new=new) for new in (False, True))
    values = []
    for s in range(len(seeds)):
        network = model.replica(s)[:-1]
        with torch.no_grad():
            features, rows = (
                F.normalize(network(data.x[row]), dim=1) for row in (known[s], torch.cat([ordinary[s], new[s]]))
            )
        scores = MahalanobisDetector().fit(features, torch.zeros(len(features))).anomaly_score(rows)
        values.append(auroc(scores, torch.arange(len(rows)) >= ordinary.shape[1]))
    return torch.stack(values)


def _of_class(y: Tensor, rows: Tensor, *, new: bool) -> Tensor:
    """The rows (S, m) of known or of new digits; splits are stratified, so every seed has as many."""
    return rows[(y[rows] >= KNOWN) == new].view(len(rows), -1)


def _palm(
    seeds: Seeds, *, lr: float, momentum: float, prototypes: int = 6, top: int = 5, likelihood: str = "bound"
) -> Tensor:
    first = seeds.torch("prototypes")
    loss = per_seed(
        lambda s: PALMLoss(
            CLASSES, WIDTH, prototypes=prototypes, top=top, momentum=momentum, likelihood=likelihood, generator=first[s]
        ),
        seeds,
    )
    return _auroc(seeds, loss, WIDTH, lr)


def _single(seeds: Seeds, *, lr: float, momentum: float) -> Tensor:
    return _palm(seeds, lr=lr, momentum=momentum, prototypes=1, top=1)


def _plain(seeds: Seeds, *, lr: float) -> Tensor:
    return _auroc(seeds, cross_entropy, CLASSES, lr)


@claim(
    says="Where classes are of two kinds, six prototypes a class let unseen digits stand out more than one does",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 0-5 in three pairs against 6-9, MLP 64-128-64-32, 400 steps of 128; 4 settings each",
)
def mixtures_beat_one_prototype(seeds: Seeds) -> Arms:
    several, one = tune(_palm, MIXTURE, seeds), tune(_single, MIXTURE, seeds)
    return Arms(_palm(seeds, **several), _single(seeds, **one), {"method": several, "baseline": one})


@claim(
    says="Unseen digits stand out more from features trained with PALM than from features trained with cross-entropy",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 0-5 in three pairs against 6-9, MLP 64-128-64-32 or -3, 400 steps of 128; 4 settings each",
)
def palm_beats_cross_entropy(seeds: Seeds) -> Arms:
    several, plain = tune(_palm, MIXTURE, seeds), tune(_plain, RATES, seeds)
    return Arms(_palm(seeds, **several), _plain(seeds, **plain), {"method": several, "baseline": plain})


@claim(
    says="With one prototype a class PALM is CIDER: cross-entropy of cosines to prototypes, plus their dispersion",
    kind="exact",
    metric="deviation",
    tolerance=1e-10,
    scale="batches of 32 random embeddings in 8 dimensions, 4 classes, in double precision, after the prototypes moved",
)
def one_prototype_is_cider(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("embeddings"):
        loss = PALMLoss(4, 8, prototypes=1, top=1, generator=generator).double()
        z = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (32,), generator=generator)
        got = loss(z, y)
        p = loss.prototypes[:, 0]
        others = (p @ p.mT / 0.5).masked_select(~torch.eye(4, dtype=torch.bool)).view(4, 3)
        cider = cross_entropy(F.cosine_similarity(z.unsqueeze(1), p, dim=2) / 0.1, y) + others.logsumexp(1).mean()
        deviations.append(got - cider)
    return Arms(torch.stack(deviations))
