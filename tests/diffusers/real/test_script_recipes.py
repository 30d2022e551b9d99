"""examples/recipes with diffusers' real scripts: read by their own parsers, and trained for two steps on the
tiny SDXL. Set DIFFUSERS_EXAMPLES to run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import run_script as runner
from closed_form import alphas_cumprod, flow_alphas_cumprod, flow_rows

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.skipif(
        "DIFFUSERS_EXAMPLES" not in os.environ,
        reason="set DIFFUSERS_EXAMPLES to the examples folder of a huggingface/diffusers checkout (0.32 to "
        "main) to run",
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runner.assets(tmp_path_factory.mktemp("assets") / "made")


def given(arguments):
    """--name value ... as a dict; True for a flag without a value."""
    found, name = {}, ""
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:]
            found[name] = True
        else:
            found[name] = argument
    return found


@pytest.mark.parametrize("recipe", recipes.DIFFUSERS)
def test_the_script_reads_every_flag_as_the_recipe_means_it(recipe, made, tmp_path):
    _, _, flags = split(recipes.command(recipe, tmp_path))
    script = Path(os.environ["DIFFUSERS_EXAMPLES"]).resolve() / "text_to_image" / recipes.DIFFUSERS[recipe]
    base = ("--pretrained_model_name_or_path", str(made / "base"))  # its scheduler config is SDXL's own
    process = subprocess.run(
        [sys.executable, str(HERE / "parse_recipe.py"), str(script), *flags, *base],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    read, wanted = json.loads(process.stdout.splitlines()[-1]), given(flags)
    ours = {
        **read["args"],
        **{
            "min_snr_gamma" if n == "snr_gamma" else n: v
            for n, v in read["settings"].items()
            if v is not None
        },
    }
    for name, value in wanted.items():
        if name in ("pretrained_model_name_or_path", "snr_gamma"):
            continue
        assert (
            ours[name] is True
            if value is True
            else str(ours[name]) == value or float(ours[name]) == float(value)
        ), name
    gamma = float(wanted["snr_gamma"]) if "snr_gamma" in wanted else None
    assert read["settings"]["min_snr_gamma"] == gamma and read["args"]["snr_gamma"] is None
    predicts = {"epsilon": "epsilon", "big_flow": "flow_prediction"}.get(recipe, "v_prediction")
    assert read["prediction_type"] == predicts
    assert (read["terminal_snr"] == 0) == (recipe != "epsilon")


def split(arguments):
    """(accelerate's arguments, script, the script's) of a launch."""
    launch = arguments.index("-m")
    assert arguments[0] == "launch" and arguments[launch + 1] == "sdxl_fixes.diffusers"
    return arguments[:launch], arguments[launch + 2], arguments[launch + 3 :]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.DIFFUSERS)
def test_the_recipe_trains(recipe, made, tmp_path):
    """Two steps, sizes overridden: tiny model, 64 pixels, batches of 2, no accumulation, and torch's own
    AdamW."""
    name = {"train_text_to_image_sdxl.py": "t2i", "train_text_to_image_lora_sdxl.py": "t2i_lora"}[
        recipes.DIFFUSERS[recipe]
    ]
    _, _, flags = split(recipes.command(recipe, tmp_path))
    overridden = (
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "train_data_dir",
        "output_dir",
        "seed",
    )
    for flag in (*overridden, "pretrained_model_name_or_path"):
        if f"--{flag}" in flags:
            at = flags.index(f"--{flag}")
            del flags[at : at + 2]
    flags = [flag for flag in flags if flag not in ("--use_8bit_adam", "--allow_tf32")]
    _, trace = runner.run_script("module", name, made, tmp_path / "run", *flags, steps=2, tensors=True)
    zero, floor = "--zero_terminal_snr" in flags, "--min_snr_floor" in flags
    form, abar = dict(v="--prediction_type" in flags, min_snr=5.0, floor=floor), alphas_cumprod(zero)
    if recipe == "big_flow":
        form, abar = dict(v=False, flow=True), flow_alphas_cumprod()
        trace["timesteps"] = [flow_rows(step).tolist() for step in trace["timesteps"]]
    expected = runner.expected(trace, abar, **form)
    assert len(trace["losses"]) == 2 and trace["losses"] == pytest.approx(expected, rel=2e-5)
    assert [sorted(t // 500 for t in step) for step in trace["timesteps"]] == [[0, 1]] * 2  # stratified
