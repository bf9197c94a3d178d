"""`Criterion`: any loss of the catalogue as a drop-in `nn.Module`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lossary import require
from lossary.vocabulary import asked


class Criterion(nn.Module):
    """A loss with its hyper-parameters, an optional weighting and a reduction, called as criterion(input, target).

    The value is reduce(w * loss(input, target)), where w are the weighting's weights (1 without one). Weights do
    not enter the divisor: the mean is over samples, so that a weighting's own normalisation decides the scale.

    Args:
        loss: a per-sample loss: a function, called with `hyper`, or a class or module.
        weighting: called as weighting(values, target=..., group=..., index=...) with those it accepts; None is 1.
        reduction: "mean", "sum" or "none".
        class_dim: the dimension of `input` that holds the classes; 1 serves (N, C, H, W) without a copy. None for
            losses whose input has the target's shape.
        check: look at the values too and refuse NaN inputs and class numbers out of range. Costs a pass over the
            data and a synchronisation on CUDA.
        **hyper: the loss's hyper-parameters.

    Raises:
        ValueError: an unknown reduction, a hyper-parameter that the loss does not take; with `check`, bad values.

    >>> import torch
    >>> from lossary.losses import poly1_cross_entropy
    >>> criterion = Criterion(poly1_cross_entropy, epsilon=2.0)
    >>> criterion(torch.zeros(3, 2), torch.tensor([0, 1, 1]))  # log 2 + 2 / 2
    tensor(1.6931)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        weighting: Callable[..., Tensor] | None = None,
        reduction: str = "mean",
        class_dim: int | None = -1,
        check: bool = False,
        **hyper: Any,
    ) -> None:
        super().__init__()
        require.one_of("reduction", reduction, ("mean", "sum", "none"))
        _refuse_unknown(loss, hyper)
        self.loss = loss(**hyper) if isinstance(loss, type) else loss
        self.hyper = {} if isinstance(loss, type) else hyper
        self.weighting, self.reduction, self.class_dim, self.check = weighting, reduction, class_dim, check

    def forward(self, input: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        """Apply the loss. `tensors` (index, group, mask, ...) go to the loss and the weighting that name them."""
        if self.class_dim is not None:
            input = input.movedim(self.class_dim, -1)
        if self.check:
            self._check_values(input, target)
        values = self.loss(input, target, **asked(self.loss, tensors), **self.hyper)
        if self.weighting is not None:
            offered = asked(self.weighting, {**tensors, "target": target})
            values = self.weighting(values.detach(), **offered) * values
        return {"mean": values.mean, "sum": values.sum, "none": lambda: values}[self.reduction]()

    def _check_values(self, input: Tensor, target: Tensor) -> None:
        if not bool(torch.isfinite(input).all()):
            raise ValueError("input: contains NaN or infinite values")
        if target.is_floating_point():
            if not bool(torch.isfinite(target).all()):
                raise ValueError("target: contains NaN or infinite values")
        elif self.class_dim is not None and bool(((target < 0) | (target >= input.shape[-1])).any()):
            raise ValueError(
                f"target: expected class numbers from 0 to {input.shape[-1] - 1}, "
                f"got {target.min().item()} to {target.max().item()}"
            )

    def extra_repr(self) -> str:
        hyper = "".join(f", {k}={v!r}" for k, v in self.hyper.items())
        return f"{_name(self.loss)}{hyper}, reduction={self.reduction!r}"


def _refuse_unknown(loss: Any, hyper: dict[str, Any]) -> None:
    parameters = _parameters(loss)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    takes = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for name in hyper:
        if name not in parameters:
            raise ValueError(f"{name}: {_name(loss)} takes {', '.join(takes) or 'no hyper-parameters'}")


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _parameters(call: Any) -> Any:
    return inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
