"""Compressed co-teaching: is it better than co-teaching, and than one network, when 40% of the labels are wrong?"""

import torch

from lossary.claims import Arms, Seeds, claim, tune
from lossary.roles import advance
from lossary.tasks import accuracy, cross_entropy, digits, fit, flip_labels, split, stacked_mlp
from lossary.weighting import CompressedCoTeaching

NOISE, SIZES = 0.4, (64, 128, 10)
RATES = (0.01, 0.03, 0.1, 0.3)
COMPRESSED = [{"sigma": sigma, "lr": lr} for sigma in (8.0, 24.0) for lr in (0.03, 0.1)]
UNCOMPRESSED = [{"sigma": None, "lr": lr} for lr in RATES]


def _pair(seeds: Seeds, *, sigma: float | None, lr: float) -> torch.Tensor:
    """Clean test accuracy in percent of two networks that teach each other, per seed; sigma None: uncompressed."""
    data = digits()
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, NOISE, seeds)
    second = Seeds(tuple(i + 1_000_000 for i in seeds.ids))  # for initial weights of its own
    networks = {"first": stacked_mlp(SIZES, seeds), "second": stacked_mlp(SIZES, second)}
    if sigma is None:
        pair = CompressedCoTeaching(*networks.values(), cross_entropy, label_noise=NOISE, gradual=100)
    else:
        facts = {"label_noise": NOISE}
        pair = CompressedCoTeaching.build(networks.__getitem__, cross_entropy, facts, sigma=sigma, gradual=100)
    optimizers = {"networks": torch.optim.SGD(pair.parameters(), lr=lr, momentum=0.9)}
    order, nested = seeds.torch("order"), seeds.torch("nested")
    for step in range(seeds.few(400)):
        drawn = torch.stack([torch.randint(parts.train.shape[1], (64,), generator=g) for g in order])
        rows = parts.train.gather(1, drawn)
        advance(pair, (data.x[rows], labels.gather(1, rows)), optimizers, step=step, generator=nested)
    with torch.no_grad():
        return accuracy(pair.eval()(data.x[parts.test]), data.y[parts.test])


def _single(seeds: Seeds, *, lr: float, informed: bool = False) -> torch.Tensor:
    """Clean test accuracy in percent of one network, per seed; informed: weights of 0 on the wrong labels."""
    data, model = digits(), stacked_mlp(SIZES, seeds)
    parts = split(data, seeds)
    labels, wrong = flip_labels(data.y, NOISE, seeds)

    def oracle(losses: torch.Tensor, *, index: torch.Tensor) -> torch.Tensor:
        return (~wrong.gather(1, parts.train.gather(1, index))).to(losses.dtype)

    how = {"train": parts.train, "steps": seeds.few(400), "lr": lr, "weighting": oracle if informed else None}
    fit(model, data.x, labels, loss=cross_entropy, seeds=seeds, **how)
    return accuracy(model(data.x[parts.test]), data.y[parts.test])


@claim(
    says="Co-teaching classifies better with nested dropout than without",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, two MLPs 64-128-10, 400 steps of 64; 4 settings each",
)
def compression_improves_co_teaching(seeds: Seeds) -> Arms:
    chosen, plain = tune(_pair, COMPRESSED, seeds), tune(_pair, UNCOMPRESSED, seeds)
    return Arms(_pair(seeds, **chosen), _pair(seeds, **plain), {"method": chosen, "baseline": plain})


@claim(
    says="Two networks with nested dropout that teach each other classify better than one trained with cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, MLPs 64-128-10, 400 steps of 64; 4 settings each",
)
def compressed_co_teaching_beats_cross_entropy(seeds: Seeds) -> Arms:
    chosen, plain = tune(_pair, COMPRESSED, seeds), tune(_single, [{"lr": lr} for lr in RATES], seeds)
    return Arms(_pair(seeds, **chosen), _single(seeds, **plain), {"method": chosen, "baseline": plain})


@claim(
    says="Control: weights that know the wrong labels beat none",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, MLP 64-128-10, 400 steps of 64, learning rate 0.1",
    control="planted",
)
def weights_that_know_the_wrong_labels_beat_none(seeds: Seeds) -> Arms:
    return Arms(_single(seeds, lr=0.1, informed=True), _single(seeds, lr=0.1))
