from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.tasks import (
    PerSeed,
    Seeds,
    StackedLinear,
    cross_entropy,
    digits,
    fit,
    flip_labels,
    per_seed,
    small_cnn,
    split,
    stacked_mlp,
)

SEEDS = Seeds((11, 2, 30))


def by_hand(
    seeds: Seeds, s: int, x: Tensor, y: Tensor, steps: int, optimizer: Callable, *, activation: type = nn.ReLU
) -> nn.Module:
    """One seed's run with nothing of the library but its two streams: torch's own layers, one batch after another."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.torch("init")[s].initial_seed())
        model = nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10)).to(x.dtype)
    updates = optimizer(model.parameters())
    generator = seeds.torch("order")[s]
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(1 + 64 * steps // len(x))])
    for step in range(steps):
        rows = order[64 * step : 64 * step + 64]

        @torch.enable_grad()
        def closure(rows: Tensor = rows) -> Tensor:
            updates.zero_grad()
            value = F.cross_entropy(model(x[rows]), y[rows])
            value.backward()
            return value

        updates.step(closure)
    return model


def stacked(dtype: torch.dtype = torch.float64, seeds: Seeds = SEEDS, **options) -> nn.Module:
    return stacked_mlp((64, 32, 10), seeds, **options).to(dtype)


def largest_gap(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


class Ascending(torch.optim.SGD):
    """Steps along the gradient at a point further uphill, so it needs two gradients, as SAM does."""

    @torch.no_grad()
    def step(self, closure):
        closure()
        for p in self.param_groups[0]["params"]:
            self.state[p]["origin"] = p.clone()
            p += 0.05 * p.grad
        closure()
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["origin"])
        return super().step()


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adam, lr=0.01),
        partial(Ascending, lr=0.1),
    ],
    ids=["SGD", "Adam", "two gradients"],
)
def test_every_replica_follows_its_own_run(optimizer) -> None:
    """Float64: parameters agree to 1e-10 after 400 steps, with labels of their own for each seed."""
    data = digits()
    x, labels = data.x.double(), flip_labels(data.y, 0.2, SEEDS)[0]
    model = stacked()
    fit(model, x, labels, loss=cross_entropy, seeds=SEEDS, steps=400, optimizer=optimizer)
    for s in range(2):
        assert largest_gap(model.replica(s), by_hand(SEEDS, s, x, labels[s], 400, optimizer)) < 1e-10


def test_float32_logits_after_100_steps() -> None:
    data = digits()
    model = stacked(torch.float32)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=SEEDS, steps=100, lr=0.05)
    logits = model(data.x.expand(3, -1, -1))
    for s in range(3):
        single = by_hand(SEEDS, s, data.x, data.y, 100, partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        assert (logits[s] - single(data.x)).abs().max() < 1e-4


def test_a_replica_does_not_depend_on_its_neighbours() -> None:
    data = digits()
    x = data.x.double()
    model, alone = stacked(), stacked(seeds=SEEDS.one(2))
    assert largest_gap(model.replica(2), alone.replica(0)) == 0
    for trained, seeds in ((model, SEEDS), (alone, SEEDS.one(2))):
        fit(trained, x, data.y, loss=cross_entropy, seeds=seeds, steps=100, train=split(data, seeds).train)
    assert largest_gap(model.replica(2), alone.replica(0)) < 1e-12
    assert largest_gap(model.replica(2), model.replica(1)) > 0.1


@pytest.mark.parametrize(
    ("name", "activation"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU), ("tanh", nn.Tanh)]
)
def test_models_start_as_torchs_do(name: str, activation: type) -> None:
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = stacked(activation=name)
    assert model(x.expand(3, -1, -1)).is_contiguous()
    for s in range(3):
        single = by_hand(SEEDS, s, x, torch.zeros(5), 0, torch.optim.SGD, activation=activation)
        assert largest_gap(model.replica(s), single) == 0
        assert torch.allclose(model(x.expand(3, -1, -1))[s], single(x), atol=1e-12)
        assert torch.equal(model.replica(s)(x), single(x))


def test_a_replica_is_a_copy() -> None:
    model = stacked()
    replica = model.replica(1)
    with torch.no_grad():
        replica[0].weight.zero_()
    assert model[0].weight[1].abs().sum() > 0
    assert [type(layer) for layer in replica] == [nn.Linear, nn.ReLU, nn.Linear]
    assert replica[0].weight.dtype == torch.float64
    assert repr(model[0]) == "StackedLinear(64, 32, stack=3)"


def test_small_cnn_starts_as_torchs_layers_do() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(24, 10)]
    model = small_cnn(10, generator=torch.Generator().manual_seed(7), channels=(4, 6))
    assert largest_gap(model, nn.ModuleList(expected)) == 0
    for side in (8, 20, 28):
        assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_nothing_draws_from_the_global_stream() -> None:
    data = digits()
    before = torch.random.get_rng_state()
    model = stacked(torch.float32)
    small_cnn(10, generator=torch.Generator())
    fit(model, data.x, data.y, loss=cross_entropy, seeds=SEEDS, steps=3)
    model.replica(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_stacked_and_shared_rows_are_the_same() -> None:
    data = digits()
    models = [stacked(torch.float32) for _ in range(3)]
    three = (3, -1, -1)
    for model, x, y in zip(
        models, (data.x, data.x.expand(three), data.x.expand(three)), (data.y, data.y, data.y.expand(3, -1))
    ):
        fit(model, x, y, loss=cross_entropy, seeds=SEEDS, steps=20)
    assert largest_gap(models[0], models[1]) == 0
    assert largest_gap(models[0], models[2]) == 0


def test_weightings_see_what_they_weigh() -> None:
    data = digits()
    train = split(data, SEEDS).train
    group = data.y % 3
    seen = []

    def only_group_two(values: Tensor, *, target: Tensor, group: Tensor, index: Tensor) -> Tensor:
        rows = train.gather(1, index)
        assert not values.requires_grad
        assert torch.equal(target, data.y[rows])
        assert torch.equal(group, target % 3)
        seen.append(index)
        return (group == 2).to(values)

    model, other = stacked(), stacked()
    x = data.x.double()
    common = {"loss": cross_entropy, "seeds": SEEDS, "steps": 64, "train": train}
    fit(model, x, data.y, group=group, weighting=only_group_two, **common)
    changed = torch.where(group == 2, data.y, 0)  # what is wrong elsewhere must not matter
    fit(other, x, changed, weighting=lambda v, *, target, group, index: (target % 3 == 2).to(v), **common)
    assert largest_gap(model, other) == 0
    # 64 steps of 64 rows: three times through the 1347 training rows, then 55 more
    counts = [row.bincount(minlength=1347) for row in torch.cat(seen, 1)]
    assert all(sorted(count.unique().tolist()) == [3, 4] and int((count == 4).sum()) == 55 for count in counts)


def test_a_penalty_is_added() -> None:
    """SGD's weight decay is the gradient of half the squared norm."""
    data = digits()
    x = data.x.double()
    decayed, scalar, stack = stacked(), stacked(), stacked()

    def norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == (3, 64, 64)
        assert y.shape == (3, 64)
        return torch.stack([p.square().flatten(1).sum(1) for p in model.parameters()]).sum(0) * 0.005

    common = {"loss": cross_entropy, "seeds": SEEDS, "steps": 50}
    fit(decayed, x, data.y, weight_decay=0.01, **common)
    fit(stack, x, data.y, penalty=norm, **common)
    fit(scalar, x, data.y, penalty=lambda *batch: norm(*batch).sum(), **common)
    assert largest_gap(decayed, stack) < 1e-12
    assert largest_gap(scalar, stack) < 1e-12


def test_selectors_are_iterated_anew_until_the_last_step() -> None:
    data = digits()
    seen = []

    def watch(values: Tensor, *, target: Tensor, group: None, index: Tensor) -> Tensor:
        seen.append(index)
        return torch.ones_like(values)

    fit(
        stacked(torch.float32),
        data.x,
        data.y,
        loss=cross_entropy,
        seeds=SEEDS,
        steps=4,
        batch=2,
        train=split(data, SEEDS).train,
        weighting=watch,
        selector=[range(3), [7], torch.utils.data.SequentialSampler(range(5))],
    )
    assert torch.cat(seen, 1).tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [7] * 8, [0, 1, 2, 3, 4, 0, 1, 2]]


def test_per_seed_models_follow_the_stack() -> None:
    """A loop over plain copies of the stacked model, coupled losses and stateful weightings included."""
    data = digits()
    x = data.x.double()

    def coupled(z: Tensor, y: Tensor) -> Tensor:
        values = cross_entropy(z, y)
        return values + values.mean()

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, values: Tensor, **_: object) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * values.mean()
            return values / (values + self.mean)

    runs = []
    for seeds in (SEEDS, SEEDS.one(1)):
        start = stacked(seeds=seeds)
        model = per_seed(start.replica, seeds)
        weighting = per_seed(lambda s: Running(), seeds)
        loss = per_seed(lambda s: coupled, seeds)
        fit(model, x, data.y, loss=loss, seeds=seeds, steps=30, weighting=weighting)
        runs.append((model, weighting))
    (three, means), (one, mean) = runs
    assert largest_gap(three[1], one[0]) < 1e-12
    assert float(means[1].mean) == pytest.approx(float(mean[0].mean))
    assert len({float(part.mean) for part in means}) == 3
    assert sorted(means.state_dict()) == ["parts.0.mean", "parts.1.mean", "parts.2.mean"]

    plain, looped = stacked(), per_seed(stacked().replica, SEEDS)
    for model in (plain, looped):
        fit(model, x, data.y, loss=cross_entropy, seeds=SEEDS, steps=50)
    assert max(largest_gap(plain.replica(s), looped[s]) for s in range(3)) < 1e-12


def test_per_seed_cnns_train() -> None:
    data = digits()
    generators = SEEDS.torch("init")
    model = per_seed(lambda s: small_cnn(10, generator=generators[s], channels=(4, 8)), SEEDS)
    images = data.x.view(-1, 1, 8, 8)
    fit(model, images, data.y, loss=cross_entropy, seeds=SEEDS, steps=60)
    right = model(images.expand(3, -1, -1, -1, -1)).argmax(-1) == data.y
    assert right.double().mean(-1).min() > 0.5


def test_per_seed_splits_tensors_only() -> None:
    part = PerSeed([lambda v, scale, *, shift: v * scale + shift] * 2)
    assert part(torch.tensor([[1.0], [2.0]]), 10, shift=torch.tensor([1.0, 3.0])).tolist() == [[11], [23]]
    with pytest.raises(ValueError, match="2 seeds in front"):
        part(torch.zeros(3, 1), 10, shift=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss": F.mse_loss, "y": torch.zeros(8, 10)}, "loss"),
        ({"y": torch.zeros(9, dtype=torch.int64)}, "y"),
        ({"train": torch.arange(8)}, "train"),
        ({"train": torch.zeros(2, 8, dtype=torch.int64)}, "train"),
        ({"steps": -1}, "steps"),
        ({"batch": 0}, "batch"),
        ({"selector": [[], [], []]}, "selector"),
        ({"selector": [range(8)] * 2}, "selector"),
    ],
)
def test_fit_refuses(options: dict, named: str) -> None:
    usual = {"y": torch.zeros(8, dtype=torch.int64), "loss": cross_entropy, "seeds": SEEDS, "steps": 1, "batch": 4}
    with pytest.raises(ValueError, match=f"^{named}: "):
        fit(stacked(torch.float32), torch.zeros(8, 64), **(usual | options))


def test_models_refuse() -> None:
    with pytest.raises(ValueError, match=r"^activation: "):
        stacked_mlp((4, 2), SEEDS, activation="step")
    with pytest.raises(ValueError, match=r"^sizes: "):
        stacked_mlp((4,), SEEDS)


def test_the_weight_of_a_pruned_layer_is_the_replicas() -> None:
    """A parametrization on the stacked weight is seen by forward and by replica."""

    class Halve(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    layer = StackedLinear(4, 2, generators=SEEDS.torch("init"))
    x = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    before = layer(x) - layer.bias.unsqueeze(1)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halve())
    assert torch.allclose(layer(x) - layer.bias.unsqueeze(1), before / 2, atol=1e-6)
    assert torch.allclose(layer.replica(2)(x[2]), layer(x)[2], atol=1e-6)
