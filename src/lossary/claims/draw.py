"""Pictures of what a method does: a claim's file may define `draw(seeds) -> list[Panel]`.

A panel is plain data, so that the same description serves the terminal's picture, a page and a report. Altair turns
panels into an SVG or PNG; it comes with `pip install lossary[compare]`.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from lossary import catalogue
from lossary.catalogue import Entry
from lossary.claims import Seeds

if TYPE_CHECKING:
    import altair as alt

WIDTH = 220  # pixels of one panel
COLUMNS = 4
COLOURS = ("#1c61a6", "#9c4f08")  # outlines: parts and truth, as in a comparison's report


@dataclass(frozen=True)
class Panel:
    """One picture: an image, if any, and what lies over it, in the image's pixels, the y axis downwards.

    Attributes:
        title: one line.
        image: (H, W) or (H, W, 3), 0 to 1; larger and smaller values are cut off.
        boxes: (N, 4), x1, y1, x2, y2.
        polygons: closed outlines, each (M, 2).
        points: (N, 2), x, y.
        labels: one for each box, or for each point where there are no boxes; empty for none.
    """

    title: str
    image: Any = None
    boxes: Any = None
    polygons: Sequence[Any] = ()
    points: Any = None
    labels: tuple[str, ...] = ()


def drawer(paper: Entry) -> Callable[[Seeds], list[Panel]] | None:
    """The paper's `draw`, or None where its claims draw nothing."""
    if not paper["claims"]:
        return None
    module = import_module(f"lossary.claims.{paper['room']}.{catalogue.claim_file(paper).stem}")
    found: Callable[[Seeds], list[Panel]] | None = vars(module).get("draw")
    return found


def svg(panels: Sequence[Panel]) -> str:
    """All panels in one SVG, four in a row."""
    import vl_convert

    return str(vl_convert.vegalite_to_svg(_figure(panels).to_dict()))


def png(panels: Sequence[Panel]) -> bytes:
    """The same as a PNG, at twice the size."""
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(_figure(panels).to_dict(), scale=2))


def _figure(panels: Sequence[Panel]) -> "alt.VConcatChart":
    import altair as alt

    rows = [panels[k : k + COLUMNS] for k in range(0, len(panels), COLUMNS)]
    figure = alt.vconcat(*(alt.hconcat(*map(_chart, row), spacing=16) for row in rows), spacing=16)
    return figure.configure_view(stroke=None).configure_title(
        fontSize=12, fontWeight="normal", anchor="start", font="sans-serif"
    )


def _chart(panel: Panel) -> "alt.LayerChart":
    import altair as alt

    boxes = np.asarray([] if panel.boxes is None else panel.boxes, float).reshape(-1, 4)
    points = np.asarray([] if panel.points is None else panel.points, float).reshape(-1, 2)
    left, top, right, bottom = _extent(panel, boxes, points)
    x = alt.Scale(domain=[left, right], nice=False, zero=False)
    y = alt.Scale(domain=[bottom, top], nice=False, zero=False)

    def at(xs: str = "x", ys: str = "y") -> dict[str, Any]:
        return {"x": alt.X(f"{xs}:Q", scale=x, axis=None), "y": alt.Y(f"{ys}:Q", scale=y, axis=None)}

    height = WIDTH * (bottom - top) / (right - left)
    layers = []
    if panel.image is not None:
        row = {"x": left, "y": top, "x2": right, "y2": bottom, "url": _data_uri(np.asarray(panel.image, float))}
        middle = {"x": (left + right) / 2, "y": (top + bottom) / 2}
        layers.append(
            alt.Chart(alt.Data(values=[row | middle]))
            .mark_image(width=WIDTH, height=height, aspect=False)
            .encode(url="url:N", **at())
        )
    if len(boxes):
        values = [dict(zip(("x", "y", "x2", "y2"), box)) for box in boxes.tolist()]
        outline = alt.Chart(alt.Data(values=values)).mark_rect(filled=False, stroke=COLOURS[0], strokeWidth=1.5)
        layers.append(outline.encode(**at(), x2="x2:Q", y2="y2:Q"))
    for number, polygon in enumerate(panel.polygons):
        closed = np.concatenate([polygon, np.asarray(polygon)[:1]]).astype(float)
        values = [{"x": a, "y": b, "order": k} for k, (a, b) in enumerate(closed.tolist())]
        colour = COLOURS[number % len(COLOURS)] if len(panel.polygons) <= len(COLOURS) else COLOURS[0]
        line = alt.Chart(alt.Data(values=values)).mark_line(color=colour, strokeWidth=1.5)
        layers.append(line.encode(**at(), order="order:Q"))
    if len(points):
        values = [{"x": a, "y": b} for a, b in points.tolist()]
        dots = alt.Chart(alt.Data(values=values)).mark_circle(color=COLOURS[1], size=18, opacity=0.9)
        layers.append(dots.encode(**at()))
    if panel.labels:
        places = boxes[:, :2] if len(boxes) else points
        values = [{"x": a, "y": b, "label": label} for (a, b), label in zip(places.tolist(), panel.labels)]
        text = alt.Chart(alt.Data(values=values)).encode(**at(), text="label:N")
        place = {"align": "left", "baseline": "bottom", "fontSize": 10, "dx": 2}
        layers.append(text.mark_text(**place, stroke="white", strokeWidth=3, strokeJoin="round"))
        layers.append(text.mark_text(**place, color=COLOURS[0]))
    return alt.layer(*layers).properties(width=WIDTH, height=height, title=panel.title)


def _extent(panel: Panel, boxes: np.ndarray, points: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom: of the image, else of all that is drawn and a little more."""
    if panel.image is not None:
        height, width = np.shape(panel.image)[:2]
        return 0.0, 0.0, float(width), float(height)
    corners = [boxes[:, :2], boxes[:, 2:], points, *(np.asarray(p, float) for p in panel.polygons)]
    everything = np.concatenate([c for c in corners if len(c)] or [np.array([[0.0, 0.0], [1.0, 1.0]])])
    low, high = everything.min(0), everything.max(0)
    pad = 0.05 * max(*(high - low), 1e-9)
    return (*(low - pad).tolist(), *(high + pad).tolist())


def _data_uri(image: np.ndarray) -> str:
    """The image as a PNG in a URL, enlarged pixel by pixel: what shows it would smooth a small one."""
    from PIL import Image

    times = max(1, round(2 * WIDTH / image.shape[1]))
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(times, 0).repeat(times, 1)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
