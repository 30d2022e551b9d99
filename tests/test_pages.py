"""What the pages name exists, what they tell you to type parses, and what they show runs."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import made_up_trainer
import pytest
import torch
from models import model
from PIL import Image

import sdxl_fixes.diffusers
from sdxl_fixes import NoiseSchedule
from sdxl_fixes.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
ROOMS = "sdxl_fixes|integrations|tests|benchmarks|examples|docs|constraints"
# flags that pages name and that are not ours
TRAINERS = """
    accelerate launch: dynamo_backend gradient_accumulation_steps multi_gpu num_processes
    sd-scripts: cache_latents_to_disk cache_text_encoder_outputs_to_disk config_file dataset_class
        dataset_config deepspeed full_bf16 fused_backward_pass fused_optimizer_groups gradient_checkpointing
        huggingface_repo_id mem_eff_attn optimizer_args scale_weight_norms xformers
        initial_epoch initial_step logging_dir masked_loss max_grad_norm max_timestep max_train_epochs
        min_timestep network_train_unet_only network_weights noise_offset optimizer_type prior_loss_weight
        resume sample_every_n_steps save_every_n_steps save_last_n_steps save_model_as save_state
        skip_until_initial_step torch_compile v_parameterization validation_seed validation_split
        weighted_captions weighting_scheme
    diffusers' scripts: cache_latents caption_column clip_skip do_edm_style_training image_column lr_scheduler
        lr_warmup_steps max_train_steps mixed_precision output_dir output_kohya_format resolution use_ema
        proportion_empty_prompts resume_from_checkpoint timestep_bias_strategy train_batch_size
        train_text_encoder_ti
    benchmarks: dollars gpus images jobs only pages seeds train
    mkdocs: strict
    cp: reflink
"""


def words(page):
    return " ".join(page.read_text(encoding="utf-8").split())


class Parsed(Exception):
    """The command line was understood; nothing was run."""


@pytest.fixture
def parse(monkeypatch):
    """Parses an ``sdxl-fixes`` command line with the real parser, no further: raises Parsed or
    SystemExit."""
    genuine = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        genuine(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return main


def understood(parse, arguments):
    try:
        parse(arguments)
    except Parsed:
        return True
    except SystemExit as error:
        return error.code == 0
    return False


def commands(page):
    """(command line, whether it is whole): lines of code blocks are, inline ones may name a command alone."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if match := re.match(r"(?:\S+/)?sdxl-fixes ([^#]*)", line.strip()):
            yield match[1], True
    for inline in re.findall(r"`sdxl-fixes ([^`]*)`", words(page)):
        yield inline, False


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_of_ours_parse(page, parse, capsys):
    for line, whole in commands(page):
        given = shlex.split(line)
        tries = [given] if whole else [given, [*given, "PATH"]]
        if not whole and not any(word.startswith("-") for word in given):
            tries.append([*given, "--help"])  # a command's name
        assert any(understood(parse, arguments) for arguments in tries), line


def test_a_command_that_does_not_exist_is_seen(parse, capsys):
    assert not understood(parse, ["stemp", "FILE"]) and not understood(parse, ["stamp", "FILE", "--nonsense"])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The flags that --help of our commands and of both launchers lists."""
    printed = io.StringIO()
    commands = re.findall(r"{([\w,]+)}", helped(main, ["--help"]))[0].split(",")
    with contextlib.redirect_stdout(printed):
        for command in commands:
            print(helped(main, [command, "--help"]))
        trainer = made_up_trainer.build(tmp_path_factory.mktemp("trainer"))
        print(helped(made_up_trainer.run, trainer, "sdxl_train.py", "--help"))
        script = argparse.ArgumentParser()
        script.add_argument("--pretrained_model_name_or_path")  # by which the adapter knows a script's parser
        sdxl_fixes.diffusers.install()
        try:
            print(helped(script.parse_args, ["--help"]))
        finally:
            sdxl_fixes.diffusers.uninstall()
    found = re.findall(r"--(\w+(?:-\w+)*)", printed.getvalue())
    return {name.replace("-", "_") for name in found}  # --in-place is --in_place


def helped(program, *arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        program(*arguments)
    assert ended.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_are_ours_or_the_trainers_own(page, ours):
    theirs = set(re.findall(r"\b[a-z_]\w*\b(?!:)", TRAINERS))
    named = re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", page.read_text(encoding="utf-8"))
    assert {name.replace("-", "_") for name in named} <= ours | theirs


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_exist(page):
    for name in re.findall(rf"(?<![\w./-])((?:{ROOMS})/[\w./-]*\w)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_in_our_modules_exist(page):
    for name in set(re.findall(r"`(sdxl_fixes(?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        if name not in (
            "sdxl_fixes.schedule",
            "sdxl_fixes.room",
            "sdxl_fixes.removed.v_pred",
            "sdxl_fixes.json",
        ):
            parts = name.split(".")
            found = importlib.import_module("sdxl_fixes")
            for i, part in enumerate(parts[1:], 2):
                if not hasattr(found, part):
                    try:
                        importlib.import_module(".".join(parts[:i]))
                    except ModuleNotFoundError as error:
                        assert error.name == "torchao", error  # an extra: the module is there
                        break
                found = getattr(found, part)


class Pipe:
    """Stands for a diffusers pipeline: a scheduler, a network, and pictures."""

    def __init__(self):
        from diffusers import EulerDiscreteScheduler

        self.scheduler, self.unet = EulerDiscreteScheduler.from_config(SDXL), torch.nn.Identity()

    @classmethod
    def from_single_file(cls, path):
        assert Path(path).is_file()
        return cls()

    def __call__(self, prompt, **kwargs):
        self.scheduler.set_timesteps(25)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])


SDXL = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
}


def unet(noisy, timesteps, *_):
    return SimpleNamespace(sample=torch.zeros_like(noisy))


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_every_page_with_python_is_run_here():
    found = {
        name for name, page in zip(IDS, PAGES, strict=True) if "```python" in page.read_text(encoding="utf-8")
    }
    assert found == {
        "README.md",
        "docs/buckets.md",
        "docs/generate.md",
        "docs/loading.md",
        "docs/validation.md",
    }


@pytest.mark.parametrize("page", ["README.md", "docs/generate.md"])
def test_python_in_the_page_runs(page):
    names = {"pipe": Pipe(), "unet": unet, "latents": torch.randn(2, 4, 8, 8)}
    for code in snippets(page):
        exec(code, names)
    assert names["pipe"].scheduler.config.prediction_type == "v_prediction"
    assert names["schedule"] == NoiseSchedule.sdxl().zero_terminal_snr()
    assert page != "README.md" or names["loss"].isfinite()


def test_python_in_the_page_on_validation_runs(tmp_path, monkeypatch):
    from accelerate import Accelerator

    from sdxl_fixes import Objective

    monkeypatch.chdir(tmp_path)
    names = {
        "objective": Objective(NoiseSchedule.sdxl()),
        "predict": lambda noisy, timesteps, image: torch.zeros_like(noisy),
        "latents": torch.randn(3, 4, 8, 8),
        "unet": torch.nn.Identity(),
        "accelerator": Accelerator(cpu=True),
        "step": 7,
        "pipe": Pipe(),
    }
    for code in snippets("docs/validation.md"):
        exec(code, names)
    assert names["numbers"]["loss"] == pytest.approx(
        1, abs=0.1
    )  # of predicting nothing where noise is the target
    assert "step 7" in (tmp_path / "samples.html").read_text()


def test_python_in_the_page_on_loading_runs_after_a_stamp(tmp_path, monkeypatch, capsys):
    from diffusers import EulerDiscreteScheduler

    monkeypatch.chdir(tmp_path)
    model(tmp_path / "model.safetensors")
    assert (
        main(["stamp", "model.safetensors", "--prediction_type", "v_prediction", "--zero_terminal_snr"]) == 0
    )
    names = {"StableDiffusionXLPipeline": Pipe, "EulerDiscreteScheduler": EulerDiscreteScheduler}
    (code,) = snippets("docs/loading.md")
    exec(code, names)
    config = names["pipe"].scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr


def test_python_in_the_page_on_buckets_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from alphabet import write as make_tokenizer
    from tiny_assets import text_config
    from torch.utils.data import DataLoader

    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = text_config(8, 2)
    captions = ["a cat " * n for n in (1, 5, 30, 60) * 8]
    names = {
        "Path": Path,
        "DataLoader": DataLoader,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "captions": captions,
        "sizes": [(1024, 1024), (512, 1024)] * 16,
        "dataset": [{"captions": caption} for caption in captions],
        "text_encoder": transformers.CLIPTextModel(text),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(text),
        "rank": 0,
        "world_size": 1,
        "epochs": 1,
    }
    (code,) = snippets("docs/buckets.md")
    exec(code.replace("num_workers=8", "num_workers=0"), names)
    assert names["context"].shape[1] % 77 == 0 and names["context"].shape[2] == 16


def test_the_readmes_toml_trains_and_says_what_the_page_says(tmp_path, capsys, monkeypatch):
    (toml,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    flags = [
        f"--{key}" if value == "true" else f"--{key}={value}"
        for key, value in re.findall(r"(\w+) = (\w+)", toml)
    ]
    made_up_trainer.run(made_up_trainer.build(tmp_path), "sdxl_train.py", *flags)
    said = capsys.readouterr().err.splitlines()
    page = (ROOT / "docs/kohya.md").read_text(encoding="utf-8").splitlines()
    report = [line for line in page if re.match(r"  (objective|weights|data|file) ", line)]
    assert len(report) == 4
    for line in report:
        assert line in said


def test_half_of_the_steps_start_where_the_page_says():
    text = words(ROOT / "docs" / "generate.md")
    schedule, ends = NoiseSchedule.sdxl().zero_terminal_snr(), []
    for sampler, spacing in (("dpmpp_2m", None), ("euler", None), ("dpmpp_2m", "trailing")):
        starts = []
        for steps in range(20, 51):
            scheduler = schedule.scheduler(sampler, "v_prediction", timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            first = scheduler.timesteps[steps - int(steps * 0.5)]  # as diffusers' pipelines count
            starts.append(schedule.sigmas[int(first)])
        ends += [min(starts), max(starts)]
    said = (
        "`dpmpp_2m` starts at sigma {:.0f} to {:.0f}, `euler` at {:.1f} to {:.1f}, with trailing steps both "
        "at {:.1f} to {:.1f}"
    )
    assert said.format(*ends) in text


def test_the_samplers_table_is_the_measured_one():
    page = (ROOT / "docs" / "schedulers.md").read_text()
    measured = page.split("### Zero terminal SNR, 25 steps")[1].split("###")[0]
    cells = {name: line.split("|") for name, line in re.findall(r"^\| ([^|*]+?) \|(.*)\|$", measured, re.M)}
    rows = re.findall(
        r"^\| `([^|]*?)`[^|]*" + r"\| ([\d.]+) " * 6, (ROOT / "docs" / "generate.md").read_text(), re.M
    )
    assert len(rows) == 6
    for name, *numbers in rows:
        for sampler in name.split("`, `"):
            made = [
                cells[f"{sampler}, {whose}"][i].strip() for i in (0, 1, 3) for whose in ("ours", "diffusers")
            ]
            assert numbers == made, sampler


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 1000
