"""Files in the user's cache folder. Each may be deleted at any time: that only costs the time to make it again."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def folder() -> Path:
    """Where they lie, whether it exists yet or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")) / "lossary"


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file at `path`, whole or not at all; where it cannot be written, nothing is kept."""
    draft = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        draft.replace(path)
