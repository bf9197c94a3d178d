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
    def patterns(self) -> NDArray[np.int64]:
        """A number per row, shared by exactly those rows whose features are all the same."""
        return pd.factorize(pd.util.hash_pandas_object(self.features, index=False))[0]

    @cached_property
    def coarse(self) -> bool:
        """Equal features mean coarse columns, not copied rows.

        So it is where more than half of the rows have a twin and a quarter of those have one with another target.
        """
        twins = np.bincount(self.patterns)[self.patterns] > 1
        differ = pd.Series(self.target).groupby(self.patterns).transform("nunique") > 1
        return bool(twins.mean() > 0.5 and differ[twins].mean() >= 0.25)

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """A number per row, shared by the rows that must stay on one side of a split.

        These are whole groups, and rows with the same features whatever their target: keeping only those of one
        target together would leave a model nothing but contradictions. They are parted where the table is `coarse`,
        where a pattern is too frequent to be a copy (more than `COMMON` of the table), and where groups that share
        patterns would hang together in more than half of the table.
        """
        if self.coarse:
            patterns = np.arange(len(self))
        else:
            frequent = np.bincount(self.patterns)[self.patterns] > max(COMMON * len(self), 3)
            patterns = pd.factorize(np.where(frequent, -1 - np.arange(len(self)), self.patterns))[0]
        if self.group is None:
            return patterns
        group = pd.factorize(self.group)[0]
        first = int(patterns.max()) + 1
        links = coo_array((np.ones(len(self)), (patterns, first + group)), shape=2 * (first + int(group.max()) + 1,))
        joined = connected_components(links, directed=False)[1][patterns]
        if np.bincount(joined).max() > max(len(self) / 2, np.bincount(group).max()):
            return group
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
        BadInput: whole groups, and equal rows, cannot be parted so that every class is left to search in.
    """
    rng = np.random.default_rng(seed)
    for _ in range(20):
        part = deal(problem, (share, 1 - share), rng)
        locked, search = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
        if len(locked) and not len(np.setdiff1d(problem.strata, problem.strata[search])):
            return search, locked
    raise BadInput(
        f"no {share:.0%} of the rows can be locked that keep groups and equal rows whole and leave every class to "
        "search in; choose a --group column with more groups, or none"
    )
