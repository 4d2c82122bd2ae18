"""The page that the demo, the monitor and the audit write: one HTML file that loads nothing from a network.

`document` makes the page, `table` and the classes of `chart` make its contents. uPlot (uplot/ has its released files,
unchanged, with its licence) and charts.js draw the charts in the browser; both are in the page. Its content security
policy allows these scripts by their hash and nothing else: no network, and no script in a name from a checkpoint.

A colour means the same on every page (page.css): `off` and `on` are runs without and with the plugin, `exact` is what
exact arithmetic gives, `good`, `bad`, `unknown` and `note` are verdicts, `s1` to `s6` are anything else.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Final, Literal

from megatron_fp32_router.version import __version__

State = Literal["good", "bad", "unknown", "note"]

#: States can be told apart without their colours.
SIGNS: Final[Mapping[State, str]] = {"good": "✓", "bad": "✗", "unknown": "?", "note": "•"}

_HINT: Final = (
    "Point at a drawing, or move over it with the arrow keys, for its values. Drag across it to zoom; double-click to "
    "see all of it again."
)


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def document(
    title: str,
    lead: str,
    headline: Sequence[tuple[State, str, str]],
    facts: Mapping[str, str],
    sections: Iterable[str],
) -> str:
    """The whole page.

    Args:
        title: of the document; also its heading.
        lead: one sentence below the heading, plain text.
        headline: what the page says first: (state, about what, sentence).
        facts: what was run or read, and how: name -> text. The plugin's version and the date are added.
        sections: HTML.
    """
    script = f"{_read('uplot/uPlot.iife.min.js')}\n{_read('charts.js')}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    said = "".join(_item(state, f"<strong>{escape(about)}:</strong> {escape(text)}") for state, about, text in headline)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    known = {"Plugin": f"megatron-fp32-router {__version__}", **facts, "Page written": written}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in known.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_read('uplot/uPlot.min.css')}{_read('page.css')}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="soft">{escape(lead)}</p><ul class="headline">{said}</ul>'
        "<noscript><p>JavaScript is off, so nothing is drawn. The sentences and tables are complete.</p></noscript>"
        f'{"".join(sections)}<section><h2>What this page is made of</h2><dl class="facts">{listed}</dl>'
        f'<p class="soft">{_HINT}</p></section></main><script>{script}</script></body></html>\n'
    )


def section(heading: str, *parts: str) -> str:
    """A part of the page below a heading; `parts` are HTML."""
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f'<p class="soft">{escape(text)}</p>'


def bullets(points: Iterable[tuple[State, str]]) -> str:
    """Sentences, each with its state."""
    return f'<ul class="points">{"".join(_item(state, escape(text)) for state, text in points)}</ul>'


def _item(state: State, html: str) -> str:
    return f'<li class="{state}"><span aria-hidden="true">{SIGNS[state]}</span> {html}</li>'


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    wide: str = "",
    classes: Mapping[int, str] | None = None,
    row_classes: Sequence[Mapping[int, str]] = (),
) -> str:
    """A table of plain text whose first column names the rows.

    On a phone its rows become blocks, or, with `wide`, it scrolls sideways in a box. Roles are written out because
    browsers drop them from rows that are blocks.

    Args:
        wide: what the table shows, for readers who cannot see it.
        classes: CSS class of a column's cells, by its index.
        row_classes: the same, for each row.
    """

    def cell(row: int, column: int, text: str) -> str:
        own = row_classes[row] if row_classes else {}
        name = own.get(column) or (classes or {}).get(column, "")
        mark = f' class="{name}"' if name else ""
        label = f' data-label="{escape(header[column])}"'
        if column == 0:
            return f'<th scope="row" role="rowheader"{mark}{label}>{escape(text)}</th>'
        return f'<td role="cell"{mark}{label}>{escape(text)}</td>'

    head = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr role="row">{"".join(cell(i, column, text) for column, text in enumerate(row))}</tr>'
        for i, row in enumerate(rows)
    )
    kind = "numbers" if wide else "stacks"
    made = (
        f'<table role="table" class="{kind}"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(wide)}">{made}</div>' if wide else made
