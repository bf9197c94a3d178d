import numpy as np
import pytest
import torch

from lossary.tasks import Seeds


def test_a_stream_depends_on_id_and_name_alone() -> None:
    together, alone = Seeds((3, 1, 7)), Seeds((7,))
    for stream in ("init", "order"):
        assert torch.equal(
            torch.rand(5, generator=together.torch(stream)[2]), torch.rand(5, generator=alone.torch(stream)[0])
        )
        assert together.numpy(stream)[2].random() == alone.numpy(stream)[0].random()
        assert together.one(2) == alone


def test_streams_differ_by_name_and_by_seed() -> None:
    seeds = Seeds(tuple(range(40)))
    draws = {
        float(torch.rand(1, dtype=torch.float64, generator=generator))
        for stream in ("init", "order", "split")
        for generator in seeds.torch(stream)
    }
    assert len(draws) == 120


def test_streams_are_even() -> None:
    """Means of 400 uniform numbers over 40 seeds: 0.5 within five standard errors."""
    means = [rng.random(400).mean() for rng in Seeds(range(40)).numpy("any")]
    assert abs(np.mean(means) - 0.5) < 5 / np.sqrt(12 * 16_000)


def test_asking_twice_gives_the_same_stream() -> None:
    seeds = Seeds((5,))
    first = seeds.numpy("flip")[0].random(3)
    assert np.array_equal(first, seeds.numpy("flip")[0].random(3))


def test_tuning_seeds_are_not_reported_ones() -> None:
    seeds = Seeds(tuple(range(40)), smoke=True)
    tuning = seeds.tuning(8)
    assert len(tuning) == 8
    assert not set(tuning.ids) & set(seeds.ids)
    assert tuning.smoke


def test_few() -> None:
    assert Seeds((0,)).few(400) == 400
    assert Seeds((0,), smoke=True).few(400) == 8
    assert Seeds((0,), smoke=True).few(400, smoke=20) == 20
    assert Seeds((0,), smoke=True).few(5) == 5


@pytest.mark.parametrize("ids", [(), (1, 1), (-1, 2)])
def test_bad_ids(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ids"):
        Seeds(ids)
