"""The unmodified sdxl_train.py and sdxl_train_network.py of sd-scripts, with and without the fixes. Set
SD_SCRIPTS to run these."""

import json
import sys

import checkouts
import numpy as np
import pytest
import runs
import torch
from closed_form import alphas_cumprod
from safetensors import safe_open

from sdxl_fixes import MinSNR, NoiseSchedule, read_sampling
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file

pytestmark = [
    pytest.mark.kohya,
    pytest.mark.skipif(not checkouts.named(), reason=checkouts.SKIP),
]
SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")
UPSTREAM_FLAGS = (
    *("--loss_type", "huber", "--huber_schedule", "snr", "--min_snr_gamma", "5"),
    *("--zero_terminal_snr", "--v_parameterization", "--ip_noise_gamma", "0.1"),
)


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    return runs.make_assets(tmp_path_factory.mktemp("kohya"))


@pytest.fixture
def train(assets, tmp_path):
    """train(how, script, *flags) -> (process, trace); ``how`` as for runs.run()."""

    def run(how, script, *flags, steps=3, check=True, **options):
        process, trace = runs.run(how, script, *flags, assets=assets, folder=tmp_path, steps=steps, **options)
        if check and process.returncode:
            raise AssertionError(process.stderr[-3000:])
        return process, trace

    return run


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("how", ["install", "module"])
def test_patched_with_nothing_on_is_bit_identical(train, script, how):
    assert train(how, script)[1] == train("unpatched", script)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_fixes_none_is_bit_identical_under_every_upstream_flag(train, script):
    assert (
        train("module", script, *UPSTREAM_FLAGS, "--fixes", "none")[1]
        == train("unpatched", script, *UPSTREAM_FLAGS)[1]
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_terminal_snr_reaches_the_snr_table(train, script):
    before, after = (
        train(how, script, "--zero_terminal_snr", "--v_parameterization", steps=1)[1]
        for how in ("unpatched", "module")
    )
    ztsnr = NoiseSchedule.sdxl().zero_terminal_snr()
    assert (
        before["all_snr_900"] == pytest.approx(0.01435, abs=1e-5) and before["all_snr_999"] > 0.004
    )  # upstream: the old schedule's
    assert after["all_snr_900"] == pytest.approx(ztsnr.snr[900], rel=1e-6) and after[
        "all_snr_900"
    ] == pytest.approx(0.00297, abs=1e-5)
    assert after["all_snr_999"] == after["alphas_cumprod_999"] == 0
    assert after["timesteps"] == before["timesteps"]  # the random numbers are upstream's


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_differ_from_upstream_by_the_corrected_weight_alone(train, script):
    """One step, l2 + ZTSNR + v + min-SNR: noise, target and loss are upstream's, the weight is of the true
    SNR."""
    flags = ("--zero_terminal_snr", "--v_parameterization", "--min_snr_gamma", "5")
    weighted, plain = (
        train("module", script, *flags, steps=1)[1],
        train("unpatched", script, *flags[:2], steps=1)[1],
    )
    stock = train("module", script, *flags[:2], steps=1)[1]
    assert stock["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    weights = MinSNR(5).table(NoiseSchedule.sdxl().zero_terminal_snr(), "v_prediction")[
        weighted["timesteps"][0]
    ]
    assert (
        min(weights) * plain["losses"][0] * 0.9
        <= weighted["losses"][0]
        <= max(weights) * plain["losses"][0] * 1.1
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_fix_from_flags_trains_and_is_reported(train, script):
    process, trace = train(
        *(
            "module",
            script,
            "--terminal_sigma",
            "300",
            "--terminal_sigma_method",
            "rescale",
            "--v_parameterization",
        ),
        *(
            "--loss_type",
            "smooth_l1",
            "--huber_l2_gradient",
            "batch",
            "--min_snr_gamma",
            "5",
            "--min_snr_floor",
        ),
        *("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
        tensors=True,
    )
    form = dict(loss="smooth_l1", gradient="batch", min_snr=5.0, floor=True)
    assert len(trace["losses"]) == 3
    assert trace["losses"] == pytest.approx(runs.expected(trace, alphas_cumprod(sigma=300), **form), rel=2e-5)
    assert trace["all_snr_999"] == pytest.approx(300.0**-2, rel=1e-5)
    report = process.stderr.split("in kohya-ss/sd-scripts")[1]
    for part in (
        "v_prediction on sigma to 300",
        "smooth_l1 loss, delta",
        "min-SNR, gamma 5, floor 1",
        "input perturbation 0 to 0.1",
    ):
        assert part in report


def test_a_toml_config_file_carries_the_flags(train, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("terminal_sigma = 100\nterminal_sigma_method = 'tail'\n")
    assert train("module", "sdxl_train.py", "--config_file", str(config), steps=1)[1][
        "all_snr_999"
    ] == pytest.approx(1e-4, rel=1e-5)


def test_accelerate_launch_gives_the_same_losses(train):
    flags = ("--terminal_sigma", "300", "--loss_type", "huber")
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--mixed_precision",
        "no",
        "module",
    ]
    assert train(accelerate, "sdxl_train.py", *flags)[1] == train("module", "sdxl_train.py", *flags)[1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--terminal_sigma", "nan"),
            "--terminal_sigma nan: terminal sigma must be above the schedule's first sigma",
        ),
        (("--terminal_sigma", "300", "--zero_terminal_snr"), "give one of them"),
        (("--fixes", "everything"), "unknown fix 'everything'"),
    ],
)
def test_wrong_flags_are_one_sentence_before_any_model_is_loaded(train, flags, sentence):
    process, _ = train(
        "module", "sdxl_train.py", *flags, "--pretrained_model_name_or_path", "/does/not/exist", check=False
    )
    last = process.stderr.strip().splitlines()[-1]
    assert (
        process.returncode != 0
        and last.startswith("sdxl-fixes: ")
        and sentence in last
        and "Traceback" not in process.stderr
    )


def test_epsilon_with_zero_terminal_snr_warns_and_trains(train):
    process, trace = train("module", "sdxl_train.py", "--zero_terminal_snr", "--min_snr_gamma", "5", steps=1)
    assert "Use --v_parameterization" in process.stderr and len(trace["losses"]) == 1


def saved(tmp_path):
    with safe_open(tmp_path / "out" / "out.safetensors", framework="pt") as file:
        return set(file.keys()), file.metadata()


@pytest.mark.parametrize(
    ("flags", "markers", "prediction_type", "terminal"),
    [
        (("--v_parameterization",), {"v_pred"}, "v", 14.6146),
        (("--v_parameterization", "--zero_terminal_snr"), {"v_pred", "ztsnr"}, "v-zsnr", float("inf")),
        (("--v_parameterization", "--terminal_sigma", "300"), set(), None, 300),
    ],
)
def test_full_model_says_how_to_sample_it(train, tmp_path, flags, markers, prediction_type, terminal):
    train("module", "sdxl_train.py", *flags, steps=1)
    keys, metadata = saved(tmp_path)
    assert keys & {"v_pred", "ztsnr"} == markers and len(keys) > 900
    assert metadata.get("modelspec.prediction_type") == prediction_type
    record = json.loads(metadata["sdxl_fixes.schedule"])
    assert NoiseSchedule.from_record(record).terminal_sigma == pytest.approx(terminal, rel=1e-5)
    assert record["prediction_type"] == "v_prediction"


def test_network_carries_the_record_and_no_marker(train, tmp_path):
    train("module", "sdxl_train_network.py", "--v_parameterization", "--zero_terminal_snr", steps=1)
    keys, metadata = saved(tmp_path)
    assert not keys & {"v_pred", "ztsnr"} and metadata["modelspec.prediction_type"] == "v-zsnr"
    assert (
        NoiseSchedule.from_json(metadata["sdxl_fixes.schedule"]) == NoiseSchedule.sdxl().zero_terminal_snr()
    )


def test_stock_epsilon_model_is_saved_as_upstream_saves_it(train, tmp_path):
    train("module", "sdxl_train.py", steps=1)
    keys, metadata = saved(tmp_path)
    assert not keys & {"v_pred", "ztsnr"} and "sdxl_fixes.schedule" not in metadata


@pytest.mark.parametrize(
    "flags", [("--zero_terminal_snr",), ("--terminal_sigma", "300", "--terminal_sigma_method", "rescale")]
)
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_previews_follow_the_trained_schedule(train, tmp_path, flags, sampler):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ginger cat --w 128 --h 128 --s 3 --l 5 --d 1\n")
    preview = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "1", "--sample_sampler", sampler)
    _, trace = train("module", "sdxl_train.py", *flags, "--v_parameterization", *preview, steps=1)
    config = trace["preview"]
    assert (
        config["timestep_spacing"] == "trailing"
        and config["prediction_type"] == "v_prediction"
        and not config["clip_sample"]
    )
    assert config["terminal_sigma"] == pytest.approx(300 if "300" in flags else float("inf"), rel=1e-3)
    assert config["timesteps"][0] == 999 and len(config["timesteps"]) == 3
    assert list((tmp_path / "out" / "sample").glob("*.png"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_stratified_terminal_weighted_timesteps_train(train, script):
    flags = (
        "--zero_terminal_snr",
        "--v_parameterization",
        "--stratified_timesteps",
        "--terminal_timestep_share",
        "0.5",
    )
    _, trace = train("module", script, *flags, steps=6)
    drawn = [t for step in trace["timesteps"] for t in step]
    assert (
        sum(t >= 880 for t in drawn) >= 4
    )  # half of 12 draws and an eighth of the others, one in each of a step's two slices
    assert all(0 < loss < 10 for loss in trace["losses"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_save_moment_carries_the_record(train, tmp_path, script):
    moments = ("--save_every_n_steps", "2", "--save_every_n_epochs", "1", "--save_state")
    train(
        "module", script, "--v_parameterization", "--zero_terminal_snr", *moments, steps=7
    )  # an epoch is 6 steps
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {"out.safetensors", "out-000001.safetensors", "out-step00000002.safetensors"} <= {
        file.name for file in files
    }
    for name in files:
        with safe_open(name, framework="pt") as file:
            assert NoiseSchedule.from_json(file.metadata()["sdxl_fixes.schedule"]).terminal_sigma == float(
                "inf"
            )
            assert ("ztsnr" in file.keys()) == (script == "sdxl_train.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stamped_base_trained_without_its_flags_is_warned_about_and_told_the_truth_of(
    train, assets, tmp_path, script
):
    """Losses stay upstream's to the bit; the saved file says what was trained, and a later stamp finds room
    in it."""
    base, zero = (
        tmp_path / "base.safetensors",
        Sampling(NoiseSchedule.sdxl().zero_terminal_snr(), "v_prediction"),
    )
    stamp_file(assets / "model.safetensors", zero, force=True, output=base)
    process, trace = train("module", script, "--pretrained_model_name_or_path", str(base))
    assert "give --match_base, or --v_parameterization --zero_terminal_snr" in process.stderr
    keys, metadata = saved(tmp_path)
    assert NoiseSchedule.from_json(metadata["sdxl_fixes.schedule"]) == NoiseSchedule.sdxl() and not keys & {
        "v_pred",
        "ztsnr",
    }
    size = (tmp_path / "out" / "out.safetensors").stat().st_size
    assert stamp_file(tmp_path / "out" / "out.safetensors", zero, force=True).way in ("header", "copy")
    assert (tmp_path / "out" / "out.safetensors").stat().st_size == size
    assert trace == train("unpatched", script, "--pretrained_model_name_or_path", str(base))[1]
    process, _ = train(
        "module",
        script,
        "--pretrained_model_name_or_path",
        str(base),
        "--v_parameterization",
        "--zero_terminal_snr",
    )
    assert "WARNING: " + str(base) not in process.stderr


SDXL = NoiseSchedule.sdxl()
LINEAR = NoiseSchedule.linear()
# what the base says -> the flags that train the same, if there are any
BASES = {
    "v ztsnr": (SDXL.zero_terminal_snr(), "v_prediction", ("--v_parameterization", "--zero_terminal_snr")),
    "epsilon 300": (
        SDXL.with_terminal_sigma(300, "beta_end"),
        "epsilon",
        ("--terminal_sigma", "300", "--terminal_sigma_method", "beta_end"),
    ),
    "v on linear betas": (LINEAR, "v_prediction", None),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", BASES)
def test_the_base_alone_trains_as_its_flags_do(train, assets, tmp_path, script, case):
    """To the bit; where no flags do, as the closed form says. What is saved goes on from there."""
    schedule, prediction_type, flags = BASES[case]
    base, said = tmp_path / "base.safetensors", Sampling(schedule, prediction_type)
    stamp_file(assets / "model.safetensors", said, force=True, output=base)
    name = ("--pretrained_model_name_or_path", str(base))
    form = ("--loss_type", "huber", "--min_snr_gamma", "5", "--min_snr_floor")
    moments = ("--save_every_n_steps", "1", "--save_last_n_steps", "1")
    process, trace = train("module", script, *name, "--match_base", *form, *moments, tensors=True)
    assert f"{base}: {said}, by its record" in process.stderr
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    assert [read_sampling(file) for file in files] == [said] * 3  # of four, one was removed
    configs = {file.with_suffix(".scheduler_config.json") for file in files}
    assert set(out.glob("*.json")) == (configs if script == "sdxl_train.py" else set())
    if flags is not None:
        assert trace == train("module", script, *name, *flags, *form, tensors=True)[1]
    else:
        abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        expected = runs.expected(trace, torch.from_numpy(abar), loss="huber", min_snr=5.0, floor=True)
        assert trace["losses"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", ["diffusers", "diffusers_safetensors"])
def test_a_folder_that_is_saved_samples_what_was_trained(train, assets, tmp_path, kind):
    base = ("--pretrained_model_name_or_path", str(assets / "diffusers"))
    train(
        "module",
        "sdxl_train.py",
        *base,
        "--v_parameterization",
        "--zero_terminal_snr",
        "--save_model_as",
        kind,
        steps=1,
    )
    (folder,) = [path.parent.parent for path in (tmp_path / "out").rglob("scheduler/scheduler_config.json")]
    assert read_sampling(folder) == Sampling(SDXL.zero_terminal_snr(), "v_prediction")


def test_a_state_is_resumed_on_its_own_schedule_alone(train, tmp_path):
    state = ("--save_state", "--save_every_n_steps", "1", "--v_parameterization")
    train("module", "sdxl_train_network.py", *state, "--zero_terminal_snr", steps=1)
    (folder,) = (tmp_path / "out").glob("*step*-state")
    resume = ("--resume", str(folder), "--v_parameterization")
    process, trace = train("module", "sdxl_train_network.py", *resume, check=False)
    assert process.returncode and "was trained with v_prediction on" in process.stderr.splitlines()[-1]
    assert not trace["losses"]
    assert train("module", "sdxl_train_network.py", *resume, "--zero_terminal_snr")[1]["losses"]


def test_a_pickle_is_refused_before_any_model_is_loaded(train):
    for flags in (
        ("--save_model_as", "ckpt"),
        ("--save_model_as", "ckpt", "--network_module", "networks.lora"),
    ):
        script = SCRIPTS[len(flags) > 2]
        process, trace = train("module", script, "--v_parameterization", *flags, check=False)
        last = process.stderr.strip().splitlines()[-1]
        assert process.returncode == 2 and "--save_model_as ckpt saves a pickle, which cannot say" in last
        assert not trace["losses"] and "Traceback" not in process.stderr
