"""Optimizers that step during the backward pass, against torch's own that step after it; what settings cannot
learn, against torch's own steps."""

import argparse

import pytest
import torch
from accelerate import Accelerator
from made_up_trainer import build, edit, forget, run
from torch import nn

from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.kohya import optimizers
from sdxl_fixes.kohya.optimizers import RELEASED, cannot_learn, check, released

OURS = "sdxl_fixes.trainers.adamw.AdamW"
NAMES = ["torch.optim.AdamW", "torchao.optim._AdamW", "torchao.optim.AdamW8bit", OURS]


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """A training that was started with the plugin."""
    monkeypatch.setattr(optimizers.SESSION, "run", object())


class Training:
    """A network in bfloat16, two groups of parameters, a learning rate that changes, accelerate around it."""

    def __init__(self, name, release):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        first, last = self.network[0].parameters(), self.network[2].parameters()
        groups = [{"params": list(first), "lr": 1e-2}, {"params": list(last), "lr": 3e-3}]
        options = {"weight_decay": 0.1, **({"bf16_stochastic_round": False} if name == OURS else {})}
        if release:
            made = released(groups, 1e-2, name=name, **options)
        else:
            module, _, kind = name.rpartition(".")
            made = getattr(__import__(module, fromlist=[kind]), kind)(groups, lr=1e-2, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        self.network.bfloat16()  # after the optimizer was made, as kohya does
        self.accelerator = Accelerator(cpu=True)
        parts = self.accelerator.prepare(self.network, made, schedule)
        self.network, self.optimizer, self.schedule = parts

    def step(self, seed):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        self.accelerator.backward(self.network(x).float().square().mean())
        held = [p.grad for p in self.network.parameters()]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return held

    @property
    def weights(self):
        return [p.detach().clone() for p in self.network.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_optimizer_itself_and_no_gradient_is_left(name, tmp_path):
    if "torchao" in name or name == OURS:
        pytest.importorskip("torchao")
        torch.compiler.set_stance("force_eager")
    try:
        plain, early = Training(name, release=False), Training(name, release=True)
        start = plain.weights
        for seed in range(6):
            assert None not in plain.step(seed)
            assert early.step(seed) == [None] * 4
            assert all(map(torch.equal, plain.weights, early.weights))
        assert not any(map(torch.equal, start, plain.weights))
        early.accelerator.save_state(str(tmp_path))
        resumed = Training(name, release=True)
        resumed.accelerator.load_state(str(tmp_path))
        for seed in range(6, 9):
            plain.step(seed), resumed.step(seed)
        assert all(map(torch.equal, plain.weights, resumed.weights))
    finally:
        torch.compiler.set_stance("default")


def test_what_counts_its_steps_for_all_parameters_together_is_refused(monkeypatch):
    for name in ("optimi.AdamW", "prodigyopt.Prodigy", 8):
        with pytest.raises(FlagError, match=r"--optimizer_args name=.*expected one of torch.optim.AdamW, "):
            released([], 1e-3, name=name)
    monkeypatch.setattr(optimizers.SESSION, "run", None)
    with pytest.raises(FixError, match=r"started with -m sdxl_fixes\.kohya"):
        released([], 1e-3)


@pytest.mark.parametrize(
    ("args", "give"),
    [
        (dict(max_grad_norm=1.0), "--max_grad_norm 0"),
        (dict(gradient_accumulation_steps=2), "--gradient_accumulation_steps 1"),
        (dict(mixed_precision="fp16"), "--mixed_precision bf16"),
        (dict(fused_backward_pass=True), "no --fused_backward_pass"),
        (dict(fused_optimizer_groups=4, deepspeed=True), "no --fused_optimizer_groups, no --deepspeed"),
    ],
    ids=str,
)
def test_what_needs_all_gradients_at_once_is_refused(args, give):
    check(argparse.Namespace(optimizer_type="AdamW", **args))
    right = dict(max_grad_norm=0.0, gradient_accumulation_steps=1, mixed_precision="bf16")
    check(argparse.Namespace(optimizer_type=RELEASED, **right))
    with pytest.raises(FlagError, match=f"cannot be clipped.*: give {give}$"):
        check(argparse.Namespace(optimizer_type=RELEASED, **{**right, **args}))


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FlagError, match=r"give one process$"):
        check(argparse.Namespace(optimizer_type=RELEASED))


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 3e-4])
def test_weights_above_what_is_said_do_not_move_in_torch_s_own_adamw(rate):
    (line,) = cannot_learn(argparse.Namespace(full_bf16=True, learning_rate=rate))
    lost = 512 * rate
    assert (
        f"--learning_rate {rate:g} is lost in every weight above {lost:.2g}: --optimizer_type torchao" in line
    )

    def moved(low, high):
        """Of bfloat16 weights in (low, high)."""
        start = torch.linspace(low, high, 1000).bfloat16()
        weights = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0)
        for _ in range(3):
            weights.grad = torch.full_like(weights, 0.1)
            optimizer.step()
        return (weights != start).float().mean()

    assert moved(1.01 * lost, 4 * lost) == 0 and moved(0.4 * lost, 0.49 * lost) > 0.9


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (dict(optimizer_type="AdamW8bit"), True),
        (dict(use_8bit_adam=True), True),
        (dict(optimizer_type="Adafactor"), True),
        (dict(optimizer_type="Adafactor", fused_backward_pass=True), False),
        (dict(optimizer_type="optimi.AdamW"), False),
        (dict(optimizer_type="optimi.AdamW", optimizer_args=["kahan_sum=False"]), True),
        (dict(optimizer_type="torchao.optim.AdamW8bit"), True),
        (
            dict(optimizer_type="torchao.optim.AdamW8bit", optimizer_args=["bf16_stochastic_round=True"]),
            False,
        ),
        (dict(optimizer_type=RELEASED), True),
        (
            dict(
                optimizer_type=RELEASED,
                optimizer_args=["name='torchao.optim.AdamW4bit'", "bf16_stochastic_round=True"],
            ),
            False,
        ),
        (dict(optimizer_type="somebody.Elses"), False),  # may do what we do not know
        (dict(full_bf16=False), False),
        (dict(learning_rate=None), False),
    ],
    ids=str,
)
def test_who_rounds_to_nearest(args, said):
    args = argparse.Namespace(**{"full_bf16": True, "learning_rate": 1e-5, **args})
    assert bool(cannot_learn(args)) == said


@pytest.mark.parametrize(
    ("options", "nan"), [([], True), (["eps=1e-4"], False), (["eps=1e-7"], False)], ids=str
)
def test_float16_is_warned_of_where_torch_s_own_adamw_makes_nan(options, nan):
    args = argparse.Namespace(full_fp16=True, learning_rate=1e-5, optimizer_args=options)
    lines = cannot_learn(args)
    assert len(lines) == nan and all(
        "--full_fp16 with adamw: its eps of 1e-08 is 0 in float16" in x for x in lines
    )
    weights = nn.Parameter(torch.ones(8, dtype=torch.float16))
    optimizer = torch.optim.AdamW([weights], lr=1e-5, eps=float(options[0][4:]) if options else 1e-8)
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    assert bool(weights.isnan().any()) == nan


# ---------------------------------------------------------------- at the start of a training

FLAGS = """parser.add_argument("--config_file")
    for name, kind in (("optimizer_type", str), ("max_grad_norm", float), ("learning_rate", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--full_bf16", action="store_true")"""


@pytest.fixture
def trainer(tmp_path):
    root = build(tmp_path)
    edit(root, "training.py", ('parser.add_argument("--config_file")', FLAGS))
    yield root
    forget()


def test_a_start_that_needs_all_gradients_at_once_trains_nothing(trainer, capfd):
    with pytest.raises(SystemExit):
        run(trainer, "sdxl_train.py", "--optimizer_type", RELEASED, "--max_grad_norm", "1")
    assert "give --max_grad_norm 0" in "".join(capfd.readouterr())
    assert not (trainer / "out" / "steps.pt").exists()


@pytest.mark.parametrize(("more", "said"), [((), True), (("--fixes", "none"), False)])
def test_a_start_says_what_cannot_learn(trainer, capfd, more, said):
    run(trainer, "sdxl_train.py", "--full_bf16", "--learning_rate", "1e-5", "--zero_terminal_snr", *more)
    found = "rounds weights to nearest" in "".join(capfd.readouterr())
    assert found == said and (trainer / "out" / "steps.pt").exists()
