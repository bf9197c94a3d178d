"""Suppressors: `f(boxes, scores, *, <hyper>)` picks detections, best first; torchvision's shapes.

It returns `keep`, the indices of what remains, or `(keep, scores)` where it changes scores. One that works class by
class takes `idxs` after the scores, as `torchvision.ops.batched_nms` does.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossary.roles._battery import SHARED, Case, Role, demand, same
from lossary.roles._mark import mark

P = TypeVar("P")


def suppressor(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    limits: Mapping[str, dict[str, Any]] | None = None,
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark a suppressor of boxes.

    Args:
        examples: hyper-parameters for the battery.
        limits: {"nms": hyper-parameters} at which it is greedy non-maximum suppression; an `iou_threshold` is
            among them.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("suppressor", examples=examples, tune=tune, xfail=xfail, limits=dict(limits or {}))


class SuppressorCase(Case):
    """Six objects, each detected four times: (24, 4) boxes and scores, with classes where they are asked for."""

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        centre = 60 * torch.rand(6, 1, 2, generator=g, dtype=torch.float64)
        centre = (centre + 4 * torch.randn(6, 4, 2, generator=g, dtype=torch.float64)).flatten(0, 1)
        half = 10 + 5 * torch.rand(24, 2, generator=g, dtype=torch.float64)
        scores = torch.rand(24, generator=g, dtype=torch.float64)
        inputs = {"boxes": torch.cat([centre - half, centre + half], dim=1).to(dtype), "scores": scores.to(dtype)}
        if "idxs" in inspect.signature(self.part).parameters:
            inputs["idxs"] = torch.arange(24) % 2
        return inputs

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        inputs = self.inputs()
        yield "boxes", {**inputs, "boxes": inputs["boxes"].long()}
        yield "boxes", {**inputs, "boxes": inputs["boxes"][:, :3]}
        yield "scores", {**inputs, "scores": inputs["scores"].long()}
        yield "scores", {**inputs, "scores": inputs["scores"][:-1]}
        if "idxs" in inputs:
            yield "idxs", {**inputs, "idxs": inputs["idxs"].double()}
            yield "idxs", {**inputs, "idxs": inputs["idxs"][:-1]}

    def kept(self, inputs: Mapping[str, Any], **override: Any) -> tuple[Tensor, Tensor]:
        """(keep, scores), whether or not the part returns scores."""
        result = self.call(inputs, **override)
        keep, scores = result if isinstance(result, tuple) else (result, inputs["scores"][result])
        return keep, scores


def subset(case: SuppressorCase) -> None:
    """What is kept are distinct int64 indices of the input, and no score rises."""
    inputs = case.inputs()
    keep, scores = case.kept(inputs)
    demand(keep.dtype == torch.int64 and keep.ndim == 1, f"keep is {tuple(keep.shape)} {keep.dtype}, not (K,) int64")
    demand(len(set(keep.tolist())) == len(keep), "keeps a box twice")
    demand(((keep >= 0) & (keep < len(inputs["boxes"]))).all(), "keep holds an index outside the input")
    demand(scores.shape == keep.shape, f"gives scores {tuple(scores.shape)} for {len(keep)} boxes")
    demand((scores <= inputs["scores"][keep]).all(), "raises a score")


def ordered(case: SuppressorCase) -> None:
    """What is kept comes best first."""
    _, scores = case.kept(case.inputs())
    demand((scores.diff() <= 0).all(), f"the scores of what is kept do not fall: {scores[:4].tolist()}")


def idempotent(case: SuppressorCase) -> None:
    """Given only what it kept, with the scores it was given, it keeps all of it in the same way."""
    inputs = case.inputs()
    keep, scores = case.kept(inputs)
    again, scores_again = case.kept({name: value[keep] for name, value in inputs.items()})
    demand(torch.equal(again, torch.arange(len(keep))), f"keeps {len(again)} of the {len(keep)} boxes that it kept")
    demand(same(scores, scores_again, rtol=1e-9), "scores what it kept differently when the rest is gone")


def empty(case: SuppressorCase) -> None:
    """No boxes give an empty result of the right dtype."""
    inputs = {name: value[:0] for name, value in case.inputs().items()}
    keep, scores = case.kept(inputs)
    demand(keep.shape == (0,) and keep.dtype == torch.int64, f"no boxes gave {tuple(keep.shape)} {keep.dtype}")
    demand(scores.shape == (0,), f"no boxes gave scores {tuple(scores.shape)}")


def limits(case: SuppressorCase) -> None:
    """At the declared limit it is greedy non-maximum suppression."""
    for hyper in case.mark.options["limits"].values():
        inputs = case.inputs()
        keep, scores = case.kept(inputs, **hyper)
        expected = _greedy(inputs["boxes"], inputs["scores"], hyper["iou_threshold"], inputs.get("idxs"))
        demand(keep.tolist() == expected, f"at {hyper} keeps {keep.tolist()}, greedy suppression {expected}")
        demand(torch.equal(scores, inputs["scores"][keep]), f"at {hyper} changes the scores of what it keeps")


def order_free(case: SuppressorCase) -> None:
    """Shuffling the boxes shuffles the indices."""
    inputs = case.inputs()
    order = torch.randperm(len(inputs["boxes"]), generator=torch.Generator().manual_seed(2))
    keep, scores = case.kept(inputs)
    shuffled, shuffled_scores = case.kept({name: value[order] for name, value in inputs.items()})
    demand(torch.equal(order[shuffled], keep), "depends on the order of the boxes")
    demand(same(scores, shuffled_scores, rtol=1e-9), "scores depend on the order of the boxes")


def apart(case: SuppressorCase) -> None:
    """Two scenes far apart are treated as each alone."""
    inputs = case.inputs()
    far = {**inputs, "boxes": inputs["boxes"].neg()[:, [2, 3, 0, 1]] - 1000.0}
    both = {name: torch.cat([value, far[name]]) for name, value in inputs.items()}
    keep, scores = case.kept(both)
    for scene, mine in ((inputs, keep < 24), (far, keep >= 24)):
        alone, alone_scores = case.kept(scene)
        demand(torch.equal(keep[mine] % 24, alone), "boxes that are far apart influence each other")
        demand(same(scores[mine], alone_scores, rtol=1e-9), "boxes that are far apart change each other's scores")


def _greedy(boxes: Tensor, scores: Tensor, threshold: float, idxs: Tensor | None) -> list[int]:
    """Non-maximum suppression as its definition says: go down the scores, keep what overlaps nothing kept."""
    keep: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        rivals = [k for k in keep if idxs is None or idxs[k] == idxs[i]]
        if all(_iou(boxes[i].tolist(), boxes[k].tolist()) <= threshold for k in rivals):
            keep.append(i)
    return keep


def _iou(a: list[float], b: list[float]) -> float:
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)


ROLE = Role(
    name="suppressor",
    protocol="f(boxes (N, 4), scores (N,), *, <hyper>) -> keep (K,), or (keep (K,), scores (K,))",
    case=SuppressorCase,
    checks=(subset, ordered, idempotent, empty, limits, order_free, apart, *SHARED),
)
