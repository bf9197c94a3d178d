"""The engine of small networks: weights like torch's own, every row in every round, and a least square found."""

import math

import numpy as np
import pytest
import torch

from lossary.uncertainty._network import _batches, generator, perceptron, standard, train


def test_weights_are_uniform_as_torch_draws_them_and_come_from_the_generator():
    state = torch.random.get_rng_state()
    network = perceptron((100, 200, 3), generator(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [type(m).__name__ for m in network] == ["Linear", "ReLU", "Linear"]
    for linear, wide in ((network[0], 100), (network[2], 200)):
        drawn = torch.cat([linear.weight.flatten(), linear.bias]) * math.sqrt(wide)
        assert drawn.dtype == torch.float64
        assert drawn.abs().max() <= 1
        assert drawn.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    assert torch.equal(network[0].weight, perceptron((100, 200, 3), generator(0))[0].weight)
    assert not torch.equal(network[0].weight, perceptron((100, 200, 3), generator(1))[0].weight)


def test_batches_are_permutations_one_after_another():
    found = torch.cat([b for _, b in zip(range(7), _batches(10, 4, generator(0)))])
    for start in (0, 10):
        assert found[start : start + 10].sort().values.tolist() == list(range(10))
    assert found[:10].tolist() != found[10:20].tolist()


def test_training_finds_the_least_square():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(200, 3))), torch.from_numpy(rng.normal(size=200))
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    seen = []

    def objective(index):
        seen.append(len(index))
        return (x[index] @ weight - y[index]).square().mean()

    train([weight], objective, 200, steps=400, batch=500, lr=0.05, g=generator(0))
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-3)
    assert set(seen) == {200}  # no more rows than there are


def test_a_random_state_is_a_number_or_scikit_learns():
    assert generator(np.int64(3)).initial_seed() == generator(np.random.RandomState(3)).initial_seed()
    for wrong in (None, 0.5, "one"):
        with pytest.raises(ValueError, match="random_state: expected a whole number or a RandomState, got"):
            generator(wrong)


def test_columns_get_mean_0_and_deviation_1_and_constant_ones_stay():
    table = np.column_stack([[1.0, 3.0, 5.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [1e-20, 3e-20, 5e-20]])
    assert table[:, 1].std() > 0  # by rounding
    centre, scale = standard(table)
    np.testing.assert_allclose(centre, [3.0, 0.1, 0.0, 3e-20])
    np.testing.assert_allclose(scale, [np.sqrt(8 / 3), 1.0, 1.0, np.sqrt(8 / 3) * 1e-20])
