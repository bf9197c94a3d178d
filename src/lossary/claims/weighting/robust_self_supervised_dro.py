"""Robust self-supervised training on the paper's Gaussians: what are unlabelled samples worth to a linear classifier?

Labelled rows come from N(y mu, I) with |mu| = 1, unlabelled ones from N(y mu', I) with mu' half a unit away from mu;
the best classifier is right on Phi(1) = 84% of the rows. All arms minimise over full batches with Adam.
"""

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import StackedLinear, cross_entropy
from lossary.weighting import RobustSelfTrainingLoss, linear_surrogate_loss

DIMENSIONS, LABELLED, UNLABELLED, SHIFT, RESTARTS, STEPS = 50, 10, 2000, 0.5, 8, 60
ROBUST = [
    {"gamma": gamma, "gamma_unlabeled": share * gamma, "lam": lam}
    for gamma in (0.3, 1.0)
    for share in (0.3, 0.9)
    for lam in (1.0, 10.0)
]
ERM = [{"gamma": gamma} for gamma in (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0)]
SELF = [{"decay": decay, "rounds": rounds} for decay in (0.01, 0.1, 1.0, 10.0) for rounds in (3, 10)]


def _rows(seeds: Seeds, unlabelled: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labelled x and y, unlabelled x, and mu: (S, m, d), (S, m), (S, n, d), (S, d)."""
    drawn = []
    for g in seeds.torch("rows"):
        mean, away = (v / v.norm() for v in torch.randn(2, DIMENSIONS, generator=g))
        y, hidden = (torch.randint(2, (n,), generator=g) for n in (LABELLED, UNLABELLED))
        x, new = (torch.randn(n, DIMENSIONS, generator=g) for n in (LABELLED, UNLABELLED))
        x += torch.outer(2.0 * y - 1, mean)
        new += torch.outer(2.0 * hidden - 1, mean + SHIFT * away)
        drawn.append((x, y, new[:unlabelled], mean))
    x, y, new, mean = (torch.stack(tensors) for tensors in zip(*drawn))
    return x, y, new, mean


def _classifier(generators: list[Generator]) -> StackedLinear:
    """Linear classifiers through the origin, as in the paper."""
    model = StackedLinear(DIMENSIONS, 2, generators=generators)
    nn.init.zeros_(model.bias.requires_grad_(False))
    return model


def _accuracy(model: StackedLinear, mean: Tensor) -> Tensor:
    """Accuracy in percent on N(y mu, I), exactly: the probability that y w.x > 0."""
    weight = model.weight[:, 1] - model.weight[:, 0]
    return 100 * torch.special.ndtr((weight * mean).sum(1) / weight.norm(dim=1)).detach()


def _robust(
    seeds: Seeds, *, gamma: float, gamma_unlabeled: float = 1.0, lam: float = 0.0, unlabelled: int = UNLABELLED
) -> Tensor:
    """Accuracy of the restart with the lowest objective, per seed; lam = 0 learns from the labelled rows alone."""
    drawn = _rows(seeds, unlabelled if lam else 0)
    x, y, new, mean = (tensor.repeat_interleave(RESTARTS, dim=0) for tensor in drawn)
    model = _classifier([g for g in seeds.torch("init") for _ in range(RESTARTS)])
    objective = RobustSelfTrainingLoss(
        gamma=gamma, gamma_unlabeled=gamma_unlabeled, lam=lam, surrogate=linear_surrogate_loss
    )
    optimizer = torch.optim.Adam([model.weight], lr=0.07)
    for _ in range(seeds.few(STEPS)):
        optimizer.zero_grad()
        objective(model, x, y, new).sum().backward()
        optimizer.step()
    best = objective(model, x, y, new).view(-1, RESTARTS).argmin(1, keepdim=True)
    return _accuracy(model, mean).view(-1, RESTARTS).gather(1, best).squeeze(1)


def _self_trained(seeds: Seeds, *, decay: float, rounds: int) -> Tensor:
    """Accuracy of logistic regression that learns from its own labels for the unlabelled rows, round after round."""
    x, y, new, mean = _rows(seeds, UNLABELLED)
    model, rows, labels = _classifier(seeds.torch("init")), x, y
    for _ in range(seeds.few(rounds, smoke=2)):
        optimizer = torch.optim.Adam([model.weight], lr=0.07)
        for _ in range(seeds.few(STEPS)):
            optimizer.zero_grad()
            penalty = decay * model.weight.square().sum() / 2
            (cross_entropy(model(rows), labels).mean(1).sum() + penalty).backward()
            optimizer.step()
        rows, labels = torch.cat([x, new], 1), torch.cat([y, model(new).argmax(-1)], 1)
    return _accuracy(model, mean)


@claim(
    says="With unlabelled rows of a shifted distribution, robust self-training classifies better than without",
    kind="superiority",
    metric="accuracy",
    scale="N(+-mu, I) in 50 dimensions, |mu| = 1, 10 labelled and 2000 unlabelled rows with mu shifted by 0.5, linear"
    " classifier; 8 settings each",
)
def unlabelled_rows_beat_none(seeds: Seeds) -> Arms:
    robust, labelled = tune(_robust, ROBUST, seeds), tune(_robust, ERM, seeds)
    return Arms(_robust(seeds, **robust), _robust(seeds, **labelled), {"method": robust, "baseline": labelled})


@claim(
    says="Robust self-training classifies better than logistic regression that learns from its own labels",
    kind="superiority",
    metric="accuracy",
    scale="N(+-mu, I) in 50 dimensions, |mu| = 1, 10 labelled and 2000 unlabelled rows with mu shifted by 0.5, linear"
    " classifiers; 8 settings each",
)
def robust_beats_plain_self_training(seeds: Seeds) -> Arms:
    robust, plain = tune(_robust, ROBUST, seeds), tune(_self_trained, SELF, seeds)
    return Arms(_robust(seeds, **robust), _self_trained(seeds, **plain), {"method": robust, "baseline": plain})


@claim(
    says="Robust self-training classifies the better, the more unlabelled rows there are",
    kind="trend",
    metric="accuracy",
    levels=(1.3, 2.3, 3.3),
    scale="N(+-mu, I) in 50 dimensions, |mu| = 1, 10 labelled rows and 20, 200 or 2000 unlabelled ones, by log10, with"
    " mu shifted by 0.5, linear classifier; 8 settings at 2000",
)
def more_unlabelled_rows_are_better(seeds: Seeds) -> Arms:
    robust = tune(_robust, ROBUST, seeds)
    climb = [_robust(seeds, **robust, unlabelled=n) for n in (20, 200, 2000)]
    return Arms(torch.stack(climb, 1), details={"method": robust})
