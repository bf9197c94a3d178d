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
    same,
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
        on: what it learns from: "classes" (features and class numbers), "real" (features and numbers), "sets"
            (scores from 0 to 1 and what is true of them, boolean and of the same shape; it predicts sets) or
            "logits" (a classifier's logits and class numbers; it calibrates, by `predict_proba`).
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


def _logits(g: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(TRAIN + TEST, CLASSES, generator=g, dtype=torch.float64)
    return 3 * logits, torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)  # overconfident, threefold


FIXTURES = {"classes": _classes, "real": _real, "sets": _sets, "logits": _logits}


class EstimatorCase(FittedCase):
    """Feeds an estimator arrays, as scikit-learn does, and takes its answers back as tensors."""

    learns_from = ("X", "y")
    asked_about = "new"

    @property
    def method(self) -> str:
        """What the estimator is asked by."""
        return "predict_proba" if self.mark.options["on"] == "logits" else "predict"

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        x, y = FIXTURES[self.mark.options["on"]](torch.Generator().manual_seed(seed))
        return {"X": x[:TRAIN].to(dtype), "y": y[:TRAIN], "new": x[TRAIN:].to(dtype)}

    def fit(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        return super().fit(part, {name: value.numpy() for name, value in inputs.items()})

    def ask(self, part: Any, inputs: Mapping[str, Any]) -> Any:
        answer = getattr(part, self.method)(inputs["new"].numpy())
        return torch.from_numpy(answer) if isinstance(answer, np.ndarray) else answer

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        spoilt, strange = good["X"].clone(), good["new"].clone()
        spoilt[0, 0] = strange[0, 0] = torch.nan
        yield "a NaN among the rows to learn from", {**good, "X": spoilt}
        yield "a NaN among the rows to predict", {**good, "new": strange}
        yield "one target too few", {**good, "y": good["y"][:-1]}


def predicts_rows(case: EstimatorCase) -> None:
    """The answer is an array with one entry a row."""
    inputs = case.inputs()
    got = case.call(inputs)
    demand(isinstance(got, Tensor), f"{case.method} gave a {type(got).__name__} where an array was expected")
    demand(got.shape[:1] == (TEST,), f"expected {TEST} entries, got shape {tuple(got.shape)}")


def probabilities(case: EstimatorCase) -> None:
    """A calibrator gives probabilities: none negative, one for each class, their sum 1."""
    if case.mark.options["on"] != "logits":
        return
    got = case.call(case.inputs())
    demand(got.shape == (TEST, CLASSES), f"expected shape ({TEST}, {CLASSES}), got {tuple(got.shape)}")
    demand(bool((got >= 0).all()), f"a probability of {got.min():.4g}")
    demand(same(got.sum(1), torch.ones(TEST).to(got), atol=1e-6), "the probabilities of a row do not sum to 1")


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
    if case.mark.options["on"] in ("sets", "logits"):
        return  # its checks feed features and classes, which sets and logits are not
    import warnings

    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(case.build(), on_skip=None, on_fail=None)
    failed = [f"{r['check_name']}: {r['exception']}" for r in results if r["status"] == "failed"]
    demand(not failed, f"{len(failed)} of scikit-learn's {len(results)} checks fail, first " + "".join(failed[:1]))


ROLE = Role(
    name="estimator",
    protocol="fit(X, y), predict(X) -> (N, ...); a calibrator: fit(logits, y), predict_proba(logits) -> (N, C)",
    case=EstimatorCase,
    checks=(
        predicts_rows,
        probabilities,
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
