"""Normal use of the real trainers: workers, precision, caches, accumulation, checkpointing, resume. Set
SD_SCRIPTS to run these.

In every mode, patched with nothing on is bit-identical to upstream, and with the fixes on the schedule is the
trained one.
"""

import pytest
import runs
from closed_form import alphas_cumprod
from diffusers import EulerDiscreteScheduler
from test_real_trainer import SCRIPTS, assets, pytestmark, train  # noqa: F401  (fixtures)

from sdxl_fixes import NoiseSchedule

CACHES = ("--cache_latents", "--cache_text_encoder_outputs")
MODES = {
    "1 worker, fork": ("--max_data_loader_n_workers", "1"),
    "2 workers, fork": ("--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"),
    "1 worker, spawn": ("--max_data_loader_n_workers", "1"),
    "bf16": ("--mixed_precision", "bf16"),
    "full bf16": ("--mixed_precision", "bf16", "--full_bf16"),
    "cached latents and text": CACHES,
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "checkpointing": ("--gradient_checkpointing",),
    "masked loss": ("--masked_loss",),
}
FIXES = (
    *("--terminal_sigma", "20000", "--terminal_sigma_method", "rescale", "--v_parameterization"),
    *("--loss_type", "huber", "--huber_l2_gradient", "batch", "--min_snr_gamma", "5", "--min_snr_floor"),
    *("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength", "--stratified_timesteps"),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_mode(train, script, mode, monkeypatch):  # noqa: F811
    flags = MODES[mode]
    if mode.endswith("spawn"):
        monkeypatch.setenv("START_METHOD", "spawn")
    if "--cache_text_encoder_outputs" in flags and script == "sdxl_train_network.py":
        flags = (*flags, "--network_train_unet_only")
    upstream, nothing_on = (train(how, script, *flags, steps=2)[1] for how in ("unpatched", "module"))
    assert nothing_on == upstream
    fixed = train("module", script, *flags, *FIXES, steps=2, tensors=True)[1]
    form = dict(loss="huber", gradient="batch", min_snr=5.0, floor=True)
    expected = runs.expected(fixed, alphas_cumprod(sigma=20000), **form)
    assert len(fixed["losses"]) == len(upstream["losses"])
    assert fixed["losses"] == pytest.approx(expected, rel=2e-5)
    assert fixed["all_snr_999"] == pytest.approx(20000.0**-2, rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_has_the_same_schedule_and_nothing_on_is_bit_identical(train, tmp_path, script):  # noqa: F811
    for how, fixes in (("unpatched", ()), ("module", ()), ("module", FIXES)):
        train(how, script, *fixes, "--save_state", "--save_every_n_steps", "2", steps=2)
        state = next((tmp_path / "out").glob("*-state"))
        # networks count on from the state
        resumed = train(how, script, *fixes, "--resume", str(state), steps=4)[1]
        if how == "unpatched":
            upstream = resumed
        elif not fixes:
            assert resumed == upstream
        else:
            assert resumed["all_snr_999"] == pytest.approx(20000.0**-2, rel=1e-4)


@pytest.mark.parametrize(
    ("fix", "expected"), [(("--terminal_sigma", "300"), 300), (("--zero_terminal_snr",), float("inf"))]
)
def test_diffusers_folder_is_saved_with_the_trained_schedule(train, assets, tmp_path, fix, expected):  # noqa: F811
    flags = (
        "--pretrained_model_name_or_path",
        str(assets / "diffusers"),
        "--save_model_as",
        "diffusers_safetensors",
    )
    train("module", "sdxl_train.py", *flags, "--v_parameterization", *fix, steps=1)
    config = EulerDiscreteScheduler.load_config(next((tmp_path / "out").glob("*/scheduler")))
    assert config["prediction_type"] == "v_prediction" and config["timestep_spacing"] == "trailing"
    assert NoiseSchedule.from_config(config).terminal_sigma == pytest.approx(expected)
