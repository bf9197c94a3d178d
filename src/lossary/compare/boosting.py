"""Gradient boosting by LightGBM, plainly or with losses and weightings of the catalogue in the place of its own.

A loss gives boosting its gradient and the diagonal of its Hessian by automatic differentiation, at the raw scores; a
weighting then scales both, anew in every round. Steps divide by the curvature, which may be negative where a loss is
not convex. For classes it is therefore at least s (1 - s), what cross-entropy has at a slope of that size s, and at
least s / 20; for a real target, standardised, at least 1/2, a quarter of the squared error's.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightgbm import Booster, LGBMClassifier, LGBMRegressor
from numpy.typing import NDArray
from torch import Tensor

from lossary.compare.training import (
    Fitted,
    Fold,
    choices,
    class_weights,
    part_of,
    stacked_loss,
    stacked_weighting,
    standard,
    values,
)
from lossary.tasks import Seeds
from lossary.vocabulary import asked

# Beside them LightGBM's defaults; one thread, and the same trees every time.
FIXED = {"n_jobs": 1, "random_state": 0, "deterministic": True, "force_row_wise": True, "verbosity": -1}
GRID = ("learning_rate", "num_leaves", "n_estimators")
LEAST = 1e-6  # curvature in any case


def boosting(setting: Mapping[str, Any], fold: Fold) -> Fitted:
    """Trees on the fold's training rows.

    Raises:
        ValueError: a part refuses its hyper-parameters or the data.
    """
    options = {name: setting[name] for name in GRID} | FIXED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a custom objective's raw scores
        if setting.get("parts"):
            return Fitted(_with_parts(setting, fold, options))
        if not fold.classes:
            model = LGBMRegressor(objective={"squared": "l2", "absolute": "l1"}[setting["error"]], **options)
            return Fitted(partial(values, model.fit(fold.x, fold.y, sample_weight=fold.weight)))

        def make(fold: Fold) -> LGBMClassifier:
            model = LGBMClassifier(class_weight=setting["class_weight"], **options)
            return model.fit(fold.x, fold.y, sample_weight=fold.weight)

        return Fitted(choices(make, fold))


def _with_parts(
    setting: Mapping[str, Any], fold: Fold, options: dict[str, Any]
) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    objective = Objective(setting, fold)
    if not fold.classes:
        centre, scale = standard(fold)
        model = LGBMRegressor(objective=objective, **options).fit(fold.x, (fold.y - centre) / scale)
        return partial(_scaled, model.booster_, centre, scale)
    start = np.log(np.maximum(fold.counts, 1) / len(fold.y))
    if fold.classes == 2:
        start = start[1] - start[0]
    model = LGBMClassifier(objective=objective, **options)
    model.fit(fold.x, fold.y, init_score=np.broadcast_to(start, (len(fold.y), *np.shape(start))))
    return partial(_log_softmax, model.booster_, start)


def _scaled(trees: Booster, centre: float, scale: float, rows: NDArray[np.float32]) -> NDArray[Any]:
    return trees.predict(rows)[None] * scale + centre


def _log_softmax(trees: Booster, start: NDArray[Any], rows: NDArray[np.float32]) -> NDArray[Any]:
    raw = torch.from_numpy(np.asarray(trees.predict(rows, raw_score=True) + start))
    return logits(raw).log_softmax(-1).numpy()[None]


def logits(raw: Tensor) -> Tensor:
    """(n, classes) of raw scores; of two classes LightGBM keeps only what the second is ahead."""
    return torch.stack([torch.zeros_like(raw), raw], -1) if raw.ndim == 1 else raw


class Objective:
    """What LightGBM asks for in every round: gradient and Hessian of the setting's loss at the raw scores.

    Args:
        setting: its `parts` are at most a loss and a weighting; without a loss it is the plain one.
        fold: the rows, all of which are one batch.
    """

    def __init__(self, setting: Mapping[str, Any], fold: Fold) -> None:
        self.classes = fold.classes
        y = fold.y
        if not fold.classes:
            centre, scale = standard(fold)
            y = (y - centre) / scale
        self.target = torch.from_numpy(np.asarray(y))
        self.group = None if fold.group is None else torch.from_numpy(fold.group)[None]
        self.loss: Any = self._plain
        self.weighting, seeds = None, Seeds((0,))
        for entry in setting["parts"]:
            part = part_of(entry)
            if entry["role"] == "loss":
                self.loss = stacked_loss(part, entry["hyper"], fold, seeds, batch=len(fold.y))
            else:
                self.weighting = stacked_weighting(
                    part, entry["role"], entry["hyper"], fold, seeds, epochs=setting["n_estimators"]
                )
        case = np.ones(len(y)) if fold.weight is None else fold.weight
        if fold.classes and setting["class_weight"] == "balanced":
            case = case * class_weights(fold)[fold.y]
        self.case = torch.from_numpy(case)

    def __call__(self, true: NDArray[Any], scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(gradient, Hessian), each of the scores' shape: (n,), or (n, classes) of more than two classes."""
        raw = torch.from_numpy(np.asarray(scores, dtype=np.float64)).requires_grad_()
        output = (logits(raw) if self.classes else raw.unsqueeze(-1))[None]
        values = self.loss(output, self.target[None])[0]
        (slope,) = torch.autograd.grad(values.sum(), raw, create_graph=True)
        if not slope.requires_grad:
            curve = torch.zeros_like(slope)  # straight everywhere, as an absolute error is
        elif raw.ndim == 1:
            (curve,) = torch.autograd.grad(slope.sum(), raw)
        else:
            columns = [
                torch.autograd.grad(slope[:, k].sum(), raw, retain_graph=True)[0][:, k] for k in range(raw.shape[1])
            ]
            curve = torch.stack(columns, 1)
        weight = self.case
        if self.weighting is not None:
            offered = {"target": self.target[None], "group": self.group, "index": torch.arange(len(raw))[None]}
            weight = weight * self.weighting(values.detach()[None], **asked(self.weighting[0], offered))[0]
        weight = weight.reshape(-1, *(1,) * (raw.ndim - 1))
        size = slope.detach().abs()
        floor = torch.maximum(size * (1 - size), size / 20) if self.classes else torch.full_like(size, 0.5)
        curve = torch.maximum(curve.detach(), floor)
        return (weight * slope.detach()).numpy(), (weight * curve).clamp_min(LEAST).numpy()

    def _plain(self, output: Tensor, target: Tensor) -> Tensor:
        if self.classes:
            return F.cross_entropy(output[0], target[0], reduction="none")[None]
        return (output.squeeze(-1) - target) ** 2
