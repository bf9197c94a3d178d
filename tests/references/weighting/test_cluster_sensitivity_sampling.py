"""Sensitivity sampling against its formula followed sample by sample, frequencies, and unbiasedness."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import lossary.weighting.cluster_sensitivity_sampling as cluster_sensitivity_sampling
from lossary.roles import mark_of
from lossary.roles.weighting import ROLE as WEIGHTING
from lossary.weighting import ClusterSensitivitySampler, sensitivity_probabilities

BLOBS = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [30.0, 30.0]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n=40, dtype=torch.float64):
    """Four blobs far apart, n rows in each."""
    noise = torch.randn(4 * n, 2, generator=generator(1), dtype=torch.float64)
    return (BLOBS.repeat_interleave(n, 0) + noise).to(dtype)


def by_hand(points, centres, losses, holder, exponent):
    points, guesses = points.tolist(), []
    for point in points:
        distances = [math.dist(point, points[c]) for c in centres]
        nearest = min(range(len(centres)), key=distances.__getitem__)
        guesses.append(losses[nearest] + holder * distances[nearest] ** exponent)
    return [guess / math.fsum(guesses) for guess in guesses]


@pytest.mark.parametrize("exponent", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("holder", [0.0, 0.3])
def test_probabilities_follow_the_formula(holder, exponent):
    centres, losses = [3, 50, 51, 130], [0.5, 0.0, 2.0, 1.25]
    found = sensitivity_probabilities(
        rows(), torch.tensor(centres), torch.tensor(losses, dtype=torch.float64), holder=holder, exponent=exponent
    )
    assert found.tolist() == pytest.approx(by_hand(rows(), centres, losses, holder, exponent), rel=1e-9)


def test_guesses_that_are_all_zero_leave_all_samples_alike():
    found = sensitivity_probabilities(rows(), torch.tensor([0, 90]), torch.zeros(2, dtype=torch.float64), holder=0.0)
    assert found.tolist() == pytest.approx([1 / 160] * 160)


def asked(**how):
    """A sampler, and the centres for which it asked."""
    calls = []

    def loss(centres):
        calls.append(centres)
        return points[centres].sum(1).abs() / 10

    points = how.pop("points", rows())
    made = ClusterSensitivitySampler(points, loss, **{"size": 30, "num_clusters": 4, "generator": generator(), **how})
    (centres,) = calls  # once
    return made, centres.tolist(), loss(centres).tolist()


@pytest.mark.parametrize("rows_at_once", [8192, 16])
def test_it_asks_at_one_central_sample_of_every_cluster(rows_at_once, monkeypatch):
    monkeypatch.setattr(cluster_sensitivity_sampling, "_ROWS", rows_at_once)
    _, centres, _ = asked()
    blobs = rows().view(4, 40, 2)
    expected = [b * 40 + (blobs[b] - blobs[b].mean(0)).norm(dim=1).argmin().item() for b in range(4)]
    assert centres == expected


@pytest.mark.parametrize("holder", [None, 0.7])
def test_its_chances_and_weights(holder):
    made, centres, losses = asked(holder=holder, num_clusters=5, exponent=1.0)
    if holder is None:
        pairs = [(i, j) for i in range(5) for j in range(i)]
        slopes = sorted(
            abs(losses[i] - losses[j]) / math.dist(rows()[centres[i]], rows()[centres[j]]) for i, j in pairs
        )
        holder = slopes[8]  # nine of ten are no larger
    expected = by_hand(rows(), centres, losses, holder, 1.0)
    assert made.probabilities.tolist() == pytest.approx(expected, rel=1e-5)
    assert made.weights.tolist() == pytest.approx([1 / (160 * p) for p in expected], rel=1e-5)


def test_samples_are_drawn_with_their_chances():
    made, _, _ = asked(size=200_000)
    drawn, p = made.positions.bincount(minlength=160) / 200_000, made.probabilities
    assert ((drawn - p) / (p / 200_000).sqrt()).abs().max() < 5
    losses = torch.rand(160, generator=generator(5))
    assert (made.weights * losses)[made.positions].mean().item() == pytest.approx(losses.mean().item(), rel=0.02)


def test_a_sample_without_loss_is_never_drawn_and_weighs_nothing():
    made = ClusterSensitivitySampler(
        [[0.0], [1.0], [1.0], [3.0]], lambda c: c * 1.0, size=500, num_clusters=4, holder=0.0, generator=generator()
    )
    assert made.probabilities[0] == made.weights[0] == 0
    assert sorted(set(made.positions.tolist())) == [1, 2, 3]


def test_an_epoch_in_a_loader_gives_an_estimate_of_the_mean_loss_and_its_gradient():
    points = rows(dtype=torch.float32)
    made, _, _ = asked(points=points, size=4000)
    w = torch.tensor([0.5, -0.25], requires_grad=True)
    loader = DataLoader(TensorDataset(points, torch.arange(160)), sampler=made, batch_size=500)
    for x, index in loader:
        losses = F.softplus(x @ w)
        (made(losses, index=index) * losses).mean().div(8).backward()
    (expected,) = torch.autograd.grad(F.softplus(points @ w).mean(), w)
    assert w.grad.tolist() == pytest.approx(expected.tolist(), rel=0.1)


def test_epochs_are_permutations_of_one_subset_and_resume():
    made, _, _ = asked()
    first, second = list(made), list(made)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(made.positions.tolist())
    other, _, _ = asked(generator=generator(9))
    other.load_state_dict(made.state_dict())
    assert list(other) == list(made)


def test_as_a_weighting_it_passes_all_but_the_check_that_forbids_weights_by_index():
    made = ClusterSensitivitySampler
    case = WEIGHTING.case(made, mark_of(made), mark_of(made).examples[0])
    for check in WEIGHTING.checks:
        if check.__name__ not in ("fair", "documented"):
            check(case)


def test_few_distinct_rows_and_a_single_cluster():
    alike = ClusterSensitivitySampler(torch.ones(6, 3), size=4, num_clusters=3, generator=generator())
    assert alike.weights.tolist() == [1.0] * 6
    one = ClusterSensitivitySampler([[0.0], [1.0], [2.0]], size=4, num_clusters=1, generator=generator())
    assert one.weights.tolist() == [1.0] * 3  # no slope can be seen, so distances do not count


def test_refusals():
    how = {"size": 3, "num_clusters": 2, "generator": generator()}
    for bad in ([-1.0, 1.0], [math.inf, 1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="loss: expected finite numbers >= 0 at the centres, got"):
            ClusterSensitivitySampler(BLOBS, lambda c, bad=bad: torch.tensor(bad), **how)
    with pytest.raises(ValueError, match=r"loss: expected shape \(2,\), got \(4,\)"):
        ClusterSensitivitySampler(BLOBS, lambda c: torch.ones(4), **how)
    with pytest.raises(ValueError, match="embeddings: expected finite numbers"):
        ClusterSensitivitySampler(BLOBS.log(), **how)
    with pytest.raises(ValueError, match="num_clusters: expected a whole number >= 1, got 0"):
        ClusterSensitivitySampler(BLOBS, **{**how, "num_clusters": 0})
    with pytest.raises(ValueError, match="holder: expected a number >= 0, got -1"):
        ClusterSensitivitySampler(BLOBS, **how, holder=-1.0)
    with pytest.raises(ValueError, match=r"losses: expected shape \(1,\)"):
        sensitivity_probabilities(BLOBS, torch.tensor([], dtype=torch.int64), torch.ones(0), holder=1.0)
