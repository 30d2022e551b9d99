"""examples/bigasp/train.py: the same steps whoever makes them, their loss by diffusers' own code and closed
forms, what is saved, and that a killed training goes on as if it had not been."""

import collections
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from two_processes import TWO

from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes.model_files.model_file import read_sampling
from sdxl_fixes.prompts import encode

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "bigasp"
PACKAGES = ("pandas", "streaming", "zstandard", "transformers")
NAMES = ("prompt", "latents", "loader", "made", "feed", "network", "settings", "state", "train")
V = (
    "--prediction_type",
    "v_prediction",
    "--zero_terminal_snr",
    "--min_snr_gamma",
    "5",
    "--stratified_timesteps",
)
SMALL = (
    "--precision",
    "fp32",
    "--workers",
    "0",
    "--global_batch",
    "8",
    "--batch_size",
    "4",
    "--warmup",
    "16",
)


@pytest.fixture(scope="module")
def example():
    """The example's modules by name, or a skip where packages are missing."""
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package}: see examples/bigasp/requirements.txt")
    sys.path.insert(0, str(EXAMPLE))
    yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    sys.path.remove(str(EXAMPLE))
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(example, tmp_path_factory):
    """Flags of a store of 60 random latents of two sizes, of captions of one chunk to three, and a model."""
    import pandas as pd

    folder, random = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    example.made.model(folder / "model")
    columns = ("caption", "tags", "source", "watermarks")
    rows = [{name: example.made.picture(k, 0)[1][name] for name in columns} for k in range(60)]
    longer = [{**row, "path": f"{k}.png", "score": k % 9 + 1} for k, row in enumerate(rows)]
    for row in longer[:10]:
        row["caption"] *= 4
    for row in longer[25:]:
        row["caption"], row["tags"], row["watermarks"] = "a cat", ["cat", "animal"], []
    pd.DataFrame(longer).to_parquet(folder / "table.parquet")
    sizes = [(8, 8) if k % 3 else (4, 12) for k in range(60)]
    example.latents.write(
        folder / "latents",
        [
            example.latents.Encoded(k, f"{k}.png", 640, 480, 0, k, torch.randn(4, *size, generator=random))
            for k, size in enumerate(sizes)
        ],
    )
    found = {"table": folder / "table.parquet", "latents": folder / "latents", "model": folder / "model"}
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def training(example, data, monkeypatch):
    """training(folder, *flags) trains in this process and returns what it logged of each step."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(folder, *flags):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        monkeypatch.setattr(
            sys, "argv", ["train.py", "--output", str(folder), *data, *SMALL, *map(str, flags)]
        )
        example.train.main()
        return logged(folder)

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def logged(folder):
    """What was logged of each optimizer step, the last word on it."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["samples"]: row for row in rows if "norm" in row}


def last(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(last(folder) / "model.safetensors")


class Killed(BaseException):
    pass


@pytest.fixture
def killed(example, training, monkeypatch):
    """killed(step, folder, *flags) trains until something ends it in an optimizer step."""
    original = example.train.Training.steps

    def run(step, folder, *flags):
        def steps(self):
            for numbers in original(self):
                if self.step == step:
                    raise Killed
                yield numbers

        monkeypatch.setattr(example.train.Training, "steps", steps)
        with pytest.raises(Killed):
            training(folder, *flags)
        monkeypatch.setattr(example.train.Training, "steps", original)

    return run


# ------------------------------------------------------------------ who trains what


@pytest.fixture
def feeds(example, data):
    """feeds(together, planned, alone, world) of all processes, each with an objective of its own."""
    from sdxl_fixes.flags import TrainingFlags

    named = dict(zip(data[::2], data[1::2], strict=True))
    prompts = example.prompt.Prompts(0)
    pictures = example.loader.Pictures(
        Path(named["--table"]), Path(named["--latents"]), named["--model"], prompts
    )

    def make(together=8, planned=4, alone=4, world=1, places=50):
        shares, found = example.feed.Shares(together, planned, alone, world), []
        for rank in range(world):
            flags = TrainingFlags(
                prediction_type="v_prediction", zero_terminal_snr=True, stratified_timesteps=True
            )
            objective = flags.objective(seed=0, accumulation=together // planned)
            found.append(example.feed.Feed(pictures, np.arange(places), objective, shares, rank, seed=0))
        return found

    return make


def dealt(feeds, steps):
    """What all processes get, step by step, without what only fills a batch."""
    found, batches = [], [iter(feed) for feed in feeds]
    for _ in range(steps):
        each = [next(one) for one in batches for _ in range(feeds[0].shares.accumulation)]
        assert all(0 < len(batch) <= feeds[0].shares.alone for batch in each)
        found.append(sorted(asked for batch in each for asked in batch if asked.weight))
    return found


def test_any_processes_and_batch_sizes_make_the_same_steps(feeds):
    whole = dealt(feeds(together=16), 10)
    for alone, world in ((4, 2), (2, 1), (2, 2), (1, 16), (2, 4)):
        assert dealt(feeds(together=16, alone=alone, world=world), 10) == whole
    for step in whole:
        assert math.isclose(sum(asked.weight for asked in step), 1)
    epochs = collections.Counter((asked.epoch, asked.place) for step in whole for asked in step)
    for epoch in range(2):  # every picture once in each
        assert [count for (e, _), count in epochs.items() if e == epoch] == [1] * 50
    assert any({asked.epoch for asked in step} == {0, 1} for step in whole)  # one goes across an epoch's end


def test_a_step_has_a_timestep_of_every_slice(feeds):
    full = [step for step in dealt(feeds(), 20) if len(step) == 8]
    assert len(full) > 8
    for step in full:
        assert sorted(asked.row * 8 // 1000 for asked in step) == [*range(8)]


@pytest.mark.parametrize("after", range(1, 9))  # 50 pictures in batches of 4: epochs end within and between
def test_a_state_goes_on_with_the_same_steps_on_other_processes(feeds, after):
    whole, one = dealt(feeds(), 12), feeds()
    assert dealt(one, after) == whole[:after]
    state = json.loads(json.dumps(one[0].states[after]))
    for alone, world in ((4, 1), (2, 2), (1, 4)):
        others = feeds(alone=alone, world=world)
        for each in others:
            each.load(after, state)
        assert dealt(others, 12 - after) == whole[after:]
    # planned anew: the epochs' pictures, each once
    other = feeds(planned=8, alone=8)
    other[0].load(after, state)
    both = [asked for step in whole[:after] + dealt(other, 12 - after) for asked in step]
    counts = collections.Counter((asked.epoch, asked.place) for asked in both if asked.epoch == 0)
    assert [*counts.values()] == [1] * 50


def test_a_picture_meets_the_same_noise_wherever_it_is_drawn(example, feeds):
    (feed,) = feeds()
    schedule = NoiseSchedule.sdxl().zero_terminal_snr()
    objective = Objective(schedule, "v_prediction")
    first, second = (example.feed.Drawn(feed.pictures, objective, 5) for _ in range(2))
    asked = example.feed.Asked(3, 1, 3, 700, 0.25)
    sample, latents = first[asked], feed.pictures.store[3].latent.double()
    again, other = second[asked], first[asked._replace(epoch=2)]
    assert torch.equal(sample["noise"], again["noise"]) and not torch.equal(sample["noise"], other["noise"])
    alpha = math.sqrt(schedule.alphas_cumprod[700])
    sigma = math.sqrt(1 - schedule.alphas_cumprod[700])
    noise = sample["noise"].double()
    torch.testing.assert_close(sample["noisy"].double(), alpha * latents + sigma * noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample["target"].double(), alpha * noise - sigma * latents, rtol=0, atol=1e-6)
    batch = feed.pictures.collate([sample])
    assert batch["ids"].shape == batch["ids_2"].shape == (1, 3, 77)  # as long as the planned batch's longest


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((2048, 6, 4, 8), "--batch_size 4 does not divide --planned_batch 6"),
        ((2048, 4, 4, 7), "7 process.*, 28"),
    ],
)
def test_a_global_batch_that_cannot_be_shared_out_is_refused(example, flags, sentence):
    assert example.feed.Shares(2048, 4, 4, 8).accumulation == 64
    with pytest.raises(SystemExit, match=sentence):
        example.feed.Shares(*flags)


# ------------------------------------------------------------------ a step


def test_the_learning_rate_is_a_cosine_over_samples(example):
    args = SimpleNamespace(learning_rate=1e-4, warmup=100, samples=1100)
    found = [example.train.rate(seen, args) for seen in (0, 50, 100, 350, 600, 1100, 2000)]
    root = math.sqrt(0.5)
    assert found == pytest.approx([0, 5e-5, 1e-4, 5e-5 * (1 + root), 5e-5, 0, 0], abs=1e-18)


def test_a_step_is_the_mean_loss_of_its_pictures(example, training, feeds, tmp_path):
    """Against diffusers' own encoding of prompts and its pipeline's U-Net, closed forms and autograd."""
    from diffusers import StableDiffusionXLPipeline

    found = training(tmp_path, *V, "--samples", 1, "--max_grad_norm", 1e9)
    ((seen, row),) = found.items()
    (feed,) = feeds(places=60)
    (asked,) = dealt([feed], 1)
    assert len(asked) == seen
    pipe, total = StableDiffusionXLPipeline.from_pretrained(feed.pictures.folder.parent / "model"), 0.0
    pipe.unet.requires_grad_(True)
    schedule = NoiseSchedule.sdxl().zero_terminal_snr()
    alphas = torch.tensor(schedule.alphas_cumprod)
    for each in asked:
        sample = feed.pictures[each.place, each.epoch]
        noise = torch.randn(
            1, *sample["latents"].shape, generator=example.feed.generator(0, 0, each.epoch, each.place)
        )
        alpha, sigma = float(alphas[each.row] ** 0.5), float((1 - alphas[each.row]) ** 0.5)
        latents, snr = sample["latents"][None].float(), alpha**2 / max(sigma**2, 1e-300)
        if each.chunks == 1:
            context, _, pooled, _ = pipe.encode_prompt(sample["prompts"], do_classifier_free_guidance=False)
        else:
            sample["chunks"] = [ids + [[]] * (each.chunks - len(ids)) for ids in sample["chunks"]]
            ids = feed.pictures.collate([sample])
            with torch.no_grad():
                context, pooled = encode(ids["ids"], ids["ids_2"], pipe.text_encoder, pipe.text_encoder_2)
        told = {"text_embeds": pooled, "time_ids": sample["time_ids"][None]}
        prediction = pipe.unet(
            alpha * latents + sigma * noise, torch.tensor([each.row]), context, added_cond_kwargs=told
        ).sample
        weight = min(snr, 5) / (snr + 1)
        total += weight * (prediction - (alpha * noise - sigma * latents)).square().mean() / len(asked)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in pipe.unet.parameters()]).norm()
    assert row["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert row["norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert any(each.chunks == 1 for each in asked)


def test_a_killed_training_goes_on_bit_for_bit(training, killed, tmp_path):
    flags = (*V, "--ip_noise_gamma", 0.1, "--heldout", 6, "--ema_decay", 0.9, "--checkpoint_every", 24)
    flags = (*flags, "--samples", 56, "--train_text_encoder", "--evaluate_every", 10**6)
    whole = training(tmp_path / "whole", *flags)
    killed(5, tmp_path / "parts", *flags)
    parts = training(tmp_path / "parts", *flags, "--resume")
    assert [row["loss"] for row in parts.values()] == [row["loss"] for row in whole.values()]
    found, wanted = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    averages = [
        torch.load(last(tmp_path / n) / "sdxl_fixes_ema.pt")["shadow_params"] for n in ("parts", "whole")
    ]
    assert all(map(torch.equal, *averages))


@pytest.mark.slow
def test_a_training_goes_on_with_another_batch_size(training, killed, tmp_path):
    flags = (*V, "--checkpoint_every", 24, "--samples", 72)
    whole = training(tmp_path / "whole", *flags)
    killed(5, tmp_path / "parts", *flags)
    parts = training(tmp_path / "parts", *flags, "--resume", "--batch_size", 2)
    close_to(parts, whole)


# ------------------------------------------------------------------ what is saved and what is refused


def test_a_checkpoint_is_a_pipeline_that_says_how_it_is_sampled(example, data, training, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    (tmp_path / "prompts.txt").write_text("red circles\n\n" + "words " * 90)
    flags = (
        "--samples",
        16,
        "--train_text_encoder",
        "--ema_decay",
        0.5,
        "--keep",
        1,
        "--stable",
        3,
        "--heldout",
        2,
    )
    samples = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_side", 64, "--sample_steps", 2)
    training(tmp_path / "out", *V, *flags, *samples)
    folder, trained = last(tmp_path / "out"), weights(tmp_path / "out")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "model")
    begun = StableDiffusionXLPipeline.from_pretrained(data[5])
    for name, each in pipe.unet.state_dict().items():
        assert torch.equal(each, trained[f"unet.{name}"])
    assert any(
        not torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), begun.unet.parameters(), strict=True)
    )
    text = pipe.text_encoder.state_dict()
    changed = {n for n, each in begun.text_encoder.state_dict().items() if not torch.equal(each, text[n])}
    unused = {n for n in text if "layers.2." in n or "final_layer_norm" in n}  # of three layers
    positions = {n for n in text if "position_ids" in n}
    assert changed == text.keys() - unused - positions
    for n, each in begun.text_encoder_2.state_dict().items():
        assert torch.equal(each, pipe.text_encoder_2.state_dict()[n])
    wanted = NoiseSchedule.sdxl().zero_terminal_snr()
    assert NoiseSchedule.from_scheduler(pipe.scheduler) == wanted
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    sampling = read_sampling(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert (sampling.schedule, sampling.prediction_type) == (wanted, "v_prediction")
    # the average after two steps: the first is the weights, then d = min(decay, 2/11)
    average = StableDiffusionXLPipeline.from_pretrained(folder / "model_ema").unet.state_dict()
    assert any(not torch.equal(each, pipe.unet.state_dict()[n]) for n, each in average.items())
    page = (tmp_path / "out" / "samples.html").read_text()
    assert page.count("<img ") == 4 and "red circles" in page
    assert all(f'data-c="{column}"' in page for column in ("0 samples", "22 samples"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"heldout/loss", "heldout_ema/loss", "stable_loss/loss", "stable_loss_ema/loss"} <= rows[0].keys()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == [folder.name]
    with pytest.raises(SystemExit, match="holds checkpoints: give --resume"):
        training(tmp_path / "out", *V, *flags)


def flags_without(flags, *names):
    """``flags`` without some of one value."""
    places = {flags.index(name) + k for name in names for k in (0, 1)}
    return tuple(flag for k, flag in enumerate(flags) if k not in places)


def test_a_state_goes_on_with_what_it_was_trained_with_or_not_at_all(
    example, data, training, tmp_path, monkeypatch
):
    flags = (*V, "--samples", 8, "--heldout", 2, "--ema_decay", 0.5)
    training(tmp_path / "out", *flags)
    model, other = Path(data[data.index("--model") + 1]), tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store = tmp_path / "store"
    shutil.copytree(data[data.index("--latents") + 1], store)
    (store / "index.json").write_text((store / "index.json").read_text() + " ")
    with monkeypatch.context() as patch:
        patch.setattr(example.train, "Pictures", lambda *_: pytest.fail("it begins"))
        for changed, sentence in (
            ((*flags, "--seed", 1), r"--seed 0 \(this run: 1\)"),
            ((*flags, "--heldout", 3), r"--heldout 2 \(this run: 3\)"),
            ((*flags, "--prediction_type", "sample"), r"--prediction_type v_prediction \(this run: sample\)"),
            (
                ("--terminal_sigma", 99, *flags_without(flags[:2] + flags[3:])),
                r"the schedule --zero_terminal_snr \(",
            ),
            ((*flags, "--min_snr_gamma", 1), r"--min_snr_gamma 5.0 \(this run: 1.0\)"),
            (flags_without(flags, "--min_snr_gamma"), r"--min_snr_gamma 5.0 \(this run: 0\)"),
            (flags_without(flags, "--ema_decay"), r"--ema_decay 0.5 \(this run: 0\)"),
            ((*flags, "--train_text_encoder"), r"--train_text_encoder False \(this run: True\)"),
            ((*flags, "--loss_type", "huber"), r"--loss_type l2 \(this run: huber\)"),
            ((*flags, "--precision", "amp"), r"--precision fp32 \(this run: amp\)"),
            ((*flags, "--model", other), rf"--model {model} \(this run: {other}\)"),
            ((*flags, "--latents", store), r"--latents .* \(this run: .*store\)"),
        ):
            with pytest.raises(SystemExit, match=sentence):
                training(tmp_path / "out", "--resume", *changed)
        dealing(patch, example, "FSDP")
        with pytest.raises(SystemExit, match=r"the engine DDP, or one process \(this run: FSDP\)"):
            training(tmp_path / "out", "--resume", *V, "--samples", 8)
    # the same in other words, and elsewhere
    shutil.copytree(model, tmp_path / "moved")
    said = ("--min_snr_gamma", 5, "--ema_decay", "0.50", "--logit_mean", 0)
    with pytest.raises(SystemExit, match="--logit_mean needs --timestep_density logit_normal"):
        training(tmp_path / "out", "--resume", *flags, *said)
    training(tmp_path / "out", "--resume", *flags, *said[:4], "--model", tmp_path / "moved")
    table = tmp_path / "table.parquet"
    rows = example.loader.pyarrow.parquet.read_table(data[data.index("--table") + 1]).to_pylist()
    rows = [{**row, "caption": row["caption"] + 40 * " words"} for row in rows]
    example.loader.pyarrow.parquet.write_table(example.loader.pyarrow.Table.from_pylist(rows), table)
    with monkeypatch.context() as patch:
        patch.setattr(example.network, "load", lambda *_: pytest.fail("it begins"))
        with pytest.raises(SystemExit, match="was trained on another --table or --latents: the state"):
            training(tmp_path / "out", "--resume", *flags, "--table", table)
    (last(tmp_path / "out") / "progress.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"has no progress\.json of this train\.py"):
        training(tmp_path / "out", "--resume", *flags)


class Wandb(SimpleNamespace):
    """What accelerate calls of wandb, recorded."""

    def __init__(self):
        super().__init__(begun=[], logged=[], config=SimpleNamespace(update=self.configured), told=[])

    def init(self, **options):
        self.begun.append(options)
        return SimpleNamespace(log=lambda values, step, **_: self.logged.append(step), finish=lambda: None)

    def configured(self, values, **_):
        self.told.append(values)


def test_a_log_that_lacks_its_last_line_s_end_is_mended(example, tmp_path):
    """What is appended to it would else be on that line, and both would be lost."""
    (tmp_path / "log.jsonl").write_text('{"samples": 8}\n{"samples": 16}')
    assert example.state.cut_log(tmp_path, 16) == 0
    assert (tmp_path / "log.jsonl").read_text() == '{"samples": 8}\n{"samples": 16}\n'


@pytest.mark.parametrize("tracker", ["wandb", pytest.param("tensorboard", marks=pytest.mark.slow)])
def test_a_killed_training_has_one_log_and_one_run(training, killed, tmp_path, monkeypatch, capsys, tracker):
    import accelerate.tracking
    import accelerate.utils
    from accelerate import Accelerator

    if tracker == "tensorboard":
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    kinds = accelerate.utils.LoggerType
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [kinds.TENSORBOARD, kinds.WANDB])
    decays, original = [], Accelerator.backward

    def backward(self, loss):
        decays.append(self._optimizers[0].param_groups[0]["weight_decay"])
        original(self, loss)

    monkeypatch.setattr(Accelerator, "backward", backward)
    flags, log = (
        (*V, "--samples", 40, "--checkpoint_every", 20, "--log_with", tracker),
        tmp_path / "log.jsonl",
    )
    log.write_text('{"step": 1, "samples": 8, "loss": 7, "norm": 7}\n')  # of one that saved nothing
    (tmp_path / "log.old.jsonl").write_text("an earlier one's")
    killed(5, tmp_path, *flags)
    before = log.read_text()
    assert before.count("\n") == 4 and "7" in (tmp_path / "log.old2.jsonl").read_text()
    assert (tmp_path / "log.old.jsonl").read_text() == "an earlier one's"
    log.write_text(before + '{"step": 5, "sam')
    training(tmp_path, *flags, "--resume", "--weight_decay", 0.5, "--fused_adamw")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = len(rows)
    assert [row["step"] for row in rows] == [*range(1, steps + 1)] and steps >= 5
    assert log.read_text().startswith("\n".join(before.splitlines()[:3]))
    assert {*decays[:8]} == {0.1} and {*decays[-4:]} == {0.5}  # a state's would be 0.1
    said = capsys.readouterr().out
    assert (
        "--weight_decay 0.5 (was 0.1)" in said
        and "--fused_adamw True (was False)" in said
        and "2 line(s) after the checkpoint" in said
    )
    if tracker == "tensorboard":
        events = reader.EventAccumulator(str(tmp_path / "bigasp"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [row["samples"] for row in rows]
        return
    first, second = wandb.begun
    assert first["id"] == second["id"] and second["resume"] == "allow" and len(first["id"]) == 32
    assert wandb.told[0]["min_snr_gamma"] == 5 and wandb.told[1]["weight_decay"] == 0.5


def test_what_is_not_trained_is_saved_as_it_was(training, data, tmp_path):
    from safetensors.torch import load_file

    training(tmp_path, "--samples", 8, "--precision", "amp", "--checkpoint_every", 8)
    for name in ("text_encoder", "text_encoder_2"):
        before, after = (
            load_file(folder / name / "model.safetensors")
            for folder in (Path(data[data.index("--model") + 1]), tmp_path / "checkpoint-8" / "model")
        )
        assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()
        assert all(before[key].dtype == after[key].dtype for key in before)


def test_what_cannot_be_done_is_one_sentence(training, tmp_path):
    for flags, sentence in (
        (("--resume",), "holds no checkpoint-N: start without it"),
        (("--heldout", 60), "--heldout 60 and --stable 0: the store has 60 pictures"),
        (("--batch_size", 3), "--global_batch 8 is no multiple"),
        (("--precision", "bf16", "--global_batch", 512), "128 gradients would be summed in bfloat16"),
        (("--learning_rate", 1e30, "--warmup", 0, "--max_grad_norm", 1e9), "gradients are not finite"),
        (("--min_snr_floor",), "--min_snr_floor needs --min_snr_gamma"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            training(tmp_path, "--samples", 16, *flags)


def test_what_would_be_found_late_is_told_before_anything_is_loaded(
    example, data, training, monkeypatch, tmp_path
):
    monkeypatch.setattr(example.train, "Training", lambda *_: pytest.fail("it begins"))
    model = Path(data[data.index("--model") + 1])
    for name in ("single", "half", "variant", "foreign"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "single" / "model_index.json").unlink()
    shutil.rmtree(tmp_path / "half" / "vae")
    weights = tmp_path / "variant" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    lines, empty, latin = (tmp_path / f"{name}.txt" for name in ("lines", "empty", "latin"))
    lines.write_text("a cat"), empty.write_text("\n \n"), latin.write_bytes("ä".encode("latin-1"))
    (tmp_path / "foreign" / "samples.html").write_text("<p>mine</p>")
    drawn = ("--sample_prompts", lines)
    monkeypatch.setattr(example.settings, "UNet2DConditionModel", object)
    monkeypatch.setattr(
        example.settings.importlib.util, "find_spec", lambda name: None if name == "torchao" else name
    )
    for flags, sentence in (
        (("--log_with", "nobody"), "--log_with nobody: no tracker of that name is installed"),
        (("--precision", "bf16", "--fused_adamw"), "--fused_adamw is not for --precision bf16"),
        (("--precision", "bf16"), "by torchao: pip install torchao"),
        (("--compile_blocks",), "--compile_blocks needs diffusers 0.35 or newer"),
        (("--loss_type", "huber", "--huber_l2_gradient", "batch"), "is shared out: take sample"),
        (("--max_grad_norm", 0), "--max_grad_norm 0.0: expected more than 0"),
        (("--learning_rate", "nan"), "--learning_rate nan: expected more than 0"),
        (("--seed", -1), "--seed -1: expected 0 or more"),
        (("--workers", -1), "--workers -1: expected 0 or more"),
        (("--planned_batch", 0), "--planned_batch 0: expected 1 or more"),
        (("--stable", -2), "--stable -2: expected 0 or more"),
        (("--weight_decay", "inf"), "--weight_decay inf: expected 0 or more"),
        (("--keep_activations", 3), "--keep_activations does nothing without --checkpointing transformers"),
        (("--compile_backend", "inductor"), "--compile_backend does nothing without --compile_blocks"),
        (("--sample_side", 1024), "--sample_side does nothing without --sample_prompts"),
        (("--evaluate_every", 8), "--evaluate_every does nothing without --heldout or --stable"),
        (("--huber_c", 0.1), "--huber_c does nothing without --loss_type huber or smooth_l1"),
        (("--ip_noise_gamma_random_strength",), "does nothing without --ip_noise_gamma"),
        (("--sample_prompts", tmp_path / "gone.txt"), "gone.txt: there is no such file"),
        (("--sample_prompts", empty), "empty.txt: it is empty"),
        (("--sample_prompts", latin), "latin.txt: it is not in UTF-8"),
        ((*drawn, "--sample_side", 100), "--sample_side 100: expected a multiple of 8"),
        ((*drawn, "--output", tmp_path / "foreign"), "samples.html exists and is not a table of samples"),
        (("--output", lines), "lines.txt: nothing can be written there"),
        (("--table", tmp_path / "gone"), "--table .*gone: there is no such file"),
        (("--model", tmp_path / "single"), r"single: it is no pipeline's folder \(no model_index.json\)"),
        (("--model", tmp_path / "half"), "half: it lacks vae"),
        (("--model", tmp_path / "variant"), "variant: vae has no weights that are read without a variant"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            training(tmp_path / "out", "--samples", 16, *flags)


def test_a_name_is_downloaded_once_at_the_start(example, data, monkeypatch):
    folder = data[data.index("--model") + 1]
    pipeline = example.settings.StableDiffusionXLPipeline
    monkeypatch.setattr(pipeline, "download", lambda name: folder)
    assert example.settings.pipeline_folder("somebody/model") == Path(folder)

    def fails(name):
        raise OSError(f"{name} is no model\nand more")

    monkeypatch.setattr(pipeline, "download", fails)
    with pytest.raises(SystemExit, match=r"no such name was downloaded \(somebody/model is no model\)"):
        example.settings.pipeline_folder("somebody/model")


def dealing(monkeypatch, example, engine, **plugin):
    """accelerate says that ``engine`` trains, with what of its plugin train.py looks at."""
    original, plugin = example.train.Accelerator, SimpleNamespace(**plugin) if plugin else None

    def make(**options):
        accelerator = original(**options)
        accelerator.state.distributed_type = engine
        state = type(accelerator.state)
        monkeypatch.setattr(state, "deepspeed_plugin", property(lambda _: plugin), raising=False)
        return accelerator

    monkeypatch.setattr(example.train, "Accelerator", make)
    return plugin


@pytest.mark.parametrize(
    ("engine", "plugin", "flags", "sentence"),
    [
        ("FSDP", {}, ("--ema_decay", 0.9), "--ema_decay needs the whole weights .* FSDP deals them out"),
        ("DEEPSPEED", {"zero_stage": 2}, ("--ema_decay", 0.9), "DEEPSPEED deals them out: leave it out"),
        ("FSDP", {}, ("--heldout", 2), "--heldout needs the whole U-Net"),
        ("FSDP", {}, ("--stable", 2), "--stable needs the whole U-Net"),
        ("DEEPSPEED", {"zero_stage": 2}, ("--precision", "bf16"), "take --precision amp or fp32"),
        ("DEEPSPEED", {"zero_stage": 3}, (), r"ZeRO-3 has not been run with train.py: take ZeRO-2 \("),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_it_trains(
    example, training, monkeypatch, tmp_path, engine, plugin, flags, sentence
):
    dealing(monkeypatch, example, engine, **plugin)
    monkeypatch.setattr(example.network, "load", lambda *_: pytest.fail("it begins"))
    with pytest.raises(SystemExit, match=sentence):
        training(tmp_path, "--samples", 8, *flags)


def test_deepspeed_steps_with_the_rate_and_clips_by_the_flags(example, training, monkeypatch, tmp_path):
    """DeepSpeed steps within accelerator.backward: what a step needs must stand before it."""
    from accelerate import Accelerator

    rates, original = [], Accelerator.backward

    def backward(self, loss):
        rates.append((self._optimizers[0].param_groups[0]["lr"], torch.initial_seed()))
        original(self, loss)

    monkeypatch.setattr(Accelerator, "backward", backward)
    rows = training(tmp_path / "seen", "--samples", 24).values()
    wanted = [(row["rate"], step) for step, row in enumerate(rows)]
    assert len({rate for rate, _ in wanted}) == 3
    assert rates == [each for each in wanted for _ in range(2)]  # of 8 pictures in batches of 4

    plugin = dealing(monkeypatch, example, "DEEPSPEED", zero_stage=2, deepspeed_config={"kept": 1})

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(example.network, "load", stop)
    with pytest.raises(Stop):
        training(tmp_path / "zero", "--samples", 24, "--max_grad_norm", 0.25, "--batch_size", 2)
    assert plugin.deepspeed_config == {
        "kept": 1,
        "gradient_clipping": 0.25,
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 2,
    }


# ------------------------------------------------------------------ speed


@pytest.mark.slow
def test_what_makes_it_fast_changes_no_step(example, data, training, tmp_path, monkeypatch):
    flags = (*V, "--samples", 24)
    plain = training(tmp_path / "plain", *flags)
    computed = collections.Counter()
    from diffusers.models.attention import BasicTransformerBlock

    original = BasicTransformerBlock.forward

    def forward(self, *args, **kwargs):
        computed[id(self)] += 1
        return original(self, *args, **kwargs)

    def same(name, *more, rel=1e-5):
        found = training(tmp_path / name, *flags, *more)
        assert found.keys() == plain.keys()
        for seen, row in plain.items():
            assert found[seen]["loss"] == pytest.approx(row["loss"], rel=rel), (name, seen)
            assert found[seen]["norm"] == pytest.approx(row["norm"], rel=30 * rel), (name, seen)

    same("adamw", "--fused_adamw")
    same("last", "--channels_last")
    same("compiled", "--compile_blocks", "--compile_backend", "eager")
    monkeypatch.setattr(BasicTransformerBlock, "forward", forward)
    same("none", "--channels_last")
    once = computed.total()
    for kept, again in ((0, 1), (1, None), (99, 0)):
        computed.clear()
        same(f"kept{kept}", "--checkpointing", "transformers", "--keep_activations", kept)
        if again is None:
            assert once < computed.total() < 2 * once
        else:
            assert computed.total() == (1 + again) * once
    same("amp", "--precision", "amp", rel=0.02)


@pytest.mark.slow
def test_weights_in_bfloat16_move_as_far_as_in_float32(data, training, killed, tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="torchao: needed for --precision bf16")
    compiled = torch.compile  # its step, which takes a C++ compiler a minute
    monkeypatch.setattr(
        torch, "compile", lambda made, **options: compiled(made, **options | {"backend": "eager"})
    )
    flags = (*V, "--samples", 40, "--checkpoint_every", 24)
    plain = training(tmp_path / "plain", *flags)
    found = training(tmp_path / "bf16", *flags, "--precision", "bf16")
    for seen, row in plain.items():
        assert found[seen]["loss"] == pytest.approx(row["loss"], rel=0.02)
    killed(5, tmp_path / "parts", *flags, "--precision", "bf16")
    parts = training(tmp_path / "parts", *flags, "--precision", "bf16", "--resume")
    assert [row["loss"] for row in parts.values()] == [row["loss"] for row in found.values()]
    begun = {f"unet.{n}": each for n, each in unet_of(data).state_dict().items()}
    exact, rounded = weights(tmp_path / "plain"), weights(tmp_path / "bf16")
    assert {each.dtype for each in rounded.values()} == {torch.bfloat16}
    moved = [(exact[n] - begun[n]).flatten() for n in begun]
    also = [(rounded[n].float() - begun[n].bfloat16().float()).flatten() for n in begun]
    moved, also = torch.cat(moved), torch.cat(also)
    # rounding to nearest loses most of a step of 1e-4; stochastic rounding none of it on average
    assert (moved @ also / (moved @ moved)).item() == pytest.approx(1, abs=0.05)


def unet_of(data):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(data[5], subfolder="unet")


# ------------------------------------------------------------------ processes


def started(data, folder, *flags, processes=1):
    """The script in processes of its own."""
    command = [sys.executable, *(TWO if processes > 1 else ()), str(EXAMPLE / "train.py")]
    command += ["--output", str(folder), *data, *SMALL, *map(str, flags)]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def close_to(found, wanted):
    assert found.keys() == wanted.keys()
    for seen, row in wanted.items():
        assert found[seen]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert found[seen]["norm"] == pytest.approx(row["norm"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_and_go_on_with_its_state(data, training, killed, tmp_path):
    flags = (*V, "--samples", 72, "--checkpoint_every", 24, "--ip_noise_gamma", 0.1, "--train_text_encoder")
    flags = (*flags, "--heldout", 5, "--ema_decay", 0.9)
    whole = training(tmp_path / "whole", *flags)
    output, _ = (process := started(data, tmp_path / "two", *flags, processes=2)).communicate(timeout=900)
    assert process.returncode == 0 and "2 processes x 4 x 1 accumulated" in output, output
    assert (last(tmp_path / "two") / "random_states_1.pkl").exists()
    close_to(logged(tmp_path / "two"), whole)
    killed(5, tmp_path / "parts", *flags)
    output, _ = (process := started(data, tmp_path / "parts", *flags, "--resume", processes=2)).communicate(
        timeout=900
    )
    assert process.returncode == 0 and "2 processes" in output, output
    close_to(logged(tmp_path / "parts"), whole)


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written(data, training, tmp_path):
    flags = (*V, "--samples", 72, "--checkpoint_every", 16, "--ema_decay", 0.9, "--workers", 1)
    whole = training(tmp_path / "whole", *flags)
    parts, after = tmp_path / "parts", 0
    for _ in range(2):
        process = started(data, parts, *flags, *(["--resume"] if after else []))
        while process.poll() is None and not (
            found_new(parts, after) and (parts / "checkpoint.part").exists()
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        after = int(last(parts).name.split("-")[1])
    found = training(parts, *flags, "--resume")
    assert [row["loss"] for row in found.values()] == [row["loss"] for row in whole.values()]
    one, other = weights(parts), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


def found_new(folder, after):
    """Whether there is a checkpoint of more than ``after`` samples."""
    return any(int(path.name[11:]) > after for path in folder.glob("checkpoint-*"))
