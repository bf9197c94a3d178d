"""Scores: `fit(features, labels)`, then `anomaly_score(x) -> (N,)`, higher meaning more unusual."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lossary.roles._battery import (
    Role,
    bfloat16_finite,
    demand,
    documented,
    dtype_follows,
    dtypes_agree,
    quick,
    refuses_hyper,
    refuses_inputs,
    repeatable,
    same,
    unmutated,
)
from lossary.roles._fitted import FITTED, FittedCase
from lossary.roles._mark import mark

P = TypeVar("P")

TRAIN, TEST, WIDTH, CLASSES = 48, 6, 5, 3


def score(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a score: a class with scikit-learn's manners that takes arrays or tensors and answers in kind.

    `fit(features, labels)` learns what is usual from features (N, D) and class numbers (N,);
    `anomaly_score(x)` rates rows (M, D), higher meaning more unusual; `score_samples(x)` is its negative.

    Args:
        examples: hyper-parameters for the battery.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("score", examples=examples, tune=tune, xfail=xfail)


class ScoreCase(FittedCase):
    """Fits on three round clusters in a plane and asks about rows from among them."""

    learns_from = ("features", "labels")
    asked_about = "x"
    method = "anomaly_score"

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(TRAIN + TEST) % CLASSES
        centres = torch.tensor([[4.0, 0.0], [-2.0, 3.0], [-2.0, -3.0]])[labels]
        rows = torch.randn(TRAIN + TEST, WIDTH, generator=g, dtype=torch.float64) / 2
        rows[:, :2] += centres
        return {"features": rows[:TRAIN].to(dtype), "labels": labels[:TRAIN], "x": rows[TRAIN:].to(dtype)}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        good = self.inputs()
        yield "features", {**good, "features": good["features"][0]}
        yield "labels", {**good, "labels": good["labels"][:-1]}
        yield "labels", {**good, "labels": good["labels"] + 0.5}
        yield "x", {**good, "x": good["x"][:, :-1]}


def rates_rows(case: ScoreCase) -> None:
    """One finite value a row."""
    inputs = case.inputs()
    got = case.call(inputs)
    demand(
        isinstance(got, Tensor) and got.shape == inputs["x"].shape[:1],
        f"expected shape ({TEST},), got {tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__}",
    )
    demand(got.isfinite().all(), "a row from among the training data got a value that is not finite")


def far_is_unusual(case: ScoreCase) -> None:
    """Rows far off the training data score higher than those among it."""
    inputs = case.inputs()
    part = case.learn(inputs)
    off = inputs["x"].clone()
    off[:, 2:] += 40.0  # out of the plane of the clusters, where no class is near
    near, far = case.ask(part, inputs), case.ask(part, {"x": off})
    demand(far.min() > near.max(), f"far rows score from {far.min():.4g}, rows among the data to {near.max():.4g}")


def negated(case: ScoreCase) -> None:
    """score_samples is the negative, as scikit-learn's outlier detectors have it."""
    inputs = case.inputs()
    part = case.learn(inputs)
    demand(hasattr(part, "score_samples"), "has no score_samples")
    demand(same(part.score_samples(inputs["x"]), -case.ask(part, inputs)), "score_samples is not -anomaly_score")


def numpy_agrees(case: ScoreCase) -> None:
    """Arrays give an array with the values that tensors give."""
    inputs = case.inputs()
    got = case.call({name: value.numpy() for name, value in inputs.items()})
    demand(isinstance(got, np.ndarray), f"arrays gave a {type(got).__name__}")
    demand(same(torch.from_numpy(got), case.call(inputs), rtol=1e-9, atol=1e-12), "arrays and tensors disagree")


def refuses_values(case: ScoreCase) -> None:
    """NaN raises a ValueError that names the argument."""
    for name in ("features", "x"):
        inputs = case.inputs()
        inputs[name][0, 0] = torch.nan
        try:
            case.call(inputs)
        except ValueError as error:
            demand(name in str(error), f"a NaN in {name} is refused without naming it: {error}")
        else:
            demand(False, f"a NaN in {name} was accepted in silence")


ROLE = Role(
    name="score",
    protocol="fit(features, labels), anomaly_score(x) -> (N,), higher = more unusual",
    case=ScoreCase,
    checks=(
        rates_rows,
        far_is_unusual,
        negated,
        numpy_agrees,
        *FITTED,
        quick,
        unmutated,
        repeatable,
        dtypes_agree,
        bfloat16_finite,
        dtype_follows,
        refuses_inputs,
        refuses_values,
        refuses_hyper,
        documented,
    ),
)
