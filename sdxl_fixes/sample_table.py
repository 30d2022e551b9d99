"""The same prompts and seeds from every checkpoint, as one HTML file: a column per checkpoint, a row per
prompt. Headings stay in sight; a picture opens whole, and arrow keys then go to its neighbours."""

from __future__ import annotations

import base64
import html
import io
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing
from sdxl_fixes.errors import printable

_MARK = '<meta name="generator" content="sdxl-fixes samples">'
_COLUMN = re.compile('<th scope="col">([^<]*)</th>')
_PICTURE = re.compile(r'<img data-c="([^"]*)" data-p="([^"]*)" [^>]*?src="data:image/png;base64,([^"]*)">')
_STYLE = """
:root{color-scheme:light dark;--cell:240px;--label:220px;--page:#fff;--ink:#1b1d22;--soft:#666c78;--line:#e3e5ea;
--accent:#2f6fde}
@media(prefers-color-scheme:dark){:root{--page:#131519;--ink:#e9ebf0;--soft:#989fad;--line:#2b2f37;--accent:#7fb0ff}}
*,::before{box-sizing:border-box}
body{margin:0;width:max-content;min-width:100%;background:var(--page);color:var(--ink);
font:14px/1.45 system-ui,sans-serif}
header{position:sticky;left:0;width:100vw;max-width:100%;padding:24px 20px 16px}
h1{margin:0;font-size:1.6em;line-height:1.2;font-weight:650;overflow-wrap:anywhere}
header p{margin:6px 0 0;color:var(--soft)}
table{border-collapse:separate;border-spacing:0;padding-bottom:24px}
th,td{padding:8px;text-align:left;vertical-align:top;font-weight:400}
th{position:sticky;background:var(--page);z-index:1;overflow-wrap:anywhere}
thead th{top:0;font-weight:600;border-bottom:2px solid var(--accent);font-variant-numeric:tabular-nums}
tbody th,thead th:first-child{left:0;width:var(--label);min-width:var(--label);max-width:var(--label);padding-left:20px}
thead th:first-child{z-index:2}
tbody tr+tr>*{border-top:1px solid var(--line)}
tbody th div{position:sticky;top:48px;max-height:160px;overflow:auto;hyphens:auto}
td>*,td:empty::before{display:block;width:var(--cell)}
td:empty::before{content:"no picture";padding:8px;border:1px dashed var(--line);border-radius:6px;color:var(--soft)}
button{padding:0;border:0;background:none;cursor:zoom-in;border-radius:6px}
button:hover,button:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
td img{display:block;width:100%;height:auto;border-radius:6px}
dialog{width:100vw;height:100dvh;max-width:none;max-height:none;margin:0;padding:12px;border:0;background:#0b0c0e;
color:#e9ebf0;cursor:zoom-out}
dialog[open]{display:grid;grid-template-rows:minmax(0,1fr) auto;gap:10px}
dialog:focus{outline:none}
dialog img{width:100%;height:100%;object-fit:contain}
dialog p{margin:0;max-height:6em;overflow:auto;text-align:center}
@media(max-width:640px){:root{--cell:132px;--label:96px}body{font-size:12px}header{padding:16px 10px 10px}
th,td{padding:5px}tbody th,thead th:first-child{padding-left:10px}}
"""
# the open picture is a copy of the cell's element: a page has one src for a picture
_SCRIPT = """
const dialog = document.querySelector("dialog"), table = document.querySelector("table");
const keys = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
let button;
function show(wanted) {
  button = wanted;
  const words = document.createElement("p"), image = button.firstChild.cloneNode();
  words.textContent = image.alt;
  dialog.replaceChildren(image, words);
  if (!dialog.open) dialog.showModal();
  dialog.focus();
}
table.onclick = event => { const found = event.target.closest("button"); if (found) show(found); };
dialog.onclick = () => dialog.close();
dialog.onclose = () => { button.scrollIntoView({block: "nearest", inline: "nearest"}); button.focus(); };
function move(down, right) {
  let {rowIndex: row} = button.closest("tr"), {cellIndex: column} = button.closest("td"), cell;
  do cell = table.rows[row += down]?.cells[column += right];
  while (cell?.matches("td:empty"));
  if (cell?.matches("td")) show(cell.firstChild);
}
dialog.onkeydown = event => {
  if (!keys[event.key]) return;
  event.preventDefault();
  move(...keys[event.key]);
};
let start;
dialog.ontouchstart = event => { start = event.touches[0].clientX; };
dialog.ontouchend = event => {
  const way = event.changedTouches[0].clientX - start;
  if (Math.abs(way) > 40) move(0, way < 0 ? 1 : -1);
};
"""


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
            pictures = _PICTURE.findall(page)
            if _MARK not in page or len(pictures) != page.count("<img "):
                raise ValueError(f"{self.path} exists and is not a table of samples: choose another file")
            self.cells = {html.unescape(checkpoint): {} for checkpoint in _COLUMN.findall(page)}
            for checkpoint, prompt, png in pictures:
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write_text(self._page(prompts), encoding="utf-8")

    def _page(self, prompts: list[str]) -> str:
        title = html.escape(printable(self.title))
        head = "".join(f'<th scope="col">{html.escape(checkpoint)}</th>' for checkpoint in self.cells)
        rows = "".join(
            f'<tr><th scope="row"><div>{html.escape(prompt)}</div></th>'
            f"{''.join(self._cell(checkpoint, prompt) for checkpoint in self.cells)}</tr>\n"
            for prompt in prompts
        )
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_MARK}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><header><h1>{title}</h1>"
            f"<p>{_count(len(prompts), 'prompt')}, {_count(len(self.cells), 'checkpoint')}. "
            "A click opens a picture, arrow keys or a swipe its neighbours.</p></header>\n"
            f"<table><thead><tr><th></th>{head}</tr></thead>\n<tbody>{rows}</tbody></table>\n"
            f"<dialog tabindex='-1'></dialog><script>{_SCRIPT}</script></body></html>\n"
        )

    def _cell(self, checkpoint: str, prompt: str) -> str:
        if prompt not in self.cells[checkpoint]:
            return "<td></td>"
        png = self.cells[checkpoint][prompt]
        width, height = struct.unpack(">II", base64.b64decode(png[:32])[16:24])  # of PNG's first chunk
        column, row = html.escape(checkpoint), html.escape(prompt)
        # a picture of its own: browsers end a text, such as a script with all of them, at 512 MB
        return (
            f'<td><button><img data-c="{column}" data-p="{row}" alt="{column}: {row}" width="{width}" '
            f'height="{height}" src="data:image/png;base64,{png}"></button></td>'
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
