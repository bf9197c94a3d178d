"""ConjNorm: do a norm chosen on data and estimated partition functions tell strange digits better?

A network learns the digits 0 to 6. Strange are the digits 7 to 9, or digits whose pixels have been shuffled; the
two AUROCs are averaged. All detectors of a seed look at the same trained network, in one pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import ConjNormDetector, MahalanobisDetector
from lossary.ood._baselines import VirtualLogit, energy, max_logit, max_softmax, neighbour_distance
from lossary.ood._features import FeatureTap
from lossary.tasks import auroc, cross_entropy, digits, fit, split, stacked_mlp

KNOWN = 7
HIDDEN = "3"  # the last hidden layer, after its ReLU


@dataclass(frozen=True)
class Seen:
    """A trained network's head, its features of training rows and of rows to rate, and what it says to these."""

    head: nn.Linear
    train: Tensor
    labels: Tensor
    rated: Tensor
    logits: Tensor
    kinds: Tensor
    """Of the rated rows: 0 ordinary, 1 an unseen digit, 2 shuffled."""


Detect = Callable[[Seen], Tensor]


def _seen(seeds: Seeds) -> list[Seen]:
    """For each seed a network trained on the digits 0 to 6, and its one pass over everything."""
    data, parts = digits(), split(digits(), seeds)
    model = stacked_mlp((64, 64, 64, KNOWN), seeds)
    known, usual, new = (
        rows[(data.y[rows] < KNOWN) == inside].view(len(seeds), -1)
        for rows, inside in ((parts.train, True), (parts.test, True), (parts.test, False))
    )
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=known, steps=seeds.few(600), lr=0.05)
    found = []
    for s, generator in enumerate(seeds.torch("shuffle")):
        ordinary, network = data.x[usual[s]], model.replica(s)
        shuffled = ordinary.gather(1, torch.rand(ordinary.shape, generator=generator).argsort(1))
        groups = (ordinary, data.x[new[s]], shuffled)
        tap = FeatureTap(network, [HIDDEN])
        train, rated = tap(data.x[known[s]], batch=1000), tap(torch.cat(groups), batch=1000)
        kinds = torch.cat([torch.full((len(group),), kind) for kind, group in enumerate(groups)])
        features = train.features[HIDDEN], data.y[known[s]], rated.features[HIDDEN], rated.output
        found.append(Seen(network[-1], *features, kinds))
    return found


def _auroc(all_seen: list[Seen], detect: Detect) -> Tensor:
    """Mean over both kinds of strange rows, per seed."""
    values = []
    for seen in all_seen:
        scores = detect(seen)
        both = [auroc(scores[rows], seen.kinds[rows] > 0) for rows in (seen.kinds != 2, seen.kinds != 1)]
        values.append(torch.stack(both).mean())
    return torch.stack(values)


def _conjnorm(p: float, temperature: float, partition: str = "all") -> Detect:
    def detect(seen: Seen) -> Tensor:
        detector = ConjNormDetector(p=p, temperature=temperature, partition=partition)
        return detector.fit(seen.train, seen.labels).anomaly_score(seen.rated)

    return detect


def _without_partition(p: float, temperature: float) -> Detect:
    """The same densities added up as if all integrated to 1."""

    def detect(seen: Seen) -> Tensor:
        detector = ConjNormDetector(p=p, temperature=temperature).fit(seen.train, seen.labels)
        rows = F.normalize(seen.rated, p=p, dim=1)
        q = p / (p - 1)
        means = F.normalize(torch.stack([seen.train[seen.labels == c].mean(0) for c in range(KNOWN)]), p=p, dim=1)
        constant = torch.linalg.vector_norm(means, ord=q, dim=1).square() / 2
        sizes = torch.linalg.vector_norm(rows, ord=q, dim=1, keepdim=True).square() / 2
        return -((rows @ detector.duals_.to(rows).mT - sizes - constant) / temperature).logsumexp(1)

    return detect


def _virtual_logit(seen: Seen) -> Tensor:
    return VirtualLogit.of(seen.train, seen.head.weight, seen.head.bias, dimension=KNOWN).anomaly_score(seen.rated)


def _mahalanobis(ridge: float) -> Detect:
    return lambda seen: MahalanobisDetector(ridge=ridge).fit(seen.train, seen.labels).anomaly_score(seen.rated)


def _neighbour(k: int) -> Detect:
    return lambda seen: neighbour_distance(seen.rated, seen.train, k=k)


USUAL: dict[str, Detect] = {
    "max softmax": lambda seen: max_softmax(seen.logits),
    "max logit": lambda seen: max_logit(seen.logits),
    "energy": lambda seen: energy(seen.logits),
    "ViM": _virtual_logit,
    "Mahalanobis": _mahalanobis(0.0),
    "Mahalanobis, ridge 0.1": _mahalanobis(0.1),
    "neighbour 5": _neighbour(5),
    "neighbour 50": _neighbour(50),
}
NORMS, TEMPERATURES = (1.5, 1.8, 2.5, 3.0), (0.02, 0.1)
OURS = {f"p {p:g}, t {t:g}": _conjnorm(p, t) for p in NORMS for t in TEMPERATURES}
GAUSSIAN = {f"p 2, t {t:g}": _conjnorm(2.0, t) for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)}
UNNORMALISED = {f"p {p:g}, t {t:g}": _without_partition(p, t) for p in NORMS for t in TEMPERATURES}


def _compare(seeds: Seeds, theirs: dict[str, Detect]) -> Arms:
    """ConjNorm against the best of others, each side chosen from eight on the same tuning networks."""
    tuning, all_seen = _seen(seeds.tuning(1 if seeds.smoke else 4)), _seen(seeds)

    def chosen(settings: dict[str, Detect]) -> str:
        def score(_: Seeds, name: str) -> Tensor:
            return _auroc(tuning, settings[name])

        return tune(score, [{"name": name} for name in settings], seeds)["name"]

    method, baseline = chosen(OURS), chosen(theirs)
    every = {name: _auroc(all_seen, detect).mean().item() for name, detect in theirs.items()}
    return Arms(
        _auroc(all_seen, OURS[method]),
        _auroc(all_seen, theirs[baseline]),
        {"method": method, "baseline": baseline, "every baseline": every},
    )


@claim(
    says="ConjNorm tells strange digits better than the best of softmax, logit, energy, ViM, Mahalanobis, neighbours",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-6 8x8 against digits 7-9 and against shuffled ones, MLP 64-64-64-7, 600 steps; 8 settings each",
)
def chosen_norm_beats_the_usual_scores(seeds: Seeds) -> Arms:
    return _compare(seeds, USUAL)


@claim(
    says="A norm chosen on data tells strange digits better than the Gaussian's, p = 2",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-6 8x8 against digits 7-9 and against shuffled ones, MLP 64-64-64-7, 600 steps; 8 settings each",
)
def chosen_norm_beats_the_gaussian(seeds: Seeds) -> Arms:
    return _compare(seeds, GAUSSIAN)


@claim(
    says="Estimated partition functions tell strange digits better than densities added up unnormalised",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-6 8x8 against digits 7-9 and against shuffled ones, MLP 64-64-64-7, 600 steps; 8 settings each",
)
def partition_functions_help(seeds: Seeds) -> Arms:
    return _compare(seeds, UNNORMALISED)


@claim(
    says="With p = 2 ConjNorm adds up Gaussians about the unit class means, each over its sum on training rows",
    kind="exact",
    metric="deviation",
    tolerance=1e-8,
    scale="scores of 30 random rows in 6 dimensions, 3 classes, 90 training rows, t = 0.3, double precision",
)
def two_is_the_gaussian(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("rows"):
        draws = torch.randn(120, 6, generator=generator, dtype=torch.float64)
        labels = torch.arange(90) % 3
        train, rows = draws[:90] + 2 * torch.eye(3, 6)[labels], draws[90:]
        means = F.normalize(torch.stack([train[labels == c].mean(0) for c in range(3)]), dim=1)
        near, rated = (-torch.cdist(F.normalize(x, dim=1), means).square() / 0.6 for x in (train, rows))
        expected = (rated.exp() / near.exp().sum(0)).sum(1).log()
        detector = ConjNormDetector(p=2.0, temperature=0.3).fit(train, labels)
        deviations.append(detector.score_samples(rows) - expected)
    return Arms(torch.stack(deviations))
