"""The demo: it writes everything, its report stands alone, it repeats itself, and it says in a sentence what
is wrong. What it claims of the checkpoint is run with -m slow."""

import importlib.util
import itertools
import json
import re
import xml.dom.minidom

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.cli import main
from sdxl_fixes.commands.demo import make_report
from sdxl_fixes.demo import finetune, measure, report
from sdxl_fixes.demo.charts import Dots, dot_rows
from sdxl_fixes.demo.plan import Plan
from sdxl_fixes.demo.world import CANVAS, OBJECTS, PLACES, load_world

TINY = Plan(steps=2, batch=2, pictures=1, sampling_steps=2)
FILES = {"demo.png", "report.html", "results.json"}
KEYS = ["before", "control", "v_alone", "fixed"]


def run(*arguments):
    return main(["demo", *map(str, arguments)])


def quiet(work, name):
    return iter(work)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    return make_report(TINY, output), output


def test_writes_the_three_files_and_no_other(tiny):
    numbers, output = tiny
    assert {file.name for file in output.iterdir()} == FILES
    assert json.loads((output / "results.json").read_text()) == numbers
    assert [row["key"] for row in numbers["runs"]] == KEYS
    assert [len(row["losses"]) for row in numbers["runs"]] == [0, 2, 2, 2]
    assert [row["prediction_type"] for row in numbers["runs"]] == [
        *("epsilon", "epsilon", "v_prediction", "v_prediction")
    ]
    # SDXL's published last step, sqrt(alphas_cumprod[999]), and none
    assert [row["residual_signal"] for row in numbers["runs"]] == pytest.approx(
        [0.068265, 0.068265, 0.068265, 0], abs=1e-6
    )


def test_the_picture_for_the_readme_is_sharp_at_double_density_and_small(tiny):
    file = tiny[1] / "demo.png"
    assert Image.open(file).format == "PNG" and file.stat().st_size < 2_000_000


def test_report_needs_nothing_outside_itself(tiny):
    text = (tiny[1] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'> ]+)""", text)
    assert len(sources) >= 2 * len(PLACES)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert all(re.search('alt="[^"]+"', tag) for tag in re.findall("<img[^>]+>", text))


def test_report_has_every_number_of_the_brightness(tiny):
    """Each mean and spread stands in the page's table, rounded."""
    numbers, output = tiny
    text = (output / "report.html").read_text(encoding="utf-8")
    for row, place in enumerate(PLACES):
        for column in (numbers["asked"], *(run["places"] for run in numbers["runs"])):
            cell = f">{100 * column[row]['brightness']:.0f} ± {100 * column[row]['spread']:.0f}</td>"
            assert cell in text, (place, cell)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tiny):
    numbers, _ = tiny
    chosen = [run for run in finetune.runs() if run.key == "fixed"]
    again = finetune.compare(TINY, quiet, chosen)[0]
    assert again.losses == numbers["runs"][-1]["losses"]  # and it does not depend on the runs before it
    assert measure.measure(again.pictures) == numbers["runs"][-1]["places"]
    other = finetune.compare(Plan(**{**TINY.__dict__, "seed": 1}), quiet, chosen)[0]
    assert other.losses != again.losses


def test_one_thread_and_back(monkeypatch):
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(finetune, "load_tiny_sdxl", lambda: seen.append(torch.get_num_threads()))
        monkeypatch.setattr(finetune, "sample", lambda *rest: torch.zeros(1))
        finetune.compare(TINY, quiet, finetune.runs()[:1])
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- measuring


def test_no_object_reaches_the_border():
    """Every object at the corners of size and position that World.pictures draws."""
    world, border = load_world(), torch.ones(CANVAS, CANVAS, dtype=torch.bool)
    border[measure.BORDER : -measure.BORDER, measure.BORDER : -measure.BORDER] = False
    for scale, x, y in itertools.product((0.82, 0.92), (-0.06, 0.06), (-0.06, 0.06)):
        theta = torch.tensor([[1 / scale, 0, x / scale], [0, 1 / scale, y / scale]]).expand(
            len(OBJECTS), 2, 3
        )
        grid = F.affine_grid(theta, [len(OBJECTS), 4, CANVAS, CANVAS], align_corners=False)
        alpha = F.grid_sample(world.objects, grid, align_corners=False)[:, 3]
        assert alpha[:, border].max() < 0.01 and alpha.amax((1, 2)).min() > 0.9


def test_background_is_that_of_pictures_made_by_hand():
    """A frame of one colour around something else, and its numbers in closed form."""
    colour = torch.tensor([0.7, -0.7, -0.7])
    pictures = colour[:, None, None].expand(len(PLACES), 2, 3, CANVAS, CANVAS).clone()
    pictures[..., 2:-2, 2:-2] = -1
    cell = measure.measure(pictures)[3]
    assert cell["place"] == list(PLACES)[3]
    assert cell["brightness"] == pytest.approx((0.85 + 0.15 + 0.15) / 3, abs=1e-6)
    assert cell["saturation"] == pytest.approx(0.7, abs=1e-6) and cell["spread"] == 0
    share = 1 - (CANVAS - 4) ** 2 / CANVAS**2
    step = (0.85 + 0.15 + 0.15) / 3
    bessel = (CANVAS**2 / (CANVAS**2 - 1)) ** 0.5
    assert cell["contrast"] == pytest.approx(step * (share * (1 - share)) ** 0.5 * bessel, abs=1e-6)


def test_what_is_asked_is_what_places_say():
    """Colours as in PLACES; black and white a little short of it, by E|N(0, 0.25)| / 2 of their shade, in
    -1 to 1, half of that in 0 to 1."""
    cells = {cell["place"]: cell for cell in measure.asked(Plan())}
    short = 0.25 * (2 / torch.pi) ** 0.5 / 2 / 2
    for place, right in (
        ("at night", short),
        ("on grey", 0.5),
        ("on dark grey", 0.25),
        ("in snow", 1 - short),
    ):
        assert cells[place]["brightness"] == pytest.approx(right, abs=0.02), (
            place
        )  # 2.5 deviations of their mean
    assert cells["on red"]["saturation"] == pytest.approx(0.7, abs=0.03)


# ---------------------------------------------------------------- saying


def numbers_with(**brightness):
    """Results in which each network paints every place as bright as given, and 0.1 was asked of each."""

    def cells(value):
        return [
            {"place": place, "brightness": value, "each": [value, value], "spread": 0.0} for place in PLACES
        ]

    runs = [
        {"key": key, "label": key, "miss": abs(value - 0.1), "places": cells(value)}
        for key, value in brightness.items()
    ]
    return {"plan": {"steps": 7}, "asked": cells(0.1), "runs": runs}


def test_verdicts_and_headline_follow_the_numbers():
    good = numbers_with(before=0.4, control=0.41, v_alone=0.3, fixed=0.12)
    said = " ".join(report.verdicts(good)).replace("\N{NO-BREAK SPACE}", " ")
    assert "10 % brightness (at night): 40 % on SDXL's schedule, 41 % after more training" in said
    assert "schedule the mean distance between brightness asked and got is as large as before: 31.0" in said
    assert "zero terminal SNR the mean distance between brightness asked and got falls: 2.0 points" in said
    assert (
        "v-prediction on SDXL's own schedule the mean distance between brightness asked and got falls" in said
    )
    assert "of 14: 0 on SDXL's schedule, 0 after more" in said and "14 with the fixes" in said
    assert report._headline(good).endswith("SDXL's schedule paints grey. With the fixes: black.")
    bad = numbers_with(before=0.12, control=0.12, v_alone=0.12, fixed=0.5)
    assert "zero terminal SNR the mean distance between brightness asked and got rises" in " ".join(
        report.verdicts(bad)
    )
    assert report._headline(bad).endswith("SDXL's schedule paints black. With the fixes: grey.")


def test_no_outlier_moves_a_chart_s_axis():
    rows = [Dots("here", 0.5, [0.25, 9.0])]
    drawing = xml.dom.minidom.parseString(dot_rows("a chart", rows, ["before", "fixed"]))
    before, fixed = (float(dot.getAttribute("cx")) for dot in drawing.getElementsByTagName("circle"))
    asked = next(
        float(line.getAttribute("x1"))
        for line in drawing.getElementsByTagName("line")
        if line.getAttribute("class") == "asked"
    )
    grid = [
        float(line.getAttribute("x1"))
        for line in drawing.getElementsByTagName("line")
        if line.getAttribute("class") == "grid"
    ]
    assert (before, asked, fixed) == (grid[1], grid[2], grid[4])  # 25, 50 and 100 %


# ---------------------------------------------------------------- refusing


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


def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find(name, *rest)
    )
    assert run("--output", tmp_path) == 2
    assert capsys.readouterr().err == (
        'sdxl-fixes demo: the demo needs pillow, not installed here: pip install "sdxl-fixes[demo]"\n'
    )


# ---------------------------------------------------------------- what the README says of it


@pytest.mark.slow
def test_sdxl_s_schedule_paints_grey_and_the_fixes_paint_what_was_asked():
    results = finetune.compare(Plan(), quiet)
    numbers = measure.summarize(Plan(), results, 0.0)
    got = {
        run["key"]: {cell["place"]: cell["brightness"] for cell in run["places"]} for run in numbers["runs"]
    }
    for key in ("before", "control", "v_alone"):
        assert got[key]["at night"] > 0.15 and got[key]["in snow"] < 0.85, (key, got[key])
    assert got["fixed"]["at night"] < 0.1 and got["fixed"]["in snow"] > 0.9, got["fixed"]
    *others, fixed = (run["miss"] for run in numbers["runs"])
    assert fixed < 0.05 and min(others) > 2 * fixed
    assert NoiseSchedule.sdxl().zero_terminal_snr() == results[-1].run.schedule
