"""Images: a folder with a sub-folder for each class, or encoded bytes in a column of another source."""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lossary.compare.load import limits
from lossary.compare.load.table import Floats, Table, capacity, drawn, in_part, table
from lossary.compare.load.words import brief, listed, needs
from lossary.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

HELD_OUT = ("val", "valid", "validation")


def is_folder(path: Path) -> bool:
    """Whether there are sub-folders."""
    return bool(_folders(path))


def read(path: Path) -> Table:
    """Every image in a sub-folder, of the class that the sub-folder is called.

    Where the only sub-folders are train and test, perhaps with a validation set, the classes are theirs.
    """
    folders = _folders(path)
    if {"train"} <= set(folders) <= {"train", "test", *HELD_OUT} and _folders(folders["train"]):
        made, form = _read(path, _folders(folders["train"]))
        if "test" in folders:
            made = replace(made, test=_read(path, _folders(folders["test"]), form)[0])
        unused = [name for name in folders if name in HELD_OUT]
        return replace(made, notes=(*made.notes, f"Left out: the folder {listed(unused)}.")) if unused else made
    return _read(path, folders)[0]


def read_bare(path: Path, form: "Form") -> Table:
    """Every image in a folder and what is below it, whatever its class, in a form that is known."""
    return _read(path, {"": path}, form)[0]


def _folders(path: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] != "."}


def _read(top: Path, folders: dict[str, Path], form: "Form | None" = None) -> "tuple[Table, Form]":
    where = repr(str(top))
    with needs("pillow", where):
        from PIL import Image
    known, files, others, empty = Image.registered_extensions(), [], [], []
    for name, folder in folders.items():
        before = len(files)
        for place, below, found in os.walk(folder):
            below.sort()
            for file in sorted(found):
                if Path(file).suffix.lower() in known and not file.startswith("."):
                    files.append((name, Path(place) / file))
                elif not file.startswith(".") and file not in ("Thumbs.db", "desktop.ini"):
                    others.append(str((Path(place) / file).relative_to(top)))
        if len(files) == before:
            empty.append(name)
    if not files:
        raise BadInput(f"{where}: no images in its sub-folders; put those of each class into one of its own")
    rows = drawn(len(files), capacity(3 * limits.SIDE**2, limits.MOST_NUMBERS, where))
    chosen = [files[row] for row in rows]
    values, form = pixels([file for _, file in chosen], [repr(str(file)) for _, file in chosen], form)
    channels, height, width = values.shape[1:]
    notes = [f"{len(rows):,} images, read as {'colour' if channels == 3 else 'grey'}, {height} x {width} pixels."]
    notes += [f"Folders without images: {listed(empty)}."] if empty else []
    notes += [f"Files that are no images, left out: {listed(others, 5)}."] if others else []
    frame = pd.DataFrame({"class": [name for name, _ in chosen], "file": [str(f.relative_to(top)) for _, f in chosen]})
    made = table(
        top.name or str(top), str(top), frame, rows=rows, total=len(files), dense={"pixel": values}, target="class",
        id="file", labels=frozenset(("class",)), notes=(*notes, *in_part(len(rows), len(files), "images")),
    )  # fmt: skip
    return made, form


Form = tuple[bool, int, int]  # whether in colour, height, width


def pixels(files: Sequence[Path | bytes], names: Sequence[str], form: Form | None = None) -> tuple[Floats, Form]:
    """(images, channels, height, width) from 0 to 1, all in one form.

    They are in colour if one of them is. Where no form is given it is their median height and width, made smaller
    where one of them is beyond `limits.SIDE`.

    Raises:
        BadInput: one of them is unreadable.
    """
    with needs("pillow", f"what is in {names[0]}"):
        import PIL.Image  # noqa: F401
    if form is None:
        seen = [_open(file, name, _form) for file, name in zip(files, names)]
        height, width = np.median([size for _, *size in seen], axis=0)
        scale = min(1.0, limits.SIDE / max(width, height))
        form = (any(colour for colour, *_ in seen), max(1, round(height * scale)), max(1, round(width * scale)))
    return np.stack([_open(file, name, lambda image: _values(image, form)) for file, name in zip(files, names)]), form


def _open(file: Path | bytes, name: str, use: Any) -> Any:
    """What `use` makes of the opened image."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return use(image)
    except Exception as error:  # a damaged file leads the decoder to errors of any kind
        raise BadInput(f"{name} cannot be read as an image ({brief(error)}); mend or remove it") from None


def _form(image: "Image") -> Form:
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    turned = image.getexif().get(0x0112, 1) >= 5  # a camera held upright
    return (not grey, *(image.size if turned else image.size[::-1]))


def _values(image: "Image", form: Form) -> Floats:
    from PIL import Image, ImageOps

    colour, height, width = form
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits a pixel, which a conversion would cut off at 255
        image = Image.fromarray(np.asarray(image, dtype=np.float32) / 257)
        grey = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        values = np.repeat(grey[None], 3, axis=0) if colour else grey[None]
    else:
        mode = "RGB" if colour else "L"
        image.draft(mode, (width, height))  # a large JPEG file is decoded no finer than needed
        small = ImageOps.exif_transpose(image).convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        values = np.asarray(small, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1)
    return values / np.float32(255)
