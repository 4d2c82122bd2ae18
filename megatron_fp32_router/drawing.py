"""Drawings and pages in one style: inline SVG that follows light and dark pages, HTML that loads nothing.

Used by whatever writes a page: the demo, the monitor's report. Needs matplotlib, imported when something is drawn.
"""

from __future__ import annotations

import io
import re
from typing import Any, Final

#: matplotlib's colour and the CSS variable that replaces it, so that one drawing serves light and dark pages.
COLOURS: Final = {
    "off": ("#c8401d", "--off"),
    "on": ("#1f5fc9", "--on"),
    "exact": ("#7d8590", "--exact"),
    "ink": ("#23272e", "--ink"),
    "soft": ("#646c78", "--soft"),
    "line": ("#d9dde3", "--line"),
}


def style() -> Any:
    """matplotlib settings, for matplotlib.rc_context."""
    ink, soft, line = (COLOURS[name][0] for name in ("ink", "soft", "line"))
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": soft,
        "axes.edgecolor": line,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": soft,
        "ytick.color": soft,
        "legend.frameon": False,
        "lines.linewidth": 1.7,
    }


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    """A figure without pyplot: no display, no global state."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_alpha(0)
    axes = made.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.set_facecolor("none")
    return made, axes


def as_svg(drawing: Any, name: str) -> str:
    """`drawing`, a figure, as an <svg> element that needs nothing else and takes its colours and font from the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Several drawings share one page, so their ids must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font:\s*([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in COLOURS.values():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", text, count=1)


# The page -----------------------------------------------------------------------------------------------------------

CSS: Final = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --off: #c8401d; --on: #1f5fc9;
  --exact: #7d8590; --ink: #23272e; --soft: #646c78; --line: #d9dde3; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --card: #1d2126; --off: #ff8a65; --on: #7db1ff;
  --exact: #9aa3ae; --ink: #e8eaed; --soft: #a3abb6; --line: #343a42; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 62rem; background: var(--page);
  color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; }
p, li { max-width: 46rem; } .soft, figcaption { color: var(--soft); }
ul { padding-left: 1.2rem; } li { margin: .4rem 0; }
.verdict { border-left: 4px solid var(--on); padding: .7rem 1rem; background: var(--card); font-weight: 600; }
.verdict.bad { border-color: var(--off); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th:nth-child(2), td.off { color: var(--off); }
thead th:nth-child(3), td.on { color: var(--on); } tbody th { font-weight: 400; }
figure { margin: 1.5rem 0 0; } svg { width: 100%; height: auto; display: block; font-family: inherit; }
svg text { font-family: inherit; }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; color: var(--soft); max-width: 46rem; }
"""
