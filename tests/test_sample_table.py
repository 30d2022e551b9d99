"""The sample table holds its pictures, goes on after a restart, and touches no file of another kind."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdxl_fixes import sample_table
from sdxl_fixes.cli import main
from sdxl_fixes.sample_table import SampleTable


def picture(grey):
    return Image.new("RGB", (4, 3), (grey, grey, grey))


class Page(HTMLParser):
    """The page by Python's own reader of HTML, which like a browser drops a tag without an end: ``tags`` with
    their attributes, and ``texts``."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


def shown(path):
    """Rows of (prompt, grey of each cell), as the page's script arranges them (tested in a browser below)."""
    columns = {}
    for tag, image in Page(path).tags:
        if tag == "img":
            png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
            grey = Image.open(io.BytesIO(png)).getpixel((0, 0))[0]
            columns.setdefault(image["data-c"], {})[image["data-p"]] = grey
    prompts = dict.fromkeys(prompt for column in columns.values() for prompt in column)
    return [(prompt, [column.get(prompt) for column in columns.values()]) for prompt in prompts]


def test_a_column_per_checkpoint_and_a_row_per_prompt_also_after_a_restart(tmp_path):
    path = tmp_path / "runs" / "samples.html"
    table = SampleTable(path)
    table.add("step 100", "a cat", picture(10))
    table.add("step 100", "a dog", picture(20))
    again = SampleTable(path)
    again.add("step 200", "a cat", picture(30))
    again.add("step 100", "a dog", picture(25))
    assert shown(path) == [("a cat", [10, 30]), ("a dog", [25, None])]
    assert [file.name for file in path.parent.iterdir()] == ["samples.html"]


def test_markup_and_control_characters_in_a_prompt_are_text(tmp_path):
    path = tmp_path / "samples.html"
    script, prompt = '</script><script>alert("x")</script><!--', "a <b>&</b> </td>\r\n\x1b[31m\ud800'\" \x00"
    SampleTable(path, "\udfff").add(script, prompt, picture(1))
    safe = "a <b>&</b> </td>\\r\\n\\x1b[31m\\ud800'\" \\x00"
    page = Page(path)
    own = "html head meta title style body header h1 p noscript table dialog script img"
    assert sorted({tag for tag, _ in page.tags}) == sorted(own.split())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.texts.count("\\udfff") == 2
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert image["alt"] == f"{script}: {safe}" and image["data-c"] == script
    assert shown(path) == [(safe, [1])]
    SampleTable(path).add(script, prompt, picture(2))  # the same cell
    assert SampleTable(path).cells.keys() == {script} and SampleTable(path).cells[script].keys() == {safe}


def test_a_picture_is_a_text_of_its_own(tmp_path):
    """Browsers show nothing of one text beyond 512 MB."""
    path = tmp_path / "samples.html"
    for k in range(3):
        SampleTable(path).add(f"{k}", "a cat", picture(k))
    assert shown(path) == [("a cat", [0, 1, 2])]
    assert path.read_text(encoding="utf-8").count("data:image/png") == 3


def test_columns_stay_in_order_where_the_first_row_has_gaps(tmp_path):
    path = tmp_path / "samples.html"
    for checkpoint, prompt in (("1", "a"), ("2", "b"), ("3", "a")):
        SampleTable(path).add(checkpoint, prompt, picture(5))
    assert list(SampleTable(path).cells) == ["1", "2", "3"]


def test_the_title_is_text(tmp_path):
    title = '</title><b>&amp; "it\'s"'
    SampleTable(tmp_path / "samples.html", title).add("1", "a cat", picture(1))
    page = Page(tmp_path / "samples.html")
    assert page.texts.count(title) == 2 and "b" not in {
        tag for tag, _ in page.tags
    }  # the tab's, and a heading


def rules(style):
    """selector -> its declarations, of rules outside of @media."""
    plain = re.sub(r"@media[^{]*{(?:[^{}]*{[^}]*})*[^{}]*}", "", style)
    found = {}
    for selectors, body in re.findall(r"([^{}]+){([^}]*)}", plain):
        for selector in selectors.split(","):
            found[selector.strip()] = f"{found.get(selector.strip(), '')};{body}"
    return found


def test_headings_stay_and_pictures_have_words_and_sizes(tmp_path):
    path = tmp_path / "samples.html"
    SampleTable(path, "my run").update([("1", 'a "cat"', picture(1)), ("2", 'a "cat"', picture(2))])
    page = Page(path)
    viewports = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ['1: a "cat"', '2: a "cat"']
    assert {(image["width"], image["height"]) for image in images} == {("4", "3")}
    found = rules(next(text for text in page.texts if "--accent" in text))
    assert "position:sticky" in found["th"] and "background:var(--page)" in found["th"]
    assert "top:0" in found["thead th"].split(";") and "left:0" in found["tbody th"]
    assert "left:0" in found["thead th:first-child"] and "z-index:2" in found["thead th:first-child"]


def test_a_table_whose_pictures_cannot_be_read_is_not_continued_without_them(tmp_path):
    path = tmp_path / "samples.html"
    SampleTable(path).add("1", "a cat", picture(1))
    path.write_text(path.read_text().replace(' alt="', ' title="a cat" src="other.png" alt="', 1) + "<img x>")
    with pytest.raises(ValueError, match="is not a table of samples"):
        SampleTable(path)


# what a reader sees and does; in a frame, since a window is never as narrow as a phone
LOOK = """
const rect = element => element.getBoundingClientRect(), all = what => [...document.querySelectorAll(what)];
const press = key => dialog.dispatchEvent(new KeyboardEvent("keydown", {key}));
const open = () => [dialog.open, dialog.querySelector("img").alt];
onload = () => {
  scrollTo(500, 200);
  const found = {scrolled: [scrollX, scrollY], width: innerWidth};
  const texts = what => all(what).map(e => e.textContent);
  found.heads = [texts("thead th[scope=col]"), texts("tbody th[scope=row]"), texts("header p")];
  found.pictures = [all("img").length, all("td > button > img").length];
  found.grid = [...document.querySelector("tbody").rows].map(r => [...r.querySelectorAll("td")].map(
    e => e.querySelector("img")?.alt ?? (e.matches(":empty") ? null : "?")));
  found.background = getComputedStyle(document.body).backgroundColor;
  found.left = all("header, tbody th, thead th:first-child").map(e => rect(e).left);
  found.top = all("thead th").map(e => rect(e).top);
  found.cells = all("td button").map(e => rect(e).width);
  found.corner = document.elementFromPoint(5, 5) === document.querySelector("thead th");
  all("td img")[0].click(); found.clicked = [...open(), dialog.querySelector("img").naturalWidth];
  found.large = rect(dialog.querySelector("img")).width;
  press("ArrowRight"); found.right = open();
  press("ArrowDown"); found.down = open();
  press("ArrowDown"); found.end = open();
  dialog.addEventListener("close", () => {
    found.closed = [dialog.open, document.activeElement.firstChild.alt];
    parent.postMessage(JSON.stringify(found), "*");
  });
  dialog.click();
};
"""
FRAME = """<iframe src="samples.html" style="border:0;width:{}px;height:{}px"></iframe>
<script>onmessage = event => {{ document.documentElement.textContent = event.data; }}</script>"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium in PATH: apt install chromium")
@pytest.mark.parametrize(("size", "dark", "cell"), [((390, 700), True, 132), ((1280, 700), False, 240)])
def test_in_a_browser_headings_stay_and_a_picture_opens(tmp_path, size, dark, cell):
    """Also of a file in which a picture was replaced, and whose last one was cut off; names are text."""
    path, columns, rows = tmp_path / "samples.html", [f"step {k}" for k in range(15)], range(12)
    columns[3] = "</table><b>&amp;</b>'\""
    table = SampleTable(path)
    table.add("step 0", "prompt 0", Image.new("RGB", (9, 9)))
    for k, column in enumerate(columns):
        table.update((column, f"prompt {n}", picture(100 + k)) for n in rows if (k, n) != (1, 0))
    page = path.read_text(encoding="utf-8").replace("<table>", f"<script>{LOOK}</script><table>")
    assert page.count("<img ") == 180 and "<script>\nconst" in page
    page += page[page.rindex("<img ") : -9].replace("prompt 11", "prompt 12")
    path.write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(*size))
    words = [
        CHROMIUM,
        *"--headless --no-sandbox --disable-gpu --virtual-time-budget=10000 --dump-dom".split(),
    ]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,800"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "frame.html").as_uri()]
    for _ in range(5):  # on a busy machine Chromium may print the page before the frame has answered
        dumped = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True).stdout
        if answer := re.search(r'{"scrolled".*}', html.unescape(dumped)):
            break
    found = json.loads(answer[0])
    count = "12 prompts, 15 checkpoints. A click opens a picture, arrow keys or a swipe its neighbours."
    assert found["heads"] == [columns, [f"prompt {n}" for n in rows], [count]]
    assert found["pictures"] == [179, 179]
    grid = [[f"{column}: prompt {n}" for column in columns] for n in rows]
    grid[0][1] = None
    assert found["grid"] == grid
    assert found["scrolled"] == [500, 200] and found["width"] == size[0]
    assert set(found["left"]) == {0} and set(found["top"]) == {0} and found["corner"]
    assert set(found["cells"]) == {cell}
    assert (found["background"] == "rgb(255, 255, 255)") is not dark
    assert found["clicked"] == [True, "step 0: prompt 0", 4] and found["large"] > size[0] - 50
    assert found["right"] == [True, "step 2: prompt 0"]  # over the gap
    assert found["down"] == [True, "step 2: prompt 1"] and found["end"] == [True, "step 2: prompt 2"]
    assert found["closed"] == [False, "step 2: prompt 2"]  # and the keyboard goes on from there


def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("<p>mine</p>")
    with pytest.raises(
        ValueError, match=r"index\.html exists and is not a table of samples: choose another file"
    ):
        SampleTable(path)
    assert path.read_text() == "<p>mine</p>"


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "samples.html"
    SampleTable(path).add("1", "a cat", picture(1))
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            SampleTable(path, "another title").add("2", "a cat", picture(2))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["samples.html"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of a file's size")
@pytest.mark.parametrize("room", [0, 90])
def test_on_a_full_disk_the_old_table_stays_and_nothing_is_lost_once_there_is_room(tmp_path, room):
    import resource

    path = tmp_path / "samples.html"
    table = SampleTable(path)
    table.add("1", "a cat", picture(1))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            table.add("2", "a cat", picture(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(path.read_bytes()) == len(before) + room and shown(path) == [("a cat", [1])]
    table.add("3", "a cat", picture(3))
    assert shown(path) == shown_again(path) == [("a cat", [1, 2, 3])]


def shown_again(path):
    """After another start has gone on with the table."""
    SampleTable(path).add("1", "a cat", picture(1))
    return shown(path)


def test_killed_at_any_byte_the_file_is_the_old_table_or_the_new_and_is_gone_on_with(tmp_path):
    path, old, new = tmp_path / "samples.html", [("a <cat>", [1, 2])], [("a <cat>", [1, 2, 3])]
    table = SampleTable(path)
    for k in (1, 2):
        table.add(f"{k}", "a <cat>", picture(k))
    before = path.read_bytes()
    table.add("3", "a <cat>", picture(3))
    after = path.read_bytes()
    start, end = len(before), len(after)
    for length in (*range(start, start + 6), *range(start + 6, end - 6, 9), *range(end - 6, end + 1)):
        path.write_bytes(after[:length])
        assert shown(path) == (old if length < len(after) - 1 else new)  # the last byte is a line end
        SampleTable(path).add("3", "a <cat>", picture(3))
        assert shown(path) == new


def test_what_another_program_removed_or_cut_is_written_whole(tmp_path):
    path = tmp_path / "samples.html"
    table = SampleTable(path)
    table.add("1", "a cat", picture(1))
    path.unlink()
    table.add("2", "a cat", picture(2))
    path.write_bytes(path.read_bytes()[:-20])
    table.add("3", "a cat", picture(3))
    assert shown(path) == [("a cat", [1, 2, 3])]


def test_a_picture_is_appended_and_a_table_does_not_fill_with_replaced_ones(tmp_path):
    path = tmp_path / "samples.html"
    table = SampleTable(path)
    for k in range(20):
        before, file = path.read_bytes() if k else b"", path.stat().st_ino if k else None
        table = table if k % 5 else SampleTable(path)  # also after a restart
        table.add(f"{k // 2}", f"{k % 2}", picture(k))
        assert path.read_bytes().startswith(before) and file in (None, path.stat().st_ino)
    whole, grown = path.stat().st_size, []
    for k in range(50):
        table.add(f"{k % 10}", "1", picture(k))
        grown.append(path.stat().st_size)
    assert max(grown) < 2 * whole and min(grown[20:]) < 1.1 * whole
    assert shown(path) == [("0", [*range(0, 20, 2)]), ("1", [*range(40, 50)])]


def test_two_runs_that_add_to_one_file_keep_each_other_s_pictures(tmp_path):
    path = tmp_path / "samples.html"
    first, second = SampleTable(path), SampleTable(path)  # neither finds a file
    first.add("1", "a cat", picture(1))
    second.add("2", "a cat", picture(2))
    second.add("1", "a cat", picture(3))
    first.add("1", "a dog", picture(4))  # of the first run the picture of the cat is the older one
    second.add("2", "a dog", picture(5))
    assert shown(path) == [("a cat", [3, 2]), ("a dog", [4, 5])]
    path.write_text("<p>mine</p>")
    with pytest.raises(ValueError, match="is not a table of samples"):
        first.add("3", "a cat", picture(6))
    assert path.read_text() == "<p>mine</p>"


def test_what_is_added_while_another_run_writes_the_table_anew_stays(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    path, original = tmp_path / "samples.html", sample_table.replacing
    first, second = SampleTable(path), SampleTable(path)
    thread = threading.Thread(target=lambda: second.add("2", "a cat", picture(9)))

    @contextmanager
    def meanwhile(asked):
        with original(asked) as partial:
            yield partial
            monkeypatch.setattr(sample_table, "replacing", original)
            thread.start()
            thread.join(0.2)

    first.add("1", "a cat", picture(1))
    first.add("1", "a cat", picture(2))
    monkeypatch.setattr(sample_table, "replacing", meanwhile)
    first.add("1", "a cat", picture(3))  # of three pictures of one cell two are dropped
    thread.join()
    assert shown(path) == [("a cat", [3, 9])]


def test_a_picture_that_fails_takes_none_of_the_others_with_it(tmp_path):
    path = tmp_path / "samples.html"
    table = SampleTable(path)
    table.add("1", "a cat", picture(1))
    with pytest.raises(AttributeError):
        table.update([("2", "a cat", picture(2)), ("3", "a cat", None)])
    table.add("4", "a cat", picture(4))
    assert shown(path) == [("a cat", [1, 2, 4])]


def test_what_the_table_has_is_not_added_again(tmp_path):
    path, samples = tmp_path / "samples.html", [(f"{k}", "a cat", picture(k)) for k in range(3)]
    SampleTable(path).update(samples)
    before = path.read_bytes()
    SampleTable(path).update(samples)
    assert path.read_bytes() == before


def previews(folder, **greys):
    folder.mkdir(exist_ok=True)
    for name, grey in greys.items():
        picture(grey).save(folder / f"{name}.png")


def test_kohya_s_previews_become_a_table(tmp_path, capsys):
    folder, table, prompts = tmp_path / "sample", tmp_path / "table.html", tmp_path / "prompts.txt"
    first = dict(
        my_model_e000010_00_20261121193000_1=10,
        my_model_e000002_00_20261121190000_1=20,
        my_model_e000002_01_20261121190001=30,
    )
    previews(
        folder,
        **first,
        my_model_e000002_01_20261121180000=99,
        my_model_000500_00_20261121191000_1=40,
        cover=1,
    )
    prompts.write_text("# two\n\na cat --w 64 --d 1\na dog\n")
    assert main(["samples", str(folder), "-o", str(table), "--prompts", str(prompts)]) == 0
    assert capsys.readouterr().out == f"{table}: 4 images, 3 checkpoints, 2 rows\n"
    assert list(SampleTable(table).cells) == ["step 500", "epoch 2", "epoch 10"]
    assert shown(table) == [("a cat (seed 1)", [40, 20, 10]), ("a dog", [None, 30, None])]
    previews(folder, e000011_00_20261121200000_1=50)
    assert main(["samples", str(folder), "-o", str(table), "--prompts", str(prompts)]) == 0
    assert shown(table)[0] == ("a cat (seed 1)", [40, 20, 10, 50])


def test_what_is_no_folder_of_previews_is_one_sentence(tmp_path, capsys):
    for folder, sentence in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path, "holds no image named as sd-scripts names its previews"),
    ):
        assert main(["samples", str(folder), "-o", str(tmp_path / "table.html")]) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "table.html").exists()
