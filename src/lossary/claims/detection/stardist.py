"""StarDist: do stars tell crowded objects apart better than a watershed or a border class, on the same network?

A small U-Net learns three things at once: probability and distances of stars, and the classes background, inside and
border of the usual alternatives. So all arms see the same features, and differ in what they make of them. The real
picture shows fluorescent nuclei that were outlined by hand for the Data Science Bowl 2018; the package stardist ships
it. Three quarters of it are for training, the fourth for testing; which one, the seed says.

The length of training and the unit of the distances were settled on a development seed by the errors of the network's
maps, before any objects were counted; a first picture of objects, after too short a training, was seen for seed 0.

The slowest claim took 10 minutes of a busy core: a network is trained for each seed and setting.
"""

from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import (
    circle_rays,
    fibonacci_rays,
    object_probabilities,
    predict_instances,
    star_dist_loss,
    star_distances,
)
from lossary.detection._stars import star_boxes, walk

SIDE = 40  # of the pictures for training
RAYS = circle_rays(16)
THRESHOLDS = tuple(0.5 + 0.05 * k for k in range(10))


class _UNet(nn.Module):
    """Pictures (N, 1, H, W) to logits of the probability, distances and three classes, in one tensor (N, 20, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(24, 12, 1),
            nn.Upsample(scale_factor=2),
        )
        self.both = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4 + len(RAYS[0]), 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        maps = self.both(torch.cat([fine, self.coarse(fine)], dim=1))
        return torch.cat([maps[:, :4], 10 * maps[:, 4:]], dim=1)  # distances are learnt in units of ten pixels


def _crowd(rng: np.random.Generator) -> Tensor:
    """Labels of ellipses with radii of 3 to 6 pixels that touch, but hide at most a tenth of each other."""
    y, x = np.mgrid[:SIDE, :SIDE]
    labels, number = np.zeros((SIDE, SIDE), np.int64), 0
    for _ in range(100):
        cx, cy, a, b, turn = rng.uniform([0, 0, 3, 3, 0], [SIDE, SIDE, 6, 6, np.pi])
        u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        mask = (u / a) ** 2 + (v / b) ** 2 <= 1
        if mask.any() and (labels[mask] > 0).mean() <= 0.1:
            number += 1
            labels[mask & (labels == 0)] = number
    return torch.from_numpy(labels)


def _seen(labels: Tensor, rng: np.random.Generator) -> Tensor:
    """A noisy picture: objects of different brightness, blurred, with noise as strong as the fainter ones."""
    light = np.append(0.0, rng.uniform(0.5, 1.0, int(labels.max())))
    picture = torch.from_numpy(light[labels.numpy()]).float()
    soft = F.avg_pool2d(picture[None, None], 3, stride=1, padding=1)[0, 0]
    return soft + 0.35 * torch.from_numpy(rng.standard_normal(labels.shape)).float()


@cache
def _nuclei() -> tuple[Tensor, Tensor]:
    """The real picture at half its size and the labels of its 125 nuclei, (256, 256)."""
    from skimage.io import imread

    spec = find_spec("stardist")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("this claim's picture ships in a package: pip install stardist")
    images = Path(spec.origin).parent / "data" / "images"
    picture, labels = (imread(images / f"{name}2d.tif").astype(np.float32) for name in ("img", "mask"))
    low, high = np.percentile(picture, [1, 99.8]).astype(np.float32)
    small = F.avg_pool2d(torch.from_numpy((picture - low) / (high - low))[None, None], 2)[0, 0]
    return small, torch.from_numpy(labels[::2, ::2].astype(np.int64))


def _scenes(seeds: Seeds, s: int, *, real: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Pictures and labels for training, pictures and labels for testing, of the seed at a position."""
    rng = seeds.one(s).numpy("scenes")[0]
    train, test = seeds.few(60, smoke=4), seeds.few(8, smoke=1)
    if not real:
        labels = [_crowd(rng) for _ in range(train + test)]
        pictures = [_seen(one, rng) for one in labels]
        return pictures[:train], labels[:train], pictures[train:], labels[train:]
    quarter, crops = int(rng.integers(4)), []
    picture, labels = (one.rot90(quarter) for one in _nuclei())
    while len(crops) < train:  # the last quarter is for testing
        top, left = rng.integers(0, 256 - SIDE, 2)
        if top < 128 - SIDE or left < 128 - SIDE:
            turn = int(rng.integers(4))
            crops.append([one[top : top + SIDE, left : left + SIDE].rot90(turn) for one in (picture, labels)])
    pictures, true = map(list, zip(*crops))
    end = 128 + seeds.few(128, smoke=16)
    return pictures, true, [picture[128:end, 128:end]], [labels[128:end, 128:end]]


@cache
def _outputs(seeds: Seeds, s: int, *, real: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What a trained network says about the test pictures, (20, H, W) each, and their true labels."""
    pictures, labels, test, true = _scenes(seeds, s, real=real)
    x = torch.stack(pictures)[:, None]
    probability = torch.stack([object_probabilities(one) for one in labels])
    distances = torch.stack([star_distances(one, RAYS) for one in labels])
    kinds = torch.stack([_kinds(one) for one in labels])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.ids[s])
        network = _UNet()
    order = seeds.one(s).torch("order")[0]
    steps = seeds.few(250, smoke=2)
    adam = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.01, total_steps=steps + 1)
    for _ in range(steps):
        rows = torch.randint(len(x), (8,), generator=order)
        maps = network(x[rows])
        weight = 0.2 / probability[rows].mean().item()  # as the official code does
        stars = star_dist_loss(maps[:, 0], maps[:, 4:], probability[rows], distances[rows], weight=weight)
        loss = stars.mean() + F.cross_entropy(maps[:, 1:4], kinds[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        return [network(picture[None, None])[0] for picture in test], true


def _kinds(labels: Tensor) -> Tensor:
    """0 background, 1 inside, 2 border: object pixels with another object or background among their neighbours."""
    padded = F.pad(labels[None, None].double(), (1, 1, 1, 1), mode="replicate")
    high = F.max_pool2d(padded, 3, stride=1)
    low = -F.max_pool2d(-padded, 3, stride=1)
    return torch.where(labels == 0, 0, torch.where((high != low)[0, 0], 2, 1))


def _stars(maps: Tensor, *, threshold: float, overlap: float) -> Tensor:
    probabilities, distances = maps[0].sigmoid(), maps[4:]
    found = predict_instances(
        probabilities, distances, RAYS, probability_threshold=threshold, overlap_threshold=overlap
    )
    return found.labels


def _watershed(maps: Tensor, *, threshold: float, apart: int) -> Tensor:
    """Foreground cut along the valleys between the peaks of its depth that lie so far apart."""
    from scipy.ndimage import distance_transform_edt
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed

    foreground = (1 - maps[1:4].softmax(0)[0] > threshold).numpy()
    depth = distance_transform_edt(np.pad(foreground, 1))[1:-1, 1:-1]
    peaks = peak_local_max(depth, min_distance=apart, labels=foreground.astype(int), exclude_border=False)
    markers = np.zeros(depth.shape, np.int64)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return torch.from_numpy(watershed(-depth, markers, mask=foreground).astype(np.int64))


def _borders(maps: Tensor, *, threshold: float, grown: int) -> Tensor:
    """Connected pieces of the class inside, grown back by the border."""
    from skimage.measure import label
    from skimage.segmentation import expand_labels

    pieces = label((maps[1:4].softmax(0)[1] > threshold).numpy(), connectivity=1)
    return torch.from_numpy(expand_labels(pieces, grown).astype(np.int64))


def _accuracy(found: list[Tensor], true: list[Tensor]) -> float:
    """The field's precision: matches / (matches + false + missed), mean over IoUs of 0.5 to 0.95, in percent."""
    right, wrong = np.zeros(len(THRESHOLDS)), np.zeros(len(THRESHOLDS))
    for f, t in zip(found, true):
        shape = int(f.max()) + 1, int(t.max()) + 1
        common = torch.bincount((f * shape[1] + t).flatten(), minlength=shape[0] * shape[1]).view(shape).double()
        size_f, size_t = common.sum(1)[1:], common.sum(0)[1:]
        common = common[1:, 1:]
        iou = common / (size_f[:, None] + size_t - common).clamp(min=1)
        matched = np.array([(iou > threshold).sum().item() for threshold in THRESHOLDS])  # above a half: one to one
        right += matched
        wrong += int((size_f > 0).sum() + (size_t > 0).sum()) - 2 * matched
    return 100 * float(np.mean(right / np.maximum(right + wrong, 1)))


def _scored(seeds: Seeds, way, *, real: bool = False, **setting: object) -> list[float]:
    values = []
    for s in range(len(seeds)):
        maps, true = _outputs(seeds, s, real=real)
        values.append(_accuracy([way(one, **setting) for one in maps], true))
    return values


STARS = [{"threshold": t, "overlap": o} for t in (0.3, 0.5) for o in (0.3, 0.5)]
WATERSHED = [{"threshold": t, "apart": d} for t in (0.5, 0.7) for d in (2, 4)]
BORDERS = [{"threshold": t, "grown": g} for t in (0.3, 0.5) for g in (1, 2)]


def _compare(seeds: Seeds, other, grid: list[dict], *, real: bool = False) -> Arms:
    stars, rest = partial(_scored, way=_stars, real=real), partial(_scored, way=other, real=real)
    best, usual = tune(stars, STARS, seeds), tune(rest, grid, seeds)
    return Arms(stars(seeds, **best), rest(seeds, **usual), {"method": best, "baseline": usual})


@claim(
    says="In noisy crowds of ellipses stars find objects better than a watershed on the same network's foreground",
    kind="superiority",
    metric="average precision",
    scale="60 pictures of 40x40 with touching ellipses, small U-Net, 250 steps of 8, 16 rays; 4 settings each",
)
def stars_beat_watershed(seeds: Seeds) -> Arms:
    return _compare(seeds, _watershed, WATERSHED)


@claim(
    says="In noisy crowds of ellipses stars find objects better than a border class of the same network does",
    kind="superiority",
    metric="average precision",
    scale="60 pictures of 40x40 with touching ellipses, small U-Net, 250 steps of 8, 16 rays; 4 settings each",
)
def stars_beat_border_class(seeds: Seeds) -> Arms:
    return _compare(seeds, _borders, BORDERS)


@claim(
    says="On a photograph of nuclei stars find them better than a watershed on the same network's foreground",
    kind="superiority",
    metric="average precision",
    scale="a picture of 125 nuclei at half size, 3/4 for training; U-Net, 250 steps of 8, 16 rays; 4 settings each",
)
def stars_beat_watershed_on_nuclei(seeds: Seeds) -> Arms:
    return _compare(seeds, _watershed, WATERSHED, real=True)


def _rebuilt(seeds: Seeds, rays, *, flat: float = 1.0) -> list[float]:
    """Mean IoU of ellipsoids with what stars keep of them, in percent; voxels are `flat` times as thick in z."""
    values = []
    for rng in seeds.numpy("ellipsoids"):
        iou = []
        for _ in range(seeds.few(12, smoke=2)):
            z, y, x = np.mgrid[-10:11, -10:11, -10:11]
            points = np.stack([x, y, flat * z], axis=-1) @ np.linalg.qr(rng.standard_normal((3, 3)))[0]
            mask = torch.from_numpy(((points / rng.uniform(5, 10, 3)) ** 2).sum(-1) <= 1)
            distances = walk(mask.long(), torch.full((1, 3), 10), rays)
            found = star_boxes(distances, rays, reach=10)[0]
            iou.append(((found & mask).sum() / (found | mask).sum()).item())
        values.append(100 * float(np.mean(iou)))
    return values


@claim(
    says="The more rays, the closer a star comes to an ellipsoid",
    kind="trend",
    metric="IoU",
    levels=(8, 16, 32, 64, 96),
    scale="12 ellipsoids with radii of 5 to 10 voxels, anyhow turned; rays on a Fibonacci lattice; nothing to tune",
)
def more_rays_come_closer(seeds: Seeds) -> Arms:
    return Arms(np.stack([_rebuilt(seeds, fibonacci_rays(n)) for n in (8, 16, 32, 64, 96)], axis=1))


@claim(
    says="Where voxels are four times as thick as wide, rays that know it draw ellipsoids better than even ones",
    kind="superiority",
    metric="IoU",
    scale="12 ellipsoids with radii of 5 to 10 voxels in the plane, slices 4 apart; 32 rays; nothing to tune",
)
def rays_know_the_voxels(seeds: Seeds) -> Arms:
    knowing = fibonacci_rays(32, spacing=(1.0, 1.0, 4.0))
    return Arms(_rebuilt(seeds, knowing, flat=4.0), _rebuilt(seeds, fibonacci_rays(32), flat=4.0))


def draw(seeds: Seeds) -> list[Panel]:
    """The real nuclei that were not trained on: as outlined by hand, as stars, by a watershed."""
    from skimage.measure import find_contours

    maps, true = (one[0] for one in _outputs(seeds.one(0), 0, real=True))
    picture = _scenes(seeds.one(0), 0, real=True)[2][0].numpy()
    ways = {"by hand": true, "stars": _stars(maps, **STARS[3]), "watershed": _watershed(maps, **WATERSHED[0])}

    def outlines(labels: Tensor) -> list[np.ndarray]:
        masks = [np.pad(labels.numpy() == k, 1) for k in labels.unique().tolist() if k]
        return [find_contours(mask.astype(float), 0.5)[0][:, ::-1] - 1 for mask in masks]

    return [
        Panel(f"{name}: {len(labels.unique()) - 1} nuclei", image=picture, polygons=outlines(labels))
        for name, labels in ways.items()
    ]
