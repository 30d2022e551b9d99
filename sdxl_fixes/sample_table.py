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

from sdxl_fixes.atomic import alone, real, replacing
from sdxl_fixes.errors import printable

_MARK = '<meta name="generator" content="sdxl-fixes samples">'
# one tag, so that a write that was cut off leaves a tag without an end, which browsers drop
_SAMPLE = re.compile(r'<img data-c="([^"]*)" data-p="([^"]*)" [^>]*?src="data:image/png;base64,([^"]*)">')
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
body>img{max-width:var(--cell);height:auto}
dialog{width:100vw;height:100dvh;max-width:none;max-height:none;margin:0;padding:12px;border:0;background:#0b0c0e;
color:#e9ebf0;cursor:zoom-out}
dialog[open]{display:grid;grid-template-rows:minmax(0,1fr) auto;gap:10px}
dialog:focus{outline:none}
dialog img{width:100%;height:100%;object-fit:contain}
dialog p{margin:0;max-height:6em;overflow:auto;text-align:center}
@media(max-width:640px){:root{--cell:132px;--label:96px}body{font-size:12px}header{padding:16px 10px 10px}
th,td{padding:5px}tbody th,thead th:first-child{padding-left:10px}}
"""
# of two samples of one cell the later counts; the open picture is a copy of the cell's element: a page has one
# src for a picture
_SCRIPT = """
const dialog = document.querySelector("dialog"), table = document.querySelector("table");
function put(parent, name, text = "") {
  const made = parent.appendChild(document.createElement(name));
  made.textContent = text;
  return made;
}
function head(row, scope, text) { const made = put(row, "th", text); made.scope = scope; return made; }
addEventListener("DOMContentLoaded", () => {
  const columns = new Map(), count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  for (const image of document.querySelectorAll("body>img")) {
    const {c, p} = image.dataset;
    if (!columns.has(c)) columns.set(c, new Map());
    columns.get(c).get(p)?.remove();
    columns.get(c).set(p, image);
  }
  const prompts = new Set([...columns.values()].flatMap(column => [...column.keys()]));
  const first = put(put(table, "thead"), "tr"), body = put(table, "tbody");
  put(first, "th");
  for (const c of columns.keys()) head(first, "col", c);
  for (const p of prompts) {
    const row = put(body, "tr");
    put(head(row, "row", ""), "div", p);
    for (const column of columns.values()) {
      const cell = put(row, "td");
      if (column.has(p)) put(cell, "button").append(column.get(p));
    }
  }
  document.querySelector("header p").textContent = `${count(prompts.size, "prompt")}, ` +
    `${count(columns.size, "checkpoint")}. A click opens a picture, arrow keys or a swipe its neighbours.`;
});
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

    The file is a head, whose script arranges the table when a browser has read the page, and then a line for
    every sample, the latest last: to add is to append. Killed at any moment, it shows the samples before. What
    another process added meanwhile stays.

    Raises ValueError for an existing file of another kind.
    """

    def __init__(self, path: str | Path, title: str = "Samples") -> None:
        self.path, self.title = Path(path), title
        self.cells: dict[str, dict[str, str]] = {}  # checkpoint -> prompt -> PNG, base64
        self._unwritten: dict[tuple[str, str], None] = {}  # cells that the file lacks, or has older
        self._size = self._samples = 0  # bytes and samples of the file, as long as it can be appended to
        if self.path.exists():
            self._read()

    def add(self, checkpoint: str, prompt: str, image: Any) -> None:
        """Put ``image`` (a PIL image) into the table, in place of an older one, and write it to the file."""
        self.update([(checkpoint, prompt, image)])

    def update(self, samples: Iterable[tuple[str, str, Any]]) -> None:
        """Many at once: (checkpoint, prompt, image)."""
        for checkpoint, prompt, image in samples:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            # a browser reads and a file holds neither control characters nor half a surrogate
            cell = printable(str(checkpoint)), printable(str(prompt))
            rows, png = self.cells.setdefault(cell[0], {}), base64.b64encode(buffer.getvalue()).decode()
            if rows.get(cell[1]) != png:
                rows[cell[1]], self._unwritten[cell] = png, None
        folder = real(self.path).parent
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            self._write()

    def _read(self) -> None:
        """Take what the file holds, but for cells that are newer here."""
        content = self.path.read_bytes()
        page = content.decode("utf-8", errors="replace")
        found = list(_SAMPLE.finditer(page))
        # the last may have been cut off
        if _MARK not in page or len(found) != page[: page.rfind(">") + 1].count("<img "):
            raise ValueError(f"{self.path} exists and is not a table of samples: choose another file")
        ours, self.cells = self.cells, {}
        for checkpoint, prompt, png in (sample.groups() for sample in found):
            self.cells.setdefault(html.unescape(checkpoint), {})[html.unescape(prompt)] = png
        for column, rows in ours.items():
            theirs = self.cells.setdefault(column, {})
            for row, png in rows.items():
                if row not in theirs or (column, row) in self._unwritten:
                    theirs[row] = png
        if content == "".join([self._head(), *(f"{sample[0]}\n" for sample in found)]).encode():
            self._size, self._samples = len(content), len(found)

    def _write(self) -> None:
        """Append, if the file is as we left it, and would not be mostly older pictures of the same cells."""
        exists = self.path.exists()
        if exists and self.path.stat().st_size != self._size:
            self._size = 0
            self._read()  # what another process added
        size, self._size = self._size, 0  # until all is written
        cells = sum(map(len, self.cells.values()))
        if exists and size and self._samples + len(self._unwritten) <= 2 * cells:
            content = "".join(self._sample(*cell) for cell in self._unwritten).encode()
            self._samples += len(self._unwritten)
            with self.path.open("ab") as file:
                file.write(content)
        else:
            size, self._samples = 0, cells
            samples = (self._sample(column, row) for column in self.cells for row in self.cells[column])
            content = "".join([self._head(), *samples]).encode()
            with replacing(self.path) as partial:
                partial.write_bytes(content)
        self._size = size + len(content)
        self._unwritten.clear()

    def _head(self) -> str:
        title = html.escape(printable(self.title))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_MARK}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><header><h1>{title}</h1><p></p>"
            "<noscript>The script of this page makes a table of the pictures below: allow it.</noscript></header>\n"
            f"<table></table><dialog tabindex='-1'></dialog><script>{_SCRIPT}</script>\n"
        )

    def _sample(self, checkpoint: str, prompt: str) -> str:
        png = self.cells[checkpoint][prompt]
        width, height = struct.unpack(">II", base64.b64decode(png[:32])[16:24])  # of PNG's first chunk
        column, row = html.escape(checkpoint), html.escape(prompt)
        # a picture of its own: browsers end a text, such as a script with all of them, at 512 MB
        return (
            f'<img data-c="{column}" data-p="{row}" alt="{column}: {row}" width="{width}" '
            f'height="{height}" src="data:image/png;base64,{png}">\n'
        )
