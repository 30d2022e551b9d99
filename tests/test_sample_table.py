"""The sample table holds its pictures, goes on after a restart, and touches no file of another kind."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdxl_fixes.cli import main
from sdxl_fixes.sample_table import SampleTable


def picture(grey):
    return Image.new("RGB", (4, 3), (grey, grey, grey))


class Page(HTMLParser):
    """The page by Python's own reader of HTML: ``tags`` with their attributes, ``texts``, and ``rows`` of
    (prompt, grey of each cell), as a browser would show them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.rows, self.cell = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag in ("th", "td"):
            self.cell = attributes.get("scope", tag)
        if self.cell == "row" and tag == "th":
            self.rows.append(["", []])
        if tag == "td":
            self.rows[-1][1].append(None)
        if tag == "img":
            png = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
            self.rows[-1][1][-1] = Image.open(io.BytesIO(png)).getpixel((0, 0))[0]

    def handle_endtag(self, tag):
        self.cell = "" if tag in ("th", "td") else self.cell

    def handle_data(self, text):
        self.texts.append(text)
        if self.cell == "row":
            self.rows[-1][0] += text


def shown(path):
    return [(prompt, greys) for prompt, greys in Page(path).rows]


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
    own = (
        "html head meta title style body header h1 p table thead tbody tr th div td button img dialog script"
    )
    assert sorted({tag for tag, _ in page.tags}) == sorted(own.split())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert script in page.texts and safe in page.texts and page.texts.count("\\udfff") == 2
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


def test_headings_stay_and_pictures_have_words_sizes_and_a_button(tmp_path):
    path = tmp_path / "samples.html"
    SampleTable(path, "my run").update([("1", 'a "cat"', picture(1)), ("2", 'a "cat"', picture(2))])
    page = Page(path)
    viewports = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert viewports == ["width=device-width, initial-scale=1"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == ['1: a "cat"', '2: a "cat"']
    assert {(image["width"], image["height"]) for image in images} == {("4", "3")}
    for number, (tag, _) in enumerate(page.tags):
        assert tag != "img" or page.tags[number - 1][0] == "button"
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
    path, samples = tmp_path / "samples.html", []
    for k in range(15):
        samples += [(f"step {k}", f"prompt {n}", picture(100 + k)) for n in range(12) if (k, n) != (1, 0)]
    SampleTable(path).update(samples)
    page = path.read_text(encoding="utf-8").replace("</body>", f"<script>{LOOK}</script></body>")
    path.write_text(page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(*size))
    words = [
        CHROMIUM,
        *"--headless --no-sandbox --disable-gpu --virtual-time-budget=10000 --dump-dom".split(),
    ]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,800"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "frame.html").as_uri()]
    for _ in range(5):  # on a busy machine Chromium may print the page before the frame has answered
        dumped = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True).stdout
        if answer := re.search(r'{"scrolled".*}', html.unescape(dumped)):
            break
    found = json.loads(answer[0])
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
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        SampleTable(path).add("2", "a cat", picture(2))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["samples.html"]


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
