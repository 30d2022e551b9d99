"""The demo: it writes everything, its report stands alone, it repeats itself, and it says in a sentence what
is wrong."""

import importlib.util
import json
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

from sdxl_fixes.cli import main
from sdxl_fixes.commands.demo import make_report
from sdxl_fixes.demo.experiment import build_unet, compare, variants
from sdxl_fixes.demo.photos import embed_captions, fold, unfold
from sdxl_fixes.demo.report import table, verdicts
from sdxl_fixes.demo.settings import CANVAS, CAPTIONS, FOLD, DemoSettings

TINY = DemoSettings(
    steps=2, finetuning_steps=3, batch=2, crops=4, samples=1, sampling_steps=2, widths=(128, 32)
)
FILES = {"demo.png", "report.html", "results.json"}


def run(*arguments):
    return main(["demo", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small spend their time waiting for each other on several threads, above all on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return make_report(TINY, output), output


def test_writes_the_three_files_and_no_other(tiny):
    numbers, output = tiny
    assert {file.name for file in output.iterdir()} == FILES
    assert json.loads((output / "results.json").read_text()) == numbers
    assert [row["key"] for row in numbers["runs"]] == [
        "stock_epsilon",
        "fixed_epsilon",
        "stock_v",
        "longer_v",
        "fixed_v",
        "ztsnr_v",
    ]
    assert [len(row["losses"]) for row in numbers["runs"]] == [2, 3, 2, 3, 3, 3]
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_report_needs_nothing_outside_itself(tiny):
    _, output = tiny
    report = (output / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]+)""", report)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", report)


def test_report_and_table_name_every_run(tiny):
    numbers, output = tiny
    report = (output / "report.html").read_text(encoding="utf-8")
    for row in numbers["runs"]:
        assert row["label"] in table(numbers)
        assert row["label"] in report


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tiny, tmp_path):
    numbers, _ = tiny
    assert make_report(TINY, tmp_path)["runs"] == numbers["runs"]
    other = compare(
        DemoSettings(**{**TINY.__dict__, "seed": 1}), lambda work, name: iter(work), variants()[:1]
    )
    assert other[0].losses != numbers["runs"][0]["losses"]


def test_a_finetune_does_not_depend_on_the_finetunes_before_it(tiny):
    numbers, _ = tiny
    alone = compare(
        TINY,
        lambda work, name: iter(work),
        [row for row in variants() if row.key in ("stock_v", "ztsnr_v")],
    )
    assert alone[1].losses == next(row["losses"] for row in numbers["runs"] if row["key"] == "ztsnr_v")


def test_verdicts_follow_the_numbers():
    def numbers(**misses):
        cells = {
            key: [{"asked": asked, "each": [asked + miss, asked - miss]} for asked in (-1.0, 0.0, 1.0)]
            for key, miss in misses.items()
        }
        return {
            "runs": [
                {"key": key, "label": key, "miss": miss, "captions": cells[key]}
                for key, miss in misses.items()
            ]
        }

    said = verdicts(
        numbers(stock_epsilon=0.9, fixed_epsilon=8.0, stock_v=0.6, longer_v=0.7, fixed_v=0.72, ztsnr_v=0.1)
    )
    expected = (
        (" lowers ", "0.70 without", "0.10 with"),
        (" hardly changes ", "0.70 without", "0.72 with"),
        (" raises ", "0.90 without", "8.00 with"),
        (" lowers ", "0.90 without", "0.60 with"),
        (" lowers ", "8.00 without", "0.72 with"),
    )
    for sentence, words in zip(said[:5], expected, strict=True):
        assert all(word in sentence for word in words), sentence
    assert "longer_v: 0 of 6 pictures" in " ".join(said) and "ztsnr_v: 6 of 6 pictures" in " ".join(said)


def test_folding_is_a_rotation():
    canvas = torch.randn(2, 1, CANVAS, CANVAS)
    folded = fold(canvas)
    torch.testing.assert_close(unfold(folded), canvas, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.square().sum(), canvas.square().sum())
    torch.testing.assert_close(folded[:, 0].mean() / FOLD, canvas.mean())  # brightness is one channel


def test_the_network_starts_as_half_the_identity():
    unet, captions = build_unet(TINY), embed_captions(0)
    noise = torch.randn(2, FOLD**2, 8, 8)
    with torch.no_grad():
        out = unet(noise, torch.tensor(500), **captions.conditioning(torch.tensor([0, 2]))).sample
    torch.testing.assert_close((out * noise).mean(), torch.tensor(0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_is_one_sentence(steps, tmp_path, capsys):
    assert run("--steps", steps, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"sdxl-fixes demo: --steps must be at least 1, got {steps}\n"
    assert not (tmp_path / "out").exists()


def test_negative_seed_is_one_sentence(tmp_path, capsys):
    assert run("--seed", -1, "--output", tmp_path) == 2
    assert "--seed must be 0 or a positive" in capsys.readouterr().err


def test_unwritable_output_is_one_sentence_before_any_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--output", tmp_path / "file") == 2
    error = capsys.readouterr().err
    assert "cannot write into" in error and "--output" in error and error.count("\n") == 1


def test_missing_extras_are_named_with_the_command_that_installs_them(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("skimage", "matplotlib") else find(name, *rest),
    )
    assert run("--output", tmp_path) == 2
    assert capsys.readouterr().err == (
        "sdxl-fixes demo: the demo needs matplotlib and scikit-image, not installed here: "
        'pip install "sdxl-fixes[demo]"\n'
    )


@pytest.mark.slow
def test_the_stock_schedule_is_grey_and_zero_terminal_snr_obeys_the_caption():
    chosen = [row for row in variants() if row.key in ("stock_v", "longer_v", "ztsnr_v")]
    _, stock, fixed = compare(DemoSettings(), lambda work, name: iter(work), chosen)
    asked = torch.tensor(list(CAPTIONS.values()))
    got, grey = (torch.tensor(result.brightness).mean(1) for result in (fixed, stock))
    assert ((got - asked).abs() < 0.25).all(), got
    assert grey.abs().max() < 0.7, grey


def test_contrast_is_inside_a_picture_and_not_between_pictures():
    """Flat pictures of different brightness have none; a step of 1 up and 1 down has 64 / 63's root."""
    from sdxl_fixes.demo.experiment import Result, variants

    flat = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    step = torch.ones(8, 8)
    step[:4] = -1
    pictures = torch.cat([flat, flat + step])
    found = Result(variants()[0], [1.0], pictures, 1, 1.0).contrast
    assert found == pytest.approx([0, (64 / 63) ** 0.5])
