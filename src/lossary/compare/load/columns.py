"""What every column of a table is for: features, groups, times, weights, names of rows."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.table import Table, column, is_text, label, mixed, strays
from lossary.compare.load.words import count, listed, quote, suggest
from lossary.errors import BadInput

Place = Callable[[int], str]

MOST_NAMED = 12  # columns in a note


def find(table: Table, name: str, argument: str) -> str:
    """The column of that name, blanks at its ends aside.

    Raises:
        BadInput: there is none.
    """
    if name in table.columns:
        return name
    stripped = [known for known in table.columns if known.strip() == str(name).strip()]
    if len(stripped) == 1:
        return stripped[0]
    raise BadInput(f"{argument}: {table.source!r} has no column {quote(name)}{suggest(str(name), table.columns)}")


def find_targets(table: Table, target: str | Sequence[str]) -> list[str]:
    """One column or several; text with commas is several, unless one column is called so."""
    if not isinstance(target, str):
        names = list(target)
    elif target in table.columns or "," not in target:
        names = [target]
    else:
        names = [name for name in target.split(",") if name.strip()]
    found = [find(table, name, "target") for name in names]
    if not found or len(set(found)) < len(found):
        raise BadInput(f"target: {listed(names)} names {'no column' if not found else 'a column twice'}")
    return found


def alike(table: Table, test: Table) -> Table:
    """The test rows with the columns of the others.

    Raises:
        BadInput: they have other columns, or other kinds of values in one.
    """
    where, ours, theirs = repr(test.source), set(table.columns), set(test.columns)
    lacking, extra = [name for name in table.columns if name not in theirs], sorted(theirs - ours)
    if lacking:
        there = f"; it has {listed(extra, 5)} instead" if extra else ""
        raise BadInput(
            f"--test: {where} lacks {count(len(lacking), 'column')} of {table.source!r}: {listed(lacking, 5)}{there}"
        )
    if extra:
        raise BadInput(
            f"--test: {where} has {count(len(extra), 'column')} that {table.source!r} lacks: {listed(extra, 5)}; "
            "remove or --drop them"
        )
    frame, lists, dense = test.frame.copy(deep=False), dict(test.lists), dict(test.dense)
    for name, values in table.frame.items():
        if name in frame:
            frame[name] = _alike(values, frame[name], f"--test: column {quote(name)}", table.source, test.source)
    for name in set(table.lists) & set(dense):  # lists that all have one length by chance
        arrays = dense.pop(name)
        lists[name] = np.empty(len(test), dtype=object)
        lists[name][:] = list(arrays)
    for name in (*table.frame, *table.lists, *table.dense):
        shape, other = (values[name].shape[1:] if name in values else None for values in (table.dense, dense))
        if (name in table.frame) != (name in frame) or (name in table.lists) != (name in lists) or shape != other:
            raise BadInput(
                f"--test: {quote(name)} holds other kinds or numbers of values in {where} than in {table.source!r}; "
                "write both alike"
            )
    return replace(test, frame=frame, lists=lists, dense=dense)


def _alike(values: pd.Series, test: pd.Series, what: str, source: str, where: str) -> pd.Series:
    """A column's values in the test, in the kind that it is elsewhere."""
    kind, other = _kind(values), _kind(test)
    if kind == other or "nothing" in (kind, other):
        return test
    if kind == "text" and other in ("numbers", "flags"):
        return test.map(label).where(test.notna())
    odd = test[strays(column(test))] if other == "text" else test
    as_numbers = kind == "numbers" and other == "text" and mixed(test)
    as_flags = kind == "flags" and set(test.dropna().astype(str)) <= {"True", "False"}
    if as_numbers or as_flags:
        return test
    raise BadInput(
        f"{what} holds {kind} in {source!r} and {other} in {where!r}, such as {quote(odd.iloc[0])}; write both alike"
    )


def _kind(values: pd.Series) -> str:
    if values.isna().all():
        return "nothing"
    return {"b": "flags", "M": "dates", "O": "text"}.get(values.dtype.kind, "numbers")


# Columns with a part to play besides being features


def groups(values: pd.Series, name: str, notes: list[str]) -> NDArray[np.int64]:
    """A number per row."""
    what = f"group {quote(name)}"
    _whole(values, what)
    codes, levels = pd.factorize(values)
    if len(levels) == 1:
        raise BadInput(f"{what} is constant; choose a column with several groups, or none")
    notes.append(f"Rows are grouped by {quote(name)}: {len(levels)} groups, none of which a split parts.")
    return codes.astype(np.int64)


def times(values: pd.Series, name: str, place: Place, notes: list[str]) -> NDArray[np.float64]:
    """Numbers as they are; dates as seconds since 1970."""
    what = f"time {quote(name)}"
    _whole(values, what)
    if values.dtype.kind in "iuf":
        finite(values, what, "mend or remove these rows", place)
        time, span = values.to_numpy(dtype=np.float64), (values.min(), values.max())
    else:
        dates = values if values.dtype.kind == "M" else _dates(values, what)
        time, span = (dates - pd.Timestamp(0)).dt.total_seconds().to_numpy(), (dates.min(), dates.max())
    distinct = len(np.unique(time))
    if distinct < limits.FEWEST_TIMES:
        raise BadInput(
            f"{what} has {count(distinct, 'distinct value')}, at least {limits.FEWEST_TIMES} are needed to test on "
            "what is later; choose another column, or --group"
        )
    notes.append(
        f"Rows are ordered by {quote(name)}, {distinct:,} different times from {span[0]} to {span[1]}: models are "
        "tested on what is later, and the column is no feature."
    )
    return time


def _dates(values: pd.Series, what: str) -> pd.Series:
    """Text as dates without a time zone, all in one format; day and month are never guessed."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, where the other order of day and month fits
        for day_first in (False, True):
            try:
                dates = pd.to_datetime(values.astype(str), dayfirst=day_first, utc=True)
            except (ValueError, OverflowError):
                continue
            found.append(dates.dt.tz_convert(None))
    if not found:
        raise BadInput(
            f"{what}: such as {quote(values.iloc[0])}, neither numbers nor dates in one format; write 2024-12-31"
        )
    if not found[0].equals(found[-1]):
        raise BadInput(
            f"{what}: {quote(values.iloc[0])} may begin with the day or the month; write dates as 2024-12-31"
        )
    return found[0]


def weights(values: pd.Series, name: str, place: Place, notes: list[str]) -> NDArray[np.float64]:
    """Their mean is 1."""
    what = f"sample_weight {quote(name)}"
    _whole(values, what)
    if values.dtype.kind not in "biuf":
        raise BadInput(f"{what} is not all numbers, such as {quote(values.iloc[0])}; mend these rows")
    finite(values, what, "mend or remove these rows", place)
    weight = values.to_numpy(dtype=np.float64)
    if (weight < 0).any():
        raise BadInput(
            f"{what}: {count(int((weight < 0).sum()), 'value')} below 0, such as {weight.min():g}; mend these rows"
        )
    if not weight.any():
        raise BadInput(f"{what}: every value is 0; give some rows weight")
    notes.append(
        f"Rows are weighted by {quote(name)}, from {weight.min():g} to {weight.max():g}, and then scaled to mean 1."
    )
    return weight / weight.mean()


def names_of_rows(values: pd.Series, name: str, tested: NDArray[np.bool_], notes: list[str]) -> NDArray[np.object_]:
    """As text; no two rows of a file have the same."""
    what = f"id {quote(name)}"
    _whole(values, what)
    ids = values.map(label)
    twice = [ids[part][ids[part].duplicated()] for part in (~tested, tested)]
    if any(len(part) for part in twice):
        repeated = pd.concat(twice)
        raise BadInput(
            f"{what}: {count(len(repeated), 'value')} repeated, such as {quote(repeated.iloc[0])}; choose a column "
            "with one of its own for each row"
        )
    notes.append(f"Rows are named by {quote(name)}, which is no feature.")
    return ids.to_numpy(dtype=object)


def _whole(values: pd.Series, what: str) -> None:
    if values.isna().any():
        raise BadInput(f"{what}: {count(int(values.isna().sum()), 'value')} missing; fill or remove these rows")


# Features


def features(frame: pd.DataFrame, targets: Sequence[NDArray[Any]], place: Place, notes: list[str]) -> pd.DataFrame:
    """The columns worth keeping; odd ones are noted.

    Args:
        targets: the target, or each label.
        place: says where a row stands.
    """
    frame = frame.copy(deep=False)
    for name in [name for name in frame if mixed(frame[name])]:
        odd = frame[name][strays(frame[name])]
        notes.append(
            f"Column {quote(name)}: {count(len(odd), 'entry')} among numbers, such as {quote(odd.iloc[0])}, "
            "read as missing."
        )
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    gaps = frame.isna().sum()
    empty = [name for name in frame if gaps[name] == len(frame)]
    if empty:
        flags = " ".join(f"--drop {quote(name)}" for name in empty[:3])
        raise BadInput(
            f"{count(len(empty), 'column')} with every value missing: {listed(empty)}; leave out with {flags}"
        )
    distinct = frame.nunique(dropna=False)
    constant = [name for name in frame if distinct[name] == 1]
    if constant:
        notes.append(f"Constant, so left out: {listed(constant)}.")
    frame, gaps = frame.drop(columns=constant), gaps.drop(constant)

    unique, wordy, telling = [], [], []
    codes = [pd.factorize(target)[0] for target in targets]
    for name, values in frame.items():
        text, number = is_text(values), distinct[name] - (gaps[name] > 0)
        if values.dtype.kind in "uif":
            remedy = f"mend these rows or leave it out with --drop {quote(name)}"
            finite(values, f"column {quote(name)}", remedy, place)
        if number == len(frame) and (text or values.dtype.kind in "iu"):
            unique.append(name)
        elif text and number > limits.MOST_CODES:
            wordy.append(f"{quote(name)} ({number} distinct, such as {quote(values.dropna().iloc[0])})")
        if any(_tells(values, number < len(frame), *target) for target in zip(targets, codes)):
            telling.append(name)
    if unique:
        notes.append(
            f"Different in every row, probably identifiers: {listed(unique)}; --drop them unless they carry meaning."
        )
    if wordy:
        more = f" and {len(wordy) - MOST_NAMED} more" if len(wordy) > MOST_NAMED else ""
        notes.append(f"Text with many values: {', '.join(wordy[:MOST_NAMED])}{more}.")
    if telling:
        notes.append(f"{listed(telling)} tells the target exactly: --drop it unless it is known before the target is.")
    if gaps.any():
        notes.append(f"Missing values in {count(int((gaps > 0).sum()), 'column')}, {int(gaps.sum())} in all.")
    return frame


def _tells(values: pd.Series, repeats: bool, target: NDArray[Any], codes: NDArray[np.int64]) -> bool:
    """Whether a column is the target in other words; one that never repeats has to be the same numbers."""
    if not repeats:
        return np.array_equal(values.to_numpy(), target)
    head = pd.factorize(values.head(100))[0]  # numbered in the order in which they come, as the codes are
    return np.array_equal(head, codes[:100]) and np.array_equal(pd.factorize(values)[0], codes)


def finite(values: pd.Series, what: str, remedy: str, place: Place) -> None:
    """Refuses numbers that float32 cannot hold; `place` says where a row stands."""
    bad = (values.abs() > limits.LARGEST).to_numpy()
    if bad.any():
        raise BadInput(
            f"{what} holds {count(int(bad.sum()), 'value')} infinite or beyond {limits.LARGEST:.1e}, first in "
            f"{place(int(bad.argmax()))}; {remedy}"
        )
