"""Your data: load it, profile it, try the parts that claim to help, and confirm one of them on locked rows.

    from lossary.compare import compare
    found = compare("my.csv", target="y")
    print(found.sentence)

A quarter of the rows is locked before anything is looked at. On the rest the data are profiled, and good conventional
models and the parts of the catalogue that fit are tuned alike and scored on the same cells. Then the best part meets
the best conventional arm once, on the locked rows; the final sentence says what that one interval says, and no more.

The files in the order in which they work: `load`, `problem`, `profile`, `metrics`, `arms`, `search` (which finishes
`cells` by `encode`, `training` and `boosting`, and keeps them in `store`), `statistics`, `confirm`, `brought`,
`result`, `model`, `winner`, `report`; `run` calls them.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("compare", "estimate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lossary.compare import run

    return getattr(run, name)
