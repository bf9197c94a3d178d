"""Refusals in plain words: each raises a ValueError that names the argument, what it got and what it takes.

Only shapes, dtypes and Python numbers are looked at. Tensor values are not, since a data-dependent check
breaks `vmap`, `torch.compile` and the meta device and costs a synchronisation on CUDA.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """A finite real number, or a floating-point tensor whose values are left alone, within the given range."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if not (above < value < below and at_least <= value <= at_most):
        bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")


def whole(name: str, value: Any, *, at_least: int = 0, at_most: int | None = None) -> None:
    """A Python integer within the given range, ends included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if value < at_least or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and <= {at_most}"
        raise ValueError(f"{name}: expected a whole number >= {at_least}{upper}, got {value!r}")


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """One of a fixed set of values."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def floating(name: str, tensor: Any, *, dims: int | None = None, at_least_dims: int = 0) -> None:
    """A floating-point tensor, with exactly `dims` or at least `at_least_dims` dimensions."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if (dims is not None and tensor.ndim != dims) or tensor.ndim < at_least_dims:
        wanted = f"{dims}" if dims is not None else f"at least {at_least_dims}"
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(tensor.shape)}")


def integers(name: str, tensor: Any, *, shape: tuple[int, ...] | None = None) -> None:
    """An int64 tensor, of exactly `shape` where it is given."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not torch.int64:
        raise ValueError(f"{name}: expected an int64 tensor, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def same_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """A floating-point tensor of exactly `shape`."""
    floating(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def classes(input: Any, target: Any) -> None:
    """Logits (*batch, classes) with class numbers (*batch), the arguments of every loss on classes."""
    floating("input", input, at_least_dims=1)
    if input.shape[-1] < 2:
        raise ValueError(f"input: expected at least two classes in the last dimension, got shape {tuple(input.shape)}")
    integers("target", target, shape=input.shape[:-1])
