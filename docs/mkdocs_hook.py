"""mkdocs' hook: README is the site's first page, and what pages link to outside docs/ is part of the site.

Pages stay as they are read on GitHub; only links are translated, from places in the repository to places in
the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")
PLACES = {"README.md": "index.md"}  # of files at the root; all others keep their place


def on_files(files: Files, config: Any) -> Files:
    """The site's files: those of docs/, README, and whatever outside docs/ these link to or lead to."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    for page in waiting:
        if not page.startswith("docs/"):
            files.append(File.generated(config, placed(page), abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            linked = {
                target(page, link) for _, link in LINK.findall((ROOT / page).read_text(encoding="utf-8"))
            }
            new = sorted(
                name for name in linked - seen if not name.startswith("docs/") and (ROOT / name).is_file()
            )
            waiting += new
            seen |= set(new)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links translated."""
    place = page.file.src_uri
    source = next((name for name, moved in PLACES.items() if moved == place), place)
    if not (ROOT / source).is_file() or (ROOT / "docs" / place).is_file():
        source = f"docs/{place}"

    def translated(match: re.Match[str]) -> str:
        return match[1] + posixpath.relpath(placed(target(source, match[2])), posixpath.dirname(place) or ".")

    return LINK.sub(translated, markdown)


def target(page: str, link: str) -> str:
    """The place in the repository that ``link`` in ``page`` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def placed(name: str) -> str:
    """The place in the site of a place in the repository."""
    return PLACES.get(name, name.removeprefix("docs/"))
