"""Flags: kohya's names, one meaning each, and one sentence for what makes no sense."""

import argparse
import math

import numpy as np
import pytest

from sdxl_fixes import (
    Debiased,
    InputPerturbation,
    Loss,
    MinSNR,
    NoiseSchedule,
    OffsetNoise,
    ScheduledHuber,
    SoftMinSNR,
)
from sdxl_fixes.command_line import add_flags
from sdxl_fixes.densities import Beta, Laplace, LogitNormal, Mode
from sdxl_fixes.errors import FlagError
from sdxl_fixes.flags import FLAGS, TrainingFlags
from sdxl_fixes.weighting import FlowMatching


def parse(*words):
    parser = argparse.ArgumentParser()
    add_flags(parser, FLAGS)
    return TrainingFlags.from_args(parser.parse_args(words))


def test_no_flag_is_stock_sdxl():
    flags = parse()
    assert flags == TrainingFlags()
    assert flags.schedule() == NoiseSchedule.sdxl() and flags.loss == Loss("l2")
    assert flags.weighting() is flags.perturbation is flags.offset is None


@pytest.mark.parametrize(
    ("words", "terminal", "middle_moves"),
    [
        (["--zero_terminal_snr"], math.inf, True),
        (["--terminal_sigma", "inf"], math.inf, True),
        (["--terminal_sigma", "300"], 300, True),
        (["--terminal_sigma", "300", "--terminal_sigma_method", "last"], 300, False),
        (
            ["--terminal_sigma", "inf", "--terminal_sigma_method", "tail", "--terminal_sigma_start", "900"],
            math.inf,
            False,
        ),
    ],
)
def test_schedule_flags(words, terminal, middle_moves):
    schedule = parse(*words).schedule()
    assert schedule.terminal_sigma == pytest.approx(terminal)
    assert (schedule.sigmas[899] != NoiseSchedule.sdxl().sigmas[899]) == middle_moves


def test_the_other_flags_reach_the_core():
    huber = [
        "--loss_type",
        "smooth_l1",
        "--huber_schedule",
        "exponential",
        "--huber_c",
        "0.2",
        "--huber_scale",
        "3",
    ]
    flags = parse(
        *huber, "--huber_l2_gradient", "batch", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"
    )
    assert flags.loss == ScheduledHuber("smooth_l1", "exponential", 0.2, 3.0, "batch")
    assert flags.perturbation == InputPerturbation(0.1, random=True)
    assert parse("--noise_offset", "0.05").offset == OffsetNoise(0.05)
    assert parse("--min_snr_gamma", "5", "--min_snr_floor").weighting() == MinSNR(5, floor=True)
    assert parse("--soft_min_snr_gamma", "4").weighting() == SoftMinSNR(4)
    assert parse("--debiased_estimation_loss").weighting() == Debiased()
    assert parse("--flow_weighting").weighting() == FlowMatching()
    assert flags.objective().loss_function == flags.loss


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--terminal_sigma", "nan"], "--terminal_sigma nan: .*above the schedule's first sigma"),
        (["--terminal_sigma", "0.01"], "first sigma, 0.02917, got 0.01"),
        (["--terminal_sigma", "300", "--zero_terminal_snr"], "give one of them"),
        (["--match_base", "--keep_base", "1"], "--keep_base converts .* --match_base trains on as it was"),
        (["--terminal_sigma_method", "tail"], "--terminal_sigma_method needs --terminal_sigma"),
        (["--terminal_sigma", "99", "--terminal_sigma_start", "900"], "start belongs to method 'tail'"),
        (
            ["--terminal_sigma", "inf", "--terminal_sigma_method", "beta_end"],
            "no beta_end gives an infinite terminal sigma",
        ),
        (["--huber_l2_gradient", "batch"], "--huber_l2_gradient belongs to --loss_type huber or smooth_l1"),
        (["--min_snr_floor"], "--min_snr_floor needs --min_snr_gamma"),
        (["--min_snr_gamma", "-1"], "min_snr_gamma must be a positive number"),
        (["--loss_type", "huber", "--huber_c", "0"], "huber_c must be a positive number"),
        (["--loss_type", "huber", "--huber_scale", "nan"], "huber_scale must be a positive number"),
        (["--ip_noise_gamma", "-0.1"], "ip_noise_gamma must be"),
        (["--noise_offset", "inf"], "noise_offset must be"),
        (
            ["--timestep_density_weighted"],
            "--timestep_density_weighted needs --timestep_density logit_normal",
        ),
        (["--timestep_uniform_share", "0.1"], "--timestep_uniform_share needs --timestep_density"),
        (["--timestep_uniform_share", "1"], r"--timestep_uniform_share 1: expected a share in \[0, 1\)"),
        (["--logit_mean", "0"], "--logit_mean needs --timestep_density logit_normal: give both"),
        (["--timestep_density", "beta", "--mode_scale", "1"], "--mode_scale needs --timestep_density mode"),
        (
            ["--timestep_density", "mode", "--mode_scale", "2"],
            "--timestep_density mode: mode_scale must lie in",
        ),
        (["--resolution_shift", "0"], "--resolution_shift 0: expected 1 or more"),
        (["--resolution_shift", "-3"], "--resolution_shift -3: expected 1 or more"),
        (["--flow_weighting", "--min_snr_gamma", "5"], "--flow_weighting and --min_snr_gamma are different"),
        (["--flow_weighting", "--debiased_estimation_loss"], "are different weightings of the same loss"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(words, sentence):
    with pytest.raises(FlagError, match=sentence) as error:
        parse(*words)
    assert "\n" not in str(error.value)


def test_densities_have_their_parameters_and_the_papers_defaults():
    made = {
        ("logit_normal",): LogitNormal(0.0, 1.0),
        ("logit_normal", "--logit_mean", "-0.5", "--logit_std", "0.6"): LogitNormal(-0.5, 0.6),
        ("laplace", "--laplace_scale", "2"): Laplace(0.0, 2.0),
        ("mode",): Mode(1.29),
        ("beta",): Beta(1.0, 1.0),
        ("beta", "--beta_alpha", "2", "--beta_beta", "3"): Beta(2.0, 3.0),
    }
    for words, density in made.items():
        sampler = parse("--timestep_density", *words, "--timestep_uniform_share", "0.2").timesteps()
        assert sampler.density == density and not sampler.weighted and not sampler.stratified
        relative = 1000 * density.masses(sampler.schedule) / density.masses(sampler.schedule).sum()
        np.testing.assert_allclose(1000 * sampler.probabilities, 0.8 * relative + 0.2, rtol=1e-9)
    assert parse("--timestep_density", "uniform").timesteps() is None
    flags = ("--timestep_density", "mode", "--timestep_density_weighted", "--resolution_shift", "768")
    sampler = parse(*flags, "--stratified_timesteps").timesteps()
    assert sampler.weighted and sampler.stratified and sampler.base == 768
    with pytest.raises(
        FlagError, match=r"--timestep_density laplace: Laplace .* hardly draws some timesteps"
    ):
        parse("--timestep_density", "laplace", "--timestep_density_weighted").timesteps()


def test_two_weightings_are_refused():
    with pytest.raises(
        FlagError, match="--min_snr_gamma and --debiased_estimation_loss are different weightings"
    ):
        parse("--min_snr_gamma", "5", "--debiased_estimation_loss").weighting()


def test_a_trainers_own_flag_keeps_its_help_and_default():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss_type", default="l1", help="theirs")
    add_flags(parser, FLAGS)
    assert parser.parse_args([]).loss_type == "l1" and "theirs" in parser.format_help()
    assert all(f"--{name}" in parser.format_help() for name in FLAGS)
