"""NumPy arrays: `.npz` archives, embeddings beside a table, and whatever else comes as arrays."""

import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.table import Floats, Table, capacity, drawn, in_part, table, typed
from lossary.compare.load.words import listed, quote, reading, suggest
from lossary.errors import BadInput

FEATURES = ("x", "X", "features", "x_train", "X_train")
TARGETS = ("y", "Y", "target", "targets", "label", "labels", "y_train", "Y_train")


def read(path: Path, *, target: str | None = None, columns: Collection[str] = ()) -> Table:
    """An archive with an array of features, one of targets, and perhaps others beside them.

    x_train and y_train are called x and y, and x_test and y_test, where there are such, are a test.

    Args:
        target: the array to predict; without it the one whose name is among `TARGETS`.
        columns: further arrays, a value per row, that have a part to play; the rest is left out.
    """
    where = repr(str(path))
    with reading(where, "an .npz archive of arrays"), zipfile.ZipFile(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        x = _only(members, FEATURES, "features", where)
        if target not in (None, "y", *members):
            raise BadInput(f"target: {where} has no array {quote(target)}{suggest(target, members)}")
        y = target if target in members else _only(members, TARGETS, "the target, or be named by --target", where)
        beside = {name: name for name in columns if name in members and name not in (x, y)}
        said = target or "y"
        names = {"x": x, said: y, **beside}
        made = _rows(archive, path, names, said)
        tests = {"x": x.replace("_train", "_test"), said: y.replace("_train", "_test")}
        split = "_train" in x and "_train" in y and set(tests.values()) <= set(members)
        test = _rows(archive, path, tests, said) if split else None
    used = {*names.values(), *(tests.values() if split else ())}
    notes = [f"Features are the array {quote(x)}, the target is {quote(y)}."]
    if used < set(members):
        notes.append(f"Arrays left out: {listed(name for name in members if name not in used)}.")
    return replace(made, notes=(*notes, *made.notes), test=test)


def read_features(path: Path) -> Table:
    """The array of features alone, for rows whose target is not known."""
    where = repr(str(path))
    with reading(where, "an .npz archive of arrays"), zipfile.ZipFile(path) as archive:
        members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return _rows(archive, path, {"x": _only(members, FEATURES, "features", where)})


def _only(members: list[str], names: Collection[str], what: str, where: str) -> str:
    found = [name for name in names if name in members]
    if len(found) == 1:
        return found[0]
    there = f"has the arrays {listed(found or members)}" if members else "holds no arrays"
    raise BadInput(f"{where} {there}; exactly one must be {what}: {', '.join(names)}")


def _rows(archive: zipfile.ZipFile, path: Path, names: Mapping[str, str], target: str | None = None) -> Table:
    """The rows of the arrays `names`, by what they are called from here on."""
    where = repr(str(path))
    with _member(archive, names["x"], where) as (_, shape, _, _):
        total, width = shape[0], int(np.prod(shape[1:]))
    most = limits.MOST_CELLS if len(shape) < 3 else limits.MOST_NUMBERS
    rows = drawn(total, capacity(width, most, where))
    values = {name: _read(archive, member, total, rows, where) for name, member in names.items()}
    return of_arrays(path.stem, str(path), values, target, rows=rows, total=total)


Header = tuple[IO[bytes], tuple[int, ...], bool, np.dtype]


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, where: str) -> Iterator[Header]:
    """(the file after its header, shape, whether columns come first, type): an array that holds what it promises."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = header(file)
        if dtype.hasobject:
            raise BadInput(
                f"{where}: array {quote(name)} holds Python objects, which are not unpickled, as that can run any "
                "code; save numbers or text"
            )
        if dtype.names or dtype.kind not in "biufUSM" or not shape or 0 in (*shape[1:], dtype.itemsize):
            raise BadInput(f"{where}: array {quote(name)} of {dtype} {shape} holds no rows of numbers or text")
        if info.file_size - file.tell() != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(f"array {name!r} is shorter or longer than its header says")
        yield file, shape, columns_first, dtype


def _read(archive: zipfile.ZipFile, name: str, total: int, rows: NDArray[np.int64], where: str) -> NDArray[Any]:
    """These of an array's rows, which stream by, so that it need not fit into memory."""
    with _member(archive, name, where) as (file, shape, columns_first, dtype):
        if shape[0] != total:
            raise BadInput(f"{where}: array {quote(name)} has {shape[0]:,} rows where the features have {total:,}")
        width = int(np.prod(shape[1:])) * dtype.itemsize
        if columns_first and len(shape) > 1:
            if total * width > 8 * limits.MOST_NUMBERS:
                raise BadInput(f"{where}: array {quote(name)} is too large to read column by column; save it by rows")
            return np.frombuffer(file.read(), dtype).reshape(shape[::-1]).T[rows]
        step, parts = max(1, 2**24 // width), []
        for start in range(0, total, step):
            stop = min(start + step, total)
            part = np.frombuffer(file.read((stop - start) * width), dtype).reshape(stop - start, *shape[1:])
            part = part[rows[slice(*np.searchsorted(rows, (start, stop)))] - start]
            parts.append(_floats(part) if len(shape) > 2 else part)
        file.read(1)  # to the end, where the checksum is looked at
        return np.concatenate(parts) if parts else np.empty(shape, dtype)


def _floats(values: NDArray[Any]) -> Floats:
    """As float32; what is beyond its range comes out infinite, and is found there."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32) if values.dtype.kind in "biuf" and values.dtype != np.uint8 else values


def of_arrays(
    name: str,
    source: str,
    values: Mapping[str, NDArray[Any]],
    target: str | None,
    *,
    rows: NDArray[np.int64],
    total: int,
    notes: tuple[str, ...] = (),
) -> Table:
    """Arrays as columns: "x" the features (rows, ...), `target` what is to be predicted, others one value per row.

    Features of one or two dimensions are columns x0, x1, ...; of more they are tensors.
    """
    where, tensors, x = repr(source), [], values["x"]
    columns: list[tuple[object, Any]] = []
    if x.ndim > 2:
        columns.append(("x", tensor(x, "x", rows, where, tensors)))
    else:
        x = _text(x if x.ndim == 2 else x[:, None])
        columns += [(f"x{place}", pd.Series(x[:, place])) for place in range(x.shape[1])]
    for column, found in values.items():
        if column == "x":
            continue
        found = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
        marks = found.ndim == 2 and found.dtype.kind in "biuf" and bool(np.isin(found, (0, 1)).all())
        if found.ndim > 1 and not (marks and column == target):
            also = ", or labels of 0 and 1," if column == target else ""
            raise BadInput(f"{where}: {quote(column)} has the shape {found.shape}; one value per row{also} is needed")
        columns.append((column, found.astype(np.float32) if marks else pd.Series(_text(found))))
    parts = typed(columns, len(rows), where)
    found_notes = (*notes, *tensors, *in_part(len(rows), total))
    return table(name, source, **parts, rows=rows, total=total, target=target, notes=found_notes)


def _text(values: NDArray[Any]) -> NDArray[Any]:
    """Bytes and fixed-width text as Python's own."""
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return values.astype(object) if values.dtype.kind == "U" else values


def tensor(values: NDArray[Any], name: str, rows: NDArray[np.int64], where: str, notes: list[str]) -> Floats:
    """(rows, ...) as float32, channels before height and width.

    Raises:
        BadInput: not numbers, or not all of them finite.
    """
    if values.dtype.kind not in "biuf":
        raise BadInput(f"{where}: {quote(name)} holds {values.dtype}, where numbers are needed")
    if values.ndim == 3 and values.dtype == np.uint8:
        values = values[:, None]
        notes.append(f"{quote(name)} holds bytes in two dimensions, read as grey images.")
    elif values.ndim == 4 and values.shape[-1] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        values = np.ascontiguousarray(np.moveaxis(values, -1, 1))
        notes.append(f"{quote(name)} is read as images whose channels come last, and which are moved to the front.")
    values = _floats(values).astype(np.float32, copy=False)
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        raise BadInput(
            f"{where}: {quote(name)} holds numbers that are missing, infinite or beyond {limits.LARGEST:.1e}, first in "
            f"row {rows[bad.argmax()] + 1}; mend or remove such rows"
        )
    return values


def embed(made: Table, path: Path, *, first: int = 0, total: int | None = None) -> Table:
    """The table with the rows of an .npy file beside its own.

    Args:
        first: the row of the file that belongs to the first row of the table's source.
        total: how many rows the file must have; None are those of the source.
    """
    where, total = f"--embeddings: {str(path)!r}", made.total if total is None else total
    if not path.is_file():
        raise BadInput(f"{where}: no such file; check the path")
    with reading(where, "an .npy array"):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or values.dtype.kind not in "biuf":
            what = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "an archive"
            raise BadInput(f"{where} is {what}; an array of numbers, a row for each row of the table")
        if len(values) != total:
            raise BadInput(f"{where} has {len(values):,} rows where {made.source!r} has {total:,}; they must match")
        width = int(np.prod(values.shape[1:]))
        kept = drawn(len(made), capacity(width, limits.MOST_NUMBERS, where))
        made = replace(made.take(kept), notes=(*made.notes, *in_part(len(kept), len(made))))
        part = np.asarray(values[first + made.rows]).reshape(len(made), width)
        dense = tensor(part, "embeddings", made.rows, where, [])
    if "embeddings" in made.columns:
        raise BadInput(f"--embeddings: {made.source!r} has a column of that name; rename it")
    return replace(made, dense={**made.dense, "embeddings": dense})
