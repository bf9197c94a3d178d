"""Group DRO: does it help the worst group, and only together with regularisation, as the paper says?

As in the paper, its batches are drawn from all groups equally often, so it also has to stand against such batches
alone. Every arm chooses its settings by the worst group's accuracy.
"""

from typing import Any

import torch
from torch.utils.data import WeightedRandomSampler

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import cross_entropy, fit, per_seed, spurious_groups, stacked_mlp, worst_group_accuracy
from lossary.weighting import GroupDRO

DECAY = [{"lr": lr, "weight_decay": decay} for lr in (0.03, 0.1) for decay in (0.003, 0.01, 0.03)]
NO_DECAY = [{"lr": lr, "weight_decay": 0.0} for lr in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)]


def _worst_group(seeds: Seeds, *, arm: str, lr: float, weight_decay: float) -> torch.Tensor:
    """Worst-group test accuracy in percent, per seed, of "plain" training, "balanced" batches or group "dro"."""
    train, test = spurious_groups(seeds)
    model = stacked_mlp((64, 128, 2), seeds)
    how: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "steps": seeds.few(400)}
    if arm != "plain":
        rarity = [(1 / group.bincount()[group]).tolist() for group in train.group]
        draws = zip(rarity, seeds.torch("balanced"))
        how["selector"] = [WeightedRandomSampler(chance, len(chance), generator=g) for chance, g in draws]
    if arm == "dro":
        how["weighting"] = per_seed(lambda _: GroupDRO(4), seeds)
    fit(model, train.x, train.y, group=train.group, loss=cross_entropy, seeds=seeds, **how)
    return worst_group_accuracy(model(test.x), test.y, test.group)


def _compare(seeds: Seeds, method: tuple[str, list[dict]], baseline: tuple[str, list[dict]]) -> Arms:
    """Two (arm, grid) pairs, each at its best setting."""
    chosen, other = (
        tune(_worst_group, [{"arm": arm, **setting} for setting in grid], seeds) for arm, grid in (method, baseline)
    )
    return Arms(_worst_group(seeds, **chosen), _worst_group(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="With weight decay, group DRO serves the worst group better than plain training with weight decay",
    kind="superiority",
    metric="worst-group accuracy",
    scale="digits odd or even, bright corner agreeing in 95%, MLP 64-128-2, 400 steps of 64; 6 settings each",
)
def group_dro_beats_plain_training(seeds: Seeds) -> Arms:
    return _compare(seeds, ("dro", DECAY), ("plain", DECAY))


@claim(
    says="With weight decay, group DRO serves the worst group better than balanced batches with weight decay",
    kind="superiority",
    metric="worst-group accuracy",
    scale="digits odd or even, bright corner agreeing in 95%, MLP 64-128-2, 400 steps of 64; 6 settings each",
)
def group_dro_beats_balanced_batches(seeds: Seeds) -> Arms:
    return _compare(seeds, ("dro", DECAY), ("balanced", DECAY))


@claim(
    says="Group DRO serves the worst group better with weight decay than without",
    kind="superiority",
    metric="worst-group accuracy",
    scale="digits odd or even, bright corner agreeing in 95%, MLP 64-128-2, 400 steps of 64; 6 settings each",
)
def group_dro_needs_weight_decay(seeds: Seeds) -> Arms:
    return _compare(seeds, ("dro", DECAY), ("dro", NO_DECAY))


@claim(
    says="Without weight decay, group DRO serves the worst group no better and no worse than plain training",
    kind="equality",
    metric="worst-group accuracy",
    scale="digits odd or even, bright corner agreeing in 95%, MLP 64-128-2, 400 steps of 64; 6 settings each",
)
def group_dro_without_decay_equals_plain_training(seeds: Seeds) -> Arms:
    return _compare(seeds, ("dro", NO_DECAY), ("plain", NO_DECAY))
