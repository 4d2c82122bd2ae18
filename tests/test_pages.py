"""The three pages, in a real browser: what can be read, what is clipped, what is fetched, what charts answer.

Skipped where there is no Chromium. The first tests need none.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from made_up import a_run, demo_data, release_data
from safetensors.numpy import save_file

from megatron_fp32_router import pages
from megatron_fp32_router.audit import audit, open_checkpoint
from megatron_fp32_router.audit.page import page as audit_page
from megatron_fp32_router.lab import demo_page
from megatron_fp32_router.monitor import page as monitor_page
from megatron_fp32_router.monitor import runs

#: As `npm pack uplot@1.6.32` gives them.
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}

#: In front of a page's own scripts: what is written on canvases, which no element tells.
RECORDER = """
window.written = [];
const original = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...more) {
  const size = this.measureText(text), at = this.getTransform();
  const corners = [[-size.actualBoundingBoxLeft, -size.actualBoundingBoxAscent],
    [size.actualBoundingBoxRight, size.actualBoundingBoxDescent]]
    .map(([dx, dy]) => at.transformPoint({ x: x + dx, y: y + dy }));
  const xs = corners.map((corner) => corner.x), ys = corners.map((corner) => corner.y);
  window.written.push({ text, size: parseFloat(/([\\d.]+)px/.exec(this.font)[1]) / devicePixelRatio,
    colour: this.fillStyle, inside: Math.min(...xs) > -1 && Math.max(...xs) < this.canvas.width + 1
      && Math.min(...ys) > -1 && Math.max(...ys) < this.canvas.height + 1 });
  return original.call(this, text, x, y, ...more);
};
"""

#: Everything that is wrong with how a page looks, as sentences.
COMPLAINTS = """
(() => {
  const wrong = [], seen = new Set();
  const light = (colour) => {
    const parts = colour.startsWith("#") ? [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16))
      : colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const [r, g, b] = parts.map((v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element), range = document.createRange();
    range.selectNodeContents(texts.currentNode);
    const box = range.getBoundingClientRect(), hidden = element.closest(".stacks thead") && innerWidth < 640;
    if (hidden) continue;
    seen.add(text);
    if (parseFloat(style.fontSize) < 11) wrong.push(`${style.fontSize}: ${text}`);
    const ratio = contrast(style.color, behind(element));
    if (ratio < 4.5) wrong.push(`contrast ${ratio}: ${text}`);
    if (!element.closest(".wide") && (box.left < 0 || box.right > innerWidth)) wrong.push(`outside: ${text}`);
    for (let at = element; at !== document.body; at = at.parentElement) {
      const cuts = getComputedStyle(at).overflowX;
      if ((cuts === "hidden" || cuts === "clip") && at.scrollWidth > at.clientWidth + 1) wrong.push(`clipped: ${text}`);
    }
  }
  const page = getComputedStyle(document.body).backgroundColor;
  for (const { text, size, colour, inside } of window.written) {
    if (size < 11) wrong.push(`${size}px on a canvas: ${text}`);
    if (!inside) wrong.push(`clipped on a canvas: ${text}`);
    if (contrast(colour, page) < 4.5) wrong.push(`contrast ${contrast(colour, page)} on a canvas: ${text} ${colour}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) wrong.push(`${document.documentElement.scrollWidth} wide`);
  for (const figure of document.querySelectorAll("figure.chart"))
    if (!figure.querySelector("canvas")) wrong.push(`not drawn: ${figure.querySelector("h3").textContent}`);
  for (const picture of document.querySelectorAll("canvas, svg, img"))
    if (!picture.closest("[role=img][aria-label]")) wrong.push("a picture without a name");
  return { wrong: [...new Set(wrong)], texts: seen.size, written: window.written.length,
    scheme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" };
})()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three pages, as files."""
    folder = tmp_path_factory.mktemp("pages")
    many = a_run(folder)
    biases = np.array([0.5, 0.5, 0.25, 0.7421875], np.float32)
    values = {f"model.layers.{i}.mlp.gate.e_score_correction_bias": biases * (i + 1) for i in range(2)}
    save_file(values | {"model.layers.0.mlp.gate.weight": np.ones((4, 8), np.float16)}, folder / "model.safetensors")
    made = {
        "monitor": monitor_page.render(many, runs.findings(many)),
        "audit": audit_page(audit(open_checkpoint(folder / "model.safetensors"), rates=[1e-3])),
        "demo": demo_page.render(demo_data(release_data(), release_data(megatron="0.19.2"))),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("name", ["monitor", "audit", "demo"])
def test_a_page_loads_nothing_and_its_policy_allows_its_own_script_only(name: str, written: dict[str, Path]) -> None:
    text = written[name].read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert not re.findall(r"""\b(?:src|href|url\()=?["']?[^"' ]+""", text.replace(scripts[0], ""))
    assert "http:" not in text.replace(scripts[0], "")
    assert "https:" not in text.replace(scripts[0], "")
    assert len(text) < 150_000
    for fact in ("Plugin", "Megatron", "Settings", "Sample", "Page written"):
        assert f"<dt>{fact}</dt>" in text


def test_uplot_is_as_it_was_released() -> None:
    folder = Path(pages.__file__).parent / "uplot"
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == UPLOT
    assert "v1.6.32" in (folder / "uPlot.iife.min.js").read_text(encoding="utf-8")[:100]


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    program = browser.found()
    if program is None:
        pytest.skip(browser.MISSING)
    with browser.Browser(program) as running:
        running.before_every_page(RECORDER)
        yield running


@pytest.mark.in_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["1280 light", "390 dark"])
@pytest.mark.parametrize("name", ["monitor", "audit", "demo"])
def test_every_letter_can_be_read_and_the_page_does_not_scroll_sideways(
    name: str, width: int, dark: bool, written: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.requests.clear()
    chromium.look_at(written[name], width, dark)
    found = chromium.ask(COMPLAINTS)
    assert found["wrong"] == []
    assert found["texts"] > 20 < found["written"]
    assert found["scheme"] == ("dark" if dark else "light")
    assert set(chromium.requests) == {written[name].as_uri()}
    assert chromium.errors == []


def _drag(chromium: browser.Browser, box: dict[str, float]) -> None:
    """Across the middle third of a drawing."""
    places = [(box["x"] + box["width"] * part, box["y"] + box["height"] / 2) for part in (0.4, 0.5, 0.7)]
    kinds = ("mousePressed", "mouseMoved", "mouseReleased")
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=places[0][0], y=places[0][1])
    for kind, (x, y) in zip(kinds, places, strict=True):
        chromium.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


@pytest.mark.in_browser
def test_a_chart_tells_values_to_pointer_and_keys_and_zooms(
    written: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.look_at(written["monitor"], 1280)
    lines, shades = "document.querySelector('.plot')", "document.querySelectorAll('.plot')[1]"

    def legend() -> Any:
        return chromium.ask(f"[...{lines}.querySelectorAll('.u-value')].map(cell => cell.textContent)")

    assert set(legend()) == {"\N{EN DASH}"}
    press = "dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    chromium.ask(f"{lines}.{press}")
    assert legend()[0] == "100"
    chromium.ask(f"{lines}.{press}")
    # The step, the smallest, median and largest of twelve layers whose MaxVio is 1/layer, and the worst one.
    assert legend() == ["200", "0.08333", "0.1548", "1", "1"]
    chromium.ask(f"{shades}.{press}")
    assert "training step 100, layer 1: 1" in chromium.ask(f"{shades}.querySelector('.shown').textContent")
    where = f"{lines}.querySelector('.u-over').getBoundingClientRect().toJSON()"
    chromium.ask("window.written.length = 0")
    _drag(chromium, chromium.ask(where))
    chromium.ask("new Promise(done => setTimeout(done, 100))")
    steps = chromium.ask("window.written.map(({text}) => Number(text)).filter(step => step >= 10)")
    assert 400 < min(steps) < max(steps) < 750
    assert chromium.errors == []
