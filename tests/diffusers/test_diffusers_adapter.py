"""The diffusers adapter on a script with the structure of the examples (tests/data/made_up_sdxl.py), and
against recorded numbers of the real ones (tests/diffusers/real/record.py). Expected values are worked out in
float64 from diffusers' own tables."""

import argparse
import contextlib
import io
import json
import math
import re
import sys

import diffusers
import models
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from made_up_script import DATA, SCRIPT, environment, model, run
from safetensors import safe_open

from sdxl_fixes import NoiseSchedule
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.cli import main as cli
from sdxl_fixes.diffusers import buckets, caches, crops, prompts
from sdxl_fixes.diffusers.__main__ import main as launch
from sdxl_fixes.diffusers.anchors import missing
from sdxl_fixes.diffusers.flags import FLAGS_HERE
from sdxl_fixes.diffusers.run import SESSION, start
from sdxl_fixes.model_files.header import ROOM, ROOM_KEY
from sdxl_fixes.model_files.stamp import stamp_file
from sdxl_fixes.trainers.patching import PatchSet

V = ("--prediction_type", "v_prediction")


def abar(change=None):
    """alphas_cumprod in float64, from the formula; ``change`` "ztsnr" by diffusers' own rescale, or a
    beta_end."""
    end = change if isinstance(change, float) else 0.012
    betas = torch.linspace(0.00085**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - (rescale_zero_terminal_snr(betas) if change == "ztsnr" else betas), 0)


@pytest.fixture
def base(tmp_path):
    """base(**changes): a model folder that has a scheduler alone."""
    return lambda **changes: model(tmp_path, **changes)


@pytest.fixture
def train(base, tmp_path, monkeypatch):
    """train(*flags, how=...) runs the script in this process and returns its steps; ``how`` is module,
    install or unpatched."""
    environment(monkeypatch)

    def train(*flags, how="module", model=None, out="out"):
        return run(tmp_path / out, model or base(), *flags, how=how)

    return train


def refusal(train, *flags, status=1, **kwargs):
    """The sentence that ends the process: python itself prints a message that it exits with, and its status
    is 1 then."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as error, contextlib.redirect_stderr(printed):
        train(*flags, **kwargs)
    said = printed.getvalue().splitlines()[-1] if status == 2 else error.value.code
    assert (
        error.value.code == (2 if status == 2 else said)
        and said.startswith("sdxl-fixes: ")
        and "\n" not in said
    )
    return said


def same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize("how", ["module", "install"])
@pytest.mark.parametrize("flags", [(), ("--mixed_precision", "bf16"), ("--with_prior_preservation",)])
def test_patched_with_nothing_on_is_bit_identical(train, how, flags):
    assert same(train(*flags, how=how), train(*flags, how="unpatched"))


def test_fixes_none_leaves_upstreams_own_flags_to_upstream(train):
    assert same(train("--snr_gamma", "5", "--fixes", "none"), train("--snr_gamma", "5", how="unpatched"))


@pytest.mark.parametrize("how", ["module", "install"])
def test_fixes_none_is_upstream_under_any_flags(train, how, capsys):
    flags = ("--zero_terminal_snr", *V, "--loss_type", "huber", "--min_snr_floor", "--ip_noise_gamma", "0.1")
    more = ("--stratified_timesteps", "--terminal_timestep_share", "0.3", "--float32_noising")
    more += ("--stable_loss_steps", "1", "--max_token_length", "225", "--chunk_buckets")
    none = train("--snr_gamma", "5", *flags, *more, "--fixes", "none", how=how)
    said = capsys.readouterr().err
    assert same(none, train("--snr_gamma", "5", how="unpatched"))
    assert (
        "in huggingface/diffusers example (made_up_sdxl.py, not tested): no fix is on, it trains as "
        "upstream does\n"
    ) in said
    (dropped,) = [line for line in said.splitlines() if "no effect" in line]
    assert dropped.startswith("sdxl-fixes: WARNING: --fixes none: --zero_terminal_snr, ")
    ours = (flag[2:] for flag in (*flags, *more) if flag.startswith("--"))
    assert set(ours) == set(re.findall(r"--(\w+)", dropped)) - {"fixes"}


def test_flags_of_a_fix_that_is_switched_off_are_dropped_with_a_warning(train, capsys):
    """The fix is off, nothing half-follows its flags, and what else is on stays so."""
    flags = ("--zero_terminal_snr", *V, "--snr_gamma", "5")
    without = train(*flags, "--loss_type", "huber", "--huber_c", "0.2", "--fixes", "all,-loss")
    said = capsys.readouterr().err
    assert "WARNING: --fixes all,-loss: --loss_type, --huber_c have no effect\n" in said and "l2 loss" in said
    assert same(without, train(*flags))
    train(*flags, "--fixes", "all,-weighting")
    said = capsys.readouterr().err
    assert "WARNING: --fixes all,-weighting: weighting is upstream's own, though flags ask for it\n" in said


def test_uninstall_puts_everything_back(train):
    before = (
        torch.nn.functional.mse_loss,
        torch.randint,
        argparse.ArgumentParser.parse_args,
        diffusers.SchedulerMixin.from_pretrained,
    )
    train("--terminal_sigma", "300", "--loss_type", "huber", "--stratified_timesteps")
    after = (
        torch.nn.functional.mse_loss,
        torch.randint,
        argparse.ArgumentParser.parse_args,
        diffusers.SchedulerMixin.from_pretrained,
    )
    assert before == after and SESSION.run is None


@pytest.mark.parametrize(
    ("flags", "table"),
    [
        (("--zero_terminal_snr",), abar("ztsnr")),
        (("--terminal_sigma", "300", "--terminal_sigma_method", "beta_end"), abar(0.02817676)),
    ],
)
def test_noise_and_target_are_of_the_schedule(train, flags, table):
    for step in train(*flags, *V):
        left = table[step["timesteps"]].reshape(-1, 1, 1, 1)
        x, noise = step["model_input"].double(), step["noise"].double()
        torch.testing.assert_close(
            step["noisy"].double(), left.sqrt() * x + (1 - left).sqrt() * noise, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            step["target"].double(), left.sqrt() * noise - (1 - left).sqrt() * x, rtol=1e-5, atol=1e-5
        )


def weight(t, table, prediction_type, gamma=5.0, floor=False):
    """min-SNR (arXiv:2303.09556), with its limits at SNR 0."""
    snr = float(table[t] / (1 - table[t]))
    if prediction_type == "epsilon":
        return 1.0 if snr == 0 else min(snr, gamma) / snr
    return min(snr + floor, gamma) / (snr + 1)


@pytest.mark.parametrize("prior", [(), ("--with_prior_preservation",)], ids=["plain", "prior"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [None, 999])
@pytest.mark.filterwarnings("ignore:epsilon prediction with zero:UserWarning")
def test_min_snr_is_right_and_finite_at_zero_snr_for_both_halves(train, base, prior, prediction_type, t):
    fixed = () if t is None else ("--fixed_timestep", str(t))
    model, table = base(prediction_type=prediction_type, rescale_betas_zero_snr=True), abar("ztsnr")
    for step in train("--snr_gamma", "5", "--min_snr_floor", *prior, *fixed, model=model):
        errors = (step["model_pred"] - step["target"].float()).double().square().mean([1, 2, 3])
        weighted = errors * torch.tensor(
            [weight(t, table, prediction_type, floor=True) for t in step["timesteps"].tolist()]
        )
        expected = weighted.mean() if not prior else weighted.chunk(2)[0].mean() + weighted.chunk(2)[1].mean()
        assert step["loss"].item() == pytest.approx(expected.item(), rel=1e-4) and step["loss"] > 0


@pytest.mark.parametrize("prior", [(), ("--with_prior_preservation",)], ids=["plain", "prior"])
def test_huber_has_a_delta_for_every_sample(train, prior):
    table = abar("ztsnr")
    for step in train("--zero_terminal_snr", *V, "--loss_type", "huber", "--huber_c", "0.2", *prior):
        left = table[step["timesteps"]]
        delta = (0.8 / (1 + ((1 - left) / left).sqrt()) ** 2 + 0.2).reshape(-1, 1, 1, 1)
        r = (step["model_pred"] - step["target"]).double()
        losses = (2 * delta * ((r**2 + delta**2).sqrt() - delta)).mean([1, 2, 3])
        expected = losses.mean() if not prior else losses.chunk(2)[0].mean() + losses.chunk(2)[1].mean()
        assert step["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bf16_noise_is_float32_arithmetic_if_asked_for(train):
    flags = ("--mixed_precision", "bf16", "--fixed_timestep", "1")
    upstream, fixed = (train(*flags, *more)[0] for more in ((), ("--float32_noising",)))
    assert torch.equal(upstream["noisy"], upstream["model_input"])  # no noise at all
    left = abar()[1]
    expected = left.sqrt() * fixed["model_input"].double() + (1 - left).sqrt() * fixed["noise"].double()
    assert fixed["noisy"].dtype == torch.bfloat16
    torch.testing.assert_close(fixed["noisy"].double(), expected, rtol=2**-8, atol=1e-3)


def test_input_perturbation_changes_the_input_and_not_the_target(train):
    plain, perturbed = (
        train(*V, "--fixed_timestep", "900", "--train_batch_size", "64", *more)[0]
        for more in ((), ("--ip_noise_gamma", "0.5"))
    )
    assert torch.equal(plain["noise"], perturbed["noise"]) and torch.equal(
        plain["target"], perturbed["target"]
    )
    added = (perturbed["noisy"] - plain["noisy"]).std().item()
    assert added == pytest.approx(0.5 * math.sqrt(1 - abar()[900]), rel=0.02)


def test_timesteps_are_stratified_and_terminal_weighted_with_the_expected_loss_unchanged(train):
    (step,) = train("--stratified_timesteps", "--max_train_steps", "1", "--train_batch_size", "10")
    assert sorted((step["timesteps"] // 100).tolist()) == list(range(10))
    flags = (
        "--zero_terminal_snr",
        *V,
        "--terminal_timestep_share",
        "0.5",
        "--max_train_steps",
        "1",
        "--train_batch_size",
        "400",
    )
    (step,) = train(*flags)
    added = (abar("ztsnr")[step["timesteps"]] < abar()[-1] * (1 - 1e-9)).double()  # above sigma 14.6
    share = float((abar("ztsnr") < abar()[-1] * (1 - 1e-9)).double().mean())
    assert added.mean() == pytest.approx(0.5 + 0.5 * share, abs=0.08)
    importance = torch.where(added > 0, 1 / (0.5 + 0.5 / share), 2.0)  # uniform density over the drawn one
    errors = (step["model_pred"] - step["target"]).double().square().mean([1, 2, 3])
    assert step["loss"].item() == pytest.approx((errors * importance).mean().item(), rel=1e-4)


def test_a_saved_scheduler_is_the_trained_one_and_class_images_came_from_the_base(train, tmp_path):
    train("--terminal_sigma", "300", "--terminal_sigma_method", "tail", *V)
    saved = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert NoiseSchedule.from_scheduler(saved).terminal_sigma == pytest.approx(300)
    assert saved.config.timestep_spacing == "trailing" and saved.config.prediction_type == "v_prediction"
    before = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "class_images")
    assert before.config.prediction_type == "epsilon" and before.config.timestep_spacing == "leading"


def test_lora_files_carry_the_record_and_the_vae_does_not(train, tmp_path):
    train("--zero_terminal_snr", *V)
    with safe_open(tmp_path / "out" / "lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == ["unet.conv.lora_A.weight"] and metadata["format"] == "pt"
    assert metadata[ROOM_KEY] == " " * ROOM  # for a later stamp
    assert (
        NoiseSchedule.from_json(metadata["sdxl_fixes.schedule"]) == NoiseSchedule.sdxl().zero_terminal_snr()
    )
    with safe_open(tmp_path / "out" / "vae.safetensors", framework="pt") as file:
        assert file.metadata() is None


def test_a_checkpoint_resumes_its_strata_and_only_on_its_own_schedule(train, tmp_path):
    flags = ("--terminal_sigma", "300", *V, "--stratified_timesteps")
    whole = train(*flags, "--max_train_steps", "4")
    train(*flags, "--max_train_steps", "2", out="first")
    state = str(tmp_path / "first" / "checkpoint")
    resumed = train(*flags, "--max_train_steps", "2", "--resume_from_checkpoint", state)
    assert [step["timesteps"].tolist() for step in resumed] == [
        step["timesteps"].tolist() for step in whole[2:]
    ]
    other = refusal(train, "--terminal_sigma", "100", *V, "--resume_from_checkpoint", state)
    assert (
        "was trained with v_prediction" in other
        and ("resume with the flags that it was started with") in other
    )


def test_a_fix_that_is_never_reached_ends_the_run_in_its_first_step(train, tmp_path):
    message = refusal(train, "--loss_type", "huber", "--no_loss")
    assert "loss asked for but not reached in this training step" in message
    assert "--fixes all,-loss" in message
    assert not (tmp_path / "out" / "steps.pt").exists()


@pytest.mark.parametrize("flags", [V, ("--prediction_type", "flow_prediction", "--unet")])
def test_a_target_that_is_not_the_prediction_asked_for_stops_the_first_step(train, flags, tmp_path):
    message = refusal(train, *flags, "--no_velocity")
    assert "schedule asked for but not reached" in message and "(get_velocity)" in message
    assert not (tmp_path / "out" / "steps.pt").exists()


def test_a_weighted_target_of_v_is_one_where_the_base_alone_says_v(train, base):
    flags = ("--snr_gamma", "5", "--no_velocity")
    message = refusal(train, *flags, model=base(prediction_type="v_prediction"))
    assert "weighting asked for but not reached" in message and "(get_velocity)" in message


@pytest.mark.parametrize(
    "flags", [("--snr_gamma", "5"), ("--loss_type", "huber"), ("--stratified_timesteps",)]
)
def test_a_loss_of_latents_that_were_noised_twice_is_of_no_timesteps(train, flags):
    assert "latents were noised twice before a loss was computed" in refusal(
        train, *flags, "--noise_again", "0"
    )


def test_a_step_that_the_script_skips_after_its_loss_leaves_the_others_as_they_are(train):
    skipped, whole = (train("--loss_type", "huber", *skip) for skip in (("--skipped_step", "0"), ()))
    assert len(skipped) == 1 and torch.equal(skipped[0]["timesteps"], whole[1]["timesteps"])


@pytest.mark.parametrize(
    "flags", [("--snr_gamma", "5"), ("--loss_type", "huber", "--with_prior_preservation")]
)
def test_a_second_loss_of_a_step_is_not_taken_for_the_step_s(train, flags):
    assert "F.mse_loss was called again after the loss of a step's latents" in refusal(
        train, *flags, "--auxiliary_loss"
    )
    assert len(train("--float32_noising", "--auxiliary_loss")) == 2  # which is upstream's own there


def test_noise_alone_is_added_as_often_as_the_script_likes(train):
    twice, once = (train("--float32_noising", *again) for again in (("--noise_again", "0"), ()))
    assert same(twice, once)


def test_a_run_that_saved_no_record_says_so_at_its_end(train):
    assert "no model file that was saved carries its schedule" in refusal(
        train, "--terminal_sigma", "300", *V, "--save_nothing"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--terminal_sigma", "nan"), "--terminal_sigma nan: terminal sigma must be above"),
        (("--min_snr_floor",), "--min_snr_floor needs --snr_gamma"),
        (("--fixes", "everything"), "unknown fix 'everything'"),
        (("--max_token_length", "225"), "the fix 'prompts', which your flags ask for, does not fit"),
        (("--max_token_length", "75"), "expected more than the 75 tokens"),
        (("--snr_gamma", "5", "--do_edm_style_training"), "so weighting cannot be had there"),
        (("--loss_type", "huber", "--do_edm_style_training"), "so loss cannot be had there"),
        (("--stable_loss_steps", "5", "--do_edm_style_training"), "so validation cannot be had there"),
        (
            ("--stable_loss_steps", "5"),
            "the fix 'validation', which your flags ask for, does not fit this diffusers example",
        ),
        (("--stable_loss_images", "5"), "--stable_loss_images needs --stable_loss_steps"),
        (("--zero_terminal_snr", *V, "--do_edm_style_training"), "EDM-style training needs a finite sigma"),
    ],
)
def test_wrong_flags_are_one_sentence_before_any_training(train, tmp_path, flags, sentence):
    assert sentence in refusal(train, *flags, status=2)
    assert not (tmp_path / "out" / "steps.pt").exists()


def test_an_edm_model_keeps_its_sigmas(train, base):
    model = base()
    (model / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}'
    )
    assert "is an EDM model with sigmas of its own" in refusal(
        train, "--terminal_sigma", "300", model=model, status=2
    )


def test_a_flow_matching_model_has_no_other_end(train, base):
    model = base()
    (model / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}'
    )
    said = refusal(train, "--terminal_sigma", "300", model=model, status=2)
    assert "--terminal_sigma does not go with flow_prediction" in said


def test_a_record_that_the_scheduler_config_contradicts_is_named(train, base, capsys):
    base_model = base()
    (base_model / "unet").mkdir()
    stamped = models.model(base_model / "unet" / "diffusion_pytorch_model.safetensors", "diffusers_unet")
    stamp_file(stamped, Sampling(NoiseSchedule.sdxl().zero_terminal_snr(), "v_prediction"))
    train("--terminal_sigma", "300", model=base_model)
    said = capsys.readouterr().err
    assert f"the record in {base_model} says v_prediction, sigma 0.02917 to inf, its scheduler config" in said
    stamp_file(stamped, Sampling(NoiseSchedule.sdxl(), "epsilon"), force=True)
    train("--terminal_sigma", "300", model=base_model)
    assert "the record in" not in capsys.readouterr().err


def based(base, sampling, config=None):
    """A base model folder whose U-Net has the record of ``sampling`` and whose scheduler says ``config``."""
    folder = base(**(config or {}))
    (folder / "unet").mkdir()
    stamp_file(models.model(folder / "unet" / "x.safetensors", "diffusers_unet"), sampling)
    return folder


V_ZERO = Sampling(NoiseSchedule.sdxl().zero_terminal_snr(), "v_prediction")
E_300 = Sampling(NoiseSchedule.sdxl().with_terminal_sigma(300, "beta_end"), "epsilon")
ZERO_CONFIG = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SAID_300 = ("--terminal_sigma", "300", "--terminal_sigma_method", "beta_end")
# the base: its record or None, its scheduler config -> the flags that train the same without --match_base
MATCHED = {
    "record v ztsnr": (V_ZERO, {}, (*V, "--zero_terminal_snr")),
    "config v ztsnr": (None, ZERO_CONFIG, (*V, "--zero_terminal_snr")),
    "record eps 300, config v ztsnr": (E_300, ZERO_CONFIG, None),
    "record eps 300": (E_300, {}, SAID_300),
    "config v": (None, {"prediction_type": "v_prediction"}, V),
    "plain": (None, {}, ()),
}
MORE = ("--loss_type", "huber", "--snr_gamma", "5", "--min_snr_floor", "--ip_noise_gamma", "0.1")


@pytest.mark.parametrize("case", MATCHED)
def test_the_base_alone_trains_as_its_flags_do(train, base, case, capsys, tmp_path):
    record, config, flags = MATCHED[case]
    folder = base(**config) if record is None else based(base, record, config)
    matched = train("--match_base", *MORE, model=folder)
    said = capsys.readouterr().err
    assert "in huggingface/diffusers example" in said and "the record in" not in said
    by = "its scheduler config" if record is None else "its record"
    assert f"  base       {folder}: " in said and f", by {by}\n" in said
    with safe_open(tmp_path / "out" / "lora.safetensors", framework="pt") as file:
        carried = (file.metadata() or {}).get("sdxl_fixes.schedule")
    expected = record or (None if case == "plain" else Sampling(*SESSION_SAID[case]))
    if expected is None:
        assert carried is None
    else:
        assert NoiseSchedule.from_json(carried) == expected.schedule
        assert json.loads(carried)["prediction_type"] == expected.prediction_type
    flags, other = (
        (SAID_300, base()) if flags is None else (flags, folder if record is None else base(**config))
    )
    assert same(matched, train(*flags, *MORE, model=other))
    again = folder if record is None else based(base, record, config)
    assert same(matched, train("--match_base", *flags, *MORE, model=again))  # the same flags are fine


SESSION_SAID = {
    "config v ztsnr": (V_ZERO.schedule, "v_prediction"),
    "config v": (NoiseSchedule.sdxl(), "v_prediction"),
}


@pytest.mark.parametrize(
    ("sampling", "flags", "sentence"),
    [
        (V_ZERO, ("--prediction_type", "epsilon"), "--prediction_type epsilon contradicts --match_base"),
        (V_ZERO, ("--terminal_sigma", "300"), "--terminal_sigma 300.0 contradicts --match_base"),
        (E_300, ("--zero_terminal_snr",), "--zero_terminal_snr contradicts --match_base"),
        (E_300, V, "--prediction_type v_prediction contradicts --match_base"),
        (
            Sampling(NoiseSchedule.sdxl(), "sample"),
            (),
            "and this trainer trains epsilon or v_prediction or flow_prediction: take another base model",
        ),
    ],
)
def test_what_contradicts_the_base_is_refused_before_anything_is_loaded(
    train, base, sampling, flags, sentence
):
    said = refusal(train, "--match_base", *flags, model=based(base, sampling), status=2)
    assert sentence in said and str(sampling) in said and "by its record" in said


def test_match_base_goes_with_the_schedule_that_is_switched_off(train, base, capsys):
    folder = based(base, V_ZERO)
    without = train("--match_base", "--fixes", "all,-schedule", model=folder)
    assert "--fixes all,-schedule: --match_base has no effect" in capsys.readouterr().err
    assert same(without, train(model=folder, how="unpatched"))


def test_the_report_names_what_is_on(train, capsys):
    train("--terminal_sigma", "300", *V)
    report = capsys.readouterr().err
    for line in (
        "sdxl-fixes: 0.1.0 in huggingface/diffusers example (made_up_sdxl.py, not tested)",
        "  objective  v_prediction on sigma to 300 (0.33 % of the image left; SDXL's own: 6.8 %); l2 loss",
        "  weights    every timestep counts the same",
        "  data       timesteps drawn uniformly",
    ):
        assert f"{line}\n" in report
    saved = "schedule record in every model file but the VAE's, the scheduler of a saved folder"
    assert f"  file       {saved}; validation images sample the same\n" in report
    flags = ("--zero_terminal_snr", *V, "--loss_type", "huber", "--snr_gamma", "5")
    train(*flags, "--ip_noise_gamma", "0.1", "--stratified_timesteps")
    report = capsys.readouterr().err
    assert "zero terminal SNR (nothing of the image left; SDXL's own: 6.8 %); huber loss, delta" in report
    assert "input perturbation 0.1\n  weights    min-SNR, gamma 5, without a floor\n" in report
    assert "  data       timesteps stratified over the optimizer step\n" in report


def test_the_report_warns_of_a_step_that_is_not_learnt(train, capsys):
    lost = "WARNING: min-SNR without --min_snr_floor gives the noisy half of the timesteps little weight"
    for flags, said in ((("--snr_gamma", "5"), True), (("--snr_gamma", "5", "--min_snr_floor"), False)):
        train("--zero_terminal_snr", *flags, *V)
        assert (lost in capsys.readouterr().err) == said
    train("--snr_gamma", "5")  # epsilon: the weight at the last timestep is that of the others
    assert lost not in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_launchers_help_lists_our_flags_and_ends_well(monkeypatch, capsys, word):
    monkeypatch.setattr(sys, "argv", ["sdxl_fixes.diffusers", word])
    launch()
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m sdxl_fixes.diffusers PATH/TO/train_text_to_image_sdxl.py")
    assert all(f"  --{name} " in said or f"  --{name}\n" in said for name in FLAGS_HERE)


def test_the_launcher_says_what_it_cannot_run(monkeypatch, tmp_path):
    for words, sentence in (
        (["--fixes"], "usage: python -m sdxl_fixes.diffusers"),
        (["nowhere.py"], "there is no nowhere.py"),
        ([__file__], "is no SDXL training script"),
    ):
        monkeypatch.setattr(sys, "argv", ["sdxl_fixes.diffusers", *words])
        with pytest.raises(SystemExit, match=sentence):
            launch()


def test_doctor_says_which_fix_has_a_place_in_a_script(capsys):
    assert cli(["doctor", str(SCRIPT)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    assert (
        "fits" in lines["loss"]
        and "no place" in lines["prompts"]
        and ("it does not call tokenizer(...)") in lines["prompts"]
    )


def test_scripts_of_another_kind_get_no_training_fix():
    source = SCRIPT.read_text()
    assert not {"schedule", "loss", "weighting", "noise", "timesteps", "previews", "saving"} & set(
        missing(source)
    )
    assert "it distils a teacher" in missing(source + "\nteacher_unet = None")["loss"]
    assert "its loss is written out" in missing(source.replace("F.mse_loss", "my_loss"))["weighting"]


RECORD = json.loads((DATA / "diffusers_examples.json").read_text())


@pytest.mark.parametrize("case", RECORD["min-SNR"])
def test_weights_of_the_stock_schedule_are_the_scripts_where_those_are_right(case, base):
    """Recorded from the unmodified scripts: each step's timesteps, mean squared error per sample, and the
    weighted loss they made."""
    script, prediction_type = case.split()
    args = {"snr_gamma": 5.0, "prediction_type": None, "float32_noising": False, "max_token_length": None}
    args |= {
        "chunk_buckets": False,
        "true_crop_coordinates": False,
        "checked_caches": False,
        "pretrained_model_name_or_path": str(base(prediction_type=prediction_type)),
    }
    run = start(argparse.Namespace(fixes=None, **args), PatchSet(()))
    for step in RECORD["min-SNR"][case]:
        timesteps, errors = torch.tensor(step["timesteps"]), torch.tensor(step["errors"], dtype=torch.float64)
        ours = (run.step_loss.weights(timesteps).double() * errors).mean().item()
        residual = errors.sqrt().float().reshape(-1, 1, 1, 1)  # as the adapter asks for the loss
        loss = run.step_loss(residual, torch.zeros_like(residual), timesteps)
        assert loss.item() == pytest.approx(ours, rel=1e-5)
        # upstream: min(SNR, gamma)/SNR + 1, never below 1
        if script == "dreambooth" and prediction_type == "v_prediction":
            assert ours < 0.9 * step["loss"]
        else:
            assert ours == pytest.approx(step["loss"], rel=1e-4)


# ---------------------------------------------------------------- prompts, crops, caches


class Tokenizer:
    """One token a word."""

    bos_token_id, eos_token_id, pad_token_id = 8, 9, 0

    def __call__(self, captions, **kwargs):
        return {"input_ids": [[1 + len(word) % 5 for word in caption.split()] for caption in captions]}


@pytest.fixture
def script():
    """script(**args): a session whose script is this module."""

    def begin(fixes=("prompts", "crops", "caches"), **args):
        SESSION.reset()
        SESSION.begin(argparse.Namespace(on=frozenset(fixes), args=argparse.Namespace(**args)))
        SESSION.script = globals()
        return SESSION

    yield begin
    SESSION.reset()


def words(count):
    return " ".join(["word"] * count)


def test_captions_become_chunks_of_75_with_their_own_ends_and_the_limit_is_reported(script, capsys):
    session = script(max_token_length=150)
    ids = prompts.tokenize(
        Tokenizer.__call__, Tokenizer(), [words(3), words(76), words(200)], padding="max_length"
    )["input_ids"]
    rows = ids.reshape(3, 2, 77).tolist()
    assert rows[0] == [[8, 5, 5, 5, 9, *[0] * 72], [8, 9, *[0] * 75]]
    assert rows[1] == [[8, *[5] * 75, 9], [8, 5, 9, *[0] * 74]] and rows[2] == [[8, *[5] * 75, 9]] * 2
    assert session.chunks == [1, 2, 2] and session.has_reached("prompts")
    assert (
        "captions longer than --max_token_length 150, and cut there, so far: 1; the longest has 200 tokens"
        in capsys.readouterr().err
    )


class Encoder:
    """Hidden state = token id and its place in the chunk; pooled = the chunk's largest id."""

    config = argparse.Namespace(max_position_embeddings=77)

    def __call__(self, input_ids):
        assert input_ids.shape[1] == 77
        place = torch.arange(77.0).expand(len(input_ids), 77)
        return input_ids.amax(1, keepdim=True).float(), (torch.stack([input_ids.float(), place], 2),)


def test_each_chunk_is_encoded_by_itself_and_the_pooled_output_is_the_first_ones(script):
    script(max_token_length=225)
    ids = prompts.tokenize(Tokenizer.__call__, Tokenizer(), [words(80), words(3)], padding="max_length")[
        "input_ids"
    ]
    pooled, (hidden,) = prompts.encode(Encoder.__call__, Encoder(), ids)
    # the third chunk, empty for both, is dropped
    assert hidden.shape == (2, 154, 2) and pooled.shape == (2, 1)
    assert torch.equal(hidden[:, :, 0].long(), ids[:, :154]) and torch.equal(
        hidden[0, :, 1], torch.arange(77.0).repeat(2)
    )
    script(max_token_length=225, with_prior_preservation=True)
    # its prompts are encoded apart and joined
    assert prompts.encode(Encoder.__call__, Encoder(), ids)[1][0].shape[1] == 231


def test_cached_embeddings_of_a_batch_are_cut_to_its_longest_caption():
    collate = prompts.CutToLongest(lambda examples: [len(example["prompt_embeds"]) for example in examples])
    examples = [{"prompt_embeds": [0] * 231, prompts.COLUMN: chunks} for chunks in (1, 2)]
    assert collate(examples) == [154, 154] and collate(examples[:1]) == [77]


class Captions(torch.utils.data.Dataset):
    """As a datasets.Dataset with the number of chunks beside every cached embedding."""

    column_names = (prompts.COLUMN,)

    def with_format(self, kind):
        return {prompts.COLUMN: [1, 1, 3, 1, 2, 1, 1, 3, 1, 1]}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, self.with_format(None)[prompts.COLUMN][index]


def test_the_scripts_shuffled_loader_gets_batches_of_equally_many_chunks(script):
    script(fixes=("buckets",), seed=3, max_token_length=225)
    made = torch.utils.data.DataLoader.__new__(torch.utils.data.DataLoader)
    buckets.loader(
        torch.utils.data.DataLoader.__init__, made, Captions(), shuffle=True, batch_size=2, num_workers=0
    )
    for _ in range(3):
        batches = [(index.tolist(), chunks.tolist()) for index, chunks in made]
        assert sorted(i for index, _ in batches for i in index) == list(range(10)) and len(batches) == 5
        assert sum(len(set(chunks)) > 1 for _, chunks in batches) == 1  # the one of two chunks has no partner
    plain = torch.utils.data.DataLoader.__new__(torch.utils.data.DataLoader)
    # class images: not shuffled
    buckets.loader(torch.utils.data.DataLoader.__init__, plain, Captions(), batch_size=2)
    assert [index.tolist() for index, _ in plain] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_chunk_buckets_need_captions(script):
    script(fixes=("buckets",), seed=3, max_token_length=225, caption_column="text")
    made = torch.utils.data.DataLoader.__new__(torch.utils.data.DataLoader)
    with pytest.raises(
        RuntimeError, match="--chunk_buckets finds no captions in this script's data set: leave it out"
    ):
        buckets.loader(
            torch.utils.data.DataLoader.__init__, made, torch.arange(4), shuffle=True, batch_size=2
        )


def test_the_crop_that_was_encoded_is_the_crop_that_is_given(script):
    script()
    batch = {"crop_top_lefts": [(3, 0), (0, 7)], "pixel_values": None}
    kept = crops.encode(lambda batch, vae: {"model_input": [1, 2]}, batch, None)
    examples = [{"crop_top_lefts": (9, 9), crops.COLUMN: list(crop)} for crop in kept[crops.COLUMN]]
    assert crops.WithKeptCrops(lambda examples: [e["crop_top_lefts"] for e in examples])(examples) == [
        (3, 0),
        (0, 7),
    ]


def test_cache_keys_know_the_encoders_files_and_the_precision(tmp_path, monkeypatch):
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(b"one")
    keys = [caches.content_key(str(tmp_path), {})]
    file.write_bytes(b"other")
    keys.append(caches.content_key(str(tmp_path), {}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    keys.append(caches.content_key(str(tmp_path), {}))
    keys.append(caches.content_key(str(tmp_path), {"__file__": __file__}))
    assert len(set(keys)) == 4 and keys[3] == caches.content_key(str(tmp_path), {"__file__": __file__})


def test_a_cold_cache_leaves_the_random_numbers_as_a_warm_one_does(script):
    script(pretrained_model_name_or_path="hub/model")
    states = []
    for cold in (True, False):
        torch.manual_seed(0)
        seen = []

        def draw(dataset, function, new_fingerprint, seen=seen, cold=cold):
            seen.append(new_fingerprint)
            return cold and torch.rand(3)

        caches.map(draw, None, None, new_fingerprint="0123456789abcdef")
        states.append((torch.rand(1).item(), *seen))
    assert states[0] == states[1] and len(states[0][1]) == 32


def test_stratified_timesteps_are_drawn_on_the_scripts_device(monkeypatch):
    from sdxl_fixes import TimestepSampler
    from sdxl_fixes.diffusers import timesteps

    schedule = NoiseSchedule.sdxl()
    run = argparse.Namespace(timesteps=TimestepSampler(schedule, stratified=True), schedule=schedule)
    monkeypatch.setattr(SESSION, "run", run)
    monkeypatch.setattr(SESSION, "called_by_script", lambda: True)
    drawn = timesteps.randint(torch.randint, 0, 1000, (4,), device=torch.device("meta"))
    assert drawn.device.type == "meta" and drawn.shape == (4,)


@pytest.mark.parametrize("module", [crops, prompts])
def test_caches_are_keyed_by_our_own_code_too(module, tmp_path, monkeypatch):
    """Of another version of what makes the embeddings and the crops nothing is taken."""
    key, other = caches.content_key("a-name", {}), tmp_path / "other.py"
    other.write_text("# another version")
    monkeypatch.setattr(module, "__file__", str(other))
    assert caches.content_key("a-name", {}) != key


def test_accelerate_deals_our_batches_out_as_they_are():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.even_batches
    assert buckets.prepare(lambda self, *given: given, accelerator, "loader") == ("loader",)
    assert not accelerator.even_batches


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_loss_is_reduced_as_the_script_asks(reduction, monkeypatch):
    """ "none" is asked for where the script weights by SNR itself."""
    from sdxl_fixes.diffusers import loss
    from sdxl_fixes.trainers.step import StepLoss

    schedule = NoiseSchedule.sdxl()
    run = argparse.Namespace(on=frozenset(("loss",)), timesteps=None, step_loss=StepLoss(schedule, "epsilon"))
    monkeypatch.setattr(SESSION, "run", run)
    monkeypatch.setattr(SESSION, "called_by_script", lambda: True)
    monkeypatch.setattr(SESSION.step, "timesteps", torch.tensor([0, 999]))
    monkeypatch.setattr(SESSION.step, "counted", 0)
    parts = torch.arange(32.0).reshape(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    mine = loss.mse_loss(None, *parts, reduction=reduction)
    assert torch.equal(mine, torch.nn.functional.mse_loss(*parts, reduction=reduction))
