"""The experiments' own instruments, and that the pages are what the recorded results say."""

import importlib
import json
import math
import sys

import digits
import gaussian
import lab
import leak
import numpy as np
import pytest
import torch
from photo_settings import CANVAS, FOLD, DemoSettings
from photo_training import build_unet
from photos import embed_captions, fold, unfold

from sdxl_fixes import InputPerturbation, Objective

PAGES = {
    "leak": "leak",
    "min_snr": "min-snr",
    "huber": "huber",
    "perturbation": "perturbation",
    "generation": "generation",
}
PAGES["chunk_buckets"] = "chunk-buckets"
PAGES["conversion"] = "conversion"
PAGES["precision"] = "precision"


@pytest.mark.parametrize("module", PAGES)
def test_pages_are_generated_from_the_recorded_results(module):
    experiment, name = importlib.import_module(module), PAGES[module]
    assert list(lab.finished(name, experiment.KEYS)) == experiment.KEYS
    # or a further seed would be refused
    assert json.loads((lab.RESULTS / f"{name}.json").read_text())["settings"] == repr(lab.SETTINGS)
    assert (lab.DOCS / f"{name}.md").read_text(encoding="utf-8") == lab.text(
        name, experiment.KEYS, experiment.page
    )


def test_a_variant_without_all_seeds_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    assert lab.finished("x", ["a"]) == {}
    runs = {f"{key}/{seed}": {"value": seed} for key in "ab" for seed in lab.SEEDS}
    (tmp_path / "x.json").write_text(json.dumps({name: run for name, run in runs.items() if name != "b/3"}))
    assert lab.finished("x", ["b", "a"]) == {"a": [{"value": seed} for seed in lab.SEEDS]}
    monkeypatch.setattr(sys, "argv", ["x.py", "--only", "c"])
    with pytest.raises(SystemExit, match="--only 'c': expected some of a, b"):
        lab.experiment("x", "", None, ["a", "b"], None)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="run benchmarks/leak"):
        lab.experiment("x", "", None, ["a", "b"], None, after=("leak",))
    (tmp_path / "x.json").write_text(json.dumps({"settings": "other"}))
    with pytest.raises(SystemExit, match="was made with other"):
        lab.experiment("x", "", None, ["a", "b"], None)


def test_the_interval_is_student_s():
    """Five values: t(0.975, 4) is 2.776445 (any table)."""
    mean, half = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert (
        lab.change([1.0, 2.0, 3.0, 4.0, 5.0], 1) == "**+3.0 ± 2.0**"
        and lab.change([-1.0, 2.0, -3.0], 1) == "-0.7 ± 6.3"
    )


def test_the_distance_is_the_energy_distance():
    """In one dimension scipy computes it another way, from distribution functions, and with the bias of
    counting a pair of the same."""
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
    latents = unfold(photos.latents(torch.arange(24), asked))
    assert latents.shape == (24, 1, CANVAS, CANVAS)
    assert (latents.mean((1, 2, 3)) - asked).abs().max() < 0.01 and latents.abs().max() <= 2
    drawn, caption = photos.draw(3000, torch.Generator().manual_seed(0))
    means = unfold(drawn).mean((1, 2, 3))
    for number, brightness in enumerate(lab.ASKED):
        under = means[caption == number]
        assert under.mean() == pytest.approx(brightness, abs=0.04) and under.std() == pytest.approx(
            lab.SPREAD, abs=0.03
        )


def test_brightness_of_what_is_right_is_right():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor(lab.ASKED)[:, None] + lab.SPREAD * torch.randn(3, 4000, generator=generator)
    found = lab.brightness(means[..., None, None] + torch.tensor([-0.5, 0.5]).reshape(1, 1, 1, 2))
    assert (
        found["kept"] == pytest.approx(1, abs=0.02)
        and found["spread"] == pytest.approx(1, abs=0.03)
        and found["miss"] < 0.02
    )
    assert found["contrast"] == pytest.approx(0.5 * math.sqrt(2), abs=1e-6)  # the estimate from two pixels


@pytest.mark.parametrize("name", leak.SCHEDULES)
def test_the_closed_form_is_the_page_s_and_the_exact_sampler_s(name):
    """Of docs/zero-terminal-snr.md, in sigma; and of a perfect network sampled in many steps, at the scale
    that gaussian.py knows."""
    schedule = leak.SCHEDULES[name]
    kept, width = leak.ideal(schedule)
    s, end = 64 * 0.3, schedule.terminal_sigma
    expected = (
        (1.0, 1.0)
        if math.isinf(end)
        else (1 - s / math.hypot(s, end), math.sqrt((1 + end**2) / (s**2 + end**2)))
    )
    assert (kept, width) == pytest.approx(expected, rel=1e-9)
    if name not in ("300 last", "20000 beta_end"):
        mean, spread = gaussian.sampled(
            schedule.scheduler("dpmpp_2m", "v_prediction"), schedule, "v_prediction", 500
        )
        ideal_mean, ideal_spread = gaussian.ideal(schedule)
        assert float(mean[2] - ideal_mean[2]) / gaussian.MEAN_OVER_SCALE == pytest.approx(0, abs=5e-3)
        assert float(spread[2]) == pytest.approx(float(ideal_spread[2]), abs=5e-3)


def test_bounding_holds_x0_and_leaves_the_rest():
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 2, 64, 8, 8, generator=generator)
    assert leak.bounded(lab.STOCK)(x, torch.tensor(999), output) is output  # nothing lies above its own end
    schedule = leak.SCHEDULES["300 beta_end"]
    alpha, sigma, _ = schedule.levels()
    network, above = leak.bounded(schedule), int((schedule.sigmas <= lab.STOCK.terminal_sigma).sum())
    assert network(x, torch.tensor(above - 1), output) is output
    for t in (above, 999):
        held = network(x, torch.tensor(t), output)
        x0 = unfold((x - sigma[t] * held) / alpha[t])
        assert x0.abs().max() < 2.02 and (x0.abs() > 1.98).any()


def test_two_trainings_on_digits_differ_in_the_perturbation_alone():
    data, seen = digits.Digits(0), []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, label):
            seen.append((x.detach(), t, label))
            return x * self.scale

    def run(perturbation):
        seen.clear()
        objective = Objective(lab.STOCK, "epsilon", perturbation=perturbation)

        def batch(generator):
            index = torch.randint(digits.TRAINED, (8,), generator=generator)
            return data.images[index], (data.classes[index],)

        digits.train_network(Spy(), objective, batch, 0, 3)
        return list(seen)

    plain, perturbed = run(None), run(InputPerturbation(0.1))
    sigma = lab.STOCK.levels()[1]
    for (x, t, label), (y, u, other) in zip(plain, perturbed, strict=True):
        assert torch.equal(t, u) and torch.equal(label, other)
        xi = (y - x).flatten(1) / torch.from_numpy(sigma[t])[:, None]
        assert float(xi.std()) == pytest.approx(0.1, rel=0.1)


def test_outliers_and_agreement():
    data = digits.Digits(0, outliers=0.3)
    changed = (data.images != data.clean).flatten(1).any(1)
    assert int(changed.sum()) == 360 and digits.outlier_share(data.images[changed], data) == 1
    assert digits.outlier_share(data.held_out, data) == 0
    assert digits.detail(data.held_out, data) == 1 and digits.detail(
        0.5 * data.held_out, data
    ) == pytest.approx(0.25)
    assert digits.agrees(data.held_out, data, data.held_out_classes).double().mean() > 0.95


def test_prompts_have_kohya_s_and_the_uis_lengths():
    import chunk_buckets

    prompts = chunk_buckets.Prompts(torch.arange(400) % 10, 0)
    for chunks in (1, 2, 3):
        index = torch.from_numpy(np.flatnonzero(prompts.chunks == chunks)[:2])
        lengths = {layout: prompts.context(index, layout).shape[1] for layout in ("padded", "buckets", "cut")}
        assert lengths == {"padded": 227, "buckets": 77 * chunks, "cut": 77}
    rows = torch.arange(400)
    assert (prompts.tokens[rows, torch.from_numpy(prompts.place)] == rows % 10).all()
    late = chunk_buckets.Prompts(rows % 10, 0, late=True)
    assert (late.place >= 75).all() and (late.place < late.lengths).all() and late.lengths.max() <= 225


def test_a_padded_prompt_is_its_chunks_without_the_inner_ends():
    import chunk_buckets

    prompts = chunk_buckets.Prompts(torch.arange(400) % 10, 0)
    index = torch.from_numpy(np.flatnonzero(prompts.chunks == 3)[:1])
    chunks, padded = (prompts.context(index, layout)[0] for layout in ("buckets", "padded"))
    assert torch.equal(padded, torch.cat((chunks[:76], chunks[78:153], chunks[155:])))
    assert torch.equal(prompts.context(index, "cut")[0], chunks[:77])


def test_batches_of_chunk_buckets_are_of_one_length_and_leave_no_prompt_out():
    import chunk_buckets

    prompts = chunk_buckets.Prompts(torch.arange(400) % 10, 0)
    batches = prompts.batches("buckets", 0)
    epoch, seen = [], []
    while len(seen) < 400:
        epoch.append(list(next(batches)))
        seen += epoch[-1]
    assert sorted(seen) == list(range(400))
    assert (
        sum(len(set(prompts.chunks[batch])) > 1 for batch in epoch) <= 2
    )  # what fills no batch moves up: once to 2 chunks, once to 3
    assert list(next(batches)) not in epoch


def test_folding_photographs_is_a_rotation():
    canvas = torch.randn(2, 1, CANVAS, CANVAS)
    folded = fold(canvas)
    torch.testing.assert_close(unfold(folded), canvas, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded.square().sum(), canvas.square().sum())
    torch.testing.assert_close(folded[:, 0].mean() / FOLD, canvas.mean())  # brightness is one channel


def test_the_network_starts_as_half_the_identity():
    unet, captions = build_unet(DemoSettings(widths=(128, 32))), embed_captions(0)
    noise = torch.randn(2, FOLD**2, 8, 8)
    with torch.no_grad():
        out = unet(noise, torch.tensor(500), **captions.conditioning(torch.tensor([0, 2]))).sample
    torch.testing.assert_close((out * noise).mean(), torch.tensor(0.5), atol=0.05, rtol=0)
