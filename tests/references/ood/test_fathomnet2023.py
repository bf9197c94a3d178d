"""FathomNet's metrics against the competition's worked cases, scikit-learn and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, roc_auc_score

from lossary.ood import FathomNetScore, multilabel_map_at_k, scaled_auroc


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    logits, true = rng.standard_normal((30, 12)), rng.random((30, 12)) < 0.3
    true[:, 0] |= ~true.any(1)
    return logits, true.astype(float), rng.integers(0, 5, 30) / 4, rng.random(30) < 0.4


@pytest.mark.parametrize("named", [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 1, 3, 1]])
def test_the_competitions_own_examples_are_perfect(named):
    target = torch.zeros(1, 6)
    target[0, 1] = 1
    assert multilabel_map_at_k(torch.tensor([named]), target) == 1


def test_whole_lists_are_scikit_learns_label_ranking(sample):
    logits, true, _, _ = sample
    ranked = torch.from_numpy((-logits).argsort(1))
    got = multilabel_map_at_k(ranked, torch.from_numpy(true))
    assert got.item() == pytest.approx(label_ranking_average_precision_score(true, logits), rel=1e-6)


def test_whole_lists_are_torchmetrics_retrieval_map(sample):
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    logits, true, _, _ = (torch.from_numpy(a) for a in sample)
    peer = retrieval.RetrievalMAP(empty_target_action="neg")
    true[3] = 0  # an image without labels counts as 0 in both
    peer.update(logits.sigmoid().flatten(), true.long().flatten(), torch.arange(30).repeat_interleave(12))
    got = multilabel_map_at_k(logits.argsort(1, descending=True), true)
    torch.testing.assert_close(got.float(), peer.compute())


def test_cuts_gaps_repetitions_and_unknown_categories_by_hand():
    target = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]])
    ranked = torch.tensor([[0, 3, 1, 2], [1, 1, -1, 0], [9, 2, 2, 2]])
    # Of three labels two ranks are looked at: one hit of min(3, 2). Then 1/2, and a hit at rank 2.
    assert multilabel_map_at_k(ranked, target, k=2).item() == pytest.approx((1 / 2 + 1 / 2 + 1 / 2) / 3)
    whole = ((1 + 2 / 3 + 3 / 4) / 3, (1 + 2 / 4) / 2, 1 / 2)
    assert multilabel_map_at_k(ranked, target).item() == pytest.approx(np.mean(whole))


def test_scaled_auroc_is_scikit_learns(sample):
    _, _, score, outside = sample
    got = scaled_auroc(torch.from_numpy(score), torch.from_numpy(outside))
    assert got.item() == pytest.approx(2 * roc_auc_score(outside, score) - 1, abs=1e-12)
    assert scaled_auroc(-torch.from_numpy(score), torch.from_numpy(outside)).item() == pytest.approx(-got.item())
    assert math.isnan(scaled_auroc(torch.ones(3), torch.ones(3)))


def test_score_gathers_batches(sample):
    logits, true, score, outside = (torch.from_numpy(a) for a in sample)
    ranked, gathered = logits.argsort(1, descending=True), FathomNetScore(k=5)
    with pytest.raises(ValueError, match=r"compute: expected at least one batch"):
        gathered.compute()
    for rows in (slice(0, 7), slice(7, 30)):
        gathered.update(ranked[rows], true[rows], score[rows], outside[rows])
    expected = (multilabel_map_at_k(ranked, true, k=5) + 2 * roc_auc_score(outside, score) - 1) / 2
    assert gathered.compute().item() == pytest.approx(expected.item(), rel=1e-6)
    gathered.reset()
    gathered.update(ranked[:9], true[:9], score[:9], outside[:9])
    expected = (multilabel_map_at_k(ranked[:9], true[:9], k=5) + scaled_auroc(score[:9], outside[:9])) / 2
    assert gathered.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_refusals_name_the_argument():
    ranked, target = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"ranked: expected an int64 tensor, got torch.float32"):
        multilabel_map_at_k(ranked.float(), target)
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 4\), got \(1, 4\)"):
        multilabel_map_at_k(ranked, target[:1])
    with pytest.raises(ValueError, match=r"k: expected a whole number >= 1, got 0"):
        FathomNetScore(k=0)
    with pytest.raises(ValueError, match=r"outside: expected one flag an image, shape \(2,\), got \(3,\)"):
        FathomNetScore().update(ranked, target, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"score: expected shape \(2,\), got \(3,\)"):
        FathomNetScore().update(ranked, target, torch.ones(3), torch.ones(2))
