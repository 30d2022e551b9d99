"""The instruments of benchmarks/finetuning.py against cases whose answer is known."""

import json
import math

import finetuning
import finetuning_page
import lab
import pairing
import pictures
import pytest
import torch

from sdxl_fixes import MinSNR, NoiseSchedule, Objective
from sdxl_fixes.demo.world import PLACES, fold, load_world

# ---------------------------------------------------------------- noise pairing


def test_the_largest_of_normal_numbers():
    """Known: 1/sqrt(pi) and 1 - 1/pi of two, 3/(2 sqrt(pi)) of three (David and Nagaraja 2003, 3.2)."""
    assert pairing.largest(1) == pytest.approx((0, 1), abs=1e-6)
    assert pairing.largest(2) == pytest.approx((1 / math.sqrt(math.pi), 1 - 1 / math.pi), abs=1e-6)
    assert pairing.largest(3)[0] == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-6)


def test_nearest_noise_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 50, 3, 4, 4, generator=generator)
    drawn = torch.Generator().manual_seed(1)
    others = torch.stack([noise, *(torch.randn(noise.shape, generator=drawn) for _ in range(7))])
    distances = (others - latents).flatten(2).norm(dim=2)
    got = pairing.nearest(latents, noise, 8, torch.Generator().manual_seed(1))
    assert torch.equal(got, others[distances.argmin(0), torch.arange(50)])
    assert pairing.nearest(latents, noise, 1) is noise


@pytest.mark.parametrize("energy, k", [(1.0, 4), (4.6, 4), (1.0, 64)])
def test_paired_noise_leaks_what_the_closed_form_says(energy, k):
    """Latents of which one coordinate has an eighth of the squared length, against the correlation of that
    coordinate with the noise that is chosen for it."""
    generator, share, size = torch.Generator().manual_seed(0), 1 / 8, 256
    latents = torch.randn(6000, size, generator=generator) * math.sqrt(energy)
    latents[:, 0] = math.sqrt(share * size * energy) * torch.randn(6000, generator=generator).sign()
    latents[:, 1:] *= math.sqrt(size * (1 - share) / (size - 1))
    noise = torch.randn(latents.shape, generator=generator)
    chosen = pairing.nearest(latents, noise, k, generator)
    along = (chosen * latents).sum(1) / latents.norm(dim=1)
    assert float(along.mean()) == pytest.approx(pairing.projection(k, energy), abs=0.04)
    read = float(torch.corrcoef(torch.stack([latents[:, 0], chosen[:, 0]]))[0, 1] ** 2)
    assert read == pytest.approx(pairing.leak(k, share, energy), abs=0.02)
    assert pairing.leak(1, share, energy) == pytest.approx(0, abs=1e-9)


def test_the_leak_that_was_measured_for_us():
    """1.2, 3.9 and 17.3 % for 2, 4, 64 (an independent simulation) with 5.7 % of the energy in brightness."""
    for k, percent in ((2, 1.2), (4, 3.9), (64, 17.3)):
        assert 100 * pairing.leak(k, 0.057) == pytest.approx(percent, rel=0.05)


# ---------------------------------------------------------------- measures


def test_background_contrast_and_slope_of_pictures_that_are_known():
    flat = torch.full((2, 3, 64, 64), -0.5)
    flat[:, :, 20:44, 20:44] = 1.0  # an object in the middle
    assert pictures.background(flat).tolist() == [-0.5, -0.5]
    half = torch.zeros(1, 3, 64, 64)
    half[..., :32] = 1.0
    assert pictures.contrast(half) == pytest.approx(0.5, rel=1e-3)
    asked = torch.tensor([-1.0, 0.0, 1.0, 0.5])
    assert pictures.slope(asked, 0.3 * asked + 0.2) == pytest.approx(0.3)


def test_the_truth_judges_its_own_world_as_right():
    """With a classifier that has learnt nothing: what needs none is exact."""
    torch.manual_seed(0)
    world, network = load_world(), pictures.Classifier().eval()
    truth = pictures.Truth.load(world, network)
    objects, places = pictures.captions()
    seen = world.pictures(objects, places, torch.Generator().manual_seed(5))
    good = truth.judge(fold(seen), objects, places)
    assert good["slope"] == pytest.approx(1, abs=0.06) and good["night"] < -0.85  # shades of 0.25
    grey = truth.judge(fold(0.3 * seen), objects, places)
    assert grey["slope"] == pytest.approx(0.3, abs=0.02) and grey["contrast"] < 0.5 * good["contrast"]
    for what in ("distance", "features"):
        assert abs(good[what]) < 0.05 * grey[what]
    loud, louder = (truth.judge(fold(by * seen), objects, places)["features"] for by in (20, 40))
    assert loud == pytest.approx(louder, rel=0.1)  # a screen shows both alike
    assert len(objects) == 224 and len(set(pictures.LOOKS)) == len(PLACES) - 2


def test_the_classifier_learns_what_a_picture_shows(tmp_path):
    """Eighty steps: far better than chance (1/32 and 1/12), and the file gives the same network."""
    network = pictures.classifier(tmp_path, steps=80, batch=32)
    objects, places = pictures.captions()
    latents = fold(load_world().pictures(objects, places, torch.Generator().manual_seed(5)))
    judged = pictures.Truth.load(load_world(), network).judge(latents, objects, places)
    assert judged["object"] > 0.2 and judged["place"] > 0.4
    again = pictures.classifier(tmp_path, steps=80, batch=32)
    assert torch.equal(again(latents)[0], network(latents)[0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_response_of_networks_that_follow_their_input_and_of_blind_ones(prediction_type):
    schedule = NoiseSchedule.sdxl().with_terminal_sigma(300)
    objective = Objective(schedule, prediction_type)
    latents = 2 * torch.randn(8, 48, 8, 8, generator=torch.Generator().manual_seed(0))

    def follows(noisy, timesteps):
        """Takes all of the input for noise: eps = x / sigma, so v = x alpha / sigma."""
        alpha, sigma = (torch.tensor(level).float()[timesteps] for level in schedule.levels()[:2])
        return noisy * ((1 if prediction_type == "epsilon" else alpha) / sigma)[:, None, None, None]

    found = pictures.response(follows, objective, latents)
    assert found == pytest.approx({"scale_last": 1.1, "scale_middle": 1.1, "gain": 1.0}, rel=1e-3)
    blind = pictures.response(
        lambda x, t: follows(x, t) / x.square().mean((1, 2, 3), keepdim=True).sqrt(), objective, latents
    )
    assert blind["scale_last"] == pytest.approx(1, rel=1e-5)
    flat = pictures.response(lambda x, t: follows(x, t) * 0.9, objective, latents)
    assert flat["gain"] == pytest.approx(0.9 if prediction_type == "epsilon" else 1, rel=1e-3)


def test_a_network_that_is_told_its_scale_follows_it():
    class Blind(torch.nn.Module):
        def forward(self, x, t):
            return type("Output", (), {"sample": x / x.square().mean((1, 2, 3), keepdim=True).sqrt()})

    schedule = NoiseSchedule.sdxl()
    objective = Objective(schedule)
    latents = 2 * torch.randn(8, 48, 8, 8, generator=torch.Generator().manual_seed(0))
    told = finetuning.Told(Blind(), schedule, 4.0)
    found = pictures.response(lambda x, t: told(x, t, {}), objective, latents)
    assert [found["scale_last"], found["scale_middle"]] == pytest.approx([1.1, 1.1], rel=1e-5)
    step = objective.draw(latents, index=torch.full((8,), 500))
    plain = Blind()(step.noisy, step.timesteps).sample
    assert torch.allclose(told(step.noisy, step.timesteps, {}), plain, rtol=0.05)  # an input as expected


# ---------------------------------------------------------------- arms and the record


def test_the_control_weights_differ_from_the_textbook_where_they_say():
    schedule = NoiseSchedule.sdxl().zero_terminal_snr()
    tables = {name: w.table(schedule, "v_prediction") for name, w in finetuning.WEIGHTS.items()}
    textbook = MinSNR(5).table(schedule, "v_prediction")
    one, zero, least = (tables[n] for n in ("textbook, 1 at 999", "none, 0 at 999", "textbook, at least .1"))
    assert (one[:-1] == textbook[:-1]).all() and one[-1] == 1 and textbook[-1] == 0
    assert (zero[:-1] == 1).all() and zero[-1] == 0
    assert least.min() == 0.1 and (least[textbook > 0.1] == textbook[textbook > 0.1]).all()


def test_every_arm_is_an_objective_with_a_reference_and_a_name_of_its_own():
    names = [(arm.experiment, arm.name) for arm in finetuning.ARMS]
    assert len(set(names)) == len(names)
    for arm in finetuning.ARMS:
        assert arm.objective().schedule == finetuning.SCHEDULES[arm.schedule]
        assert finetuning.REFERENCE[arm.experiment](arm) in [name for _, name in names]


def test_two_seeds_of_everything_come_first_and_seed_0_never():
    jobs = finetuning.by_worth()
    arms = len(finetuning.ARMS)
    assert [job.key[1:] for job in jobs[:5]] == [("eps 14.6", seed, 0) for seed in (1, 2, 3, 4, 5)]
    assert {(job.seed, job.length) for job in jobs[5 : 5 + 2 * arms]} == {(1, 1), (2, 1)}
    assert jobs[5 + 2 * arms].length == 4 and all(job.seed for job in jobs)
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_killed_record_goes_on_where_it_stood(tmp_path):
    """Three jobs; one is finished, the line of the next is cut off in the middle."""
    path, jobs = tmp_path / "finetuning.jsonl", finetuning.by_worth()[:3]

    def line(job):
        named = zip(("experiment", "arm", "seed", "steps"), job.key, strict=True)
        return {**dict(named), "checkpoint": "a"}

    finetuning.append(line(jobs[0]), path)
    with path.open("a") as file:
        file.write(json.dumps({**line(jobs[1]), "note": "x" * 500})[:-9])
    todo = []
    for job in finetuning.missing(jobs, path, "a"):
        todo.append(job)
        finetuning.append(line(job), path)
    assert todo == jobs[1:]
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(job) for job in jobs]
    assert list(finetuning.missing(jobs, path, "a")) == []
    with pytest.raises(SystemExit, match="made with another checkpoint"):
        next(finetuning.missing(jobs, path, "b"))


def test_one_process_writes_at_a_time(tmp_path):
    with finetuning.alone(tmp_path / "x.jsonl"):
        with pytest.raises(SystemExit, match="another process writes to it"):
            with finetuning.alone(tmp_path / "x.jsonl"):
                pass


# ---------------------------------------------------------------- a run, with a network that is quick


class Stub(torch.nn.Module):
    """Copies its input, scaled; remembers what it was given in training."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs):
        if self.training:
            self.seen.append((x.clone(), t.clone(), encoder_hidden_states.clone()))
        return type("Output", (), {"sample": x * self.scale})


def _seen(name, seed=1, steps=3):
    arm, stub = next(arm for arm in finetuning.ARMS if arm.name == name), Stub()
    finetuning.finetune(finetuning.Plain(stub), arm, seed, steps)
    return [torch.stack(parts) for parts in zip(*stub.seen, strict=True)]


def test_arms_of_a_seed_see_the_same_pictures_noise_and_timesteps():
    plain = _seen("v zero SNR")
    for name in ("huber, clean", "zero SNR: textbook", "v zero SNR"):
        assert all(torch.equal(a, b) for a, b in zip(_seen(name), plain, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(_seen("v zero SNR", seed=2), plain, strict=True))
    x, t, words = _seen("eps 14.6")
    assert torch.equal(t, plain[1]) and torch.equal(words, plain[2]) and not torch.equal(x, plain[0])
    x, t, words = _seen("v, .1")  # perturbed: the same but for the noise's perturbation
    assert torch.equal(t, plain[1]) and 0 < float((x - plain[0]).std()) < 0.1
    x, t, words = _seen("nearest of 4")
    assert torch.equal(t, plain[1]) and torch.equal(words, plain[2]) and not torch.equal(x, plain[0])
    assert (_seen("999 only")[1] == 999).all()


def test_wrong_captions_are_as_many_as_the_arm_says():
    (x, _, right), (y, _, wrong) = _seen("v zero SNR", steps=40), _seen("l2, 15 % wrong captions", steps=40)
    assert torch.equal(x, y)
    share = float((right != wrong).flatten(2).any(2).double().mean())
    assert share == pytest.approx(0.15, abs=0.04)  # 640 samples: a standard deviation is 0.014


def test_a_run_is_a_line_of_numbers_and_repeats_itself(monkeypatch):
    monkeypatch.setattr(finetuning, "load_tiny_sdxl", Stub)
    monkeypatch.setattr(finetuning, "STEPS", 2)
    few = [rows[:56] for rows in pictures.captions()]
    monkeypatch.setattr(pictures, "captions", lambda: few)
    torch.manual_seed(0)
    truth = pictures.Truth.load(load_world(), pictures.Classifier().eval())
    arm = next(arm for arm in finetuning.ARMS if arm.name == "eps 300 beta_end, told the scale")
    first, second = (finetuning.run(finetuning.Job(arm, 1, 1), truth) for _ in range(2))
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second == json.loads(json.dumps(first))
    assert [first[name] for name in ("experiment", "arm", "seed", "steps")] == ["terminal", arm.name, 1, 2]
    assert (
        0 < first["dpmpp_2m"]["slope_data"] < 1
        and {"slope", "features"} <= set(first["euler_a"])
        and first["scale_last"] == pytest.approx(1.21, rel=1e-3)
    )
    line = finetuning.truth_line(truth)
    assert line["dpmpp_2m"]["slope"] == pytest.approx(1, abs=0.15) and 0 < line["brightness_share"] < 1


# ---------------------------------------------------------------- the page


def _lines():
    """Runs whose numbers are known: slope and features tell seed and arm."""

    def line(experiment, arm, seed, steps, slope):
        measures = ("slope", "night", "contrast", "distance", "features", "object", "place")
        judged = dict.fromkeys(measures, slope)
        rest = dict.fromkeys(("error", "error_last", "scale_middle", "scale_last", "gain", "loss"), slope)
        named = {"experiment": experiment, "arm": arm, "seed": seed, "steps": steps, "seconds": 120.0}
        made = {"checkpoint": "a", "versions": "torch 9"}
        return {**named, "dpmpp_2m": judged, "euler_a": judged, **rest, **made}

    truth = {**line("truth", "pictures", 0, 0, 1.0), "energy": 4.0, "brightness_share": 0.25}
    runs = [line("terminal", "v zero SNR", seed, 400, 0.9 + 0.01 * seed) for seed in (1, 2, 3)]
    runs += [line("terminal", "v 14.6", seed, 400, 0.3 + 0.03 * seed) for seed in (1, 2, 4)]
    runs += [line("pairing", "nearest of 64", seed, 400, 0.4 + 0.01 * seed) for seed in (3, 2, 1)]
    return [truth, *runs, line("terminal", "v zero SNR", 1, 1600, 1.0)]


def test_the_page_pairs_seeds_and_shows_what_there_is():
    page = finetuning_page.page(_lines())
    for name, seeds in (("v 14.6", (1, 2, 4)), ("v zero SNR", (1, 2, 3))):
        values = [(0.3 + 0.03 * s) if name == "v 14.6" else (0.9 + 0.01 * s) for s in seeds]
        assert f"| {name} | {len(seeds)} | {lab.show(values, 2)} | " in page
    # one lacks seed 3, the other seed 4: the pairs are of seeds 1 and 2
    assert f"| v zero SNR | v 14.6 | 2 | {lab.change([0.58, 0.56], 2)} |" in page
    assert "| nearest of 64 | v zero SNR | 3 | **-0.50 ± 0.00** |" in page
    assert "| v zero SNR | 1 | 1.00 | 1.00 | 1.000 |" in page  # 1600 steps, one seed: no interval
    assert f"| 25.0 % (this world) | 4.0 | {100 * pairing.leak(2, 0.25, 4.0):.1f} % |" in page
    assert "## Huber" not in page and "0.3 hours of one core" in page
    # in short: no column for a length that has no pair
    assert (
        f"| v zero SNR | v 14.6 | 2 | {lab.change([0.58, 0.56], 2)} | {lab.change([0.58, 0.56], 2)} | "
        in page
    )
    assert "| nearest of 64 | v zero SNR | 3 | **-0.50 ± 0.00** | **-0.50 ± 0.00** |\n" in page
    assert "bootstrap" not in page and not finetuning_page.in_short(_lines()[-1:])
    lines = _lines()
    lines[1]["dpmpp_2m"]["slope_data"] = 0.0123
    assert "a standard error of 0.012 (bootstrap within" in finetuning_page.page(lines).replace("\n", " ")


def test_the_plot_shows_each_arm_once_and_a_mark_for_each_length():
    figure = finetuning_page.plot(_lines(), "terminal")
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["v 14.6", "v zero SNR"]
    assert len(left.lines) == 7 and left.lines[2].get_xdata() == pytest.approx(0.37)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["400 steps", "1,600 steps"]
    assert left.get_legend() is None  # no legend lies over the data


def test_the_recorded_page_is_the_record_s():
    path = lab.DOCS / "finetuning.md"
    if not path.exists():
        pytest.skip("not written yet: benchmarks/finetuning.py run, then page")
    assert path.read_text(encoding="utf-8") == finetuning_page.page(finetuning.record())
