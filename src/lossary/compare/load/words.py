"""Values, names and numbers as messages show them."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from lossary.errors import BadInput


def quote(value: object) -> str:
    """The value in quotes, on one line, cut short where it is long."""
    text = repr(value) if isinstance(value, str) else repr(str(value))
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


def listed(names: Iterable[object], most: int = 12) -> str:
    """'a', 'b' and 3 more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quote, names[:most])) + more


def count(number: int, noun: str) -> str:
    """1 class, 2 classes."""
    plural = {"class": "classes", "entry": "entries", "copy": "copies"}.get(noun, noun + "s")
    return f"{number:,} {noun if number == 1 else plural}"


def suggest(name: str, known: Collection[str], *, listing: bool = True) -> str:
    """What may have been meant, or what there is."""
    lower = {item.casefold(): item for item in known}
    close = get_close_matches(name.casefold(), lower, n=1)
    meant = f"; did you mean {quote(lower[close[0]])}?" if close else ""
    return meant or (f"; there is {listed(known)}" if listing else "")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def brief(error: BaseException) -> str:
    """What an error says, on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:159]}…"


@contextmanager
def reading(where: str, kind: str, remedy: str = "it may be damaged: write it anew") -> Iterator[None]:
    """Whatever a decoder raises within is the file's fault: a damaged one leads decoders to errors of any kind.

    Raises:
        BadInput: instead of that error.
    """
    try:
        yield
    except (BadInput, ImportError):
        raise
    except Exception as error:
        raise BadInput(f"{where} cannot be read as {kind} ({brief(error)}); {remedy}") from None


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """An import of a package that only some sources need.

    Raises:
        BadInput: it is not installed.
    """
    try:
        yield
    except ImportError:
        raise BadInput(f"{what} is read by a package that is missing: pip install {package}") from None
