"""Estimators: scikit-learn's `fit(X, y)` and `predict(X)`, with what was learned under trailing underscores."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lossary.roles._battery import (
    Fault,
    Role,
    demand,
    documented,
    dtypes_agree,
    quick,
    refuses_hyper,
    repeatable,
    unmutated,
)
from lossary.roles._fitted import FITTED, FittedCase
from lossary.roles._mark import mark

P = TypeVar("P")

TRAIN, TEST, WIDTH, CLASSES = 60, 8, 5, 3


def estimator(
    *,
    on: str,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark an estimator: a class that passes for one of scikit-learn's.

    Args:
        on: what it learns from: "classes" (features and class numbers), "real" (features and numbers) or "sets"
            (scores from 0 to 1 and what is true of them, boolean and of the same shape; it predicts sets).
            scikit-learn's own checks run on the first two.
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    if on not in FIXTURES:
        raise ValueError(f"on: expected one of {', '.join(map(repr, FIXTURES))}, got {on!r}")
    return mark("estimator", examples=examples, tune=tune, xfail=xfail, on=on)


def _classes(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.arange(TRAIN + TEST) % CLASSES
    centres = 4 * torch.eye(CLASSES, WIDTH, dtype=torch.float64)
    return centres[y] + torch.randn(len(y), WIDTH, generator=g, dtype=torch.float64), y


def _real(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(TRAIN + TEST, WIDTH, generator=g, dtype=torch.float64)
    return x, x.sum(1) + torch.randn(len(x), generator=g, dtype=torch.float64) / 4


def _sets(g: torch.Generator) -> tuple[Tensor, Tensor]:
    scores = torch.rand(TRAIN + TEST, WIDTH, generator=g, dtype=torch.float64)
    return scores, torch.rand(scores.shape, generator=g, dtype=torch.float64) < scores


FIXTURES = {"classes": _classes, "real": _real, "sets": _sets}


class EstimatorCase(FittedCase):
    """Feeds an estimator arrays, as scikit-learn does, and takes its answers back as tensors."""

    learns_from = ("X", "y")
    asked_about = "new"
    method = "predict"

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        x, y = FIXTURES[self.mark.options["on"]](torch.Generator().manual_seed(seed))
        return {"X": x[:TRAIN].to(dtype), "y": y[:TRAIN], "new": x[TRAIN:].to(dtype)}

    def fit(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        return super().fit(part, {name: value.numpy() for name, value in inputs.items()})

    def ask(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        answer = part.predict(inputs["new"].numpy())
        return torch.from_numpy(answer) if isinstance(answer, np.ndarray) else answer

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        spoilt, strange = good["X"].clone(), good["new"].clone()
        spoilt[0, 0] = strange[0, 0] = torch.nan
        yield "a NaN among the rows to learn from", {**good, "X": spoilt}
        yield "a NaN among the rows to predict", {**good, "new": strange}
        yield "one target too few", {**good, "y": good["y"][:-1]}


def predicts_rows(case: EstimatorCase) -> None:
    """predict gives an array with one entry a row."""
    inputs = case.inputs()
    got = case.call(inputs)
    demand(isinstance(got, Tensor), f"predict gave a {type(got).__name__} where an array was expected")
    demand(got.shape[:1] == (TEST,), f"expected {TEST} entries, got shape {tuple(got.shape)}")


def refuses_rows(case: EstimatorCase) -> None:
    """NaN and a wrong number of rows raise a ValueError."""
    for what, inputs in case.wrong():
        try:
            case.call(inputs)
        except ValueError:
            continue
        except Exception as error:
            raise Fault(f"{what} raised {type(error).__name__} instead of a ValueError") from error
        raise Fault(f"{what} passed in silence")


def conventions(case: EstimatorCase) -> None:
    """scikit-learn's own check_estimator finds nothing (classifiers and regressors)."""
    if case.mark.options["on"] == "sets":
        return  # its checks feed features and classes, which sets are not
    import warnings

    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(case.build(), on_skip=None, on_fail=None)
    failed = [f"{r['check_name']}: {r['exception']}" for r in results if r["status"] == "failed"]
    demand(not failed, f"{len(failed)} of scikit-learn's {len(results)} checks fail, first " + "".join(failed[:1]))


ROLE = Role(
    name="estimator",
    protocol="fit(X, y), predict(X) -> (N, ...)",
    case=EstimatorCase,
    checks=(
        predicts_rows,
        conventions,
        *FITTED,
        quick,
        unmutated,
        repeatable,
        dtypes_agree,
        refuses_rows,
        refuses_hyper,
        documented,
    ),
)
