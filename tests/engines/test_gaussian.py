"""The engine of the feature-based detectors: sums that add up, and a whitener that is a pseudo-inverse."""

import numpy as np
import pytest
import torch
from scipy.linalg import pinvh
from scipy.sparse import csr_array

from lossary.ood._gaussian import ROWS, TiedGaussian, as_classes, as_features, merge, moments, whitening


@pytest.mark.parametrize("cut", [1, 20, 59])
def test_batches_merge_into_the_whole(cut):
    g = torch.Generator().manual_seed(0)
    features = 1e3 + torch.randn(60, 3, generator=g, dtype=torch.float64)
    index = torch.arange(60) // 15  # so that a batch lacks classes
    whole = moments(features, index, 4)
    parts = merge(moments(features[:cut], index[:cut], 4), moments(features[cut:], index[cut:], 4))
    torch.testing.assert_close(parts.counts, whole.counts)
    torch.testing.assert_close(parts.means, whole.means)
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_of_many_rows_are_numpys(dtype):
    g = torch.Generator().manual_seed(0)
    features = (30 + torch.randn(2 * ROWS + 7, 3, generator=g)).to(dtype)
    index = torch.arange(len(features)) % 3
    found, table = moments(features, index, 4), features.double().numpy()
    means = np.stack([table[index == c].mean(0) for c in range(3)])
    apart = table - means[index]
    np.testing.assert_allclose(found.means[:3], means, rtol=1e-14)
    np.testing.assert_allclose(found.scatter, apart.T @ apart, rtol=1e-10, atol=1e-9)
    assert found.means[3].tolist() == [0, 0, 0]
    assert torch.equal(found.scatter, found.scatter.mT)


def test_classes_move_to_their_new_positions():
    found = moments(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]), 2).spread(torch.tensor([0, 2]), 3)
    assert found.counts.tolist() == [2, 0, 1]
    assert found.means.flatten().tolist() == [2, 0, 8]


@pytest.mark.parametrize("rank", [5, 3, 0])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_whitener_squares_to_scipys_pseudo_inverse(rank, ridge):
    half = np.random.default_rng(rank).standard_normal((5, rank))
    covariance = half @ half.T
    w = whitening(torch.from_numpy(covariance), ridge).numpy()
    np.testing.assert_allclose(w @ w.T, pinvh(covariance + ridge * np.eye(5)), atol=1e-9)
    assert w.shape[1] == (5 if ridge else rank)


@pytest.mark.parametrize(("smallest", "rank"), [(1e-3, 3), (1e-12, 3), (1e-17, 2)])
def test_whitener_keeps_what_is_more_than_rounding(smallest, rank):
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    w = whitening(torch.from_numpy(axes @ np.diag([1.0, 0.5, smallest]) @ axes.T)).numpy()
    assert w.shape[1] == rank
    inverse = axes[:, :rank] / np.array([1.0, 0.5, smallest])[:rank] @ axes[:, :rank].T
    np.testing.assert_allclose(w @ w.T, inverse, rtol=1e-3, atol=1e-9)


def test_distances_are_differentiable():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(30, 3, generator=g, dtype=torch.float64)
    gaussian = TiedGaussian.of(moments(features, torch.arange(30) % 2, 2))
    rows = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gaussian.distances, (rows,))


def test_features_may_be_read_only_integers_or_lists():
    frozen = np.arange(6).reshape(3, 2)
    frozen.setflags(write=False)
    assert as_features("x", frozen).dtype is torch.float64
    assert as_features("x", [[1, 2]]).tolist() == [[1.0, 2.0]]
    maps = torch.arange(12.0).view(1, 2, 2, 3)
    assert as_features("x", maps).tolist() == [[2.5, 8.5]]  # the mean over space
    with pytest.raises(ValueError, match=r"x: expected a floating-point tensor, got torch.int64"):
        as_features("x", torch.ones(2, 2, dtype=torch.int64))
    assert as_features("x", np.array([[1, 2.5]], dtype=object)).tolist() == [[1.0, 2.5]]
    with pytest.raises(ValueError, match=r"x: expected a dense array, got a sparse one; give x.toarray\(\)"):
        as_features("x", csr_array(frozen))
    with pytest.raises(ValueError, match=r"x: expected numbers, got an array of <U1"):
        as_features("x", np.array([["a"]]))


def test_labels_are_numbers_or_names_but_no_fractions():
    rows = torch.zeros(3, 1)
    classes, index = as_classes("y", [2.0, 1.0, 2.0], rows)
    assert (classes.tolist(), index.tolist()) == ([1.0, 2.0], [1, 0, 1])
    assert as_classes("y", ["b", "a", "b"], rows)[1].tolist() == [1, 0, 1]
    for labels in ([0.5, 1.0, 2.0], [np.nan, 1.0, 2.0]):
        with pytest.raises(ValueError, match=r"y: expected class numbers or names, got fractions"):
            as_classes("y", labels, rows)
