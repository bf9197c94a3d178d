"""Pictures: what a panel describes lies where it says, whatever renders it."""

import io

import numpy as np
import pytest
from PIL import Image

from lossary import catalogue
from lossary.claims import Seeds
from lossary.claims.draw import Panel, drawer, png, svg


def pixels(panel: Panel) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png([panel]))).convert("RGB")).astype(int)


def blue(picture: np.ndarray) -> np.ndarray:
    """Where an outline in the colour of a part was drawn."""
    return np.abs(picture - (0x1C, 0x61, 0xA6)).sum(-1) < 60


def test_a_box_lies_where_the_image_has_its_square():
    image = np.zeros((20, 40, 3))
    image[5:15, 10:30] = (1.0, 1.0, 0.0)
    picture = pixels(Panel("square", image, boxes=[[10, 5, 30, 15]]))
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 60)
    rows, columns = np.nonzero(blue(picture))
    across, down = np.nonzero(yellow.any(0))[0], np.nonzero(yellow.any(1))[0]
    assert abs(columns.min() - across.min()) <= 3
    assert abs(columns.max() - across.max()) <= 3
    assert abs(rows.min() - down.min()) <= 3
    assert abs(rows.max() - down.max()) <= 3
    assert (across.max() - across.min()) == pytest.approx(2 * (down.max() - down.min()), abs=6)  # pixels stay square


def test_points_without_an_image_fill_the_panel():
    text = svg([Panel("two", points=[[0, 0], [1, 2]], labels=("low", "high"))])
    assert "two" in text
    assert ">low<" in text
    assert ">high<" in text


def test_values_outside_the_range_are_cut_off():
    bright = pixels(Panel("bright", np.array([[2.0, np.nan], [-1.0, 0.5]])))
    assert bright.max() == 255


@pytest.mark.parametrize("paper", [p for p in catalogue.entries() if p["draws"]], ids=lambda p: p["id"])
def test_every_picture_draws(paper):
    panels = drawer(paper)(Seeds((0,), smoke=True))
    assert 1 <= len(panels) <= 24
    assert svg(panels).startswith("<svg")
