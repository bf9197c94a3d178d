"""Star-convex shapes in 2-D and 3-D: a centre that sees its whole boundary, and the distance to it along fixed rays.

Neighbouring rays span cones, triangles in 2-D and tetrahedra in 3-D. A point q = sum_i w_i u_i in the cone of the rays
u_i lies inside the shape with distances d if sum_i w_i / d_i <= 1. Cone and weights do not depend on the shape, so a
table of them turns any number of shapes into pixels. Pixels and voxels are points at whole numbers; coordinates run
x, y, z, the axes of an image the other way round: [z, y, x].
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lossary.detection._overlap import Overlap

WORD = 48  # voxels along x in one number of a row, a bit each: a double holds whole numbers below 2^53
HEADER = 12  # of a row: lower ends x, y, z; upper ends x, y, z, past the last voxel; first word, y and z; lines in y,
# words in a line; voxels


class Rays(NamedTuple):
    """Directions in which distances are measured, and the cones between them.

    Attributes:
        directions: (R, D) unit vectors x, y[, z], D = 2 or 3.
        faces: (F, D) the rays at the corners of each cone; cones fill the space and share only their sides.
    """

    directions: Float[Tensor, "rays dim"]
    faces: Int[Tensor, "faces dim"]


def star_vertices(
    centres: Float[Tensor, "n dim"], distances: Float[Tensor, "n rays"], rays: Rays
) -> Float[Tensor, "n rays dim"]:
    """Where the rays end, c + d_k u_k."""
    return centres[:, None] + distances[..., None] * rays.directions.to(distances)


def star_volume(distances: Float[Tensor, "*batch rays"], rays: Rays) -> Float[Tensor, "*batch"]:
    """Area in 2-D, volume in 3-D: the sum over cones of |det(u_i, ...)| prod_i d_i / D!."""
    spanned = rays.directions[rays.faces].det().abs().to(distances)
    return (distances[..., rays.faces].prod(-1) * spanned).sum(-1) / math.factorial(rays.faces.shape[1])


def walk(labels: Int[Tensor, "*shape"], start: Int[Tensor, "n dim"], rays: Rays) -> Float[Tensor, "n rays"]:
    """Distances along the rays from some pixels to where the label ends.

    In steps of 1 until the nearest pixel has another label or lies outside the image; 1 - 1 / (2 max |u|) of the last
    step is taken back, as the boundary lies half way.

    Args:
        labels: [z,] y, x.
        start: indices into it, in the order of its axes.
        rays: of as many dimensions.
    """
    directions = rays.directions.to(labels.device).flip(1)  # in the order of the axes
    last = torch.tensor(labels.shape, device=labels.device) - 1
    mine = labels[start.unbind(1)]
    pixel = torch.arange(len(start), device=labels.device).repeat_interleave(len(directions))
    ray = torch.arange(len(directions), device=labels.device).repeat(len(start))
    back = 1 - 0.5 / directions.abs().amax(1)
    found = torch.zeros(len(start), len(directions), device=labels.device)
    step = 0
    while len(pixel):
        step += 1
        place = (start[pixel] + step * directions[ray]).round().long()
        here = labels[place.clamp(min=0).minimum(last).unbind(1)]
        ended = (here != mine[pixel]) | ((place < 0) | (place > last)).any(1)
        found[pixel[ended], ray[ended]] = (step - back[ray[ended]]).float()
        pixel, ray = pixel[~ended], ray[~ended]
    return found


def star_boxes(
    distances: Float[Tensor, "n rays"], rays: Rays, *, reach: int | None = None
) -> Bool[Tensor, "n side side ..."]:
    """Which voxels each shape holds, in a box of side 2 reach + 1 about its centre: (N, [z,] y, x).

    A shape with a distance that is not a positive finite number is empty.

    Args:
        distances: in voxels.
        rays: of R directions.
        reach: half the box; None takes the largest distance.
    """
    sound = (distances.isfinite() & (distances > 0)).all(1)
    depth = torch.where(sound[:, None], distances, 1.0).double().cpu()
    reach = math.ceil(depth.max()) if reach is None and depth.numel() else reach or 0
    index, weight = _cones(reach, rays)
    held = torch.zeros(len(depth), len(index), dtype=torch.bool)
    for box, row in zip(held, depth):
        box.copy_((weight / row[index]).sum(-1) <= 1.0 + 1e-9)
    held &= sound[:, None].cpu()
    return held.view(-1, *[2 * reach + 1] * rays.faces.shape[1]).to(distances.device)


def star_overlap(rays: Rays) -> Overlap:
    """Voxels that two shapes share, over those of the smaller one. A shape is a row: centre (D,), distances (R,).

    Centres are rounded to voxels. What holds few voxels is measured roughly.
    """
    return Overlap(_shared, bounds=lambda rows: rows[:, :6], rows=lambda shapes: _packed(shapes, rays))


def _cones(reach: int, rays: Rays) -> tuple[Tensor, Tensor]:
    """Of the points at whole numbers in -reach to reach, z slowest: the rays of their cone and the weights, (K, D)."""
    directions, faces = rays.directions.double().cpu(), rays.faces.cpu()
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    points = torch.cartesian_prod(*[steps] * faces.shape[1]).flip(1)
    inverse = directions[faces].inverse()
    index, weight = [], []
    for part in points.split(1 << 14):
        weights = torch.einsum("qd,fdi->qfi", part, inverse)
        face = weights.amin(2).argmax(1)  # in its own cone a point has no negative weight
        index.append(faces[face])
        weight.append(weights[torch.arange(len(part)), face].clamp(min=0.0))
    return torch.cat(index), torch.cat(weight)


def _packed(shapes: NDArray, rays: Rays) -> NDArray:
    """The rows that `_shared` compares: a header and the shape's voxels, a bit each. Empty shapes have no bounds."""
    if not len(shapes):
        return np.empty((0, HEADER))
    dim = rays.faces.shape[1]
    held = star_boxes(torch.from_numpy(shapes[:, dim:]), rays).numpy()
    side = held.shape[-1]
    held = held.reshape(len(held), -1, side, side)  # (N, z, y, x)
    centre = np.zeros((len(held), 3))
    centre[:, :dim] = np.rint(shapes[:, :dim])
    finite = np.isfinite(centre).all(1)
    start = np.where(finite[:, None], centre, 0.0).astype(np.int64) - [side // 2, side // 2, held.shape[1] // 2]

    words = (side + WORD - 2) // WORD + 1
    lines = np.zeros((*held.shape[:3], words * WORD), bool)
    column = start[:, :1] % WORD + np.arange(side)
    np.put_along_axis(lines, np.broadcast_to(column[:, None, None], held.shape), held, axis=3)
    numbers = lines.reshape(len(held), -1, WORD) @ np.exp2(np.arange(WORD))

    header = np.full((len(held), HEADER), np.nan)
    for axis in range(3):
        line = held.any(tuple(a for a in (1, 2, 3) if a != 3 - axis))
        header[:, axis] = start[:, axis] + line.argmax(1)
        header[:, 3 + axis] = start[:, axis] + line.shape[1] - line[:, ::-1].argmax(1)
    header[:, 6], header[:, 7:9], header[:, 9:11] = start[:, 0] // WORD, start[:, 1:], (side, words)
    header[:, 11] = held.sum((1, 2, 3))
    header[(header[:, 11] == 0) | ~finite, :6] = np.nan
    return np.concatenate([header, numbers], axis=1)


def _shared(a: Any, b: Any) -> Any:
    shared = 0
    for z in range(int(max(a[2], b[2])), int(min(a[5], b[5]))):
        for y in range(int(max(a[1], b[1])), int(min(a[4], b[4]))):
            line_a = HEADER + int(((z - a[8]) * a[9] + y - a[7]) * a[10] - a[6])
            line_b = HEADER + int(((z - b[8]) * b[9] + y - b[7]) * b[10] - b[6])
            for word in range(int(max(a[6], b[6])), int(min(a[6] + a[10], b[6] + b[10]))):
                both = int(a[line_a + word]) & int(b[line_b + word])
                while both != 0:
                    both &= both - 1
                    shared += 1
    return shared / min(a[11], b[11])
