"""The stable training loss: a small training of our own passes by, with images of two shapes and conditioning
of two lengths."""

import argparse
import hashlib
import os
import struct
from contextlib import nullcontext

import pytest
import torch

from sdxl_fixes import Debiased, MinSNR, NoiseSchedule, Objective, ScheduledHuber
from sdxl_fixes.diffusers import validation as diffusers_adapter
from sdxl_fixes.diffusers.anchors import missing
from sdxl_fixes.errors import FixError, FlagError
from sdxl_fixes.flags import TrainingFlags
from sdxl_fixes.kohya import noise as kohya_noise
from sdxl_fixes.kohya import validation as kohya_adapter
from sdxl_fixes.kohya.run import SESSION, start
from sdxl_fixes.trainers.stable_loss import StableLoss
from sdxl_fixes.validation import Validation

ZERO = NoiseSchedule.sdxl().zero_terminal_snr()
WEIGHTING = MinSNR(1, floor=True)


class Network(torch.nn.Module):
    """Its prediction depends on all that it is given, and on being in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.dropout = torch.nn.Conv2d(4, 4, 1), torch.nn.Dropout(0.5)

    def forward(self, noisy, timesteps, text, added=None, scale=1.0):
        said = scale * text.mean((1, 2)) + added["time_ids"].mean(1) + timesteps / 1000
        return (self.dropout(self.mix(noisy)) + said.reshape(-1, 1, 1, 1).to(noisy.dtype),)


class Process:
    """What is asked of an accelerator; ``others`` are the sums of the other processes."""

    num_processes, process_index, is_main_process, distributed_type = 1, 0, True, "NO"
    device, sync_gradients, trackers = torch.device("cpu"), True, ()

    def __init__(self, network, processes=1):
        self._models, self.num_processes, self.reduced = [network], processes, []

    def reduce(self, tensor, how):
        assert how == "sum"
        self.reduced.append(tensor.clone())
        return tensor

    def autocast(self):
        return nullcontext()


def examples(count=8):
    """Latents, text of 77 or 154 tokens, time ids."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in range(count):
        shape = (4, 8, 8) if n % 2 else (4, 4, 16)
        found.append(
            [torch.randn(size, generator=generator) for size in (shape, (77 * (1 + n // 4 % 2), 6), (6,))]
        )
    return found


def stable(points=3, **options):
    objective = Objective(ZERO, "v_prediction", weighting=WEIGHTING)
    return StableLoss(Validation(objective, points=points), **{"every": 2, "images": 8, **options})


def see(loss, network, batches):
    """Train on ``batches`` of examples, as a trainer would."""
    for batch in batches:
        latents, text, ids = (torch.stack(parts) for parts in zip(*batch, strict=True))
        loss.noised(latents)
        arguments = (latents + 1, torch.zeros(len(latents)), text.requires_grad_())
        assert loss.called(network, arguments[0], *arguments[2:], added={"time_ids": ids}, scale=2.0)


def number(latents):
    """What tells an image's noise: a hash of its latents' float32 bytes, in this machine's order."""
    content = struct.pack(f"={latents.numel()}f", *latents.flatten().tolist())
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def expected(network, kept, points):
    """The unweighted and weighted loss in float64, one image and one timestep at a time."""
    validation = stable(points).validation
    network.eval()
    found = []
    for latents, text, ids in kept:
        for t in validation.timesteps:
            noise = validation.noise(number(latents), t, latents.shape).double()
            alpha, sigma = float(ZERO.alphas_cumprod[t]) ** 0.5, (1 - float(ZERO.alphas_cumprod[t])) ** 0.5
            noisy, target = alpha * latents.double() + sigma * noise, alpha * noise - sigma * latents.double()
            with torch.no_grad():
                out = network.double()(
                    noisy[None], torch.tensor([t]), text[None].double(), {"time_ids": ids[None].double()}, 2.0
                )[0][0]
            error = float((out - target).square().mean())
            found.append((error * WEIGHTING.table(ZERO, "v_prediction")[t], error))
    network.float().train()
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def test_the_number_is_the_mean_over_images_and_timesteps():
    data, network, loss = examples(), Network(), stable()
    see(loss, network, [data[0:4:2], data[1:4:2], data[4::2], data[5::2]])
    numbers = loss.step(2, Process(network))
    weighted, plain = expected(network, data, 3)
    assert numbers["stable_loss/loss"] == pytest.approx(weighted, rel=1e-5)
    assert numbers["stable_loss/loss_unweighted"] == pytest.approx(
        plain, rel=1e-5
    ) and weighted != pytest.approx(plain, rel=0.01)
    assert sorted(numbers)[2:] == [f"stable_loss/loss_unweighted/t{t}" for t in (332, 666, 999)]


def test_order_batch_size_and_number_of_processes_do_not_matter():
    data, network = examples(), Network()
    one, singly = stable(), stable()
    see(one, network, [data[0:4:2], data[1:4:2], data[4::2], data[5::2]])
    see(singly, network, [[example] for example in reversed(data)])
    whole = one.step(2, Process(network))
    assert singly.step(2, Process(network)) == pytest.approx(whole, rel=1e-5)
    sums = []
    for rank in range(3):
        part, process = stable(images=8, rank=rank, processes=3), Process(network, processes=3)
        assert part.wanted == (3, 3, 2)[rank]
        see(part, network, [[example] for example in data[rank::3]])
        part._total = 8  # agreed by a reduction
        part.step(2, process)
        sums.append(process.reduced[-1])
    assert one.validation.means(sum(sums), 8)["loss"] == pytest.approx(whole["stable_loss/loss"], rel=1e-5)


def test_every_image_and_timestep_has_noise_of_its_own_and_keeps_it():
    """Read back from what the network is given: noisy = alpha x0 + sigma noise."""
    latents = torch.randn(6, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for order in (range(6), reversed(range(6))):
        noise, loss, network = {}, stable(images=6), Network()
        see(loss, network, [[(latents[k], torch.zeros(77, 6), torch.zeros(6))] for k in order])

        def forward(noisy, timesteps, *rest, noise=noise, **named):
            for given, t in zip(noisy, timesteps.tolist(), strict=True):
                alpha, sigma = (
                    float(ZERO.alphas_cumprod[t]) ** 0.5,
                    (1 - float(ZERO.alphas_cumprod[t])) ** 0.5,
                )
                if alpha > 0.1:  # the image is still to be seen
                    rest = torch.stack([(given - alpha * image) / sigma for image in latents])
                    image = int((rest.square().mean((1, 2, 3)) - 1).abs().argmin())
                    noise[image, t] = rest[image]
            return (torch.zeros_like(noisy),)

        network.forward = forward
        loss.step(2, Process(network))
        found.append(noise)
    first, second = found
    assert len(first) == 6 * 2 and first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)
    flat = torch.stack([each.flatten() for each in first.values()])
    assert (torch.corrcoef(flat) - torch.eye(12)).abs().max() < 0.1  # 4096 values: 6 standard deviations


def test_processes_wait_for_each_other(capsys):
    data, network = examples(4), Network()
    loss, process = stable(images=4, processes=2), Process(network, processes=2)
    see(loss, network, [[data[0]], [data[1]]])
    assert (
        loss.complete and loss.step(2, process) is None
    )  # the other process, of whom this reduce knows nothing, is not ready
    assert (
        process.reduced[0].tolist() == [1, 2]
        and "step 2: 2 of 4 images for the stable loss seen so far" in capsys.readouterr().err
    )


def test_training_goes_on_as_if_nothing_had_happened():
    data, network, loss = examples(2), Network(), stable(images=2)
    network.dropout.eval()  # a part in another mode than the whole
    see(loss, network, [[data[0]], [data[1]]])
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), network.mix.weight.clone()
    network.mix.weight.grad = torch.ones_like(weights)
    assert loss.step(2, Process(network))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(network.mix.weight, weights)
    assert network.training and network.mix.training and not network.dropout.training
    assert torch.equal(network.mix.weight.grad, torch.ones_like(weights))


def test_only_every_so_many_optimizer_steps_and_once_each():
    data, network, loss, process = examples(2), Network(), stable(images=2, every=3), None
    see(loss, network, [[data[0]], [data[1]]])
    process = Process(network)
    logged = [step for step in (1, 2, 3, 3, 4, 5, 6, 300, 301) if loss.step(step, process)]
    assert logged == [3, 6, 300]
    reductions = len(process.reduced)
    loss.step(304, process)
    assert len(process.reduced) == reductions == 1 + 3  # nothing is waited for on other steps


def test_images_are_different_ones_and_fewer_where_there_are_fewer():
    data, network, loss = examples(2), Network(), stable(images=4)
    see(loss, network, [[data[0], data[0]]] * 4)
    assert len(loss.kept) == 1 and not loss.complete
    see(loss, network, [[data[1]]] * 8)  # 16 samples, four times what was wanted
    assert len(loss.kept) == 2 and loss.complete
    see(loss, network, [[examples(5)[3]]])
    assert len(loss.kept) == 2 and loss.step(2, Process(network))


def test_only_calls_of_training_count():
    latents, text, ids = (part[None] for part in examples(1)[0])
    network, loss = Network(), stable()
    assert not loss.called(network, latents, text, {"time_ids": ids})  # nothing was noised: a preview
    loss.noised(latents)
    with torch.no_grad():
        assert not loss.called(network, latents, text)  # the trainer's own validation
    assert not loss.called(network, latents, text) and not loss.kept
    see(loss, network, [examples(1)])
    kept = loss.kept[0][0]
    assert (
        kept.device.type == "cpu" and torch.equal(kept, latents[0]) and kept.data_ptr() != latents.data_ptr()
    )  # x0, not the noisy


class Code:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_resumed_run_goes_on_with_the_same_images(tmp_path, capsys):
    data, network = examples(), Network()
    first = stable(images=4, folder=tmp_path)
    see(first, network, [data[0:4:2], data[1:4:2]])
    resumed = stable(images=4, folder=tmp_path, resumed=True)
    assert resumed.complete and capsys.readouterr().err == ""
    see(resumed, network, [data[4::2]])
    assert resumed.step(2, Process(network)) == first.step(2, Process(network))
    assert [file.name for file in tmp_path.iterdir()] == ["stable_loss_1_of_1.pt"]
    for options in (dict(images=5), dict(images=8, processes=2)):
        assert not stable(folder=tmp_path, resumed=True, **options).complete
        assert "no images of an earlier stable loss here" in capsys.readouterr().err
    assert not stable(images=4, folder=tmp_path).complete  # not resumed: begins anew
    said = r"stable_loss_1_of_1\.pt is not what a run with --stable_loss_steps wrote .*: remove it"
    file = tmp_path / "stable_loss_1_of_1.pt"
    for write in (
        lambda: file.write_bytes(b"nothing of the kind"),
        lambda: file.write_bytes(b""),
        lambda: torch.save([torch.zeros(1)], file),
        lambda: torch.save({"wanted": 4}, file),
        lambda: torch.save(Code(tmp_path / "ran"), file),
    ):
        write()
        with pytest.raises(FixError, match=said):
            stable(images=4, folder=tmp_path, resumed=True)
    assert not (tmp_path / "ran").exists()


def test_bfloat16_latents_and_inputs(tmp_path):
    network, loss = Network().bfloat16(), stable(images=2, folder=tmp_path)
    data = [[part.bfloat16() for part in example] for example in examples(2)]
    see(loss, network, [[data[0]], [data[1]]])
    numbers = loss.step(2, Process(network))
    resumed = stable(images=2, folder=tmp_path, resumed=True)
    see(resumed, network, [[data[0]]])
    assert resumed.step(2, Process(network)) == numbers and resumed.kept[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (torch.zeros(2, 8, 4, 4), torch.zeros(2, 77, 6)),
            r"noised are \[2, 4, 4, 4\] and the U-Net is given \[2, 8, 4, 4\]",
        ),
        (
            (torch.zeros(2, 4, 4, 4), torch.zeros(3, 77, 6)),
            r"a tensor of shape \[3, 77, 6\] for a batch of 2",
        ),
        ((torch.zeros(2, 4, 4, 4), object()), "cannot keep a object that the U-Net is given"),
    ],
)
def test_a_call_that_cannot_be_kept_is_refused(arguments, sentence):
    loss = stable()
    loss.noised(torch.zeros(2, 4, 4, 4))
    with pytest.raises(FixError, match=sentence):
        loss.called(Network(), *arguments)


def test_a_network_that_is_dealt_out_is_refused():
    process = Process(Network())
    process.distributed_type = "FSDP"
    with pytest.raises(FixError, match=r"^--stable_loss_steps needs the whole U-Net in every process"):
        stable().step(1, process)


def test_wrong_flags_are_one_sentence():
    for options, sentence in (
        (dict(stable_loss_steps=0), "--stable_loss_steps 0: expected 1 or more"),
        (dict(stable_loss_steps=5, stable_loss_images=-1), "--stable_loss_images -1: expected 1 or more"),
        (dict(stable_loss_images=4), "--stable_loss_images needs --stable_loss_steps"),
    ):
        with pytest.raises(FlagError, match=sentence):
            TrainingFlags(**options)


def test_scripts_with_more_in_the_unet_s_call_have_no_place_for_it():
    calls = "noise_scheduler.add_noise()\nDDPMScheduler.from_pretrained()\nunet()\n"
    assert missing(calls)["validation"] == "it does not call accelerator.log"
    assert "validation" not in missing(calls + "accelerator.log()")
    assert (
        "residuals"
        in missing(calls + "accelerator.log()\nunet(down_block_additional_residuals=[])")["validation"]
    )


@pytest.fixture
def kohya(tmp_path):
    """kohya(**flags): a run of the kohya adapter without a trainer, and the loss it keeps."""

    def begin(**flags):
        SESSION.begin(start(argparse.Namespace(fixes="all", output_dir=str(tmp_path), **flags)))
        return SESSION.run.stable_loss

    yield begin
    SESSION.reset()


class Count:
    """How often each mark of a session's work was reached."""

    def __init__(self, session, monkeypatch):
        self.calls, upstream = {}, session.reached

        def reached(mark):
            self.calls[mark] = self.calls.get(mark, 0) + 1
            upstream(mark)

        monkeypatch.setattr(session, "reached", reached)


def train_as_kohya(network, data, args, accelerator, steps):
    """One example a micro-step, two micro-steps an optimizer step; returns what upstream's functions were
    given."""
    given = []

    def noised(*received):
        given.append(received)
        return None, None, torch.zeros(1, dtype=torch.long)

    kohya_adapter.step_done(
        lambda *received: given.append(received), "pipe", accelerator, args, 0, 0, "rest"
    )  # --sample_at_first
    for step in range(1, steps + 1):
        for example in data[2 * step - 2 : 2 * step]:
            latents, text, ids = (part[None] for part in example)
            kohya_noise.noised(noised, args, "scheduler", latents)
            kohya_adapter.called(Network.forward, network, latents, torch.zeros(1), text, {"time_ids": ids})
        kohya_adapter.step_done(
            lambda *received: given.append(received), "pipe", accelerator, args, None, step, "rest"
        )
    kohya_adapter.step_done(
        lambda *received: given.append(received), "pipe", accelerator, args, 1, steps, "rest"
    )
    return given


class Tracker:
    def __init__(self, name):
        self.name, self.logged = name, []

    def log(self, values, step=None):
        self.logged.append((step, values))


@pytest.mark.parametrize("flags", [{}, {"stable_loss_steps": 1}])
def test_a_compiled_network_stays_one_graph_and_is_not_kept(kohya, flags, monkeypatch):
    loss, network, count = kohya(**flags), Network().eval(), Count(SESSION, monkeypatch)
    latents, text, ids = (part[None] for part in examples(1)[0])

    def forward(*args):
        return kohya_adapter.called(Network.forward, network, *args)[0]

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    if loss:
        loss.noised(latents)
    arguments = latents, torch.zeros(1), text, {"time_ids": ids}
    assert torch.equal(compiled(*arguments), network(*arguments)[0]) and count.calls == {}
    assert loss is None or not loss.kept


@pytest.mark.parametrize(
    ("flags", "backend", "sentence"),
    [
        (dict(torch_compile=True), "no", "--torch_compile"),
        (dict(torch_compile=False), "INDUCTOR", None),  # kohya then tells accelerate not to
        ({}, "INDUCTOR", "--dynamo_backend inductor of accelerate launch"),
        ({}, "NO", None),
    ],
)
def test_under_a_compiled_u_net_the_flag_is_refused_at_the_start(
    kohya, flags, backend, sentence, monkeypatch
):
    from accelerate.utils import TorchDynamoPlugin

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    if not flags:  # what accelerate makes of it
        assert (TorchDynamoPlugin().backend.value.lower() != "no") == (sentence is not None)
    if sentence is None:
        assert kohya(stable_loss_steps=2, **flags) is not None
    else:
        with pytest.raises(
            FlagError, match=rf"^--stable_loss_steps cannot see .* leave it out, or {sentence}$"
        ):
            kohya(stable_loss_steps=2, **flags)
    assert kohya(**flags) is None


@pytest.mark.parametrize("network_trainer", [False, True])
def test_kohyas_trainers_log_after_every_second_optimizer_step(kohya, network_trainer, monkeypatch, capsys):
    extra = dict(
        network_module="networks.lora", network_train_unet_only=False, cache_text_encoder_outputs=False
    )
    flags = dict(
        stable_loss_steps=2,
        stable_loss_images=4,
        min_snr_gamma=5.0,
        v_parameterization=True,
        **(extra if network_trainer else {}),
    )
    loss, network, count = kohya(**flags), Network(), Count(SESSION, monkeypatch)
    said, accelerator, direct = capsys.readouterr().err, Process(network), []
    accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb")]
    accelerator.log = lambda values, step: direct.append((step, values))
    given = train_as_kohya(network, examples(), argparse.Namespace(**flags), accelerator, 4)
    assert len(given) == 8 + 6 and len(loss.kept) == 4 and count.calls["validation"] == 8
    if network_trainer:  # as it logs its own loss: wandb's steps are its calls
        assert [step for step, _ in accelerator.trackers[0].logged] == [2, 4] and not direct
        assert [(step, values["global_step"]) for step, values in accelerator.trackers[1].logged] == [
            (None, 2),
            (None, 4),
        ]
    else:
        assert [step for step, _ in direct] == [2, 4] and "stable_loss/loss_unweighted/t999" in direct[0][1]
    assert ("WARNING: --stable_loss_steps: text embeddings stay as first seen" in said) == network_trainer
    assert "stable loss of 4 images every 2 steps\n" in said


def test_the_loss_is_that_of_the_flags(kohya):
    flags = dict(
        min_snr_gamma=5.0,
        debiased_estimation_loss=True,
        v_parameterization=True,
        zero_terminal_snr=True,
        loss_type="huber",
    )
    objective = kohya(stable_loss_steps=2, **flags).validation.objective
    weights = [weighting.table(ZERO, "v_prediction") for weighting in (MinSNR(5), Debiased())]
    assert (
        objective.weighting.table(objective.schedule, objective.prediction_type).tolist()
        == (weights[0] * weights[1]).tolist()
    )
    assert (
        objective.schedule == ZERO
        and objective.loss_function == ScheduledHuber()
        and objective.perturbation is None
    )


def test_nothing_is_kept_without_the_flag(kohya, monkeypatch):
    assert kohya() is None and "validation" not in SESSION.run.on
    network, count = Network(), Count(SESSION, monkeypatch)
    assert len(train_as_kohya(network, examples(), argparse.Namespace(), Process(network), 2)) == 4 + 4
    assert "validation" not in count.calls


def test_diffusers_scripts_log_at_synchronised_steps_only(monkeypatch):
    network, loss = Network(), stable(images=2)
    session = diffusers_adapter.SESSION
    monkeypatch.setattr(
        session,
        "run",
        argparse.Namespace(
            stable_loss=loss, heldout=None, evaluated=[loss], numbers=loss.step, on={"validation"}
        ),
    )
    monkeypatch.setattr(session, "script", globals())
    count = Count(session, monkeypatch)
    for latents, text, ids in examples(2):
        loss.noised(latents[None])
        diffusers_adapter.called(
            Network.forward, network, latents[None], torch.zeros(1), text[None], added={"time_ids": ids[None]}
        )
    process, logged = Process(network), []
    for step, synchronised in (
        (1, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ):
        process.sync_gradients = synchronised
        diffusers_adapter.log(
            lambda accelerator, values, step: logged.append((step, *values)),
            process,
            {"loss": 1.0},
            step=step,
        )
    assert count.calls == {"validation": 2}
    ours = [(2, "stable_loss/loss"), (4, "stable_loss/loss")]
    theirs = [(step, "loss") for step in (1, 1, 2, 2, 3, 4, 4)]
    assert [entry[:2] for entry in logged] == [*theirs[:4], ours[0], *theirs[4:], ours[1]]
