"""Charts of a comparison: small functions from its records to Altair charts, the same on a page and as a picture.

They are drawn in the colours of `LIGHT`. `svg` turns each into the CSS variable of its name, which `css` defines for
light and for dark, so one picture serves both. `width` is that of the whole picture in pixels; text keeps its size,
so a phone gets a chart of its own instead of one scaled down.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

import altair as alt
import vl_convert

from lossary.compare.result import ArmResult, Confirmation, Interval

LIGHT = {
    "ink": "#1b1d21",
    "muted": "#5c6470",
    "line": "#e2e3e0",
    "page": "#fdfdfb",
    "part": "#1d62a8",
    "plain": "#a4560b",
    "faint": "#a9b0b8",
}
DARK = {
    "ink": "#e9e8e4",
    "muted": "#a3abb6",
    "line": "#33373d",
    "page": "#16181b",
    "part": "#74b3f0",
    "plain": "#f0a45c",
    "faint": "#656d77",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
ROW = 26  # pixels of an arm in a forest


def interval_plot(confirmation: Confirmation, unit: str, *, width: int = 640) -> alt.LayerChart:
    """The finalist's lead on the locked rows with its interval, and what this comparison could have seen at all."""
    effect = confirmation.effect
    record = {"lead": effect.difference, "low": effect.low, "high": effect.high, "least": confirmation.detectable}
    reach = _domain([effect], 0.0, confirmation.detectable, -confirmation.detectable)
    data = alt.Data(values=[record])
    x = alt.X("lead:Q", title=f"lead in {unit}, more is better", scale=alt.Scale(domain=reach, nice=False))
    base = alt.Chart(data)
    unseen = alt.Chart(alt.Data(values=[{"from": -confirmation.detectable, "to": confirmation.detectable}]))
    return _finish(
        unseen.mark_rect(color=LIGHT["line"], opacity=0.7).encode(alt.X("from:Q", scale=x.scale), x2="to:Q"),
        _zero(),
        base.mark_rule(color=LIGHT["part"], strokeWidth=5, strokeCap="round").encode(x.copy().shorthand, x2="high:Q")
        if False
        else base.mark_rule(color=LIGHT["part"], strokeWidth=5, strokeCap="round").encode(alt.X("low:Q"), x2="high:Q"),
        base.mark_point(filled=True, size=150, color=LIGHT["part"], stroke=LIGHT["page"], strokeWidth=2).encode(x),
        width=width,
        height=64,
    )
