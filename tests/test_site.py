"""The documentation builds as a site without a warning, is complete without a network, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import megatron_fp32_router

ROOT = Path(__file__).resolve().parent.parent


class _Page(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "src" in found or (tag == "link" and found.get("rel") != "canonical"):
            self.loads.append(found.get("src") or found.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, _Page]:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {page: _Page(page.read_text(encoding="utf-8")) for page in folder.rglob("*.html")}


def test_every_page_of_the_repository_is_on_the_site(site: dict[Path, _Page]) -> None:
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    wanted = pages | {"index.html", "source-patches.html", "CHANGELOG.html", "CONTRIBUTING.html"}
    assert [page for page in sorted(wanted) if not any(built.as_posix().endswith(f"/{page}") for built in site)] == []


def test_every_link_leads_to_a_page_and_a_place_on_it(site: dict[Path, _Page]) -> None:
    broken = []
    for page, found in site.items():
        for link in found.links:
            if re.match(r"https?:|mailto:", link) or page.name == "404.html":  # that one is for a server
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in site and unquote(anchor) not in site[target].ids):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_a_network(site: dict[Path, _Page]) -> None:
    assert [load for found in site.values() for load in found.loads if "//" in load] == []


def test_tables_and_lists_between_comments_are_made_into_tables_and_lists(site: dict[Path, _Page]) -> None:
    for page in site:
        assert "| --- |" not in page.read_text(encoding="utf-8"), page


def test_the_reference_has_every_public_name(site: dict[Path, _Page]) -> None:
    (api,) = (found for page, found in site.items() if page.name == "api.html")
    named = {anchor.rpartition(".")[2] for anchor in api.ids if anchor.startswith("megatron_fp32_router.")}
    assert set(megatron_fp32_router.__all__) - {"__version__"} <= named
