"""CSV, TSV and their kin: text with a header line. Whatever its size, no more than a part of it is in memory."""

import codecs
import csv
import io
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd

from lossary.compare.load import limits
from lossary.compare.load.table import Table, in_part, is_text, mixed, strays, table
from lossary.compare.load.words import count, is_number, quote
from lossary.errors import BadInput

CHUNK = 2**20
LINES_TRIED = 20  # below the header, to find out what separates fields
COMMA = r"\s*[+-]?\d+,\d+\s*"  # a number with a decimal comma


def read(path: Path, *, words: Collection[str] = ()) -> Table:
    """The columns of a delimited text file: numbers, True and False as such, all else as text.

    Args:
        words: columns that are text even where all of it is numbers.
    """
    cut = _cut(path)
    notes = [] if cut.separator == cut.usual else [f"The columns are separated by {quote(cut.separator)}."]
    if all(is_number(name) for name in cut.names):
        notes.append("The header line holds only numbers: if the file has no header, add one.")
    kept_as_text = {name: str for name in cut.names if name in words}
    frame = _parse(cut, kept_as_text)
    if cut.separator != "," and any(_comma_decimals(frame[name]) for name in frame):
        frame = _parse(cut, kept_as_text, decimal=",")
        for name in [name for name in frame if name not in words and is_text(frame[name])]:
            thousands = frame[name].str.contains(".", regex=False) & ~strays(frame[name])  # such as 1.000, maybe
            point = pointed(frame[name])
            frame[name] = point if mixed(point) and not thousands.any() else frame[name]
        notes.append("Numbers are written with a decimal comma.")
    notes += in_part(len(cut.rows), cut.total)
    return table(path.stem, str(path), frame, rows=np.array(cut.rows), total=cut.total, notes=tuple(notes))


def read_words(path: Path) -> tuple[pd.DataFrame, str]:
    """Every field of a delimited text file as it is written, and what separates them.

    Raises:
        BadInput: it cannot be read, or is too large to be read whole.
    """
    cut = _cut(path)
    if len(cut.rows) < cut.total:
        raise BadInput(f"{str(path)!r}: {cut.total:,} rows are too many to be read whole; leave out what is not needed")
    return _parse(cut, str, missing=()), cut.separator


def pointed(text: pd.Series) -> pd.Series:
    """Numbers with a decimal comma written with a point; all else as it is."""
    return text.where(~text.astype(str).str.fullmatch(COMMA), text.astype(str).str.replace(",", "."))


@dataclass(frozen=True)
class _Cut:
    """A file whose lines were counted and cut into fields.

    Attributes:
        names: of the columns.
        separator, usual: what stands between fields, and what would be expected there.
        clean: header and rows that were kept, as clean CSV.
        rows: the number of each row that was kept, from 0.
        total: how many rows there are.
    """

    names: list[str]
    separator: str
    usual: str
    clean: io.BytesIO
    rows: list[int]
    total: int


def _cut(path: Path) -> _Cut:
    where = repr(str(path))
    _check(path)
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    separator = _separator(path, usual)
    try:
        with _opened(path) as lines:
            header, rows, clean, total = _sample(lines, separator, where)
    except csv.Error as error:
        raise BadInput(f"{where}, {error}; mend the quotes around that field") from None
    twice = next((name for name, times in Counter(header).items() if times > 1), None)
    if twice is not None:
        places = " and ".join(str(place + 1) for place, name in enumerate(header) if name == twice)
        raise BadInput(f"{where}: columns {places} are both named {quote(twice)}; rename one in the header line")
    if not total:
        raise BadInput(f"{where}: a header line but no rows; add the data below it")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    return _Cut(names, separator, usual, clean, rows, total)


def _separator(path: Path, usual: str) -> str:
    """The mark that cuts the header into the most fields, of those by which most of the next lines have as many.

    Where there is none it is the usual one if the header holds it, otherwise the first other one that it holds.
    """
    found: dict[str, list[int]] = {}
    for mark in (usual, *(mark for mark in ",\t;|" if mark != usual)):
        found[mark] = fields = []
        with _opened(path) as lines, suppress(csv.Error):  # quotes may make no sense with this mark
            fields.extend(len(record) for _, record in islice(_records(lines, mark), 1 + LINES_TRIED))
    held = {mark: fields for mark, fields in found.items() if fields and fields[0] > 1}
    fits = [
        mark for mark, (first, *others) in held.items() if 2 * sum(fields == first for fields in others) > len(others)
    ]
    return max(fits, key=lambda mark: held[mark][0]) if fits else next(iter(held), usual)


def _check(path: Path) -> None:
    """Refuses what is no UTF-8 text in lines, saying where; nothing of it is kept."""
    where, decoder = repr(str(path)), codecs.getincrementaldecoder("utf-8-sig")()
    kinds = {b"\x1f\x8b": "gzip-compressed", b"PK\x03\x04": "a zip or Excel file", b"PAR1": "a Parquet file"}
    kinds |= {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"\x93NUMPY": "a NumPy array"}
    line, length, blank = 1, 0, True
    try:
        with open(path, "rb") as file:
            while True:
                chunk = file.read(CHUNK)
                kind = next((kind for magic, kind in kinds.items() if blank and chunk.startswith(magic)), None)
                if kind or b"\0" in chunk:
                    raise BadInput(f"{where} is {kind or 'binary, with NUL bytes'}; save it as a CSV file in UTF-8")
                blank = not decoder.decode(chunk, final=not chunk).strip() and blank
                if not chunk:
                    break
                line += chunk.count(b"\n")
                last = max(chunk.rfind(b"\n"), chunk.rfind(b"\r"))
                length = len(chunk) - 1 - last if last >= 0 else length + len(chunk)
                if length > limits.LONGEST_LINE:
                    raise BadInput(
                        f"{where}, line {line}: longer than {limits.LONGEST_LINE / 1e6:g} MB; is it a table in lines?"
                    )
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise BadInput(
            f"{where}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert it, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise BadInput(f"{where} cannot be read ({error.strerror}); check its permissions") from None
    if blank:
        raise BadInput(f"{where} is empty; it needs a header line and rows")


def _opened(path: Path) -> io.TextIOBase:
    return open(path, encoding="utf-8-sig", newline="")


def _records(lines: Iterable[str], separator: str, before: int = 0) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank, where so many came before."""
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for record in reader:
            if any(record) or len(record) > 1:
                yield before + reader.line_num, record
    except csv.Error as error:
        raise csv.Error(f"line {before + reader.line_num}: {error}") from None


def _skimmed(lines: Iterator[str], separator: str) -> Iterator[tuple[int, int, str]]:
    """(line number, how many fields, the text that they are yet to be cut from) of each record, as `_records`.

    Only quotes make cutting necessary; without it a large file is read much faster.
    """
    number = 0
    for text in lines:
        number += 1
        if '"' in text:
            part = [text]  # and the lines that the quotes run on to
            for last, record in islice(_records(chain(part, _noted(lines, part)), separator, number - 1), 1):
                number = last
                yield last, len(record), "".join(part)
        elif (fields := text.count(separator) + 1) > 1 or text.strip(" \r\n"):
            yield number, fields, text


def _noted(lines: Iterator[str], part: list[str]) -> Iterator[str]:
    for line in lines:
        part.append(line)
        yield line


def _sample(lines: Iterator[str], separator: str, where: str) -> tuple[list[str], list[int], io.BytesIO, int]:
    """The header; the number of each row that is kept; header and these rows as clean CSV; and how many rows there are.

    Every row is kept while all fit. Whenever they no longer do, each of those kept is given up with a chance of one
    half, and from there on rows come in at half the rate. So every row of the file has the same chance, and between
    half and all of what fits is kept.
    """
    rng, rate, total, size = random.Random(0), 1.0, 0, 0
    rows = _skimmed(lines, separator)
    first = next(rows)[2]
    header = next(_records([first], separator))[1]
    most = max(limits.MOST_CELLS // len(header), 1)
    if most < limits.FEWEST_ROWS:
        raise BadInput(
            f"{where}: {len(header):,} columns, so that only {most} rows would be read (no more than "
            f"{limits.MOST_CELLS:,} cells are); leave columns out of the file"
        )
    kept: list[tuple[int, str]] = []
    for line, fields, text in rows:
        if fields != len(header):
            raise BadInput(
                f"{where}, line {line}: {count(fields, 'field')} where the header has {len(header)}, with "
                f"{quote(separator)} between them; mend that line"
            )
        if rate == 1 or rng.random() < rate:
            kept.append((total, text))
            size += len(text)
            while len(kept) > most or size > limits.MOST_BYTES:
                rate /= 2
                kept = [row for row in kept if rng.random() < 0.5]
                size = sum(len(text) for _, text in kept)
        total += 1
    clean = io.BytesIO()
    file = io.TextIOWrapper(clean, encoding="utf-8", newline="")
    writer = csv.writer(file, lineterminator="\r\n")  # which quotes fields that hold one of the two
    writer.writerows(record for _, record in _records(chain([first], (text for _, text in kept)), separator))
    file.detach()
    return header, [number for number, _ in kept], clean, total


def _parse(
    cut: _Cut, kinds: dict[str, type] | type, *, decimal: str = ".", missing: Collection[str] = limits.MISSING
) -> pd.DataFrame:
    """Types, by pandas, of fields that are cut already: on odd line ends and quotes it may cut them otherwise."""
    cut.clean.seek(0)
    frame = pd.read_csv(
        cut.clean,
        decimal=decimal,
        dtype=kinds,
        index_col=False,
        keep_default_na=False,
        na_values=list(missing),
        low_memory=False,
    )
    return frame.set_axis(cut.names, axis=1)


def _comma_decimals(text: pd.Series) -> bool:
    if not is_text(text) or text.isna().all():
        return False
    return text.dropna().astype(str).str.fullmatch(COMMA).mean() >= limits.NUMERIC
