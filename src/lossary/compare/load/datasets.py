"""Data frames and torch datasets in memory, and Hugging Face datasets saved to disk."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossary.compare.load import limits
from lossary.compare.load.arrays import of_arrays
from lossary.compare.load.arrow import sample, series, stream
from lossary.compare.load.images import Form, pixels
from lossary.compare.load.table import Table, capacity, drawn, in_part, table, typed
from lossary.compare.load.words import brief, listed, needs, quote, reading
from lossary.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa


def of_frame(frame: pd.DataFrame) -> Table:
    """A pandas data frame; its index is left out."""
    rows = drawn(len(frame), capacity(len(frame.columns), limits.MOST_CELLS, "the data frame"))
    chosen = frame if len(rows) == len(frame) else frame.iloc[rows]
    columns = typed(
        [(name, chosen.iloc[:, place]) for place, name in enumerate(chosen.columns)], len(rows), "the data frame"
    )
    return table("data", "data frame", **columns, rows=rows, total=len(frame), notes=in_part(len(rows), len(frame)))


# torch.utils.data

Item = tuple[NDArray[Any], Any]


def is_torch(source: Any) -> bool:
    """Whether it is a dataset of torch's; without torch there is none."""
    torch = sys.modules.get("torch.utils.data")
    return torch is not None and isinstance(source, torch.Dataset)


def of_torch(source: Any) -> Table:
    """A `torch.utils.data.Dataset` of items (features, target). Whole-number targets are classes."""
    where = f"the dataset {type(source).__name__}"
    try:
        total = len(source)
    except TypeError:  # an IterableDataset
        total = None
    if total == 0:
        raise BadInput(f"{where} is empty; it needs items")
    items = _stream(source, where) if total is None else _chosen(source, np.arange(1), where)
    first = next(items, None)
    if first is None:
        raise BadInput(f"{where} is empty; it needs items")
    most = capacity(first[0].size, limits.MOST_CELLS if first[0].ndim < 2 else limits.MOST_NUMBERS, where)
    notes: list[str] = []
    if total is None:
        found = list(islice(chain([first], items), most))
        rows, total = np.arange(len(found)), len(found)
        if next(items, None) is not None:
            notes.append(f"Read the first {most:,} items; the dataset goes on.")
    else:
        rows = drawn(total, most)
        found = list(_chosen(source, rows, where))
    for place, (x, y) in zip(rows, found):
        if x.shape != first[0].shape or np.shape(y) != np.shape(first[1]):
            raise BadInput(
                f"{where}: item {place} has the shapes {x.shape} and {np.shape(y)} where the first has "
                f"{first[0].shape} and {np.shape(first[1])}; give it a transform that makes all the same"
            )
    x, y = np.stack([x for x, _ in found]), np.array([y for _, y in found])
    codes = y.ndim == 1 and y.dtype.kind in "biu"
    names = getattr(source, "classes", None)
    if codes and isinstance(names, list | tuple) and y.min() >= 0 and y.max() < len(names):
        y = np.array([str(name) for name in names], dtype=object)[y.astype(int)]
    made = of_arrays(type(source).__name__, where, {"x": x, "y": y}, "y", rows=rows, total=total, notes=tuple(notes))
    return replace(made, labels=frozenset(("y",) if codes else ()))


def _chosen(source: Any, rows: NDArray[np.int64], where: str) -> Iterator[Item]:
    for row in rows.tolist():
        try:
            item = source[row]
        except Exception as error:  # the caller's own code
            raise BadInput(f"{where}: item {row} raises {type(error).__name__}: {brief(error)}") from None
        yield _item(item, row, where)


def _stream(source: Any, where: str) -> Iterator[Item]:
    try:
        for place, item in enumerate(source):
            yield _item(item, place, where)
    except BadInput:
        raise
    except Exception as error:  # the caller's own code
        raise BadInput(f"{where}: iterating raises {type(error).__name__}: {brief(error)}") from None


def _item(item: Any, row: int, where: str) -> Item:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise BadInput(f"{where}: item {row} is {type(item).__name__}, where a pair (features, target) is needed")
    x, y = (value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value) for value in item)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufU":
        raise BadInput(f"{where}: item {row} holds {x.dtype} and {y.dtype}; numbers, and a number or name, are needed")
    return np.atleast_1d(x), y[0] if y.shape == (1,) else y[()]


# Hugging Face


def is_saved(path: Path) -> bool:
    """Whether it is a folder that `save_to_disk` wrote, of a Dataset or a DatasetDict."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(path: Path, *, target: str | None = None) -> Table:
    """A folder that `save_to_disk` wrote; of several splits "train", with "test" as its test.

    Without a target the only column of class labels is it.
    """
    where, forms = repr(str(path)), {}
    splits, first = [], ""
    if (path / "dataset_dict.json").is_file():
        with reading(where, "a saved dataset"):
            splits = [str(name) for name in _json(path / "dataset_dict.json")["splits"]]
        first = splits[0] if len(splits) == 1 else "train"
        if first not in splits:
            raise BadInput(f"{where} has the splits {listed(splits)}; name the folder of one of them")
    made = _split(path / first, path, forms)
    notes = [*made.notes]
    if target is None and made.target is not None:
        notes.append(f"The target is {quote(made.target)}, the only column of class labels.")
    unused = [name for name in splits if name not in (first, "test")]
    if unused:
        notes.append(f"Splits left out: {listed(unused)}.")
    test = _split(path / "test", path, forms) if "test" in splits and first == "train" else None
    return replace(made, notes=tuple(notes), test=test)


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _split(path: Path, top: Path, forms: dict[str, Form]) -> Table:
    """The rows of one split: Arrow streams, and what their columns mean in JSON beside them.

    `forms` of images are those of the split that is read first.
    """
    where, kind = repr(str(path)), "a saved dataset"
    with needs("pyarrow", where), reading(where, kind):
        files = [path / item["filename"] for item in _json(path / "state.json")["_data_files"]]
        features = _json(path / "dataset_info.json")["features"]
        schema = stream(files[0]).schema
        if set(features) != set(schema.names):
            raise ValueError("dataset_info.json names other columns than the data")
        seen = any(_type(feature) == "Image" for feature in features.values())
        most = capacity(3 * limits.SIDE**2, limits.MOST_NUMBERS, where) if seen else None
        batches = (batch for file in files for batch in stream(file))
        found, rows, total = sample(batches, schema, where, most)
        made = {column: _meant(found, column, feature, where, forms) for column, feature in features.items()}
        made = {column: values for column, values in made.items() if values is not None}
        columns = typed(series(found, made), len(rows), where)
    labels = [column for column, feature in features.items() if _type(feature) == "ClassLabel"]
    return table(
        top.name, str(top), **columns, rows=rows, total=total, labels=frozenset(labels),
        target=labels[0] if len(labels) == 1 else None, notes=in_part(len(rows), total),
    )  # fmt: skip


def _type(feature: Any) -> str:
    return str(feature.get("_type")) if isinstance(feature, Mapping) else ""


def _meant(found: "pa.Table", column: str, feature: Any, where: str, forms: dict[str, Form]) -> Any:
    """The values of a column whose type says more than Arrow's: names of classes, or images."""
    if found[column].type.num_fields == 0 and _type(feature) not in ("Value", "ClassLabel"):
        raise ValueError(f"column {column!r} is of an unknown type {_type(feature)!r}")
    of_list = feature.get("feature") if isinstance(feature, Mapping) else None
    inner = feature[0] if isinstance(feature, list) and feature else of_list
    if _type(feature) == "ClassLabel":
        codes = found[column].to_pylist()
        return pd.Series([code if code is None else _name(code, feature["names"]) for code in codes], dtype=object)
    if _type(inner) == "ClassLabel":
        rows = found[column].to_pylist()
        return pd.Series([row if row is None else [_name(code, inner["names"]) for code in row] for row in rows])
    if _type(feature) == "Image":
        images = found[column].to_pylist()
        missing = next((place for place, image in enumerate(images) if image is None), None)
        if missing is not None:
            return f"it has no image in row {missing + 1}"
        files = [Path(image["path"]) if image["bytes"] is None else image["bytes"] for image in images]
        names = [f"{where}: the image {quote(column)} in row {place + 1}" for place in range(len(files))]
        values, forms[column] = pixels(files, names, forms.get(column))
        return values
    return None


def _name(code: int, names: list[str]) -> str | None:
    """The name of a class; -1 stands for an unknown one."""
    if not -1 <= code < len(names):
        raise ValueError(f"class number {code} where there are {len(names)} names")
    return None if code == -1 else str(names[code])
