"""Stub: being written."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lossary.roles._mark import mark

P = TypeVar("P")


def suppressor(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
    **options: Any,
) -> Callable[[P], P]:
    return mark("suppressor", examples=examples, tune=tune, xfail=xfail, **options)
