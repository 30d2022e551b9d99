"""--exact_resume on the made-up trainer, in this process: every state of a run, resumed, gives its rest,
bit for bit; what cannot be gone on from is one sentence."""

import argparse
import json
import textwrap
from collections import Counter

import made_up_trainer
import numpy as np
import pytest
import torch
from closed_form import average as closed_form
from made_up_trainer import build, edit, forget, run
from safetensors.torch import load_file

from sdxl_fixes.kohya import run as kohya_run
from sdxl_fixes.kohya.doctor import problems
from sdxl_fixes.kohya.order import DATA, Item, Order, seed_everything
from sdxl_fixes.trainers.ema import FILE
from sdxl_fixes.trainers.states import RECORD

LOOP = made_up_trainer.SOURCE.parent / "made_up_loop" / "sdxl_train.py"
FT, NETWORK = "sdxl_train.py", "sdxl_train_network.py"
FLAGS = {"resume": "str", "gradient_accumulation_steps": "int", "pictures": "int", "stop_at": "int"}
EXACT = ("--exact_resume", "--stratified_timesteps", "--max_train_steps", "8", "--pictures", "5")


@pytest.fixture
def trainer(tmp_path):
    """The made-up sd-scripts, with the loop in both of its scripts."""
    root, loop = build(tmp_path), LOOP.read_text()
    (root / FT).write_text(loop)
    head, body = loop.split("def train(args):\n")
    body = textwrap.indent(f"def train(self, args):\n{body.partition('if __name__')[0]}", "    ")
    (root / "train_network.py").write_text(f"{head}class NetworkTrainer:\n{body}")
    added = "".join(f'    parser.add_argument("--{name}", type={kind})\n' for name, kind in FLAGS.items())
    edit(
        root,
        "training.py",
        ('    parser.add_argument("--loss_type"', f'{added}    parser.add_argument("--loss_type"'),
    )
    average = "\n\n    @property\n    def moving_average(self):\n"
    average += "        return self.loss_total / len(self.loss_list)"
    added = f"self.loss_list.append(loss)\n        self.loss_total += loss{average}"
    edit(root, "library/logging_util.py", ("self.losses = []", "self.loss_list, self.loss_total = [], 0.0"))
    edit(root, "library/logging_util.py", ("self.losses.append(loss)", added))
    yield root
    forget()


def lines(root):
    return [json.loads(line) for line in (root / "out" / "log.jsonl").read_text().splitlines()]


def go(root, script, *flags, again=False):
    """Run it in ``root/out``; the log's lines."""
    (root / "out").mkdir(exist_ok=True)
    if not again:
        (root / "out" / "log.jsonl").unlink(missing_ok=True)
    run(root, script, *EXACT, *flags)
    return lines(root)


@pytest.mark.parametrize("accumulation", ["1", "2"])
@pytest.mark.parametrize("script", [FT, NETWORK])
def test_every_state_gives_the_rest_of_the_run_bit_for_bit(trainer, script, accumulation):
    more = ("--gradient_accumulation_steps", accumulation)
    whole = go(trainer, script, *more)
    model = (trainer / "out" / "model.safetensors").read_bytes()
    states = sorted((trainer / "out").glob("*-state"))
    assert len(states) == 8 + (2 if accumulation == "1" else 3)
    places = set()
    for state in states[:: 1 if script == FT and accumulation == "1" else 3]:
        kept = trainer / "kept"
        state.rename(kept)
        place = json.loads((kept / RECORD).read_text())["place"]
        places.add((place["epoch"], place["items"]))
        if place["step"] == 8:
            with pytest.raises(SystemExit, match="is at step 8 of 8, so nothing is left to train: give more"):
                go(trainer, script, *more, "--resume", str(kept))
        else:
            rest = go(trainer, script, *more, "--resume", str(kept))
            # batches that are trained: an epoch has 5
            assert rest == whole[5 * place["epoch"] + place["items"] :] and rest
            assert (trainer / "out" / "model.safetensors").read_bytes() == model
        kept.rename(state)
    # an epoch's last step and its end are two places: of the first, the end's own work is still to be done
    assert script != FT or accumulation != "1" or {(0, 5), (1, 0)} <= places


SGD = "torch.optim.SGD(unet.parameters(), lr=0.01, momentum=0.5)"
OPTIMIZERS = {
    "released": "RELEASED(unet.parameters(), 0.01, weight_decay=0.1)",
    "torchao, released": "RELEASED(unet.parameters(), 0.01, name='torchao.optim._AdamW', **STOCHASTIC)",
    "torchao": "importlib.import_module('torchao.optim')._AdamW(unet.parameters(), 0.01, **STOCHASTIC)",
    "optimi": "importlib.import_module('optimi').AdamW(unet.parameters(), 0.01)",
}


@pytest.fixture
def eager():
    """torchao's steps, not compiled."""
    if not hasattr(torch.compiler, "set_stance"):  # so old that torchao does not come with it
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_16_bit_weights_go_on_and_the_average_is_of_what_they_left(trainer, eager, name):
    """Weights, average, and what the optimizer keeps: resumed from any state as if never stopped; and the
    average is its closed form over the weights after every step, whether they were made in it or before."""
    if name != "released":
        pytest.importorskip(name.split(",")[0])
    released = "from sdxl_fixes.kohya.optimizers import released as RELEASED\n"
    released += "STOCHASTIC = {'bf16_stochastic_round': True}\n"
    half = "SdxlUNet2DConditionModel().bfloat16()" if name != "released" else "SdxlUNet2DConditionModel()"
    edit(
        trainer, FT, (SGD, OPTIMIZERS[name]), ("import json\n", f"import importlib\nimport json\n{released}")
    )
    edit(
        trainer,
        FT,
        ("SdxlUNet2DConditionModel()", half),
        ("unet(noisy,", "unet(noisy.to(next(unet.parameters()).dtype),"),
    )
    more = ("--ema_decay", "0.3")
    whole, out = go(trainer, FT, *more), trainer / "out"
    models = [(out / file).read_bytes() for file in ("model.safetensors", "model-ema.safetensors")]
    weights = [load_file(out / f"step{n}-state" / "model.safetensors") for n in range(1, 9)]
    averages = [
        torch.load(out / f"step{n}-state" / FILE, weights_only=True)["shadow_params"] for n in range(1, 9)
    ]
    for number in (2, 8):
        found = dict(zip(("convolution.weight", "convolution.bias"), averages[number - 1], strict=True))
        for key, average in found.items():
            assert torch.allclose(
                average.double(), closed_form([w[key] for w in weights[:number]], 0.3), atol=1e-6
            )
            assert number == 2 or not torch.allclose(average, weights[-1][key].float(), atol=1e-4)
    for number in (3, 5):
        state = (out / f"step{number}-state").rename(trainer / "kept")
        assert go(trainer, FT, *more, "--resume", str(state)) == whole[number:]
        assert models == [
            (out / file).read_bytes() for file in ("model.safetensors", "model-ema.safetensors")
        ]
        last = torch.load(out / "step8-state" / FILE, weights_only=True)["shadow_params"]
        assert all(map(torch.equal, last, averages[-1]))
        state.rename(out / f"step{number}-state")


def test_every_epoch_has_every_sample_in_another_order_and_every_step_other_draws(trainer):
    whole = go(trainer, FT)
    orders = [[number for epoch, _, _, number, *_ in whole if epoch == wanted] for wanted in (0, 1)]
    assert sorted(orders[0]) == list(range(5)) and orders[0][:3] != orders[1]
    assert len({str(timesteps) for *_, timesteps, _, _, _ in whole}) == len(whole)


def test_a_run_that_is_stopped_goes_on_and_a_state_that_is_cut_off_is_refused(trainer):
    whole = go(trainer, FT)
    state = trainer / "out" / "step4-state"
    with pytest.raises(KeyboardInterrupt):
        go(trainer, FT, "--stop_at", "4")
    assert go(trainer, FT, "--resume", str(state), again=True) == whole
    (state / RECORD).unlink()
    with pytest.raises(SystemExit, match=r"holds no sdxl_fixes.json, so its writing was cut off"):
        go(trainer, FT, "--resume", str(state))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--seed", "1"), "was trained with --seed 0, and this run has --seed 1"),
        (("--pictures", "6"), "was trained with other data"),
        (("--loss_type", "huber"), "with no --loss_type, and this run is with --loss_type huber: --exact"),
        (("--timestep_density", "logit_normal"), "no --timestep_density, and this run is with --timestep"),
        (("--zero_terminal_snr",), "resume with the flags that it was started with"),
    ],
)
def test_what_cannot_go_on_exactly_is_refused(trainer, flags, sentence):
    go(trainer, FT, "--max_train_steps", "2")
    with pytest.raises(SystemExit, match=sentence):
        go(trainer, FT, "--resume", str(trainer / "out" / "step2-state"), *flags)


def test_from_two_ranks_one_trains_the_rest_of_the_epoch_and_every_step_that_was_asked_for(trainer):
    go(trainer, FT)
    state = trainer / "out" / "step4-state"
    record = json.loads((state / RECORD).read_text())
    record["place"] |= {"step": 2, "world_size": 2}  # as two ranks would have come to the same place
    record["timesteps"] |= {"drawn": 2, "world_size": 2}
    (state / RECORD).write_text(json.dumps(record))
    rest = go(trainer, FT, "--resume", str(state))
    assert [(epoch, step, count) for epoch, step, count, *_ in rest] == [
        (0, 4, 2),
        *((1, k, 3 + k) for k in range(5)),
    ]
    assert [rate for *_, rate, _ in rest] == pytest.approx([0.01 / (4 + k) for k in range(6)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "steps are counted from 0 again, so are epochs"),
        ({"network_module": "networks.lora"}, "from 0 again, whole epochs that are done are left out"),
        ({"network_module": "x", "skip_until_initial_step": True}, "as many batches are skipped"),
    ],
)
def test_what_upstream_s_resuming_does_is_said_of_each_script(flags, said):
    """train_network.py leaves out the epochs that train_state.json has whole; seen in the real one."""
    assert said in kohya_run.resumed(argparse.Namespace(**flags))


def test_without_the_flag_upstream_s_way_goes_on_and_says_what_does_not(trainer, capsys):
    go(trainer, FT, "--max_train_steps", "2")
    state = str(trainer / "out" / "step2-state")
    (trainer / "out" / "log.jsonl").unlink()
    capsys.readouterr()
    run(trainer, FT, "--max_train_steps", "3", "--pictures", "5", "--resume", state, "--loss_type", "huber")
    said = " ".join(capsys.readouterr().err.split())
    assert "steps are counted from 0 again, so are epochs, and the data is dealt anew" in said
    assert (
        "was trained with no --loss_type, --stratified_timesteps, and this run is with --loss_type huber"
        in said
    )
    assert [line[2] for line in lines(trainer)] == [0, 1, 2]
    made = trainer / "out" / "step3-state"
    with pytest.raises(SystemExit, match="was saved without the flag, so its place in the data is not known"):
        run(trainer, FT, "--exact_resume", "--pictures", "5", "--resume", str(made), "--loss_type", "huber")


def test_nothing_on_is_upstream_s_run(trainer):
    more = ("--max_train_steps", "4", "--pictures", "5")
    found = []
    for how, flags in (
        ("unpatched", ()),
        ("module", ()),
        ("module", ("--exact_resume", "--fixes", "all,-resume")),
    ):
        run(trainer, FT, *more, *flags, how=how)
        found.append(lines(trainer))
        (trainer / "out" / "log.jsonl").unlink()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("script", [FT, NETWORK])
@pytest.mark.parametrize(
    "change",
    [
        ("global_step = 0", "global_step = int(0)"),
        ("for epoch in range(num_train_epochs):", "for epoch in list(range(num_train_epochs)):"),
        ("in enumerate(train_dataloader):", "in zip(range(99), train_dataloader):"),
        ("loss_recorder = logging", "recorder = loss_recorder = logging"),
        ("progress_bar = tqdm(", "progress_bar, _ = 0, tqdm("),
    ],
)
def test_another_loop_is_refused_before_anything_is_trained_and_doctor_tells(trainer, script, change):
    file = FT if script == FT else "train_network.py"
    edit(trainer, file, change)
    with pytest.raises(
        SystemExit, match=rf"--exact_resume does not fit this {file} \(train: expected `.*` once"
    ):
        go(trainer, script)
    assert not (trainer / "out" / "log.jsonl").exists()
    assert any("train: expected `" in why for why in problems(trainer, script)["resume"])


def test_a_data_loader_that_is_not_prepared_as_known_is_refused(trainer):
    edit(trainer, FT, ("shuffle=True", "shuffle=False"))
    with pytest.raises(SystemExit, match="did not prepare its training data as we know it"):
        go(trainer, FT)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--seed", "0", "--initial_step", "3"), "does not go with --initial_step, since the state says"),
        (("--seed", "0", "--fused_optimizer_groups", "2"), "upstream loads the state of the first of its"),
    ],
)
def test_flags_that_do_not_go_with_it(trainer, capsys, flags, sentence):
    first = '    parser.add_argument("--loss_type"'
    added = f'    parser.add_argument("{flags[2]}")\n{first}'
    edit(trainer, "training.py", (first, added))
    with pytest.raises(SystemExit, match="2"):
        go(trainer, FT, *flags)
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("count", "worlds"), [(12, (2, 3)), (7, (1, 2)), (7, (2, 1)), (5, (3, 2))])
def test_on_other_ranks_the_rest_is_the_same_samples_with_the_same_draws(count, worlds):
    def items(world, start=0):
        order = Order(count, 7, world, 1)
        order.go(3, start, 0)
        assert len(order) == -(-count // world) * world
        return list(order)

    for rounds in range(count // worlds[0] + 1):
        first = items(worlds[0])[: rounds * worlds[0]]
        rest = items(worlds[1], len(first))
        seen = Counter(item.number for item in (*first, *rest))
        assert set(seen) == set(range(count)) and sum(seen.values()) - count < worlds[1]
        assert len(rest) % worlds[1] == 0
        known = {item.place: item[:4] for item in items(1)}
        assert all(known[item.place] == item[:4] for item in (*first, *rest) if item.place < count)


def test_items_are_drawn_apart_and_repeat():
    def draws(item, purpose):
        seed_everything(item, purpose)
        return torch.rand(2).tolist(), np.random.rand(2).tolist()

    one = Item(7, 0, 0, 4, 0)
    assert draws(one, DATA) == draws(one._replace(number=1, step=9), DATA)
    others = [draws(one._replace(**{name: 1}), DATA) for name in ("seed", "epoch", "place")]
    assert len({str(each) for each in (draws(one, DATA), draws(one, "training"), *others)}) == 5
