"""Predictable extrapolation: do networks return to the best constant answer as digits turn into noise?

Digits of a long tail of classes are mixed with Gaussian noise, more and more, always keeping the length of the
image. The best constant answer is the classes' shares in training; it differs from equal shares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.ood import (
    abstention_rewards,
    distance_to_ocs,
    extrapolation_table,
    ocs_abstention_policy,
    optimal_constant_solution,
)
from lossary.tasks import cross_entropy, digits, fit, long_tail, split, stacked_mlp

SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
COST = 4.0


def _shifted(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Test digits at each severity (S, L, n, 64), their labels (S, n), and training rows of a long tail (S, m)."""
    data, parts = digits(), split(digits(), seeds)
    train = long_tail(data.y, 10.0, seeds, rows=parts.train)
    x = data.x[parts.test]
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in seeds.torch("noise")])
    length = x.norm(dim=-1, keepdim=True)
    noise = length * F.normalize(noise, dim=-1)
    mixed = torch.stack([F.normalize((1 - a) * x + a * noise, dim=-1) for a in SEVERITIES], 1)
    return length.unsqueeze(1) * mixed, data.y[parts.test], train


def _classifiers(seeds: Seeds, train: Tensor, lr: float = 0.05) -> nn.Module:
    data, model = digits(), stacked_mlp((64, 128, 128, 10), seeds)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=train, steps=seeds.few(600), lr=lr)
    return model


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of all severities at once, (S, L, n, C)."""
    with torch.no_grad():
        return model(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def _distances(logits: Tensor, constants: Tensor) -> Tensor:
    """Mean distance to each seed's constant at each severity, (S, L)."""
    return torch.stack(
        [torch.stack([distance_to_ocs(z, c).mean() for z in of_seed]) for of_seed, c in zip(logits, constants)]
    )


def _shares(train: Tensor) -> Tensor:
    return torch.stack([optimal_constant_solution(digits().y[rows], classes=10) for rows in train])


@claim(
    says="The more noise an image has, the nearer a classifier's answer is to the classes' shares in training",
    kind="trend",
    metric="log-loss",
    scale="KL to the shares, digits 8x8 tail of 10:1, noise 0 to 1 at fixed length, MLP 64-128-128-10, 600 steps",
    levels=(0.0, 0.25, 0.5, 0.75, 1.0),
)
def answers_drift_to_the_constant(seeds: Seeds) -> Arms:
    x, _, train = _shifted(seeds)
    return Arms(_distances(_logits(_classifiers(seeds, train), x), _shares(train)))


@claim(
    says="On pure noise a classifier's answer is nearer to the classes' shares in training than to equal shares",
    kind="superiority",
    metric="log-loss",
    scale="KL to either, Gaussian noise as long as digits, trained on a tail of 10:1, MLP 64-128-128-10, 600 steps",
)
def noise_gets_the_shares(seeds: Seeds) -> Arms:
    x, _, train = _shifted(seeds)
    logits, shares = _logits(_classifiers(seeds, train), x[:, -1:]), _shares(train)
    equal = torch.full_like(shares, 0.1)
    return Arms(_distances(logits, shares)[:, 0], _distances(logits, equal)[:, 0])


@claim(
    says="What the last layer makes of pure noise is smaller than 0.9 of what it makes of digits of the same length",
    kind="ratio",
    metric="deviation",
    margin=0.9,
    scale="mean ||W h|| without bias, digits 8x8 with a tail of 10:1, MLP 64-128-128-10, 600 steps",
)
def features_fade(seeds: Seeds) -> Arms:
    x, _, train = _shifted(seeds)
    model, shares = _classifiers(seeds, train), _shares(train)
    tables = [
        extrapolation_table(model.replica(s), dict(zip(SEVERITIES, x[s])), shares[s], layers=["0", "2", "4"])
        for s in range(len(seeds))
    ]
    ratios = torch.tensor([table[-1]["4"] for table in tables])
    return Arms(ratios, torch.ones_like(ratios), {"first seed": tables[0]})


def _cost(actions: Tensor, y: Tensor) -> Tensor:
    """1 for a mistake, 0.2 for abstaining, -1; mean over severities and images, per seed: (1 - reward) / 5."""
    wrong = (actions != y.unsqueeze(1)).double()
    return torch.where(actions < 0, 1 / (1 + COST), wrong).flatten(1).mean(1)


def _by_reward(seeds: Seeds, *, lr: float) -> Tensor:
    """Of networks that predict rewards and take the best action."""
    x, y, train = _shifted(seeds)
    data, model = digits(), stacked_mlp((64, 128, 128, 11), seeds)
    rewards = abstention_rewards(data.y, 10, cost=COST)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(-1)

    fit(model, data.x, rewards, loss=loss, seeds=seeds, train=train, steps=seeds.few(600), lr=lr)
    predicted = _logits(model, x)
    return _cost(ocs_abstention_policy(predicted.flatten(0, 2)).view(predicted.shape[:3]), y)


def _by_confidence(seeds: Seeds, *, lr: float, threshold: float) -> Tensor:
    """Of classifiers that abstain where the largest probability is below the threshold; 0.8 is Chow's rule."""
    x, y, train = _shifted(seeds)
    confidence, answer = _logits(_classifiers(seeds, train, lr), x).softmax(-1).max(-1)
    return _cost(torch.where(confidence < threshold, -1, answer), y)


@claim(
    says="Where noise grows, choosing by predicted reward costs less than a classifier that abstains when unsure",
    kind="superiority",
    metric="risk",
    scale="mistake 1, abstaining 0.2; digits 8x8, tail 10:1, noise 0 to 1, MLP 64-128-128, 600 steps; 4 settings each",
)
def predicted_rewards_make_cautious(seeds: Seeds) -> Arms:
    ours = [{"lr": lr} for lr in (0.02, 0.05, 0.1, 0.2)]
    theirs = [{"lr": lr, "threshold": threshold} for lr in (0.02, 0.05) for threshold in (0.8, 0.95)]
    method, baseline = (
        tune(_by_reward, ours, seeds, better="lower"),
        tune(_by_confidence, theirs, seeds, better="lower"),
    )
    return Arms(
        _by_reward(seeds, **method), _by_confidence(seeds, **baseline), {"method": method, "baseline": baseline}
    )
