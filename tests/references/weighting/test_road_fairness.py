"""ROAD against loops over its definition, a generic optimiser, and the battery of procedures on batches with groups."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import make_classification
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from lossary.roles import advance
from lossary.roles._mark import Mark
from lossary.roles.procedure import ROLE, ProcedureCase
from lossary.tasks import Seeds, stacked_mlp
from lossary.weighting import ROAD, BROADClassifier, ROADClassifier, road_weights

LOSSES = torch.tensor([0.1, 1.5, 0.7, 0.4, 2.2, 0.0], dtype=torch.float64)
GROUP = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("lambda_r", [0.3, 2.0])
def test_weights_solve_the_constrained_problem(lambda_r):
    """min over r > 0 of mean(r l) + lambda_r mean(r log r) with mean 1 in each group, by a generic solver."""
    losses, group = LOSSES.numpy(), GROUP.numpy()
    found = minimize(
        lambda r: np.mean(r * losses) + lambda_r * np.mean(r * np.log(r)),
        np.ones(6),
        bounds=[(1e-9, None)] * 6,
        constraints=[{"type": "eq", "fun": lambda r, g=g: r[group == g].mean() - 1} for g in (0, 1)],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    got = road_weights(LOSSES, group=GROUP, lambda_r=lambda_r)
    assert got.tolist() == pytest.approx(found.x.tolist(), abs=1e-4)


def test_weights_at_the_ends():
    assert road_weights(LOSSES, group=GROUP, lambda_r=1e9).tolist() == pytest.approx([1.0] * 6, abs=1e-6)
    cold = road_weights(LOSSES, group=GROUP, lambda_r=1e-3)
    assert cold.tolist() == pytest.approx([0.0, 0.0, 3.0, 0.0, 0.0, 3.0], abs=1e-9)  # each group's least loss
    infinite = torch.tensor([torch.inf, 1.0, torch.inf, torch.inf])
    group = torch.tensor([0, 0, 2, 2])  # nobody in 1; all of 2 infinite
    assert road_weights(infinite, group=group, num_groups=3).tolist() == [0.0, 2.0, 1.0, 1.0]
    assert not road_weights(LOSSES.clone().requires_grad_(), group=GROUP).requires_grad
    stack = torch.stack([LOSSES, LOSSES.flip(0)])
    rows = [road_weights(row, group=GROUP) for row in stack]
    assert torch.equal(road_weights(stack, group=GROUP.expand(2, -1)), torch.stack(rows))


class Table(nn.Module):
    """A network whose outputs are its parameters, whatever it is shown."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x):
        return self.values


def tables(**hyper):
    g = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(2, 6, 2, generator=g, dtype=torch.float64)
    adversary = nn.Linear(4 if hyper.get("equalized_odds") else 2, 2, dtype=torch.float64, device="meta")
    adversary = adversary.to_empty(device="cpu")
    adversary.load_state_dict(
        {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in adversary.named_parameters()}
    )
    return ROAD(Table(logits), adversary, Table(scores), **hyper)


Y = torch.tensor([0, 1, 0, 1, 1, 0])


def log_loss(logits, label):
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


@pytest.mark.parametrize("equalized", [False, True])
def test_the_three_objectives_are_their_definitions(equalized):
    road = tables(lambda_adv=1.7, lambda_r=0.4)
    if equalized:
        road = tables(lambda_adv=1.7, lambda_r=0.4, equalized_odds=True)
        road.ratio = Table(torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4))
    batch = (None, Y, GROUP)
    logits, weight = road.predictor.values.tolist(), road.adversary.weight.tolist()
    bias, scores = road.adversary.bias.tolist(), road.ratio.values.tolist()
    success, odds, cells = [], [], []
    for i in range(6):
        s, y = GROUP[i].item(), Y[i].item()
        seen = logits[i] + ([1.0 - y, float(y)] if equalized else [])
        guess = [sum(w * z for w, z in zip(row, seen)) + b for row, b in zip(weight, bias)]
        success.append(log_loss(guess, s))
        cells.append((y, s) if equalized else s)
        odds.append(math.exp(scores[i][2 * y + s if equalized else s]))
    ratio = []
    for i in range(6):
        others = [odds[j] for j in range(6) if cells[j] == cells[i]]
        ratio.append(odds[i] * len(others) / sum(others))
    expected = {
        "adversary": success,
        "ratio": [r * a + 0.4 * r * math.log(r) for r, a in zip(ratio, success)],
        "predictor": [log_loss(z, y) - 1.7 * r * a for z, y, r, a in zip(logits, Y.tolist(), ratio, success)],
    }
    for player, values in expected.items():
        assert road.objective(player, batch, step=0).tolist() == pytest.approx(values, abs=1e-9)


def test_the_ratios_optimum_is_the_closed_form():
    road = tables(lambda_r=0.6)
    success = road.objective("adversary", (None, Y, GROUP), step=0).detach()
    with torch.no_grad():
        road.ratio.values.copy_((-success / 0.6).unsqueeze(1))
    road.objective("ratio", (None, Y, GROUP), step=0).mean().backward()
    assert road.ratio.values.grad.abs().max() < 1e-12
    closed = ROAD(road.predictor, road.adversary, lambda_r=0.6)
    assert list(closed.players()) == ["adversary", "predictor"]
    values = [r.objective("predictor", (None, Y, GROUP), step=0) for r in (road, closed)]
    assert torch.allclose(*values, atol=1e-12)


def test_the_predictor_hides_the_group_through_constant_weights():
    """Its gradient is that of loss - lambda_adv r a with r held fixed."""
    road = tables(lambda_adv=2.0)
    batch = (None, Y, GROUP)
    road.objective("predictor", batch, step=0).sum().backward()
    z = road.predictor.values.detach().clone().requires_grad_()
    ratio = (road.ratio.values.gather(1, GROUP[:, None])[:, 0]).detach().exp()
    for g in (0, 1):
        own = GROUP.eq(g)
        ratio[own] /= ratio[own].mean()
    success = nn.functional.cross_entropy(road.adversary(z), GROUP, reduction="none")
    (nn.functional.cross_entropy(z, Y, reduction="none") - 2 * ratio * success).sum().backward()
    assert torch.allclose(road.predictor.values.grad, z.grad, atol=1e-12)
    assert road.ratio.values.grad is None


class GroupedCase(ProcedureCase):
    """The battery's case, on batches of inputs, classes and groups."""

    def make(self, dtype=torch.float64, stack=None, **override):
        def network(*sizes):
            made = stacked_mlp(sizes, Seeds(tuple(range(stack or 1))))
            return made if stack else made.replica(0)

        hyper = {**self.hyper, **override}
        ratio = network(6, 8, 3) if hyper.pop("network", True) else None
        return ROAD(network(6, 8, 4), network(4, 8, 3), ratio, num_groups=3, **hyper).to(dtype)

    def inputs(self, dtype=torch.float64, lead=()):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(*lead, 6, 6, generator=g, dtype=torch.float64).to(dtype)
        return {"x": x, **{name: torch.randint(k, (*lead, 6), generator=g) for name, k in (("y", 4), ("group", 3))}}

    def build(self, **override):
        if "num_groups" in override:
            override.pop("num_groups")
            return lambda **_: ROAD(None, None, num_groups="no such number")
        return super().build(**override)


@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize("check", ROLE.checks, ids=lambda check: check.__name__)
def test_it_is_a_procedure(check, network):
    hyper = {"adversary_turns": 2, "ratio_turns": 1, "network": network}
    check(GroupedCase(ROAD, Mark("procedure"), hyper))


def test_turns():
    assert tables(adversary_turns=2, ratio_turns=3).turns(7) == ("adversary",) * 2 + ("ratio",) * 3 + ("predictor",)
    assert tables(num_groups=1).turns(0) == ("predictor",)


def rows(n=400):
    """A feature that tells much of the class, and one that tells the group and so something more of it."""
    rng = np.random.default_rng(0)
    s, u = rng.integers(2, size=n), rng.standard_normal(n)
    y = (u + 0.7 * (2 * s - 1) + 0.5 * rng.standard_normal(n) > 0).astype(int)
    return np.stack([u, 2 * s - 1 + 0.1 * rng.standard_normal(n)], axis=1), y, s


def gap(model, X, s):
    """By how much the groups' mean probability of "yes" differs."""
    probability = model.predict_proba(X)[:, 1]
    return abs(probability[s == 1].mean() - probability[s == 0].mean())


@pytest.mark.parametrize("kind", [BROADClassifier, ROADClassifier])
def test_the_estimator_hides_the_group(kind):
    X, y, s = rows()
    labels, names = np.array(["no", "yes"])[y], np.array(["f", "m"])[s]
    how = {"hidden": (16,), "lr": 0.003, "epochs": 15, "batch_size": 100, "lambda_r": 0.3}
    plain = kind(**how).fit(X, labels)
    fair = kind(lambda_adv=1.0, **how).fit(X, labels, sensitive_features=names)
    assert plain.score(X, labels) > 0.85
    assert list(fair.classes_) == ["no", "yes"]
    assert list(fair.groups_) == ["f", "m"]
    assert gap(plain, X, s) > 0.3
    assert gap(fair, X, s) < 0.15


def test_the_estimator_goes_through_scikit_learns_tools():
    X, y = make_classification(n_samples=120, n_informative=4, class_sep=2.0, random_state=0)
    model = make_pipeline(StandardScaler(), BROADClassifier(hidden=(16,), epochs=10, lr=0.05))
    scores = cross_val_score(model, X, y, cv=3, params={})
    assert scores.mean() > 0.85


def test_refusals():
    with pytest.raises(ValueError, match=r"group: expected shape \(6,\), got \(5,\)"):
        tables().objective("adversary", (None, Y, GROUP[:5]), step=0)
    with pytest.raises(ValueError, match="lambda_r: expected a number > 0, got 0"):
        road_weights(LOSSES, group=GROUP, lambda_r=0.0)
    X, y, s = rows(60)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        BROADClassifier().fit(X, y, sensitive_features=s[:-1])
    with pytest.raises(ValueError, match=r"sensitive_features: expected one label a row, got shape \(60, 2\)"):
        BROADClassifier().fit(X, y, sensitive_features=np.stack([s, s], 1))
    with pytest.raises(ValueError, match=r"hidden\[1\]: expected a whole number >= 1"):
        ROADClassifier(hidden=(8, 0)).fit(X, y)


def test_the_driver_lets_the_players_play_in_turn():
    road = tables(adversary_turns=1, ratio_turns=1)
    before = {name: [p.clone() for p in player.parameters()] for name, player in road.players().items()}
    optimizers = {name: torch.optim.SGD(player.parameters(), lr=0.1) for name, player in road.players().items()}
    means = advance(road, (None, Y, GROUP), optimizers, step=0)
    assert list(means) == ["adversary", "ratio", "predictor"]
    for name, player in road.players().items():
        assert all(not torch.equal(p, old) for p, old in zip(player.parameters(), before[name]))
