"""examples/recipes with the real sd-scripts: read by its own parser, and trained for two steps on the tiny
SDXL. Set SD_SCRIPTS to run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkouts
import pytest
import recipes
import runs
from closed_form import alphas_cumprod, flow_alphas_cumprod, flow_rows

HERE = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.kohya,
    pytest.mark.skipif(not checkouts.named(), reason=checkouts.SKIP),
]


@pytest.mark.parametrize("recipe", recipes.KOHYA)
def test_kohya_reads_every_key_as_the_recipe_means_it(recipe, tmp_path):
    command = [
        sys.executable,
        str(HERE / "parse_recipe.py"),
        recipes.KOHYA[recipe],
        str(recipes.FOLDER / f"{recipe}.toml"),
    ]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    read = json.loads(process.stdout.splitlines()[-1])
    assert read["unknown"] == [] and read["refused"] == []
    assert {key: read["args"][key] for key in recipes.keys(recipe)} == recipes.keys(recipe)
    data = recipes.data(recipe)
    assert [dataset["batch_size"] for dataset in read["datasets"]] == [
        dataset["batch_size"] for dataset in data["datasets"]
    ]
    assert [dataset["resolution"] for dataset in read["datasets"]] == [[1024, 1024]]
    assert [subset["caption_dropout_rate"] for subset in read["subsets"]] == [
        data["general"].get("caption_dropout_rate", 0.0)
    ]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    subprocess.run([sys.executable, str(HERE / "assets.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.KOHYA)
def test_the_recipe_trains(recipe, assets, tmp_path):
    """Two steps, sizes overridden: tiny model, 128 pixels, batches of 2, no accumulation; everything else as
    the files say."""
    data = (recipes.FOLDER / recipes.keys(recipe)["dataset_config"]).read_text()
    sizes = {
        "= 1024": "= 128",
        "_reso = 512": "_reso = 64",
        "_reso = 2048": "_reso = 256",
        "steps = 64": "steps = 32",
    }
    for there, here in {
        **sizes,
        'image_dir = "train"': f"image_dir = {json.dumps(str(assets / 'images'))}",
    }.items():
        assert data.count(there) == 1
        data = data.replace(there, here)
    (tmp_path / "data.toml").write_text(
        "\n".join("batch_size = 2" if line.startswith("batch_size") else line for line in data.splitlines())
    )
    changed = {
        "config_file": recipes.FOLDER / f"{recipe}.toml",
        "dataset_config": tmp_path / "data.toml",
        "pretrained_model_name_or_path": assets / "model.safetensors",
        "tokenizer_cache_dir": assets / "tokenizers",
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "output_dir": tmp_path / "out",
    }
    command = [
        sys.executable,
        str(HERE / "launch.py"),
        "module",
        str(tmp_path / "trace.json"),
        recipes.KOHYA[recipe],
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": "",
        "TRACE_TENSORS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    process = subprocess.run(
        [*command, *(str(x) for name, value in changed.items() for x in (f"--{name}", value))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    trace = json.loads((tmp_path / "trace.json").read_text())
    keys = recipes.keys(recipe)
    zero, floor = bool(keys.get("zero_terminal_snr")), bool(keys.get("min_snr_floor"))
    form = dict(v=bool(keys.get("v_parameterization")), min_snr=keys.get("min_snr_gamma"), floor=floor)
    flow, abar = "flow_shift" in keys, alphas_cumprod(zero)
    if flow:
        form, abar = dict(flow=True), flow_alphas_cumprod(keys["flow_shift"])
        told = trace["timesteps"]
        trace["timesteps"] = [flow_rows(step, keys["flow_shift"]).tolist() for step in told]
    expected = runs.expected(trace, abar, **form)
    assert len(trace["losses"]) == 2 and trace["losses"] == pytest.approx(expected, rel=2e-5)
    assert (trace["alphas_cumprod_999"] == 0) == (zero or flow)
    # of cached prompts, leftovers are smaller batches
    pairs = [step for step in trace["timesteps"] if len(step) == 2]
    assert pairs and [sorted(t // 500 for t in step) for step in pairs] == [[0, 1]] * len(pairs)  # stratified
    assert (tmp_path / "out" / f"{recipe}.safetensors").exists()


@pytest.mark.slow
def test_the_pages_estimates_start_from_what_the_real_unet_holds_and_computes():
    process = subprocess.run([sys.executable, str(HERE / "count_unet.py")], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert [found[name] for name in ("unet", "text_encoders", "lora_32", "adafactor")] == [
        *(recipes.UNET, recipes.TEXT_ENCODERS, recipes.LORA_32, recipes.ADAFACTOR)
    ]
    assert [found[name] / 1e9 for name in ("whole", "kept", "recomputed")] == pytest.approx(
        [recipes.WHOLE, recipes.KEPT, recipes.RECOMPUTED], rel=0.01
    )
    forward, backward = found["forward"] / 1e12, found["backward"] / 1e12
    assert forward == pytest.approx(recipes.FORWARD, abs=0.01) and forward + backward == pytest.approx(
        recipes.FULL, abs=0.05
    )
    assert 2 * forward + (backward - forward) / 2 == pytest.approx(recipes.LORA, abs=0.05)
