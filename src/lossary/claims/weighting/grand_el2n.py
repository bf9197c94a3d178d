"""EL2N and GraNd: does the hard half of the data do as well as all of it, and do early errors find wrong labels?

As in the official code, every arm trains for the same number of steps, whatever data it keeps. Scores are those of
five networks that were trained for three epochs, with initial weights and orders of their own.
"""

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import accuracy, auroc, cross_entropy, digits, fit, flip_labels, split, stacked_mlp
from lossary.weighting import el2n_score, grand_score, prune_by_score

SIZES, MODELS = (64, 64, 10), 5
RATES = (0.01, 0.03, 0.1, 0.3)


def _early_scores(seeds: Seeds, labels: Tensor, train: Tensor, models: int = MODELS) -> Tensor:
    """EL2N of the training rows, (S, n), after three epochs on these labels (S, n)."""
    data, logits = digits(), []
    steps = seeds.few(3 * train.shape[1] // 64)
    for k in range(1, models + 1):
        own = Seeds(tuple(i + k * 100_000 for i in seeds.ids))
        model = stacked_mlp(SIZES, own)
        x = data.x[train]
        fit(model, x, labels, loss=cross_entropy, seeds=own, steps=steps, lr=0.1)
        with torch.no_grad():
            logits.append(model(x))
    return el2n_score(torch.stack(logits), labels)


def _accuracy(seeds: Seeds, *, rows: str, lr: float) -> Tensor:
    """Test accuracy in percent, per seed, when trained on "all" rows, the "hard" half or a "random" half."""
    data = digits()
    parts = split(data, seeds)
    train = parts.train
    if rows == "hard":
        score = _early_scores(seeds, data.y[train], train)
        train = torch.stack([own[prune_by_score(s, keep=0.5)] for own, s in zip(train, score)])
    if rows == "random":
        half = round(0.5 * train.shape[1])
        picked = [torch.randperm(train.shape[1], generator=g)[:half] for g in seeds.torch("half")]
        train = train.gather(1, torch.stack(picked))
    model = stacked_mlp(SIZES, seeds)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, train=train, steps=seeds.few(400), lr=lr)
    return accuracy(model(data.x[parts.test]), data.y[parts.test])


def _compare(seeds: Seeds, baseline: str) -> Arms:
    hard, other = (tune(_accuracy, [{"rows": r, "lr": lr} for lr in RATES], seeds) for r in ("hard", baseline))
    return Arms(_accuracy(seeds, **hard), _accuracy(seeds, **other), {"method": hard, "baseline": other})


@claim(
    says="The half of the data with the largest EL2N classifies as well as all of it",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 8x8, EL2N of 5 MLPs 64-64-10 after 3 epochs, then 400 steps of 64; 4 learning rates each",
)
def el2n_halves_the_data_without_loss(seeds: Seeds) -> Arms:
    return _compare(seeds, "all")


@claim(
    says="The half of the data with the largest EL2N classifies better than a random half",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, EL2N of 5 MLPs 64-64-10 after 3 epochs, then 400 steps of 64; 4 learning rates each",
)
def el2n_beats_a_random_half(seeds: Seeds) -> Arms:
    return _compare(seeds, "random")


@claim(
    says="EL2N averaged over five networks finds wrong labels better than that of one network",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 10% of labels flipped, MLPs 64-64-10 after 3 epochs of 64, learning rate 0.1",
)
def averaged_el2n_finds_wrong_labels(seeds: Seeds) -> Arms:
    data = digits()
    train = split(data, seeds).train
    labels, wrong = (values.gather(1, train) for values in flip_labels(data.y, 0.1, seeds))
    five, one = (_early_scores(seeds, labels, train, models) for models in (MODELS, 1))
    return Arms(auroc(five, wrong), auroc(one, wrong))


@claim(
    says="In linear softmax regression the GraNd of a sample is its EL2N times sqrt(|x|^2 + 1)",
    kind="exact",
    metric="deviation",
    tolerance=1e-5,
    scale="digits 8x8, linear models after 50 steps of 64, all 1797 samples; relative deviation",
)
def grand_of_a_linear_model_is_scaled_el2n(seeds: Seeds) -> Arms:
    data, model = digits(), stacked_mlp((64, 10), seeds)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, steps=seeds.few(50))
    deviations = []
    for s in range(len(seeds)):
        linear: nn.Module = model.replica(s)
        expected = el2n_score(linear(data.x)[None], data.y) * (data.x.square().sum(1) + 1).sqrt()
        deviations.append((grand_score([linear], data.x, data.y) / expected - 1).abs().amax())
    return Arms(torch.stack(deviations))
