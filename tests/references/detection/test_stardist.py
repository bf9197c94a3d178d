"""StarDist against its official compiled code, closed forms and images with known answers."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lossary.detection import (
    Stars,
    circle_rays,
    fibonacci_rays,
    object_probabilities,
    predict_instances,
    star_dist_loss,
    star_distances,
    star_labels,
    star_nms,
)


def discs(*circles: tuple[float, float, float], shape=(40, 50)) -> torch.Tensor:
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int64)
    for k, (cx, cy, r) in enumerate(circles, start=1):
        labels[((x - cx) ** 2 + (y - cy) ** 2 <= r * r) & (labels == 0)] = k
    return torch.from_numpy(labels)


def real(name: str) -> np.ndarray:
    """A picture that the package stardist ships."""
    spec = find_spec("stardist")
    if spec is None:
        pytest.skip("stardist is not installed")
    from skimage.io import imread

    return imread(Path(spec.origin).parent / "data" / "images" / f"{name}.tif")


def matched(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true objects that a found one covers with an IoU above a half."""
    count = 0
    for k in np.unique(true[true > 0]):
        mask = true == k
        best = np.bincount(found[mask]).argmax()
        other = found == best
        count += best > 0 and (mask & other).sum() / (mask | other).sum() > 0.5
    return count / len(np.unique(true[true > 0]))


def test_distances_in_a_disc_reach_its_rim():
    """From a point off the centre by e the rim of a circle is at -e cos + sqrt(r^2 - (e sin)^2)."""
    rays = circle_rays(24)
    distances = star_distances(discs((20, 20, 12.0)), rays)[:, 20, 25]
    angle = torch.arange(24) / 24 * 2 * math.pi
    rim = -5 * angle.cos() + (144 - (5 * angle.sin()) ** 2).sqrt()
    assert (distances - rim).abs().max() < 0.8  # within a pixel
    assert (distances - rim).mean().abs() < 0.3
    assert distances[[0, 6, 12, 18]].tolist() == [7.5, 10.5, 17.5, 10.5]  # straight rays end half way between pixels


def test_distances_of_the_official_code():
    peer = pytest.importorskip("stardist.geometry").star_dist
    labels = discs((8, 9, 7.3), (21, 12, 8.1), (30, 30, 9.7), (38, 22, 6.2), (2, 38, 5.0))
    got = star_distances(labels, circle_rays(32)).movedim(0, -1)
    expected = peer(labels.numpy().astype(np.uint16), 32)
    assert (
        np.abs(got.numpy() - expected) > 1e-3
    ).mean() < 2e-4  # it adds steps in single precision, so ties may differ
    plain = star_distances(labels.flip(1), circle_rays(4))
    assert torch.equal(plain[0].flip(1), star_distances(labels, circle_rays(4))[2])  # 0 looks right and 2 left


def test_distances_of_the_official_code_in_space():
    peer = pytest.importorskip("stardist.geometry")
    from stardist.rays3d import Rays_GoldenSpiral

    z, y, x = np.mgrid[:7, :9, :11]
    labels = (((x - 5) / 5) ** 2 + ((y - 4) / 4) ** 2 + ((z - 3) / 3) ** 2 <= 1).astype(np.int64)
    labels[:, :, 7:] *= 2
    rays = fibonacci_rays(24, spacing=(1.0, 1.0, 2.0))
    theirs = Rays_GoldenSpiral(24, anisotropy=(2.0, 1.0, 1.0))
    np.testing.assert_allclose(rays.directions.flip(1).numpy(), theirs.vertices, atol=1e-6)
    got = star_distances(torch.from_numpy(labels), rays).movedim(0, -1)
    taken = 1 - 0.5 / rays.directions.abs().amax(1)
    whole = peer.star_dist3D(labels, theirs, mode="python")  # to the first step outside
    expected = whole - taken.numpy() * (labels > 0)[..., None]
    assert (np.abs(got.numpy() - expected) > 1e-3).mean() < 1e-3


def test_rays_are_even_and_their_cones_fill_space():
    rays = fibonacci_rays(96)
    assert rays.directions.norm(dim=1).tolist() == pytest.approx([1.0] * 96)
    assert rays.faces.shape == (2 * 96 - 4, 3)  # Euler: 2 n - 4 triangles
    corners = rays.directions[rays.faces]
    a, b, c = corners.unbind(1)
    solid = 2 * torch.atan2(corners.det().abs(), 1 + (a * b).sum(1) + (b * c).sum(1) + (a * c).sum(1))
    assert solid.sum().item() == pytest.approx(4 * math.pi)  # each direction lies in one cone
    assert solid.max() / solid.min() < 5
    golden = (1 + math.sqrt(5)) / 2
    k = 7
    height = -1 + 2 * k / 95
    turn = 2 * math.pi * (1 - 1 / golden) * k
    flat = math.sqrt(1 - height**2)
    expected = [flat * math.cos(turn), flat * math.sin(turn), height]
    assert rays.directions[k].tolist() == pytest.approx(expected)


def test_probabilities_of_the_official_code():
    peer = pytest.importorskip("stardist.utils").edt_prob
    labels = discs((0, 9, 7.3), (14, 12, 8.1), (30, 30, 9.7))
    np.testing.assert_allclose(object_probabilities(labels).numpy(), peer(labels.numpy()), atol=1e-6)
    sized = object_probabilities(labels, spacing=(1.0, 3.0)).numpy()
    np.testing.assert_allclose(sized, peer(labels.numpy(), anisotropy=(3.0, 1.0)), atol=1e-6)
    full = object_probabilities(torch.ones(5, 7, dtype=torch.int64))  # depth is counted from outside the image
    assert full[2].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, 2 / 3, 1 / 3])
    assert not object_probabilities(torch.zeros(4, 4, dtype=torch.int64)).any()


def test_loss_by_hand():
    """Two pixels, three rays; the first is background, the second an object's with p = 0.4."""
    z, p = torch.tensor([[[1.0, -2.0]]], dtype=torch.float64), torch.tensor([[[0.0, 0.4]]], dtype=torch.float64)
    d = torch.tensor([[[[3.0, 1.0]], [[-6.0, 2.0]], [[0.0, 5.0]]]], dtype=torch.float64)
    true = torch.tensor([[[[0.0, 2.0]], [[0.0, 2.0]], [[0.0, 2.0]]]], dtype=torch.float64)
    q = 1 / (1 + math.exp(2.0))
    first = math.log1p(math.exp(1.0)) + 0.2 * 1e-4 * (3 + 6 + 0) / 3
    second = -0.4 * math.log(q) - 0.6 * math.log(1 - q) + 0.2 * 0.4 * (1 + 0 + 3) / 3
    assert star_dist_loss(z, d, p, true)[0, 0].tolist() == pytest.approx([first, second])
    heavy = star_dist_loss(z, d, p, true, weight=2.0, background=0.5)[0, 0]
    assert heavy[0].item() == pytest.approx(math.log1p(math.exp(1.0)) + 2 * 0.5 * 3)


def test_the_official_code_suppresses_the_same():
    peer = pytest.importorskip("stardist.nms").non_maximum_suppression_inds
    rays, rng = circle_rays(32), np.random.default_rng(3)
    centres = rng.integers(20, 120, (60, 2)).astype(float)
    distances = 9 + 3 * rng.random((60, 32))
    scores = np.sort(rng.random(60))[::-1].copy()  # it wants them sorted
    for threshold in (0.2, 0.5):
        theirs = peer(distances, centres[:, ::-1], scores, thresh=threshold, verbose=0).nonzero()[0]
        ours = star_nms(*map(torch.from_numpy, (centres, distances, scores)), rays, overlap_threshold=threshold)
        assert len(theirs) < 55
        assert len(set(ours.tolist()) ^ set(theirs.tolist())) <= 2  # it clips polygons, and we count pixels


def test_a_star_inside_another_is_gone():
    rays = circle_rays()
    centres, distances = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[12.0], [3.0]]).expand(2, 32)
    scores = torch.tensor([0.9, 0.8])
    assert star_nms(centres, distances, scores, rays, overlap_threshold=0.9).tolist() == [0]
    assert star_nms(centres, distances, scores, rays, overlap_threshold=1.0).tolist() == [0, 1]
    assert star_nms(centres, distances, scores.flip(0), rays, overlap_threshold=0.9).tolist() == [1]
    assert star_nms(centres[:0], distances[:0], scores[:0], rays).tolist() == []


def test_drawing_puts_the_better_on_top_and_stops_at_the_edge():
    rays = circle_rays(64)
    centres = torch.tensor([[2.0, 5.0], [7.0, 5.0], [100.0, 5.0], [5.0, 5.0]])
    distances = torch.full((4, 64), 4.0)
    distances[3, 0] = math.nan
    labels = star_labels(centres, distances, torch.tensor([0.9, 0.5, 0.7, 0.99]), rays, (11, 10))
    assert labels[5].tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert labels.unique().tolist() == [0, 1, 2]
    assert (
        star_labels(centres, distances, torch.tensor([0.5, 0.9, 0.7, 0.1]), rays, (11, 10))[5, 3:7].tolist() == [2] * 4
    )


def test_objects_come_back_from_their_own_maps():
    """Discs that touch, at every second pixel: as many objects, and nearly the same pixels."""
    labels = discs((10, 10, 7.0), (24, 10, 7.5), (17, 24, 8.0), (37, 22, 8.5))
    rays = circle_rays(32)
    maps = object_probabilities(labels)[::2, ::2], star_distances(labels, rays)[:, ::2, ::2]
    found = predict_instances(*maps, rays, grid=2)
    assert len(found.centres) == 4
    assert found.labels.shape == labels.shape
    assert matched(found.labels.numpy(), labels.numpy()) == 1
    assert ((found.labels > 0) == (labels > 0)).float().mean() > 0.97
    assert (found.scores.diff() <= 0).all()
    nothing = predict_instances(maps[0] * 0, maps[1], rays, grid=2)
    assert isinstance(nothing, Stars)
    assert not nothing.labels.any()
    assert nothing.centres.shape == (0, 2)
    assert nothing.distances.shape == (0, 32)


def test_real_nuclei_come_back_from_their_own_maps():
    """Nuclei outlined by hand (Data Science Bowl 2018): all but slivers at the border are star-convex."""
    truth = real("mask2d")[:256:2, :256:2].astype(np.int64)
    rays = circle_rays(32)
    maps = object_probabilities(torch.from_numpy(truth)), star_distances(torch.from_numpy(truth), rays)
    found = predict_instances(*maps, rays, probability_threshold=0.6).labels.numpy()
    assert matched(found, truth) > 0.9


def test_a_volume_comes_back_from_its_own_maps():
    """Three touching balls in slices twice as thick as wide."""
    z, y, x = np.mgrid[:10, :20, :22]
    truth = np.zeros(z.shape, np.int64)
    for k, (cx, cy, cz, r) in enumerate([(6, 6, 4, 5.4), (15, 8, 5, 5.2), (10, 15, 4, 5.0)], start=1):
        truth[((x - cx) ** 2 + (y - cy) ** 2 + 4 * (z - cz) ** 2 <= r * r) & (truth == 0)] = k
    labels, spacing = torch.from_numpy(truth), (1.0, 1.0, 2.0)
    rays = fibonacci_rays(48, spacing=spacing)
    maps = object_probabilities(labels, spacing=spacing), star_distances(labels, rays)
    found = predict_instances(*maps, rays)
    assert len(found.scores) == 3
    assert matched(found.labels.numpy(), truth) == 1
    assert ((found.labels > 0) & (labels > 0)).sum() / ((found.labels > 0) | (labels > 0)).sum() > 0.85


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circle_rays(2), "n: expected a whole number >= 3"),
        (lambda: fibonacci_rays(3), "n: expected a whole number >= 4"),
        (lambda: fibonacci_rays(9, spacing=(1.0, 0.0, 1.0)), "spacing: expected a number > 0"),
        (lambda: fibonacci_rays(9, spacing=(1.0, 1.0)), "spacing: expected a finite number"),
        (lambda: star_distances(torch.zeros(4, 4), circle_rays()), "labels: expected an int64"),
        (lambda: star_distances(torch.zeros(4, dtype=torch.int64), circle_rays()), "labels: expected 2 dimensions"),
        (lambda: object_probabilities(torch.zeros(4, dtype=torch.int64)), "labels: expected 2 or 3"),
        (lambda: object_probabilities(torch.zeros(4, 4, dtype=torch.int64), spacing=(1.0,)), "spacing: expected 2"),
        (lambda: star_dist_loss(*torch.zeros(4, 2, 3)), "distances: expected 3 dimensions"),
        (lambda: star_nms(torch.zeros(3, 3), torch.zeros(3, 32), torch.zeros(3), circle_rays()), "centres: expected"),
        (lambda: star_nms(torch.zeros(3, 2), torch.zeros(3, 8), torch.zeros(3), circle_rays()), "distances: expected"),
        (lambda: star_nms(torch.zeros(3, 2), torch.zeros(3, 32), torch.zeros(2), circle_rays()), "scores: expected"),
        (lambda: predict_instances(torch.zeros(4, 4), torch.zeros(8, 4, 4), circle_rays()), "distances: expected"),
        (
            lambda: star_labels(torch.zeros(1, 2), torch.ones(1, 32), torch.ones(1), circle_rays(), (4, 4, 4)),
            "shape: expected 2 sizes",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
