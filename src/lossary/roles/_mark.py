"""The mark that a role's decorator leaves on a part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F")


@dataclass(frozen=True)
class Mark:
    """What a decorator was told.

    Attributes:
        role: name of the role.
        examples: hyper-parameters with which the battery tries the part, one dict an example.
        tune: grid that `compare` may draw from, hyper-parameter -> values.
        xfail: check -> reason, for failures that are known and meant. Strict: the check must then fail.
        options: what this role alone asks for.
    """

    role: str
    examples: tuple[dict[str, Any], ...] = ({},)
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def mark(
    role: str,
    *,
    examples: tuple[dict[str, Any], ...],
    tune: Mapping[str, tuple[Any, ...]] | None,
    xfail: Mapping[str, str] | None,
    **options: Any,
) -> Callable[[F], F]:
    """A decorator that returns the same object with a `Mark` on it."""
    made = Mark(role, examples, tune or {}, xfail or {}, options)

    def leave(part: F) -> F:
        part.__lossary__ = made  # type: ignore[attr-defined]
        return part

    return leave


def mark_of(part: object) -> Mark | None:
    """The mark on this very object. Attributes are inherited, marks are not."""
    found = getattr(part, "__dict__", {}).get("__lossary__")
    return found if isinstance(found, Mark) else None
