"""The data of what charts.js draws: lines over an x that rises, and maps of rows over it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

#: For lines whose colour has no meaning: colour, dashes, marker. Any one of the three tells the lines apart.
STYLES: Final = (
    ("s1", (), "circle"),
    ("s2", (7, 4), "square"),
    ("s3", (2, 3), "triangle"),
    ("s4", (12, 4, 2, 4), "diamond"),
    ("s5", (4, 2), "cross"),
    ("s6", (1, 4), "circle"),
)


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: in the legend; `label` is written at the end of the line, where there is room for a word.
        values: one for each x; NaN where there is none.
        colour: a name in page.css; see this package's docstring.
        dash: lengths of dashes and gaps, in pixels; empty: solid.
        marker: circle, square, triangle, diamond, cross, or "" for none.
        width: in pixels; 0: markers only, at every value.
        digits: how many significant digits of a value are shown.
    """

    name: str
    values: Sequence[float]
    colour: str
    label: str = ""
    dash: tuple[int, ...] = ()
    marker: str = ""
    width: float = 2
    digits: int = 4


@dataclass(frozen=True)
class Band:
    """The space between two lines, by their names."""

    low: str
    high: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """Lines over x, which rises.

    Attributes:
        described: the figures for a reader who cannot see the drawing.
        from_zero: the axis starts at 0.
    """

    title: str
    caption: str
    described: str
    x_label: str
    x: Sequence[float]
    y_label: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    from_zero: bool = False

    def html(self) -> str:
        """As a figure."""
        places = {line.name: index for index, line in enumerate(self.lines)}
        spec = {
            "kind": "lines",
            "x": {"label": self.x_label, "values": list(self.x)},
            "y": {"label": self.y_label, "zero": self.from_zero},
            "series": [
                {**vars(line), "values": [_short(value, line.digits + 2) for value in line.values]}
                for line in self.lines
            ],
            "bands": [[places[band.high], places[band.low], band.colour] for band in self.bands],
        }
        return _figure(self.title, self.caption, self.described, spec)


@dataclass(frozen=True)
class Map:
    """Rows from top to bottom, x from left to right, a shade for each number.

    There are 255 shades, so that sixty layers at a thousand looks take 80 kB. A cell shows the value of its shade.
    """

    title: str
    caption: str
    described: str
    x_label: str
    x: Sequence[float]
    y_label: str
    rows: Sequence[str]
    values: Sequence[Sequence[float]]

    def html(self) -> str:
        """As a figure."""
        known = [value for row in self.values for value in row if not math.isnan(value)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        span = high - low
        shades = bytes(
            255 if math.isnan(value) else round(254 * ((value - low) / span if 0 < span < math.inf else 0))
            for row in self.values
            for value in row
        )
        spec = {
            "kind": "map",
            "x": {"label": self.x_label, "values": list(self.x)},
            "y": {"label": self.y_label},
            "rows": list(self.rows),
            "low": _short(low, 6),
            "high": _short(high, 6),
            "shades": base64.b64encode(shades).decode(),
        }
        return _figure(self.title, self.caption, self.described, spec)


def _short(value: float, digits: int) -> float | None:
    return None if math.isnan(value) else float(f"{value:.{digits}g}")


def _figure(title: str, caption: str, described: str, spec: dict[str, Any]) -> str:
    # A name from a file must not end the script element that it is in.
    text = json.dumps(spec, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    label = escape(f"{title}. {described}")
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<div class="plot" role="img" tabindex="0" aria-label="{label}"></div>'
        f'<figcaption>{escape(caption)}</figcaption><script type="application/json">{text}</script></figure>'
    )


def side_by_side(*figures: str) -> str:
    """Figures beside each other, or below each other where there is no room."""
    return f'<div class="beside">{"".join(figures)}</div>'
