"""The audit as one HTML page without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.audit import report

if TYPE_CHECKING:
    from megatron_fp32_router.audit.finding import Audit

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --problem: #cf222e; --unknown: #9a6700; --note: #777 }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --problem: #ff7b72; --unknown: #d29922; --note: #999 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td:nth-child(2) { white-space: nowrap }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
td:first-child { font-family: ui-monospace, monospace; font-size: .85em; overflow-wrap: anywhere; width: 32% }
.good, .problem, .unknown, .note { font-weight: 600 }
.good { color: var(--good) } .problem { color: var(--problem) } .unknown { color: var(--unknown) }
.note { color: var(--note); font-weight: 400 }
svg { width: 100%; height: 2.2rem; display: block } svg rect { fill: currentColor; opacity: .75 }
"""


def page(found: Audit) -> str:
    """The whole document."""
    said = "".join(f"<p>{escape(line)}</p>" for line in report.summary(found)[:-1])
    order = ("problem", "unknown", "good", "note")
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(check)}</td>"
        f'<td class="{verdict}">{verdict}</td><td>{escape(text)}</td></tr>'
        for name, check, verdict, text in sorted(report.rows(found), key=lambda row: order.index(row[2]))
    )
    head = "".join(f"<th>{name}</th>" for name in report.COLUMNS)
    verdict = report.summary(found)[-1]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Router audit: {found.verdict}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<h1>Router audit</h1>{said}<p class="{found.verdict}">{escape(verdict)}</p>'
        f"<h2>Findings</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{_biases(found)}</html>\n"
    )


def _biases(found: Audit) -> str:
    """Every expert_bias as bars, experts in order of size: steps and plateaus show what a cast leaves."""
    drawn = []
    for tensor in found.checkpoint.tensors:
        values = tensor.values
        if tensor.kind != "expert_bias" or values is None or values.size < 2:
            continue
        numbers = sorted(float(value) for value in values.astype("float64").ravel())
        low, high = numbers[0], numbers[-1]
        if not (high - low < float("inf")) or high == low:
            continue
        width = 1000 / len(numbers)
        bars = "".join(
            f'<rect x="{i * width:.2f}" width="{width * 0.85:.2f}" y="{100 - h:.1f}" height="{h:.1f}"/>'
            for i, h in enumerate(4 + 96 * (number - low) / (high - low) for number in numbers)
        )
        chart = (
            f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
            f'aria-label="{len(numbers)} biases from {low:.6g} to {high:.6g}">{bars}</svg>'
        )
        drawn.append(f"<tr><td>{escape(tensor.name)}</td><td>{low:.6g} to {high:.6g}</td><td>{chart}</td></tr>")
    if not drawn:
        return ""
    return "<h2>Expert biases, sorted</h2><table><tbody>" + "".join(drawn) + "</tbody></table>"
