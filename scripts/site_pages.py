"""A hook of mkdocs (mkdocs.yml) that adds pages from outside docs/ to the site and changes links for it.

The pages are written to be read in the repository, where a link may lead to any file. On the site it leads to the page
made from that file; a file without a page is named without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parent.parent

#: File of the repository -> page of the site, beside docs/X, which is page X.
OUTSIDE: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "patches/README.md": "source-patches.md",
}
_SOURCE: Final = {page: file for file, page in OUTSIDE.items()}
_LINK: Final = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
_IMAGE: Final = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    source = page.file.src_uri
    here = _SOURCE.get(source, f"docs/{source}")
    if here == "README.md":
        markdown = _IMAGE.sub(r"\1", markdown)

    def leads(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found["target"]))
        if not (ROOT / target).exists():
            return found[0]  # mkdocs says so
        target = f"{target}/README.md" if f"{target}/README.md" in OUTSIDE else target
        to = OUTSIDE.get(target) or target.removeprefix("docs/")
        if to == target and target not in OUTSIDE:
            return f"{found['text']} (`{target}` in the repository)"
        return f"[{found['text']}]({posixpath.relpath(to, posixpath.dirname(source) or '.')}{found['anchor'] or ''})"

    return _LINK.sub(leads, markdown)
