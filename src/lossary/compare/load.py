"""From a CSV file, or the name of a bundled set, to a `Problem`; whatever is wrong is refused in one line."""

import csv
import io
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from lossary.compare.bundled import BUNDLED
from lossary.compare.problem import Problem
from lossary.errors import BadInput

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "?")  # "None" may be a class
FEWEST_ROWS = 50
FEW_OF_CLASS = 40  # a quarter of them, locked, are fewer than the ten that a confirmation takes
LARGEST_FILE = 500_000_000  # bytes; a file is read whole
MOST_CODES = 20  # a whole-number target with more distinct values than this is read as real
LARGEST = float(np.finfo(np.float32).max)  # models train in float32
NUMERIC = 0.9  # a text column of which this share are numbers is read as numbers


def load(
    source: str | os.PathLike[str],
    *,
    target: str | None = None,
    task: Literal["classes", "real"] | None = None,
    group: str | None = None,
    drop: Iterable[str] = (),
) -> Problem:
    """Reads a table and says, in the problem's notes, all that was inferred or left out.

    Args:
        source: path of a CSV or TSV file in UTF-8 with a header line, or the name of a bundled set (a key
            of `BUNDLED`), which comes before a file of that name.
        target: name of the column to predict; a bundled set has one of its own.
        task: "classes" or "real"; inferred where it is not given.
        group: name of a column whose equal values must never be parted by a split; it is no feature.
        drop: names of columns to leave out.

    Raises:
        BadInput: the file, a column or an argument cannot be used; one line with the remedy.
    """
    if task not in (None, "classes", "real"):
        raise BadInput(f"task: expected 'classes' or 'real', got {task!r}")
    if not isinstance(source, str | os.PathLike):
        raise BadInput(f"source: expected a path or the name of a bundled set, got {_quote(source)}")
    source = os.fspath(source)
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    if source in BUNDLED:
        frame, own_target, about = BUNDLED[source]()
        frame = frame.apply(_column)
        return _problem(source, source, frame, own_target if target is None else target, task, group, drop, [about])
    path = Path(source)
    notes: list[str] = []
    return _problem(path.stem, source, _read(path, notes), target, task, group, drop, notes)


# Reading a file


def _read(path: Path, notes: list[str]) -> pd.DataFrame:
    """The columns of a delimited text file: numbers, True and False as such, all else as text."""
    where, text = repr(str(path)), _text(path)
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        header = next(_records(text, usual), (1, []))[1]
        separator = usual
        if len(header) == 1:
            separator = next((mark for mark in "\t,;|" if mark in header[0]), usual)
        if separator != usual:
            notes.append(f"The columns are separated by {_quote(separator)}.")
        rows, clean = -1, io.StringIO()
        writer = csv.writer(clean, lineterminator="\n")
        for line, record in _records(text, separator):
            if rows < 0:
                header = record
            elif len(record) != len(header):
                raise BadInput(
                    f"{where}, line {line}: {_count(len(record), 'field')} where the header has {len(header)}; "
                    "mend that line"
                )
            writer.writerow(record)
            rows += 1
    except csv.Error as error:
        raise BadInput(f"{where}, {error}; mend the quotes around that field") from None

    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    twice = next((name for name, times in Counter(header).items() if times > 1), None)
    if twice is not None:
        places = " and ".join(str(place + 1) for place, name in enumerate(header) if name == twice)
        raise BadInput(f"{where}: columns {places} are both named {_quote(twice)}; rename one in the header line")
    if rows < 1:
        raise BadInput(f"{where}: a header line but no rows; add the data below it")
    if all(_is_number(name) for name in header):
        notes.append("The header line holds only numbers: if the file has no header, add one.")

    frame = _parse(clean, ".")
    if separator != "," and any(_comma_decimals(frame[column]) for column in frame):
        frame = _parse(clean, ",")
        notes.append("Numbers are written with a decimal comma.")
    frame.columns = names
    return frame.apply(_column)


def _parse(clean: io.StringIO, decimal: str) -> pd.DataFrame:
    """Types, by pandas, of fields that are cut already: on odd line ends and quotes it may cut them otherwise."""
    clean.seek(0)
    return pd.read_csv(
        clean, decimal=decimal, index_col=False, keep_default_na=False, na_values=MISSING, low_memory=False
    )


def _text(path: Path) -> str:
    """The characters of the file, refused where it is no UTF-8 text."""
    where = repr(str(path))
    if os.path.isdir(path):
        raise BadInput(f"{where} is a directory; name the CSV file inside it")
    if not os.path.exists(path):
        raise BadInput(f"{where}: no such file or bundled set{_missing_file(path)}")
    if not os.path.isfile(path):
        raise BadInput(f"{where} is no regular file; save its contents to a CSV file first")
    if os.path.getsize(path) > LARGEST_FILE:
        raise BadInput(
            f"{where} is {os.path.getsize(path) / 1e9:.1f} GB, more than the {LARGEST_FILE / 1e9:g} GB that is read "
            "whole; draw a sample of its rows first"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{where} cannot be read ({error.strerror}); check its permissions") from None

    kinds = {b"\x1f\x8b": "gzip-compressed", b"PK\x03\x04": "a zip or Excel file", b"PAR1": "a Parquet file"}
    kinds |= {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}
    kind = next((kind for magic, kind in kinds.items() if raw.startswith(magic)), None)
    if kind or b"\0" in raw:
        raise BadInput(f"{where} is {kind or 'binary, with NUL bytes'}; save it as a CSV file in UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{where}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert it, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise BadInput(f"{where} is empty; it needs a header line and rows")
    return text


def _records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for record in reader:
            if any(record) or len(record) > 1:
                yield reader.line_num, record
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from None


def _column(values: pd.Series) -> pd.Series:
    """Numbers and booleans as they are; text without blanks at its ends, or as numbers where all of it is."""
    if values.dtype.kind in "biuf":
        return values
    text = values.astype(str).str.strip().where(values.notna())
    text = text.where(~text.isin(MISSING))
    return text if _strays(text).any() else pd.to_numeric(text, errors="coerce").astype(float)


def _strays(text: pd.Series) -> pd.Series:
    """Which entries are neither numbers nor missing."""
    return text.notna() & pd.to_numeric(text, errors="coerce").isna()


def _mixed(text: pd.Series) -> bool:
    """Nearly all of it numbers."""
    return text.dtype.kind not in "biuf" and _strays(text).sum() <= (1 - NUMERIC) * text.notna().sum()


def _comma_decimals(text: pd.Series) -> bool:
    if text.dtype.kind in "biuf" or text.isna().all():
        return False
    return text.dropna().astype(str).str.fullmatch(r"\s*[+-]?\d+,\d+\s*").mean() >= NUMERIC


# From columns to a problem


def _problem(
    name: str,
    source: str,
    frame: pd.DataFrame,
    target: str | None,
    task: str | None,
    group: str | None,
    drop: Sequence[str],
    notes: list[str],
) -> Problem:
    where = repr(source)
    if target is None:
        raise BadInput(f"{where}: say which column to predict with --target; it has {_list(frame.columns)}")
    target = _find(frame, target, "target", where)
    drop = [_find(frame, column, "drop", where) for column in drop]
    group = None if group is None else _find(frame, group, "group", where)
    roles = Counter([target, *set(drop), *([] if group is None else [group])])
    if max(roles.values()) > 1:
        raise BadInput(
            f"column {_quote(max(roles, key=lambda name: roles[name]))}: given to two of --target, --group and --drop"
        )

    known = frame[target].notna()
    if not known.any():
        raise BadInput(f"target {_quote(target)}: every value is missing; choose another column")
    if not known.all():
        notes.append(f"{_count(int((~known).sum()), 'row')} left out because the target is missing.")
        frame = frame[known].apply(_column)
    if frame[target].nunique() == 1:
        raise BadInput(
            f"target {_quote(target)} is constant: every value is {_quote(frame[target].iloc[0])}; choose another"
        )
    if len(frame) < FEWEST_ROWS:
        raise BadInput(
            f"{where}: {_count(len(frame), 'row')} with a target, at least {FEWEST_ROWS} are needed; add rows"
        )

    values, classes = _target(frame[target], target, task, notes)
    codes = None if group is None else _groups(frame[group], group, notes)
    features = _features(frame.drop(columns=list(roles)), values, where, notes)
    if drop:
        notes.append(f"Left out as asked: {_list(drop)}.")
    problem = Problem(
        name=name,
        source=source,
        features=features.reset_index(drop=True),
        target=values,
        target_name=target,
        task="classes" if classes else "real",
        classes=classes,
        group=codes,
    )
    return replace(problem, notes=(*notes, *_repeats(problem)))


def _target(values: pd.Series, name: str, task: str | None, notes: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(class numbers, class names), or (values, no names)."""
    what = f"target {_quote(name)}"
    distinct, rows = values.nunique(), len(values)
    numeric, text = values.dtype.kind in "iuf", values.dtype.kind not in "biuf"
    whole = numeric and bool((values == values.round()).all())
    if numeric:
        _finite(values, what, "mend or remove these rows")
    if text and task != "classes":
        stray = _quote(values[_strays(values)].iloc[0])
        if task == "real" or (_mixed(values) and distinct > MOST_CODES):
            raise BadInput(f"{what}: not all numbers, such as {stray}; mend these rows, or use --task classes")
        if distinct > max(MOST_CODES, rows / 5):
            raise BadInput(
                f"{what} is text with {distinct} distinct values in {rows} rows, such as {stray}, neither classes nor "
                "numbers; choose another column"
            )
    if task is None:
        task = "real" if numeric and distinct > (MOST_CODES if whole else 2) else "classes"
        read, other = ("numbers", "classes") if task == "real" else ("classes", "real")
        switch = f"; --task {other} reads it otherwise" if numeric else ""
        notes.append(f"Target {_quote(name)}: {distinct} distinct values, read as {read}{switch}.")
    if task == "real":
        return values.to_numpy(dtype=np.float64), ()

    codes, levels = pd.factorize(values, sort=True)
    labels = tuple(str(int(level)) if whole else str(level) for level in levels)
    counts = np.bincount(codes)
    single = [label for label, count in zip(labels, counts, strict=True) if count == 1]
    if single:
        raise BadInput(
            f"{what}: {_count(len(single), 'class')} with a single row ({_list(single, 3)}); merge or remove "
            "such rows" + (", or use --task real" if numeric else "")
        )
    few = [f"{label} ({count})" for label, count in zip(labels, counts, strict=True) if count < FEW_OF_CLASS]
    if few:
        notes.append(f"Classes with fewer than {FEW_OF_CLASS} rows, and how many: {_list(few)}.")
    folded = Counter(label.casefold() for label in labels)
    alike = [label for label in labels if folded[label.casefold()] > 1]
    if alike:
        notes.append(f"Classes that differ only in capitals: {_list(alike)}.")
    return codes.astype(np.int64), labels


def _features(frame: pd.DataFrame, target: np.ndarray, where: str, notes: list[str]) -> pd.DataFrame:
    """The columns worth keeping; odd ones are noted."""
    empty = [column for column in frame if frame[column].isna().all()]
    if empty:
        flags = " ".join(f"--drop {_quote(column)}" for column in empty[:3])
        raise BadInput(
            f"{_count(len(empty), 'column')} with every value missing: {_list(empty)}; leave out with {flags}"
        )
    constant = [column for column in frame if frame[column].nunique(dropna=False) == 1]
    if constant:
        notes.append(f"Constant, so left out: {_list(constant)}.")
    frame = frame.drop(columns=constant)
    for column in [column for column in frame if _mixed(frame[column])]:
        strays = frame[column][_strays(frame[column])]
        notes.append(
            f"Column {_quote(column)}: {_count(len(strays), 'entry')} among numbers, such as {_quote(strays.iloc[0])}, "
            "read as missing."
        )
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    if not len(frame.columns):
        raise BadInput(
            f"{where}: no column is left to predict from; it needs at least one that varies beside the target"
        )

    same = pd.factorize(target)[0]
    for column, values in frame.items():
        label = f"Column {_quote(column)}"
        distinct, text = values.nunique(), values.dtype.kind not in "biuf"
        repeats = distinct < len(frame)
        if values.dtype.kind in "uif":
            _finite(values, f"column {_quote(column)}", f"mend these rows or leave it out with --drop {_quote(column)}")
        if not repeats and (text or values.dtype.kind in "iu"):
            notes.append(f"{label} differs in every row: probably an identifier; --drop it unless it carries meaning.")
        elif text and distinct > MOST_CODES:
            notes.append(f"{label} is text with {distinct} distinct values, such as {_quote(values.dropna().iloc[0])}.")
        if np.array_equal(pd.factorize(values)[0], same) if repeats else np.array_equal(values.to_numpy(), target):
            notes.append(f"{label} tells the target exactly: --drop it unless it is known before the target is.")
    if frame.isna().any(axis=None):
        gaps = frame.isna().sum()
        notes.append(f"Missing values in {_count(int((gaps > 0).sum()), 'column')}, {int(gaps.sum())} in all.")
    return frame


def _groups(values: pd.Series, name: str, notes: list[str]) -> np.ndarray:
    """A number per row."""
    if values.isna().any():
        raise BadInput(
            f"group {_quote(name)}: {_count(int(values.isna().sum()), 'value')} missing; fill or remove these rows"
        )
    codes, levels = pd.factorize(values)
    if len(levels) == 1:
        raise BadInput(f"group {_quote(name)} is constant; choose a column with several groups, or none")
    notes.append(f"Rows are grouped by {_quote(name)}: {len(levels)} groups, none of which a split parts.")
    return codes.astype(np.int64)


def _repeats(problem: Problem) -> list[str]:
    """Notes on rows that repeat."""
    same = len(problem) - int(problem.patterns.max()) - 1
    exact = int(pd.DataFrame({"pattern": problem.patterns, "target": problem.target}).duplicated().sum())
    notes = []
    if exact:
        notes.append(f"{_count(exact, 'row')} the same as an earlier one.")
    if same > exact and problem.task == "classes":
        notes.append(f"{_count(same - exact, 'row')} with the features of an earlier one but another class.")
    if same and problem.coarse:
        notes.append("Equal rows are the rule here, and classes differ among them: splits part them freely.")
    elif same:
        notes.append("Splits keep rows with equal features together.")
    return notes


# Words


def _finite(values: pd.Series, what: str, remedy: str) -> None:
    bad = values.abs() > LARGEST
    if bad.any():
        raise BadInput(
            f"{what} holds {_count(int(bad.sum()), 'value')} infinite or beyond {LARGEST:.1e}, first in data row "
            f"{bad.index[bad][0] + 1}; {remedy}"
        )


def _find(frame: pd.DataFrame, name: str, argument: str, where: str) -> str:
    """The column of that name, blanks at its ends aside."""
    if name in frame:
        return name
    stripped = [column for column in map(str, frame.columns) if column.strip() == str(name).strip()]
    if len(stripped) == 1:
        return stripped[0]
    raise BadInput(f"{argument}: {where} has no column {_quote(name)}{_suggest(str(name), frame.columns)}")


def _missing_file(path: Path) -> str:
    """What may have been meant by a path that leads nowhere."""
    if path.suffix or path.parent != Path("."):
        try:
            beside = os.listdir(path.parent)
        except OSError:
            beside = []
        return _suggest(path.name, beside, listing=False) or "; check the path"
    return _suggest(path.name, BUNDLED)


def _suggest(name: str, known: Collection[str], *, listing: bool = True) -> str:
    lower = {item.casefold(): item for item in known}
    close = get_close_matches(name.casefold(), lower, n=1)
    meant = f"; did you mean {_quote(lower[close[0]])}?" if close else ""
    return meant or (f"; there is {_list(known)}" if listing else "")


def _quote(value: object) -> str:
    """The value in quotes, on one line, cut short where it is long."""
    text = repr(value) if isinstance(value, str) else repr(str(value))
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


def _list(names: Iterable[object], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_quote, names[:most])) + more


def _count(number: int, noun: str) -> str:
    plural = {"class": "classes", "entry": "entries"}.get(noun, noun + "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
