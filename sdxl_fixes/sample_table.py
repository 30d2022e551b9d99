"""The same prompts and seeds from every checkpoint, as one HTML file: a column per checkpoint, a row per
prompt."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import printable

_MARK = '<meta name="generator" content="sdxl-fixes samples">'
_CELL = re.compile(r'<img data-c="([^"]*)" data-p="([^"]*)" alt="" src="data:image/png;base64,([^"]*)">')
_STYLE = (
    "table{border-collapse:collapse}td,th{padding:4px;vertical-align:top;font:14px "
    "sans-serif;text-align:left}img{max-width:320px}"
)


class SampleTable:
    """A growing table in one file, which holds its pictures. An existing file of this kind is continued, so a
    resumed run goes on in it.

    Raises ValueError for an existing file of another kind.
    """

    def __init__(self, path: str | Path, title: str = "Samples") -> None:
        self.path, self.title = Path(path), title
        self.cells: dict[str, dict[str, str]] = {}  # checkpoint -> prompt -> PNG, base64
        if self.path.exists():
            page = self.path.read_text(encoding="utf-8", errors="replace")
            if _MARK not in page:
                raise ValueError(f"{self.path} exists and is not a table of samples: choose another file")
            head = re.findall("<th>([^<]*)</th>", page[: page.index("</tr>")])
            self.cells = {html.unescape(checkpoint): {} for checkpoint in head[1:]}
            for checkpoint, prompt, png in _CELL.findall(page):
                self.cells[html.unescape(checkpoint)][html.unescape(prompt)] = png

    def add(self, checkpoint: str, prompt: str, image: Any) -> None:
        """Put ``image`` (a PIL image) into the table, in place of an older one, and write the file."""
        self.update([(checkpoint, prompt, image)])

    def update(self, samples: Iterable[tuple[str, str, Any]]) -> None:
        """Many at once: (checkpoint, prompt, image)."""
        for checkpoint, prompt, image in samples:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            # a browser reads and a file holds neither control characters nor half a surrogate
            column = self.cells.setdefault(printable(str(checkpoint)), {})
            column[printable(str(prompt))] = base64.b64encode(buffer.getvalue()).decode()
        self._write()

    def _write(self) -> None:
        prompts = list(dict.fromkeys(prompt for column in self.cells.values() for prompt in column))
        head = "".join(f"<th>{html.escape(checkpoint)}</th>" for checkpoint in self.cells)
        rows = "".join(
            f"<tr><th>{html.escape(prompt)}</th>{''.join(self._cell(checkpoint, prompt) for checkpoint in self.cells)}</tr>\n"
            for prompt in prompts
        )
        page = (
            f'<!doctype html><meta charset="utf-8">{_MARK}<title>{html.escape(printable(self.title))}</title>'
            f"<style>{_STYLE}</style>\n<table><tr><th></th>{head}</tr>\n{rows}</table>\n"
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write_text(page, encoding="utf-8")

    def _cell(self, checkpoint: str, prompt: str) -> str:
        if prompt not in self.cells[checkpoint]:
            return "<td></td>"
        # a picture of its own: browsers end a text, such as a script with all of them, at 512 MB
        key = f'data-c="{html.escape(checkpoint)}" data-p="{html.escape(prompt)}"'
        return f'<td><img {key} alt="" src="data:image/png;base64,{self.cells[checkpoint][prompt]}"></td>'
