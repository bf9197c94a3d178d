"""Five prototypicality metrics against closed forms, an exhaustive search in the plane, and scipy."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from scipy.stats import rankdata

from lossary.weighting import (
    adversarial_distance_score,
    ensemble_agreement_score,
    holdout_retraining_score,
    model_confidence_score,
    privacy_training_score,
    rank_percentile,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(rows):
    """A smooth model of the plane with three classes."""
    w, v = normal(8, 2, seed=1), normal(3, 8, seed=2)
    return torch.tanh(rows @ (0.6 * w.T)) @ v.T


def test_the_distance_is_exact_for_linear_models_of_images():
    weight, bias, x = normal(5, 12), normal(5, seed=1), normal(20, 3, 2, 2, seed=2)

    def model(images):
        return images.flatten(1) @ weight.T + bias

    z = model(x)
    expected = []
    for logits in z:
        y = int(logits.argmax())
        others = [k for k in range(5) if k != y]
        expected.append(min(((logits[y] - logits[k]) / (weight[y] - weight[k]).norm()).item() for k in others))
    assert adversarial_distance_score(model, x, steps=1).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_distance_is_nearly_the_smallest_there_is():
    x = normal(20, 2, seed=3)
    angle = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    radius = torch.linspace(0, 4, 801, dtype=torch.float64)
    circles = radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    nearest = []
    for row in x:
        changed = curved(row + circles).argmax(-1) != curved(row).argmax()
        nearest.append(radius[changed.any(1)].min())
    excess = adversarial_distance_score(curved, x) - torch.stack(nearest)
    assert excess.min() > -0.005  # the grid's own error
    assert excess.median() < 0.01
    assert excess.max() < 0.05


def test_a_model_that_never_changes_its_mind_and_too_few_steps():
    x = normal(4, 2)
    assert adversarial_distance_score(lambda rows: rows * 0 + torch.tensor([0.0, 1.0]), x).tolist() == [math.inf] * 4

    def halving(rows):  # the tangent of -x^2 leads half of the way to 0, where class 1 begins
        return torch.cat([torch.zeros_like(rows), torch.where(rows < 0, -rows.square(), rows)], 1)

    far = torch.tensor([[-3.0]], dtype=torch.float64)
    assert adversarial_distance_score(halving, far, steps=3).tolist() == [math.inf]
    assert adversarial_distance_score(halving, far).tolist() == pytest.approx([3.0], rel=1e-4)


def test_retraining_is_the_sum_of_both_divergences():
    before, after = normal(2, 6, 4), normal(2, 6, 4, seed=1)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    both = F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(p, q, log_target=True, reduction="none")
    assert torch.allclose(holdout_retraining_score(before, after), -both.sum(-1).mean(0))
    assert holdout_retraining_score(before[0], before[0]).tolist() == [0.0] * 6


def test_agreement_is_scipys_divergence_over_all_pairs():
    logits = 3 * normal(4, 6, 3)
    p = logits.softmax(-1).numpy()
    expected = [-sum(jensenshannon(a[i], b[i]) ** 2 for a, b in combinations(p, 2)) / math.comb(4, 2) for i in range(6)]
    assert ensemble_agreement_score(logits).tolist() == pytest.approx(expected, abs=1e-12)
    opposed = torch.tensor([[[0.0, -1e4]], [[-1e4, 0.0]]])
    assert ensemble_agreement_score(opposed).item() == pytest.approx(-math.log(2))


def test_confidence_is_the_mean_of_the_largest_probabilities():
    logits = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.2, 0.8]]]).log()
    assert model_confidence_score(logits).tolist() == pytest.approx([0.8, 0.65])


def test_privacy_is_the_first_budget_at_which_half_of_the_runs_are_right():
    right = torch.tensor(  # budget, run, example
        [
            [[0, 0, 1, 0], [0, 0, 0, 0]],
            [[1, 0, 0, 0], [1, 1, 0, 0]],
            [[1, 1, 1, 0], [0, 1, 1, 0]],
        ]
    )
    logits = F.one_hot(1 - right, 2).double()  # class 0 where right
    score = privacy_training_score(logits, torch.zeros(4, dtype=torch.int64), budgets=(0.5, 2.0, 8.0))
    assert score.tolist() == [-2.0, -2.0, -0.5, -math.inf]


def test_percentiles_are_scipys_ranks():
    score = torch.tensor([3.0, -math.inf, 2.0, 2.0, math.inf, 2.0, 0.0])
    assert rank_percentile(score).tolist() == pytest.approx(((rankdata(score.numpy()) - 0.5) / 7).tolist())


def test_refusals():
    with pytest.raises(ValueError, match="candidates: expected a whole number >= 2"):
        adversarial_distance_score(curved, normal(3, 2), candidates=1)
    with pytest.raises(ValueError, match="after: expected shape"):
        holdout_retraining_score(normal(3, 2), normal(2, 2))
    with pytest.raises(ValueError, match="input: expected logits of at least two models"):
        ensemble_agreement_score(normal(1, 3, 2))
    with pytest.raises(ValueError, match="input: expected logits of at least one model"):
        model_confidence_score(normal(0, 3, 2))
    with pytest.raises(ValueError, match="budgets: expected 2 increasing numbers"):
        privacy_training_score(normal(2, 1, 3, 4), torch.tensor([0, 1, 2]), budgets=(2.0, 1.0))
