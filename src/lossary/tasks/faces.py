"""Faces to find, and candidates that no one here drew: MTCNN's three networks on photographs.

The networks (Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks")
are plain torch here; their weights come with the PyPI package mtcnn, which needs no TensorFlow for that.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lossary import require
from lossary.errors import BadInput
from lossary.tasks import task
from lossary.tasks.seeds import Seeds

ROWS, COLUMNS, CELL = 2, 3, 100  # a collage's cells, of so many pixels
SHRINK = 0.709  # from one level of the image pyramid to the next, about half the area


class _Stage(nn.Module):
    """Convolutions with PReLU and pooling, perhaps a dense layer, then heads: boxes first, face or not last."""

    def __init__(self, convolutions: list[tuple[int, int, int]], dense: tuple[int, int] | None, heads: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels, side, pool in convolutions:
            layers += [nn.Conv2d(width, channels, side), nn.PReLU(channels)]
            if pool:
                layers.append(nn.MaxPool2d(pool, 2, ceil_mode=True))
            width = channels
        self.trunk = nn.Sequential(*layers)
        self.dense = nn.Sequential(nn.Linear(*dense), nn.PReLU(dense[1])) if dense else None
        self.heads = nn.ModuleList(nn.Linear(dense[1], n) if dense else nn.Conv2d(width, n, 1) for n in heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of pixels -1 to 1 the moves of the corners (N, 4, ...), relative to the side, and the face's probability."""
        x = self.trunk(x)
        if self.dense is not None:
            x = self.dense(x.permute(0, 3, 2, 1).flatten(1))  # columns before rows, as the networks were trained
        return self.heads[0](x), self.heads[-1](x).softmax(1)[:, 1]


_PLANS = {
    "pnet": ([(10, 3, 2), (16, 3, 0), (32, 3, 0)], None, (4, 2)),
    "rnet": ([(28, 3, 3), (48, 3, 3), (64, 2, 0)], (576, 128), (4, 2)),
    "onet": ([(32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)], (1152, 256), (4, 10, 2)),
}


@cache
def face_networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """The proposing, the refining and the output network, with the published weights.

    Raises:
        BadInput: the package mtcnn is not installed.
    """
    spec = find_spec("mtcnn")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("mtcnn: not installed, and the weights of the face networks come with it: pip install mtcnn")
    import joblib

    stages = []
    for name, plan in _PLANS.items():
        stage = _Stage(*plan)
        arrays = joblib.load(Path(spec.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4")
        with torch.no_grad():
            for parameter, array in zip(stage.parameters(), arrays, strict=True):
                parameter.copy_(_to_torch(array).view_as(parameter))
        stages.append(stage.eval().requires_grad_(False))
    return stages[0], stages[1], stages[2]


def _to_torch(array: NDArray[np.float32]) -> Tensor:
    """From TensorFlow's layout (height, width, in, out) or (in, out) to torch's."""
    return (
        torch.from_numpy(array).permute(*{4: (3, 2, 0, 1), 3: (2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]).contiguous()
    )


@torch.no_grad()
def face_candidates(
    image: Tensor, *, smallest: float = 24.0, thresholds: tuple[float, float, float] = (0.6, 0.5, 0.1)
) -> tuple[Tensor, Tensor]:
    """What MTCNN proposes in a picture before anything is suppressed: boxes (N, 4) and scores (N,), best first.

    The three networks in a row: the first looks at an image pyramid, the others at what is left, refined each time.
    The original suppresses after every stage; here overlapping candidates stay.

    Args:
        image: (3, H, W) float32, 0 to 1.
        smallest: side of the smallest face looked for, in pixels.
        thresholds: of the face's probability after each stage.

    Raises:
        ValueError: an image of another shape or dtype. BadInput: see `face_networks`.
    """
    require.floating("image", image, dims=3)
    if image.shape[0] != 3:
        raise ValueError(f"image: expected 3 channels, got shape {tuple(image.shape)}")
    propose, refine, output = face_networks()
    pixels = (2 * image - 1)[None]
    boxes, scores = _proposals(propose, pixels, 12 / smallest, thresholds[0])
    for network, side, threshold in ((refine, 24, thresholds[1]), (output, 48, thresholds[2])):
        if len(boxes):
            boxes = _square(boxes)
            moves, scores = network(_crops(pixels, boxes, side))
            boxes = _moved(boxes, moves)[scores >= threshold]
            scores = scores[scores >= threshold]
    order = scores.argsort(descending=True, stable=True)
    return boxes[order], scores[order]


def _proposals(network: nn.Module, pixels: Tensor, scale: float, threshold: float) -> tuple[Tensor, Tensor]:
    boxes, scores = [pixels.new_zeros(0, 4)], [pixels.new_zeros(0)]
    height, width = pixels.shape[2:]
    while min(height, width) * scale >= 12:
        size = int(height * scale + 1), int(width * scale + 1)
        moves, face = network(F.interpolate(pixels, size=size, mode="area"))
        row, column = (face[0] >= threshold).nonzero(as_tuple=True)
        corner = 2 * torch.stack([column, row], dim=-1)
        window = torch.cat([corner, corner + 12], dim=-1) * torch.tensor([width / size[1], height / size[0]] * 2)
        boxes.append(_moved(window, moves[0][:, row, column].T))
        scores.append(face[0, row, column])
        scale *= SHRINK
    return torch.cat(boxes), torch.cat(scores)


def _moved(boxes: Tensor, moves: Tensor) -> Tensor:
    return boxes + moves * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def _square(boxes: Tensor) -> Tensor:
    """Of the same centre, the longer side on both axes."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], dim=1)


def _crops(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What is in the boxes, (N, 3, side, side): means of two by two bilinear samples, grey outside of the image."""
    height, width = pixels.shape[2:]
    step = (torch.arange(2 * side) + 0.5) / (2 * side)
    x, y = (boxes[:, k, None] + (boxes[:, k + 2, None] - boxes[:, k, None]) * step for k in (0, 1))
    grid = torch.stack(
        [
            (2 * x / width - 1)[:, None].expand(-1, 2 * side, -1),
            (2 * y / height - 1)[..., None].expand(-1, -1, 2 * side),
        ],
        dim=-1,
    )
    rows = F.grid_sample(pixels, grid.reshape(1, -1, 2 * side, 2), align_corners=False)
    return F.avg_pool2d(rows[0].unflatten(1, (len(boxes), 2 * side)).transpose(0, 1), 2)


@dataclass(frozen=True)
class FaceScenes:
    """Collages of each seed: images (S, n, 3, H, W) float32, 0 to 1, and true boxes (S, n, T, 4) in pixels.

    A true box is the square around a pasted oval: a face from the hair to the chin.
    """

    images: Tensor
    truth: Tensor


@task(version=1)
def face_collages(seeds: Seeds, n: int, *, pairs: bool) -> FaceScenes:
    """Real faces, 34 to 60 pixels wide, pasted onto photographs of brick, grass and gravel: six cells of 100 pixels.

    The faces are the hundred that scikit-image ships (from Labeled Faces in the Wild, grey). In pairs two faces of one
    size share a cell, the second over the first, their squares at an IoU of 0.15 to 0.4; else a cell has one.

    Args:
        seeds: stream "collages".
        n: collages of each seed, >= 1.
        pairs: two faces in a cell, or one.

    Raises:
        ValueError: `n` below 1.
    """
    require.whole("n", n, at_least=1)
    from skimage import data, transform

    faces = data.lfw_subset()[:100]
    grounds = [picture / 255 for picture in (data.brick(), data.grass(), data.gravel())]
    images, truth = [], []
    for rng in seeds.numpy("collages"):
        for _ in range(n):
            y, x = rng.integers(0, 512 - CELL * np.array([ROWS, COLUMNS]))
            image = 0.7 * grounds[rng.integers(3)][y : y + CELL * ROWS, x : x + CELL * COLUMNS]
            for cell in np.ndindex(ROWS, COLUMNS):
                side = int(rng.integers(34, 61))
                shift = _shift(rng, side) if pairs else np.zeros((1, 2), int)
                corner = CELL * np.array(cell) + rng.integers(0, CELL - side - shift.max(0), 2)
                for top, left in corner + shift:
                    face = transform.resize(faces[rng.integers(100)], (side, side), order=3).clip(0, 1)
                    under = image[top : top + side, left : left + side]
                    under += _oval(side) * (face - under)
                    truth.append([left, top, left + side, top + side])
            images.append(image)
    shape = len(seeds), n
    stacked = torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1)
    return FaceScenes(stacked.unflatten(0, shape), torch.tensor(truth).float().reshape(*shape, -1, 4))


def _oval(side: int) -> NDArray[np.float64]:
    """How much of a pasted square hides what is below, 0 to 1: an oval with a soft edge."""
    axis = np.abs((np.arange(side) + 0.5) * 2 / side - 1)
    radius = np.hypot(axis[:, None], axis / 0.85)
    return np.clip((1.05 - radius) / 0.1, 0, 1)


def _shift(rng: np.random.Generator, side: int) -> NDArray[np.int64]:
    """Corners (2, 2) of two squares, y before x, at an IoU of 0.15 to 0.4: one to the right of the other, or below."""
    overlap = rng.uniform(0.15, 0.4)
    common = 2 * overlap / (1 + overlap)  # of the area of one of them
    share = common ** rng.uniform(0, 1)
    far = np.rint(side * (1 - np.array([share, common / share]))).astype(int)
    return np.stack([np.zeros(2, int), np.minimum(far, CELL - side - 1)])
