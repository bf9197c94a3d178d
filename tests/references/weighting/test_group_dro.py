"""Group DRO against the official code's numbers, a saddle point in closed form, and itself on two processes."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from lossary.criterion import Criterion
from lossary.weighting import GroupDRO, InfoBatch, worst_group_accuracy
from tests.processes import in_two

BATCHES = (
    ([0.5, 1.0, 0.25, 2.0, 0.0], [0, 0, 1, 2, 1]),
    ([0.1, 3.0, 1.5, 0.7, 0.4], [0, 0, 0, 2, 0]),  # group 1 is absent
    ([4.0, 0.2, 0.3, 0.9, 1.1], [1, 1, 2, 2, 0]),
)
# compute_robust_loss of LossComputer in kohpangwei/group_DRO on these batches: shares q and robust loss.
OFFICIAL = (
    ([0.2777885, 0.2032344, 0.5189772], 1.271700),
    ([0.3557867, 0.1393281, 0.5048853], 0.798153),
    ([0.3635280, 0.2347113, 0.4017606], 1.133831),
)


def batch(losses, group):
    return torch.tensor(losses), torch.tensor(group)


def test_shares_and_robust_loss_are_those_of_the_official_code():
    dro = GroupDRO(3, step_size=0.5)
    for (losses, group), (shares, robust) in zip(BATCHES, OFFICIAL):
        losses, group = batch(losses, group)
        weighted = (dro(losses, group=group) * losses).mean()
        assert dro.q.tolist() == pytest.approx(shares, abs=1e-6)
        assert weighted.item() == pytest.approx(robust, abs=1e-6)


def test_the_adjustment_is_that_of_the_official_code_where_all_groups_are_present():
    dro = GroupDRO(3, step_size=0.5, adjustment=1.5, group_counts=(900, 80, 20))
    for i, shares in ((0, [0.2544024, 0.1974074, 0.5481902]), (2, [0.2329651, 0.3161110, 0.4509239])):
        losses, group = batch(*BATCHES[i])
        dro(losses, group=group)
        assert dro.q.tolist() == pytest.approx(shares, abs=1e-6)


def test_an_absent_group_loses_to_the_present_ones_by_the_adjusted_factor_alone():
    dro = GroupDRO(2, step_size=0.1, adjustment=3.0, group_counts=(9, 100))
    dro(torch.tensor([0.5, 1.5]), group=torch.tensor([0, 0]))
    assert (dro.q[0] / dro.q[1]).item() == pytest.approx(math.exp(0.1 * (1.0 + 3.0 / 3.0)), abs=1e-6)


def test_without_steps_it_is_the_mean_of_group_means():
    losses, group = batch([1.0, 2.0, 6.0, 4.0], [0, 0, 0, 1])
    assert (GroupDRO(2, step_size=0.0)(losses, group=group) * losses).mean().item() == pytest.approx((3.0 + 4.0) / 2)


def test_descent_reaches_the_saddle_point():
    """min over x of max((x - 1)^2, 4 (x + 1)^2) lies where they cross, x = -1/3, with q = 2/3 and 1/3."""
    x = torch.zeros((), requires_grad=True)
    dro = GroupDRO(2, step_size=0.1)
    group = torch.tensor([0, 1])
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(400):
        losses = torch.stack([(x - 1) ** 2, 4 * (x + 1) ** 2])
        optimizer.zero_grad()
        (dro(losses, group=group) * losses).mean().backward()
        optimizer.step()
    assert x.item() == pytest.approx(-1 / 3, abs=1e-3)
    assert dro.q.tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)


def test_it_weighs_a_criterion():
    squared = partial(torch.nn.functional.mse_loss, reduction="none")
    criterion = Criterion(squared, weighting=GroupDRO(2, step_size=1.0), class_dim=None)
    value = criterion(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), group=torch.tensor([0, 1]))
    assert value.item() == pytest.approx(math.e / (1 + math.e))  # q_1 * 1


def test_refusals():
    with pytest.raises(ValueError, match="group_counts: expected 3 numbers >= 1 for the adjustment, got None"):
        GroupDRO(3, adjustment=1.0)
    with pytest.raises(ValueError, match="losses: expected 1 dimensions, got shape"):
        GroupDRO(3)(torch.zeros(2, 4), group=torch.zeros(2, 4, dtype=torch.int64))  # two replicas would share a q


def test_worst_group_accuracy_looks_at_groups_that_occur():
    guess, target = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0, 1, 1, 0, 0, 0])
    logits = torch.nn.functional.one_hot(guess, 2).double()
    group = torch.tensor([5, 5, 2, 2, 2, 5])
    assert worst_group_accuracy(logits, target, group).item() == pytest.approx(2 / 3)


def _one_of_two(rank):
    """What one of two processes sees of every batch: weighted mean, shares, and the losses InfoBatch remembers."""
    dro, info = GroupDRO(3, step_size=0.5), InfoBatch(4, epochs=1, generator=torch.Generator().manual_seed(0))
    seen = []
    for losses, group in BATCHES:
        losses, group = (values[rank::2] for values in batch([*losses, 1.0], [*group, 1]))
        weighted = (dro(losses, group=group) * losses).mean()
        dist.all_reduce(weighted)  # DistributedDataParallel takes the mean, half of this sum
        seen.append((weighted.item() / 2, dro.q.tolist()))
    info(torch.tensor([5.0, 6.0]) + 2 * rank, index=torch.tensor([0, 1]) + 2 * rank)
    return seen, info.scores.tolist()


def test_two_processes_do_what_one_does_with_both_halves(tmp_path):
    seen, scores = in_two(_one_of_two, tmp_path)[0]
    dro = GroupDRO(3, step_size=0.5)
    for (losses, group), (weighted, q) in zip(BATCHES, seen):
        losses, group = batch([*losses, 1.0], [*group, 1])
        assert (dro(losses, group=group) * losses).mean().item() == pytest.approx(weighted, abs=1e-6)
        assert dro.q.tolist() == pytest.approx(q, abs=1e-6)
    assert scores == [5.0, 6.0, 7.0, 8.0]  # each process knows the other's losses
