"""From a file, a folder, a bundled name or an object in memory to a `Problem`; what is wrong is refused in one line.

Every reader makes a `table`: `text` (CSV and its kin), `arrow` (Parquet, Arrow, Feather), `arrays` (.npz, embeddings),
`images` (a folder by class), `datasets` (data frames, torch, Hugging Face). From there on all go the same way: `target`
reads what is to be predicted and `columns` all else. `limits` says how much is read.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.bundled import BUNDLED
from lossary.compare.load import arrays, arrow, columns, datasets, images, limits, text
from lossary.compare.load import target as targets
from lossary.compare.load.limits import MISSING as MISSING
from lossary.compare.load.table import Table, is_text
from lossary.compare.load.words import count, listed, quote, suggest
from lossary.compare.problem import LARGE, Problem
from lossary.errors import BadInput


def load(
    source: Any,
    *,
    target: str | Sequence[str] | None = None,
    task: str | None = None,
    group: str | None = None,
    time: str | None = None,
    sample_weight: str | None = None,
    id: str | None = None,
    drop: Iterable[str] = (),
    embeddings: str | os.PathLike[str] | None = None,
    test: Any = None,
) -> Problem:
    """Reads rows and says, in the problem's notes, all that was inferred or left out.

    Args:
        source: the path of a CSV or TSV file in UTF-8 with a header line, a Parquet, Arrow or Feather file, an .npz
            archive with arrays x and y, a folder with a sub-folder of images for each class, or a Hugging Face dataset
            saved to disk; the name of a bundled set (a key of `BUNDLED`), which comes before a file of that name; a
            pandas data frame; or a `torch.utils.data.Dataset` of pairs (features, target). What is too large is
            sampled, see `limits`.
        target: name of the column to predict, or of several columns of 0 and 1, which are labels, in a sequence or
            with commas between them. What has a target of its own needs none.
        task: "classes", "ordinal", "multilabel" or "real"; inferred where it is not given.
        group: name of a column whose equal values must never be parted by a split.
        time: name of a column of numbers or dates; models are then tested on what is later.
        sample_weight: name of a column that says how much each row counts.
        id: name of a column that names each row. This and the three before are no features.
        drop: names of columns to leave out.
        embeddings: path of an .npy file with a row of numbers for each row of the source, and then for each of `test`.
        test: rows like those of `source`, in any form that it may have, to be kept for the confirmation.

    Raises:
        BadInput: the source, a column or an argument cannot be used; one line with the remedy.
    """
    if task is not None and task not in targets.TASKS:
        raise BadInput(f"task: expected one of {', '.join(map(repr, targets.TASKS))}, got {task!r}")
    wanted = target if isinstance(target, str | None) else ",".join(target)
    parts = {"group": group, "time": time, "sample_weight": sample_weight, "id": id}
    parts = {part: name for part, name in parts.items() if name is not None}
    whole = read(source, wanted, parts)
    other = whole.test
    if test is not None:
        other = read(test, wanted, parts, [name for name, values in whole.frame.items() if is_text(values)])
        if whole.test is not None:
            whole = replace(
                whole, notes=(*whole.notes, f"Its own test rows are left out, as there is {other.source!r}.")
            )
    if embeddings is not None:
        total = whole.total + (0 if other is None else other.total)
        other = other and arrays.embed(other, Path(embeddings), first=whole.total, total=total)
        whole = arrays.embed(whole, Path(embeddings), total=total)

    names, parts, drop = _roles(whole, target, parts, (drop,) if isinstance(drop, str) else tuple(drop))
    notes, tested = [*whole.notes], np.zeros(len(whole), dtype=bool)
    whole = whole.without(set(drop))
    if other is not None:
        other = columns.alike(whole, other.without(set(drop)))
        notes += [f"Test: {note}" for note in other.notes]
        tested = np.repeat([False, True], [len(whole), len(other)])
        whole = whole.followed_by(other).cleaned(_kept(parts))
    if drop:
        notes.append(f"Left out as asked: {listed(drop)}.")
    return _problem(whole, names, parts, task, tested, notes)


def rows_of(
    source: Any,
    *,
    words: Collection[str] = (),
    shape: tuple[int, ...] = (),
    embeddings: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """All columns of rows that are yet to be predicted, under the names that `load` gives them.

    Args:
        source: as for `load`, but without a target; images need no sub-folders.
        words: the columns that were text where the model learned, though all may look like numbers here.
        shape: of a row where the model learned, to which images are brought.
        embeddings: path of an .npy file with a row of numbers for each row of the source.

    Raises:
        BadInput: the source cannot be used, or is too large to be read whole.
    """
    path = Path(os.fsdecode(source)) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.suffix.lower() == ".npz" and path.is_file():
        made = arrays.read_features(path)
    elif path is not None and path.is_dir() and len(shape) == 3 and not datasets.is_saved(path):
        made = images.read_bare(path, (shape[0] == 3, *shape[1:]))
    else:
        made = read(source, words=words)
    if embeddings is not None:
        made = arrays.embed(made, Path(embeddings))
    if len(made) < made.total:
        raise BadInput(f"{made.source!r}: {made.total:,} rows are too many to be read whole; predict them in parts")
    for name, values in made.dense.items():
        if values.ndim > 2 and shape and values.shape[1:] != shape:
            raise BadInput(
                f"{made.source!r}: {quote(name)} is {values.shape[1:]} in a row, where {shape} was learned from"
            )
    return _beside(made.frame, made)


def read(
    source: Any, target: str | None = None, parts: Mapping[str, str] | None = None, words: Collection[str] = ()
) -> Table:
    """The rows of any source, as its own words and types; what the arguments are for is said by `load` and `rows_of`.

    Raises:
        BadInput: the source cannot be used.
    """
    parts = parts or {}
    if isinstance(source, pd.DataFrame):
        made = datasets.of_frame(source)
    elif datasets.is_torch(source):
        made = datasets.of_torch(source)
    elif not isinstance(source, str | os.PathLike):
        raise BadInput(
            f"source: expected a path, the name of a bundled set, a data frame or a torch dataset, got {quote(source)}"
        )
    elif os.fspath(source) in BUNDLED:
        name = os.fspath(source)
        frame, own, about = BUNDLED[name]()
        made = replace(datasets.of_frame(frame), name=name, source=name, target=own, notes=(about,))
    else:
        made = _file(Path(os.fsdecode(source)), target, parts, words)
    return made.cleaned({*words, *_kept(parts)})


def _kept(parts: Mapping[str, str]) -> set[str]:
    """The columns that are words even where all of them are numbers: the names of rows."""
    return {name for part, name in parts.items() if part == "id"}


def _file(path: Path, target: str | None, parts: Mapping[str, str], words: Collection[str]) -> Table:
    where, suffix = repr(str(path)), path.suffix.lower()
    if os.path.isdir(path):
        if datasets.is_saved(path):
            return datasets.read_saved(path, target=target)
        if images.is_folder(path):
            return images.read(path)
        raise BadInput(f"{where} is a directory; name the CSV file inside it, or one with a sub-folder for each class")
    if not os.path.exists(path):
        raise BadInput(f"{where}: no such file or bundled set{_missing_file(path)}")
    if not os.path.isfile(path):
        raise BadInput(f"{where} is no regular file; save its contents to a CSV file first")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{where} cannot be read; check its permissions")
    if suffix == ".npz":
        return arrays.read(path, target=target, columns=tuple(parts.values()))
    if suffix in (".arrow", ".arrows", ".feather", ".ipc") or arrow.is_parquet(path):
        return arrow.read(path)
    return text.read(path, words={*words, *_kept(parts)})


def _missing_file(path: Path) -> str:
    """What may have been meant by a path that leads nowhere."""
    if path.suffix or path.parent != Path("."):
        try:
            beside = os.listdir(path.parent)
        except OSError:
            beside = []
        return suggest(path.name, beside, listing=False) or "; check the path"
    return suggest(path.name, BUNDLED)


def _roles(
    table: Table, target: str | Sequence[str] | None, parts: Mapping[str, str], drop: Sequence[str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """The columns to predict, those with another part to play, and those to leave out, by their exact names."""
    target = table.target if target is None else target
    if target is None:
        raise BadInput(f"{table.source!r}: say which column to predict with --target; it has {listed(table.columns)}")
    names = columns.find_targets(table, target)
    found = {part: columns.find(table, name, part) for part, name in parts.items()}
    left_out = [columns.find(table, name, "drop") for name in drop]
    if "id" not in found and table.id in table.columns and table.id not in (*names, *found.values(), *left_out):
        found["id"] = table.id
    times = Counter([*names, *found.values(), *set(left_out)])
    name, most = times.most_common(1)[0]
    if most > 1:
        raise BadInput(
            f"column {quote(name)}: given to two of --target, --group, --time, --sample-weight, --id and --drop"
        )
    for part, name in found.items():
        if name not in table.frame:
            reason = table.refused.get(name, "it holds an array or a list in every row")
            raise BadInput(f"{part} {quote(name)}: {reason}; choose a column of one value per row")
    return names, found, left_out


def _problem(
    table: Table,
    names: list[str],
    parts: Mapping[str, str],
    task: str | None,
    tested: NDArray[np.bool_],
    notes: list[str],
) -> Problem:
    """The rows that have a target, without `surplus` copies; `tested` are those of the test."""
    where, known, has_test = repr(table.source), targets.known(table, names), bool(tested.any())
    partial = len(table) - int(tested.sum()) < table.total
    if not known.all():
        notes.append(f"{count(int((~known).sum()), 'row')} left out because the target is missing.")
        table, tested = table.take(known).cleaned(_kept(parts)), tested[known]
    before = [*notes]
    train, held = int((~tested).sum()), int(tested.sum())
    if train < limits.FEWEST_ROWS:
        raise BadInput(
            f"{where}: {count(train, 'row')} with a target, at least {limits.FEWEST_ROWS} are needed; add rows"
        )
    if has_test and held < limits.FEWEST_TEST:
        raise BadInput(
            f"--test: {count(held, 'row')} with a target, at least {limits.FEWEST_TEST} are needed; add rows"
        )
    values, classes, task = targets.read(table, names, task, ~tested, notes)
    column = {part: table.frame[name] for part, name in parts.items()}
    group = columns.groups(column["group"], parts["group"], notes) if "group" in parts else None
    time = columns.times(column["time"], parts["time"], table.place, notes) if "time" in parts else None
    weight = None
    if "sample_weight" in parts:
        weight = columns.weights(column["sample_weight"], parts["sample_weight"], table.place, notes)
    ids = columns.names_of_rows(column["id"], parts["id"], tested, notes) if "id" in parts else None
    features, shape = _features(table.without({*names, *parts.values()}), values, notes)
    problem = Problem(
        name=table.name,
        source=table.source,
        features=features,
        target=values,
        target_name=",".join(names),
        task=task,
        classes=classes,
        group=group,
        shape=shape,
        time=time,
        weight=weight,
        ids=ids,
        test=np.flatnonzero(tested) if has_test else None,
        partial=partial,
    )
    repeats = _repeats(problem)
    if not len(problem.surplus):
        return replace(problem, notes=(*notes, *repeats, *_late(problem)))
    left_out, once = count(len(problem.surplus), "copy"), np.setdiff1d(np.arange(len(table)), problem.surplus)
    before.append(
        f"{left_out} of other rows left out: a model that has seen one knows the others, and keeping them together "
        f"would tie more than {LARGE:.0%} of the table{'' if group is None else ' by its groups'}. One of each is "
        "kept, drawn at random with a fixed seed."
    )
    try:
        return _problem(table.take(once), names, parts, task, tested[once], before)
    except BadInput as error:
        raise BadInput(f"without {left_out} of other rows, {error}") from None


def _features(table: Table, target: NDArray[Any], notes: list[str]) -> tuple[pd.DataFrame, tuple[int, ...]]:
    """The columns of all kinds side by side, and the shape of a row where it is no table."""
    refused = {**dict.fromkeys(table.lists, "it holds a list in every row"), **table.refused}
    for name, reason in refused.items():
        raise BadInput(f"column {quote(name)} cannot be a feature: {reason}; leave it out with --drop {quote(name)}")
    labels = [target] if target.ndim == 1 else list(target.T)
    frame = columns.features(table.frame, labels, table.place, notes)
    if not len(frame.columns) and not table.dense:
        raise BadInput(
            f"{table.source!r}: no column is left to predict from; it needs at least one that varies beside the target"
        )
    alone = [values.shape[1:] for values in table.dense.values()] if not len(frame.columns) else []
    return _beside(frame, table), alone[0] if len(alone) == 1 and len(alone[0]) > 1 else ()


def _beside(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The columns of the frame, and then a table's arrays number by number."""
    parts = [frame] if len(frame.columns) else []
    for name, values in table.dense.items():
        flat = values.reshape(len(values), -1)
        parts.append(pd.DataFrame(flat, columns=[f"{name}[{place}]" for place in range(flat.shape[1])], copy=False))
    made = parts[0] if len(parts) == 1 else pd.concat(parts, axis=1)
    if made.columns.has_duplicates:
        twice = made.columns[made.columns.duplicated()][0]
        raise BadInput(f"{table.source!r}: a column is named {quote(twice)}, as a number of an array is; rename it")
    return made


def _repeats(problem: Problem) -> list[str]:
    """Notes on rows that repeat.

    Raises:
        BadInput: the test rows are the others over again, or too few rows are left beside them.
    """
    same = len(problem) - int(problem.patterns.max()) - 1
    found = pd.DataFrame(problem.target).assign(pattern=problem.patterns)
    exact = int(found.duplicated().sum())
    notes = []
    if exact:
        notes.append(f"{count(exact, 'row')} the same as an earlier one.")
    if same > exact and problem.task != "real":
        notes.append(f"{count(same - exact, 'row')} with the features of an earlier one but another class.")
    if problem.test is None:
        return [*notes, problem.repeats] if same else notes
    beside, leaked = len(problem) - len(problem.test), len(problem.leaked)
    if beside == len(problem.test) and np.array_equal(found[:beside], found[beside:]):
        raise BadInput("--test: holds the very rows to learn from; name a file of other rows")
    if leaked:
        also = "" if problem.group is None else ", or of a group that is in the test,"
        notes.append(f"{count(leaked, 'row')} to learn from, copies of a test row{also} left out, as they would leak.")
    if beside - leaked < limits.FEWEST_ROWS:
        raise BadInput(
            f"--test: {beside - leaked} rows are left to learn from beside copies of test rows and their groups, at "
            f"least {limits.FEWEST_ROWS} are needed; name a file of other rows"
        )
    if same:
        notes.append(problem.rows(problem.searchable).repeats)
    shared = int(np.isin(problem.patterns[problem.test], problem.patterns[problem.searchable]).sum())
    if shared:
        notes.append(
            f"{count(shared, 'test row')} equal to one to learn from, as columns this coarse make rows equal by "
            "chance, which flatters what only remembers rows."
        )
    notes.append(f"{len(problem.test):,} test rows are kept for the confirmation.")
    return notes


def _late(problem: Problem) -> list[str]:
    """A note on rows that are dealt as later than they are."""
    if problem.time is None:
        return []
    rows = problem if problem.test is None else problem.rows(problem.searchable)
    later = int((pd.Series(rows.time).groupby(rows.units).transform("max") > rows.time).sum())
    if not later:
        return []
    whose = "copies" if problem.group is None else "group or copies"
    return [
        f"{count(later, 'row')} dealt by the latest time of their {whose}, which stay whole: models may be tested on "
        "some that are earlier than rows they learned from."
    ]
