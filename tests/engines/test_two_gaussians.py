"""The mixture on a line against scikit-learn's, and against the split that a search over all splits finds."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from lossary.weighting._two_gaussians import _lower_part, two_gaussians


def heaps(low, high, n=600, share=0.6):
    g = torch.Generator().manual_seed(0)
    size = round(share * n)
    parts = [mean + deviation * torch.randn(k, generator=g) for (mean, deviation), k in ((low, size), (high, n - size))]
    return torch.cat(parts)[torch.randperm(n, generator=g)].double()


@pytest.mark.parametrize(
    ("low", "high", "tol"),
    [((-3.0, 0.8), (1.0, 0.5), 1e-5), ((0.0, 2.0), (1.0, 0.3), 1e-5), ((0.2, 0.1), (0.7, 0.1), 1e-2)],
)
def test_it_is_scikit_learns(low, high, tol):
    values = heaps(low, high)
    found = two_gaussians(values, tol=tol)
    start = 1 - _lower_part(values).numpy()  # 0 for the lower part
    means = [[values.numpy()[start == k].mean()] for k in (0, 1)]
    weights = [(start == k).mean() for k in (0, 1)]
    precisions = [[[1 / (values.numpy()[start == k].var() + 1e-6)]] for k in (0, 1)]
    given = {"means_init": means, "weights_init": weights, "precisions_init": precisions}
    theirs = GaussianMixture(2, tol=tol, max_iter=1000, random_state=0, **given).fit(values[:, None].numpy())
    order = theirs.means_.ravel().argsort()
    assert found.mean.tolist() == pytest.approx(theirs.means_.ravel()[order].tolist(), abs=1e-9)
    assert found.variance.tolist() == pytest.approx(theirs.covariances_.ravel()[order].tolist(), rel=1e-9)
    assert found.weight.tolist() == pytest.approx(theirs.weights_[order].tolist(), rel=1e-9)
    posterior = theirs.predict_proba(values[:, None].numpy())[:, order[1]]
    assert found.high(values).tolist() == pytest.approx(posterior.tolist(), abs=1e-9)


def test_it_starts_from_the_best_split():
    values = heaps((0.0, 1.0), (1.5, 0.4), n=60).round(decimals=1)  # with many equal ones
    ordered = np.unique(values)
    squares = [
        sum(values[side].var(correction=0) * side.sum() for side in (values <= t, values > t)) for t in ordered[:-1]
    ]
    best = ordered[int(np.argmin(squares))]
    assert torch.equal(_lower_part(values), (values <= best).double())


def test_two_numbers_and_equal_heaps():
    found = two_gaussians(torch.tensor([5.0, 1.0, 1.0, 5.0]))
    assert found.mean.tolist() == pytest.approx([1.0, 5.0])
    assert found.variance.tolist() == pytest.approx([1e-6] * 2)
    assert found.weight.tolist() == pytest.approx([0.5, 0.5])
    assert found.high(torch.tensor([1.0, 4.0])).tolist() == pytest.approx([0.0, 1.0])
