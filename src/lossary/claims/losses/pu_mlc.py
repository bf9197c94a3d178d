"""PU-MLC: does it rank better than cross-entropy where positives are missing, and the more so the more are missing?

Pictures show one to three of ten digits; in training half of the labels is missing, unless said otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import pu_mixup_consistency, pu_multilabel_loss
from lossary.tasks import digit_sets, fit, hide_positives, mean_average_precision, per_seed, stacked_mlp

COLD, WARM = (0.001, 0.003, 0.01), (0.01, 0.03, 0.1)
PLAIN = [{"pos_weight": weight, "lr": lr} for weight in (1.0, 4.0) for lr in WARM]
PU = [{"gamma": gamma, "lr": lr} for gamma in (0.55, 0.85) for lr in COLD]
NO_FACTOR = [{"gamma": 0.0, "alpha": alpha, "lr": lr} for alpha in (1.0, 2.0) for lr in COLD]


def _cross_entropy(pos_weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    weight = torch.tensor(pos_weight)
    return lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none", pos_weight=weight).sum(-1)


def _consistency(generator: Generator) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """All seeds at once, which share mixing weights and order: rows lead, and the sum over labels goes over seeds."""

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def rows_first(rows: Tensor) -> Tensor:
            return model(rows.transpose(0, 1)).transpose(0, 1).flatten(1)

        x = x.transpose(0, 1)
        return pu_mixup_consistency(rows_first, x, y.transpose(0, 1).flatten(1), rows_first(x), generator=generator)

    return penalty


def _precision(seeds: Seeds, *, lr: float, missing: float = 0.5, pos_weight: float | None = None, **pu) -> Tensor:
    """Mean average precision in percent on the test pictures, per seed."""
    train, test = digit_sets(seeds, seeds.few(2000, smoke=100), test=seeds.few(1000, smoke=100))
    marked, model = hide_positives(train.y, missing, seeds), stacked_mlp((256, 64, 10), seeds)
    if pos_weight is None:
        loss = per_seed(lambda s: lambda z, y: pu_multilabel_loss(z, y, **pu), seeds)
        penalty = _consistency(seeds.torch("mixup")[0])
    else:
        loss, penalty = _cross_entropy(pos_weight), None
    fit(model, train.x, marked, loss=loss, penalty=penalty, seeds=seeds, steps=seeds.few(300), batch=128, lr=lr)
    return mean_average_precision(model(test.x), test.y)


@claim(
    says="With half of the positives missing, PU-MLC ranks better than weighted or plain cross-entropy",
    kind="superiority",
    metric="average precision",
    scale="2000 digit sets, half of the labels missing, MLP 256-64-10, 300 steps of 128; 6 settings each",
)
def pu_mlc_beats_cross_entropy(seeds: Seeds) -> Arms:
    pu, plain = tune(_precision, PU, seeds), tune(_precision, PLAIN, seeds)
    return Arms(_precision(seeds, **pu), _precision(seeds, **plain), {"method": pu, "baseline": plain})


@claim(
    says="PU-MLC ranks better with its re-balance factor than without",
    kind="superiority",
    metric="average precision",
    scale="2000 digit sets, half of the labels missing, MLP 256-64-10, 300 steps of 128; 6 settings each",
)
def the_factor_helps(seeds: Seeds) -> Arms:
    pu, bare = tune(_precision, PU, seeds), tune(_precision, NO_FACTOR, seeds)
    return Arms(_precision(seeds, **pu), _precision(seeds, **bare), {"method": pu, "baseline": bare})


@claim(
    says="The lead of PU-MLC over cross-entropy grows with the share of positives that are missing",
    kind="trend",
    metric="average precision",
    levels=(0.0, 0.6),
    scale="2000 digit sets, MLP 256-64-10, 300 steps of 128; lead in points; 6 settings each, chosen with half missing",
)
def the_lead_grows_with_missing_labels(seeds: Seeds) -> Arms:
    pu, plain = tune(_precision, PU, seeds), tune(_precision, PLAIN, seeds)
    leads = [_precision(seeds, missing=rate, **pu) - _precision(seeds, missing=rate, **plain) for rate in (0.0, 0.6)]
    return Arms(torch.stack(leads, 1), details={"method": pu, "baseline": plain})


@claim(
    says="Without factor and temperature the loss is stationary where scores are proportional to the true probability",
    kind="exact",
    metric="deviation",
    tolerance=1e-12,
    scale="20 kinds of samples with 1 to 20 rows each, some positive, scores 0.1 to 0.9 of the truth; largest slope",
)
def scores_proportional_to_the_truth_are_stationary(seeds: Seeds) -> Arms:
    slopes = []
    for rng in seeds.numpy("kinds"):
        rows = rng.integers(1, 21, 20)
        positive = rng.integers(1, rows + 1)
        kind = torch.arange(20).repeat_interleave(torch.from_numpy(rows))
        marked = torch.cat([torch.arange(int(n)) < int(k) for n, k in zip(rows, positive)]).double().unsqueeze(1)
        for scale in (0.1, 0.5, 0.9):
            z = torch.from_numpy(scale * positive / rows).logit().requires_grad_()
            value = pu_multilabel_loss(z[kind].unsqueeze(1), marked, alpha=1e6, gamma=0.0).mean()
            slopes.append(torch.autograd.grad(value, z)[0].abs().max())
    return Arms(torch.stack(slopes).view(len(seeds), -1))
