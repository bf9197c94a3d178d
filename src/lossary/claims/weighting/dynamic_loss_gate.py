"""Dynamic loss gate: does it train through wrong labels better than cross-entropy, and than a gate that stands still?

40% of the labels are wrong. All arms train on images with noise; the correction takes its labels from the images as
they are. As in the implementation read, the gate sets in after a few epochs and the correction after as many again.
The fixed gate is the predecessor's: log-losses up to a constant are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import accuracy, cross_entropy, digits, fit, flip_labels, per_seed, split, stacked_mlp
from lossary.weighting import DynamicLossGate, loss_gate_label_correction

SIZES, NOISE, BATCH = (64, 128, 10), 0.4, 64
RATES = (0.01, 0.03, 0.1, 0.3)
PLAIN = [{"lr": lr, "weight_decay": decay} for lr in RATES for decay in (0.0, 0.003)]
FIXED = [{"lr": lr, "gate": gate, "warmup": w} for lr in (0.03, 0.1) for gate in (0.0, 1.0) for w in (2, 4)]
DYNAMIC = [{"lr": lr, "warmup": w} for lr in RATES for w in (2, 4)]


class _Noisy(nn.Module):
    """A stack of models that sees its rows with noise in training, and notes its logits without."""

    def __init__(self, model: nn.Module, seeds: Seeds) -> None:
        super().__init__()
        self.model, self.generators = model, seeds.torch("augment")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.model(x)
        with torch.no_grad():
            self.clean = self.model(x)
        return self.model(x + 0.2 * torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.generators]))


class _Gated:
    """Loss and weighting of a stack of models with a gate for each: dynamic or, from its warm-up on, fixed."""

    def __init__(
        self, model: _Noisy, samples: int, seeds: Seeds, warmup: int, gate: float | None, correct: bool
    ) -> None:
        self.gates = per_seed(lambda _: DynamicLossGate(samples, warmup=warmup), seeds)
        self.model, self.gate, self.correct = model, gate, correct

    def over(self, warmups: int) -> bool:
        return bool(self.gates[0].epoch >= warmups * self.gates[0].warmup)

    def cut(self) -> Tensor:
        """Thresholds (S, 1), infinite during the warm-up."""
        if self.gate is None:
            return torch.stack([gate.threshold for gate in self.gates]).unsqueeze(1)
        return torch.full((len(self.gates), 1), self.gate if self.over(1) else torch.inf)

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        self.given = cross_entropy(input, target)
        if self.correct and self.over(2):
            return loss_gate_label_correction(input, target, clean=self.model.clean, threshold=self.cut())
        return self.given

    def weights(self, values: Tensor, *, index: Tensor) -> Tensor:
        given, corrected = self.given.detach(), self.correct and self.over(2)
        kept = (given.log() <= self.cut()).to(values.dtype)
        dynamic = self.gates(given, index=index)  # remembers the losses under the given labels
        if corrected:
            return torch.ones_like(values)
        return dynamic if self.gate is None else kept / kept.mean(1, keepdim=True).clamp(min=1 / BATCH)


def _accuracy(
    seeds: Seeds, *, arm: str, lr: float, weight_decay: float = 0.0, warmup: int = 0, gate: float | None = None
) -> Tensor:
    """Clean test accuracy in percent, per seed, of the arm "plain", "gated" or "corrected"."""
    data, model = digits(), _Noisy(stacked_mlp(SIZES, seeds), seeds)
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, NOISE, seeds)
    how: dict[str, Any] = {"loss": cross_entropy, "train": parts.train, "steps": seeds.few(400), "batch": BATCH}
    if arm != "plain":
        gated = _Gated(model, parts.train.shape[1], seeds, warmup, gate, arm == "corrected")
        how |= {"loss": gated.loss, "weighting": gated.weights}
    fit(model, data.x, labels, seeds=seeds, lr=lr, weight_decay=weight_decay, **how)
    return accuracy(model.eval()(data.x[parts.test]), data.y[parts.test])


def _compare(seeds: Seeds, method: tuple[str, list[dict]], baseline: tuple[str, list[dict]]) -> Arms:
    """Two (arm, grid) pairs, each at its best setting."""
    chosen, other = (tune(_accuracy, [{"arm": arm, **s} for s in grid], seeds) for arm, grid in (method, baseline))
    return Arms(_accuracy(seeds, **chosen), _accuracy(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="With wrong labels, dynamic loss gate and label correction classify better than cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, pixel noise of 0.2, MLP 64-128-10, 400 steps of 64; 8 settings each",
)
def gate_and_correction_beat_cross_entropy(seeds: Seeds) -> Arms:
    return _compare(seeds, ("corrected", DYNAMIC), ("plain", PLAIN))


@claim(
    says="With wrong labels, a dynamic loss gate classifies better than a fixed one",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, pixel noise of 0.2, MLP 64-128-10, 400 steps of 64; 8 settings each",
)
def a_dynamic_gate_beats_a_fixed_one(seeds: Seeds) -> Arms:
    return _compare(seeds, ("gated", DYNAMIC), ("gated", FIXED))


@claim(
    says="Behind a dynamic loss gate, correcting labels classifies better than dropping the samples",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, pixel noise of 0.2, MLP 64-128-10, 400 steps of 64; 8 settings each",
)
def correction_beats_dropping(seeds: Seeds) -> Arms:
    return _compare(seeds, ("corrected", DYNAMIC), ("gated", DYNAMIC))
