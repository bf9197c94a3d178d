"""InfoBatch against expectations worked out by hand, in a real DataLoader, and in two processes."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lossary.tasks import Seeds, cross_entropy, fit, per_seed, stacked_mlp
from lossary.weighting import InfoBatch
from tests.processes import in_two

LOSSES = torch.tensor([4.0, 0.5, 0.25, 3.0, 0.125, 1.0, 0.0, 0.75])  # mean 1.203: two above, six below
LOW = torch.tensor([1, 2, 4, 5, 6, 7])


def started(seed=0, **hyper):
    """A sampler that has seen every loss once."""
    sampler = InfoBatch(len(LOSSES), generator=torch.Generator().manual_seed(seed), **hyper)
    order = torch.tensor(list(sampler))
    assert sampler(LOSSES[order], index=order).tolist() == [1.0] * len(LOSSES)  # all alike, so none is below the mean
    return sampler


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_an_epoch_is_unbiased_and_saves_the_ratio_of_the_easy_samples(ratio):
    sampler, rounds = started(epochs=10_000, ratio=ratio, delta=1.0), 1500
    seen, total = torch.zeros(len(LOSSES)), torch.zeros(len(LOSSES))
    sampler.eval()  # the losses stay what they are
    for _ in range(rounds):
        order = torch.tensor(list(sampler))
        seen[order] += 1 / rounds
        total[order] += sampler(LOSSES[order], index=order) / rounds
    sd = (ratio * (1 - ratio) / rounds) ** 0.5
    assert seen[[0, 3]].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert seen[LOW].tolist() == pytest.approx([1 - ratio] * 6, abs=5 * sd)
    assert total.tolist() == pytest.approx([1.0] * 8, abs=5 * sd / (1 - ratio))


def test_samples_are_skipped_independently_of_each_other_and_of_the_last_epoch():
    sampler, rounds = started(epochs=10_000, delta=1.0), 1500
    kept = torch.zeros(rounds, len(LOSSES))
    for epoch in range(rounds):
        kept[epoch, list(sampler)] = 1
    sign = 2 * kept[:, LOW] - 1
    together = torch.cat([sign.T @ sign, sign[1:].T @ sign[:-1]]) / rounds
    expected = torch.cat([torch.eye(6), torch.zeros(6, 6)])
    assert (together - expected).abs().max().item() < 5 * rounds**-0.5


def test_the_last_epochs_are_whole_and_unweighted():
    sampler = started(epochs=8, delta=0.8)  # int(0.8 * 8) = 6 epochs are pruned, the first before any loss is known
    heaviest, sizes = [], []
    for _ in range(7):
        sizes.append(len(list(sampler)))
        heaviest.append(sampler.weights.max().item())
    assert heaviest == [2.0] * 5 + [1.0] * 2
    assert sizes[5:] == [8, 8]


def test_ratio_zero_is_plain_shuffling():
    sampler = started(epochs=5, ratio=0.0)
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.weights.tolist() == [1.0] * 8


def test_it_drives_a_data_loader_and_remembers_each_samples_own_loss():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=g), torch.randint(2, (40,), generator=g)
    data = TensorDataset(x, y, torch.arange(40))
    sampler = InfoBatch(40, epochs=4, generator=g)
    loader = DataLoader(data, sampler=sampler, batch_size=8)
    weight = torch.randn(2, 3, generator=g)
    for epoch in range(4):
        promised = len(sampler)
        expected = torch.where(sampler.scores < sampler.scores.mean(), 2.0, 1.0) if 0 < epoch < 3 else torch.ones(40)
        seen = 0
        for xs, ys, index in loader:
            losses = F.cross_entropy(xs @ weight.T, ys, reduction="none")
            assert torch.equal(sampler(losses, index=index), expected[index])
            seen += len(index)
        assert seen == promised
    assert sampler.scores.tolist() == pytest.approx(F.cross_entropy(x @ weight.T, y, reduction="none").tolist())


def test_it_drives_the_training_of_a_stack_of_seeds():
    seeds, rows = Seeds((0, 1)), 48
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, generator=g)
    order = seeds.torch("order")
    info = per_seed(lambda s: InfoBatch(rows, epochs=100, generator=order[s]), seeds)
    model = stacked_mlp((4, 16, 2), seeds)
    how = {"selector": info, "weighting": lambda losses, *, index, **_: info(losses, index=index)}
    fit(model, x, (x[:, 0] > 0).long(), loss=cross_entropy, seeds=seeds, steps=60, batch=16, **how)
    for sampler in info:
        assert 60 * 16 / rows < sampler.epoch < 60 * 16 / rows * 2  # shorter epochs, hence more than 20
        assert sampler.weights.unique().tolist() == [1.0, 2.0]


def test_refusals():
    with pytest.raises(ValueError, match=r"ratio: expected a number >= 0 and < 1, got 1.0"):
        InfoBatch(8, epochs=1, generator=torch.Generator(), ratio=1.0)
    with pytest.raises(ValueError, match="index: expected shape"):
        started(epochs=1)(LOSSES, index=LOW)


def trained(rank=0, processes=1):
    """A linear model after four epochs, three of them pruned, on this process's share of batches of eight; and losses.

    Batches that an epoch leaves unfilled are dropped, as every process needs its share.
    """
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 5, generator=g), torch.randint(3, (64,), generator=g)
    torch.manual_seed(2)
    model = nn.Linear(5, 3)
    shared = DistributedDataParallel(model) if processes > 1 else model
    sampler = InfoBatch(64, epochs=4, delta=0.75, generator=torch.Generator().manual_seed(3))
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(4):
        order = torch.tensor(list(sampler))
        sizes.append(len(order))
        for batch in order[: len(order) // 8 * 8].split(8):
            rows = batch[rank::processes]
            values = F.cross_entropy(shared(x[rows]), y[rows], reduction="none")
            optimizer.zero_grad()
            (sampler(values.detach(), index=rows) * values).mean().backward()
            optimizer.step()
    return model.weight.detach().clone(), sampler.scores, sizes


def test_two_processes_train_what_one_does_on_the_same_batches(tmp_path):
    weight, scores, sizes = trained()
    assert sizes[0] == sizes[3] == 64
    assert max(sizes[1:3]) < 64
    for found in in_two(partial(trained, processes=2), tmp_path):
        torch.testing.assert_close(found[0], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], scores, rtol=0, atol=1e-6)
        assert found[2] == sizes
