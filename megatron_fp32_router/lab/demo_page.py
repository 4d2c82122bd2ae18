"""What the demo found, as one self-contained HTML page and as a picture. Functions of the data of demo_report.py."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from megatron_fp32_router.drawing import COLOURS, CSS, as_svg, new_figure, style
from megatron_fp32_router.lab.demo_report import RUNS, findings, protected, rows, stopped, worst

if TYPE_CHECKING:
    from pathlib import Path


def _bias_lines(axis: Any, data: dict[str, Any], layer: int, expert: int) -> None:
    """One expert's bias: what exact counts ask for and what happened, without the plugin and with it."""
    off, on = data["off"]["series"], data["on"]["series"]
    steps = range(len(off["bias"][layer][expert]))
    axis.plot(
        steps,
        off["exact"][layer][expert],
        color=COLOURS["exact"][0],
        ls=(0, (4, 2)),
        label="due by exact counts, plugin off",
    )
    axis.plot(steps, off["bias"][layer][expert], color=COLOURS["off"][0], label="plugin off")
    axis.plot(steps, on["bias"][layer][expert], color=COLOURS["on"][0], label="plugin on")
    axis.plot(
        steps,
        on["exact"][layer][expert],
        color=COLOURS["ink"][0],
        ls=(0, (1, 3)),
        lw=1.2,
        label="due by exact counts, plugin on",
    )
    axis.set_xlim(0, len(steps) - 1)


def _biases(data: dict[str, Any]) -> str:
    layer, _ = worst(data)
    experts = len(data["off"]["series"]["bias"][layer])
    columns = 4 if experts >= 4 else experts
    lines = -(-experts // columns)
    figure, axes = new_figure(10, 2.1 * lines + 0.5, lines, columns, sharex=True, sharey=True)
    for expert, axis in enumerate(axes.flat):
        if expert >= experts:
            axis.set_visible(False)
            continue
        _bias_lines(axis, data, layer, expert)
        wrong = data["off"]["series"]["wrong"][layer][expert]
        axis.set_title(f"expert {expert}: {wrong} wrong")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for line in axes:
        line[0].set_ylabel("expert_bias")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return as_svg(figure, "bias")


def _series(axis: Any, data: dict[str, Any], key: str) -> None:
    """`key` over steps, both runs; on the counter's error, also the steps in which an update went wrong."""
    for run in RUNS:
        values, steps = data[run]["series"][key], range(1, data["steps"] + 1)
        axis.plot(steps, values, color=COLOURS[run][0], label=f"plugin {run}")
        wrong = [(step, values[step - 1]) for step in steps if data[run]["series"]["wrong_at"][step - 1]]
        if key == "count_error" and wrong and not stopped(data):  # there it is every step
            label = f"an update went wrong (plugin {run})"
            axis.plot(*zip(*wrong, strict=True), "x", color=COLOURS["ink"][0], ms=7, mew=1.8, label=label)
    axis.set_xlabel("training step")
    axis.set_ylim(bottom=-0.02 * axis.get_ylim()[1])  # a line at 0 is drawn whole
    axis.set_xlim(1, max(2, data["steps"]))


def _curves(data: dict[str, Any], key: str, label: str) -> str:
    figure, axes = new_figure(10, 2.9)
    _series(axes[0, 0], data, key)
    axes[0, 0].set_ylabel(label)
    figure.legend(loc="outside upper left", ncols=4)
    return as_svg(figure, key.replace("_", "-"))


def picture(several: list[dict[str, Any]], path: Path) -> None:
    """Write the picture for README's first screen: one panel for each run in `several`.

    Where updates are swallowed the panel shows one expert's bias, elsewhere the counter that turns updates around.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(style() | {"font.size": 11, "axes.titlesize": 12, "lines.linewidth": 2.2}):
        figure, axes = new_figure(6.2 * len(several) + (0.8 if len(several) == 1 else 0), 4.6, 1, len(several))
        figure.patch.set_alpha(1)
        figure.patch.set_facecolor("white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04)
        for axis, data in zip(axes.flat, several, strict=True):
            updates = data["off"]["updates"]
            if stopped(data):
                _bias_lines(axis, data, *worst(data))
                axis.set_xlabel("training step")
                axis.set_ylabel("expert_bias of one expert")
                axis.margins(y=0.12)
                what = f"bf16 swallows {updates['stuck']:,} of {updates['expected']:,} bias updates whole"
            else:
                _series(axis, data, "count_error")
                axis.set_ylabel("counting error, tokens (worst expert)")
                axis.set_ylim(top=1.35 * max(1.0, data["off"]["count_error"]))
                what = f"bf16 miscounts tokens: {updates['wrong']:,} bias updates go wrong"
            axis.set_title(f"Megatron-Core {data['megatron']}\n{what}", fontweight="bold", pad=10)
            axis.legend(loc="best" if stopped(data) else "upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")


def render(data: dict[str, Any]) -> str:
    """The page: findings, table and drawings of `data` in one HTML document that loads nothing."""
    import matplotlib

    e = html.escape
    layer, _ = worst(data)
    layer_name = data["off"]["series"]["layers"][layer]
    with matplotlib.rc_context(style()):
        drawings = [
            (
                "The bias of every expert",
                _biases(data),
                f"Router {layer_name}, where most went wrong. “Due” is NumPy int64 arithmetic on the tokens "
                "that this very run routed: solid on top of dashed means right. The runs part because they "
                "route differently.",
            ),
            (
                "Load violation",
                _curves(data, "max_vio", "MaxVio, mean of layers"),
                "Tokens of the busiest expert over its fair share, minus one. 0 is perfect balance.",
            ),
            (
                "Error of the token counter",
                _curves(data, "count_error", "tokens, worst expert"),
                "What the counter holds when the balancer reads it, against the true count.",
            ),
        ]
    body = "".join(
        f"<h2>{e(title)}</h2><figure>{svg}<figcaption>{e(caption)}</figcaption></figure>"
        for title, svg, caption in drawings
    )
    table = "".join(
        f"<tr><th scope=row>{e(what)}</th><td class=off>{e(off)}</td><td class=on>{e(on)}</td></tr>"
        for what, off, on in rows(data)
    )
    good = protected(data)
    verdict = (
        "With the plugin on, every update was right and every router tensor fp32 or wider."
        if good
        else "With the plugin on, something was still wrong. See below."
    )
    points = "".join(f"<li>{e(sentence)}</li>" for sentence in findings(data))
    choices = "".join(f"<dt>{e(what)}</dt><dd>{e(why)}</dd>" for what, why in data["choices"])
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Router precision, Megatron-Core {e(data['megatron'])}</title><style>{CSS}</style></head>"
        f"<body><h1>What bf16 does to a router</h1><p class=soft>Megatron-Core {e(data['megatron'])}, the "
        f"same {data['steps']} steps from one seed, without and with megatron-fp32-router "
        f"{e(data['plugin'])}. PyTorch {e(data['torch'])}, Python {e(data['python'])}.</p>"
        f'<p class="verdict{"" if good else " bad"}">{e(verdict)}</p><ul>{points}</ul>'
        "<h2>Off beside on</h2><div class=wide><table><thead><tr><th></th><th>plugin off</th>"
        f"<th>plugin on</th></tr></thead><tbody>{table}</tbody></table></div>{body}<h2>What was run, "
        f"and why</h2><dl>{choices}</dl></body></html>\n"
    )
