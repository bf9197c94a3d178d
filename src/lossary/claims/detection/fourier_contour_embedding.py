"""Fourier contours: do 22 Fourier numbers hold more of a shape than 22 others, also when a network predicts them?

Ribbons are strips bent along a sine. Real outlines come from photographs that scikit-image ships: the letters of a
printed page and of a formula, coins, a horse; the truth is the thresholded photograph's own outline.

The slowest claim took 7 minutes of a busy core: a detector is trained for each seed and setting.
"""

from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import fourier_contour_decode, fourier_contour_encode, fourier_contour_loss
from lossary.detection._render import polygon_mask
from lossary.tasks import fit, stacked_mlp

SHAPES = 60
GRID = 128  # side of the grid on which outlines are compared, in pixels
SIDE = 20  # of the pictures that a network sees
DEGREE = 5  # 22 numbers: as many as 11 corners, or a centre and 20 rays


def _ribbons(rng: np.random.Generator, n: int) -> Tensor:
    """Strips 80 long and 5 to 9 wide, bent by up to one and a half periods of a sine, anyhow turned: (n, 96, 2)."""
    s = np.linspace(-1, 1, 48)
    bend, depth, phase, half, turn = rng.uniform(
        [[0.75], [6.0], [0.0], [2.5], [0.0]], [[1.5], [14.0], [2 * np.pi], [4.5], [2 * np.pi]], (5, n)
    )[..., None]
    x, y = 40 * s + 0 * depth, depth * np.sin(np.pi * bend * s + phase)
    slope = depth * np.pi * bend / 40 * np.cos(np.pi * bend * s + phase)
    normal = half * np.stack([-slope, np.ones_like(slope)]) / np.sqrt(1 + slope**2)
    x, y = np.concatenate([np.stack([x, y]) + normal, (np.stack([x, y]) - normal)[..., ::-1]], axis=2)
    turned = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], axis=-1)
    return torch.from_numpy(turned + GRID / 2)


@cache
def _photographed() -> tuple[Tensor, ...]:
    """Outlines (P, 2) of at least 40 pixels' area in four photographs, scaled to the grid."""
    from skimage import data, filters, measure

    page, text, coins = data.page(), data.text(), data.coins()
    pictures = (
        page < filters.threshold_local(page, 35, offset=15),
        text < filters.threshold_local(text, 51, offset=10),
        coins > filters.threshold_otsu(coins),
        ~data.horse(),
    )
    found = []
    for picture in pictures:
        for outline in measure.find_contours(np.pad(picture, 1).astype(float), 0.5):
            x, y = outline[:-1, ::-1].T
            area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
            if area >= 40:  # the outer outlines: holes run the other way round
                low, high = outline.min(0), outline.max(0)
                scaled = (outline[:-1] - (low + high) / 2) * 100 / (high - low).max() + GRID / 2
                found.append(torch.from_numpy(scaled[:, ::-1].copy()))
    return tuple(found)


def _drawn(outlines: Tensor) -> Tensor:
    return polygon_mask(outlines, GRID, GRID)


def _fourier(outline: Tensor) -> Tensor:
    return fourier_contour_decode(fourier_contour_encode(outline, degree=DEGREE), points=200)


def _corners(outline: Tensor) -> Tensor:
    """Eleven corners at equal distances along the outline."""
    return _along(outline, 11)


def _polar(outline: Tensor) -> Tensor:
    """The farthest crossings of 20 rays from the centre of the outline with it; the centre where a ray meets none."""
    dense = _along(outline, 400)
    centre = dense.mean(0)
    angle = torch.arange(20, dtype=torch.float64) / 20 * 2 * torch.pi
    ray = torch.stack([angle.cos(), angle.sin()], dim=1)
    start, edge = dense - centre, dense.roll(-1, 0) - dense
    cross = ray[:, :1] * edge[:, 1] - ray[:, 1:] * edge[:, 0]
    cross = torch.where(cross == 0, torch.nan, cross)
    far = (start[:, 0] * edge[:, 1] - start[:, 1] * edge[:, 0]) / cross
    along = (start[:, 0] * ray[:, 1:] - start[:, 1] * ray[:, :1]) / cross
    reached = torch.where((along >= 0) & (along < 1) & (far > 0), far, 0.0)
    return centre + reached.amax(1, keepdim=True) * ray


def _along(outline: Tensor, n: int) -> Tensor:
    closed = torch.cat([outline, outline[:1]]).numpy()
    way = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1)))
    places = np.arange(n) / n * way[-1]
    return torch.from_numpy(np.stack([np.interp(places, way, closed[:, k]) for k in (0, 1)], axis=1))


def _iou(found: Tensor, true: Tensor) -> Tensor:
    """In percent, of masks."""
    return 100 * (found & true).sum((-2, -1)) / (found | true).sum((-2, -1)).clamp(min=1)


def _kept(seeds: Seeds, way, *, real: bool = False) -> list[float]:
    """Mean IoU of each seed's outlines with what is left of them."""
    values = []
    for rng in seeds.numpy("shapes"):
        n = seeds.few(SHAPES)
        pool = _photographed()
        outlines = [pool[i] for i in rng.choice(len(pool), n, replace=False)] if real else list(_ribbons(rng, n))
        iou = [_iou(_drawn(way(o)[None]), _drawn(o[None])) for o in outlines]
        values.append(torch.stack(iou).mean().item())
    return values


@claim(
    says="22 Fourier numbers keep more of a bent ribbon than 11 even corners do",
    kind="superiority",
    metric="IoU",
    scale="60 ribbons 80 long and 5 to 9 wide, bent by 0.75 to 1.5 periods; degree 5; nothing to tune",
)
def fourier_beats_corners(seeds: Seeds) -> Arms:
    return Arms(_kept(seeds, _fourier), _kept(seeds, _corners))


@claim(
    says="22 Fourier numbers keep more of a bent ribbon than a centre and 20 rays do",
    kind="superiority",
    metric="IoU",
    scale="60 ribbons 80 long and 5 to 9 wide, bent by 0.75 to 1.5 periods; degree 5; nothing to tune",
)
def fourier_beats_rays(seeds: Seeds) -> Arms:
    return Arms(_kept(seeds, _fourier), _kept(seeds, _polar))


@claim(
    says="22 Fourier numbers keep more of the outlines in photographs than 11 even corners do",
    kind="superiority",
    metric="IoU",
    scale="60 of the outlines of letters, coins and a horse in four photographs of scikit-image; degree 5; no tuning",
)
def fourier_beats_corners_in_photographs(seeds: Seeds) -> Arms:
    return Arms(_kept(seeds, _fourier, real=True), _kept(seeds, _corners, real=True))


def _pictures(seeds: Seeds, n: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures (S, n, 400) of a ribbon each, and its corners (S, n, 96, 2), in units of half the picture."""
    pictures, outlines = [], []
    for rng in seeds.numpy("pictures"):
        ribbons = _ribbons(rng, n)
        fine = torch.cat([_drawn(part) for part in ribbons[:, ::4].split(100)])[:, 14:114, 14:114].float()
        small = F.avg_pool2d(fine, 100 // SIDE)
        noise = torch.from_numpy(rng.standard_normal(small.shape)).float()
        pictures.append((small + 0.1 * noise).flatten(1))
        outlines.append((ribbons - GRID / 2) / 50)
    return torch.stack(pictures), torch.stack(outlines).float()


def _learned(seeds: Seeds, *, head: str, lr: float) -> Tensor:
    """Mean IoU of the outlines that a network finds in new pictures, per seed."""
    train, test = seeds.few(800, smoke=16), seeds.few(100)
    x, outlines = _pictures(seeds, train + test)
    y = fourier_contour_encode(outlines, degree=DEGREE)
    if head == "corners":  # evenly along the outline from where the code starts
        y = fourier_contour_decode(fourier_contour_encode(outlines, degree=40), points=11)
    losses = {
        "points": lambda z, y: fourier_contour_loss(z.unflatten(-1, (-1, 2)), y.unflatten(-1, (-1, 2))),
        "coefficients": lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(-1),
        "corners": lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(-1),
    }
    model = stacked_mlp((SIDE * SIDE, 64, 64, 22), seeds)
    adam = partial(torch.optim.Adam, lr=lr)
    fit(
        model,
        x[:, :train],
        y[:, :train].flatten(2),
        loss=losses[head],
        seeds=seeds,
        steps=seeds.few(300),
        optimizer=adam,
    )
    with torch.no_grad():
        found = model(x[:, train:]).unflatten(-1, (-1, 2)).double()
    if head != "corners":
        found = fourier_contour_decode(found, points=50)
    found, true = (50 * o + GRID / 2 for o in (found, outlines[:, train:].double()))
    return torch.stack([_iou(_drawn(f), _drawn(t)).mean() for f, t in zip(found, true)])


RATES = [0.0003, 0.001, 0.003, 0.01]


def _heads(seeds: Seeds, method: str, baseline: str) -> Arms:
    best = {
        head: tune(partial(_learned, head=head), [{"lr": lr} for lr in RATES], seeds) for head in (method, baseline)
    }
    return Arms(_learned(seeds, head=method, **best[method]), _learned(seeds, head=baseline, **best[baseline]), best)


@claim(
    says="A network that predicts a Fourier code finds a bent ribbon better than one that predicts 11 even corners",
    kind="superiority",
    metric="IoU",
    scale="one noisy ribbon in 20x20 pixels, 800 pictures, MLP 400-64-64-22, 300 steps of Adam; 4 rates each",
)
def fourier_head_beats_corners(seeds: Seeds) -> Arms:
    return _heads(seeds, "points", "corners")


@claim(
    says="Comparing points of the outlines trains a Fourier code better than comparing coefficients",
    kind="superiority",
    metric="IoU",
    scale="one noisy ribbon in 20x20 pixels, 800 pictures, MLP 400-64-64-22, 300 steps of Adam; 4 rates each",
)
def points_beat_coefficients(seeds: Seeds) -> Arms:
    return _heads(seeds, "points", "coefficients")


def draw(seeds: Seeds) -> list[Panel]:
    """A ribbon, the horse and a letter under more and more coefficients, and as 11 corners."""
    letters, horse = _photographed()[:-1], max(_photographed(), key=len)
    shapes = {"ribbon": _ribbons(seeds.numpy("shapes")[0], 1)[0], "horse": horse, "letter": letters[0]}
    panels = []
    for name, outline in shapes.items():
        truth = 0.8 * (1 - _drawn(outline[None])[0].double().numpy()) + 0.2
        for degree in (2, 5, 12):
            code = fourier_contour_encode(outline, degree=degree)
            found = fourier_contour_decode(code, points=200).numpy()
            panels.append(Panel(f"{name}, {4 * degree + 2} Fourier numbers", image=truth, polygons=[found]))
        panels.append(Panel(f"{name}, 11 corners (22 numbers)", image=truth, polygons=[_corners(outline).numpy()]))
    return panels
