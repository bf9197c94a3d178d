"""Polygons to pixels, against skimage and by hand."""

import math

import pytest
import torch

from lossary.detection._render import polygon_mask


def test_a_triangle_by_hand():
    triangle = torch.tensor([[[-0.5, -0.5], [3.5, -0.5], [-0.5, 3.5]]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]  # centres on x + y = 3 are outside, on the right
    assert polygon_mask(triangle, 3, 4)[0].int().tolist() == expected
    assert polygon_mask(triangle.flip(1), 3, 4)[0].int().tolist() == expected


def test_squares_that_share_an_edge_share_no_pixel():
    square = torch.tensor([[1.0, 1.0], [3.0, 1.0], [3.0, 3.0], [1.0, 3.0]])
    tiles = torch.stack([square + torch.tensor([dx, dy]) for dx in (0.0, 2.0) for dy in (0.0, 2.0)])
    masks = polygon_mask(tiles, 7, 7)
    assert masks.sum((1, 2)).tolist() == [4, 4, 4, 4]
    assert (masks.sum(0) <= 1).all()
    assert masks[0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_skimage_draws_the_same():
    peer = pytest.importorskip("skimage.draw")
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(12, dtype=torch.float64) / 12 * 2 * math.pi
    radius = 5 + 20 * torch.rand(8, 12, 1, generator=g, dtype=torch.float64)
    centre = 20 + 25 * torch.rand(8, 1, 2, generator=g, dtype=torch.float64)  # some leave the image
    polygons = centre + radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    for polygon, mask in zip(polygons, polygon_mask(polygons, 50, 45)):
        assert (mask.numpy() == peer.polygon2mask((50, 45), polygon.flip(1).numpy())).all()


def test_what_is_wound_twice_is_inside_and_a_bow_tie_has_two_wings():
    square = torch.tensor([[0.5, 0.5], [4.5, 0.5], [4.5, 4.5], [0.5, 4.5]])
    assert polygon_mask(torch.cat([square, square])[None], 6, 6).sum() == 16
    tie = torch.tensor([[[0.5, 0.5], [4.5, 4.5], [4.5, 0.5], [0.5, 4.5]]])
    assert polygon_mask(tie, 6, 6)[0, 2].int().tolist() == [0, 1, 0, 1, 1, 0]


def test_nothing_and_what_is_no_polygon():
    assert polygon_mask(torch.zeros(0, 5, 2), 4, 4).shape == (0, 4, 4)
    bad = torch.tensor([[[math.nan, 0.0], [3.0, 3.0], [0.0, 3.0]], [[math.inf, 0.0], [3.0, 3.0], [0.0, 3.0]]])
    assert not polygon_mask(bad, 4, 4).any()
    assert not polygon_mask(torch.ones(1, 4, 2), 4, 4).any()  # a point
    far = torch.tensor([[[-1e9, -1e9], [1e9, -1e9], [1e9, 1e9], [-1e9, 1e9]]])
    assert polygon_mask(far, 4, 4).all()
