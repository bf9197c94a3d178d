"""Measures: `m(...) -> number or curve`, a figure of merit computed from predictions."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from lossary.roles._battery import SHARED, Case, Role, demand, same, tensor_hyper, tensors
from lossary.roles._mark import Mark, mark

P = TypeVar("P")


def measure(
    *,
    known: tuple[dict[str, Any], ...],
    order_free: bool = True,
    within: tuple[float, float] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a measure.

    Args:
        known: worked cases, at least one, each {"inputs": {argument: nested list}, "hyper": {...}, "value": ...}
            with "hyper" where needed. Lists become tensors with one entry a sample; the other checks feed on them.
        order_free: whether shuffling the samples, alike in all inputs of one length, leaves the value as it is.
        within: the range of the value, ends included.
        xfail: check -> reason, for failures that are meant.

    Raises:
        ValueError: no worked case.
    """
    if not known:
        raise ValueError("known: expected at least one worked case, got none")
    return mark("measure", examples=known, tune=None, xfail=xfail, order_free=order_free, within=within)


class MeasureCase(Case):
    """Feeds a measure one of its worked cases."""

    def __init__(self, part: Any, mark: Mark, known: Mapping[str, Any]) -> None:
        super().__init__(part, mark, known.get("hyper", {}))
        self.known = known

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        given = {name: torch.tensor(value) for name, value in self.known["inputs"].items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        for name, value in good.items():
            yield name, {**good, name: value[0]}
            if value.is_floating_point():
                yield name, {**good, name: value.long()}


def known_value(case: MeasureCase) -> None:
    """The worked case comes out."""
    got = case.call(case.inputs())
    demand(tensors(got), f"expected a tensor, got {type(got).__name__}")
    expected = torch.tensor(case.known["value"], dtype=torch.float64)
    found = tensors(got)[0].double()
    demand(
        found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-6, atol=1e-9),
        f"expected {case.known['value']}, got {found.tolist()}",
    )


def shuffles(case: MeasureCase) -> None:
    """The order of the samples does not matter."""
    if not case.mark.options["order_free"]:
        return
    inputs = case.inputs()
    shuffled = {name: value.flip(0) for name, value in inputs.items()}
    demand(same(case.call(shuffled), case.call(inputs), rtol=1e-9, atol=1e-12), "depends on the order of the samples")


def in_range(case: MeasureCase) -> None:
    """The value lies in its declared range."""
    if case.mark.options["within"] is None:
        return
    low, high = case.mark.options["within"]
    for value in tensors(case.call(case.inputs())):
        demand(bool(((value >= low) & (value <= high)).all()), f"{value.tolist()} is not within {low:g} to {high:g}")


ROLE = Role(
    name="measure",
    protocol="m(...) -> number or curve",
    case=MeasureCase,
    checks=(known_value, shuffles, in_range, *(check for check in SHARED if check is not tensor_hyper)),
)
