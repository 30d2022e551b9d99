"""Optimizers for weights in 16 bits in the real finetuning, by kohya's own --optimizer_type. Set SD_SCRIPTS;
needs torchao and torch-optimi."""

import pytest
import torch
from closed_form import average
from safetensors.torch import load_file
from test_real_heldout import EACH, held, printed  # noqa: F401  (a fixture)
from test_real_resume import EXACT, last_state, tensors
from test_real_trainer import assets, pytestmark, train  # noqa: F401  (fixtures)

from sdxl_fixes.kohya.optimizers import RELEASED

FINETUNING = "sdxl_train.py"
BRAIN = ("--mixed_precision", "bf16", "--full_bf16", "--max_grad_norm", "0", "--gradient_checkpointing")
WARM = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "2")
EIGHT, STOCHASTIC = "torchao.optim.AdamW8bit", "bf16_stochastic_round=True"


def by(name, *options, release=False):
    """kohya's flags for an optimizer."""
    if release:
        name, options = RELEASED, (f"name={name!r}", *options)
    return ("--optimizer_type", name, *(("--optimizer_args", *options) if options else ()))


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """torchao compiles a step for every shape, for minutes on a CPU; the numbers are the same without."""
    pytest.importorskip("torchao")
    pytest.importorskip("optimi")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def test_torchao_s_adamw_is_torch_s_in_float32(train):  # noqa: F811
    right = train("unpatched", FINETUNING, *by("torch.optim.AdamW", "weight_decay=0.0"))[1]["losses"]
    assert train("module", FINETUNING, *by("torchao.optim._AdamW"))[1]["losses"] == pytest.approx(
        right, rel=1e-5
    )


def test_released_is_the_optimizer_alone(train, tmp_path):  # noqa: F811
    file, found = tmp_path / "out" / "out.safetensors", []
    for release in (False, True):
        flags = (*BRAIN, *by(EIGHT, "weight_decay=0.01", release=release), *WARM)
        found.append((train("module", FINETUNING, *flags)[1], tensors(file)))
    assert found[0] == found[1] and len(set(found[0][0]["losses"])) == 3


def test_rounded_stochastically_weights_go_where_float32_s_go(train, assets, tmp_path):  # noqa: F811
    """Weights so large that a step to nearest is lost, against the same steps of float32 weights: they move
    as far on average (the gradients of 16-bit weights are slightly others), or not at all."""
    start, rate, moved = load_file(assets / "model.safetensors"), 1e-5, {}
    for key, flags in {
        "float32": ("--mixed_precision", "bf16", *by("AdamW", "weight_decay=0.0")),
        "nearest": (*BRAIN, *by("AdamW", "weight_decay=0.0")),
        "stochastic": (*BRAIN, *by(EIGHT, STOCHASTIC, release=True)),
    }.items():
        train("module", FINETUNING, *flags, "--learning_rate", str(rate))
        trained = load_file(tmp_path / "out" / "out.safetensors")
        moved[key] = {
            name: (trained[name].double() - (start[name] if key == "float32" else start[name].bfloat16()))
            for name in start
            if name.startswith("model.diffusion_model.")
        }
    large = {name: start[name].abs() > 4 * 512 * rate for name in moved["float32"]}
    float32, nearest, stochastic = (
        torch.cat([moved[key][name][large[name]] for name in large]) for key in moved
    )
    assert len(float32) > 10**5 and float32.count_nonzero() > 0.9 * len(float32)
    assert nearest.count_nonzero() == 0
    slope = float((stochastic * float32).sum() / float32.square().sum())
    assert 0.7 < slope < 1.1, slope


@pytest.mark.parametrize(
    "flags",
    [
        (*BRAIN, *by(EIGHT, STOCHASTIC, release=True)),
        (*BRAIN, *by(EIGHT, STOCHASTIC), "--gradient_accumulation_steps", "2"),
        (*BRAIN, *by("optimi.AdamW")),
    ],
    ids=["released", "torchao", "optimi"],
)
def test_killed_and_resumed_is_the_uninterrupted_run(train, held, tmp_path, monkeypatch, flags):  # noqa: F811
    """With the held-out loss and the average of the weights beside it: losses, printed numbers, models and
    the states of the optimizer, bit for bit; and the average is that of the weights after every step."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    watched = ("--heldout_steps", "1", "--heldout_dir", str(held), "--ema_decay", "0.25", "--ema_evaluated")
    flags = (*EXACT, *flags, *watched, *EACH, "--stratified_timesteps", "--learning_rate", "1e-3")
    process, right = train("module", FINETUNING, *flags, steps=4)
    numbers, batches = printed(process), len(right["losses"]) // 4
    check_average(out)
    out.rename(whole)
    monkeypatch.setenv("KILL_AT", str(3 * batches))  # of step 3, so that two are left
    assert train("module", FINETUNING, *flags, steps=4, check=False)[0].returncode == -9
    monkeypatch.delenv("KILL_AT")
    process, resumed = train("module", FINETUNING, *flags, "--resume", str(last_state(out)), steps=4)
    assert resumed["losses"] == right["losses"][2 * batches :]
    assert list(numbers) == [1, 2, 3, 4] and printed(process) == {step: numbers[step] for step in (3, 4)}
    for name in ("out.safetensors", "out-ema.safetensors"):
        assert tensors(out / name) == tensors(whole / name)
    states = [
        torch.load(folder / "out-step00000004-state" / "optimizer.bin", weights_only=False)["state"]
        for folder in (out, whole)
    ]
    assert [*states[0]] == [*states[1]]
    for mine, theirs in zip(*(each.values() for each in states), strict=True):
        assert [*mine] == [*theirs] and all(same(mine[key], theirs[key]) for key in mine)


def check_average(out):
    """The average in bfloat16 is the closed form over the models of every step, rounded."""
    files = sorted(file for file in out.glob("out-step*.safetensors") if "-ema" not in file.name)
    steps, found = [load_file(file) for file in files], load_file(out / "out-ema.safetensors")
    trained = [name for name in found if name.startswith("model.diffusion_model.")]
    assert len(steps) == 4 and len(trained) > 100
    other = 0
    for name in trained:
        right = average([weights[name] for weights in steps], 0.25)
        assert steps[0][name].dtype == torch.bfloat16
        assert ((found[name].double() - right).abs() <= 2**-8 * right.abs() + 1e-9).all()
        other += int((found[name] != steps[-1][name]).sum())
    assert other > 10**5


def same(first, second):
    """Equal to the last bit, in what torchao's states hold, too."""
    if hasattr(first, "__tensor_flatten__"):
        inner = first.__tensor_flatten__()[0]
        return all(same(getattr(first, name), getattr(second, name)) for name in inner)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
