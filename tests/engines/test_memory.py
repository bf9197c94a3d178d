"""The memory of every sample: alone, and in two processes whose batches differ in size."""

import torch

from lossary.weighting._memory import from_all, record
from tests.processes import in_two

# Of each of two batches the positions that the two processes show, and a row for every position.
SHOWN = (([5, 0, 2], [4]), ([1], [3, 5]))
ROWS = torch.arange(12.0).view(6, 2)


def test_alone_it_is_a_buffer():
    memory = torch.full((6, 2), -1.0)
    values = ROWS[[4, 1]].double().requires_grad_()
    record(memory, torch.tensor([4, 1]), values)
    assert memory[[4, 1]].tolist() == values.tolist()
    assert (memory[[0, 2, 3, 5]] == -1).all()
    assert not memory.requires_grad
    assert from_all(values) is values


def _one_of_two(rank):
    memory = torch.full((6, 2), -1.0)
    for turn, shown in enumerate(SHOWN):
        record(memory, torch.tensor(shown[rank]), ROWS[shown[rank]] + 100 * turn)
    joined = from_all(torch.tensor(SHOWN[0][rank]))
    return memory, joined


def test_two_processes_remember_what_one_would(tmp_path):
    alone = torch.full((6, 2), -1.0)
    for turn, shown in enumerate(SHOWN):
        both = shown[0] + shown[1]
        record(alone, torch.tensor(both), ROWS[both] + 100 * turn)
    for memory, joined in in_two(_one_of_two, tmp_path):
        assert torch.equal(memory, alone)
        assert joined.tolist() == [5, 0, 2, 4]
