"""--speed on the made-up loop, in this process: the same numbers with fewer waits, or one sentence."""

import argparse
import json
import warnings
from collections import Counter

import made_up_trainer
import played_device
import pytest
import torch
from made_up_trainer import edit, run
from safetensors.torch import load_file
from test_kohya_resume import FT, NETWORK, trainer  # noqa: F401  (a fixture)

from sdxl_fixes.errors import FlagError
from sdxl_fixes.kohya import speed, speed_flags
from sdxl_fixes.kohya.doctor import problems
from sdxl_fixes.trainers.states import RECORD

LOOPS = {FT: FT, NETWORK: "train_network.py"}
CHECK = """                if torch.any(torch.isnan(latents)):
                    accelerator.print("NaN found in latents, replacing with zeros")
                    latents = torch.nan_to_num(latents, 0, out=latents)
"""
BATCH = """
    def process_batch(self, batch, accelerator, is_train=True):
        latents = batch["latents"].to(accelerator.device)
        if torch.any(torch.isnan(latents)):
            accelerator.print("NaN found in latents, replacing with zeros")
            latents = typing.cast(torch.FloatTensor, torch.nan_to_num(latents, 0, out=latents))
        return latents
"""
STEPS = ("--max_train_steps", "8", "--pictures", "5")
HUBER = ("--loss_type", "huber")
OWN = (*HUBER, "--fixes", "all,-loss")  # upstream's Huber, which reads the schedule's table on the host
ALL = (*HUBER, "--zero_terminal_snr", "--v_parameterization", "--stratified_timesteps", "--exact_resume")
ALL += ("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength", "--ema_decay", "0.9")
SLOW = {
    "zero SNR": ("--zero_terminal_snr", "--v_parameterization"),
    "Huber": HUBER,
    "perturbed": ("--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"),
    "stratified": ("--stratified_timesteps",),
    "exact resume": ("--exact_resume",),
    "average": ("--ema_decay", "0.9"),
    "stable loss": ("--stable_loss_steps", "2", "--stable_loss_images", "2"),
}
TOGETHER = [
    pytest.param(FT, (), id="alone"),
    pytest.param(FT, (*OWN, "--gradient_accumulation_steps", "2"), id="upstream's Huber, accumulation"),
    pytest.param(FT, ALL, id="all"),
    pytest.param(NETWORK, ALL, id="all, network"),
    *(
        pytest.param(script, flags, id=f"{name}, {script}", marks=pytest.mark.slow)
        for name, flags in SLOW.items()
        for script in (FT, NETWORK)
    ),
]


@pytest.fixture
def loop(trainer):  # noqa: F811
    """The made-up loop in both scripts; the network trainer's batches are a method, as upstream's."""
    for file in LOOPS.values():  # its own log would ask for the average at once
        edit(trainer, file, ("[*line, loss_recorder.moving_average]", "[*line, 0]"))
    edit(trainer, "train_network.py", ("import json", "import json\nimport typing"))
    text = (trainer / "train_network.py").read_text()
    check = "".join(f"    {line}" for line in CHECK.splitlines(keepends=True))
    latents = '                    latents = batch["latents"].to(accelerator.device)\n'
    assert latents + check in text
    text = text.replace(
        latents + check, "                    latents = self.process_batch(batch, accelerator)\n"
    )
    (trainer / "train_network.py").write_text(text + BATCH)
    yield trainer


def go(root, script, *flags, how="module"):
    """Everything that a run of it says and leaves: lines of its log and of its tracker, the model, what its
    states say of their place."""
    (root / "out").mkdir(exist_ok=True)
    for name in ("log.jsonl", "tracked.jsonl"):
        (root / "out" / name).unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*")
        run(root, script, *STEPS, *flags, how=how)
    out = root / "out"
    logs = [[json.loads(line) for line in (out / name).open()] for name in ("log.jsonl", "tracked.jsonl")]
    tensors = {name: tensor.tolist() for name, tensor in load_file(out / "model.safetensors").items()}
    records = {file.parent.name: json.loads(file.read_text()) for file in out.glob(f"*/{RECORD}")}
    places = {name: record["place"] for name, record in records.items() if record.get("place")}
    return *logs, tensors, places


@pytest.mark.parametrize(("script", "flags"), TOGETHER)
def test_without_waits_the_numbers_and_all_that_is_logged_are_the_same(loop, script, flags):
    expected = go(loop, script, *flags)
    _, tracked, *_ = expected
    assert ("--exact_resume" in flags) == bool(expected[3])
    assert len(tracked) >= 8 and {step for step, _ in tracked} >= set(range(1, 9))
    assert go(loop, script, *flags, "--speed", "syncs") == expected


@pytest.mark.parametrize("script", [FT, NETWORK])
def test_no_step_waits(loop, script):
    """What upstream's lines wait for is counted as torch has it; all of it is gone."""
    edit(loop, LOOPS[script], ("timesteps.tolist(),", "0,"), ("loss.item(),", "0,"))  # its log looks, too
    counted = []
    for flags in ((), ("--speed", "syncs")):
        with played_device.playing(loop) as played:
            go(loop, script, "--fixes", "speed", *flags)
        counted.append(Counter((kind, place.split(":")[0]) for kind, place, _ in played.per_cycle()))
    upstream = {
        ("copy", LOOPS[script]): 1,  # the batch
        ("copy", "library/loss.py"): 1,  # timesteps
        ("copy", "library/sdxl_train_util.py"): 1,  # frequencies of the size embedding
        ("read", LOOPS[script]): 2,  # NaN in latents, the loss
    }
    assert counted == [Counter(upstream), Counter()]


def test_nan_in_latents_is_mended_and_said_without_looking(loop, capsys):
    edit(loop, FT, ("+ self.step,", "+ self.step + (math.nan if index == 3 else 0),"))
    found = []
    for flags in ((), ("--speed", "syncs")):
        found.append((go(loop, FT, *flags), capsys.readouterr().out.count("NaN found")))
    assert found[0] == found[1] and found[0][1] >= 1


def tracked(root):
    return [json.loads(line) for line in (root / "out" / "tracked.jsonl").open()]


@pytest.mark.parametrize("script", [FT, NETWORK])
def test_a_training_that_is_broken_off_has_said_all_that_upstream_has(loop, script):
    """Ctrl-C after the third step."""
    found = []
    for flags in ((), ("--speed", "syncs")):
        with pytest.raises(KeyboardInterrupt):
            go(loop, script, "--stop_at", "3", *flags)
        found.append(tracked(loop))
    assert found[0] == found[1] and [step for step, _ in found[0]] == [1, 2, 3]


@pytest.mark.parametrize("script", [FT, NETWORK])
def test_a_loss_that_is_not_a_number_is_told_of_its_step_and_all_later_ones(loop, script):
    """As upstream, which neither stops nor skips; with accumulation, and the last step of an epoch short."""
    file, loss = LOOPS[script], "accelerator.backward(loss)"
    edit(loop, file, (loss, f"loss = loss * (math.nan if global_step == 3 else 1); {loss}"))
    found = []
    for flags in ((), ("--speed", "syncs")):
        go(loop, script, "--gradient_accumulation_steps", "2", *flags)
        found.append((loop / "out" / "tracked.jsonl").read_text())
    lines = found[0].splitlines()
    assert found[0] == found[1] and "NaN" not in lines[4] and all("NaN" in line for line in lines[6:])


def test_validation_says_its_numbers_after_those_of_the_step_and_every_nan(loop, capsys):
    """As upstream's network trainer has it, every step and after the last."""
    made = "{space}self.process_batch({{'latents': latents * math.nan}}, accelerator, is_train=False)\n"
    made += "{space}accelerator.log({{'validation': 0.0}}, step=global_step)\n"
    each, last = " " * 16 + "if args.stop_at", " " * 8 + "sdxl_model_util.save_stable"
    for place, space in ((each, " " * 16), (last, " " * 8)):
        edit(loop, "train_network.py", (place, made.format(space=space) + place))
    found = []
    for flags in ((), ("--speed", "syncs")):
        go(loop, NETWORK, *flags)
        found.append((tracked(loop), capsys.readouterr().out.count("NaN found")))
    assert found[0] == found[1] and found[0][1] == 9


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("sdxl_train.py", ("avr_loss: float = ", "avr_loss = ")),
        ("sdxl_train.py", ("loss.detach().item()", "float(loss)")),
        ("sdxl_train.py", ("torch.any(torch.isnan(latents))", "latents.isnan().any()")),
        ("train_network.py", ("torch.any(torch.isnan(latents))", "latents.isnan().any()")),
        ("train_network.py", ("accelerator.log(logs, step=global_step)", "accelerator.log(logs)")),
    ],
)
def test_a_loop_that_is_not_known_is_refused_and_doctor_says_so(loop, file, change):
    edit(loop, file, change)
    script = next(script for script, home in LOOPS.items() if home == file)
    with pytest.raises(SystemExit, match=r"--speed syncs does not fit this .* once, found 0 times"):
        go(loop, script, "--speed", "syncs")
    assert any("once, found 0 times" in why for why in problems(loop, script)["speed"])
    go(loop, script)


def adam(root):
    """The loop with torch's AdamW, made as kohya makes it of --optimizer_args."""
    options = "**{word.split('=')[0]: True for word in getattr(args, 'optimizer_args', None) or ()}"
    made = "torch.optim.SGD(unet.parameters(), lr=0.01, momentum=0.5)"
    edit(root, FT, (made, f"torch.optim.AdamW(unet.parameters(), lr=0.01, {options})"))


def test_fused_adamw_differs_by_rounding_and_stays_fused_in_a_resumed_run(loop):
    """float32 sums in another order: eight steps of 1e-7 each, and Adam's division by small roots."""
    adam(loop)
    log, _, model, _ = go(loop, FT)
    fused_log, _, fused_model, _ = go(loop, FT, "--speed", "fused")
    assert [line[5] for line in fused_log] == pytest.approx([line[5] for line in log], rel=1e-5)
    for name, values in model.items():
        assert torch.allclose(torch.tensor(values), torch.tensor(fused_model[name]), atol=1e-5)
    go(loop, FT, "--exact_resume")
    state = loop / "out" / "step4-state"
    edit(loop, FT, ("    steps_from_state = None", "    steps_from_state = None\n    saw = optimizer"))
    edit(
        loop,
        FT,
        ("loss_recorder = l", f"assert all({SEEN} for group in saw.param_groups)\n    loss_recorder = l"),
    )
    go(loop, FT, "--exact_resume", "--speed", "fused", "--resume", str(state))
    with pytest.raises(AssertionError):
        go(loop, FT, "--exact_resume", "--resume", str(state))


SEEN = "group['fused']"


def test_an_optimizer_that_is_not_fused_is_refused_before_the_first_step(loop):
    with pytest.raises(SystemExit, match="SGD was not made with fused=True: leave fused out"):
        go(loop, FT, "--speed", "fused")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"speed": "sync"}, "--speed: unknown part 'sync': expected some of syncs, fused, compile"),
        ({"speed": "fused", "optimizer_type": "Lion"}, "not Lion: take that, or leave fused out"),
        ({"speed": "fused", "optimizer_type": "AdamW8bit"}, "not AdamW8bit: take that"),
        ({"speed": "fused", "use_8bit_adam": True}, "torch's AdamW"),
        ({"speed": "fused", "optimizer_args": ["fused=False"]}, "contradicts --optimizer_args fused=False"),
        ({"speed": "fused", "optimizer_args": ["foreach=True"]}, "contradicts --optimizer_args foreach=True"),
        ({"speed": "compile", "torch_compile": True}, "compile does not go with --torch_compile"),
        ({"speed": "compile", "xformers": True}, "compile does not go with --xformers"),
        ({"speed": "syncs", "deepspeed": True}, "was never run with --deepspeed"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(flags, sentence):
    with pytest.raises(FlagError, match=sentence):
        speed_flags.check_speed(argparse.Namespace(**flags))


def test_kohya_is_told_to_make_its_adamw_fused_once():
    args = argparse.Namespace(speed="fused", optimizer_type="AdamW", optimizer_args=["weight_decay=0.1"])
    speed_flags.check_speed(args)
    speed_flags.check_speed(args)
    assert args.optimizer_args == ["weight_decay=0.1", "fused=True"]


def test_blocks_are_compiled_and_what_cannot_be_is_refused(loop, monkeypatch):
    graphs = []
    monkeypatch.setattr(speed, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    file, plain = "library/sdxl_original_unet.py", "        return hidden_states\n"
    edit(loop, file, (plain, "        return hidden_states + hidden_states.square()\n"))
    expected = go(loop, FT)
    assert go(loop, FT, "--speed", "compile,syncs") == expected and len(graphs) == 1
    broken = "torch._dynamo.graph_break()\n        return hidden_states + hidden_states.square()"
    edit(loop, file, ("return hidden_states + hidden_states.square()", broken))
    made_up_trainer.forget()
    with pytest.raises(SystemExit, match="--speed compile: torch cannot compile a transformer block here"):
        go(loop, FT, "--speed", "compile")


def test_blocks_of_too_many_kinds_are_refused_in_the_same_words(loop, monkeypatch):
    """As those of a LoRA that is another in every block would be: torch gives up on making code for them."""
    monkeypatch.setattr(speed, "BACKEND", "eager")
    monkeypatch.setattr(speed, "_COMPILED_AT_MOST", 1)
    file, plain = "library/sdxl_original_unet.py", "        return hidden_states\n"
    edit(loop, file, (plain, "        return hidden_states + 1 if self.odd else hidden_states\n"))
    edit(
        loop,
        file,
        ("return self.forward_body(", "self.odd = not self.odd\n        return self.forward_body("),
    )
    edit(loop, file, ("    def forward_body(self", "    odd = False\n\n    def forward_body(self"))
    sentence = r"compile: torch cannot compile a transformer block here \(they are of more than 1 kinds"
    with torch._dynamo.config.patch(cache_size_limit=8), pytest.raises(SystemExit, match=sentence):
        go(loop, FT, "--speed", "compile")
