"""The unmodified SDXL example scripts of diffusers, with and without the fixes. Set DIFFUSERS_EXAMPLES to run
these."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import run_script as runner
import torch
from closed_form import alphas_cumprod, nearest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from two_processes import TWO

from sdxl_fixes import NoiseSchedule, read_sampling
from sdxl_fixes.checkpoint import Sampling
from sdxl_fixes.model_files.stamp import stamp_file

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif(
        "DIFFUSERS_EXAMPLES" not in os.environ,
        reason="set DIFFUSERS_EXAMPLES to the examples folder of a huggingface/diffusers checkout (0.32 to "
        "main) to run",
    ),
]
SCRIPTS = tuple(runner.SCRIPTS)
LORA = ("t2i_lora", "dreambooth", "advanced")
V = ("--prediction_type", "v_prediction")
FIXES = (
    *("--terminal_sigma", "300", *V, "--loss_type", "huber", "--snr_gamma", "5", "--min_snr_floor"),
    *("--ip_noise_gamma", "0.1", "--stratified_timesteps"),
)
TERMINAL_ONLY = (
    "--timestep_bias_strategy",
    "later",
    "--timestep_bias_portion",
    "0.001",
    "--timestep_bias_multiplier",
    "1e9",
)
# the perceptual loss beside the plain one has a test of its own
PLAIN = {"lpl": ("--lpl_start", "1000000")}
# it computes with images of large sigma in float32
REL = {"adapter": 1e-3}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return runner.assets(tmp_path_factory.mktemp("assets") / "made")


@pytest.fixture
def run(made, tmp_path):
    """run(how, script, *flags) -> (process, trace)."""

    def start(how, script, *flags, folder="run", **options):
        return runner.run_script(how, script, made, tmp_path / folder, *flags, **options)

    return start


def right(trace, abar=None, v=False, rel=2e-5, **form):
    """The losses of a trace with tensors are the closed form; the default is upstream's own: epsilon, l2."""
    expected = runner.expected(trace, alphas_cumprod() if abar is None else abar, v=v, **form)
    assert trace["losses"] == pytest.approx(expected, rel=rel)
    return True


def right_with_fixes(trace, rel=2e-5):
    """The same for FIXES."""
    return right(trace, alphas_cumprod(sigma=300), v=True, rel=rel, loss="huber", min_snr=5.0, floor=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_patched_with_nothing_on_is_bit_identical(run, script):
    assert run("module", script, folder="a")[1] == run("unpatched", script, folder="b")[1]


def test_install_is_the_same(run):
    assert run("install", "t2i_lora", folder="a")[1] == run("unpatched", "t2i_lora", folder="b")[1]


@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "dreambooth", "advanced"])
def test_bf16_and_upstreams_own_flags_are_untouched_without_our_fixes(run, script):
    flags = ("--mixed_precision", "bf16", "--snr_gamma", "5")
    assert (
        run("module", script, *flags, "--fixes", "none", folder="a")[1]
        == run("unpatched", script, *flags, folder="b")[1]
    )


# loss and noise are their own
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ("adapter", "lpl")])
def test_every_fix_trains_and_validation_samples_the_schedule(run, made, script):
    photo = str(made / "plain" / "0.png")
    image = {
        "controlnet": ("--validation_image", photo, "--validation_steps", "2"),
        "instruct": ("--val_image_url_or_path", photo, "--validation_steps", "2"),
    }.get(script, ())
    process, trace = run(
        *("module", script, *FIXES, "--validation_prompt", "a cat", "--num_validation_images", "1", *image),
        tensors=True,
    )
    assert right_with_fixes(trace) and len(trace["losses"]) == 3
    # one draw in each half
    assert [sorted(t // 500 for t in step) for step in trace["timesteps"]] == [[0, 1]] * 3
    for preview in trace["previews"]:
        assert preview["timestep_spacing"] == "trailing" and preview["prediction_type"] == "v_prediction"
        assert preview["terminal_sigma"] == pytest.approx(300, rel=1e-4)
    assert trace["previews"]
    for part in (
        "v_prediction on sigma to 300",
        "huber loss",
        "input perturbation 0.1",
        "min-SNR, gamma 5, floor 1",
        "stratified",
    ):
        assert part in process.stderr
    assert (
        "schedule record in every model file" in process.stderr
        and ("validation images sample the same") in process.stderr
    )


def test_flows_objective_trains_in_v(run, script="dreambooth"):
    """Draws uniform in s, but for a fifth, with their importance weights and flow's: the closed form. The
    shift by resolution is by the size of the latents that the script has noised."""
    density = ("--timestep_density", "beta", "--timestep_density_weighted", "--timestep_uniform_share", "0.2")
    flags = ("--zero_terminal_snr", *V, "--flow_weighting", "--stratified_timesteps", *density)
    _, trace = run("module", script, *flags, tensors=True, folder="a")
    abar = alphas_cumprod(zero_snr=True)
    assert right(trace, abar, v=True, flow_weight=True, even=0.2)
    unweighted = ("--zero_terminal_snr", *V, "--stratified_timesteps", "--timestep_density", "beta")
    plain, shifted = (
        run("module", script, *unweighted, *more, tensors=True, folder=f"b{len(more)}")[1]
        for more in ((), ("--resolution_shift", "32"))
    )
    assert right(shifted, abar, v=True)
    side = 8 * len(shifted["tensors"]["latents"][0][0][0])
    for before, after in zip(plain["timesteps"], shifted["timesteps"], strict=True):
        assert after == nearest(torch.tensor(before), abar, side / 32).tolist() != before


STOCK = """
import sys
sys.modules["sdxl_fixes"] = None  # as if it were not installed
import json, torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
ddim = DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe("a cat", num_inference_steps=2, height=64, width=64, output_type="pt").images
pipe.scheduler.set_timesteps(25)
left = [float(s.alphas_cumprod[-1].double()) for s in (pipe.scheduler, ddim)]
config = {k: pipe.scheduler.config[k] for k in ("prediction_type", "timestep_spacing")}
first, finite = float(pipe.scheduler.timesteps[0]), bool(torch.isfinite(image).all())
print(json.dumps({**config, "left": left, "first": first, "finite": finite}))
"""


@pytest.mark.parametrize(
    ("flags", "sigmas"),
    [
        (("--terminal_sigma", "300"), (300, 300)),
        (("--terminal_sigma", "300", "--terminal_sigma_method", "tail"), (300, 300)),
        (("--zero_terminal_snr",), (4096, float("inf"))),  # Euler starts at 4096 there, DDIM at infinity
    ],
)
def test_a_saved_folder_is_loaded_and_sampled_by_stock_diffusers(run, tmp_path, flags, sigmas):
    run("module", "t2i", *V, *flags, steps=1)
    folder = tmp_path / "run" / "out"
    process = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert (
        found["prediction_type"] == "v_prediction"
        and found["timestep_spacing"] == "trailing"
        and found["first"] == 999
    )
    assert found["finite"]
    for left, sigma in zip(found["left"], sigmas, strict=True):
        assert (1 / left - 1) ** 0.5 == pytest.approx(sigma, rel=1e-3) if sigma < 1e9 else left == 0
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        record = NoiseSchedule.from_json(file.metadata()["sdxl_fixes.schedule"])
    assert record.terminal_sigma == pytest.approx(max(sigmas), rel=1e-6)


def test_the_saved_scheduler_starts_where_training_ends(run, tmp_path):  # report 3.7
    for how, spacing in (("unpatched", "leading"), ("module", "trailing")):
        run(how, "t2i", *V, steps=1, folder=how)
        config = json.loads((tmp_path / how / "out" / "scheduler" / "scheduler_config.json").read_text())
        assert config["prediction_type"] == "v_prediction" and config["timestep_spacing"] == spacing


@pytest.mark.parametrize("script", LORA)
def test_lora_files_carry_the_record_and_load(run, tmp_path, script):
    kohya = ("--output_kohya_format",) if script == "dreambooth" else ()
    # the script itself loads the file at its end
    run("module", script, *V, "--zero_terminal_snr", *kohya, steps=1)
    names = [
        "pytorch_lora_weights.safetensors",
        *(["pytorch_lora_weights_kohya.safetensors"] if kohya else []),
    ]
    for name in names:
        with safe_open(tmp_path / "run" / "out" / name, framework="pt") as file:
            assert (
                NoiseSchedule.from_json(file.metadata()["sdxl_fixes.schedule"])
                == NoiseSchedule.sdxl().zero_terminal_snr()
            )
            assert not {"v_pred", "ztsnr"} & set(file.keys())


@pytest.mark.parametrize("script", ("t2i_lora", "dreambooth", "t2i"))
@pytest.mark.parametrize("case", ("v ztsnr by its scheduler", "epsilon 300 by its record"))
def test_the_base_alone_trains_as_its_flags_do(run, made, tmp_path, script, case):
    """To the bit, with a scheduler config that says nothing beside a record, and the saved file says it."""
    flags, base, other = (*V, "--zero_terminal_snr"), "base-v-ztsnr", "base-v-ztsnr"
    schedule = NoiseSchedule.sdxl().zero_terminal_snr()
    if case == "epsilon 300 by its record":
        flags, base, other = (
            ("--terminal_sigma", "300", "--terminal_sigma_method", "beta_end"),
            "base-300",
            "base",
        )
        schedule = NoiseSchedule.sdxl().with_terminal_sigma(300, "beta_end")
        shutil.copytree(made / "base", made / base, dirs_exist_ok=True)
        unet = made / base / "unet" / "diffusion_pytorch_model.safetensors"
        stamp_file(unet, Sampling(schedule, "epsilon"), force=True)
    form = ("--loss_type", "huber", "--snr_gamma", "5", "--min_snr_floor", "--ip_noise_gamma", "0.1")
    process, matched = run("module", script, "--match_base", *form, base=base, folder="a", steps=2)
    assert f"by its {'record' if base == 'base-300' else 'scheduler config'}" in process.stderr
    assert matched == run("module", script, *flags, *form, base=other, folder="b", steps=2)[1]
    out = tmp_path / "a" / "out"
    saved = out / ("unet/diffusion_pytorch_model" if script == "t2i" else "pytorch_lora_weights")
    with safe_open(saved.with_suffix(".safetensors"), framework="pt") as file:
        assert NoiseSchedule.from_json(file.metadata()["sdxl_fixes.schedule"]) == schedule
    if script == "t2i":
        assert read_sampling(out / "scheduler" / "scheduler_config.json").schedule == schedule


def test_min_snr_at_zero_snr_upstream_nan_and_0_here_right(run):  # report 3.1, 3.2
    for base, bad in (("base-ztsnr", "nan"), ("base-v-ztsnr", "0.0")):
        flags = ("--snr_gamma", "5", *TERMINAL_ONLY)
        assert {
            str(loss)
            for loss in run("unpatched", "t2i", *flags, base=base, folder=base, steps=2)[1]["losses"]
        } == {bad}
        more = dict(base=base, folder=base, steps=2, tensors=True)
        trace = run("module", "t2i", *flags, "--min_snr_floor", **more)[1]
        assert right(trace, alphas_cumprod(zero_snr=True), v="-v" in base, min_snr=5.0, floor=True)


def test_min_snr_in_dreambooth_upstream_nan_and_crash_here_right(run, made):  # report 3.3, 3.4
    _, upstream = run("unpatched", "dreambooth", "--snr_gamma", "5", base="base-v-ztsnr-2")
    assert "nan" in {str(loss) for loss in upstream["losses"]}
    flags = ("--snr_gamma", "5", "--min_snr_floor")
    trace = run("module", "dreambooth", *flags, base="base-v-ztsnr-2", tensors=True)[1]
    assert right(trace, alphas_cumprod(zero_snr=True, count=2), v=True, min_snr=5.0, floor=True)
    prior = (
        "--snr_gamma",
        "5",
        "--with_prior_preservation",
        "--class_data_dir",
        str(made / "plain"),
        "--class_prompt",
        "cat",
    )
    process, _ = run("unpatched", "dreambooth", *prior, "--num_class_images", "6", check=False)
    assert process.returncode != 0 and "must match the size of tensor b" in process.stderr
    trace = run("module", "dreambooth", *prior, "--num_class_images", "6", tensors=True)[1]
    assert right(trace, min_snr=5.0, halves=True)


def shown(trace):
    """Distinct crops by original size."""
    crops = {}
    for ids in (ids for step in trace["time_ids"] for ids in step):
        crops.setdefault(tuple(ids[:2]), set()).add(tuple(ids[2:4]))
    return crops


def test_crop_coordinates_stay_those_of_the_cached_latents(run):  # report 3.5; two images of each shape
    upstream = shown(run("unpatched", "t2i", steps=12, folder="a")[1])
    fixed = shown(run("module", "t2i", "--true_crop_coordinates", steps=12, folder="b")[1])
    assert len(upstream[(96, 160)]) > 2 and len(upstream[(160, 96)]) > 2
    assert len(fixed[(96, 160)]) <= 2 and len(fixed[(160, 96)]) <= 2 and fixed[(96, 160)] != {(0, 0)}


def test_caches_are_keyed_by_the_encoders_and_cold_runs_are_warm_runs(run, made, tmp_path):  # report 3.8
    for how, flags in (("unpatched", ()), ("module", ("--checked_caches",))):
        model = tmp_path / f"{how}-model"
        shutil.copytree(made / "base", model)
        arguments = (how, "t2i", *flags, "--pretrained_model_name_or_path", str(model))
        cold, warm = (run(*arguments, folder=how)[1] for _ in range(2))
        assert (cold == warm) == (how == "module")
        encoder = model / "text_encoder" / "model.safetensors"
        weights = {
            name: -tensor if tensor.is_floating_point() else tensor
            for name, tensor in load_file(encoder).items()
        }
        save_file(weights, encoder, metadata={"format": "pt"})
        # upstream goes on with the old encoder's embeddings
        assert (run(*arguments, folder=how)[1] == warm) == (how == "unpatched")


def test_any_caption_column_trains(run, made):  # report 3.11
    flags = ("--train_data_dir", str(made / "captions"), "--caption_column", "caption")
    process, _ = run("unpatched", "t2i", *flags, check=False, folder="a")
    assert process.returncode != 0 and "Column name ['text'] not in the dataset" in process.stderr
    # the same images and captions in upstream's own column, embedded by the same cached map
    own = run("module", "t2i", "--checked_caches", folder="c")[1]
    assert run("module", "t2i", *flags, folder="b")[1] == own


# report 3.14: the pairs are those of a run without the cache
def test_advanced_cached_latents_are_not_of_other_images(run):
    plain = run("unpatched", "advanced", folder="a")[1]["losses"]
    assert run("unpatched", "advanced", "--cache_latents", folder="b")[1]["losses"] != plain
    assert run("module", "advanced", "--cache_latents", folder="c")[1]["losses"] == plain


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ("instruct", "inversion")])
# report 3.10; one of six captions has 214 tokens
def test_long_captions_reach_the_unet_in_77n_tokens(run, script):
    _, trace = run(
        "module", script, "--max_token_length", "225", *PLAIN.get(script, ()), steps=3, tensors=True
    )
    assert sorted(set(trace["tokens"])) == [77, 231]  # an epoch is three batches
    assert right(trace, rel=REL.get(script, 2e-5))
    process, trace = run("module", script, "--max_token_length", "150", steps=3)
    assert sorted(set(trace["tokens"])) == [77, 154]
    assert "captions longer than --max_token_length 150, and cut there, so far:" in process.stderr
    assert "the longest has 214 tokens" in process.stderr


@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "controlnet", "adapter", "lpl"])
def test_chunk_buckets_keep_long_captions_to_themselves(run, script):
    """Six captions, one of three chunks: a batch of two pairs it with another, in every epoch; the other
    batches have one chunk."""
    flags = ("--max_token_length", "225", "--chunk_buckets", *PLAIN.get(script, ()))
    process, trace = run("module", script, *flags, steps=6, tensors=True)
    assert sorted(trace["tokens"]) == [77] * 4 + [231] * 2 and right(trace, rel=REL.get(script, 2e-5))
    assert "captions of equally many chunks to a batch" in process.stderr


def test_chunk_buckets_in_two_processes(run):
    flags = ("--max_token_length", "225", "--chunk_buckets")
    _, trace = run("module", "t2i", *flags, launcher=TWO, tensors=True)
    assert right(trace) and len(trace["losses"]) == 3


def test_chunk_buckets_where_there_is_nothing_to_bucket(run):
    for script, flags, said in (
        ("t2i", (), "--chunk_buckets needs --max_token_length 150, 225"),
        ("dreambooth", ("--max_token_length", "225"), "--chunk_buckets does not fit a DreamBooth script"),
    ):
        process, _ = run("module", script, "--chunk_buckets", *flags, check=False)
        last = process.stderr.strip().splitlines()[-1]
        assert (
            process.returncode != 0
            and last.startswith(f"sdxl-fixes: {said}")
            and "Traceback" not in process.stderr
        )


def test_edm_style_training_refuses_what_has_no_place_there(run):
    for flags in (("--loss_type", "huber"), ("--snr_gamma", "5")):
        for more, base in ((("--do_edm_style_training",), "base"), ((), "base-edm")):
            process, _ = run("module", "dreambooth", *flags, *more, base=base, check=False)
            last = process.stderr.strip().splitlines()[-1]
            assert (
                process.returncode != 0
                and last.startswith("sdxl-fixes: EDM-style training")
                and "Traceback" not in process.stderr
            )
    flags = ("--do_edm_style_training", "--terminal_sigma", "300")
    trace = run("module", "dreambooth", *flags, tensors=True)[1]
    # of the denoised image, weighted by 1 / sigma^2: that of the noise
    assert right(trace, rel=1e-3)


@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "dreambooth"])
def test_two_processes(run, script):
    assert (
        run("module", script, launcher=TWO, folder="a")[1]
        == run("unpatched", script, launcher=TWO, folder="b")[1]
    )
    _, trace = run("module", script, *FIXES, launcher=TWO, folder="c", tensors=True)
    assert right_with_fixes(trace) and len(trace["losses"]) == 3


@pytest.mark.parametrize("script", ["t2i", "dreambooth", "controlnet"])
def test_resume(run, script, tmp_path):
    again = ("--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")
    traces = []
    for how in ("unpatched", "module"):
        run(how, script, "--checkpointing_steps", "2", folder=how)
        traces.append(run(how, script, *again, steps=4, folder=how)[1])
    assert traces[0] == traces[1]
    first = run("module", script, *FIXES, "--checkpointing_steps", "2", folder="fixed")[1]
    resumed = run("module", script, *FIXES, *again, steps=4, folder="fixed")[1]
    # the third stratified draw, as in the uninterrupted run
    assert resumed["timesteps"][0] == first["timesteps"][2]
    other = run(
        "module", script, *FIXES, *again, "--terminal_sigma", "100", steps=6, folder="fixed", check=False
    )[0]
    assert "resume with the flags that it was started with" in other.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "dreambooth", "advanced"])
def test_bf16_with_every_fix(run, script):
    flags = ("--float32_noising", "--mixed_precision", "bf16")
    assert right_with_fixes(run("module", script, *FIXES, *flags, tensors=True)[1])
