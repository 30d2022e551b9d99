"""The held-out loss: against float64, one picture at a time, and the training left as it was."""

import argparse
import random

import numpy as np
import pytest
import torch
from closed_form import alphas_cumprod
from PIL import Image
from test_stable_loss import Network, Process

from sdxl_fixes import MinSNR, NoiseSchedule, Objective
from sdxl_fixes.diffusers.heldout import name as name_folder
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.kohya.heldout import check
from sdxl_fixes.trainers.heldout import HeldOut, Picture, bucketed, in_folder, read
from sdxl_fixes.training_sets.images import Sample
from sdxl_fixes.validation import Validation

BUCKETS = [(64, 64), (96, 48)]


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for n, (width, height) in enumerate(((64, 64), (200, 100), (64, 64), (96, 48), (130, 120))):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"picture {n}")
    return tmp_path


def latents_of(pixels):
    random.random(), np.random.rand(), torch.rand(1)  # as a VAE or a loader may draw
    return torch.nn.functional.avg_pool2d(torch.cat([pixels, pixels[:, :1]], 1), 8)


def conditioning_of(picture, pixels):
    sizes = torch.tensor([[*pixels.original, *pixels.crop, *pixels.target]]) / 100
    text = torch.full((1, 5, 6), float(picture.image.stem))
    return (text,), {"added": {"time_ids": sizes}, "scale": 0.1}


def heldout(folder, rank=0, processes=1, points=3, names=None):
    objective = Objective(NoiseSchedule.sdxl(), "epsilon", weighting=MinSNR(5))
    made = HeldOut(Validation(objective, points=points), 2, rank, processes)
    pictures = bucketed(in_folder(str(folder)), BUCKETS)
    made.name([p for p in pictures if names is None or p.image.stem in names])
    made.encode(latents_of, conditioning_of)
    return made


def test_the_loss_is_the_mean_over_pictures_and_timesteps_in_float64(folder):
    """The noise is read back from what the network is given."""
    network, seen = Network(), []
    made = heldout(folder)

    def forward(noisy, timesteps, *args, **kwargs):
        prediction = Network.forward(network, noisy, timesteps, *args, **kwargs)
        seen.append([x.detach().clone() for x in (noisy, timesteps, prediction[0], args[0][:, 0, 0])])
        return prediction

    network.forward = forward
    network.train()
    assert made.called(network, torch.zeros(2, 4, 8, 8))
    numbers, abar = made.step(2, Process(network)), alphas_cumprod()
    assert network.training and max(len(noisy) for noisy, *_ in seen) == 2
    plain, weighted, noises = {}, [], {}
    for noisy, timesteps, prediction, stems in seen:
        for x, t, p, stem in zip(noisy.double(), timesteps.tolist(), prediction.double(), stems, strict=True):
            pixels = read(Picture(folder / f"{int(stem)}.png", "", BUCKETS[x.shape[1] != x.shape[2]])).values
            noise = (x - abar[t] ** 0.5 * latents_of(pixels)[0].double()) / (1 - abar[t]) ** 0.5
            error, snr = float((p - noise).square().mean()), float(abar[t] / (1 - abar[t]))
            plain.setdefault(t, []).append(error)
            weighted.append(error * min(snr, 5) / snr)
            noises[int(stem), t] = noise
    assert len(weighted) == 15 and sorted(plain) == [332, 666, 999]
    assert numbers["heldout/loss"] == pytest.approx(np.mean(weighted), rel=1e-5)
    for t, errors in plain.items():
        assert numbers[f"heldout/loss_unweighted/t{t}"] == pytest.approx(np.mean(errors), rel=1e-5)
    flat = torch.stack([n.flatten()[:128] for n in noises.values()])
    assert (torch.corrcoef(flat) - torch.eye(15)).abs().max() < 0.5  # each its own


def test_the_training_s_random_numbers_and_modes_are_left_alone(folder):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    network = Network()
    network.dropout.eval()  # a part of it alone
    before = states()
    made = heldout(folder)
    made.called(network, torch.zeros(1, 4, 8, 8))
    first, second = made.step(2, Process(network)), made.step(4, Process(network))
    assert states() == before and network.training and not network.dropout.training
    assert (
        first == second and made.step(5, Process(network)) is None and made.step(4, Process(network)) is None
    )


def test_processes_share_the_pictures_and_each_keeps_its_noise(folder):
    network = Network()

    def loss(**options):
        made = heldout(folder, **options)
        made.called(network, torch.zeros(3, 4, 8, 8))
        process = Process(network)
        return made.step(2, process)["heldout/loss"], process.reduced[-1], made

    whole, sums, made = loss()
    parts = [loss(rank=rank, processes=3)[1] for rank in range(3)]
    assert torch.allclose(sum(parts), sums, rtol=1e-5) and made.total == 5
    some, others = loss(names="02")[0], loss(names="134")[0]
    assert (2 * some + 3 * others) / 5 == pytest.approx(whole, rel=1e-5) and some != pytest.approx(others)


def test_a_picture_covers_its_bucket_and_is_cut_around_the_middle(folder):
    pixels = read(Picture(folder / "0.png", "", (64, 64)))
    exact = np.asarray(Image.open(folder / "0.png"), dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(pixels.values[0].double().numpy() - exact).max() < 1e-6
    assert (pixels.original, pixels.crop, pixels.target) == ((64, 64), (0, 0), (64, 64))
    wide = read(Picture(folder / "1.png", "", (64, 64)))  # 200 x 100 becomes 128 x 64
    assert (wide.original, wide.crop, wide.target) == ((100, 200), (0, 32), (64, 64))
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    Image.fromarray(ramp).save(folder / "1.png")
    left, right = (read(Picture(folder / "1.png", "", (64, 64))).values[0, 0, 30, k] for k in (0, -1))
    assert float(left + right) == pytest.approx(2 * (99.5 / 127.5 - 1), abs=0.01)  # the middle is the middle


def test_each_goes_to_the_bucket_of_the_nearest_aspect(folder):
    found = {p.image.stem: (p.bucket, p.caption) for p in bucketed(in_folder(str(folder)), BUCKETS)}
    assert found["1"] == ((96, 48), "picture 1") and found["4"] == ((64, 64), "picture 4") and len(found) == 5


def test_what_cannot_be_held_out_is_one_sentence(folder, tmp_path_factory):
    made = heldout(folder, names="0")
    with pytest.raises(FixError, match=r"latents of \S+0.png are not finite: give it more precision"):
        made.encode(lambda pixels: latents_of(pixels) * torch.nan, conditioning_of)
    with pytest.raises(FixError, match="no picture is held out: give --heldout_dir"):
        made.name([])
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FlagError, match=r"--heldout_dir .*empty.* holds no usable image"):
        in_folder(str(empty))
    with pytest.raises(FlagError, match="--heldout_dir missing: there is no missing"):
        in_folder("missing")
    known = argparse.Namespace(heldout_dir=str(folder), train_data_dir=str(folder.parent), resolution=64)
    with pytest.raises(FlagError, match=r"lies in --train_data_dir .* move it elsewhere"):
        name_folder(made, known)
    known.train_data_dir = str(empty)
    name_folder(made, known)
    assert made.total == 5 and {picture.bucket for picture in made.pictures} == {(64, 64)}
    with pytest.raises(FlagError, match="--heldout_steps needs --heldout_dir"):
        name_folder(made, argparse.Namespace(heldout_dir=None))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (dict(heldout_dir="x"), "--heldout_dir needs --heldout_steps"),
        (dict(heldout_steps=-1), "--heldout_steps -1: expected 1 or more"),
        (dict(ema_decay=1.0), r"--ema_decay 1: expected a decay in \(0, 1\)"),
        (
            dict(ema_evaluated=True, ema_decay=0.9),
            "--ema_evaluated needs --ema_decay, and --heldout_steps or",
        ),
        (dict(ema_evaluated=True, heldout_steps=1), "--ema_evaluated needs --ema_decay"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense(flags, sentence):
    with pytest.raises(FlagError, match=sentence):
        TrainingFlags(**flags)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (dict(heldout_split=1.5), "--heldout_split 1.5: expected a share"),
        (dict(heldout_split=0.1, heldout_dir="x"), "takes the place of --heldout_dir"),
        (dict(heldout_split=0.1, validation_split=0.0), "this script has --validation_split of its own"),
    ],
    ids=str,
)
def test_the_split_is_one_of_kohya_s_own(args, sentence):
    known = argparse.Namespace(**{"heldout_steps": 2, "heldout_dir": None, **args})
    with pytest.raises(FlagError, match=sentence):
        check(known)
    known = argparse.Namespace(heldout_steps=2, heldout_dir=None, heldout_split=0.1, seed=None)
    check(known)
    assert (known.validation_split, known.validation_seed) == (0.1, 0)


def test_a_sample_of_nothing_is_nothing():
    assert bucketed([], BUCKETS) == [] and Sample  # an empty split
