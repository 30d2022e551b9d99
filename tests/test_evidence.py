"""The experiments' own instruments, and that the pages are what the recorded results say."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import digits
import gaussian
import lab
import leak

from sdxl_fixes import demo

PAGES = {"leak": "leak", "min_snr": "min-snr", "huber": "huber", "perturbation": "perturbation", "generation": "generation"}
PAGES["chunk_buckets"] = "chunk-buckets"


@pytest.mark.parametrize("module", PAGES)
def test_pages_are_generated_from_the_recorded_results(module):
    experiment, name = importlib.import_module(module), PAGES[module]
    found = lab.finished(name, experiment.KEYS)
    assert {len(results) for results in found.values()} == {len(lab.SEEDS)} and list(found) == experiment.KEYS
    assert (lab.DOCS / f"{name}.md").read_text(encoding="utf-8") == lab.text(found, experiment.page)


def test_the_interval_is_student_s():
    """Five values: t(0.975, 4) is 2.776445 (any table)."""
    mean, half = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert lab.change([1.0, 2.0, 3.0, 4.0, 5.0], 1) == "**+3.0 ± 2.0**" and lab.change([-1.0, 2.0, -3.0], 1) == "-0.7 ± 6.3"


def test_the_distance_is_the_energy_distance():
    """In one dimension scipy computes it another way, from distribution functions, and with the bias of counting a pair of the same."""
    from scipy.stats import energy_distance

    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, 1500), rng.normal(0.5, 2, 1000)
    got = digits.distance(torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None])
    bias = sum(np.abs(a[:, None] - a).sum() * (1 / (len(a) - 1) - 1 / len(a)) / len(a) for a in (x, y))
    assert got + bias == pytest.approx(energy_distance(x, y) ** 2, rel=1e-6)
    assert abs(digits.distance(torch.from_numpy(x[:700, None]), torch.from_numpy(x[700:, None]))) < 0.01


@pytest.fixture(scope="module")
def photos():
    return lab.photos(0)


def test_photographs_have_the_brightness_that_was_drawn(photos):
    asked = torch.linspace(-1.7, 1.7, 24)
    latents = demo.unfold(photos.latents(torch.arange(24), asked))
    assert latents.shape == (24, 1, lab.CANVAS, lab.CANVAS)
    assert (latents.mean((1, 2, 3)) - asked).abs().max() < 0.01 and latents.abs().max() <= 2
    drawn, caption = photos.draw(3000, torch.Generator().manual_seed(0))
    means = demo.unfold(drawn).mean((1, 2, 3))
    for number, brightness in enumerate(lab.ASKED):
        under = means[caption == number]
        assert under.mean() == pytest.approx(brightness, abs=0.04) and under.std() == pytest.approx(lab.SPREAD, abs=0.03)


def test_brightness_of_what_is_right_is_right():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(lab.ASKED)[:, None] + lab.SPREAD * torch.randn(3, 4000, generator=generator)
    found = lab.brightness(means[..., None, None] + torch.tensor([-0.5, 0.5]).reshape(1, 1, 1, 2))
    assert found["kept"] == pytest.approx(1, abs=0.02) and found["spread"] == pytest.approx(1, abs=0.03) and found["miss"] < 0.02
    assert found["contrast"] == pytest.approx(0.5 * math.sqrt(2), abs=1e-6)  # the estimate from two pixels


@pytest.mark.parametrize("name", leak.SCHEDULES)
def test_the_closed_form_is_the_exact_sampler_s(name):
    """benchmarks/gaussian.py has it for N(128, 64^2), with general alpha and sigma."""
    mean, spread = gaussian.ideal(leak.SCHEDULES[name])
    kept, width = leak.ideal(leak.SCHEDULES[name], canvas=round(64 / lab.SPREAD))
    scale = 64 / (round(64 / lab.SPREAD) * lab.SPREAD)
    assert kept == pytest.approx(float(mean[2]) / gaussian.MEAN_OVER_SCALE, abs=2e-3 * scale)
    assert width == pytest.approx(float(spread[2]), abs=2e-3)


def test_bounding_holds_x0_and_leaves_the_rest():
    schedule = leak.SCHEDULES["300 beta_end"]
    alpha, sigma, _ = schedule.levels()
    network, generator = leak.bounded(schedule), torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 64, 8, 8, generator=generator)
    assert network(x, torch.tensor(500), output) is output
    held = network(x, torch.tensor(999), output)
    x0 = demo.unfold((x - sigma[999] * held) / alpha[999])
    assert x0.abs().max() < 2.02 and (x0.abs() > 1.98).any()


def test_outliers_and_agreement():
    data = digits.Digits(0, outliers=0.3)
    changed = (data.images != data.clean).flatten(1).any(1)
    assert int(changed.sum()) == 360 and digits.outlier_share(data.images[changed], data) == 1
    assert digits.outlier_share(data.held_out, data) == 0
    assert digits.detail(data.held_out, data) == 1 and digits.detail(0.5 * data.held_out, data) == pytest.approx(0.25)
    assert digits.agrees(data.held_out, data, data.held_out_classes).double().mean() > 0.95


def test_prompts_have_kohya_s_and_the_uis_lengths():
    import chunk_buckets

    prompts = chunk_buckets.Prompts(torch.arange(400) % 10, 0)
    for chunks in (1, 2, 3):
        index = torch.from_numpy(np.flatnonzero(prompts.chunks == chunks)[:2])
        assert {layout: prompts.context(index, layout).shape[1] for layout in ("padded", "buckets", "cut")} == {
            "padded": 227,
            "buckets": 77 * chunks,
            "cut": 77,
        }
    rows = torch.arange(400)
    assert (prompts.tokens[rows, torch.from_numpy(prompts.place)] == rows % 10).all()
    batches = prompts.batches("buckets", 0)
    assert all(len(set(prompts.chunks[next(batches)])) == 1 for _ in range(8))
