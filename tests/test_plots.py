"""The pictures of the evidence can be read: they are as wide as a page at two dots a pixel, no name lies on
another, and no legend on data."""

import importlib
import itertools
import re

import lab
import numpy as np
import pytest
import schedulers
import style
from PIL import Image
from test_evidence import PAGES

DRAWN = {module: name for module, name in PAGES.items() if module not in ("conversion", "precision")}


@pytest.fixture
def close():
    plt = pytest.importorskip("matplotlib.pyplot")
    yield
    plt.close("all")


def data(axis):
    """Every point that is drawn, and of error bars and areas the ends, in dots of the figure."""
    points = [line.get_xydata() for line in axis.lines if len(set(line.get_ydata())) > 1]
    points += [
        segment for c in axis.collections if hasattr(c, "get_segments") for segment in c.get_segments()
    ]
    points += [np.array([patch.get_bbox().min, patch.get_bbox().max]) for patch in axis.patches]
    return axis.transData.transform(np.concatenate(points))


def words(figure):
    """The names in the plots: of lines, axes, and in legends."""
    found = [*itertools.chain(*(axis.texts for axis in figure.axes))]
    for axis in figure.axes:
        found += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label]
        found += axis.get_xticklabels()
    for legend in (*figure.legends, *(axis.get_legend() for axis in figure.axes)):
        found += legend.get_texts() if legend else []
    return [text for text in found if text.get_text() and text.get_visible()]


def clashes(figure):
    """Pairs of names that lie on each other, and names outside of the figure."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in words(figure)]
    pairs = {(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)}
    whole = figure.bbox.padded(0.5)
    return pairs | {
        (a,) for a, x in boxes if not whole.contains(x.x0, x.y0) or not whole.contains(x.x1, x.y1)
    }


def on_data(figure):
    """Data under legends: points, and lines between them."""
    count = 0
    for axis in figure.axes:
        for legend in filter(None, (axis.get_legend(), *figure.legends)):
            box = legend.get_window_extent()
            count += sum(box.contains(*point) for point in data(axis))
            count += sum(
                box.contains(*point)
                for line in axis.lines
                for ends in itertools.pairwise(axis.transData.transform(line.get_xydata()))
                for point in np.linspace(*ends, 30)
            )
    return count


@pytest.mark.parametrize("module", DRAWN)
def test_names_lie_beside_each_other_and_legends_beside_data(module, close):
    experiment = importlib.import_module(module)
    figure = experiment.plot(lab.finished(DRAWN[module], experiment.KEYS))
    assert clashes(figure) == set() and on_data(figure) == 0
    assert Image.open(lab.DOCS / f"{DRAWN[module]}.png").size == tuple(
        (figure.get_size_inches() * style.DPI).round()
    )
    assert figure.get_size_inches()[0] == style.WIDTH


def test_what_would_clash_is_seen(close):
    figure, axis = style.figure(3)
    axis.plot([0, 1], [0, 1], label="a line")
    axis.legend(loc="center")
    axis.set_xticks([0, 1])
    for height in (0.5, 0.51):
        axis.annotate(f"at {height}", (1, height))
    assert clashes(figure) == {("at 0.5", "at 0.51")} and on_data(figure) > 0


def test_names_of_ends_keep_apart_and_stay_where_there_is_room(close):
    _, axis = style.figure(3)
    axis.set_ylim(0, 1)
    style.name_ends(axis, 1, [(0.9, "far", "k"), (0.5, "a", "k"), (0.51, "b", "k"), (0.5, "c", "k")], 0.1)
    places = {text.get_text(): text.xy[1] for text in axis.texts}
    assert places["far"] == 0.9
    assert [places[name] for name in "acb"] == pytest.approx([0.5033 - 0.1, 0.5033, 0.5033 + 0.1], abs=1e-3)


def measured(heading):
    """A table of docs/schedulers.md: sampler -> whose -> (spreads, percent of the mean that is lost)."""
    page = (lab.DOCS.parent / "schedulers.md").read_text(encoding="utf-8")
    found = {}
    for name, whose, numbers in re.findall(
        r"^\| (\w+), (\w+) \| (.*) % \|$", page.split(f"### {heading}\n")[1].split("\n#")[0], re.M
    ):
        *spreads, lost = map(float, numbers.split(" | "))
        found.setdefault(name, {})[whose] = (spreads, lost)
    return found


def test_the_answer_on_samplers_is_what_its_tables_say():
    page = (lab.DOCS.parent / "schedulers.md").read_text(encoding="utf-8")
    found = {steps: measured(f"Zero terminal SNR, {steps} steps") for steps in (10, 25, 50)}
    assert list(found[25]) == list(schedulers.BEST_FIRST)
    assert "\n".join(schedulers.answer(found)) in page.split("\n## How it is measured")[0]
    right = {name for name, kinds in found[25].items() if all(abs(x - 1) < 0.05 for x in kinds["ours"][0])}
    assert {"dpmpp_2m", "unipc"} <= right and "**Take `dpmpp_2m` or `unipc`, 25 steps" in page
    assert not right & {"euler", "ddim", "euler_a", "ddpm"}
    flat = [kinds["diffusers"][0][-1] for name, kinds in found[25].items() if name != "heun"]
    assert f"{100 * min(flat):.0f} to {100 * max(flat):.0f} % of the spread" in page


@pytest.mark.parametrize(
    ("spreads", "said"),
    [
        ((1.0, 1.02, 0.97, 1.04), "**right** (1.04)"),
        ((0.9, 1.0, 1.0, 0.63), "0.63: brightness very flat"),
        ((0.78, 1.0, 1.95, 15.67), "15.67: brightness explodes"),
        ((0.86, 0.92, 0.93, 0.9), "0.86: fine detail a little flat"),
        ((1.0, 1.1, 1.0, 1.0), "1.10: detail too strong"),
        ((0.5, 1.0, 1.6, 1.0), "0.50: fine detail very flat"),
    ],
)
def test_a_sampler_is_called_by_what_it_does_worst(spreads, said):
    assert schedulers.verdict((list(spreads), 0.0)) == said


def test_the_picture_of_samplers_has_every_dot_and_words_for_those_beyond(close):
    figure = schedulers.plot(found := measured("Zero terminal SNR, 25 steps"))
    assert clashes(figure) == set()
    for axis, whose in zip(figure.axes, ("ours", "diffusers"), strict=True):
        dots = np.concatenate([part.get_offsets() for part in axis.collections])
        assert sorted(dots[:, 0]) == sorted(x for kinds in found.values() for x in kinds[whose][0])
        beyond = sum(dots[:, 0] > axis.get_xlim()[1])
        assert beyond == sum(text.get_text().count(".") for text in axis.texts)
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(box.contains(*dot) for box in boxes for dot in axis.transData.transform(dots))
    with Image.open(lab.DOCS.parent / "schedulers.png") as image:
        assert image.size == tuple((figure.get_size_inches() * style.DPI).round())
