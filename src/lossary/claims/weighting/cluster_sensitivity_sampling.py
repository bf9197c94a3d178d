"""Sensitivity sampling: does it estimate the mean loss better than chance, and does training on its subset pay?

A digit's embedding is its projection on 20 principal components; the losses are those of an MLP trained briefly on a
sixth of the images. Errors of estimates are exact, from the formula for the variance of a weighted mean.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import accuracy, cross_entropy, digits, fit, per_seed, split, stacked_mlp
from lossary.weighting import ClusterSensitivitySampler, sensitivity_probabilities

RATES = (0.003, 0.01, 0.03, 0.1)
CLUSTERS, SIZE = 50, 100


def _embedded() -> Tensor:
    x = digits().x.double()
    x = x - x.mean(0)
    return x @ torch.linalg.svd(x, full_matrices=False).Vh[:20].T


def _beginning(seeds: Seeds) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A briefly trained model, the rows it was not trained on (S, n), its losses there, and the test rows."""
    data, model, parts = digits(), stacked_mlp((64, 64, 10), seeds), split(digits(), seeds)
    sixth = torch.arange(parts.train.shape[1]) % 6 == 0
    known, rest = parts.train[:, sixth], parts.train[:, ~sixth]
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=known, steps=seeds.few(60))
    with torch.no_grad():
        return model, rest, cross_entropy(model(data.x[rest]), data.y[rest]).double(), parts.test


def _samplers(seeds: Seeds, rest: Tensor, losses: Tensor, size: int, **how: float) -> list[ClusterSensitivitySampler]:
    embedded, clusters = _embedded(), seeds.few(CLUSTERS)
    return [
        ClusterSensitivitySampler(
            embedded[rows], lambda at, own=own: own[at], size=size, num_clusters=clusters, generator=generator, **how
        )
        for rows, own, generator in zip(rest, losses, seeds.torch("subset"))
    ]


def _error(losses: Tensor, p: Tensor) -> float:
    """Relative standard error of the mean loss estimated from SIZE weighted draws."""
    second = torch.where(p > 0, losses**2 / p, 0.0).sum() / losses.sum() ** 2
    return float(((second - 1) / SIZE) ** 0.5)


def _uniform_error(losses: Tensor, size: int) -> float:
    """The same from `size` uniform draws without replacement."""
    return float(losses.std() / losses.mean() * (1 / size - 1 / len(losses)) ** 0.5)


def _errors(seeds: Seeds, **how: float) -> tuple[NDArray, Tensor]:
    _, rest, losses, _ = _beginning(seeds)
    samplers = _samplers(seeds, rest, losses, SIZE, **how)
    return np.array([_error(own, s.probabilities.double()) for own, s in zip(losses, samplers)]), losses


@claim(
    says="A subset drawn by sensitivity has at most 0.9 of the error of a uniform one of its size in the mean loss",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="1122 digits, 20 principal components, losses of a briefly trained MLP, 50 clusters, 100 draws",
)
def sensitivity_estimates_better_than_uniform(seeds: Seeds) -> Arms:
    method, losses = _errors(seeds)
    return Arms(method, np.array([_uniform_error(own, SIZE) for own in losses]))


@claim(
    says="It still has at most 0.9 of the error when the uniform subset may be larger by the centres that were asked",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="1122 digits, 20 principal components, losses of a briefly trained MLP, 50 clusters, 100 draws or 150",
)
def sensitivity_pays_for_its_questions(seeds: Seeds) -> Arms:
    method, losses = _errors(seeds)
    return Arms(method, np.array([_uniform_error(own, SIZE + CLUSTERS) for own in losses]))


@claim(
    says="The distance to the centre matters: without it the error is larger, at most 0.9 is left with it",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="1122 digits, 20 principal components, losses of a briefly trained MLP, 50 clusters, 100 draws",
)
def distances_matter(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds)[0], _errors(seeds, holder=0.0)[0])


@claim(
    says="Of a loss that is Lipschitz no weighted sample exceeds the mean loss plus twice lambda Phi_k / n",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="1797 digits, 20 principal components, distance to a random point as loss, 5 to 80 random centres",
)
def no_weighted_sample_exceeds_its_bound(seeds: Seeds) -> Arms:
    embedded, excess = _embedded(), []
    for generator in seeds.torch("centres"):
        losses = (embedded - torch.randn(20, generator=generator, dtype=torch.float64)).norm(dim=1)
        for k in (5, 20, 80):
            centres = torch.randperm(len(embedded), generator=generator)[:k]
            p = sensitivity_probabilities(embedded, centres, losses[centres], holder=1.0, exponent=1.0)
            cost = torch.cdist(embedded, embedded[centres]).amin(1).mean()
            largest = (losses / (len(p) * p)).max()
            excess.append(max(0.0, float(largest / (losses.mean() + 2 * cost)) - 1))
    return Arms(np.array(excess))


def _continued(seeds: Seeds, *, arm: str, lr: float) -> Tensor:
    """Test accuracy in percent after training goes on for 200 steps on a subset, per seed.

    "sensitivity" draws 100 rows and weighs them, "uniform" takes 150 at random.
    """
    data = digits()
    model, rest, losses, test = _beginning(seeds)
    how = {"loss": cross_entropy, "seeds": seeds, "steps": seeds.few(200), "lr": lr}
    if arm == "sensitivity":
        drawn = _samplers(seeds, rest, losses, SIZE)
        fit(model, data.x, data.y, train=rest, selector=drawn, weighting=per_seed(drawn.__getitem__, seeds), **how)
    else:
        picks = [torch.randperm(rest.shape[1], generator=g)[: SIZE + CLUSTERS] for g in seeds.torch("subset")]
        fit(model, data.x, data.y, train=rest.gather(1, torch.stack(picks)), **how)
    return accuracy(model(data.x[test]), data.y[test])


@claim(
    says="A model trained on classifies better after a subset by sensitivity than after a uniform one",
    kind="superiority",
    metric="accuracy",
    scale="digits, MLP 64-64-10 begun on 225 labels; 100 rows and 50 centres against 150; 200 steps, 4 rates each",
)
def sensitivity_subset_trains_better(seeds: Seeds) -> Arms:
    method, baseline = (
        tune(_continued, [{"arm": arm, "lr": lr} for lr in RATES], seeds) for arm in ("sensitivity", "uniform")
    )
    return Arms(_continued(seeds, **method), _continued(seeds, **baseline), {"method": method, "baseline": baseline})


def _excess(seeds: Seeds, *, scores: str) -> NDArray:
    """Excess of the mean squared error of least squares on 100 weighted rows over that on all 2000, per seed."""
    found, n = [], seeds.few(2000, smoke=300)
    for rng, generator in zip(seeds.numpy("regression"), seeds.torch("rows")):
        a = rng.standard_t(4, (n, 10))
        b = a @ rng.standard_normal(10) + rng.standard_normal(n)
        best = np.mean((b - a @ np.linalg.lstsq(a, b)[0]) ** 2)
        leverage = torch.from_numpy(np.linalg.qr(a)[0] ** 2).sum(1)

        def residuals(centres: Tensor, a: NDArray = a, b: NDArray = b) -> Tensor:
            start = np.linalg.lstsq(a[centres], b[centres])[0]
            return torch.from_numpy((b - a @ start)[centres] ** 2)

        errors = []
        for _ in range(seeds.few(8, smoke=2)):
            if scores == "leverage":
                at = leverage.multinomial(SIZE, replacement=True, generator=generator)
                weight = leverage.sum() / (n * leverage)
            else:
                rows = torch.from_numpy(np.column_stack([a, b]))
                made = ClusterSensitivitySampler(rows, residuals, size=SIZE, num_clusters=CLUSTERS, generator=generator)
                at, weight = made.positions, made.weights.double()
            root = weight[at].sqrt().numpy()
            solution = np.linalg.lstsq(root[:, None] * a[at], root * b[at])[0]
            errors.append(np.mean((b - a @ solution) ** 2) / best - 1)
        found.append(np.mean(errors))
    return np.array(found)


@claim(
    says="On least squares sensitivity sampling loses at most 1.1 times what leverage scores lose",
    kind="ratio",
    metric="suboptimality",
    margin=1.1,
    scale="2000 rows, 10 features of Student's t4, 50 clusters of (x, y), 100 weighted rows, 8 subsets a seed",
)
def sensitivity_matches_leverage_scores(seeds: Seeds) -> Arms:
    return Arms(_excess(seeds, scores="sensitivity"), _excess(seeds, scores="leverage"))
