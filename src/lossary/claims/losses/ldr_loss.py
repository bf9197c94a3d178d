"""LDR: does its family hold what it says it holds, rank as it should, and keep up with the best where labels lie?"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import aldr_kl_loss, comp_sum_loss, ldr_kl_loss
from lossary.tasks import accuracy, cross_entropy, digits, fit, flip_labels, split, stacked_mlp

NOISE_TOLERANT = [{"tau": tau, "lr": lr} for tau in (1.0, 1.7, 2.0) for lr in (0.03, 0.1, 0.3)]
CROSS_ENTROPY = [{"tau": 1.0, "lr": lr} for lr in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)]
ADAPTIVE = [{"lam0": lam0, "lr": lr} for lam0 in (0.1, 1.0, 10.0) for lr in (0.03, 0.1, 0.3)]


@claim(
    says="LDR-KL is cross-entropy less log K at lambda 1 and the multi-class SVM's hinge as lambda goes to 0",
    kind="exact",
    metric="deviation",
    tolerance=1e-5,
    scale="1000 random logits over 10 classes for each seed, lambda 1e-6 for 0, margin 1 for the hinge",
)
def the_family_holds_cross_entropy_and_the_svm(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("logits"):
        input = 3 * torch.randn(1000, 10, generator=generator, dtype=torch.float64)
        target = torch.randint(10, (1000,), generator=generator)
        soft = ldr_kl_loss(input, target, lam=1.0, margin=0.0)
        hard = ldr_kl_loss(input, target, lam=1e-6, margin=1.0)
        own = input.gather(-1, target[:, None])
        hinge = (input - own + 1).scatter(-1, target[:, None], 0.0).amax(-1)
        both = torch.stack([soft - (cross_entropy(input, target) - torch.tensor(10.0).log()), hard - hinge])
        deviations.append(both.abs().max())
    return Arms(torch.stack(deviations))


@claim(
    says="LDR-KL and ALDR-KL are top-k consistent for every k: their best scores rank classes by probability",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="30 random distributions over 6 classes for each seed, free scores, margin 0.1; by how much a rank is wrong",
)
def best_scores_rank_by_probability(seeds: Seeds) -> Arms:
    draws = [torch.rand(2, 30, 6, generator=g, dtype=torch.float64) for g in seeds.torch("distributions")]
    logits, start = torch.cat(draws, 1)
    p = (3 * logits).softmax(-1).sort(-1, descending=True).values
    losses = {f"LDR-KL, lambda {lam}": partial(ldr_kl_loss, lam=lam) for lam in (0.3, 3.0)}
    losses |= {f"ALDR-KL, lambda_0 {lam0}": partial(aldr_kl_loss, lam0=lam0) for lam0 in (0.3, 3.0)}
    best = {name: _best_scores(loss, p, start, iterations=seeds.few(200, smoke=30)) for name, loss in losses.items()}
    wrong = {name: scores.diff(dim=-1).max().clamp_min(0).item() for name, scores in best.items()}
    return Arms(list(wrong.values()), details=wrong)


def _best_scores(loss: Callable[[Tensor, Tensor], Tensor], p: Tensor, start: Tensor, *, iterations: int) -> Tensor:
    """Scores (N, K) of least expected loss under class probabilities p, each row on its own."""
    scores = start.clone().requires_grad_()
    labels = torch.arange(p.shape[-1]).expand_as(p)
    optimizer = torch.optim.LBFGS([scores], max_iter=iterations, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def risk() -> Tensor:
        optimizer.zero_grad()
        total = (p * loss(scores.unsqueeze(-2).expand(*p.shape, p.shape[-1]), labels)).sum()
        total.backward()
        return total

    optimizer.step(risk)
    return scores.detach()


def _accuracy(
    seeds: Seeds, *, kind: str, rate: float, lr: float, lam0: float | None = None, tau: float = 1.0
) -> Tensor:
    """Clean test accuracy in percent, per seed, of ALDR-KL or, without a lam0, of the comp-sum loss at tau."""
    data, model = digits(), stacked_mlp((64, 64, 10), seeds)
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, rate, seeds, kind=kind)
    loss = partial(comp_sum_loss, tau=tau) if lam0 is None else partial(aldr_kl_loss, lam0=lam0, normalize=True)
    fit(model, data.x, labels, loss=loss, seeds=seeds, train=parts.train, steps=seeds.few(400), lr=lr)
    return accuracy(model(data.x[parts.test]), data.y[parts.test])


def _against(baselines: list[dict], seeds: Seeds, **noise: object) -> Arms:
    """ALDR-KL at its best of nine settings against the best of nine others, for this noise."""
    score = partial(_accuracy, **noise)
    plain, adaptive = tune(score, baselines, seeds), tune(score, ADAPTIVE, seeds)
    return Arms(score(seeds, **adaptive), score(seeds, **plain), {"method": adaptive, "baseline": plain})


@claim(
    says="ALDR-KL classifies better than cross-entropy where labels are wrong at random",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped uniformly, MLP 64-64-10, 400 steps of 64; 9 settings each",
)
def aldr_kl_beats_cross_entropy_under_uniform_noise(seeds: Seeds) -> Arms:
    return _against(CROSS_ENTROPY, seeds, kind="uniform", rate=0.4)


@claim(
    says="ALDR-KL keeps up with the best of cross-entropy, generalised cross-entropy and MAE under uniform noise",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped uniformly, MLP 64-64-10, 400 steps of 64; 9 settings each",
)
def aldr_kl_keeps_up_under_uniform_noise(seeds: Seeds) -> Arms:
    return _against(NOISE_TOLERANT, seeds, kind="uniform", rate=0.4)


@claim(
    says="ALDR-KL keeps up with the best of cross-entropy, generalised cross-entropy and MAE under asymmetric noise",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 8x8, 30% of labels flipped to the next class, MLP 64-64-10, 400 steps of 64; 9 settings each",
)
def aldr_kl_keeps_up_under_asymmetric_noise(seeds: Seeds) -> Arms:
    return _against(NOISE_TOLERANT, seeds, kind="pairwise", rate=0.3)


@claim(
    says="ALDR-KL keeps up with the best of cross-entropy, generalised cross-entropy and MAE on clean labels",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 8x8, labels as they are, MLP 64-64-10, 400 steps of 64; 9 settings each",
)
def aldr_kl_keeps_up_on_clean_labels(seeds: Seeds) -> Arms:
    return _against(NOISE_TOLERANT, seeds, kind="uniform", rate=0.0)
