"""Seeds: where all randomness of a run comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from torch import Generator

_TUNING = 10_000  # tuning seeds are numbered from here; reported ones are 0 to 39


@dataclass(frozen=True)
class Seeds:
    """The seeds of a run, S of them, each with named streams of random numbers.

    A stream depends on the seed's id and the stream's name alone: not on the seeds beside it, nor on what
    other streams were drawn. Asking twice gives the same stream from its beginning, so two arms of a claim
    that ask for the same name are paired.

    Attributes:
        ids: distinct whole numbers >= 0.
        smoke: whether this is a tiny run that only shows that the code works.

    Raises:
        ValueError: `ids` empty, negative or repeated.
    """

    ids: tuple[int, ...]
    smoke: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        if not self.ids or min(self.ids) < 0 or len(set(self.ids)) < len(self.ids):
            raise ValueError(f"ids: expected distinct whole numbers >= 0, at least one, got {self.ids}")

    def __len__(self) -> int:
        return len(self.ids)

    def torch(self, stream: str) -> list[Generator]:
        """A generator for each seed, on the CPU."""
        return [
            Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
            for sequence in self._sequences(stream)
        ]

    def numpy(self, stream: str) -> list[np.random.Generator]:
        """A generator for each seed."""
        return [np.random.default_rng(sequence) for sequence in self._sequences(stream)]

    def few(self, full: int, *, smoke: int = 8) -> int:
        """`full`, or in a smoke run `smoke`: of steps, rows, scenes and the like."""
        return min(full, smoke) if self.smoke else full

    def tuning(self, n: int) -> "Seeds":
        """`n` seeds for choosing hyper-parameters, none of them among those that are reported."""
        return Seeds(tuple(range(_TUNING, _TUNING + n)), self.smoke)

    def one(self, position: int) -> "Seeds":
        """The seed at a position, 0 to S - 1, alone."""
        return Seeds((self.ids[position],), self.smoke)

    def _sequences(self, stream: str) -> Sequence[np.random.SeedSequence]:
        return [np.random.SeedSequence([id, crc32(stream.encode())]) for id in self.ids]
