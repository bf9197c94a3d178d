"""Parquet, Arrow and Feather files: columns with types, sampled while the file streams by."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.table import Table, capacity, in_part, table, typed
from lossary.compare.load.words import brief, needs, reading

if TYPE_CHECKING:
    import pyarrow as pa


def read(path: Path) -> Table:
    """A Parquet file, or an Arrow file or stream; Feather is an Arrow file."""
    where = repr(str(path))
    with needs("pyarrow", where):
        import pyarrow as pa
        import pyarrow.parquet as pq
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"FEA1"):
        with reading(where, "a Feather file", "its version 1 is out of use: write it anew"):
            raise ValueError("version 1")
    if is_parquet(path):
        with (
            reading(where, "a Parquet file"),
            pq.ParquetFile(path, memory_map=True, buffer_size=2**20, page_checksum_verification=True) as file,
        ):
            rows = max(1, min(limits.ROWS_AT_ONCE, limits.MOST_CELLS // 20 // max(len(file.schema_arrow), 1)))
            found, numbers, total = sample(file.iter_batches(rows), file.schema_arrow, where)
            columns = series(found)
    else:
        with reading(where, "an Arrow file"):
            if start == b"ARROW1":
                with pa.memory_map(str(path)) as file:
                    source = pa.ipc.open_file(file)
                    batches = (source.get_batch(place) for place in range(source.num_record_batches))
                    found, numbers, total = sample(batches, source.schema, where)
            else:
                found, numbers, total = sample(stream(path), stream(path).schema, where)
            columns = series(found)
    notes = in_part(len(numbers), total)
    return table(path.stem, str(path), **typed(columns, len(numbers), where), rows=numbers, total=total, notes=notes)


def stream(path: Path) -> "pa.RecordBatchStreamReader":
    """The batches of an Arrow stream, refused where it ends before its end."""
    import pyarrow as pa

    file = pa.memory_map(str(path))
    if file.size() < 4 or file.read_at(4, file.size() - 4) != bytes(4):
        raise ValueError("it lacks the mark at its end")
    return pa.ipc.open_stream(file)


def sample(
    batches: "Iterable[pa.RecordBatch]", schema: "pa.Schema", where: str, most: int | None = None
) -> "tuple[pa.Table, NDArray[np.int64], int]":
    """(rows, their numbers, how many there were): all rows while they fit, which is `most` or by the columns.

    Whenever they no longer do, each of those kept is given up with a chance of one half, and from there on rows come
    in at half the rate. So every row has the same chance, and between half and all of what fits is kept.
    """
    import pyarrow as pa

    most = capacity(len(schema), limits.MOST_CELLS, where) if most is None else most
    rng, rate, total = np.random.default_rng(0), 1.0, 0
    kept: list[tuple[NDArray[np.int64], pa.RecordBatch]] = []
    rows = size = 0

    def drawn(numbers: NDArray[np.int64], batch: "pa.RecordBatch", share: float) -> None:
        nonlocal rows, size
        chosen = np.flatnonzero(rng.random(len(numbers)) < share)
        part = batch if len(chosen) == len(numbers) else batch.take(pa.array(chosen))
        kept.append((numbers[chosen], part))
        rows, size = rows + len(chosen), size + part.nbytes

    for batch in batches:
        batch.validate(full=True)  # a damaged one would otherwise be read beyond its end
        batch = pa.RecordBatch.from_arrays([_decoded(values) for values in batch.columns], batch.schema.names)
        drawn(np.arange(total, total + len(batch)), batch, rate)
        total += len(batch)
        while rows > most or size > limits.MOST_BYTES:
            rate, rows, size, before = rate / 2, 0, 0, kept
            kept = []
            for numbers, part in before:
                drawn(numbers, part, 0.5)
    numbers = np.concatenate([numbers for numbers, _ in kept]) if kept else np.arange(0)
    parts = [part for _, part in kept]
    return pa.Table.from_batches(parts, None if parts else schema).unify_dictionaries(), numbers, total


def _decoded(values: "pa.Array") -> "pa.Array":
    """Plain values in place of a dictionary, which every batch would carry along, or of a type of somebody's own."""
    import pyarrow as pa

    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) and not values.type.ordered else values


def series(found: "pa.Table", made: Mapping[str, Any] | None = None) -> list[tuple[str, Any]]:
    """(name, values, or why there are none) of each column; of those in `made` the values that stand there."""
    import pyarrow as pa

    columns: list[tuple[str, Any]] = []
    for name, values in zip(found.column_names, found.columns):
        if made and name in made:
            columns.append((name, made[name]))
            continue
        try:
            columns.append((name, values.to_pandas(date_as_object=False)))
        except (pa.ArrowException, ValueError, TypeError) as error:
            columns.append((name, f"it holds {values.type} ({brief(error)})"))
    return columns


def is_parquet(path: Path) -> bool:
    """By its first and last bytes, or where those are gone by its name."""
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0, 2)
        if file.tell() >= 12:
            file.seek(-4, 2)
            if start == file.read(4) == b"PAR1":
                return True
    return path.suffix.lower() in (".parquet", ".pq")
