"""What is to be predicted: classes, levels in an order, labels, or a number."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.columns import finite
from lossary.compare.load.table import Table, is_text, label, mixed, strays
from lossary.compare.load.words import count, is_number, listed, quote
from lossary.compare.problem import Task
from lossary.errors import BadInput

TASKS: tuple[str, ...] = get_args(Task)
# Words whose order everybody agrees on; a column may lack some of them.
SCALES = tuple(
    scale.split(", ")
    for scale in (
        "very low, low, medium, high, very high",
        "very low, low, moderate, high, very high",
        "low, mid, high",
        "extra small, small, medium, large, extra large",
        "xxs, xs, s, m, l, xl, xxl, xxxl",
        "very poor, poor, fair, good, very good, excellent",
        "very bad, bad, neutral, good, very good",
        "none, minimal, mild, moderate, severe, critical",
        "never, rarely, sometimes, often, always",
        "never, seldom, sometimes, often, always",
        "strongly disagree, disagree, neutral, agree, strongly agree",
        "very dissatisfied, dissatisfied, neutral, satisfied, very satisfied",
        "very unlikely, unlikely, neutral, likely, very likely",
        "minor, moderate, major, critical",
        "i, ii, iii, iv, v",
        "first, second, third, fourth, fifth",
        "bronze, silver, gold, platinum",
    )
)
TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}

Target = tuple[NDArray[Any], tuple[str, ...], Task]  # the values, the names of classes, levels or labels, and the task


def known(table: Table, names: Sequence[str]) -> NDArray[np.bool_]:
    """The rows that have a target.

    Raises:
        BadInput: there are none.
    """
    rows = np.ones(len(table), dtype=bool)
    for name in names:
        if name in table.refused:
            raise BadInput(f"target {quote(name)}: {table.refused[name]}; choose another column")
        if name in table.frame:
            rows &= table.frame[name].notna().to_numpy()
        elif name in table.lists:
            rows &= np.array([value is not None for value in table.lists[name]])
    if not rows.any():
        raise BadInput(f"target {listed(names)}: every value is missing; choose another column")
    return rows


def read(table: Table, names: Sequence[str], task: str | None, counted: NDArray[np.bool_], notes: list[str]) -> Target:
    """The target of rows that all have one.

    Args:
        names: its columns; several are labels.
        task: what the caller says it is.
        counted: the rows that are there to learn from; classes need at least two of them.
        notes: what is inferred is added to them.

    Raises:
        BadInput: it cannot be used.
    """
    if len(names) > 1:
        return _labels(*_columns(table, names, task), f"targets {listed(names)}", counted, notes)
    name, what = names[0], f"target {listed(names)}"
    if name in table.dense or name in table.lists:
        values = table.dense.get(name, table.lists.get(name))
        if isinstance(values[0], np.ndarray) and task != "multilabel" and _one_hot(values):
            notes.append(
                f"Target {quote(name)} has one 1 in every row, read as classes; --task multilabel reads it otherwise."
            )
            return _classes(pd.Series(np.argmax(values, axis=1)), name, what, counted, notes, numeric=False)
        if task not in (None, "multilabel"):
            raise BadInput(f"{what} holds lists of labels, which --task {task} does not read; leave --task out")
        notes.append(f"Target {quote(name)} holds a list in every row, read as labels.")
        return _labels(*_lists(values, what), what, counted, notes)
    values = table.frame[name]
    if values[counted].nunique() == 1:
        raise BadInput(f"{what} is constant: every value is {quote(values[counted].iloc[0])}; choose another")
    if task == "multilabel":
        return _labels(*_split(values, what), what, counted, notes)
    levels = table.levels.get(name)
    if task == "ordinal" or (task is None and levels is not None):
        return _ordinal(values, name, levels, task, counted, notes)
    return _plain(table, name, task, counted, notes)


# One value per row


def _plain(table: Table, name: str, task: str | None, counted: NDArray[np.bool_], notes: list[str]) -> Target:
    """Classes or a number."""
    values = table.frame[name]
    if task == "real" and is_text(values) and not strays(values).any():  # names of classes that are numbers
        values = pd.to_numeric(values)
    what = f"target {quote(name)}"
    distinct, rows = values.nunique(), len(values)
    dates = values.dtype.kind == "M"
    numeric, text = values.dtype.kind in "iuf", is_text(values) or dates
    if numeric:
        finite(values, what, "mend or remove these rows", table.place)
    whole = numeric and bool((values == values.round()).all())
    named = task is None and name in table.labels
    if text and task != "classes" and not named:
        stray = quote(values.iloc[0] if dates else values[strays(values)].iloc[0])
        if task == "real" or (not dates and mixed(values) and distinct > limits.MOST_CODES):
            raise BadInput(f"{what}: not all numbers, such as {stray}; mend these rows, or use --task classes")
        if distinct > max(limits.MOST_CODES, rows / 5):
            raise BadInput(
                f"{what} is text with {distinct} distinct values in {rows} rows, such as {stray}, neither classes nor "
                "numbers; choose another column"
            )
    if task is None:
        many = numeric and distinct > (limits.MOST_CODES if whole else 2)
        task = "real" if many and not named else "classes"
        read, other = ("numbers", "classes") if task == "real" else ("classes", "real")
        switch = f"; --task {other} reads it otherwise" if numeric else ""
        notes.append(f"Target {quote(name)}: {distinct} distinct values, read as {read}{switch}.")
    if task == "real":
        return values.to_numpy(dtype=np.float64), (), "real"
    return _classes(values, name, what, counted, notes, numeric=numeric)


def _classes(
    values: pd.Series, name: str, what: str, counted: NDArray[np.bool_], notes: list[str], *, numeric: bool
) -> Target:
    codes, levels = pd.factorize(values, sort=True)
    names = tuple(map(label, levels))
    _enough(np.bincount(codes[counted], minlength=len(names)), names, what, numeric, notes)
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        notes.append(f"Classes that differ only in capitals: {listed(alike)}.")
    return codes.astype(np.int64), names, "classes"


def _enough(counts: NDArray[np.int64], names: Sequence[str], what: str, numeric: bool, notes: list[str]) -> None:
    """Refuses classes with a single row, and notes those with few."""
    single = [name for name, number in zip(names, counts, strict=True) if number == 1]
    if single:
        raise BadInput(
            f"{what}: {count(len(single), 'class')} with a single row ({listed(single, 3)}); merge or remove "
            "such rows" + (", or use --task real" if numeric else "")
        )
    few = [f"{name} ({number})" for name, number in zip(names, counts, strict=True) if number < limits.FEW_OF_CLASS]
    if few:
        notes.append(f"Classes with fewer than {limits.FEW_OF_CLASS} rows, and how many: {listed(few)}.")


def _ordinal(
    values: pd.Series,
    name: str,
    levels: tuple[str, ...] | None,
    task: str | None,
    counted: NDArray[np.bool_],
    notes: list[str],
) -> Target:
    what = f"target {quote(name)}"
    text = is_text(values) or values.dtype.kind == "M"
    found = values.map(label)
    if not text or all(map(is_number, found.unique())):
        order = tuple(sorted(found.unique(), key=float)) if text else tuple(map(label, np.sort(values.unique())))
    elif levels is not None and set(found) <= set(levels):
        order = tuple(level for level in levels if level in set(found))
    else:
        order = _scale(found.unique(), what)
    codes = found.map({level: code for code, level in enumerate(order)}).to_numpy(dtype=np.int64)
    _enough(np.bincount(codes[counted], minlength=len(order)), order, what, not text, notes)
    because = "" if task else ", as its column knows their order; --task classes reads it otherwise"
    notes.append(f"Target {quote(name)}: {len(order)} levels, from low to high {listed(order)}{because}.")
    return codes, order, "ordinal"


def _scale(levels: Sequence[str], what: str) -> tuple[str, ...]:
    """The levels in the order of a scale that has all of them."""
    folded = {level.casefold(): level for level in levels}
    orders = {tuple(word for word in scale if word in folded) for scale in SCALES if set(folded) <= set(scale)}
    if len(folded) < len(levels) or len(orders) != 1:
        raise BadInput(f"{what}: no order is known for {listed(levels, 5)}; write the levels as numbers")
    return tuple(folded[word] for word in orders.pop())


# Labels


def _columns(table: Table, names: Sequence[str], task: str | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Several columns of 0 and 1."""
    if task not in (None, "multilabel"):
        raise BadInput(f"--target: {len(names)} columns are labels, which --task {task} does not read; name one column")
    made = []
    for name in names:
        if name not in table.frame:
            raise BadInput(f"target {quote(name)} holds a list or an array in every row; name it alone")
        values = table.frame[name].map(lambda value: TRUTH.get(label(value).casefold()))
        if values.isna().any():
            odd = quote(table.frame[name][values.isna()].iloc[0])
            raise BadInput(f"target {quote(name)}: {odd} among its values, where labels are 0 or 1, true or false")
        made.append(values.to_numpy(dtype=np.int64))
    return np.stack(made, axis=1), tuple(names)


def _one_hot(values: Any) -> bool:
    """Arrays with one 1 among zeros in every row."""
    if values.ndim != 2 or values.shape[1] < 2:
        return False
    return bool(np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all())


def _lists(values: Any, what: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Arrays of 0 and 1 as long as there are labels, or lists of labels."""
    if isinstance(values, np.ndarray) and values.ndim > 2:
        raise BadInput(f"{what} has the shape {values.shape}; choose a column of labels")
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] > 1 and np.isin(values, (0, 1)).all():
        return values.astype(np.int64), tuple(map(str, range(values.shape[1])))
    rows = []
    for row in values:
        items = [label(item.item() if isinstance(item, np.generic) else item) for item in row if not _gap(item)]
        if any(isinstance(item, list | tuple | dict | np.ndarray) for item in row):
            raise BadInput(f"{what} holds lists within lists; choose a column of labels")
        rows.append(set(items))
    if isinstance(values, np.ndarray) and values.ndim == 2 and any(not float(v).is_integer() for v in values.flat):
        raise BadInput(
            f"{what} holds arrays of numbers, which are neither labels nor one number; choose another column"
        )
    return _matrix(rows)


def _gap(item: Any) -> bool:
    return item is None or (isinstance(item, float) and np.isnan(item))


def _split(values: pd.Series, what: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Text of labels with ; or | between them."""
    if not is_text(values):
        raise BadInput(
            f"{what} is not text; --task multilabel takes labels with ; or | between them, or several columns"
        )
    used = [mark for mark in ";|" if values.str.contains(mark, regex=False).any()]
    if len(used) != 1:
        how = "both ; and | stand" if used else "neither ; nor | stands"
        raise BadInput(f"{what}: {how} between labels, such as in {quote(values.iloc[0])}; use one of them throughout")
    return _matrix([{part.strip() for part in text.split(used[0])} - {""} for text in values])


def _matrix(rows: list[set[str]]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    found = set().union(*rows)
    try:
        names = sorted(found, key=float)
    except ValueError:
        names = sorted(found)
    place = {name: number for number, name in enumerate(names)}
    matrix = np.zeros((len(rows), len(names)), dtype=np.int64)
    for number, row in enumerate(rows):
        matrix[number, [place[name] for name in row]] = 1
    return matrix, tuple(names)


def _labels(
    matrix: NDArray[np.int64], names: tuple[str, ...], what: str, counted: NDArray[np.bool_], notes: list[str]
) -> Target:
    if len(names) < 2:
        raise BadInput(f"{what}: {count(len(names), 'label')}, where several are needed; use --task classes for one")
    has = matrix[counted].sum(axis=0)
    lacks = counted.sum() - has
    rare = [name for name, low in zip(names, np.minimum(has, lacks)) if low < 2]
    if rare:
        raise BadInput(
            f"{what}: {count(len(rare), 'label')} that fewer than two rows have, or fewer than two lack "
            f"({listed(rare, 3)}); merge or remove such labels"
        )
    few = [f"{name} ({low})" for name, low in zip(names, np.minimum(has, lacks)) if low < limits.FEW_OF_CLASS]
    if few:
        notes.append(f"Labels that fewer than {limits.FEW_OF_CLASS} rows have, or lack, and how many: {listed(few)}.")
    mean = matrix.sum(axis=1).mean()
    notes.append(f"{len(names)} labels, {mean:.3g} in a row on average: {listed(names)}.")
    return matrix, names, "multilabel"
