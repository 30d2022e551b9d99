"""The pictures of the evidence can be read: they are as wide as a page at two dots a pixel, no name lies on
another, and no legend on data."""

import importlib
import itertools

import lab
import numpy as np
import pytest
import style
from PIL import Image
from test_evidence import PAGES

DRAWN = {module: name for module, name in PAGES.items() if module != "conversion"}


@pytest.fixture
def close():
    yield
    import matplotlib.pyplot as plt

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
