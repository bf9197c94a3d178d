"""RIDE on a long tail: against one network and three, without its diversity, across training sets, and routed."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import balanced_accuracy, digits, fit, long_tail, split
from lossary.weighting import DeferredReweighting, ExpertRouter, MultiExpertHead, ride_loss, router_loss

CLASSES, BATCH, STEPS, RATIO = 10, 64, 400, 50.0
RIDE = [{"lr": lr, "diversity": diversity} for lr in (0.01, 0.03, 0.1) for diversity in (0.2, 0.45)]
PLAIN = [{"lr": lr, "max_margin": margin} for lr in (0.01, 0.03, 0.1) for margin in (0.0, 0.5)]


class _Stack(nn.Module):
    """Any model, one for each seed, in one module: (S, batch, d) in, whatever the model gives, with S in front."""

    def __init__(self, make: Callable[[], nn.Module], seeds: Seeds) -> None:
        super().__init__()
        with torch.device("meta"):
            self._plan = [make()]  # in a list, so that its weights are not taken for this module's
        for name, meta in self._plan[0].named_parameters():
            bound = meta.shape[-1] ** -0.5
            drawn = [torch.empty(meta.shape).uniform_(-bound, bound, generator=g) for g in seeds.torch(name)]
            self.register_parameter(name.replace(".", "/"), nn.Parameter(torch.stack(drawn)))

    def one(self, weights: dict[str, Tensor], *inputs: Tensor) -> Any:
        return torch.func.functional_call(self._plan[0], weights, inputs)

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name.replace("/", "."): weight for name, weight in self.named_parameters()}
        return torch.vmap(self.one, randomness="error")(weights, *inputs)

    def replica(self, s: int) -> nn.Module:
        """The model of the seed at position s, as it now is."""
        model = copy.deepcopy(self._plan[0]).to_empty(device="cpu")
        model.load_state_dict({name.replace("/", "."): weight[s] for name, weight in self.state_dict().items()})
        return model


class _Ensemble(nn.Module):
    """Whole networks side by side, as a head without shared layers: (batch, 64) to (batch, networks, classes)."""

    def __init__(self, networks: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(_network(1) for _ in range(networks))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in self.networks], dim=-2)


def _network(experts: int) -> nn.Sequential:
    """A shared layer and a head; with one expert a plain network. Three experts are two thirds as wide, as in RIDE."""
    head = MultiExpertHead(64, CLASSES, width=48 if experts == 1 else 32, experts=experts, scale=10.0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), head)


def _trained(
    seeds: Seeds, parts: Any, *, make: Callable[[], nn.Module], lr: float, steps: int = STEPS, **hyper: Any
) -> tuple[_Stack, Tensor]:
    """Models and their training rows: a long tail cut from the training part; DRW from 80% of the steps on."""
    data, model = digits(), _Stack(make, seeds)
    rows = long_tail(data.y, RATIO, seeds, rows=parts)
    counts = data.y[rows[0]].bincount(minlength=CLASSES).tolist()  # all seeds' classes are alike
    steps = seeds.few(steps)
    deferred = DeferredReweighting(counts, epochs=max(1, steps * BATCH // sum(counts)))
    loss = partial(ride_loss, class_counts=counts, scale=10.0, **hyper)
    how: dict[str, Any] = {"train": rows, "steps": steps, "batch": BATCH, "lr": lr, "weight_decay": 5e-4}
    fit(model, data.x, data.y, loss=loss, seeds=seeds, weighting=deferred, **how)
    return model, rows


def _accuracy(seeds: Seeds, *, make: Callable[[], nn.Module], **setting: Any) -> Tensor:
    """Mean over classes of the test accuracy in percent, per seed, of the mean over experts."""
    data = digits()
    parts = split(data, seeds)
    model, _ = _trained(seeds, parts.train, make=make, **setting)
    with torch.no_grad():
        return balanced_accuracy(model(data.x[parts.test]).mean(-2), data.y[parts.test])


def _compare(
    seeds: Seeds, method: tuple[Any, list[dict[str, Any]]], baseline: tuple[Any, list[dict[str, Any]]]
) -> Arms:
    """Two (model, grid) pairs, each at its best setting."""
    found = []
    for make, grid in (method, baseline):
        score = partial(_accuracy, make=make)
        best = tune(score, grid, seeds)
        found.append((score(seeds, **best), best))
    (ours, setting), (theirs, other) = found
    return Arms(ours, theirs, {"method": setting, "baseline": other})


@claim(
    says="Three experts of RIDE are more accurate over classes than one network with LDAM or cross-entropy",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 50:1, MLP 64-64-32x3-10 against 64-64-48-10, 400 steps of 64, DRW; 6 settings each",
)
def ride_beats_one_network(seeds: Seeds) -> Arms:
    plain = [{"diversity": 0.0, **setting} for setting in PLAIN]
    return _compare(seeds, (partial(_network, 3), RIDE), (partial(_network, 1), plain))


@claim(
    says="Three experts of RIDE are as accurate over classes as an ensemble of three whole networks",
    kind="noninferiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 50:1, MLP 64-64-32x3-10 against three 64-64-48-10, 400 steps of 64, DRW; 6 settings"
    " each",
)
def ride_equals_an_ensemble(seeds: Seeds) -> Arms:
    plain = [{"diversity": 0.0, **setting} for setting in PLAIN]
    return _compare(seeds, (partial(_network, 3), RIDE), (partial(_Ensemble, 3), plain))


@claim(
    says="RIDE's experts are more accurate over classes with the diversity term than without it",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 50:1, MLP 64-64-32x3-10, 400 steps of 64, DRW; 6 settings each",
)
def diversity_helps(seeds: Seeds) -> Arms:
    rates = [{"lr": lr, "diversity": 0.0} for lr in (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)]
    return _compare(seeds, (partial(_network, 3), RIDE), (partial(_network, 3), rates))


@claim(
    says="Across training sets RIDE's prediction changes at most 0.9 times as often as one network's",
    kind="ratio",
    metric="variance",
    margin=0.9,
    scale="digits 8x8, 4 long tails 50:1 from one training part, MLP 64-64-32x3-10 against 64-64-48-10, 400 steps,"
    " lr 0.03, DRW; share of test predictions, weighted by class, off the majority's",
)
def ride_varies_less(seeds: Seeds) -> Arms:
    data, sets = digits(), 4
    parts = split(data, seeds)
    draws = Seeds(tuple(100_000 + sets * id + r for id in seeds.ids for r in range(sets)), seeds.smoke)
    test, y = parts.test.repeat_interleave(sets, 0), data.y[parts.test]
    arms = []
    for experts, hyper in ((3, {"diversity": 0.2}), (1, {"diversity": 0.0})):
        own = parts.train.repeat_interleave(sets, 0)
        model, _ = _trained(draws, own, make=partial(_network, experts), lr=0.03, **hyper)
        with torch.no_grad():
            guess = model(data.x[test]).mean(-2).argmax(-1).view(len(seeds), sets, -1)
        off = (guess != guess.mode(1, keepdim=True).values).double().mean(1)
        arms.append(torch.stack([off[y == c].view(len(seeds), -1).mean(1) for c in range(CLASSES)]).mean(0))
    return Arms(*arms)


class _Routed(nn.Module):
    """A frozen network with a router in training: gates and logits of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.router = _network(3), ExpertRouter(32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *early, head = self.network
        features = head.features(nn.Sequential(*early)(x))
        logits = head.classify(features)
        return self.router(features, logits), logits


def _routed(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced accuracy routed and with all experts, and mean number of experts that the router runs: (S,) each."""
    data = digits()
    parts = split(data, seeds)
    first, rows = _trained(seeds, parts.train, make=partial(_network, 3), lr=0.03, diversity=0.2)
    model = _Stack(_Routed, seeds)
    model.load_state_dict({f"network/{name}": w for name, w in first.state_dict().items()}, strict=False)
    # Every expert fits every training row; noise stands for the official code's augmentation, so that some of them err.
    x, y = data.x[rows].repeat(1, 4, 1), data.y[rows].repeat(1, 4)
    x = x + 0.3 * torch.stack([torch.randn(x.shape[1:], generator=g) for g in seeds.torch("noise")])
    chances = (1 / torch.stack([own.bincount(minlength=CLASSES) for own in y]).gather(1, y)).tolist()
    draws = [WeightedRandomSampler(c, len(c), generator=g) for c, g in zip(chances, seeds.torch("balanced"))]

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return router_loss(*outputs, y)

    def optimizer(_: Any) -> torch.optim.Optimizer:
        router = [p for name, p in model.named_parameters() if name.startswith("router")]
        return torch.optim.SGD(router, lr=0.01, momentum=0.9, weight_decay=5e-4)

    fit(model, x, y, loss=loss, seeds=seeds, steps=seeds.few(200), optimizer=optimizer, selector=draws)
    logits, used = [], []
    for s, test in enumerate(parts.test):
        replica: Any = model.replica(s)
        *early, head = replica.network
        with torch.no_grad():
            mean, count = replica.router.route(head, nn.Sequential(*early)(data.x[test]))
        logits.append(mean)
        used.append(count.double().mean())
    with torch.no_grad():
        every = first(data.x[parts.test]).mean(-2)
    truth = data.y[parts.test]
    return balanced_accuracy(torch.stack(logits), truth), balanced_accuracy(every, truth), torch.stack(used)


@claim(
    says="With the router RIDE is as accurate over classes as with all experts on every sample",
    kind="noninferiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 50:1, MLP 64-64-32x3-10, 400 steps of 64, lr 0.03, DRW, then 200 steps for the router"
    " on noisy copies",
)
def routing_keeps_accuracy(seeds: Seeds) -> Arms:
    routed, every, used = _routed(seeds)
    return Arms(routed, every, {"experts run on a sample, mean": used.mean().item()})


@claim(
    says="The router runs at most 0.7 times as many experts as there are",
    kind="ratio",
    metric="samples seen",
    margin=0.7,
    scale="digits 8x8, long tail 50:1, MLP 64-64-32x3-10, 400 steps of 64, lr 0.03, DRW, then 200 steps for the router"
    " on noisy copies; test samples seen by an expert, summed over experts",
)
def routing_saves_experts(seeds: Seeds) -> Arms:
    _, _, used = _routed(seeds)
    return Arms(used, torch.full_like(used, 3.0))
