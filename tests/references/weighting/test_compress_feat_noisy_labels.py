"""Compressed co-teaching against cleanlab's co-teaching loss, and nested dropout against its own distribution."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.roles import advance
from lossary.weighting import CompressedCoTeaching, NestedDropout

cross_entropy = partial(F.cross_entropy, reduction="none")


class Fixed(nn.Module):
    """A network whose logits are its parameters, whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits


def fixed_pair(**hyper):
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 10, 4, generator=g)
    return first, second, CompressedCoTeaching(Fixed(first), Fixed(second), cross_entropy, **hyper)


Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("forget", [0.0, 0.3, 0.45, 0.8])
def test_the_objective_is_cleanlabs_co_teaching_loss(forget):
    coteaching = pytest.importorskip("cleanlab.experimental.coteaching")
    first, second, pair = fixed_pair(label_noise=forget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it passes an argument that torch deprecates
        theirs = coteaching.loss_coteaching(first, second, Y, forget)
    expected = sum(theirs) * int((1 - forget) * 10)  # it divides a mean by the number once more
    assert pair.objective("networks", (None, Y), step=0).mean().item() == pytest.approx(expected.item(), abs=1e-6)


def test_each_network_learns_from_the_others_choice():
    first, second, pair = fixed_pair(label_noise=0.7)
    pair.objective("networks", (None, Y), step=0).mean().backward()
    taught = [network.logits.grad.abs().sum(1).nonzero().flatten().tolist() for network in pair.networks]
    smallest = [sorted(cross_entropy(z, Y).argsort()[:3].tolist()) for z in (first, second)]
    assert taught == smallest[::-1]
    assert smallest[0] != smallest[1]


def test_the_output_is_the_mean_of_both_networks():
    first, second, pair = fixed_pair(label_noise=0.0)
    assert torch.allclose(pair(None), (first + second) / 2)


def test_forgetting_grows_to_the_noise_rate():
    _, _, pair = fixed_pair(label_noise=0.4, gradual=20)
    picked = [int((pair._picked(pair.networks[0], None, Y, step) > 0).sum()) for step in (0, 5, 10, 20, 1000)]
    assert picked == [10, 9, 8, 6, 6]  # int(10 (1 - 0.4 min(step / 20, 1)))
    _, _, pair = fixed_pair(label_noise=0.99)
    assert (pair._picked(pair.networks[0], None, Y, 0) > 0).sum() == 1  # never none


def test_stacked_networks_are_as_many_pairs():
    g = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 3, 10, 4, generator=g)

    def stacked_loss(input, target):
        return cross_entropy(input.movedim(-1, 1), target)

    def pair(a, b):
        return CompressedCoTeaching(Fixed(a), Fixed(b), stacked_loss if a.ndim == 3 else cross_entropy, label_noise=0.5)

    values = pair(first, second).objective("networks", (None, Y.expand(3, -1)), step=0)
    rows = [pair(a, b).objective("networks", (None, Y), step=0) for a, b in zip(first, second)]
    assert torch.allclose(values, torch.stack(rows), atol=1e-6)


def test_choosing_leaves_batch_statistics_and_frozen_modules_alone():
    def network():
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4, dtype=torch.float32))

    first, second = network(), network()
    first[0].eval()  # frozen
    pair = CompressedCoTeaching(first, second, cross_entropy, label_noise=0.2)
    x = 5 + torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    pair.objective("networks", (x, Y), step=0)
    assert not first[0].training
    assert first[0].running_mean.tolist() == [0.0] * 3
    assert second[0].running_mean.tolist() == pytest.approx((0.1 * x.mean(0)).tolist())  # one update, from learning


def test_k_is_drawn_as_stated_once_for_each_replica():
    sigma, features, rounds = 2.5, 6, 20_000
    nested = NestedDropout(sigma=sigma, generator=torch.Generator().manual_seed(0))
    cut = nested(torch.ones(rounds, 2, features))
    assert torch.equal(cut[:, 0], cut[:, 1])
    assert torch.equal(cut, cut.cummin(-1).values)  # ones first, then zeros
    share = torch.bincount(cut[:, 0].sum(-1).long(), minlength=features + 1) / rounds
    odds = [0.0] + [math.exp(-((k / sigma) ** 2)) for k in range(1, features + 1)]
    assert share.tolist() == pytest.approx([o / sum(odds) for o in odds], abs=5 * 0.5 * rounds**-0.5)


def test_replicas_with_generators_of_their_own_draw_as_they_would_alone():
    def generator(s):
        return torch.Generator().manual_seed(s)

    stack = NestedDropout(sigma=10.0, generator=[generator(s) for s in range(3)])
    alone = [NestedDropout(sigma=10.0, generator=generator(s)) for s in range(3)]
    for _ in range(5):
        assert torch.equal(stack(torch.ones(3, 2, 20)), torch.stack([nested(torch.ones(2, 20)) for nested in alone]))


def test_evaluation_keeps_what_training_shows():
    cut = NestedDropout(sigma=1.2).eval()(torch.ones(1, 5))
    assert cut.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0]]  # 2 sigma = 2.4, upwards


def test_truncation_is_kept_in_the_state():
    nested = NestedDropout(sigma=3.0).eval()
    assert nested(torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    nested.truncate(3)
    other = NestedDropout(sigma=3.0).eval()
    other.load_state_dict(nested.state_dict())
    assert other(torch.ones(1, 4)).tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_features_come_out_in_order_of_importance():
    """A linear code under nested dropout: feature 1 alone must do what it can, so it carries the principal axis."""
    g = torch.Generator().manual_seed(3)
    scale = torch.tensor([3.0, 1.5, 0.5])
    axes = torch.linalg.qr(torch.randn(3, 3, generator=g)).Q
    x = torch.randn(400, 3, generator=g) * scale @ axes.T
    encoder, decoder = (nn.Parameter(0.3 * torch.randn(3, 3, generator=g)) for _ in range(2))
    nested, optimizer = NestedDropout(sigma=3.0, generator=g), torch.optim.SGD([encoder, decoder], 0.01, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        (nested(x @ encoder) @ decoder - x).square().sum(1).mean().backward()
        optimizer.step()
    with torch.no_grad():
        errors = [(nested.eval().truncate(k)(x @ encoder) @ decoder - x).square().sum(1).mean() for k in (1, 2, 3)]
    left = x.square().mean(0).sum() - torch.linalg.svdvals(x).square().cumsum(0) / len(x)  # by principal components
    assert torch.stack(errors).tolist() == pytest.approx(left.tolist(), abs=0.05)


def test_the_driver_trains_both_networks_of_a_built_pair():
    torch.manual_seed(0)

    def model(name):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    pair = CompressedCoTeaching.build(model, cross_entropy, {"label_noise": 0.3}, sigma=4.0, gradual=5)
    assert [type(m).__name__ for m in pair.networks[0]] == ["Linear", "ReLU", "NestedDropout", "Linear"]
    optimizers = {"networks": torch.optim.SGD(pair.parameters(), lr=0.1, momentum=0.9)}
    g = torch.Generator().manual_seed(4)
    x = torch.randn(10, 6, generator=g)
    before = cross_entropy(pair.eval()(x), Y).sort().values[:7].mean()
    for step in range(100):
        advance(pair.train(), (x, Y), optimizers, step=step, generator=g)
    assert cross_entropy(pair.eval()(x), Y).sort().values[:7].mean() < 0.2 * before


def test_refusals():
    with pytest.raises(ValueError, match=r"label_noise: expected a number >= 0 and < 1, got 1.0"):
        fixed_pair(label_noise=1.0)
    with pytest.raises(ValueError, match=r"sigma: expected a number > 0, got 0.0"):
        NestedDropout(sigma=0.0)
    with pytest.raises(ValueError, match="input: expected at least 2 dimensions"):
        NestedDropout()(torch.ones(4))
    with pytest.raises(ValueError, match=r"model: expected torch.nn.Sequential networks, got Linear"):
        CompressedCoTeaching.build(lambda name: nn.Linear(2, 2), cross_entropy, {"label_noise": 0.1})
