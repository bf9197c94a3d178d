"""NECO: does the share of a feature in the principal space tell strange digits better than the usual scores?

A network learns the digits 0 to 6, past zero training error. Strange are the digits 7 to 9, or digits whose pixels
have been shuffled. All detectors of a seed look at the same trained network, in one pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import NECO, MahalanobisDetector, id_ood_orthogonality, neco_score
from lossary.ood._baselines import VirtualLogit, energy, max_logit, max_softmax, neighbour_distance
from lossary.ood._features import FeatureTap, Tapped
from lossary.ood._subspace import principal_axes
from lossary.tasks import auroc, cross_entropy, digits, fit, split, stacked_mlp
from lossary.weighting import neural_collapse_metrics

KNOWN = 7
STEPS = (75, 150, 300, 600, 1200, 2400)
HIDDEN = "3"  # the last hidden layer, after its ReLU


@dataclass(frozen=True)
class Seen:
    """What a trained network makes of its training data and of what is to be rated, the strange rows last."""

    network: nn.Sequential
    train: Tapped
    labels: Tensor
    rated: Tapped
    strange: Tensor

    def features(self) -> tuple[Tensor, Tensor]:
        """Of the training rows and of those to rate."""
        return self.train.features[HIDDEN], self.rated.features[HIDDEN]


Detect = Callable[[Seen], Tensor]


def _seen(seeds: Seeds, *, far: bool = False, steps: int = 1200) -> list[Seen]:
    """For each seed a network trained on the digits 0 to 6, and its one pass over everything."""
    data, parts = digits(), split(digits(), seeds)
    model = stacked_mlp((64, 64, 64, KNOWN), seeds)
    known, usual, new = (
        rows[wanted(data.y[rows])].view(len(seeds), -1)
        for rows, wanted in (
            (parts.train, lambda y: y < KNOWN),
            (parts.test, lambda y: y < KNOWN),
            (parts.test, lambda y: y >= KNOWN),
        )
    )
    fit(
        model,
        data.x,
        data.y,
        loss=cross_entropy,
        seeds=seeds,
        train=known,
        steps=seeds.few(steps),
        lr=0.05,
        weight_decay=5e-4,
    )
    found = []
    for s, generator in enumerate(seeds.torch("shuffle")):
        network, ordinary = model.replica(s), data.x[usual[s]]
        places = torch.rand(ordinary.shape, generator=generator).argsort(1)
        strange = ordinary.gather(1, places) if far else data.x[new[s]]
        tap = FeatureTap(network, [HIDDEN])
        rated = tap(torch.cat([ordinary, strange]), batch=1000)
        which = torch.arange(len(rated.output)) >= len(ordinary)
        found.append(Seen(network, tap(data.x[known[s]], batch=1000), data.y[known[s]], rated, which))
    return found


def _auroc(all_seen: list[Seen], detect: Detect) -> Tensor:
    return torch.stack([auroc(detect(seen), seen.strange) for seen in all_seen])


def _neco(components: float, standardize: bool, with_logits: bool) -> Detect:
    def detect(seen: Seen) -> Tensor:
        train, rated = seen.features()
        detector = NECO(components=components, standardize=standardize).fit(train)
        return detector.anomaly_score(rated, seen.rated.output if with_logits else None)

    return detect


def _virtual_logit(dimension: int) -> Detect:
    def detect(seen: Seen) -> Tensor:
        train, rated = seen.features()
        head = seen.network[-1]
        return VirtualLogit.of(train, head.weight, head.bias, dimension=dimension).anomaly_score(rated)

    return detect


BASELINES: dict[str, Detect] = {
    "max softmax": lambda seen: max_softmax(seen.rated.output),
    "max logit": lambda seen: max_logit(seen.rated.output),
    "energy": lambda seen: energy(seen.rated.output),
    "ViM, 7 dimensions": _virtual_logit(7),
    "ViM, 16 dimensions": _virtual_logit(16),
    "10th neighbour": lambda seen: neighbour_distance(*reversed(seen.features()), k=10),
    "50th neighbour": lambda seen: neighbour_distance(*reversed(seen.features()), k=50),
    "Mahalanobis": lambda seen: (
        MahalanobisDetector().fit(seen.features()[0], seen.labels).anomaly_score(seen.features()[1])
    ),
}
OURS = [
    {"components": c, "standardize": s, "with_logits": z}
    for c in (6, 0.9)
    for s in (True, False)
    for z in (True, False)
]


def _against_the_usual(seeds: Seeds, *, far: bool) -> Arms:
    """NECO against the best of eight usual scores, each side chosen from eight on the same tuning networks."""
    tuning = _seen(seeds.tuning(1 if seeds.smoke else 4), far=far)
    method = tune(lambda _, **setting: _auroc(tuning, _neco(**setting)), OURS, seeds)
    theirs = [{"name": name} for name in BASELINES]
    baseline = tune(lambda _, name: _auroc(tuning, BASELINES[name]), theirs, seeds)
    all_seen = _seen(seeds, far=far)
    every = {name: _auroc(all_seen, detect).mean().item() for name, detect in BASELINES.items()}
    return Arms(
        _auroc(all_seen, _neco(**method)),
        _auroc(all_seen, BASELINES[baseline["name"]]),
        {"method": method, "baseline": baseline, "every baseline": every},
    )


@claim(
    says="NECO tells unseen digits better than the best of softmax, logit, energy, ViM, neighbours and Mahalanobis",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-6 8x8 against digits 7-9, MLP 64-64-64-7, 1200 steps, past zero error; 8 settings each",
)
def new_classes_leave_the_principal_space(seeds: Seeds) -> Arms:
    return _against_the_usual(seeds, far=False)


@claim(
    says="NECO tells shuffled digits better than the best of softmax, logit, energy, ViM, neighbours and Mahalanobis",
    kind="superiority",
    metric="AUROC",
    scale="digits 0-6 8x8 against the same with pixels shuffled, MLP 64-64-64-7, 1200 steps; 8 settings each",
)
def shuffled_inputs_leave_the_principal_space(seeds: Seeds) -> Arms:
    return _against_the_usual(seeds, far=True)


@claim(
    says="NECO tells unseen digits the better the longer the network trains towards collapse",
    kind="trend",
    metric="AUROC",
    scale="digits 0-6 8x8 against digits 7-9, MLP 64-64-64-7, 75 to 2400 steps, six axes; levels are doublings",
    levels=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
)
def detection_grows_with_collapse(seeds: Seeds) -> Arms:
    columns, collapse = [], []
    for steps in STEPS:
        all_seen = _seen(seeds, steps=steps)
        columns.append(_auroc(all_seen, _neco(KNOWN - 1, True, False)))
        nc1 = [neural_collapse_metrics(seen.features()[0], seen.labels)["nc1"] for seen in all_seen]
        collapse.append({"steps": steps, "nc1": torch.stack(nc1).mean().item(), "nc5": _nc5(all_seen).mean().item()})
    return Arms(torch.stack(columns, 1), None, {"collapse": collapse})


def _nc5(all_seen: list[Seen]) -> Tensor:
    return torch.stack(
        [id_ood_orthogonality(seen.features()[0], seen.labels, seen.features()[1][seen.strange]) for seen in all_seen]
    )


@claim(
    says="Longer training makes unseen digits more orthogonal to the known classes: NC5 falls below 0.9 of what it was",
    kind="ratio",
    metric="deviation",
    margin=0.9,
    scale="mean |cos| of features of digits 7-9 with class means of 0-6, MLP 64-64-64-7, 2400 steps against 150",
)
def strangers_turn_orthogonal(seeds: Seeds) -> Arms:
    return Arms(_nc5(_seen(seeds, steps=2400)), _nc5(_seen(seeds, steps=150)))


@claim(
    says="Fully collapsed, with outsiders at right angles, NECO is 1 for every class and 0 for every outsider",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="simplex of 5 class means in 20 dimensions, turned at random, 40 copies each; 100 outsiders orthogonal to it",
)
def collapse_separates_exactly(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("directions"):
        basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
        means = (torch.eye(5, dtype=torch.float64) - 0.2) @ basis[:5]
        outside = torch.randn(100, 15, generator=generator, dtype=torch.float64) @ basis[5:]
        rows = torch.cat([means, outside])
        detector = NECO(components=4, standardize=False).fit(means.repeat(40, 1))
        axes = principal_axes(means.mT @ means)[1][:, :4]
        inside = (torch.arange(105) < 5).double()
        deviations += [detector.score_samples(rows) - inside, neco_score(rows, axes) - inside]
    return Arms(torch.stack(deviations))
