"""Rows as they were read, before it is known what they are to predict."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.words import brief, quote
from lossary.errors import BadInput

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of several kinds, all of the same rows.

    Attributes:
        name, source: as people call it, and where it came from.
        frame: one value per row: numbers, booleans, dates and text; rows are numbered from 0.
        dense: float32 numbers without gaps, (rows, ...): images, tensors, embeddings.
        lists: a list per row, or None.
        levels: of the columns that know the order of their values.
        refused: the columns that nothing can be made of, and why.
        rows: the number of each row in the source, from 0; those of a test that follows are counted on.
        total: how many rows the source has.
        labels: the columns whose values name classes, even where all are numbers.
        target, id: the columns that are so unless the caller names others.
        notes: what was found while reading.
        test: rows that the source itself sets aside for a test.
    """

    name: str
    source: str
    frame: pd.DataFrame
    dense: Mapping[str, Floats] = field(default_factory=dict)
    lists: Mapping[str, NDArray[np.object_]] = field(default_factory=dict)
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    total: int = 0
    labels: frozenset[str] = frozenset()
    target: str | None = None
    id: str | None = None
    notes: tuple[str, ...] = ()
    test: "Table | None" = None

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def columns(self) -> list[str]:
        """All names, those that cannot be used among them."""
        return [*self.frame, *self.dense, *self.lists, *self.refused]

    def place(self, position: int) -> str:
        """Where the row at this position stands, as messages say it."""
        row = int(self.rows[position]) + 1
        return f"data row {row}" if row <= self.total else f"row {row - self.total} of the test"

    def take(self, index: NDArray[Any]) -> "Table":
        """The rows at these positions, or where this is true."""
        frame = self.frame[index] if index.dtype == bool else self.frame.iloc[index]
        return replace(
            self,
            frame=frame.reset_index(drop=True),
            dense={name: values[index] for name, values in self.dense.items()},
            lists={name: values[index] for name, values in self.lists.items()},
            rows=self.rows[index],
        )

    def cleaned(self, keep: Collection[str]) -> "Table":
        """With text as `column` reads it; names of classes, and the columns `keep`, stay text in any case."""
        frame = self.frame.copy(deep=False)
        for name in [name for name in frame if is_text(frame[name])]:
            frame[name] = words(frame[name]) if name in keep or name in self.labels else column(frame[name])
        return replace(self, frame=frame)

    def without(self, names: "set[str]") -> "Table":
        """The table without these columns."""

        def rest(columns: Mapping[str, Any]) -> dict[str, Any]:
            return {name: values for name, values in columns.items() if name not in names}

        frame = self.frame.drop(columns=[name for name in self.frame if name in names])
        return replace(self, frame=frame, dense=rest(self.dense), lists=rest(self.lists), refused=rest(self.refused))

    def followed_by(self, other: "Table") -> "Table":
        """This table's rows and then those of another with the same columns."""
        dense = {name: np.concatenate([values, other.dense[name]]) for name, values in self.dense.items()}
        lists = {name: np.concatenate([values, other.lists[name]]) for name, values in self.lists.items()}
        return replace(
            self,
            frame=pd.concat([self.frame, other.frame[list(self.frame)]], ignore_index=True),
            dense=dense,
            lists=lists,
            refused={**other.refused, **self.refused},
            rows=np.concatenate([self.rows, self.total + other.rows]),
        )


def table(name: str, source: str, frame: pd.DataFrame, *, rows: NDArray[np.int64], **more: Any) -> Table:
    """A table of its parts.

    Raises:
        BadInput: there are no rows.
    """
    if not len(rows):
        raise BadInput(f"{source!r}: no rows; add data")
    return Table(name, source, frame.set_axis(range(len(rows))), rows=rows, **more)


# Which rows are read


def capacity(width: int, most: int, where: str) -> int:
    """How many rows of this width are read at most.

    Raises:
        BadInput: too few to compare anything on.
    """
    rows = most // max(width, 1)
    if rows < limits.FEWEST_ROWS:
        raise BadInput(
            f"{where}: a row holds {width:,} numbers, so that only {rows} of them would be read (no more than {most:,} "
            "numbers are); make the rows smaller"
        )
    return rows


def drawn(rows: int, most: int) -> NDArray[np.int64]:
    """Positions among so many rows: all of them, or each with the same chance and about `most` in all."""
    if rows <= most:
        return np.arange(rows)
    rng, step = np.random.default_rng(0), 2**20
    return np.concatenate(
        [start + np.flatnonzero(rng.random(min(step, rows - start)) < most / rows) for start in range(0, rows, step)]
    )


def in_part(read: int, total: int, what: str = "rows") -> tuple[str, ...]:
    """The note, where not all was read."""
    if read == total:
        return ()
    return (f"Read {read:,} of {total:,} {what}, drawn at random with a fixed seed, as the whole is too large.",)


# Columns of any type as one of the few kinds that are told apart


def typed(columns: Iterable[tuple[object, "pd.Series | Floats | str"]], rows: int, where: str) -> dict[str, Any]:
    """Columns of any type as a table's `frame`, `dense`, `lists`, `levels` and `refused`.

    Args:
        columns: (name, values); in place of values an array for `dense`, or the reason why there are none.
        rows: how many there are.
        where: the source, as messages name it.

    Raises:
        BadInput: two columns have the same name.
    """
    plain: dict[str, pd.Series] = {}
    made: dict[str, Any] = {"dense": {}, "lists": {}, "levels": {}, "refused": {}}
    seen: set[str] = set()
    for place, (given, values) in enumerate(columns):
        name = f"Unnamed: {place}" if given in (None, "") else str(given)
        if name in seen:
            raise BadInput(f"{where}: two columns are named {quote(name)}; rename one")
        seen.add(name)
        if isinstance(values, str):
            made["refused"][name] = values
            continue
        if isinstance(values, np.ndarray):
            made["dense"][name] = values
            continue
        values = values.reset_index(drop=True)
        if isinstance(values.dtype, pd.CategoricalDtype):
            if values.cat.ordered:
                present = values.cat.remove_unused_categories().cat.categories
                made["levels"][name] = tuple(map(label, present))
            values = pd.Series(np.asarray(values), name=values.name)
        try:
            kind, values = _kind(values)
        except (ValueError, TypeError, OverflowError) as error:  # such as a date before the first that pandas knows
            made["refused"][name] = f"its values cannot be read ({brief(error)})"
            continue
        if kind == "plain":
            plain[name] = values
        elif kind == "lists":
            stacked = _stacked(values)
            made["lists" if stacked is None else "dense"][name] = values.to_numpy() if stacked is None else stacked
        else:
            made["refused"][name] = f"it holds {kind}"
    return {"frame": pd.DataFrame(plain, index=range(rows)), **made}


def _kind(values: pd.Series) -> tuple[str, pd.Series]:
    """("plain", numbers, booleans, dates or text), ("lists", lists), or what it holds that cannot be used."""
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        values = values.dt.tz_convert(None)
    elif isinstance(values.dtype, pd.PeriodDtype):
        values = values.dt.to_timestamp()
    elif not isinstance(values.dtype, np.dtype):
        values = pd.Series(values.to_numpy(dtype=object, na_value=None)).infer_objects()
    if values.dtype.kind == "f":
        return "plain", values.astype(np.float64)
    if values.dtype.kind in "iu":
        return "plain", values.astype(np.uint64 if values.max() > np.iinfo(np.int64).max else np.int64)
    if values.dtype.kind == "m":
        return "plain", values.dt.total_seconds()
    if values.dtype.kind in "bM":
        return "plain", values
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind in ("string", "boolean", "integer", "floating", "mixed-integer", "mixed-integer-float", "empty"):
        return "plain", values
    if kind == "decimal":
        return "plain", values.astype(np.float64)
    if kind in ("datetime", "date", "datetime64"):
        return "plain", pd.to_datetime(values, utc=True).dt.tz_convert(None)
    if kind in ("timedelta", "timedelta64"):
        return "plain", pd.to_timedelta(values).dt.total_seconds()
    if kind == "time":
        return "plain", values.map(lambda t: t.hour * 3600 + t.minute * 60 + t.second + t.microsecond / 1e6).astype(
            float
        )
    known = values[values.notna()] if kind == "mixed" else []
    if len(known) and all(isinstance(value, list | tuple | np.ndarray) for value in known):
        return "lists", values.where(values.notna(), None)
    return {"mixed": "objects"}.get(kind, kind + " values"), values


def _stacked(values: pd.Series) -> Floats | None:
    """Lists of numbers as one array, where all have the same shape and nothing is missing."""
    try:
        array = np.stack([_array(value) for value in values])
    except (ValueError, TypeError):
        return None
    if array.dtype.kind not in "biuf" or not array[0].size or not np.isfinite(array).all():
        return None
    if (np.abs(array) > limits.LARGEST).any():
        return None
    return array.astype(np.float32)


def _array(value: Any) -> NDArray[Any]:
    """Nested lists as one array, at once where that can be done."""
    array = np.asarray(value)
    return np.stack([_array(item) for item in array]) if array.dtype == object and array.ndim else array


def label(value: Any) -> str:
    """The name of a class or level: 1.0 is the same as 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def column(values: pd.Series) -> pd.Series:
    """Numbers, booleans and dates as they are; text without blanks at its ends, or as numbers where all of it is."""
    if values.dtype.kind in "biufM":
        return values
    text = words(values)
    text = text.where(~text.isin(limits.MISSING))
    return text if strays(text).any() else pd.to_numeric(text, errors="coerce").astype(float)


def words(values: pd.Series) -> pd.Series:
    """Text without blanks at its ends."""
    return values.astype(str).str.strip().where(values.notna())


def strays(text: pd.Series) -> pd.Series:
    """Which entries are neither numbers nor missing."""
    return text.notna() & pd.to_numeric(text, errors="coerce").isna()


def mixed(text: pd.Series) -> bool:
    """Nearly all of it numbers, but not all."""
    return is_text(text) and 0 < strays(text).sum() <= (1 - limits.NUMERIC) * text.notna().sum()


def is_text(values: pd.Series) -> bool:
    return values.dtype.kind not in "biufM"
