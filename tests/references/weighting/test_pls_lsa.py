"""PLS-LSA against the official code's detections and losses, and against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from lossary.weighting import (
    AlternatingNoiseDetector,
    LinearSeparationDetector,
    PLSLoss,
    SmallLossGMMDetector,
    pseudo_label_confidence,
)

G = torch.arange(60.0)
LOSSES = torch.where(G % 3 == 0, 3 + torch.sin(G), 0.8 + 0.5 * torch.cos(1.3 * G))
FEATURES = torch.stack(
    [
        torch.sin(G) + 1.2 * (G % 3 == 0),
        torch.cos(2 * G),
        torch.sin(3 * G) + 1,
        torch.cos(0.5 * G) + (G % 5 == 0),
    ],
    1,
)
# Trainer.detect_noise of PaulAlbert31/LSA on these, by "loss" and by "linear".
SMALL_LOSS = list(range(0, 60, 3))
LINEAR = [0, 1, 2, 3, 6, 7, 8, 9, 12, 14, 15, 20, 21, 26, 27, 33, 34, 39, 40, 45, 46, 48, 51, 52, 54, 57, 58, 59]

# Trainer_PLS_improved.compute_losses of the same, epoch 3, mixup, without and with --pls-penalty.
N, K = 8, 4
Z, WEAK = (f(torch.arange(32.0).view(N, K) * a) * 2 for f, a in ((torch.sin, 1.0), (torch.cos, 1.7)))
U, V = (f(torch.arange(24.0).view(N, 3) * a) for f, a in ((torch.sin, 2.0), (torch.cos, 3.0)))
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
NOISY = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1]).bool()
WEIGHT = torch.tensor([1.0, 0.3, 1.0, 1.0, 0.8, 1.0, 1.0, 0.5])
MIXED = {"partner": torch.tensor([3, 0, 7, 1, 2, 6, 5, 4]), "lam": 0.7, "projections": (U, V)}
OFFICIAL = {False: 7.0048127, True: 7.0272732}
GUESSED = [0.5810227, 0.0016147, 0.0010306, 0.4163319]  # its guessed_labels_soft[1]


def labels(pls):
    return torch.where(NOISY.unsqueeze(1), pls.pseudo_labels(WEAK), F.one_hot(Y, K).float())


def found(mask):
    return mask.nonzero().flatten().tolist()


def test_detections_are_those_of_the_official_code():
    assert found(SmallLossGMMDetector().fit(LOSSES).predict(LOSSES)) == SMALL_LOSS
    assert found(LinearSeparationDetector().fit(LOSSES, FEATURES).predict(LOSSES, FEATURES)) == LINEAR
    detector = AlternatingNoiseDetector()
    turns = [detector.fit(LOSSES, FEATURES, epoch=epoch).predict(LOSSES, FEATURES) for epoch in range(4)]
    assert [found(mask) for mask in turns] == [LINEAR, SMALL_LOSS] * 2


@pytest.mark.parametrize("penalty", [False, True])
def test_the_loss_is_that_of_the_official_code(penalty):
    pls = PLSLoss(prior_penalty=penalty)
    assert labels(pls)[1].tolist() == pytest.approx(GUESSED, abs=1e-6)
    assert pls(Z, labels(pls), weight=WEIGHT, **MIXED).mean().item() == pytest.approx(OFFICIAL[penalty], abs=1e-5)


def test_a_trusted_set_takes_the_place_of_the_small_losses():
    """Two clouds, and a loss that says nothing: ten samples suffice to tell them apart."""
    g = torch.Generator().manual_seed(0)
    strange = torch.arange(200) % 2 == 0
    features = torch.randn(200, 3, generator=g, dtype=torch.float64) + 8 * strange.unsqueeze(1) - 4
    losses = torch.rand(200, generator=g, dtype=torch.float64)
    trusted = (torch.arange(10), strange[:10])
    detector = AlternatingNoiseDetector(("linear",)).fit(losses, features, epoch=7, trusted=trusted)
    assert torch.equal(detector.predict(losses, features), strange)
    assert not torch.equal(SmallLossGMMDetector().fit(losses).predict(losses), strange)


def test_the_plane_does_not_see_the_length_of_features():
    detector = LinearSeparationDetector().fit(LOSSES, FEATURES)
    longer = FEATURES * (1 + G.unsqueeze(1))
    expected = detector.probability(LOSSES, FEATURES)
    assert torch.allclose(detector.probability(LOSSES, longer), expected, atol=1e-5)


def test_one_heap_one_answer_and_losses_that_are_not_finite():
    alike = torch.full((60,), 2.0)
    assert not SmallLossGMMDetector().fit(alike).predict(alike).any()
    assert not LinearSeparationDetector().fit(alike, FEATURES).predict(alike, FEATURES).any()
    known = (torch.arange(3), torch.ones(3).bool())
    assert LinearSeparationDetector().fit(alike, FEATURES, trusted=known).predict(alike, FEATURES).all()
    spoilt = LOSSES.clone()
    spoilt[[1, 2]] = torch.tensor([torch.inf, torch.nan])
    assert found(SmallLossGMMDetector().fit(spoilt).predict(spoilt)) == sorted([1, 2, *SMALL_LOSS])


def test_confidence_is_the_posterior_of_the_lower_heap_of_the_noisy():
    losses = torch.where(G % 4 == 0, 2.5 + torch.sin(G), 0.3 + 0.2 * torch.cos(G))
    noisy = G % 2 == 0
    weight = pseudo_label_confidence(losses, noisy)
    # scikit-learn's mixture with the official settings on the scaled losses of the noisy samples
    official = [0.0, 0.99828, 0.0, 0.98999, 0.0, 0.99822, 0.0, 0.99751, 0.0, 0.99463]
    assert weight[::2][:10].tolist() == pytest.approx(official, abs=1e-4)
    assert weight[1::2].tolist() == [1.0] * 30
    losses[[0, 2]] = torch.inf
    assert pseudo_label_confidence(losses, noisy)[[0, 2, 4]].tolist() == pytest.approx([0.0] * 3, abs=1e-4)


def test_confidence_of_few_or_equal_losses():
    few = torch.tensor([True, True, False, False])
    assert pseudo_label_confidence(torch.tensor([1.0, 5.0, 2.0, 3.0]), few).tolist() == [1.0] * 4
    assert pseudo_label_confidence(torch.ones(4), torch.ones(4).bool()).tolist() == [1.0] * 4


def test_pseudo_labels_are_the_sharpened_mean_of_views():
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])  # 0.7 and 0.3
    cubed = PLSLoss(gamma=3.0).pseudo_labels(one.log(), other.log())
    assert cubed.tolist()[0] == pytest.approx([0.343 / 0.37, 0.027 / 0.37])


def test_the_contrast_written_out():
    zeros, target = torch.zeros(N, K), F.one_hot(Y, K).float()
    got = PLSLoss(temperature=0.5)(zeros, target, projections=(U, V)) - math.log(K)
    for i in range(N):
        cosine = [F.cosine_similarity(U[i], V[k], dim=0).item() / 0.5 for k in range(N)]
        total = math.fsum(math.exp(c) for c in cosine)
        alike = [k for k in range(N) if Y[k] == Y[i]]
        assert got[i].item() == pytest.approx(-sum(math.log(math.exp(cosine[k]) / total) for k in alike) / 2, abs=1e-5)


def test_the_penalty_is_zero_for_even_classes_and_finite_for_dead_ones():
    pls, target = PLSLoss(prior_penalty=True), torch.eye(2)
    even = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(pls(even, target), PLSLoss()(even, target), atol=1e-6)
    dead = torch.tensor([[1e3, 0.0], [1e3, 0.0]])
    penalty = pls(dead, target) - PLSLoss()(dead, target)
    assert penalty.tolist() == pytest.approx([500 - math.log(2)] * 2)


def test_gradients_agree_and_weights_of_zero_count_nothing():
    z, u, v = (t.double()[:4].requires_grad_() for t in (Z, U, V))
    mixed = {"partner": torch.tensor([1, 0, 3, 2]), "lam": 0.7, "weight": WEIGHT[:4].double()}
    target = labels(PLSLoss()).double()[:4]

    def call(z, u, v):
        return PLSLoss(prior_penalty=True)(z, target, projections=(u, v), **mixed)

    assert torch.autograd.gradcheck(call, (z, u, v))
    assert PLSLoss()(Z, labels(PLSLoss()), weight=torch.zeros(N)).tolist() == [0.0] * N


def test_it_runs_on_a_stack_of_replicas():
    pls, target = PLSLoss(), labels(PLSLoss())
    lams = torch.tensor([0.6, 0.9])

    def call(z, lam):
        return pls(z, target, weight=WEIGHT, partner=MIXED["partner"], lam=lam, projections=(U, V))

    stacked = torch.vmap(call)(torch.stack([Z, -Z]), lams)
    assert torch.allclose(stacked, torch.stack([call(Z, lams[0]), call(-Z, lams[1])]))


def test_refusals():
    with pytest.raises(ValueError, match="losses: expected at least one that is finite"):
        SmallLossGMMDetector().fit(torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="features: expected 60 rows"):
        LinearSeparationDetector().fit(LOSSES, FEATURES[:5])
    with pytest.raises(ValueError, match="LinearSeparationDetector: call fit first"):
        LinearSeparationDetector().predict(LOSSES, FEATURES)
    with pytest.raises(ValueError, match="order: expected one of 'linear', 'loss', got 'rrl'"):
        AlternatingNoiseDetector(("rrl",))
    with pytest.raises(ValueError, match="noisy: expected bool of shape"):
        pseudo_label_confidence(LOSSES, G)
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        PLSLoss(temperature=0.0)
    with pytest.raises(ValueError, match="target: expected shape"):
        PLSLoss()(Z, labels(PLSLoss())[:3])
