"""StarDist: every pixel proposes the whole object it lies in, as distances to the boundary along fixed rays.

Proposals come with the probability of being central, the better suppress the others by the overlap of their own
shapes, and what is left is drawn. So objects that touch stay apart, which thresholds and watersheds cannot promise,
and noise inside an object does not break it up. Try it for cells, nuclei and grains that are crowded and roughly
convex, in 2-D and in volumes; give the size of a voxel where slices are thick. Long, bent or branching objects are
not star-convex: a centre does not see their whole boundary, and they come out cropped.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.spatial import ConvexHull
from torch import Tensor

from lossary import require
from lossary.detection._stars import Rays, star_boxes, star_overlap, walk
from lossary.detection._suppress import hard, suppress
from lossary.paper import Paper

PAPER = Paper(
    title="Star-convex Polyhedra for 3D Object Detection and Segmentation in Microscopy",
    year=2020,
    helps=("odd-shapes", "crowded-scenes"),
    departs=(
        "the loss is the paper's, pixel by pixel; the official code divides the distances' part by the mean probability"
        " of the batch and regularises by 1 - p",
        "overlaps count pixels in 2-D too, where the official code clips polygons",
        "distances in 3-D end half way as in 2-D; the official code's go on to the first voxel outside",
        "proposals at the image's border compete; the official code leaves out a margin of two pixels",
        "coordinates and voxel sizes run x, y, z; the official code's run z, y, x",
    ),
    equation=r"L = \mathrm{BCE}(p, \hat p) + \lambda_d \Bigl( p \cdot \tfrac1n \sum_k |d_k - \hat d_k|"
    r" + \lambda_{\mathrm{reg}} [p = 0] \cdot \tfrac1n \sum_k |\hat d_k| \Bigr)",
    url="https://arxiv.org/abs/1908.03636",
)


def circle_rays(n: int = 32) -> Rays:
    """Rays in the plane at the angles 2 pi k / n from the x axis towards the y axis, and the cones between them.

    Args:
        n: rays, at least 3; 32 in the official code.

    Raises:
        ValueError: fewer.

    >>> circle_rays(4).directions.round(decimals=3).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    require.whole("n", n, at_least=3)
    k = torch.arange(n)
    angle = 2 * math.pi / n * k.double()
    return Rays(torch.stack([angle.cos(), angle.sin()], dim=1), torch.stack([k, (k + 1) % n], dim=1))


def fibonacci_rays(n: int = 96, *, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Rays:
    """Rays in space, spread evenly over the sphere on a golden spiral, and the cones between them.

    z_k = -1 + 2 k / (n - 1), at the angle (3 - sqrt 5) pi k about the z axis, divided by the voxel's size and
    brought back to length 1: so rays are even in space though voxels are not cubes, and distances count voxels.

    Args:
        n: rays, at least 4; 96 in the paper.
        spacing: size of a voxel along x, y and z, in any unit.

    Raises:
        ValueError: fewer rays, or a size that is not a positive number.

    >>> rays = fibonacci_rays(6)
    >>> rays.directions[[0, 5], 2], len(rays.faces)
    (tensor([-1.,  1.], dtype=torch.float64), 8)
    """
    require.whole("n", n, at_least=4)
    for size in spacing if isinstance(spacing, tuple | list) and len(spacing) == 3 else (None,):
        require.number("spacing", size, above=0.0)
    k = np.arange(n)
    z, angle = np.linspace(-1.0, 1.0, n), (3 - math.sqrt(5)) * math.pi * k
    around = np.sqrt(1 - z**2)
    even = np.stack([around * np.cos(angle), around * np.sin(angle), z], axis=1)
    faces = ConvexHull(even).simplices.astype(np.int64)  # stretched rays are joined as even ones are
    directions = even / np.asarray(spacing, float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Rays(torch.from_numpy(directions), torch.from_numpy(faces))


def star_distances(labels: Int[Tensor, "*shape"], rays: Rays) -> Float[Tensor, "rays *shape"]:
    """Distance from each pixel along each ray to where its object ends, in pixels; 0 in the background.

    Walks in steps of 1 until the nearest pixel has another label or lies outside the image, and takes back
    1 - 1 / (2 max |u|) of the last step, as the boundary lies half way.

    Args:
        labels: number of each pixel's object, [z,] y, x; 0 is background.
        rays: of as many dimensions, from `circle_rays` or `fibonacci_rays`.

    Raises:
        ValueError: labels that are not int64 or of another dimension than the rays.

    >>> row = torch.tensor([[0, 0, 0, 0, 0], [0, 5, 5, 5, 0], [0, 0, 0, 0, 0]])
    >>> star_distances(row, circle_rays(4))[:, 1, 1]  # right, down, left, up, from the pixel on the left
    tensor([2.5000, 0.5000, 0.5000, 0.5000])
    """
    dim = rays.directions.shape[1]
    require.integers("labels", labels)
    if labels.ndim != dim:
        raise ValueError(f"labels: expected {dim} dimensions as the rays have, got shape {tuple(labels.shape)}")
    start = labels.nonzero()
    distances = torch.zeros(*labels.shape, len(rays.directions), device=labels.device)
    distances[start.unbind(1)] = walk(labels, start, rays)
    return distances.movedim(-1, 0).contiguous()


def object_probabilities(
    labels: Int[Tensor, "*shape"], *, spacing: tuple[float, ...] | None = None
) -> Float[Tensor, "*shape"]:
    """How central each pixel is in its object: distance to the object's boundary over its largest, 0 outside.

    An image's border is no boundary, except where an object fills the whole image.

    Args:
        labels: number >= 0 of each pixel's object, [z,] y, x; 0 is background.
        spacing: size of a voxel along x, y[, z]; None: all alike.

    Raises:
        ValueError: labels that are not int64 in 2 or 3 dimensions, or a spacing of another length.

    >>> object_probabilities(torch.tensor([[0, 0, 0, 0, 0], [0, 3, 3, 3, 0], [0, 3, 3, 3, 0], [0, 3, 3, 3, 0]]))[1:]
    tensor([[0.0000, 0.5000, 0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 1.0000, 0.5000, 0.0000],
            [0.0000, 0.5000, 1.0000, 0.5000, 0.0000]])
    """
    require.integers("labels", labels)
    if labels.ndim not in (2, 3):
        raise ValueError(f"labels: expected 2 or 3 dimensions, got shape {tuple(labels.shape)}")
    if spacing is not None and len(spacing) != labels.ndim:
        raise ValueError(f"spacing: expected {labels.ndim} numbers, got {spacing}")
    image = labels.numpy(force=True)
    sampling = None if spacing is None else spacing[::-1]
    probabilities = np.zeros(image.shape, np.float32)
    for number, where in enumerate(find_objects(image), start=1):
        if where is None:
            continue
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in where)
        mine = image[around] == number
        padded = np.pad(mine, 1) if mine.all() else mine
        depth = distance_transform_edt(padded, sampling=sampling)
        depth = depth[(slice(1, -1),) * image.ndim] if mine.all() else depth
        probabilities[around][mine] = depth[mine] / depth.max()
    return torch.from_numpy(probabilities).to(labels.device)


def star_dist_loss(
    input: Float[Tensor, "n *shape"],
    distances: Float[Tensor, "n rays *shape"],
    target: Float[Tensor, "n *shape"],
    target_distances: Float[Tensor, "n rays *shape"],
    *,
    weight: float = 0.2,
    background: float = 1e-4,
) -> Float[Tensor, "n *shape"]:
    """Cross-entropy of the probability plus the weighted error of the distances, for each pixel: eq. in `PAPER`.

    Args:
        input: logits of the object probability.
        distances: predicted, unconstrained.
        target: p from `object_probabilities`, 0 to 1; it also weighs the errors of the distances.
        target_distances: from `star_distances`.
        weight: lambda_d of the distances' part, at least 0.
        background: lambda_reg, which pulls distances outside of objects to 0, at least 0.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> d = torch.tensor([[[3.0]], [[5.0]]]).movedim(0, 1)  # one image of one pixel, two rays
    >>> star_dist_loss(torch.zeros(1, 1), d, torch.ones(1, 1), d + 1.0)  # log 2 + 0.2 * 1
    tensor([[0.8931]])
    """
    require.floating("input", input, at_least_dims=2)
    require.same_shape("target", target, input.shape)
    require.floating("distances", distances, dims=input.ndim + 1)
    require.same_shape("distances", distances, (len(input), distances.shape[1], *input.shape[1:]))
    require.same_shape("target_distances", target_distances, distances.shape)
    require.number("weight", weight, at_least=0.0)
    require.number("background", background, at_least=0.0)
    error = (distances - target_distances).abs().mean(1)
    outside = torch.where(target == 0, distances.abs().mean(1), 0.0)
    entropy = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    return entropy + weight * (target * error + background * outside)


def star_nms(
    centres: Float[Tensor, "n dim"],
    distances: Float[Tensor, "n rays"],
    scores: Float[Tensor, " n"],
    rays: Rays,
    *,
    overlap_threshold: float = 0.5,
) -> Int[Tensor, " kept"]:
    """Indices of the stars that stay, best first: those that overlap no better one by more than the threshold.

    The overlap of two stars is what they share over the smaller one, in voxels: one that lies inside another is gone.
    Of equal scores the lower index goes first. A star with a distance or centre that is not finite, or a distance that
    is not positive, overlaps nothing; a score that is not a number is dropped. Without gradients.

    Args:
        centres: x, y[, z] in voxels, rounded to whole numbers.
        distances: in voxels along the rays.
        scores: >= 0.
        rays: of `circle_rays` or `fibonacci_rays`.
        overlap_threshold: 0 to 1.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 0.0]])
    >>> star_nms(centres, torch.full((3, 32), 5.0), torch.tensor([0.7, 0.9, 0.8]), circle_rays())
    tensor([1, 2])
    """
    _check(centres, distances, scores, rays)
    require.number("overlap_threshold", overlap_threshold, at_least=0.0, at_most=1.0)
    shapes = torch.cat([centres, distances.to(centres)], dim=1)
    threshold, overlap = float(overlap_threshold), star_overlap(rays)
    return suppress(shapes, scores, decay=hard, parameter=threshold, floor=0.0, overlap=overlap)[0]


def star_labels(
    centres: Float[Tensor, "n dim"],
    distances: Float[Tensor, "n rays"],
    scores: Float[Tensor, " n"],
    rays: Rays,
    shape: tuple[int, ...],
) -> Int[Tensor, "*shape"]:
    """An image of the stars: star i has the label i + 1, of those that overlap the better one is on top, 0 is none.

    Args:
        centres: x, y[, z] in voxels, rounded to whole numbers.
        distances: in voxels along the rays; a star of which one is not a positive number is empty.
        scores: which decide what is on top.
        rays: of `circle_rays` or `fibonacci_rays`.
        shape: of the image, [z,] y, x.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> one = star_labels(torch.ones(1, 2), torch.full((1, 8), 1.0), torch.ones(1), circle_rays(8), (3, 4))
    >>> one.tolist()
    [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]
    """
    _check(centres, distances, scores, rays)
    if len(shape) != centres.shape[1]:
        raise ValueError(f"shape: expected {centres.shape[1]} sizes, got {tuple(shape)}")
    labels = torch.zeros(*shape, dtype=torch.int64, device=centres.device)
    boxes = star_boxes(distances, rays)
    reach = boxes.shape[-1] // 2
    for i in scores.argsort(stable=True).tolist():
        corner = [int(c) - reach for c in centres[i].flip(0).round()]
        there = tuple(slice(max(c, 0), max(c + 2 * reach + 1, 0)) for c in corner)
        spot = labels[there]
        here = tuple(slice(max(-c, 0), max(-c, 0) + size) for c, size in zip(corner, spot.shape))
        spot[boxes[i][here]] = i + 1
    return labels


class Stars(NamedTuple):
    """Objects that were found, best first.

    Attributes:
        labels: image of them, [z,] y, x: object i has the label i + 1.
        centres: (K, D) x, y[, z].
        distances: (K, R) along the rays.
        scores: (K,).

    >>> Stars(torch.zeros(2, 2), torch.zeros(0, 2), torch.zeros(0, 32), torch.zeros(0)).scores
    tensor([])
    """

    labels: Tensor
    centres: Tensor
    distances: Tensor
    scores: Tensor


def predict_instances(
    probabilities: Float[Tensor, "*shape"],
    distances: Float[Tensor, "rays *shape"],
    rays: Rays,
    *,
    probability_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    grid: int = 1,
) -> Stars:
    """Objects from a network's maps: pixels that are central enough propose, `star_nms` chooses, `star_labels` draws.

    Args:
        probabilities: how central each pixel is, 0 to 1, after the sigmoid.
        distances: predicted, in pixels of the full image; below 0.001 they are raised to it.
        rays: along which the distances run.
        probability_threshold: pixels above it propose, 0 to 1.
        overlap_threshold: of `star_nms`.
        grid: the maps hold every grid-th pixel of the full image, which the labels then have.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters that do not fit.

    >>> labels = torch.zeros(12, 20, dtype=torch.int64)
    >>> labels[2:9, 2:9], labels[2:9, 9:16] = 1, 2  # two squares that touch
    >>> maps = object_probabilities(labels), star_distances(labels, circle_rays(32))
    >>> found = predict_instances(*maps, circle_rays(32))
    >>> found.centres.tolist(), (found.labels > 0).eq(labels > 0).float().mean().item() > 0.98
    ([[5.0, 5.0], [12.0, 5.0]], True)
    """
    dim = rays.directions.shape[1]
    require.floating("probabilities", probabilities, dims=dim)
    require.same_shape("distances", distances, (len(rays.directions), *probabilities.shape))
    require.number("probability_threshold", probability_threshold, at_least=0.0, at_most=1.0)
    require.whole("grid", grid, at_least=1)
    places = (probabilities > probability_threshold).nonzero()
    scores = probabilities[places.unbind(1)]
    proposed = distances.movedim(0, -1)[places.unbind(1)].clamp(min=1e-3)
    centres = (places.flip(1) * grid).to(probabilities)
    keep = star_nms(centres, proposed, scores, rays, overlap_threshold=overlap_threshold)
    chosen = centres[keep], proposed[keep], scores[keep]
    shape = tuple(size * grid for size in probabilities.shape)
    return Stars(star_labels(*chosen, rays, shape), *chosen)


def _check(centres: Tensor, distances: Tensor, scores: Tensor, rays: Rays) -> None:
    require.floating("centres", centres, dims=2)
    require.same_shape("centres", centres, (len(centres), rays.directions.shape[1]))
    require.same_shape("distances", distances, (len(centres), len(rays.directions)))
    require.same_shape("scores", scores, (len(centres),))
