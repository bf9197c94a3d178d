"""Assigners: `f(<what they name>, truth, mask, *, <hyper>)` says which true box each anchor learns.

A part names what it needs of `scores` (*batch, A, classes) and `boxes` (*batch, A, 4), which are predictions, and of
`anchors` (A, 4) and `points` (A, 2), which are places; `labels` (*batch, T) go with `truth` (*batch, T, 4), and `mask`
(*batch, T) is False for true boxes that only pad. It returns `match` (*batch, A), the number of a true box, -1 for
background, -2 for an anchor that takes no part in the loss; or `(match, weight)` with the target of each anchor.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossary.roles._battery import SHARED, Case, Role, demand, same
from lossary.roles._mark import mark

P = TypeVar("P")

_PLACES = ("anchors", "points")  # shared by the images of a batch
_PREDICTIONS = ("scores", "boxes")
_TRUTH = ("truth", "labels", "mask")


def assigner(
    *,
    examples: tuple[dict[str, Any], ...] = ({},),
    one_to_one: bool = False,
    tune: Mapping[str, tuple[Any, ...]] | None = None,
    xfail: Mapping[str, str] | None = None,
) -> Callable[[P], P]:
    """Mark an assigner.

    Args:
        examples: hyper-parameters for the battery; it has 64 anchors on one level, and 3 classes.
        one_to_one: whether it matches a true box once at most.
        tune: grid for `compare`.
        xfail: check -> reason, for failures that are meant.
    """
    return mark("assigner", examples=examples, tune=tune, xfail=xfail, one_to_one=one_to_one)


class AssignerCase(Case):
    """Two images with three and two true boxes, of sizes 17 to 28, on an 8x8 grid at stride 8.

    An anchor is a square of side 20. What is predicted in a true box is that box with errors that grow from the
    box's centre, in its class; elsewhere a small box around the point.
    """

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        ticks = 8.0 * torch.arange(8, dtype=torch.float64) + 4
        # None of them in the middle of its cell, so that no two are equally far from anything.
        points = torch.cartesian_prod(ticks, ticks) + torch.rand(64, 2, generator=g, dtype=torch.float64)
        truth = torch.tensor(
            [
                [[3, 5, 22, 25], [36, 2, 60, 20], [14, 33, 42, 60]],
                [[30, 28, 55, 57], [4, 9, 27, 26], [0, 0, 0, 0]],
            ],
            dtype=torch.float64,
        )
        labels = torch.tensor([[0, 2, 1], [1, 1, 0]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        low, high = truth[..., None, :, :2], truth[..., None, :, 2:]
        spot = points[:, None]
        within = ((spot > low) & (spot < high)).all(-1) & mask[:, None]  # (2, 64, 3)
        owner = within.double().argmax(-1)
        off = (spot - (low + high) / 2).norm(dim=-1).gather(-1, owner[..., None])
        noise = 0.25 * off * torch.randn(2, 64, 4, generator=g, dtype=torch.float64)
        own = truth.gather(1, owner[..., None].expand(-1, -1, 4)) + noise
        boxes = torch.where(within.any(-1, keepdim=True), own, torch.cat([points - 2, points + 2], 1))
        logits = torch.randn(2, 64, 3, generator=g, dtype=torch.float64) - 3
        rise = 4 * within.any(-1, keepdim=True)
        logits = logits.scatter_add(-1, labels.gather(1, owner)[..., None], rise.double())
        offered = {
            "scores": logits.sigmoid().to(dtype),
            "boxes": boxes.to(dtype),
            "anchors": torch.cat([points - 10, points + 10], 1).to(dtype),
            "points": points.to(dtype),
            "truth": truth.to(dtype),
            "labels": labels,
            "mask": mask,
        }
        return {name: offered[name] for name in inspect.signature(self.part).parameters if name in offered}

    def wrong(self) -> Iterable[tuple[str, dict[str, Any]]]:
        inputs = self.inputs()
        for name, value in inputs.items():
            other = value.double() if name in ("labels", "mask") else value.long()
            short = {"labels": value[..., :-1], "mask": value[..., :-1], "scores": value[:, :-1]}
            yield name, {**inputs, name: other}
            yield name, {**inputs, name: short.get(name, value[..., :-1])}

    def matched(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(match, weight), whether or not the part gives weights; then they are 1 for what is matched."""
        result = self.call(inputs)
        return result if isinstance(result, tuple) else (result, (result >= 0).double())


def legal(case: AssignerCase) -> None:
    """A match is -2, -1 or the number of a real true box for each anchor, a weight 0 to 1, and 0 without a match."""
    inputs = case.inputs()
    match, weight = case.matched(inputs)
    demand(match.dtype == torch.int64, f"match is {match.dtype}, not int64")
    demand(match.shape == weight.shape == (2, 64), f"match is {tuple(match.shape)}, weight {tuple(weight.shape)}")
    real = inputs["mask"].gather(1, match.clamp(0, 2))
    demand(((match >= -2) & (match < 3)).all(), f"match runs from {match.min()} to {match.max()} with 3 true boxes")
    demand(real[match >= 0].all(), "matches a true box that only pads")
    demand(((weight >= 0) & (weight <= 1)).all(), f"a weight is {weight.min():.3g} to {weight.max():.3g}")
    demand((weight[match < 0] == 0).all(), "gives weight to an anchor without a match")


def served(case: AssignerCase) -> None:
    """Where anchors are plenty, every true box gets one, with a weight above 0."""
    match, weight = case.matched(case.inputs())
    for image, count in enumerate((3, 2)):
        for box in range(count):
            demand((weight[image][match[image] == box] > 0).any(), f"true box {box} of image {image} gets no anchor")


def near(case: AssignerCase) -> None:
    """An anchor learns only a true box that it, or what it predicts, overlaps."""
    inputs = case.inputs()
    match, _ = case.matched(inputs)
    places = [inputs[name].expand(2, 64, 4) for name in ("boxes", "anchors") if name in inputs]
    places += [torch.cat([inputs["points"]] * 2, 1).expand(2, 64, 4)] if "points" in inputs else []
    true = inputs["truth"].gather(1, match.clamp(min=0)[..., None].expand(-1, -1, 4))
    touches = [((p[..., :2] < true[..., 2:]) & (p[..., 2:] > true[..., :2])).all(-1) for p in places]
    demand(torch.stack(touches).any(0)[match >= 0].all(), "matches an anchor to a true box far from it")


def one_to_one(case: AssignerCase) -> None:
    """If it says that it matches one to one, no true box is matched twice."""
    if case.mark.options["one_to_one"]:
        match, _ = case.matched(case.inputs())
        for image in match:
            _, counts = image[image >= 0].unique(return_counts=True)
            demand((counts == 1).all(), f"matches a true box {counts.max()} times")


def empty(case: AssignerCase) -> None:
    """Without true boxes every anchor is background, and without anchors there is nothing."""
    inputs = case.inputs()
    match, _ = case.matched({name: value[:, :0] if name in _TRUTH else value for name, value in inputs.items()})
    demand(match.shape == (2, 64) and (match == -1).all(), "without true boxes, some anchor is not background")
    if not case.hyper.get("levels"):
        none = {name: value[:0] if name in _PLACES else value for name, value in inputs.items()}
        none = {name: value[:, :0] if name in _PREDICTIONS else value for name, value in none.items()}
        match, _ = case.matched(none)
        demand(match.shape == (2, 0), f"without anchors, match is {tuple(match.shape)}")


def padding(case: AssignerCase) -> None:
    """What stands in a padding row changes nothing."""
    inputs = case.inputs()
    expected = case.matched(inputs)
    for stuff in (inputs["truth"][:, :1], torch.nan):
        truth = torch.where(inputs["mask"][..., None], inputs["truth"], stuff)
        demand(same(expected, case.matched({**inputs, "truth": truth})), "a padding row has an influence")


def batched(case: AssignerCase) -> None:
    """Each image of a batch is assigned as it is alone, without the padding."""
    inputs = case.inputs()
    match, weight = case.matched(inputs)
    for image, count in enumerate((3, 2)):
        alone = {name: value if name in _PLACES else value[image] for name, value in inputs.items()}
        alone = {name: value[:count] if name in _TRUTH else value for name, value in alone.items()}
        own, own_weight = case.matched(alone)
        demand(torch.equal(match[image], own), "an image of a batch is assigned otherwise than alone")
        demand(same(weight[image], own_weight, rtol=1e-9), "an image of a batch is weighted otherwise than alone")


def order_free(case: AssignerCase) -> None:
    """Shuffling the anchors shuffles the matches, and shuffling the true boxes renames them."""
    inputs = case.inputs()
    match, weight = case.matched(inputs)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    shuffled = {name: value[order] if name in _PLACES else value for name, value in inputs.items()}
    shuffled = {name: value[:, order] if name in _PREDICTIONS else value for name, value in shuffled.items()}
    demand(
        same((match[:, order], weight[:, order]), case.matched(shuffled), rtol=1e-9), "depends on the anchors' order"
    )
    names = torch.tensor([1, 2, 0])
    renamed, weights = case.matched({name: v[:, names] if name in _TRUTH else v for name, v in inputs.items()})
    back = torch.where(renamed >= 0, names[renamed.clamp(min=0)], renamed)
    demand(same((match, weight), (back, weights), rtol=1e-9), "depends on the order of the true boxes")


def moved(case: AssignerCase) -> None:
    """A scene that is moved as a whole is assigned in the same way."""
    inputs = case.inputs()
    places = ("boxes", "anchors", "points", "truth")
    away = {name: value + 128.0 if name in places else value for name, value in inputs.items()}
    demand(same(case.matched(inputs), case.matched(away), rtol=1e-6, atol=1e-9), "depends on where the scene lies")


def detached(case: AssignerCase) -> None:
    """What it returns carries no gradient: a target is a constant."""
    inputs = case.inputs()
    learned = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in inputs.items()}
    demand(not any(value.requires_grad for value in case.matched(learned)), "its result carries a gradient")


ROLE = Role(
    name="assigner",
    protocol=(
        "f(of scores (*b, A, C), boxes (*b, A, 4), anchors (A, 4), points (A, 2), truth (*b, T, 4), labels (*b, T),"
        " mask (*b, T) those it names, *, <hyper>) -> match (*b, A), or (match, weight (*b, A))"
    ),
    case=AssignerCase,
    checks=(legal, served, near, one_to_one, empty, padding, batched, order_free, moved, detached, *SHARED),
)
