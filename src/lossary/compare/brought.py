"""What a user brings beside the data: predictions of another model, and what wrong decisions cost."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load.text import pointed, read_words
from lossary.compare.load.words import brief
from lossary.compare.metrics import Metric
from lossary.compare.problem import Problem
from lossary.errors import BadInput

SURE = 1e-6  # least probability that is read; a log-loss must not hang on how a file was rounded
TOLERANCE = 1e-3  # by which probabilities of a row may miss the sum 1: files are rounded


def read_predictions(
    path: str | os.PathLike[str], problem: Problem, metric: Metric, notes: list[str] | None = None
) -> NDArray[np.float64]:
    """Predictions for these rows of the problem, in the shape that metrics take: (1, rows, ...).

    The first column holds the ids of the rows, in any order; rows beyond those asked for are fine. For a real target
    the second holds values. For classes it holds the class, or there is a column of probabilities for each class, named
    like it. Of two classes one column is enough, and if no column is named like a class, the second holds the
    probability of the last, which is noted. For labels there is a column of probabilities for each.

    Args:
        notes: what is inferred is added to them.

    Raises:
        BadInput: the file cannot be read, lacks rows, or holds something else.
    """
    where = f"--predictions: {os.fspath(path)!r}"
    if problem.ids is None:
        raise BadInput(f"{where} says by id which row is which; name the data's column of ids with --id")
    table = _table(path, "--predictions")
    if len(table.columns) < 2:
        raise BadInput(f"{where} has one column; it needs the rows' ids and what was predicted")
    ids = table.iloc[:, 0].str.strip()
    twice = ids[ids.duplicated()]
    if len(twice):
        raise BadInput(f"{where} names row {twice.iloc[0]!r} twice; leave one line for each row")
    wanted = pd.Index([str(value) for value in problem.ids])
    lacking = wanted[~wanted.isin(ids)]
    if len(lacking):
        raise BadInput(
            f"{where} lacks {len(lacking):,} of the {len(wanted):,} locked rows, such as id {lacking[0]!r}; predict "
            "every row of the data"
        )
    found = table.iloc[:, 1:].set_axis(ids).loc[wanted]
    if problem.task == "real":
        return _numbers(found.iloc[:, :1], where)[:, 0][None]
    if set(problem.classes) <= set(found.columns):
        chances = _numbers(found[list(problem.classes)], where)
        return _from_chances(chances, problem, where)[None]
    if problem.task == "multilabel":
        raise BadInput(f"{where} needs a column of probabilities for each of {', '.join(map(repr, problem.classes))}")
    named = [name for name in found.columns if name in problem.classes]
    if len(problem.classes) == 2 and named:
        return _of_two(found[named], problem.classes.index(named[0]), problem, where)
    first = found.iloc[:, 0].str.strip()
    if first.isin(problem.classes).all():
        if metric.name not in ("accuracy", "balanced accuracy", "macro F1", "level error", "quadratic kappa"):
            raise BadInput(
                f"{where} holds classes, and {metric.name} needs probabilities; give a column for each class"
            )
        chosen = first.map({name: code for code, name in enumerate(problem.classes)}).to_numpy()
        return np.log(np.where(np.arange(len(problem.classes)) == chosen[:, None], 1 - SURE, SURE))[None]
    if len(problem.classes) == 2:
        if notes is not None:
            other, last = map(repr, problem.classes)
            notes.append(
                f"Predictions: {found.columns[0]!r} was read as the probability of {last}; if it is that of {other}, "
                "name the column so."
            )
        return _of_two(found.iloc[:, :1], 1, problem, where)
    raise BadInput(
        f"{where} has {first[~first.isin(problem.classes)].iloc[0]!r}, which is no class; give one of "
        f"{', '.join(map(repr, problem.classes[:6]))}, or a column of probabilities for each"
    )


def _of_two(column: pd.DataFrame, which: int, problem: Problem, where: str) -> NDArray[np.float64]:
    """From the probability of one of two classes."""
    chance = _numbers(column, where)
    return _from_chances(np.hstack([1 - chance, chance])[:, :: 1 if which else -1], problem, where)[None]


def read_costs(path: str | os.PathLike[str], classes: tuple[str, ...]) -> NDArray[np.float64]:
    """Costs (true class, decision) from a table with the true classes down its first column, decisions in its header.

    Raises:
        BadInput: the file cannot be read, or its rows and columns are not the classes.
    """
    where, table = f"--cost-matrix: {os.fspath(path)!r}", _table(path, "--cost-matrix")
    table = table.set_axis(table.iloc[:, 0].str.strip()).iloc[:, 1:]
    for names, what in ((table.index, "rows"), (table.columns, "columns")):
        if sorted(names) != sorted(classes):
            raise BadInput(
                f"{where} has the {what} {', '.join(map(repr, names[:6]))}, expected {', '.join(map(repr, classes))}"
            )
    return _numbers(table.loc[list(classes), list(classes)], where)


def _table(path: str | os.PathLike[str], option: str) -> pd.DataFrame:
    """All columns as text, their names without blanks at the ends; beside the first, decimal commas are points."""
    path, separator = Path(path), ","
    if not path.is_file():
        raise BadInput(f"{option}: no file {str(path)!r}")
    try:
        if path.suffix == ".parquet":
            found = pd.read_parquet(path).astype(str)
        else:
            found, separator = read_words(path)
    except BadInput as error:
        raise BadInput(f"{option}: {error}") from None
    except Exception as error:  # whatever pandas and pyarrow raise on files that are no tables
        raise BadInput(f"{option}: {str(path)!r} is no table that can be read ({brief(error)})") from None
    if separator != ",":
        found.iloc[:, 1:] = found.iloc[:, 1:].apply(pointed)
    found.columns = [str(name).strip() for name in found.columns]
    if found.columns.has_duplicates:
        twice = found.columns[found.columns.duplicated()][0]
        raise BadInput(f"{option}: {str(path)!r} has two columns named {twice!r}; rename one")
    return found


def _numbers(table: pd.DataFrame, where: str) -> NDArray[np.float64]:
    values = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise BadInput(f"{where}: {table.iloc[row, column]!r} for {table.index[row]!r} is no finite number")
    return values


def _from_chances(chances: NDArray[np.float64], problem: Problem, where: str) -> NDArray[np.float64]:
    """Log-probabilities, or log-odds for labels."""
    if chances.min() < 0 or chances.max() > 1:
        raise BadInput(f"{where}: probabilities from {chances.min():g} to {chances.max():g}, expected 0 to 1")
    clipped = chances.clip(SURE, 1 - SURE)
    if problem.task == "multilabel":
        return np.log(clipped) - np.log1p(-clipped)
    total = chances.sum(1)
    if np.abs(total - 1).max() > TOLERANCE * len(problem.classes):
        raise BadInput(f"{where}: the probabilities of a row sum to {total[np.abs(total - 1).argmax()]:g}, expected 1")
    return np.log(clipped / clipped.sum(1, keepdims=True))
