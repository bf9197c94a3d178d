"""GOL: do Gumbel scores find rare classes among mostly background better than sigmoids, and at what price?

A proposal is a point in 32 dimensions near its class's mean; nine of ten are background, half of those halfway to some
class. Objects of 50 classes form a Zipf tail in training, and are alike frequent in the test, whose classes count as
rare, common and frequent by their rank. Every arm starts with scores of 0.001 and has five learning rates.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.detection import gumbel_binary_cross_entropy, gumbel_optimized_loss
from lossary.tasks import fit, mean_average_precision, per_seed, stacked_mlp

CLASSES = 50
RATES = [{"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3, 1.0)]
RANKS = {"frequent": slice(0, 10), "common": slice(10, 25), "rare": slice(25, 50), "all": slice(0, 50)}
BIAS = {"sigmoid": math.log(0.001 / 0.999), "gumbel": -math.log(-math.log(0.001))}


@cache
def _proposals(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (S, n, 32) and classes (S, n), 50 for background, to train and to test."""
    parts: list[list[np.ndarray]] = [[], [], [], []]
    zipf = 1 / np.arange(1, CLASSES + 1)
    for rng in seeds.numpy("proposals"):
        means = rng.standard_normal((CLASSES, 32))
        means *= 4 / np.linalg.norm(means, axis=1, keepdims=True)
        drawn = [rng.choice(CLASSES, seeds.few(1200, smoke=60), p=zipf / zipf.sum())]
        drawn.append(np.repeat(np.arange(CLASSES), seeds.few(20, smoke=2)))
        for place, objects in enumerate(drawn):
            near = rng.integers(CLASSES, size=9 * len(objects))
            ground = means[near] * rng.choice([0.0, 0.5], (len(near), 1))
            x = np.concatenate([means[objects], ground])
            parts[2 * place].append(x + rng.standard_normal(x.shape))
            parts[2 * place + 1].append(np.concatenate([objects, np.full(len(near), CLASSES)]))
    x, y, unseen, true = (np.stack(part) for part in parts)
    return torch.from_numpy(x).float(), torch.from_numpy(y), torch.from_numpy(unseen).float(), torch.from_numpy(true)


def _one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES + 1)[..., :-1].float()


@cache
def _scores(seeds: Seeds, arm: str, lr: float) -> Tensor:
    """Logits (S, m, 50) of the test proposals after training with "sigmoid", "gumbel" or "gumbel drop"."""
    x, y, unseen, _ = _proposals(seeds)
    model = stacked_mlp((32, 64, CLASSES), seeds)
    with torch.no_grad():
        model[-1].bias.fill_(BIAS[arm.split()[0]])
    losses = {
        "sigmoid": lambda z, t: F.binary_cross_entropy_with_logits(z, _one_hot(t), reduction="none").sum(-1),
        "gumbel": lambda z, t: gumbel_binary_cross_entropy(z, _one_hot(t)),
        "gumbel drop": _dropped(seeds, y),
    }
    fit(model, x, y, loss=losses[arm], seeds=seeds, steps=seeds.few(600), batch=256, lr=lr)
    with torch.no_grad():
        return model(unseen)


def _dropped(seeds: Seeds, y: Tensor):  # type: ignore[no-untyped-def]
    """The full loss, each seed with its own draws; rare are the classes from the 26th on."""
    rare = torch.arange(CLASSES) >= 25
    generators = seeds.torch("dropped")
    return per_seed(lambda s: lambda z, t: gumbel_optimized_loss(z, t, rare, generator=generators[s]), seeds)


def _ap(seeds: Seeds, *, arm: str, lr: float, ranks: str = "all") -> Tensor:
    """Mean average precision in percent over the classes of these ranks, per seed."""
    true = _one_hot(_proposals(seeds)[3])
    return mean_average_precision(_scores(seeds, arm, lr)[..., RANKS[ranks]], true[..., RANKS[ranks]])


def _compare(seeds: Seeds, method: str, baseline: str, ranks: str) -> Arms:
    """Learning rates are chosen by the average precision of all classes."""
    chosen, other = (tune(_ap, [{"arm": arm, **rate} for rate in RATES], seeds) for arm in (method, baseline))
    return Arms(
        _ap(seeds, **chosen, ranks=ranks),
        _ap(seeds, **other, ranks=ranks),
        {"method": chosen, "baseline": other, "all": [float(_ap(seeds, **arm).mean()) for arm in (chosen, other)]},
    )


@claim(
    says="Among mostly background, the Gumbel loss finds rare classes better than the sigmoid's",
    kind="superiority",
    metric="average precision",
    scale="12000 proposals, 90% background, 50 Zipf classes, MLP 32-64-50, 600 steps of 256; 5 learning rates each",
)
def gumbel_beats_sigmoid_on_rare_classes(seeds: Seeds) -> Arms:
    return _compare(seeds, "gumbel", "sigmoid", "rare")


@claim(
    says="Over all classes too, the Gumbel loss finds more",
    kind="superiority",
    metric="average precision",
    scale="12000 proposals, 90% background, 50 Zipf classes, MLP 32-64-50, 600 steps of 256; 5 learning rates each",
)
def gumbel_beats_sigmoid_overall(seeds: Seeds) -> Arms:
    return _compare(seeds, "gumbel", "sigmoid", "all")


@claim(
    says="Frequent classes lose nothing",
    kind="noninferiority",
    metric="average precision",
    scale="12000 proposals, 90% background, 50 Zipf classes, MLP 32-64-50, 600 steps of 256; 5 learning rates each",
)
def frequent_classes_lose_nothing(seeds: Seeds) -> Arms:
    return _compare(seeds, "gumbel", "sigmoid", "frequent")


@claim(
    says="Sparing rare classes most of their negatives finds more of them than the Gumbel loss alone",
    kind="superiority",
    metric="average precision",
    scale="12000 proposals, 90% background, 50 Zipf classes, MLP 32-64-50, 600 steps of 256; 5 learning rates each",
)
def dropping_adds_on_rare_classes(seeds: Seeds) -> Arms:
    return _compare(seeds, "gumbel drop", "gumbel", "rare")
