"""YOLOv8-TO: does a network that draws its bars read a truss better than its skeleton does, from the same boxes?

A truss of five random bars is a black-and-white picture. Both arms are given a square around each bar, moved and
widened at random as a detector's would be, and the picture in it, where other bars may cross. What is measured is the
Dice coefficient of the redrawn truss.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import (
    dice_reconstruction_loss,
    mmc_topology_description,
    render_components,
    render_structure,
)
from lossary.tasks import fit, stacked_mlp

SIDE = 64  # of a truss, in pixels
CROP = 20  # of what is seen of it around a bar
BARS = 5


def _trusses(rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bars (n, 5, 5), their pictures (n, 5, 64, 64) and square boxes around them (n, 5, 4)."""
    ends = rng.uniform(0.1, 0.9, (n, BARS, 2, 2))
    near = np.linalg.norm(ends[:, :, 0] - ends[:, :, 1], axis=-1) < 0.3
    while near.any():
        ends[near] = rng.uniform(0.1, 0.9, (int(near.sum()), 2, 2))
        near = np.linalg.norm(ends[:, :, 0] - ends[:, :, 1], axis=-1) < 0.3
    along = ends[:, :, 1] - ends[:, :, 0]
    thickness = rng.uniform(0.04, 0.12, (n, BARS))
    length, angle = np.linalg.norm(along, axis=-1), np.arctan2(along[..., 1], along[..., 0])
    bars = np.concatenate([ends.mean(2), np.stack([length, thickness, angle], axis=-1)], axis=-1)
    half = np.abs(along).max(-1, keepdims=True) / 2 + thickness[..., None] / 2
    middle = ends.mean(2) + 0.05 * half * rng.uniform(-1, 1, (n, BARS, 2))
    half = half * rng.uniform(1.0, 1.1, half.shape)
    boxes = torch.from_numpy(np.concatenate([middle - half, middle + half], axis=-1)).float()
    bars = torch.from_numpy(bars).float()
    return bars, render_components(bars, SIDE, SIDE).round(), boxes


def _cropped(pictures: Tensor, boxes: Tensor) -> Tensor:
    """The nearest pixels of pictures (N, 64, 64) in each one's box (N, 4): (N, 20, 20)."""
    steps = torch.linspace(0, 1, CROP)
    x, y = (boxes[:, k, None] + steps * (boxes[:, k + 2] - boxes[:, k])[:, None] for k in (0, 1))
    grid = torch.stack([x[:, None].expand(-1, CROP, -1), y[:, :, None].expand(-1, -1, CROP)], dim=-1)
    return F.grid_sample(pictures[:, None], 2 * grid - 1, mode="nearest", align_corners=True)[:, 0]


def _drawn(bars: Tensor) -> Tensor:
    """Bars (..., B, 5) as a truss (..., 64, 64), black and white."""
    return render_structure(render_components(bars, SIDE, SIDE)).round()


def _dice(found: Tensor, true: Tensor) -> Tensor:
    """Mean over trusses (..., 64, 64), in percent."""
    return 100 * (1 - dice_reconstruction_loss(found, true)).mean(-1)


def _data(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops of trusses (S, N, 400), of their bars alone and boxes (S, N, 404), test trusses, how many N to train on."""
    seen, wanted, tests = [], [], []
    train, test = seeds.few(200, smoke=4), seeds.few(20, smoke=2)
    for rng in seeds.numpy("trusses"):
        _, pictures, boxes = _trusses(rng, train + test)
        whole = render_structure(pictures)
        around = boxes.flatten(0, 1)
        seen.append(_cropped(whole.repeat_interleave(BARS, 0), around).flatten(1))
        wanted.append(torch.cat([_cropped(pictures.flatten(0, 1), around).flatten(1), around], dim=1))
        tests.append(whole[train:])
    return torch.stack(seen), torch.stack(wanted), torch.stack(tests), torch.tensor(train * BARS)


def _loss(z: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Of each detection: its drawn bar against its own mask, within its box."""
    mask, boxes = y[..., :-4].unflatten(-1, (CROP, CROP)), y[..., -4:]
    bars = mmc_topology_description(z.sigmoid(), boxes)
    side = boxes[..., 2:3] - boxes[..., :1]
    inside = torch.cat([(bars[..., :2] - boxes[..., :2]) / side, bars[..., 2:4] / side, bars[..., 4:]], dim=-1)
    return dice_reconstruction_loss(render_components(inside, CROP, CROP, epsilon=epsilon), mask)


def _learned(seeds: Seeds, *, epsilon: float, lr: float) -> tuple[Tensor, Tensor]:
    """Bars (S, trusses, 5, 5) that a network finds in the test trusses, and these."""
    x, y, tests, train = _data(seeds)
    model = stacked_mlp((CROP * CROP, 128, 5), seeds)
    adam = partial(torch.optim.Adam, lr=lr)
    loss = partial(_loss, epsilon=epsilon)
    steps, before = seeds.few(300), int(train)
    fit(model, x[:, :before], y[:, :before], loss=loss, seeds=seeds, steps=steps, batch=32, optimizer=adam)
    with torch.no_grad():
        bars = mmc_topology_description(model(x[:, before:]).sigmoid(), y[:, before:, -4:])
    return bars.unflatten(1, (-1, BARS)), tests


def _learned_dice(seeds: Seeds, **setting: float) -> Tensor:
    bars, tests = _learned(seeds, **setting)
    return _dice(_drawn(bars), tests)


def _skeleton(crop: np.ndarray, *, ends: str, longer: float) -> np.ndarray:
    """A bar x1, y1, x2, y2, thickness, in units of the crop's side, from the longest piece of what is seen there."""
    from scipy.ndimage import distance_transform_edt
    from skimage.morphology import skeletonize

    thin = skeletonize(crop)
    points = np.argwhere(thin)[:, ::-1].astype(float)
    if len(points) < 2:
        return np.array([0.0, 0.0, 1.0, 1.0, 0.1])
    depth = distance_transform_edt(np.pad(crop, 1))[1:-1, 1:-1][thin]
    thickness = 2 * np.median(depth) - 1
    if ends == "axis":
        centre = points.mean(0)
        axis = np.linalg.svd(points - centre, full_matrices=False)[2][0]
        way = (points - centre) @ axis
        first, second = centre + way.min() * axis, centre + way.max() * axis
    else:
        i, j = np.unravel_index(np.linalg.norm(points[:, None] - points, axis=-1).argmax(), (len(points),) * 2)
        first, second = points[i], points[j]
    reach = longer * thickness / 2 * (second - first) / max(np.linalg.norm(second - first), 1e-9)
    return np.append(np.concatenate([first - reach, second + reach]), thickness) / (CROP - 1)


def _skeleton_dice(seeds: Seeds, *, ends: str, longer: float) -> Tensor:
    x, y, tests, train = _data(seeds)
    x, boxes = x[:, int(train) :], y[:, int(train) :, -4:]
    crops = x.unflatten(-1, (CROP, CROP)).flatten(0, 1).numpy() > 0.5
    found = torch.from_numpy(np.stack([_skeleton(crop, ends=ends, longer=longer) for crop in crops])).float()
    found = found.view(*boxes.shape[:2], 5)
    side = boxes[..., 2:3] - boxes[..., :1]
    first, second = (boxes[..., :2] + side * found[..., k : k + 2] for k in (0, 2))
    along = second - first
    sizes = [along.norm(dim=-1, keepdim=True), side * found[..., 4:], torch.atan2(along[..., 1:], along[..., :1])]
    bars = torch.cat([(first + second) / 2, *sizes], dim=-1)
    return _dice(_drawn(bars.unflatten(1, (-1, BARS))), tests)


LEARNED = [{"epsilon": e, "lr": lr} for e in (0.05, 0.2) for lr in (0.001, 0.003)]
SKELETONS = [{"ends": e, "longer": longer} for e in ("axis", "farthest") for longer in (0.0, 1.0)]


@claim(
    says="A network that draws its bars redraws trusses better than bars fitted to their skeletons do",
    kind="superiority",
    metric="Dice",
    scale="trusses of 5 bars in 64x64 pixels, boxes given; 1000 bars, MLP 400-128-5, 300 steps; 4 settings each",
)
def drawing_beats_skeletons(seeds: Seeds) -> Arms:
    best, usual = tune(_learned_dice, LEARNED, seeds), tune(_skeleton_dice, SKELETONS, seeds)
    details = {"method": best, "baseline": usual}
    return Arms(_learned_dice(seeds, **best), _skeleton_dice(seeds, **usual), details)


@claim(
    says="Bars drawn with a wide edge are learnt better than with the nearly sharp one of the official code",
    kind="superiority",
    metric="Dice",
    scale="trusses of 5 bars in 64x64 pixels; edges 0.05 and 0.001; 1000 bars, MLP 400-128-5, 300 steps; 4 rates each",
)
def wide_edges_learn_better(seeds: Seeds) -> Arms:
    rates = (0.0003, 0.001, 0.003, 0.01)
    wide, sharp = (tune(_learned_dice, [{"epsilon": e, "lr": lr} for lr in rates], seeds) for e in (0.05, 0.001))
    return Arms(_learned_dice(seeds, **wide), _learned_dice(seeds, **sharp), {"method": wide, "baseline": sharp})


@claim(
    says="Moving the predicted bars down the Dice loss of the whole truss redraws it better",
    kind="superiority",
    metric="Dice",
    scale="trusses of 5 bars in 64x64 pixels; MLP 400-128-5, edge 0.05, lr 0.001; then 60 steps of Adam on the bars",
)
def refining_helps(seeds: Seeds) -> Arms:
    bars, tests = _learned(seeds, epsilon=0.05, lr=0.001)
    return Arms(_dice(_drawn(_refined(bars, tests, seeds.few(60))), tests), _dice(_drawn(bars), tests))


def _refined(bars: Tensor, tests: Tensor, steps: int) -> Tensor:
    """By Adam, each truss on its own, drawn at half size."""
    moved = bars.clone().requires_grad_()
    target = tests[..., ::2, ::2] * 1.0
    adam = torch.optim.Adam([moved], lr=0.003)
    for _ in range(steps):
        pictures = render_components(moved, SIDE // 2, SIDE // 2, epsilon=0.1)
        adam.zero_grad()
        dice_reconstruction_loss(render_structure(pictures), target).sum().backward()
        adam.step()
    return moved.detach()


def draw(seeds: Seeds) -> list[Panel]:
    """Two trusses, and the bars that a network finds in them before and after refinement."""
    bars, tests = _learned(seeds.one(0), epsilon=0.05, lr=0.001)
    found = {"predicted": bars[0], "refined": _refined(bars, tests, 60)[0]}
    return [
        Panel(f"truss {k + 1}, {name}", image=1 - 0.5 * tests[0, k], polygons=_outlines(one[k]))
        for k in range(2)
        for name, one in found.items()
    ]


def _outlines(bars: Tensor) -> list[np.ndarray]:
    x, y, length, thickness, angle = bars.T
    right = torch.stack([angle.cos(), angle.sin()], dim=1) * length[:, None] / 2
    down = torch.stack([-angle.sin(), angle.cos()], dim=1) * thickness[:, None] / 2
    corners = [right + down, right - down, -right - down, down - right]
    return list((torch.stack([torch.stack([x, y], 1) + c for c in corners], dim=1) * (SIDE - 1)).numpy())
