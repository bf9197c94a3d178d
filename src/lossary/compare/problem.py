"""A table with one target, and the rules by which its rows are dealt into parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lossary.errors import BadInput

# A row found in more than this share of the table is a common pattern, not a copy: its repeats may part.
COMMON = 0.1


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be predicted, and from what.

    `features` holds the raw columns; `target` the class numbers (int64) or the values (float64), one per row;
    `classes` the names of the classes, empty for a real target; `group` a number per row or None; `notes` what
    was inferred, left out or found while loading, in sentences.
    """

    name: str
    source: str
    features: pd.DataFrame
    target: NDArray[np.int64] | NDArray[np.float64]
    target_name: str
    task: Literal["classes", "real"]
    classes: tuple[str, ...] = ()
    group: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: NDArray[np.int64]) -> "Problem":
        """The same problem on some of its rows, in the order of `index`."""
        return replace(
            self,
            features=self.features.iloc[index].reset_index(drop=True),
            target=self.target[index],
            group=None if self.group is None else self.group[index],
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over task, classes, column names and types, and every value in the order of the rows."""
        columns = [(str(name), str(kind)) for name, kind in self.features.dtypes.items()]
        digest = sha256(repr((self.task, self.classes, self.target_name, columns)).encode())
        digest.update(pd.util.hash_pandas_object(self.features, index=False).to_numpy().tobytes())
        digest.update(self.target.tobytes())
        if self.group is not None:
            digest.update(self.group.tobytes())
        return digest.hexdigest()

    @cached_property
    def copies(self) -> NDArray[np.int64]:
        """A number per row, shared by exactly those rows whose features and target are all the same."""
        hashes = pd.util.hash_pandas_object(self.features, index=False).to_numpy()
        return pd.factorize(hashes + pd.util.hash_array(self.target))[0]

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """A number per row, shared by the rows that must stay on one side: whole groups, and exact copies.

        Copies are torn apart where keeping them would glue more than half of the table together through groups
        that share them, and where a row is too frequent to be a copy (more than `COMMON` of the table).
        """
        frequent = np.bincount(self.copies)[self.copies] > max(COMMON * len(self), 3)
        copies = pd.factorize(np.where(frequent, -1 - np.arange(len(self)), self.copies))[0]
        if self.group is None:
            return copies
        size = int(copies.max()) + 1
        links = coo_array(
            (np.ones(len(self)), (copies, size + self.group)), shape=(2 * [size + int(self.group.max()) + 1])
        )
        joined = connected_components(links, directed=False)[1][copies]
        if np.bincount(joined).max() > max(len(self) / 2, np.bincount(self.group).max()):
            return pd.factorize(self.group)[0]
        return pd.factorize(joined)[0]

    @cached_property
    def strata(self) -> NDArray[np.int64]:
        """A number per row that the parts of a split keep in proportion: the class, or the quarter of the target."""
        if self.task == "classes":
            return np.unique(self.target, return_inverse=True)[1]
        return np.searchsorted(np.quantile(self.target, (0.25, 0.5, 0.75)), self.target)


def deal(problem: Problem, shares: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """The part, 0 to len(shares) - 1, that each row falls to, stratified, with no unit torn apart.

    Units of several rows go, largest first and otherwise in random order, to the part that lacks them most;
    single rows then fill each part, stratum by stratum, by systematic sampling from a random start.
    """
    share, part = np.asarray(shares, dtype=float), np.zeros(len(problem), dtype=np.int64)
    strata, units = problem.strata, problem.units
    total = np.bincount(strata)
    size = np.bincount(units)
    tied = size[units] > 1
    filled = np.zeros((len(share), len(total)))
    wanted = np.outer(share, np.bincount(strata[tied], minlength=len(total)))

    members = np.split(np.argsort(units, kind="stable"), np.cumsum(size)[:-1])
    shuffled = rng.permutation(np.flatnonzero(size > 1))
    for unit in shuffled[np.argsort(-size[shuffled], kind="stable")]:
        count = np.bincount(strata[members[unit]], minlength=len(total))
        # How much the squared distance from the wanted counts grows, per row of each stratum.
        growth = (count * (2 * (filled - wanted) + count) / np.maximum(total, 1)).sum(axis=1)
        chosen = int(growth.argmin())
        filled[chosen] += count
        part[members[unit]] = chosen

    for stratum, rows in enumerate(total):
        single = rng.permutation(np.flatnonzero(~tied & (strata == stratum)))
        room = np.maximum(share * rows - filled[:, stratum], 0)
        place = (np.arange(len(single)) + rng.random()) / max(len(single), 1)
        part[single] = np.searchsorted(np.cumsum(room)[:-1], place * room.sum(), side="right")
    return part


def folds(problem: Problem, number: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The test fold, 0 to number - 1, of each row."""
    return deal(problem, (1 / number,) * number, rng)


def lock(problem: Problem, *, share: float = 0.25, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sets rows aside before anything is looked at. Returns the indices (search, locked), each ascending.

    Raises:
        BadInput: whole groups cannot be parted so that rows are locked and every class is left to search in.
    """
    part = deal(problem, (share, 1 - share), np.random.default_rng(seed))
    locked, search = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
    if not len(locked) or len(np.setdiff1d(problem.strata, problem.strata[search])):
        raise BadInput(
            f"group: {problem.group.max() + 1} groups cannot be parted into locked and search rows that both hold "
            "the classes; give a --group column with more groups, or none"
        )
    return search, locked
