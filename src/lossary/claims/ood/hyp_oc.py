"""Hyp-OC: is one digit better told from unseen ones in hyperbolic space than in Euclid's, and than by a one-class SVM?

A network learns the digits 0 to 4 and is then left as it is. Of the other five digits one, by turns, is the class to
be learned, from its training images alone; strange are the remaining four. All arms see the same features, divided by
one number that makes their mean variance 1.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import HyperbolicMLR, HypOC, MahalanobisDetector, RunningMeanPseudoNegatives, to_poincare_ball
from lossary.tasks import StackedLinear, auroc, cross_entropy, digits, fit, split, stacked_mlp

OLD, WIDTH, EMBEDDING = 5, 64, 16
GRID = [{"lr": lr, "variance": variance} for lr in (0.0005, 0.002) for variance in (0.5, 2.0)]
MACHINES = [{"nu": nu, "gamma": gamma} for nu in (0.05, 0.2) for gamma in (0.1, 1.0)]


def _features(seeds: Seeds) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each seed features of one digit's training images, those of test images, and which of these are strange."""
    data, parts = digits(), split(digits(), seeds)
    model = stacked_mlp((64, WIDTH, WIDTH, OLD), seeds)
    old = parts.train[data.y[parts.train] < OLD].view(len(seeds), -1)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=old, steps=seeds.few(400), lr=0.05)
    for s, id in enumerate(seeds.ids):
        with torch.no_grad():
            features = model.replica(s)[:-1](data.x)
        train, test = parts.train[s], parts.test[s]
        one, test = train[data.y[train] == OLD + id % 5], test[data.y[test] >= OLD]
        scale = features[one].var(0).mean().sqrt()
        yield features[one] / scale, features[test] / scale, data.y[test] != OLD + id % 5


def _trained(seeds: Seeds, model: str, *, lr: float, variance: float, confusion: float = 1.0) -> Tensor:
    """AUROC of the strange digits in percent after training a head, per seed."""
    heads, scores = stacked_mlp((WIDTH, 64, EMBEDDING), seeds), []
    streams = zip(_features(seeds), seeds.torch("classifier"), seeds.torch("order"), seeds.torch("negatives"))
    for s, ((one, test, strange), first, order, noise) in enumerate(streams):
        arm = {"hyperbolic": HypOC, "euclidean": _Euclidean}[model](
            heads.replica(s), WIDTH, EMBEDDING, variance=variance, confusion=confusion, generator=first
        )
        optimizer = torch.optim.Adam(arm.parameters(), lr=lr, fused=True)
        for _ in range(seeds.few(200)):
            rows = torch.randint(len(one), (64,), generator=order)
            optimizer.zero_grad()
            arm(one[rows], generator=noise).mean().backward()
            nn.utils.clip_grad_norm_(arm.parameters(), 3.0)
            optimizer.step()
        with torch.no_grad():
            scores.append(auroc(arm.eval().anomaly_score(test), strange))
    return torch.stack(scores)


class _Euclidean(nn.Module):
    """The same without hyperbolic space: logistic regression, and Euclidean distances between pairs."""

    def __init__(
        self,
        head: nn.Module,
        num_features: int,
        num_embedding: int,
        *,
        variance: float,
        confusion: float,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.head, self.confusion = head, confusion
        self.negatives = RunningMeanPseudoNegatives(num_features, variance=variance)
        self.classifier = StackedLinear(num_embedding, 1, generators=[generator]).replica(0)

    def forward(self, features: Tensor, *, generator: Generator) -> Tensor:
        embedded = self.head(torch.cat([features, self.negatives(features, generator=generator)]))
        none, real = self.classifier(embedded).squeeze(1), len(features)
        mine = embedded[:real]
        together = torch.linalg.vector_norm(mine - mine.roll(-(len(mine) // 2), 0), dim=1)
        loss: Tensor = (F.softplus(none[:real]) + F.softplus(-none[real:])) / 2 + self.confusion * together
        return loss

    def anomaly_score(self, features: Tensor) -> Tensor:
        score: Tensor = self.classifier(self.head(features)).squeeze(1)
        return score


def _hyperbolic(seeds: Seeds, *, lr: float, variance: float) -> Tensor:
    return _trained(seeds, "hyperbolic", lr=lr, variance=variance)


def _apart(seeds: Seeds, *, lr: float, variance: float) -> Tensor:
    return _trained(seeds, "hyperbolic", lr=lr, variance=variance, confusion=0.0)


def _euclidean(seeds: Seeds, *, lr: float, variance: float) -> Tensor:
    return _trained(seeds, "euclidean", lr=lr, variance=variance)


def _machine(seeds: Seeds, *, nu: float, gamma: float) -> Tensor:
    from sklearn.svm import OneClassSVM

    scores = []
    for one, test, strange in _features(seeds):
        machine = OneClassSVM(nu=nu, gamma=gamma / WIDTH).fit(one.numpy())
        scores.append(auroc(-torch.from_numpy(machine.score_samples(test.numpy())), strange))
    return torch.stack(scores)


def _mahalanobis(seeds: Seeds) -> Tensor:
    return torch.stack(
        [
            auroc(MahalanobisDetector(ridge=0.1).fit(one, torch.zeros(len(one))).anomaly_score(test), strange)
            for one, test, strange in _features(seeds)
        ]
    )


@claim(
    says="Against the same pseudo-negatives, a hyperbolic head tells unseen digits from the known one better than a"
    " Euclidean head does",
    kind="superiority",
    metric="AUROC",
    scale="one of digits 5-9 against the others, features of an MLP 64-64-64-5 trained on 0-4, head 64-64-16, 200 steps"
    " of 64; 4 settings each",
)
def hyperbolic_beats_euclidean(seeds: Seeds) -> Arms:
    curved, flat = tune(_hyperbolic, GRID, seeds, n=2), tune(_euclidean, GRID, seeds, n=2)
    return Arms(_hyperbolic(seeds, **curved), _euclidean(seeds, **flat), {"method": curved, "baseline": flat})


@claim(
    says="Hyp-OC tells unseen digits from the known one better than a one-class support vector machine does",
    kind="superiority",
    metric="AUROC",
    scale="one of digits 5-9 against the others, features of an MLP 64-64-64-5 trained on 0-4, head 64-64-16, 200 steps"
    " of 64; 4 settings each",
)
def hyp_oc_beats_one_class_svm(seeds: Seeds) -> Arms:
    curved, machine = tune(_hyperbolic, GRID, seeds, n=2), tune(_machine, MACHINES, seeds, n=2)
    details = {"method": curved, "baseline": machine, "mahalanobis": _mahalanobis(seeds).mean().item()}
    return Arms(_hyperbolic(seeds, **curved), _machine(seeds, **machine), details)


@claim(
    says="With its pairwise loss Hyp-OC tells unseen digits from the known one better than without",
    kind="superiority",
    metric="AUROC",
    scale="one of digits 5-9 against the others, features of an MLP 64-64-64-5 trained on 0-4, head 64-64-16, 200 steps"
    " of 64; 4 settings each",
)
def drawing_together_helps(seeds: Seeds) -> Arms:
    together, apart = tune(_hyperbolic, GRID, seeds, n=2), tune(_apart, GRID, seeds, n=2)
    return Arms(_hyperbolic(seeds, **together), _apart(seeds, **apart), {"method": together, "baseline": apart})


@claim(
    says="As curvature vanishes, the hyperbolic classifier's logits become linear: 4 <x - p, a>",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="64 points in 8 dimensions, 3 classes, curvature 1e-8, double precision",
)
def flat_space_is_linear(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("points"):
        classifier = HyperbolicMLR(8, 3, curvature=1e-8, generator=generator).double()
        x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
        p, a = classifier.points, classifier.normals
        logits = classifier(to_poincare_ball(x, curvature=1e-8, clip=100.0))
        deviations.append((logits - 4 * (x @ a.mT - (p * a).sum(1))).detach())
    return Arms(torch.stack(deviations))
