"""CenterNet3D: do corners help to find rotated boxes of which only points on the outline are seen?

Scenes are maps of 48 by 48 cells from above. Objects are rectangles up to 60 degrees off the road, that do not overlap;
of each some points on its outline are seen, with noise, and stray points lie about. All arms share a small network that
answers in 24 by 24 cells. The headline, against detectors with anchors on KITTI and nuScenes, is not repeated here:
these claims are about what the paper adds to a centre detector, and about doing without suppression.

The rates of training were chosen on a development seed by the network without corners alone. Pictures of two scenes of
seed 0 were seen after the claims had been written.
All arms keep the best 50 boxes of an image, whatever their scores, as the warped ones have another scale.

The slowest claim took 29 minutes of a busy core: a detector of boxes in 3-D is trained for each seed and setting.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import (
    CenterBoxes,
    center_box_loss,
    center_heatmap_loss,
    decode_center_peaks,
    gaussian_heatmap_targets,
    keypoint_sensitive_warp,
)
from lossary.detection._average_precision import average_precision
from lossary.detection._overlap import ROTATED_BOX, pairwise
from lossary.detection._suppress import hard, suppress

SIDE, STRIDE, OBJECTS = 48, 2, 6
CELLS = SIDE // STRIDE
Scenes = tuple[Tensor, Tensor, Tensor]
RATES = [{"lr": 0.01}, {"lr": 0.03}]


class _Network(nn.Module):
    """Points (N, 1, 48, 48) to logits of centres and corners (N, 1, 24, 24) each, and to numbers (N, 6, 24, 24)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, stride=STRIDE, padding=1), nn.ReLU()]
        for inputs, far in ((16, 1), (24, 2), (24, 2), (24, 1)):
            layers += [nn.Conv2d(inputs, 24, 3, padding=far, dilation=far), nn.BatchNorm2d(24), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.centers, self.corners, self.numbers = (
            nn.Sequential(nn.Conv2d(24, 24, 1), nn.LeakyReLU(0.01), nn.Conv2d(24, k, 1)) for k in (1, 1, 6)
        )
        for head in (self.centers, self.corners):
            nn.init.constant_(head[-1].bias, -3.0)  # type: ignore[arg-type]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.backbone(points)
        numbers = self.numbers(seen)
        numbers = torch.cat([numbers[:, :2].sigmoid(), 5 + 5 * numbers[:, 2:4], numbers[:, 4:].tanh()], 1)
        return self.centers(seen), self.corners(seen), numbers


def _scenes(n: int, rng: np.random.Generator) -> Scenes:
    """Points (n, 1, 48, 48), boxes (n, 6, 5) in the network's cells, and which of them there are (n, 6)."""
    points, boxes = np.zeros((n, 1, SIDE, SIDE), np.float32), np.zeros((n, OBJECTS, 5), np.float32)
    mask = np.zeros((n, OBJECTS), bool)
    for i in range(n):
        placed: list[np.ndarray] = []
        wanted = int(rng.integers(2, OBJECTS + 1))
        for _ in range(60):
            box = rng.uniform([5, 5, 9, 4.5, -np.pi / 3], [SIDE - 5, SIDE - 5, 15, 7.5, np.pi / 3])
            apart = all(np.hypot(*(box[:2] - other[:2])) > (box[2] + other[2]) / 2 for other in placed)
            if apart and len(placed) < wanted:
                placed.append(box)
        seen = np.concatenate([rng.uniform(0, SIDE, (25, 2)), *(_outline(box, rng) for box in placed)])
        x, y = np.floor(seen[((seen >= 0) & (seen < SIDE)).all(1)]).astype(int).T
        points[i, 0, y, x] = 1.0
        boxes[i, : len(placed)] = np.stack(placed) / [STRIDE, STRIDE, STRIDE, STRIDE, 1]
        mask[i, : len(placed)] = True
    return torch.from_numpy(points), torch.from_numpy(boxes), torch.from_numpy(mask)


def _outline(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """20 to 40 points anywhere on the four sides, a quarter of a cell off."""
    x, y, width, height, angle = box
    n = int(rng.integers(20, 41))
    along, side = rng.uniform(-0.5, 0.5, n), rng.choice([-0.5, 0.5], n)
    long = rng.uniform(0, width + height, n) < width
    u, v = width * np.where(long, along, side), height * np.where(long, side, along)
    turned = np.stack([x + u * np.cos(angle) - v * np.sin(angle), y + u * np.sin(angle) + v * np.cos(angle)], 1)
    return turned + 0.25 * rng.standard_normal((n, 2))


@cache
def _data(seeds: Seeds, s: int) -> tuple[Scenes, Scenes]:
    rng = seeds.one(s).numpy("scenes")[0]
    return _scenes(seeds.few(240, smoke=8), rng), _scenes(seeds.few(60, smoke=3), rng)


@cache
def _outputs(seeds: Seeds, s: int, *, corners: bool, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the test scenes the probabilities of centres and corners, and the numbers, by a network trained anew."""
    (points, boxes, mask), (test, _, _) = _data(seeds, s)
    targets = gaussian_heatmap_targets(boxes, mask, height=CELLS, width=CELLS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.ids[s])
        network = _Network()
    order = seeds.one(s).torch("order")[0]
    steps = seeds.few(240, smoke=2)
    adam = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps + 1)
    for _ in range(steps):
        rows = torch.randint(len(points), (8,), generator=order)
        own = type(targets)(*(each[rows] for each in targets))
        centers, edges, numbers = network(points[rows])
        loss = center_heatmap_loss(centers, own.centers) + center_box_loss(numbers, own)
        if corners:
            loss = loss + center_heatmap_loss(edges, own.corners)
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        centers, edges, numbers = network.eval()(test)
        return centers.sigmoid(), edges.sigmoid(), numbers


def _found(seeds: Seeds, s: int, *, corners: bool, warped: bool, lr: float) -> list[CenterBoxes]:
    centers, edges, numbers = _outputs(seeds, s, corners=corners, lr=lr)
    scores = keypoint_sensitive_warp(centers, edges, numbers) if warped else centers
    return decode_center_peaks(scores, numbers, threshold=0.0)


def _true(seeds: Seeds, s: int) -> list[Tensor]:
    _, boxes, mask = _data(seeds, s)[1]
    return [own[there] for own, there in zip(boxes, mask)]


def _precision(
    seeds: Seeds, *, corners: bool, warped: bool, lr: float, iou_threshold: float | None = None
) -> list[float]:
    """Average precision of rotated boxes for each seed, after suppression where a threshold is given."""
    values = []
    for s in range(len(seeds)):
        boxes, scores = [], []
        for found in _found(seeds, s, corners=corners, warped=warped, lr=lr):
            keep = torch.arange(len(found.scores))
            if iou_threshold is not None:
                keep, _ = suppress(
                    found.boxes, found.scores, decay=hard, parameter=iou_threshold, floor=0.0, overlap=ROTATED_BOX
                )
            boxes.append(found.boxes[keep])
            scores.append(found.scores[keep])
        values.append(average_precision(boxes, scores, _true(seeds, s), overlap=ROTATED_BOX))
    return values


PLAIN = partial(_precision, corners=False, warped=False)
CORNERS = partial(_precision, corners=True, warped=False)
WARPED = partial(_precision, corners=True, warped=True)


def _compare(seeds: Seeds, method: Callable[..., list[float]], baseline: Callable[..., list[float]]) -> Arms:
    best, usual = tune(method, RATES, seeds), tune(baseline, RATES, seeds)
    return Arms(method(seeds, **best), baseline(seeds, **usual), {"method": best, "baseline": usual})


@claim(
    says="A centre detector with corner heatmap and warped scores finds rotated boxes better than one without either",
    kind="superiority",
    metric="average precision",
    scale="240 maps of 48x48 with 2 to 6 objects, 5 convolutions, 240 steps of 8; 60 maps for testing; 2 rates each",
)
def corners_and_warping_beat_centres(seeds: Seeds) -> Arms:
    return _compare(seeds, WARPED, PLAIN)


@claim(
    says="Learning a heatmap of corners beside, and not using it, makes a centre detector's boxes better",
    kind="superiority",
    metric="average precision",
    scale="240 maps of 48x48 with 2 to 6 objects, 5 convolutions, 240 steps of 8; 60 maps for testing; 2 rates each",
)
def learning_corners_helps_centres(seeds: Seeds) -> Arms:
    return _compare(seeds, CORNERS, PLAIN)


@claim(
    says="Warped scores follow the IoU of the same boxes more closely than the centres' probabilities do",
    kind="superiority",
    metric="rank correlation",
    scale="240 maps of 48x48 with 2 to 6 objects, 240 steps of 8; 60 maps for testing; 2 rates; all peaks above 0.1",
)
def warped_scores_rank_boxes(seeds: Seeds) -> Arms:
    best = tune(CORNERS, RATES, seeds)
    threshold = 0.0 if seeds.smoke else 0.1  # after two steps of training no score is that high
    warped: list[float] = []
    plain: list[float] = []
    for s in range(len(seeds)):
        centers, edges, numbers = _outputs(seeds, s, corners=True, lr=best["lr"])
        maps = keypoint_sensitive_warp(centers, edges, numbers)[:, 0]
        after, before, iou = [], [], []
        for own, found, true in zip(maps, decode_center_peaks(centers, numbers, threshold=threshold), _true(seeds, s)):
            x, y = found.boxes[:, :2].floor().long().clamp(0, CELLS - 1).T
            after.append(own[y, x])
            before.append(found.scores)
            iou.append(pairwise(ROTATED_BOX, found.boxes, true).amax(1))
        quality = torch.cat(iou).numpy()
        for scores, values in ((after, warped), (before, plain)):
            values.append(100 * float(spearmanr(torch.cat(scores).numpy(), quality).statistic))
    return Arms(warped, plain, {"both": best})


@claim(
    says="Peaks of warped scores need no suppression: rotated NMS after them does not find boxes better",
    kind="noninferiority",
    metric="average precision",
    scale="240 maps of 48x48 with 2 to 6 objects, 240 steps of 8; 60 maps for testing; 2 rates; best of 3 thresholds",
)
def peaks_need_no_suppression(seeds: Seeds) -> Arms:
    rate = tune(WARPED, RATES, seeds)
    suppressed = partial(WARPED, **rate)
    usual = tune(suppressed, [{"iou_threshold": t} for t in (0.1, 0.3, 0.5)], seeds)
    return Arms(WARPED(seeds, **rate), suppressed(seeds, **usual), {"both": rate, "baseline": usual})


def draw(seeds: Seeds) -> list[Panel]:
    """The fullest scene: points with the true boxes, heatmap of corners, what plain and warped scores find."""
    (points, boxes, mask), lr = _data(seeds.one(0), 0)[1], RATES[0]["lr"]
    edges = _outputs(seeds.one(0), 0, corners=True, lr=lr)[1]
    full = int(mask.sum(1).argmax())
    picture, there = points[full, 0].numpy(), mask[full]
    found = {
        name: _found(seeds.one(0), 0, corners=True, warped=warped, lr=lr)[full]
        for name, warped in (("plain", False), ("warped", True))
    }

    def outlines(rows: Tensor) -> list[np.ndarray]:
        return list(STRIDE * ROTATED_BOX.rows(rows.double().numpy()).reshape(-1, 4, 2))

    def best(name: str) -> Panel:
        shown = int(there.sum())  # so many as there are
        rows, scores = found[name].boxes[:shown], found[name].scores[:shown]
        labels = tuple(f"{score:.2f}" for score in scores.tolist())
        return Panel(f"best {shown}, {name} scores", picture, None, outlines(rows), STRIDE * rows[:, :2], labels)

    scene = Panel("points seen and true boxes", picture, polygons=outlines(boxes[full, there]))
    heat = edges[full, 0].repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    return [scene, Panel("heatmap of corners", heat.numpy()), best("plain"), best("warped")]
