"""Rows with a target, and the rules by which they are dealt into parts."""

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

Task = Literal["classes", "ordinal", "multilabel", "real"]

LARGE = 0.1  # share of the rows, more than which copies must not tie together
FEW = 20  # so many different rows are too few to tell copies by


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be predicted, and from what.

    Attributes:
        name, source: as people call it, and where it came from.
        features: the raw columns; of images, tensors and arrays float32 columns, flattened row by row.
        target: class numbers (n,) int64 for "classes" and, in the order of the levels, "ordinal"; (n, labels) int64
            of 0 and 1 for "multilabel"; values (n,) float64 for "real".
        target_name: of its column, or of its columns joined by commas.
        task: the kind of target.
        classes: names of the classes, of the levels in their order, or of the labels; empty for a real target.
        group: (n,) a number per row; no split parts the rows of one.
        notes: what was inferred, left out or found while loading, in sentences.
        shape: of one row where it is no table: (channels, height, width) for images.
        time: (n,) numbers in the order of time, ties allowed; splits then test on what is later.
        weight: (n,) not negative, mean 1.
        ids: (n,) what the caller calls each row.
        test: positions of the rows that the caller set aside as a test; none where it is None.
        partial: whether the source has more rows with a target.
        settled: `units` of rows that are part of a larger problem, which settled them.
    """

    name: str
    source: str
    features: pd.DataFrame
    target: NDArray[np.int64] | NDArray[np.float64]
    target_name: str
    task: Task
    classes: tuple[str, ...] = ()
    group: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    time: NDArray[np.float64] | None = None
    weight: NDArray[np.float64] | None = None
    ids: NDArray[np.object_] | None = None
    test: NDArray[np.int64] | None = None
    partial: bool = False
    settled: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def outputs(self) -> int:
        """How many numbers a model predicts for a row."""
        return len(self.classes) or 1

    def rows(self, index: NDArray[np.int64]) -> "Problem":
        """The same problem on some of its rows, in the order of `index`; what must stay together stays so.

        Rows of a problem with a test are one side of it, and settle that anew.
        """
        test = None if self.test is None else np.flatnonzero(np.isin(index, self.test))
        return replace(
            self,
            features=self.features.iloc[index].reset_index(drop=True),
            target=self.target[index],
            group=None if self.group is None else self.group[index],
            time=None if self.time is None else self.time[index],
            weight=None if self.weight is None else self.weight[index],
            ids=None if self.ids is None else self.ids[index],
            test=test if test is not None and len(test) else None,
            settled=pd.factorize(self.units[index])[0] if self.test is None else None,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that a result depends on: the names and types, and every value in the order of the rows."""
        columns = [(str(name), str(kind)) for name, kind in self.features.dtypes.items()]
        named = (self.task, self.classes, self.target_name, columns, self.shape)
        digest = sha256(repr(named).encode())
        digest.update(pd.util.hash_pandas_object(self.features, index=False).to_numpy().tobytes())
        digest.update(self.target.tobytes())
        for name in ("group", "time", "weight", "ids", "test"):
            values = getattr(self, name)
            if values is not None:
                digest.update(name.encode())
                digest.update(pd.util.hash_array(values).tobytes())
        return digest.hexdigest()

    @cached_property
    def patterns(self) -> NDArray[np.int64]:
        """A number per row, shared by exactly those rows whose features are all the same."""
        return pd.factorize(pd.util.hash_pandas_object(self.features, index=False))[0]

    @cached_property
    def crowded(self) -> bool:
        """Rows may well be equal by chance: no more than `FEW` are different, or the columns are that coarse.

        Two different rows agree in column j with some probability q_j; were columns independent, each of n rows would
        have (n - 1) prod_j q_j twins. That explains them if it is one twin or more, or half of those that there are.
        """
        times = np.bincount(self.patterns)
        if len(times) <= FEW or len(times) == len(self):
            return len(times) <= FEW
        enough = min(1.0, ((times**2).sum() / len(self) - 1) / 2)
        expected, different = len(self) - 1.0, self.features[~pd.Series(self.patterns).duplicated().to_numpy()]
        for name in different:
            agree = different[name].value_counts(dropna=False).to_numpy()
            expected *= float((agree * (agree - 1)).sum()) / (len(times) * (len(times) - 1))
            if expected < enough:
                return False
        return True

    @cached_property
    def coarse(self) -> bool:
        """Equal rows are the rule and their targets differ, so that they are no copies.

        So it is where the table is `crowded`, more than half of the rows have a twin, and a quarter of those have one
        with another target.
        """
        if not self.crowded:
            return False
        twins = np.bincount(self.patterns)[self.patterns] > 1
        target = pd.util.hash_pandas_object(pd.DataFrame(self.target), index=False)
        differ = target.groupby(self.patterns).transform("nunique") > 1
        return bool(twins.mean() > 0.5 and differ[twins].mean() >= 0.25)

    @cached_property
    def copies(self) -> NDArray[np.int64]:
        """A number per row, shared by rows that are copies: the same features, whatever the target.

        Keeping only those of one target together would leave a model nothing but contradictions. There are none
        where the table is `coarse`; where it is `crowded`, a pattern in more than `LARGE` of it is too frequent for
        copies.
        """
        if self.coarse:
            return np.arange(len(self))
        frequent = self.crowded & (np.bincount(self.patterns)[self.patterns] > LARGE * len(self))
        return pd.factorize(np.where(frequent, -1 - np.arange(len(self)), self.patterns))[0]

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """A number per row, shared by the rows that must stay on one side of a split: whole groups, and copies.

        Copies are parted where groups that share them would hang together in too much of the table. Some of them are
        `surplus` then, unless the table is `crowded`.
        """
        if self.settled is not None:
            return self.settled
        if self.group is not None and np.bincount(self._tied).max() > self._most_tied:
            return pd.factorize(self.group)[0]
        return self._tied

    @cached_property
    def _tied(self) -> NDArray[np.int64]:
        """A number per row, shared by copies, groups, and whatever hangs together by them."""
        if self.group is None:
            return self.copies
        group = pd.factorize(self.group)[0]
        first = int(self.copies.max()) + 1
        links = coo_array((np.ones(len(self)), (self.copies, first + group)), shape=2 * (first + int(group.max()) + 1,))
        return pd.factorize(connected_components(links, directed=False)[1][self.copies])[0]

    @property
    def _most_tied(self) -> float:
        """How many rows copies may tie together: a share of the table, or as many as the largest group has."""
        return max(LARGE * len(self), 1 if self.group is None else np.unique(self.group, return_counts=True)[1].max())

    @cached_property
    def surplus(self) -> NDArray[np.int64]:
        """Positions of copies that can neither be kept together nor parted: they are to be left out, but for one each.

        Kept together they would tie more than `LARGE` of the rows, and more than the largest group; parted, a model
        that has seen one would know the others. Which one stays is drawn: the first may always be of one class.
        """
        if self.test is not None:
            return self.searchable[self.rows(self.searchable).surplus]
        if self.crowded:
            return np.arange(0)
        group = np.arange(len(self)) if self.group is None else self.group
        parted = pd.Series(group).groupby(self.patterns).transform("nunique").to_numpy() > 1
        drawn = np.flatnonzero(parted & (np.bincount(self._tied)[self._tied] > self._most_tied))
        drawn = np.random.default_rng(0).permutation(drawn)
        return np.setdiff1d(drawn, drawn[np.unique(self.patterns[drawn], return_index=True)[1]])

    @cached_property
    def parted(self) -> int:
        """How many rows have an equal one that a split may put on the other side."""
        return int((pd.Series(self.units).groupby(self.patterns).transform("nunique") > 1).sum())

    @property
    def repeats(self) -> str:
        """What splits do to equal rows, in a sentence."""
        if not self.parted:
            return "Splits keep rows with equal features together."
        if self.coarse:
            return (
                "Equal rows are the rule here, and targets differ among them: splits part them freely, "
                f"{self.parted:,} rows from an equal one."
            )
        why = ", as columns this coarse make rows equal by chance" if self.crowded else ""
        return (
            f"Not all rows with equal features stay together{why}: {self.parted:,} have an equal one that a split may "
            "put on the other side, which flatters what only remembers rows."
        )

    @cached_property
    def moments(self) -> NDArray[np.int64]:
        """A number per row in the order of time, with ties: a unit's rows all have that of its latest row."""
        return np.unique(pd.Series(self.time).groupby(self.units).transform("max"), return_inverse=True)[1]

    @cached_property
    def leaked(self) -> NDArray[np.int64]:
        """Positions of the rows outside `test` that are copies of a row in it, or of a group that is in it."""
        tested = np.zeros(len(self), dtype=bool)
        tested[self.test] = True
        shared = np.isin(self.copies, self.copies[tested])
        if self.group is not None:
            shared |= np.isin(self.group, self.group[tested])
        return np.flatnonzero(shared & ~tested)

    @cached_property
    def searchable(self) -> NDArray[np.int64]:
        """Positions of the rows that are neither in `test` nor `leaked`."""
        if self.test is None:
            return np.arange(len(self))
        return np.setdiff1d(np.arange(len(self)), np.union1d(self.test, self.leaked))

    @cached_property
    def strata(self) -> NDArray[np.int64]:
        """A number per row that the parts of a split keep in proportion.

        The class or level; the rarest label that the row has, their number where it has none; or the quarter of a real
        target.
        """
        if self.task == "multilabel":
            rows = self.target.sum(axis=0)
            rarest = np.where(self.target == 1, rows, len(self) + 1).argmin(axis=1)
            return np.where(self.target.any(axis=1), rarest, self.target.shape[1])
        if self.task != "real":
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


def splits(
    problem: Problem, number: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(rows to train on, rows to test on), `number` of them, each ascending.

    Without a time these are `folds` against the rest. With one, the rows are cut into number + 1 blocks of consecutive
    times, about equal in size, and each block but the first is tested on all that is before it. Units go by their
    latest row, and rows of the same time stay together.

    Raises:
        BadInput: there are not enough different times.
    """
    if problem.time is None:
        fold = folds(problem, number, rng)
        return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(number)]
    # The boundaries move by up to a quarter of a block, so that partitions differ.
    places = np.arange(1, number + 1) + rng.uniform(-0.25, 0.25, number)
    block = np.searchsorted(_cuts(problem, places / (number + 1)), problem.moments, side="right")
    return [(np.flatnonzero(block < k), np.flatnonzero(block == k)) for k in range(1, number + 1)]


def _cuts(problem: Problem, shares: Sequence[float]) -> NDArray[np.int64]:
    """The moments at which new blocks begin, so that these shares of the rows are before them, as nearly as can be."""
    before = np.cumsum(np.bincount(problem.moments))[:-1]  # the rows before moment 1, 2, ...
    if len(before) < len(shares):
        raise BadInput(
            f"the rows fall on {len(before) + 1} different times, too few to test on what is later (groups and copies "
            "go by their latest row); leave out --time, or --group"
        )
    cuts: list[int] = []
    for left, share in zip(range(len(shares), 0, -1), shares):
        first, last = (cuts[-1] if cuts else 0), len(before) - left  # room for a moment in every block
        choice = np.abs(before[first : last + 1] - share * len(problem)).argmin()
        cuts.append(first + int(choice) + 1)
    return np.array(cuts)


def lock(problem: Problem, *, share: float = 0.25, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sets rows aside before anything is looked at. Returns the indices (search, locked), each ascending.

    Rows set aside as a test are the locked ones, however many, and what is `leaked` from them is in neither part. With
    a time it is the latest share of the rows: ties whole, and whole units by their latest row. Otherwise
    it is a stratified draw of whole units.

    Raises:
        BadInput: this cannot be done so that every class is left to search in.
    """
    if problem.test is not None:
        search = problem.searchable
        _check(problem, search, "beside the test rows and what leaks from them; give other rows to train on")
        return search, np.sort(problem.test)
    if problem.time is not None:
        late = problem.moments >= _cuts(problem, (1 - share,))[0]
        search = np.flatnonzero(~late)
        _check(problem, search, f"before the latest {share:.0%} of the rows; leave out those rows, or --time")
        return search, np.flatnonzero(late)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        part = deal(problem, (share, 1 - share), rng)
        locked, search = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
        lost = len(np.setdiff1d(problem.strata, problem.strata[search])) or _lost(problem, search)
        if len(locked) and not lost:
            return search, locked
    raise BadInput(
        f"no {share:.0%} of the rows can be locked that keep groups and equal rows whole and leave every class to "
        "search in; choose a --group column with more groups, or none"
    )


def _check(problem: Problem, search: NDArray[np.int64], where: str) -> None:
    lost = _lost(problem, search)
    if lost or not len(search):
        what = f"row of {', '.join(map(repr, lost[:3]))}" if lost else "row"
        raise BadInput(f"no {what} is left to search in {where}")


def _lost(problem: Problem, search: NDArray[np.int64]) -> list[str]:
    """The classes or labels that occur, but in none of these rows."""
    if problem.task == "real":
        return []
    codes = problem.target
    if problem.task == "multilabel":
        return [name for name, all_, left in zip(problem.classes, codes.any(0), codes[search].any(0)) if all_ > left]
    return [problem.classes[code] for code in np.setdiff1d(codes, codes[search])]
