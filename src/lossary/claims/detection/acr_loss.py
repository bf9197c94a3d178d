"""ACR loss: does a pull that grows with a landmark's difficulty place landmarks better than squared error?

Faces are twenty landmarks that follow four smooth modes, eyes and mouth moving on their own besides, drawn as dots of
three shades. A perceptron regresses the coordinates.
"""

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import SmoothFace, acr_loss, landmark_difficulty
from lossary.tasks import fit, stacked_mlp

SIZE, TRAIN, TEST, STEPS = 16, 800, 300, 500
RATES = (0.001, 0.002, 0.004, 0.008)
# Jaw, brows, nose, eyes, mouth; in units of the image's side, its centre being the origin.
FACE = np.array(
    "-.34 -.05 -.28 .2 -.1 .36 .1 .36 .28 .2 .34 -.05 -.26 -.26 -.1 -.28 .1 -.28 .26 -.26 0 -.12 0 .05"
    " -.24 -.14 -.1 -.14 .1 -.14 .24 -.14 -.13 .18 0 .15 .13 .18 0 .22".split(),
    float,
).reshape(20, 2)
SHADE = np.repeat([0.6, 1.0, -1.0], [12, 4, 4])


@cache
def _faces(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Pictures (S, N, 256) and landmarks (S, N, 40), x and y in turn, in units of the image's side."""
    x, y = FACE.T
    modes = np.stack([np.stack(m, -1) for m in ((x, 0 * y), (0 * x, y), (0.3 - x**2, 0 * y), (-y, x))])
    count = seeds.few(TRAIN, smoke=24) + seeds.few(TEST, smoke=8)
    grid = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    pictures, landmarks = [], []
    for rng in seeds.numpy("faces"):
        smooth = FACE + np.tensordot(rng.standard_normal((count, 4)) * [0.12, 0.12, 0.3, 0.12], modes, 1)
        moving = np.r_[np.full(12, 0.005), np.full(8, 0.04)]
        points = smooth + rng.standard_normal(smooth.shape) * moving[:, None]
        across, down = (np.exp(-((grid - points[..., i, None]) ** 2) / (2 * 0.05**2)) for i in (0, 1))
        picture = np.einsum("l,nlh,nlw->nhw", SHADE, down, across) + 0.2 * rng.standard_normal((count, SIZE, SIZE))
        pictures.append(torch.from_numpy(picture).float().flatten(1))
        landmarks.append(torch.from_numpy(points).float().flatten(1))
    return torch.stack(pictures), torch.stack(landmarks)


def _found(seeds: Seeds, *, loss: str, lr: float, share: float = 0.9) -> tuple[Tensor, Tensor]:
    """Landmarks of the test pictures as they are found and as they are, (S, n, 20, 2).

    The loss is "acr", "squared", or "acr" with one number for the difficulty of all: "0.5", "1".
    """
    x, y = _faces(seeds)
    train = x.shape[1] - seeds.few(TEST, smoke=8)
    if loss == "acr":
        known = y[:, :train]
        difficulty = torch.stack([landmark_difficulty(f, SmoothFace(f)(f, share=share)) for f in known])
    else:
        difficulty = torch.full_like(y[:, :train], 0.0 if loss == "squared" else float(loss))

    def values(z: Tensor, target: Tensor, *, index: Tensor) -> Tensor:
        if loss == "squared":
            return (z - target).square().mean(-1)
        phi = difficulty.gather(1, index.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return acr_loss(z, target, difficulty=phi)

    model = stacked_mlp((SIZE * SIZE, 64, y.shape[-1]), seeds)
    fit(
        model,
        x[:, :train],
        y[:, :train],
        loss=values,
        seeds=seeds,
        steps=seeds.few(STEPS),
        optimizer=partial(torch.optim.Adam, lr=lr),
    )
    with torch.no_grad():
        found = model(x[:, train:]).unflatten(-1, (20, 2))
    return found, y[:, train:].unflatten(-1, (20, 2))


def _errors(seeds: Seeds, **setting: object) -> Tensor:
    """Distance of each test landmark from its place, over that between the outer corners of the eyes: (S, n, 20)."""
    found, true = _found(seeds, **setting)
    eyes = (true[:, :, 15] - true[:, :, 12]).norm(dim=-1, keepdim=True)
    return 100 * (found - true).norm(dim=-1) / eyes


def _error(seeds: Seeds, **setting: object) -> list[float]:
    """Normalised mean error in percent."""
    return _errors(seeds, **setting).mean((1, 2)).tolist()


def _moving_error(seeds: Seeds, **setting: object) -> list[float]:
    """The same of eyes and mouth alone."""
    return _errors(seeds, **setting)[..., 12:].mean((1, 2)).tolist()


SQUARED = [{"loss": "squared", "lr": lr} for lr in RATES]
ADAPTIVE = [{"loss": "acr", "lr": lr} for lr in RATES]


@claim(
    says="ACR places landmarks better than squared error",
    kind="ratio",
    metric="landmark error",
    margin=0.95,
    scale="800 synthetic faces of 20 landmarks, 16x16 pixels, MLP 256-64-40, 500 steps of 64, Adam; 4 settings each",
)
def acr_beats_squared_error(seeds: Seeds) -> Arms:
    method = tune(_error, ADAPTIVE, seeds, better="lower")
    baseline = tune(_error, SQUARED, seeds, better="lower")
    return Arms(_error(seeds, **method), _error(seeds, **baseline), {"method": method, "baseline": baseline})


@claim(
    says="ACR places the landmarks that move on their own better than squared error",
    kind="ratio",
    metric="landmark error",
    margin=0.95,
    scale="eyes and mouth of 300 synthetic faces, 800 to train on, 16x16 pixels, MLP, 500 steps; 4 settings each",
)
def acr_beats_squared_error_on_hard_landmarks(seeds: Seeds) -> Arms:
    method = tune(_moving_error, ADAPTIVE, seeds, better="lower")
    baseline = tune(_moving_error, SQUARED, seeds, better="lower")
    chosen = {"method": method, "baseline": baseline}
    return Arms(_moving_error(seeds, **method), _moving_error(seeds, **baseline), chosen)


@claim(
    says="A difficulty for each landmark beats one for all of them",
    kind="ratio",
    metric="landmark error",
    margin=0.98,
    scale="as the first; share of variance 0.8 or 0.95 against a difficulty of 0.5 or 1 everywhere; 4 settings each",
)
def difficulty_of_each_landmark_matters(seeds: Seeds) -> Arms:
    own = [{"loss": "acr", "share": share, "lr": lr} for share in (0.8, 0.95) for lr in RATES[1:3]]
    one = [{"loss": phi, "lr": lr} for phi in ("0.5", "1") for lr in RATES[1:3]]
    method, baseline = tune(_error, own, seeds, better="lower"), tune(_error, one, seeds, better="lower")
    return Arms(_error(seeds, **method), _error(seeds, **baseline), {"method": method, "baseline": baseline})


def draw(seeds: Seeds) -> list[Panel]:
    """Two test faces: their landmarks, the smooth face, and what either loss finds."""
    seed = seeds.one(0)
    x, y = (part[0] for part in _faces(seed))
    test = len(y) - seed.few(TEST, smoke=8)
    smooth = SmoothFace(y[:test])(y[test:]).unflatten(-1, (20, 2))
    squared, true = _found(seed, loss="squared", lr=0.004)
    adaptive, _ = _found(seed, loss="acr", lr=0.004)
    panels = []
    for face in range(2):
        image = 0.5 + 0.4 * x[test + face].view(SIZE, SIZE).numpy()
        shown = {"true": true[0], "smooth face": smooth, "squared error": squared[0], "ACR": adaptive[0]}
        panels += [Panel(title, image, points=(SIZE * (p[face] + 0.5)).numpy()) for title, p in shown.items()]
    return panels
