"""The sample table holds its pictures, goes on after a restart, and touches no file of another kind."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdxl_fixes.cli import main
from sdxl_fixes.sample_table import SampleTable


def picture(grey):
    return Image.new("RGB", (4, 3), (grey, grey, grey))


def shown(path):
    """What a browser would show: rows of (prompt, grey of each cell), read from the page alone."""
    page = path.read_text(encoding="utf-8")
    rows = []
    for row in re.findall(r"<tr><th>([^<]+)</th>(<td>.*?)</tr>", page):
        cells = [re.search(r'src="data:image/png;base64,(.*?)"', cell) for cell in row[1].split("</td>")[:-1]]
        greys = []
        for cell in cells:
            png = cell.group(1) if cell else None
            greys.append(Image.open(io.BytesIO(base64.b64decode(png))).getpixel((0, 0))[0] if png else None)
        rows.append((row[0], greys))
    return rows


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


def parsed(path):
    """The page's tags with their attributes, and its text, by Python's own reader of HTML."""
    tags, text, parser = [], [], HTMLParser()
    parser.handle_starttag, parser.handle_data = lambda *found: tags.append(found), text.append
    parser.feed(path.read_text(encoding="utf-8"))
    return tags, text


def test_markup_and_control_characters_in_a_prompt_are_text(tmp_path):
    path = tmp_path / "samples.html"
    script, prompt = '</script><script>alert("x")</script><!--', "a <b>&</b> </td>\r\n\x1b[31m\ud800'\" \x00"
    SampleTable(path, "\udfff").add(script, prompt, picture(1))
    safe = "a <b>&</b> </td>\\r\\n\\x1b[31m\\ud800'\" \\x00"
    tags, text = parsed(path)
    assert {tag for tag, _ in tags} == {"meta", "title", "style", "table", "tr", "th", "td", "img"}
    assert script in text and safe in text and "\\udfff" in text
    SampleTable(path).add(script, prompt, picture(2))  # the same cell
    assert SampleTable(path).cells.keys() == {script} and SampleTable(path).cells[script].keys() == {safe}


def test_a_picture_is_a_text_of_its_own(tmp_path):
    """Browsers show nothing of one text beyond 512 MB."""
    path = tmp_path / "samples.html"
    for k in range(3):
        SampleTable(path).add(f"{k}", "a cat", picture(k))
    sources = [dict(attributes)["src"] for tag, attributes in parsed(path)[0] if tag == "img"]
    pngs = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert [Image.open(io.BytesIO(png)).getpixel((0, 0))[0] for png in pngs] == [0, 1, 2]


def test_columns_stay_in_order_where_the_first_row_has_gaps(tmp_path):
    path = tmp_path / "samples.html"
    for checkpoint, prompt in (("1", "a"), ("2", "b"), ("3", "a")):
        SampleTable(path).add(checkpoint, prompt, picture(5))
    assert list(SampleTable(path).cells) == ["1", "2", "3"]


def test_the_title_is_text(tmp_path):
    title, found = '</title><b>&amp; "it\'s"', []
    SampleTable(tmp_path / "samples.html", title).add("1", "a cat", picture(1))
    parser = HTMLParser()
    parser.handle_data, parser.handle_starttag = found.append, lambda tag, attributes: found.append(tag)
    parser.feed((tmp_path / "samples.html").read_text(encoding="utf-8"))
    assert "".join(found[found.index("title") + 1 : found.index("style")]) == title and "b" not in found


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
