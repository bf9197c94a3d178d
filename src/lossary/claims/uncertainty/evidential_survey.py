"""Evidential networks: does one pass tell strange inputs, against a plain network, an ensemble, and one another?

A network learns digits 0 to 4; strange are other digits. The regression learns a cubic between -4 and 4; strange is
what lies beyond. The score of strangeness is the mutual information, or the variance of the mean.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import auroc, cross_entropy, digits, fit, flip_labels, split, stacked_mlp
from lossary.uncertainty import (
    PosteriorHead,
    dirichlet_collapse_test,
    dirichlet_uncertainty,
    evidential_mse_loss,
    nig_loss,
    nig_uncertainty,
    prior_network_loss,
    reverse_kl_prior_network_loss,
    uce_loss,
)

KNOWN = 5  # digits 0 to 4
MEMBERS = 5
Loss = Callable[[Tensor, Tensor], Tensor]


def _rows(y: Tensor, rows: Tensor, low: int, high: int) -> Tensor:
    """The rows (S, m) of digits low to high - 1; splits are stratified, so every seed has as many."""
    found = y[rows]
    return rows[(found >= low) & (found < high)].view(len(rows), -1)


def _members(seeds: Seeds, members: int) -> Seeds:
    """A stack of ensembles: initialisations and orders of their own."""
    return Seeds(tuple(100 * i + m for i in seeds.ids for m in range(members)), seeds.smoke)


def _adam(lr: float, weight_decay: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay, fused=True)


def _detected(
    seeds: Seeds,
    score: Callable[[Tensor], Tensor],
    *,
    loss: Loss,
    lr: float,
    labels: Tensor | None = None,
    seen: int = KNOWN,
    members: int = 1,
) -> Tensor:
    """How well score(logits (S, members, N, 5)) tells digits from `seen` on from 0 to 4, in percent, per seed.

    Networks are trained on the digits below `seen`.
    """
    data, parts = digits(), split(digits(), seeds)
    stack = _members(seeds, members)
    labels = data.y.expand(len(seeds), -1) if labels is None else labels
    model = stacked_mlp((64, 64, KNOWN), stack)
    fit(
        model,
        data.x,
        labels.repeat_interleave(members, 0),
        loss=loss,
        seeds=stack,
        train=_rows(data.y, parts.train, 0, seen).repeat_interleave(members, 0),
        steps=seeds.few(400),
        optimizer=_adam(lr),
    )
    rows = torch.cat([_rows(data.y, parts.test, 0, KNOWN), _rows(data.y, parts.test, seen, 10)], 1)
    with torch.no_grad():
        logits = model(data.x[rows].repeat_interleave(members, 0)).unflatten(0, (len(seeds), members))
    return auroc(score(logits), data.y[rows[0]] >= KNOWN)


def _model_uncertainty(logits: Tensor, *, evidence: str = "softplus", prior: float = 1.0) -> Tensor:
    return dirichlet_uncertainty(logits[:, 0], evidence=evidence, prior=prior)[3]


def _entropy(logits: Tensor) -> Tensor:
    """Of the mean softmax over members. Where alpha = exp(logits) it is all uncertainty about the label."""
    return torch.special.entr(logits.softmax(-1).mean(1)).sum(-1)


RATES = (0.003, 0.01)
PLAIN = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03)]
EVIDENTIAL = [{"kl_weight": w, "lr": lr} for w in (0.01, 0.1) for lr in RATES]


def _evidential(seeds: Seeds, *, kl_weight: float, lr: float) -> Tensor:
    return _detected(seeds, _model_uncertainty, loss=partial(evidential_mse_loss, kl_weight=kl_weight), lr=lr)


def _plain(seeds: Seeds, *, lr: float, members: int = 1) -> Tensor:
    return _detected(seeds, _entropy, loss=cross_entropy, lr=lr, members=members)


@claim(
    says="Evidential deep learning tells unseen digits better than the entropy of a plain network's softmax",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 0-4 known, 5-9 strange, MLP 64-64-5, 400 Adam steps of 64; 4 settings each",
)
def one_pass_beats_softmax(seeds: Seeds) -> Arms:
    method, baseline = tune(_evidential, EVIDENTIAL, seeds), tune(_plain, PLAIN, seeds)
    return Arms(_evidential(seeds, **method), _plain(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="One evidential network tells unseen digits no worse than an ensemble of five plain ones",
    kind="noninferiority",
    metric="AUROC",
    scale="digits 8x8, 0-4 known, 5-9 strange, MLP 64-64-5, 400 Adam steps of 64, entropy of the mean; 4 settings each",
)
def one_pass_keeps_up_with_an_ensemble(seeds: Seeds) -> Arms:
    ensemble = partial(_plain, members=MEMBERS)
    method, baseline = tune(_evidential, EVIDENTIAL, seeds), tune(ensemble, PLAIN, seeds)
    return Arms(_evidential(seeds, **method), ensemble(seeds, **baseline), {"method": method, "baseline": baseline})


def _prior_network(seeds: Seeds, *, loss: Callable[..., Tensor], target_concentration: float, total: bool) -> Tensor:
    """Trained with outliers 5 and 6, and three labels in ten wrong; strange are 7 to 9, by all uncertainty or MI."""
    y = digits().y
    noisy, _ = flip_labels(y.clamp(max=KNOWN - 1), 0.3, seeds)

    def outliers_flat(input: Tensor, target: Tensor) -> Tensor:
        known = target.clamp(max=KNOWN - 1)
        return loss(input, known, outlier=target >= KNOWN, target_concentration=target_concentration)

    score = _entropy if total else partial(_model_uncertainty, evidence="exp", prior=0.0)
    return _detected(seeds, score, loss=outliers_flat, lr=0.003, labels=torch.where(y < KNOWN, noisy, y), seen=7)


@claim(
    says="With noisy labels, prior networks trained by reverse KL tell new outliers better than by forward KL",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 0-4 known with 30% of labels flipped, 5-6 outliers in training, 7-9 strange, MLP 64-64-5,"
    " 400 Adam steps of 64, mutual information or entropy; 4 settings each",
)
def reverse_kl_beats_forward_kl(seeds: Seeds) -> Arms:
    grid = [{"target_concentration": c, "total": total} for c in (10.0, 100.0) for total in (False, True)]
    reverse, forward = (
        partial(_prior_network, loss=loss) for loss in (reverse_kl_prior_network_loss, prior_network_loss)
    )
    method, baseline = tune(reverse, grid, seeds), tune(forward, grid, seeds)
    return Arms(reverse(seeds, **method), forward(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="Where labels disagree the reverse KL's best Dirichlet is 1 + 100 frequency: noise lowers no evidence",
    kind="exact",
    metric="deviation",
    scale="log alpha fitted to random frequencies of 4 labels at one input, target concentration 100",
    tolerance=1e-3,
)
def reverse_kl_averages_its_targets(seeds: Seeds) -> Arms:
    counts = torch.stack([torch.randint(1, 100, (4,), generator=g) for g in seeds.torch("counts")])
    reverse, forward = (
        torch.stack([dirichlet_collapse_test(loss, c)[0] for c in counts])
        for loss in (reverse_kl_prior_network_loss, prior_network_loss)
    )
    shares = counts / counts.sum(-1, keepdim=True).double()
    details = {"mean precision": {"reverse": reverse.sum(-1).mean().item(), "forward": forward.sum(-1).mean().item()}}
    return Arms(reverse.log(), (1 + 100 * shares).log(), details)


class _Density(nn.Module):
    """An encoder, its features standardised by those of a reference batch, and densities of these."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        known = self.encoder(reference)
        return self.head((self.encoder(x) - known.mean(0)) / known.std(0))


class _Stack(nn.Module):
    """Modules of one kind side by side, each on its own slice."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        weights, self.constants = stack_module_state(list(modules))
        self.names = tuple(weights)
        self.weights = nn.ParameterList(weights.values())
        self.base = [modules[0]]  # in a list, so that its own weights are not trained

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        def one(state: Mapping[str, Tensor], x: Tensor, reference: Tensor) -> Any:
            return functional_call(self.base[0], state, (x, reference))

        state = dict(zip(self.names, self.weights)) | self.constants
        return vmap(one)(state, x, x if reference is None else reference)


def _posterior(seeds: Seeds, *, entropy_weight: float, lr: float) -> Tensor:
    data, parts = digits(), split(digits(), seeds)
    train = _rows(data.y, parts.train, 0, KNOWN)
    encoders, modules = stacked_mlp((64, 64, 6), seeds), []
    for s, generator in enumerate(seeds.torch("flows")):
        head = PosteriorHead(6, data.y[train[s]].bincount().tolist())
        for parameter in head.parameters():
            nn.init.uniform_(parameter, -(6**-0.5), 6**-0.5, generator=generator)
        modules.append(_Density(encoders.replica(s), head))
    model = _Stack(modules)
    loss = partial(uce_loss, entropy_weight=entropy_weight)
    fit(model, data.x, data.y, loss=loss, seeds=seeds, train=train, steps=seeds.few(400), optimizer=_adam(lr))
    rows = torch.cat([_rows(data.y, parts.test, 0, KNOWN), _rows(data.y, parts.test, KNOWN, 10)], 1)
    with torch.no_grad():
        evidence = model(data.x[rows], data.x[train])
    return auroc(_model_uncertainty(evidence.unsqueeze(1), evidence="exp"), data.y[rows[0]] >= KNOWN)


def _without_density(seeds: Seeds, *, entropy_weight: float, lr: float) -> Tensor:
    score = partial(_model_uncertainty, evidence="exp")
    return _detected(seeds, score, loss=partial(uce_loss, entropy_weight=entropy_weight), lr=lr)


@claim(
    says="A posterior network's densities tell unseen digits better than the same loss on plain logits",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 0-4 known, 5-9 strange, MLP 64-64-6 and radial flows against MLP 64-64-5, 400 Adam steps of 64;"
    " 4 settings each",
)
def densities_know_strangers(seeds: Seeds) -> Arms:
    grid = [{"entropy_weight": w, "lr": lr} for w in (1e-5, 1e-2) for lr in RATES]
    method, baseline = tune(_posterior, grid, seeds), tune(_without_density, grid, seeds)
    return Arms(
        _posterior(seeds, **method), _without_density(seeds, **baseline), {"method": method, "baseline": baseline}
    )


def _beyond(
    seeds: Seeds, score: Callable[[Tensor], Tensor], *, loss: Loss, outputs: int, members: int, **setting: float
) -> Tensor:
    """How well score(outputs (S, members, N, outputs)) tells inputs beyond the data, in percent, per seed."""
    x, y = [], []
    for rng in seeds.numpy("cubic"):
        where = rng.uniform(-4, 4, 300)
        x.append(torch.from_numpy(where).float())
        y.append(torch.from_numpy(where**3 + 3 * rng.standard_normal(300)).float() / 25)
    stack = _members(seeds, members)
    inputs, targets = (torch.stack(t).repeat_interleave(members, 0) for t in (x, y))
    model = stacked_mlp((1, 32, 32, outputs), stack)
    steps = seeds.few(600)
    fit(model, inputs.unsqueeze(-1), targets, loss=loss, seeds=stack, steps=steps, optimizer=_adam(**setting))
    test = torch.linspace(-6, 6, 241)
    with torch.no_grad():
        found = model(test.view(1, -1, 1).expand(len(stack), -1, -1)).unflatten(0, (len(seeds), members))
    return auroc(score(found), test.abs() > 4)


def _nig(seeds: Seeds, *, evidence_weight: float, lr: float) -> Tensor:
    loss = partial(nig_loss, evidence_weight=evidence_weight)
    return _beyond(seeds, lambda found: nig_uncertainty(found[:, 0])[2], loss=loss, outputs=4, members=1, lr=lr)


def _normal_nll(input: Tensor, target: Tensor) -> Tensor:
    mean, log_variance = input.unbind(-1)
    return (log_variance + (target - mean).square() / log_variance.exp()) / 2


def _normal_ensemble(seeds: Seeds, *, weight_decay: float, lr: float) -> Tensor:
    def apart(found: Tensor) -> Tensor:
        return found[..., 0].var(1)

    return _beyond(seeds, apart, loss=_normal_nll, outputs=2, members=MEMBERS, lr=lr, weight_decay=weight_decay)


@claim(
    says="Deep evidential regression marks where the data end no worse than an ensemble of five networks",
    kind="noninferiority",
    metric="AUROC",
    scale="y = x^3 + noise, 300 rows with |x| < 4, strange 4 < |x| < 6, MLP 1-32-32-4, 600 Adam steps; 4 settings each",
)
def evidential_regression_marks_the_end_of_the_data(seeds: Seeds) -> Arms:
    method = tune(_nig, [{"evidence_weight": w, "lr": lr} for w in (0.001, 0.01) for lr in RATES], seeds)
    baseline = tune(_normal_ensemble, [{"weight_decay": w, "lr": lr} for w in (0.0, 1e-4) for lr in RATES], seeds)
    return Arms(_nig(seeds, **method), _normal_ensemble(seeds, **baseline), {"method": method, "baseline": baseline})
