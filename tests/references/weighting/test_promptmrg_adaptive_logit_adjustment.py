"""Adaptive logit adjustment by hand, at its optimum in closed form, and against the official trainer's update."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lossary.weighting import AdaptiveLogitAdjustedLoss, LearningStatusTracker, diagnosis_prompt_tokens

LOGITS = torch.tensor(
    [
        [[0.5, 1.0, -1.0], [2.0, 0.0, 0.3], [0.1, 0.2, 0.3]],
        [[-0.5, 0.4, 1.2], [0.0, -2.0, 1.0], [1.5, 0.0, 0.7]],
    ],
    dtype=torch.float64,
)  # two samples, three labels, three states
STATES = torch.tensor([[1, 0, 2], [1, 1, 0]])


def test_states_by_hand():
    """-log of e^z pi / sum, one label at a time; the last label is auxiliary, its pi is 1."""
    criterion = AdaptiveLogitAdjustedLoss((20, 5), auxiliary=1)
    expected = []
    for row, states in zip(LOGITS.tolist(), STATES.tolist()):
        terms = []
        for z, state, pi in zip(row, states, (1.0, 0.25, 1.0)):
            odds = [math.exp(z[0]), pi * math.exp(z[1]), math.exp(z[2])]
            terms.append(-math.log(odds[state] / sum(odds)))
        expected.append(sum(terms) / 3)
    assert criterion(LOGITS, STATES).tolist() == pytest.approx(expected, abs=1e-7)


def test_two_states_are_the_binary_form():
    z, y = LOGITS[..., 0], STATES.clamp(max=1)
    pairs = torch.stack([torch.zeros_like(z), z], -1)
    criterion = AdaptiveLogitAdjustedLoss((20, 5, 11))
    torch.testing.assert_close(criterion(pairs, y), criterion(z, y.double()))


def test_nothing_is_added_at_evaluation():
    criterion = AdaptiveLogitAdjustedLoss((20, 5, 11)).eval()
    expected = torch.nn.functional.cross_entropy(LOGITS.movedim(-1, 1), STATES, reduction="none").mean(-1)
    torch.testing.assert_close(criterion(LOGITS, STATES), expected)


def test_at_the_optimum_a_positive_logit_stands_log_pi_higher():
    """Of a label that is positive with probability q, the expected loss is least at logit(q) - log pi."""
    q = torch.tensor([0.5, 0.1], dtype=torch.float64)
    pi = torch.tensor([1.0, 0.2], dtype=torch.float64)
    z = (q.logit() - pi.log()).unsqueeze(0).requires_grad_()
    criterion = AdaptiveLogitAdjustedLoss((50, 10)).double()
    each = [criterion(z, torch.tensor([pair], dtype=torch.float64)) for pair in ([1, 1], [1, 0], [0, 1], [0, 0])]
    chance = [q[0] * q[1], q[0] * (1 - q[1]), (1 - q[0]) * q[1], (1 - q[0]) * (1 - q[1])]
    (slope,) = torch.autograd.grad(sum(c * v.sum() for c, v in zip(chance, each)), z)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-8, rtol=0)


def test_the_update_is_that_of_the_official_trainer():
    """Its numpy steps: scores of positives summed over positives, over the largest, auxiliary labels 1."""
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(9, 5, 4, generator=g), torch.randint(4, (9, 5), generator=g)) for _ in range(3)]
    tracker, criterion = LearningStatusTracker(5), AdaptiveLogitAdjustedLoss((3, 4, 5), auxiliary=2)
    for logits, states in batches:
        tracker.update(logits, states)
    criterion.update(tracker.compute())
    logits = np.concatenate([z.numpy() for z, _ in batches])[:, :3]
    labels = np.concatenate([y.numpy() for _, y in batches])[:, :3] == 1
    odds = np.exp(logits)
    scores = (odds[..., 1] / odds.sum(-1) * labels).sum(0) / labels.sum(0)
    assert criterion.prior.tolist() == pytest.approx([*(scores / scores.max()), 1.0, 1.0], abs=1e-6)
    tracker.reset()
    assert tracker.compute().isnan().all()


def test_sigmoid_scores_count_positives_only():
    tracker = LearningStatusTracker(2)
    logit = math.log(3.0)  # probability 3/4
    tracker.update(torch.tensor([[logit, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tracker.update(torch.tensor([[-logit, 9.0]]), torch.tensor([[1.0, 0.0]]))
    assert tracker.compute().tolist() == pytest.approx([0.5, 0.5])


def test_the_status_is_of_all_processes(monkeypatch):
    here, there = LearningStatusTracker(1), LearningStatusTracker(1)
    here.update(torch.zeros(3, 1), torch.ones(3, 1))
    there.update(torch.full((1, 1), math.log(3.0)), torch.ones(1, 1))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(torch.stack([there.total, there.count])))
    assert here.compute().item() == pytest.approx((3 * 0.5 + 0.75) / 4)
    assert here.count.item() == 3  # asking changes nothing


def test_labels_without_positives():
    criterion = AdaptiveLogitAdjustedLoss((40, 0, 10), floor=0.01)
    assert criterion.prior.tolist() == pytest.approx([1.0, 0.01, 0.25])
    nan = math.nan
    assert criterion.update(torch.tensor([0.2, nan, 0.8])).prior.tolist() == pytest.approx([0.25, 0.01, 1.0])
    assert criterion.update(torch.tensor([0.5, 0.0, nan])).prior.tolist() == pytest.approx([1.0, 0.01, 1.0])
    for nothing in ([nan, nan, nan], [0.0, 0.0, 0.0]):
        assert criterion.update(torch.tensor(nothing)).prior.tolist() == pytest.approx([1.0, 0.01, 1.0])


def test_the_prior_survives_a_state_dict():
    learned = AdaptiveLogitAdjustedLoss((4, 1)).update(torch.tensor([0.1, 0.3]))
    resumed = AdaptiveLogitAdjustedLoss((4, 1))
    resumed.load_state_dict(learned.state_dict())
    assert resumed.prior.tolist() == pytest.approx([1 / 3, 1.0])


def test_prompts_are_tokens_of_the_most_likely_states():
    tokens = torch.tensor([100, 101, 102])
    assert diagnosis_prompt_tokens(LOGITS, state_tokens=tokens).tolist() == [[101, 100, 102], [102, 102, 100]]


def test_refusals():
    with pytest.raises(ValueError, match=r"class_counts: expected a label with positives, got \(0, 0\)"):
        AdaptiveLogitAdjustedLoss((0, 0))
    with pytest.raises(ValueError, match="target: expected 2 labels in the last dimension, got shape"):
        AdaptiveLogitAdjustedLoss((3, 4))(LOGITS, STATES)
    with pytest.raises(ValueError, match="input: expected more than 4 states, got shape"):
        AdaptiveLogitAdjustedLoss((3, 4, 5), positive=4)(LOGITS, STATES)
    with pytest.raises(ValueError, match="status: expected 2 numbers, one for each label, got 4"):
        AdaptiveLogitAdjustedLoss((3, 4)).update(torch.ones(4))
    with pytest.raises(ValueError, match="state_tokens: expected shape"):
        diagnosis_prompt_tokens(LOGITS, state_tokens=torch.tensor([1, 2]))
