"""What a comparison has finished, in SQLite: committed cell by cell, so that a killed run loses nothing."""

import io
import json
from collections.abc import Collection, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, create_engine, insert, select
from sqlalchemy.exc import DatabaseError, IntegrityError

from lossary.errors import BadInput

_CELLS = Table(
    "cells",
    MetaData(),
    Column("key", String, primary_key=True),
    Column("arm", String, nullable=False),
    Column("kind", String, nullable=False),  # tune, cell or confirm
    Column("partition", Integer, nullable=False),
    Column("fold", Integer, nullable=False),
    Column("value", String, nullable=False),  # JSON
    Column("predictions", LargeBinary),  # .npz, for confirmation
)


class Store:
    """Finished cells by key. Where no path is given they are kept in memory.

    Raises:
        BadInput: the file is no such store, or cannot be written to.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._engine = create_engine("sqlite://" if path is None else f"sqlite:///{path}")
        try:
            _CELLS.metadata.create_all(self._engine)
        except DatabaseError as error:
            raise BadInput(f"--out: {str(path)!r} cannot be used ({error.orig}); name another folder") from None

    def read(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The values of those keys that are finished."""
        keys, found = list(keys), {}
        with self._engine.connect() as connection:
            for start in range(0, len(keys), 500):  # SQLite takes so many in one question
                rows = select(_CELLS.c.key, _CELLS.c.value).where(_CELLS.c.key.in_(keys[start : start + 500]))
                found |= {key: json.loads(value) for key, value in connection.execute(rows)}
        return found

    def predictions(self, key: str) -> NDArray[np.float64]:
        """Those of a confirmation, float64."""
        with self._engine.connect() as connection:
            packed = connection.execute(select(_CELLS.c.predictions).where(_CELLS.c.key == key)).scalar_one()
        return np.load(io.BytesIO(packed))["predictions"].astype(np.float64)

    def write(
        self,
        key: str,
        *,
        arm: str,
        kind: str,
        partition: int,
        fold: int,
        value: dict[str, Any],
        predictions: NDArray | None = None,
    ) -> None:
        """Commits one finished cell. One that another run on the same store has finished meanwhile stays."""
        packed = None
        if predictions is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, predictions=predictions)
            packed = buffer.getvalue()
        row = {"key": key, "arm": arm, "kind": kind, "partition": partition, "fold": fold}
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(_CELLS).values(**row, value=json.dumps(value), predictions=packed))
        except IntegrityError:
            pass

    def __len__(self) -> int:
        with self._engine.connect() as connection:
            return len(connection.execute(select(_CELLS.c.key)).all())


def digest(parts: Collection[Any]) -> str:
    """SHA-256 of plain values; equal values give equal keys."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
