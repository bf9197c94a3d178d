"""Poses from actions against scoringrules' energy score, SciPy's energy distance and plain loops over samples."""

import math

import numpy as np
import pytest
import scoringrules
import torch
from scipy.stats import energy_distance
from torch import nn

from lossary.detection import (
    DiscoNet,
    DissimilarityLearner,
    dissimilarity_coefficient,
    diversity,
    min_expected_loss_prediction,
    pose_distance,
    pose_energy_score,
)
from lossary.roles import advance

J, D, FEATURES, ACTIONS = 3, 2, 4, 2


@pytest.fixture
def samples():
    """Samples of two distributions, of two images: (5, 2, 3, 2) and (4, 2, 3, 2)."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, J, D, generator=g, dtype=torch.float64) + n for n in (5, 4)]


def loss(first, second):
    return sum(math.dist(a, b) for a, b in zip(first.tolist(), second.tolist())) / J


def test_dissimilarity_by_loops(samples):
    prediction, conditional = samples
    for gamma in (0.5, 0.2):
        got = dissimilarity_coefficient(prediction, conditional, gamma=gamma)
        for image in range(2):
            w, theta = prediction[:, image], conditional[:, image]
            between = sum(loss(a, b) for a in w for b in theta) / 20
            own_w = sum(loss(a, b) for i, a in enumerate(w) for j, b in enumerate(w) if i != j) / 20
            own_theta = sum(loss(a, b) for i, a in enumerate(theta) for j, b in enumerate(theta) if i != j) / 12
            expected = between - gamma * own_theta - (1 - gamma) * own_w
            assert got[image].item() == pytest.approx(expected, rel=1e-12)


def test_default_gamma_is_a_half(samples):
    torch.testing.assert_close(dissimilarity_coefficient(*samples), dissimilarity_coefficient(*samples, gamma=0.5))
    assert not torch.allclose(dissimilarity_coefficient(*samples), dissimilarity_coefficient(*samples, gamma=0.4))


def test_on_a_line_it_is_half_the_energy_distance():
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal(7), rng.standard_normal(9) + 1
    by_scipy = energy_distance(p, q) ** 2 / 2  # whose own diversities count a sample's distance 0 from itself
    own = [np.abs(x[:, None] - x).sum() / 2 * (1 / len(x) ** 2 - 1 / (len(x) * (len(x) - 1))) for x in (p, q)]
    got = dissimilarity_coefficient(*(torch.from_numpy(x).view(-1, 1, 1) for x in (p, q))).item()
    assert got == pytest.approx(by_scipy + sum(own), abs=1e-12)


def test_energy_score_of_one_joint_is_scoringrules(samples):
    drawn, pose = samples[0][:, :, :1], samples[1][0][:, :1]
    expected = scoringrules.es_ensemble(
        pose.squeeze(1).numpy(), drawn.squeeze(2).movedim(0, 1).numpy(), estimator="fair", backend="numpy"
    )
    np.testing.assert_allclose(pose_energy_score(drawn, pose).numpy(), expected, rtol=1e-12)


def test_another_loss_is_used_throughout(samples):
    def squared(a, b):
        return (a - b).square().sum((-1, -2))

    w, theta = samples
    # With squares, twice the means' distance less the variances' excess: each pair's own diversity is 2 variances.
    expected = (w.mean(0) - theta.mean(0)).square().sum((-1, -2))
    expected -= w.var(0).sum((-1, -2)) / 5 + theta.var(0).sum((-1, -2)) / 4
    torch.testing.assert_close(dissimilarity_coefficient(w, theta, delta=squared), expected)
    score = pose_energy_score(w, theta[0], delta=squared)
    unbiased = (w.mean(0) - theta[0]).square().sum((-1, -2)) - w.var(0).sum((-1, -2)) / 5
    torch.testing.assert_close(score, unbiased)


def test_a_sample_is_not_compared_with_itself(samples):
    def offset(a, b):
        return pose_distance(a, b) + 7  # also where a is b

    torch.testing.assert_close(diversity(samples[0], delta=offset), diversity(samples[0]) + 7)


def test_prediction_is_the_sample_nearest_to_all(samples):
    drawn = samples[0]
    got = min_expected_loss_prediction(drawn)
    for image in range(2):
        totals = [sum(loss(a, b) for b in drawn[:, image]) for a in drawn[:, image]]
        assert got[image].tolist() == drawn[totals.index(min(totals)), image].tolist()
    spread = torch.tensor([0.0, 4.0, 5.0, 30.0]).view(4, 1, 1)
    assert min_expected_loss_prediction(spread).item() == 4
    mean_is_far = min_expected_loss_prediction(spread, delta=lambda a, b: (a - b).square().sum((-1, -2)))
    assert mean_is_far.item() == 5


def test_gradients_agree_with_finite_differences_and_coinciding_samples_are_harmless(samples):
    inputs = [s.requires_grad_() for s in samples]
    torch.autograd.gradcheck(dissimilarity_coefficient, inputs, fast_mode=True)
    same = torch.zeros(3, 1, J, D, requires_grad=True)
    pose_energy_score(same, torch.ones(1, J, D)).sum().backward()
    assert same.grad.isfinite().all()


class Echo(nn.Module):
    """Gives back what it sees."""

    def forward(self, x):
        return x


def test_each_sample_sees_its_own_noise_and_its_own_input():
    net = DiscoNet(Echo(), joints=4, noise_size=3)
    x, condition = torch.arange(6.0).view(3, 2), 10 + torch.arange(9).view(3, 3)
    drawn = net(x, condition, samples=50, generator=torch.Generator().manual_seed(0)).flatten(-2)
    assert drawn.shape == (50, 3, 8)
    assert torch.equal(drawn[..., :2], x.expand(50, 3, 2))
    assert torch.equal(drawn[..., 2:5], condition.expand(50, 3, 3).float())
    noise = drawn[..., 5:]
    assert noise.unique().numel() == noise.numel()
    assert noise.min() < -0.9
    assert noise.max() > 0.9
    assert abs(noise.mean()) < 0.1


def test_replicas_draw_from_their_own_generators():
    def generators():
        return [torch.Generator().manual_seed(i) for i in (1, 2)]

    net = DiscoNet(Echo(), joints=2, noise_size=2)
    x = torch.arange(12.0).view(2, 3, 2)
    both = net(x, samples=5, generator=generators())
    for s in range(2):
        torch.testing.assert_close(both[:, s], net(x[s], samples=5, generator=generators()[s]))


def test_the_encoder_runs_once():
    seen = []
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    encoder.register_forward_hook(lambda *_: seen.append(1))
    net = DiscoNet(Echo(), joints=2, noise_size=2, encoder=encoder)
    assert net(torch.zeros(3, 1, 2, 2), samples=20).shape == (20, 3, 2, 2)
    assert seen == [1]


def learner(**hyper):
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    heads = nn.Linear(FEATURES + 2, J * D), nn.Linear(FEATURES + ACTIONS + 2, J * D)
    torch.random.set_rng_state(torch_state)
    nets = (DiscoNet(head.double(), joints=J, noise_size=2) for head in heads)
    return DissimilarityLearner(*nets, num_actions=ACTIONS, **hyper)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    x, pose = torch.randn(6, FEATURES, generator=g).double(), torch.randn(6, J, D, generator=g).double()
    return x, torch.arange(6) % ACTIONS, pose, torch.arange(6) < 2


def test_objective_is_the_coefficient_and_on_annotated_images_the_score_besides(batch):
    made = learner(samples=4, gamma=0.3)
    x, action, pose, _ = batch
    for player in ("conditional", "prediction"):
        g = torch.Generator().manual_seed(0)
        conditional = made.conditional(x, torch.eye(2)[action], samples=4, generator=g)
        prediction = made.prediction(x, samples=4, generator=g)
        own = {"conditional": conditional, "prediction": prediction}[player]
        expected = dissimilarity_coefficient(prediction, conditional, gamma=0.3)
        expected[:2] += pose_energy_score(own, pose)[:2]
        got = made.objective(player, batch, step=0, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(got, expected)


def test_a_player_moves_alone_and_unknown_poses_are_not_looked_at(batch):
    x, action, pose, annotated = batch
    hidden = (x, action, torch.where(annotated[:, None, None], pose, torch.nan), annotated)
    made = learner()
    for name, other in (("conditional", "prediction"), ("prediction", "conditional")):
        made.zero_grad()
        made.objective(name, hidden, step=0, generator=torch.Generator().manual_seed(0)).mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in getattr(made, name).parameters())
        assert all(p.grad is None or not p.grad.any() for p in getattr(made, other).parameters())


def test_warm_up_learns_from_annotated_images_alone(batch):
    made = learner(warmup=3)
    before = made.objective("prediction", batch, step=2, generator=torch.Generator().manual_seed(0))
    after = made.objective("prediction", batch, step=3, generator=torch.Generator().manual_seed(0))
    assert before[2:].abs().max() == 0
    assert before[:2].min() > 0
    assert after[2:].abs().min() > 0


def test_training_brings_the_distributions_together_and_survives_a_state_dict(batch):
    made = learner()
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=0.05) for name, net in made.players().items()}
    g = torch.Generator().manual_seed(0)
    means = [advance(made, batch, optimizers, step=step, generator=g)["prediction"].item() for step in range(50)]
    assert np.mean(means[-10:]) < 0.7 * np.mean(means[:10])
    other = learner()
    other.load_state_dict(made.state_dict())
    poses = [m(batch[0], generator=torch.Generator().manual_seed(2)) for m in (made, other)]
    torch.testing.assert_close(*poses)
    assert poses[0].shape == (6, J, D)


def test_half_precision_is_finite(samples):
    half = [s.bfloat16() for s in samples]
    assert dissimilarity_coefficient(*half).dtype == torch.bfloat16
    assert dissimilarity_coefficient(*half).isfinite().all()


def test_refusals(samples, batch):
    first, second = samples
    with pytest.raises(ValueError, match="first: expected at least two samples"):
        diversity(first[:1])
    with pytest.raises(ValueError, match="first: expected at least one sample"):
        diversity(first[:0], second)
    with pytest.raises(ValueError, match=r"second: expected samples of shape \(2, 3, 2\), got \(2, 2, 2\)"):
        diversity(first, second[:, :, :2])
    with pytest.raises(ValueError, match="gamma: expected a number >= 0 and <= 1"):
        dissimilarity_coefficient(first, second, gamma=1.5)
    with pytest.raises(ValueError, match=r"pose: expected shape \(2, 3, 2\)"):
        pose_energy_score(first, second)
    with pytest.raises(ValueError, match="second: expected poses"):
        pose_distance(first, second[..., :1])
    with pytest.raises(ValueError, match="samples: expected a floating-point tensor"):
        min_expected_loss_prediction(first.long())
    with pytest.raises(ValueError, match="noise_size: expected a whole number >= 1"):
        DiscoNet(Echo(), joints=2, noise_size=0)
    with pytest.raises(ValueError, match="samples: expected a whole number >= 2"):
        learner(samples=1)
    with pytest.raises(ValueError, match="batch: expected inputs, actions, poses"):
        learner().objective("prediction", batch[:3], step=0)
    with pytest.raises(ValueError, match="generator: expected one, or one for each of 2 replicas, got 3"):
        DiscoNet(Echo(), joints=1, noise_size=2)(torch.zeros(2, 1, 0), samples=2, generator=[torch.Generator()] * 3)
