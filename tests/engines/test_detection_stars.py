"""Star-convex shapes against polygons, the convex hull, slow counting and stardist's compiled code."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from lossary.detection._overlap import pairwise
from lossary.detection._render import polygon_mask
from lossary.detection._stars import Rays, star_boxes, star_overlap, star_vertices, star_volume, walk
from lossary.detection._suppress import hard, suppress


def ring(n: int = 16) -> Rays:
    k = torch.arange(n)
    angle = k.double() / n * 2 * math.pi
    return Rays(torch.stack([angle.cos(), angle.sin()], dim=1), torch.stack([k, (k + 1) % n], dim=1))


def ball(n: int = 40) -> Rays:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Rays(torch.from_numpy(directions), torch.from_numpy(ConvexHull(directions).simplices.astype(np.int64)))


def drawn(n: int, rays: int, low: float = 2.0, high: float = 6.0, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, rays, generator=g, dtype=torch.float64)


def placed(masks: torch.Tensor, centres: torch.Tensor, side: int = 60) -> torch.Tensor:
    """The boxes of shapes at their places in an image, flattened."""
    dim, reach = centres.shape[1], masks.shape[-1] // 2
    image = torch.zeros(len(masks), *[side] * dim, dtype=torch.bool)
    for picture, mask, centre in zip(image, masks, centres.tolist()):
        picture[tuple(slice(c - reach, c + reach + 1) for c in reversed(centre))] = mask
    return image.flatten(1)


def test_walks_end_half_way_to_another_label_and_at_the_edge():
    """From (x, y) = (2, 1) in a box of 5 by 4 pixels at the image's upper left: 3 to the right, then the boundary."""
    labels = torch.zeros(6, 9, dtype=torch.int64)
    labels[:4, :5] = 3
    labels[4, 2] = 3  # a pixel more below
    distances = walk(labels, torch.tensor([[1, 2], [1, 2]]), ring(8))
    slant = (3 - 0.5) * math.sqrt(2)  # 45 degrees: half a pixel short of the third pixel
    expected = [2.5, slant, 3.5, slant, 2.5, (2 - 0.5) * math.sqrt(2), 1.5, (2 - 0.5) * math.sqrt(2)]
    assert distances[0].tolist() == pytest.approx(expected, abs=0.75)  # slanting steps land on the nearest pixel
    assert distances[1, ::2].tolist() == [2.5, 3.5, 2.5, 1.5]
    volume = torch.zeros(5, 6, 7, dtype=torch.int64)
    volume[1:4, 1:5, 1:6] = 1
    axes = Rays(torch.cat([torch.eye(3), -torch.eye(3)]).double(), torch.zeros(0, 3, dtype=torch.int64))
    assert walk(volume, torch.tensor([[2, 3, 2]]), axes)[0].tolist() == [3.5, 1.5, 1.5, 1.5, 2.5, 1.5]


def test_in_two_dimensions_a_star_is_its_polygon():
    rays, distances = ring(), drawn(10, 16)
    masks = star_boxes(distances, rays, reach=7)
    polygons = star_vertices(torch.full((10, 2), 7.0, dtype=torch.float64), distances, rays)
    assert torch.equal(masks, polygon_mask(polygons, 15, 15))
    x, y = polygons.unbind(-1)
    shoelace = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
    torch.testing.assert_close(star_volume(distances, rays), shoelace)


def test_a_ball_is_the_convex_hull_of_its_rays():
    rays = ball()
    distances = torch.full((1, 40), 6.0, dtype=torch.float64)
    hull = ConvexHull(6.0 * rays.directions.numpy())
    assert star_volume(distances, rays).item() == pytest.approx(hull.volume)
    z, y, x = np.mgrid[-6:7, -6:7, -6:7]
    points = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    inside = (points @ hull.equations[:, :3].T + hull.equations[:, 3] <= 1e-6).all(1)
    assert (star_boxes(distances, rays)[0].flatten().numpy() == inside).all()


@pytest.mark.parametrize(("rays", "dim"), [(ring(), 2), (ball(), 3)])
def test_overlap_by_counting(rays, dim):
    n = 12
    distances = drawn(n, len(rays.directions))
    g = torch.Generator().manual_seed(1)
    centres = torch.randint(20, 30, (n, dim), generator=g)
    voxels = placed(star_boxes(distances, rays), centres).double()
    size = voxels.sum(1)
    expected = voxels @ voxels.T / torch.minimum(size[:, None], size)
    shift = torch.tensor([-100, 41, 7])[:dim]  # over the words' ends, and below zero
    for moved in (centres, centres + shift):
        rows = torch.cat([moved.double() + 0.3, distances], dim=1)  # centres are rounded
        torch.testing.assert_close(pairwise(star_overlap(rays), rows, rows), expected, rtol=1e-12, atol=0)


def test_wide_shapes_take_several_words():
    rays, distances = ring(), torch.full((2, 16), 70.0, dtype=torch.float64)
    rows = torch.cat([torch.tensor([[0.0, 0.0], [100.0, 0.0]]).double(), distances], dim=1)
    mask = star_boxes(distances[:1], rays)[0].double()
    expected = (mask[:, 100:] * mask[:, :-100]).sum() / mask.sum()
    assert pairwise(star_overlap(rays), rows, rows)[0, 1].item() == pytest.approx(expected.item())


def test_what_is_no_shape_is_empty_and_overlaps_nothing():
    rays, distances = ring(), drawn(5, 16)
    distances[0, 3], distances[1, 5], distances[2, 7] = 0.0, math.inf, math.nan
    assert star_boxes(distances, rays, reach=6).any((1, 2)).tolist() == [False, False, False, True, True]
    rows = torch.cat([torch.zeros(5, 2, dtype=torch.float64), distances], dim=1)
    rows[4, 0] = math.nan
    table = pairwise(star_overlap(rays), rows, rows)
    assert table[3, 3] == 1
    assert table.sum() == 1
    assert pairwise(star_overlap(rays), rows[:0], rows[:0]).shape == (0, 0)
    assert star_boxes(distances[:0], rays).shape[0] == 0


def test_the_suppression_loop_takes_stars():
    rays = ring()
    distances = torch.full((3, 16), 5.0)
    rows = torch.cat([torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 0.0]]), distances], dim=1)
    keep, _ = suppress(
        rows, torch.tensor([0.7, 0.9, 0.8]), decay=hard, parameter=0.5, floor=0.0, overlap=star_overlap(rays)
    )
    assert keep.tolist() == [1, 2]


def test_stardist_fills_the_same_voxels():
    rays3d = pytest.importorskip("stardist.rays3d")
    from stardist.geometry import polyhedron_to_label

    peer = rays3d.Rays_GoldenSpiral(32, anisotropy=(2, 1, 1))
    directions = torch.from_numpy(peer.vertices[:, ::-1].astype(np.float64))
    rays = Rays(directions, torch.from_numpy(peer.faces.astype(np.int64)))
    distances = drawn(4, 32)
    masks = star_boxes(distances, rays, reach=7)
    for row, mask in zip(distances.numpy(), masks.numpy()):
        label = polyhedron_to_label(row[None], np.array([[7, 7, 7]]), peer, (15, 15, 15), verbose=False)
        assert ((label > 0) == mask).all()
    np.testing.assert_allclose(star_volume(distances, rays).numpy(), peer.volume(distances.numpy()), rtol=1e-5)
