"""Human-aligned calibration against loops over cells, scikit-learn's curve, an integer programme and its theorem."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, milp
from sklearn.base import clone
from sklearn.calibration import calibration_curve
from sklearn.exceptions import NotFittedError

from lossary.uncertainty import (
    HumanAlignedCalibrator,
    alignment_error,
    best_monotone_decisions,
    multicalibrate_by_group,
)


def cases(n=1500, levels=4, seed=0):
    """Human levels, and a model whose evidence misleads on the lowest of them."""
    rng = np.random.default_rng(seed)
    b, h = rng.random(n), rng.integers(levels, size=n)
    return b, h, (rng.random(n) < np.where(h == 0, 1 - b, b)).astype(int)


@pytest.mark.parametrize("pairs", ["large", "all"])
@pytest.mark.parametrize("at_least", [1, 60])
def test_alignment_error_cell_by_cell(pairs, at_least):
    b, h, y = cases()
    b[:40] = np.arange(40) % 8 / 8  # some on the edges between bins
    shares, number = {}, 0
    for i, j in itertools.product(range(4), range(8)):
        inside = [y for b, h, y in zip(b, h, y) if h == i and j / 8 <= b < (j + 1) / 8]
        if len(inside) >= at_least:
            shares[i, j] = sum(inside) / len(inside)
    violations = []
    for i, j, k, m in itertools.product(range(4), range(8), range(4), range(8)):
        if i <= k and j <= m:
            number += 1
            if (i, j) in shares and (k, m) in shares:
                violations.append(max(0.0, shares[i, j] - shares[k, m]))
    maximum, expected = alignment_error(b, h, y, human_bins=None, at_least=at_least, pairs=pairs)
    assert maximum == pytest.approx(max(violations), rel=1e-12)
    assert expected == pytest.approx(sum(violations) / (number if pairs == "all" else len(violations)), rel=1e-9)
    assert 0 < expected < maximum


def test_human_confidence_is_cut_into_bins_alike_frequent():
    b, h, y = cases()
    scale = h + np.linspace(0, 0.5, len(h))  # orders within levels
    ranks = np.argsort(np.argsort(scale, kind="stable"), kind="stable")
    third = np.repeat([0, 1, 2], 500)[ranks]
    assert alignment_error(b, scale, y) == alignment_error(b, third, y, human_bins=None)
    assert alignment_error(torch.tensor(b), torch.tensor(scale), torch.tensor(y)) == alignment_error(b, scale, y)


def test_nothing_to_compare_is_no_error():
    assert alignment_error([0.2, 0.9], [0, 1], [1, 0], human_bins=None) == (0.0, 0.0)  # no cell of 30
    assert alignment_error([0.2] * 30, [0] * 30, [1] * 30) == (0.0, 0.0)  # one cell
    assert alignment_error([0.1, 0.9] * 30, [0, 0] * 30, [0, 1] * 30)[0] == 0.0  # rises


def test_histogram_of_one_level_is_scikit_learns_curve():
    b, _, y = cases(n=600, levels=1)
    share, _ = calibration_curve(y, b, n_bins=6, strategy="quantile")
    calibrator = HumanAlignedCalibrator(confidence_bins=6, human_bins=1).fit(b, np.zeros(600), y)
    np.testing.assert_allclose(calibrator.values_[0], share, rtol=1e-12)


def test_levels_are_calibrated_by_themselves_and_aligned_where_they_learned():
    b, h, y = cases()
    calibrator = HumanAlignedCalibrator(human_bins=None)
    told = calibrator.fit(b, h, y).transform(b, h)
    for level in range(4):
        own = h == level
        order = np.argsort(b[own])
        for part in np.array_split(order, 5):
            np.testing.assert_allclose(told[own][part], y[own][part].mean(), rtol=1e-12)
        alone = clone(calibrator).fit(b[own], h[own], y[own])
        np.testing.assert_array_equal(alone.transform(b[own], h[own]), told[own])
    assert alignment_error(b, h, y, human_bins=None, at_least=1)[0] > 0.2
    aligned, _ = alignment_error(told, h, y, human_bins=None, confidence_bins=None, at_least=1)
    assert aligned == pytest.approx(0.0, abs=1e-12)


def test_ties_few_cases_and_new_levels():
    calibrator = HumanAlignedCalibrator(confidence_bins=5, human_bins=None)
    calibrator.fit([0.5, 0.5, 0.5, 0.9], [1.0, 1.0, 1.0, 3.0], [0, 1, 1, 1])
    told = calibrator.transform([0.0, 1.0, 0.1, 0.1, 0.1], [1.0, 1.0, 0.0, 2.0, 9.0])
    np.testing.assert_allclose(told, [2 / 3, 2 / 3, 2 / 3, 1.0, 1.0])  # 0 counts as level 1, 2 and 9 as level 3
    as_tensors = [torch.tensor(v) for v in ([0.5, 0.5, 0.5, 0.9], [1.0, 1.0, 1.0, 3.0], [0, 1, 1, 1])]
    assert clone(calibrator).fit(*as_tensors).values_[0] == calibrator.values_[0]


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_steps_leave_every_cell_close_and_the_theorem_holds(alpha):
    b, h, y = cases(3000)
    told = multicalibrate_by_group(b, h, y, b, h, alpha=alpha, bins=10)
    for level, j in itertools.product(range(4), range(10)):
        inside = (h == level) & ((told * 10).astype(int).clip(max=9) == j)
        if inside.sum() >= 30:
            assert abs(told[inside].mean() - y[inside].mean()) <= alpha
    error, _ = alignment_error(told, h, y, human_bins=None, confidence_bins=10)
    assert error <= 2 * alpha + 0.1
    assert ((told - y) ** 2).mean() < ((b - y) ** 2).mean() - alpha**2 * 0.1


def test_steps_by_hand():
    common = {"alpha": 0.1, "at_least": 3}
    b, y = [0.55, 0.55, 0.55, 0.62, 0.62, 0.62], [1, 1, 0, 1, 0, 1]
    got = multicalibrate_by_group(b, [7] * 6, y, [0.5, 0.62, 0.1], [7] * 3, **common)
    np.testing.assert_allclose(got, [0.5 + 2 / 3 - 0.55, 0.62, 0.1], rtol=1e-12)  # 0.62 is close enough to 2/3
    never = multicalibrate_by_group(b, [7] * 6, [0] * 6, b, [7] * 6, **common)
    np.testing.assert_allclose(never, 0.0, atol=1e-12)
    apart = multicalibrate_by_group([0.4, 0.4, 0.4], [0, 0, 1], [1, 1, 1], [0.4], [0], **common)
    assert apart.tolist() == [0.4]  # cells of two groups do not add up to three cases
    cut = multicalibrate_by_group([0.95, 0.9], [0, 0], [1, 1], [0.99, 0.9], [0, 0], alpha=0.01, at_least=2)
    np.testing.assert_allclose(cut, [1.0, 0.9875], rtol=1e-12)  # + 0.075, cut to 1; then + 0.0125


def by_integer_programme(p, m):
    """The most right decisions, as the follow-up study's code finds them."""
    cells = list(itertools.product(*map(range, p.shape)))
    rows = []
    for a, (i, j) in enumerate(cells):
        for b, (k, n) in enumerate(cells):
            if i <= k and j <= n and a != b:
                row = np.zeros(len(cells))
                row[[a, b]] = 1, -1
                rows.append(row)
    gain = (m * (2 * p - 1)).ravel()
    solved = milp(
        -gain, constraints=LinearConstraint(np.array(rows), ub=0), integrality=np.ones_like(gain), bounds=(0, 1)
    )
    return -solved.fun


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (3, 8), (4, 13)])
def test_best_monotone_rule_against_an_integer_programme(shape):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        p, m = rng.random(shape), rng.integers(0, 5, shape)
        d = best_monotone_decisions(p, m)
        assert (np.diff(d.astype(int), axis=0) >= 0).all()
        assert (np.diff(d.astype(int), axis=1) >= 0).all()
        assert (m * (2 * p - 1))[d].sum() == pytest.approx(by_integer_programme(p, m), abs=1e-9)


def test_refusals_name_the_argument():
    b, h, y = cases(100)
    with pytest.raises(NotFittedError):
        HumanAlignedCalibrator().transform(b, h)
    with pytest.raises(ValueError, match=r"confidence: expected numbers from 0 to 1, got"):
        alignment_error(b * 2, h, y)
    with pytest.raises(ValueError, match=r"human: expected 100 numbers, got 99"):
        HumanAlignedCalibrator().fit(b, h[1:], y)
    with pytest.raises(ValueError, match=r"human: contains NaN"):
        HumanAlignedCalibrator().fit(b, h * np.nan, y)
    with pytest.raises(ValueError, match=r"outcome: expected 100 zeros and ones"):
        alignment_error(b, h, y + 1)
    with pytest.raises(ValueError, match=r"confidence_bins: expected a whole number >= 1, got 0"):
        HumanAlignedCalibrator(confidence_bins=0).fit(b, h, y)
    with pytest.raises(ValueError, match=r"pairs: expected one of 'large', 'all', got 'some'"):
        alignment_error(b, h, y, pairs="some")
    with pytest.raises(ValueError, match=r"new_group: expected groups among the 4 of group"):
        multicalibrate_by_group(b, h, y, b, h + 1)
    with pytest.raises(ValueError, match=r"alpha: expected a number > 0, got 0"):
        multicalibrate_by_group(b, h, y, b, h, alpha=0.0)
    with pytest.raises(ValueError, match=r"probability: expected numbers from 0 to 1, got 2 to 2"):
        best_monotone_decisions([[2.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"mass: expected numbers >= 0 of shape \(1, 1\)"):
        best_monotone_decisions([[0.5]], [[1.0, 2.0]])
