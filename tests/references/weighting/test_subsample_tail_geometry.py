"""Subsampling and tails against a real SVM on the line, closed forms, and groups drawn point by point."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.svm import SVC
from torch.utils.data import DataLoader, TensorDataset

from lossary.weighting import (
    BalancedSubsample,
    max_margin_1d_threshold,
    relative_displacement,
    tail_asymmetry_experiment,
)


def test_the_threshold_is_that_of_a_hard_margin_svm():
    rng = np.random.default_rng(0)
    lower, upper = rng.standard_exponential((4, 30)) - 9, rng.standard_exponential((4, 7)) + 3.5
    found = max_margin_1d_threshold(torch.from_numpy(lower), torch.from_numpy(upper))
    for a, b, threshold in zip(lower, upper, found.tolist()):
        svm = SVC(kernel="linear", C=1e6).fit(np.concatenate([a, b])[:, None], [0] * 30 + [1] * 7)
        assert threshold == pytest.approx(-svm.intercept_[0] / svm.coef_[0, 0], abs=1e-3)


def test_overlapping_and_touching_groups_have_no_threshold():
    lower = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    found = max_margin_1d_threshold(lower, torch.tensor([[2.0], [2.0], [2.0]]))
    assert found[0] == 1.5
    assert found[1:].isnan().all()
    for bad in (torch.zeros(3, 0), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"upper: expected shape \(3, 'm'\)"):
            max_margin_1d_threshold(lower, bad)


def kept(labels, seed=0):
    return BalancedSubsample(labels, generator=torch.Generator().manual_seed(seed))


def test_every_label_keeps_as_many_rows_as_the_rarest_each_row_with_the_same_chance():
    labels = torch.tensor([7] * 12 + [3] * 4 + [5] * 3)[torch.randperm(19, generator=torch.Generator().manual_seed(1))]
    rounds, seen = 1500, torch.zeros(19)
    for seed in range(rounds):
        found = kept(labels, seed).kept
        assert labels[found].unique(return_counts=True)[1].tolist() == [3, 3, 3]
        seen[found] += 1 / rounds
    chance = 3 / torch.tensor([{7: 12, 3: 4, 5: 3}[label] for label in labels.tolist()])
    assert (seen - chance).abs().max() < 5 * 0.5 * rounds**-0.5


def test_a_loader_shows_the_same_rows_every_epoch_in_another_order():
    sampler = kept([0] * 90 + [1] * 10)
    loader = DataLoader(TensorDataset(torch.arange(100)), sampler=sampler, batch_size=8)
    first, second = (torch.cat([rows for (rows,) in loader]) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert first.sort().values.tolist() == second.sort().values.tolist() == sampler.kept.tolist()
    assert len(sampler) == 20
    assert len(kept([4] * 6)) == 6  # one label alone is balanced
    for bad in ([], [[0, 1]], [0.5, 1.0]):
        with pytest.raises(ValueError, match="labels: expected"):
            kept(bad)


def test_displacement_of_laplace_and_uniform_noise_in_closed_form():
    n, m = 4000, 25
    tail = [-math.expm1(math.log(0.5) / k) for k in (n, m)]
    reach = [-math.log(2 * q) for q in tail]  # of Laplace
    got = relative_displacement(stats.laplace(), majority=n, minority=m)
    assert got == pytest.approx((reach[0] - reach[1]) / sum(reach), rel=1e-12)
    got = relative_displacement(stats.uniform(-1, 2), majority=n, minority=m)
    assert got == pytest.approx((tail[1] - tail[0]) / (1 - sum(tail)), rel=1e-10)


@pytest.mark.parametrize("index", [1, 2, 5])
def test_displacement_of_power_tails_does_not_die_out(index):
    """Signs times Pareto noise: P(noise > x) = x^(-index) / 2."""

    class SignedPareto:
        isf = staticmethod(lambda q: (2 * q) ** (-1 / index))

    root = 16 ** (1 / index)
    got = relative_displacement(SignedPareto, majority=16 * 10**9, minority=10**9)
    assert got == pytest.approx((root - 1) / (root + 1), rel=1e-7)


def test_gaussian_displacement_falls_as_the_logarithm_of_the_size():
    sizes = (10**20, 10**40, 10**80)
    scaled = [
        4 * math.log(n) / math.log(9) * relative_displacement(stats.norm(), majority=9 * n, minority=n) for n in sizes
    ]
    assert scaled == pytest.approx([1, 1, 1], abs=0.06)


@pytest.mark.parametrize("noise", [stats.laplace(), stats.t(3)], ids=["laplace", "t3"])
def test_the_experiment_is_what_points_drawn_one_by_one_show(noise):
    draws, rng = 20_000, np.random.default_rng(1)
    found = tail_asymmetry_experiment(noise, majority=40, minority=5, draws=draws, generator=np.random.default_rng(0))
    majority, minority = noise.rvs((draws, 40), random_state=rng), noise.rvs((draws, 5), random_state=rng)
    gap = np.median(majority.max(1) + (-minority).max(1)) / 2
    whole, part = (majority - gap), (majority[:, :5] - gap)
    separable = whole.max(1) <= (minority + gap).min(1)
    assert found["gap"] == pytest.approx(gap, rel=0.02)
    for prefix, rows in (("", whole), ("subsampled ", part)):
        threshold = (rows.max(1) + (minority + gap).min(1))[separable] / 2
        errors = np.maximum(noise.cdf(threshold - gap), noise.sf(threshold + gap))
        for name, values in (("displacement", threshold / gap), ("error", errors)):
            noise_of_mean = values.std() * math.sqrt(2 / len(values))  # both sides are such means
            assert found[prefix + name] == pytest.approx(values.mean(), abs=4 * noise_of_mean)


def test_equal_groups_gain_nothing():
    found = tail_asymmetry_experiment(stats.norm(), majority=30, minority=30, generator=np.random.default_rng(0))
    assert found["error"] == found["subsampled error"]
    assert found["displacement"] == found["subsampled displacement"]


def test_sizes_out_of_range_are_refused():
    for call in (relative_displacement, tail_asymmetry_experiment):
        extra = {} if call is relative_displacement else {"generator": np.random.default_rng(0)}
        with pytest.raises(ValueError, match="majority: expected a whole number >= 9, got 8"):
            call(stats.norm(), majority=8, minority=9, **extra)
