"""UA-CMDet: two cameras of which one fails in the dark; do its weights and its suppression help, and only there?

A scene has sixteen places, half of them with a car, seen as patches of 8x8 pixels by a colour camera, whose contrast
is that of the scene's light, and by an infrared one. Colour boxes are now and then drawn beside the car, or not at
all. Three small networks (colour, infrared, both) say whether a car is there and where exactly.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import cross_modal_uncertainty_weights, illumination_aware_nms, illumination_weight
from lossary.detection._average_precision import average_precision
from lossary.detection._overlap import ROTATED_BOX, pairwise
from lossary.tasks import fit, stacked_mlp

PLACES = 16
CARS = 8
SIDE = 8
ROI = 40.0  # pixels, of a place
GRID = [{"lr": lr} for lr in (0.003, 0.01, 0.03)]


def _scenes(rng: np.random.Generator, n: int) -> dict[str, Tensor]:
    """n scenes: patches, true offsets (dx, dy, log width, log height) relative to the place, labels of both cameras."""
    light = np.where(np.arange(n) % 2, rng.uniform(0.05, 0.3, n), rng.uniform(0.7, 1.0, n))
    shape = n, PLACES
    car = rng.random(shape).argsort(1) < CARS
    centre, half = rng.uniform(-0.4, 0.4, (*shape, 2)), rng.uniform(0.3, 0.55, (*shape, 2))
    axis = np.linspace(-1, 1, SIDE)
    inside = [
        1 / (1 + np.exp((abs(axis - c) - h) / 0.08))
        for c, h in ((centre[..., k, None], half[..., k, None]) for k in (0, 1))
    ]
    blob = (inside[1][..., :, None] * inside[0][..., None, :]).reshape(*shape, -1) * car[..., None]
    colour = light[:, None, None] * blob + 0.15 * rng.standard_normal(blob.shape)
    infrared = 0.6 * blob + 0.15 * rng.standard_normal(blob.shape)
    true = np.concatenate([centre, np.log(half)], axis=-1)
    beside = np.where(rng.random((*shape, 1)) < 0.3, 0.3, 0.02)
    drawn = true + np.concatenate(
        [beside * rng.standard_normal((*shape, 2)), 0.02 * rng.standard_normal((*shape, 2))], -1
    )
    arrays = {
        "image": light[:, None, None, None] * rng.uniform(0.1, 1.0, (n, 3, 32, 32)),
        "colour": colour,
        "infrared": infrared,
        "true": true,
        "drawn": drawn,
        "seen": true + 0.02 * rng.standard_normal(true.shape),
        "angle": rng.uniform(-np.pi, np.pi, shape),
    }
    found = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
    labelled = car & (rng.random(shape) >= 0.15)
    return found | {
        "car": torch.from_numpy(car),
        "labelled": torch.from_numpy(labelled),
        "dark": torch.arange(n) % 2 > 0,
    }


def _boxes(offsets: Tensor, angle: Tensor) -> Tensor:
    """Rotated boxes in the scene of offsets (..., 16, 4): places are 100 pixels apart, each turned by its angle."""
    place = 100.0 * torch.stack([torch.arange(PLACES) % 4, torch.arange(PLACES) // 4], dim=-1)
    dx, dy = (ROI / 2 * offsets[..., :2]).unbind(-1)
    turned = torch.stack([dx * angle.cos() - dy * angle.sin(), dx * angle.sin() + dy * angle.cos()], dim=-1)
    return torch.cat([place + turned, ROI * offsets[..., 2:].exp(), angle.expand(dx.shape)[..., None]], dim=-1)


def _targets(scenes: dict[str, Tensor], weighted: bool) -> tuple[Tensor, Tensor]:
    """For the colour branch and the others (n, 16, 6): offsets, whether a car is there, weight of its offsets."""
    drawn, seen = (_boxes(scenes[name], scenes["angle"]) for name in ("drawn", "seen"))
    light = illumination_weight(scenes["image"])
    colour = torch.cat([scenes["drawn"], scenes["car"][..., None].float(), torch.ones(len(drawn), PLACES, 1)], dim=-1)
    infrared = torch.cat([scenes["seen"], colour[..., 4:]], dim=-1)
    for s in range(len(drawn)):
        mine, theirs = scenes["labelled"][s].nonzero()[:, 0], scenes["car"][s].nonzero()[:, 0]
        truth, _ = cross_modal_uncertainty_weights(drawn[s, mine], seen[s, theirs], light[s].item())
        copied = theirs[truth.copied]
        colour[s, copied, :4] = scenes["seen"][s, copied]
        if weighted:
            colour[s, torch.cat([mine, copied]), 5] = truth.weights
    return colour, infrared


def _loss(z: Tensor, y: Tensor) -> Tensor:
    there, weight = y[..., 4], y[..., 5]
    exists = F.binary_cross_entropy_with_logits(z[..., 4], there, reduction="none")
    return exists + there * weight * F.smooth_l1_loss(z[..., :4], y[..., :4], reduction="none", beta=0.1).sum(-1)


@cache
def _trained(seeds: Seeds, weighted: bool, lr: float) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Test scenes of each seed and what the three branches say of them: (S, 3, n, 16, 5)."""
    train = [_scenes(rng, seeds.few(60)) for rng in seeds.numpy("train")]
    test = [_scenes(rng, seeds.few(40)) for rng in seeds.numpy("test")]
    targets = [_targets(scenes, weighted) for scenes in train]
    said = []
    for branch, names in enumerate((("colour",), ("infrared",), ("colour", "infrared"))):
        x, unseen = (torch.stack([torch.cat([s[name] for name in names], -1) for s in part]) for part in (train, test))
        y = torch.stack([pair[min(branch, 1)] for pair in targets])
        model = stacked_mlp((x.shape[-1], 64, 5), seeds)
        adam = lambda parameters: torch.optim.Adam(parameters, lr=lr)  # noqa: E731
        fit(
            model,
            x.flatten(1, 2),
            y.flatten(1, 2),
            loss=_loss,
            seeds=seeds,
            steps=seeds.few(300, smoke=8),
            optimizer=adam,
        )
        with torch.no_grad():
            said.append(model(unseen.flatten(1, 2)).unflatten(1, unseen.shape[1:3]))
    return test, torch.stack(said, dim=1)


def _ap(seeds: Seeds, *, weighted: bool, aware: bool, dark: bool, lr: float) -> list[float]:
    """Average precision in percent of all branches' boxes together, in dark or in bright test scenes."""
    test, said = _trained(seeds, weighted, lr)
    values = []
    for scenes, z in zip(test, said):
        light = illumination_weight(scenes["image"]) if aware else torch.ones(len(scenes["image"]))
        boxes, scores, truth = [], [], []
        for s in (scenes["dark"] == dark).nonzero()[:, 0].tolist():
            found = _boxes(z[:, s, :, :4].clamp(-3, 3), scenes["angle"][s]).flatten(0, 1)
            from_colour = torch.arange(3).repeat_interleave(PLACES) == 0
            idxs = torch.zeros(len(found), dtype=torch.int64)
            keep, kept = illumination_aware_nms(
                found, z[:, s, :, 4].sigmoid().flatten(), idxs, from_colour, light[s].item()
            )
            boxes.append(found[keep])
            scores.append(kept)
            truth.append(_boxes(scenes["true"][s], scenes["angle"][s])[scenes["car"][s]])
        values.append(average_precision(boxes, scores, truth, overlap=ROTATED_BOX))
    return values


def _compare(seeds: Seeds, method: dict[str, bool], baseline: dict[str, bool], *, dark: bool) -> Arms:
    values, chosen = [], {}
    for name, arm in (("method", method), ("baseline", baseline)):
        setting = tune(lambda tuning, arm=arm, **lr: _ap(tuning, dark=dark, **arm, **lr), GRID, seeds)
        values.append(_ap(seeds, dark=dark, **arm, **setting))
        chosen[name] = setting
    return Arms(*values, chosen)


FULL, PLAIN = {"weighted": True, "aware": True}, {"weighted": False, "aware": False}


@claim(
    says="In the dark, uncertainty weights with illumination-aware suppression detect better than neither",
    kind="superiority",
    metric="average precision",
    scale="20 dark scenes of 8 cars in 16 places, trained on 60 of all, three MLPs, 300 steps, 3 learning rates",
)
def better_in_the_dark(seeds: Seeds) -> Arms:
    return _compare(seeds, FULL, PLAIN, dark=True)


@claim(
    says="In bright scenes the two cost nothing",
    kind="noninferiority",
    metric="average precision",
    scale="20 bright scenes of 8 cars in 16 places, trained on 60 of all, three MLPs, 300 steps, 3 learning rates",
)
def no_worse_in_bright_light(seeds: Seeds) -> Arms:
    return _compare(seeds, FULL, PLAIN, dark=False)


@claim(
    says="In the dark, illumination-aware suppression alone detects better than plain suppression",
    kind="superiority",
    metric="average precision",
    scale="20 dark scenes of 8 cars in 16 places, equal weights, three MLPs, 300 steps, 3 learning rates",
)
def suppression_alone(seeds: Seeds) -> Arms:
    return _compare(seeds, {"weighted": False, "aware": True}, PLAIN, dark=True)


@claim(
    says="With uncertainty weights the colour branch's boxes sit better on the cars than with equal weights",
    kind="superiority",
    metric="IoU",
    scale="colour branch on 40 scenes of 8 cars, trained on 60, MLP 64-64-5, 300 steps, 3 learning rates",
)
def weights_alone(seeds: Seeds) -> Arms:
    def score(seeds: Seeds, *, weighted: bool, lr: float) -> list[float]:
        test, said = _trained(seeds, weighted, lr)
        values = []
        for scenes, z in zip(test, said):
            found, true = (_boxes(part, scenes["angle"]) for part in (z[0, ..., :4].clamp(-3, 3), scenes["true"]))
            pairs = [pairwise(ROTATED_BOX, f[c], t[c]).diagonal() for f, t, c in zip(found, true, scenes["car"])]
            values.append(100 * torch.cat(pairs).mean().item())
        return values

    settings = [tune(lambda tuning, w=w, **lr: score(tuning, weighted=w, **lr), GRID, seeds) for w in (True, False)]
    method, baseline = (score(seeds, weighted=w, **setting) for w, setting in zip((True, False), settings))
    return Arms(method, baseline, dict(zip(("method", "baseline"), settings)))


def draw(seeds: Seeds) -> list[Panel]:
    """A dark scene: its cars, what the three branches propose with a score above 0.3, and what suppressions leave."""
    test, said = _trained(seeds.one(0), weighted=True, lr=0.01)
    scene = {name: part[1] for name, part in test[0].items()}
    scores = said[0, :, 1, :, 4].sigmoid().flatten()
    found = _boxes(said[0, :, 1, :, :4].clamp(-3, 3), scene["angle"]).flatten(0, 1)
    from_colour = torch.arange(3).repeat_interleave(PLACES) == 0
    panels = [
        _panel("cars in the dark", _boxes(scene["true"], scene["angle"])[scene["car"]]),
        _panel("three branches", found[scores > 0.3]),
    ]
    for title, light in (
        ("plain suppression", 1.0),
        ("illumination-aware", illumination_weight(scene["image"]).item()),
    ):
        keep, kept = illumination_aware_nms(
            found, scores, torch.zeros(len(found), dtype=torch.int64), from_colour, light
        )
        panels.append(_panel(title, found[keep[kept > 0.3]]))
    return panels


def _panel(title: str, boxes: Tensor) -> Panel:
    corners = ROTATED_BOX.rows(boxes.double().numpy()).reshape(-1, 4, 2)
    return Panel(title, image=np.zeros((400, 400)), polygons=list(corners + 50))
