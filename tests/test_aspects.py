"""Aspect buckets by kohya's and NovelAI's rules. Recorded from their own code; NOVELAI_BUCKETING compares
with NovelAI's at length."""

import os
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_fixes.aspects import assign, assign_without_upscaling, resolutions

# kohya's make_bucket_resolutions((1024, 1024), 512, 2048, 64): every width and the height it has
SDXL_WIDTHS = {
    **{512: 2048, 576: 1792, 640: 1600, 704: 1472, 768: 1344, 832: 1216, 896: 1152, 960: 1088, 1024: 1024},
    **{
        1088: 960,
        1152: 896,
        1216: 832,
        1280: 768,
        1344: 768,
        1408: 704,
        1472: 704,
        1536: 640,
        1600: 640,
        1664: 576,
    },
}


def test_sdxl_buckets_are_kohyas():
    found = resolutions()
    assert len(found) == 33 and found == sorted(found) and {(h, w) for w, h in found} == set(found)
    assert all((width, height) in found for width, height in SDXL_WIDTHS.items())
    assert all(
        w * h <= 1024 * 1024 and w % 64 == h % 64 == 0 and 512 <= min(w, h) <= max(w, h) <= 2048
        for w, h in found
    )


def test_novelais_published_buckets():
    """Its defaults: 768 x 512 pixels of area, sides of 256 to 1024."""
    found = resolutions("novelai", 768 * 512, 64, 256, 1024, base=(512, 512))
    assert (
        len(found) == 19
        and (512, 512) in found
        and (768, 512) in found
        and (1024, 384) in found
        and (320, 1024) in found
    )
    assert (576, 576) not in found


def test_the_rules_differ_where_sides_are_no_multiples_of_the_step():
    kohya, novelai = (resolutions(rule, 1000 * 1000, 64, 300, 1100) for rule in ("kohya", "novelai"))
    assert (300, 1100) in kohya and (300, 1068) in novelai and (492, 1100) not in novelai


@given(
    st.sampled_from(["kohya", "novelai"]),
    st.integers(64, 1500),
    st.integers(1, 8),
    st.integers(1, 64),
    st.integers(0, 64),
)
def test_buckets_keep_to_the_limits(rule, side, steps, low, more):
    step, area = 8 * steps, side * side
    min_side, max_side = 8 * low, 8 * (low + more)
    if area < min_side * min_side:
        return
    found = resolutions(rule, area, step, min_side, max_side)
    square = int(area**0.5 // step) * step
    assert (square, square) in found
    for width, height in set(found) - {(square, square)}:
        assert min_side <= min(width, height) and max(width, height) <= max_side and width * height <= area


def test_an_image_takes_the_nearest_aspect_and_its_own_resolution_first():
    found = assign([(1024, 1024), (2000, 1000), (1000, 2000), (1600, 640), (1536, 640)], resolutions())
    names = [tuple(found.resolutions[k]) for k in found.index]
    assert names == [(1024, 1024), (1408, 704), (704, 1408), (1600, 640), (1536, 640)]
    assert found.error == pytest.approx([0, 0, 0, 0, 0], abs=1e-12)
    assert assign([(1500, 1000)], resolutions()).error == pytest.approx([1216 / 832 - 1.5])


def test_images_that_miss_every_bucket_get_none_if_asked():
    found = assign([(1000, 1000), (9000, 1000)], resolutions(), max_error=4)
    assert found.index[1] == -1 and np.isnan(found.error[1]) and found.index[0] >= 0
    assert assign([(9000, 1000)], resolutions()).index[0] >= 0


def test_no_upscaling_cuts_small_images_and_shrinks_large_ones():
    found = assign_without_upscaling([(500, 300), (4000, 3000), (63, 900), (1024, 1024)])
    names = [tuple(found.resolutions[k]) if k >= 0 else None for k in found.index]
    assert names == [(448, 256), (1088, 832), None, (1024, 1024)]


@given(st.integers(64, 8000), st.integers(64, 8000))
def test_no_upscaling_never_enlarges_nor_exceeds_the_area(width, height):
    found = assign_without_upscaling([(width, height)])
    if found.index[0] == -1:
        assert max(width, height) / min(width, height) > 8
        return
    w, h = found.resolutions[0]
    assert w <= width and h <= height and w % 64 == h % 64 == 0
    assert w * h <= 1024 * 1024 * 1.13  # the shorter side is rounded, which may add half a step


@pytest.mark.skipif(
    "NOVELAI_BUCKETING" not in os.environ,
    reason="set NOVELAI_BUCKETING to a checkout of NovelAI's aspect-ratio-bucketing",
)
@pytest.mark.parametrize(
    "limits", [((768, 512), 64, 256, 1024), ((1024, 1024), 64, 512, 2048), ((1024, 1024), 64, 256, 2048)]
)
def test_novelais_own_code_agrees(limits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.environ["NOVELAI_BUCKETING"])
    from bucketmanager import BucketManager

    sizes = np.random.default_rng(0).integers(64, 4000, (3000, 2))
    with open(tmp_path / "sizes.pkl", "wb") as file:
        pickle.dump(dict(enumerate(map(tuple, sizes.tolist()))), file)
    (width, height), step, least, most = limits
    base = (512, 512)
    theirs = BucketManager(
        tmp_path / "sizes.pkl",
        max_size=(width, height),
        divisible=step,
        min_dim=least,
        base_res=base,
        dim_limit=most,
    )
    table = [tuple(map(int, pair)) for pair in theirs.resolutions]
    if base[0] * base[1] <= width * height:
        extra = {base} if base in table else set()
        assert set(table) - {base} == set(
            resolutions("novelai", width * height, step, least, most, base=base)
        ) - {base} and extra <= {base}
    expected = np.full(len(sizes), -1)
    for bucket, images in theirs.buckets.items():
        expected[images] = bucket
    assert np.array_equal(assign(sizes, table, max_error=4).index, expected)
    sys.modules.pop("bucketmanager")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolutions("mine"), "kohya, novelai, got 'mine'"),
        (lambda: resolutions(step=60), "multiple of 8, a latent pixel, got 60"),
        (lambda: resolutions(min_side=2049), "0 < min_side <= max_side"),
        (lambda: resolutions(area=100 * 100), "an area of at least min_side"),
        (lambda: assign([(10, 10), (0, 5)], resolutions()), "at least 1 x 1, got 0 x 5 for number 1"),
        (lambda: assign([10, 10], resolutions()), "shape \\[N, 2\\]"),
        (lambda: assign([(1, 1)], []), "no buckets"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
