"""The validation loss: closed forms, independence of everything that must not matter, and the training left
as it was."""

import math
import os
import subprocess
import sys

import pytest
import torch
from two_processes import TWO

from sdxl_fixes import InputPerturbation, MinSNR, NoiseSchedule, Objective, ScheduledHuber, TimestepSampler
from sdxl_fixes.validation import Validation

ZERO = NoiseSchedule.sdxl().zero_terminal_snr()
LATENTS = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def zero(noisy, timesteps, images):
    return torch.zeros_like(noisy)


def test_the_unweighted_loss_of_a_zero_prediction_is_the_target_s_power():
    """E v^2 = alpha^2 + sigma^2 E x0^2, up to the noise of 5 x 1024 values."""
    numbers = Validation(Objective(ZERO, "v_prediction"), points=4)(zero, LATENTS)
    power = float((LATENTS**2).mean())
    assert sorted(numbers) == [
        "loss",
        "loss_unweighted",
        *(f"loss_unweighted/t{t}" for t in (249, 499, 749, 999)),
    ]
    for t in (249, 499, 749, 999):
        expected = ZERO.alphas_cumprod[t] + (1 - ZERO.alphas_cumprod[t]) * power
        assert numbers[f"loss_unweighted/t{t}"] == pytest.approx(expected, rel=0.1)
    assert numbers["loss_unweighted/t999"] == pytest.approx(power, rel=1e-6)  # v is -x0 there: no noise in it
    assert numbers["loss"] == numbers["loss_unweighted"]


def test_a_perfect_network_has_no_loss():
    """The network is given exactly the noisy latents of the noise that Validation.noise says."""
    validation = Validation(
        Objective(ZERO, "v_prediction", perturbation=InputPerturbation(0.3)), points=3, seed=4
    )

    def knows(noisy, timesteps, images):
        noise = torch.stack(
            [
                validation.noise(int(i), int(t), LATENTS.shape[1:])
                for i, t in zip(images, timesteps, strict=True)
            ]
        )
        alpha, sigma = (
            torch.tensor(table[timesteps.tolist()]).float().reshape(-1, 1, 1, 1)
            for table in ZERO.levels()[:2]
        )
        assert torch.allclose(noisy, alpha * LATENTS[images] + sigma * noise, atol=1e-6)
        return alpha * noise - sigma * LATENTS[images]

    assert validation(knows, LATENTS)["loss_unweighted"] == pytest.approx(0, abs=1e-10)


def test_the_weighted_loss_is_the_objective_s():
    weighting, loss = MinSNR(5, floor=True), ScheduledHuber(schedule="snr", c=0.1)
    sampler = TimestepSampler(ZERO, terminal_share=0.5)
    objective = Objective(ZERO, "v_prediction", loss, weighting, timesteps=sampler)
    validation = Validation(objective, points=2)
    expected = []
    for t in (499, 999):
        for i in range(5):
            step = objective.draw(
                LATENTS[i : i + 1],
                index=torch.tensor([t]),
                noise=validation.noise(i, t, LATENTS.shape[1:])[None],
            )
            residual = -step.target.double()
            delta = float(loss.delta(ZERO)[t])
            huber = (2 * delta * ((residual**2 + delta**2).sqrt() - delta)).mean()
            expected.append(float(huber) * weighting.table(ZERO, "v_prediction")[t])
    assert validation(zero, LATENTS)["loss"] == pytest.approx(sum(expected) / 10, rel=1e-5)


def test_batches_processes_and_what_was_drawn_before_do_not_matter():
    class Process:
        num_processes = 3

        def __init__(self, index, sums):
            self.process_index, self.sums = index, sums

        def reduce(self, sums, how):
            assert how == "sum"
            self.sums.append(sums)
            return sums

    net = torch.nn.Conv2d(4, 4, 1)

    def predict(noisy, timesteps, images):
        return net(noisy) * (1 + images.reshape(-1, 1, 1, 1))

    validation = Validation(Objective(ZERO, "v_prediction"), points=7)
    whole = validation(predict, LATENTS)
    torch.randn(100)
    assert validation(predict, LATENTS, batch_size=3) == pytest.approx(whole, rel=1e-6)
    sums = []
    for index in range(3):
        validation(predict, LATENTS, accelerator=Process(index, sums))
    total = sum(sums) / len(LATENTS)
    assert float(total[0].mean()) == pytest.approx(whole["loss"], rel=1e-6)
    assert float(total[1, -1]) == pytest.approx(whole["loss_unweighted/t999"], rel=1e-6)
    assert (
        Validation(Objective(ZERO, "v_prediction"), points=7, seed=1)(predict, LATENTS)["loss"]
        != whole["loss"]
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_process_calls_the_network_equally_often(batch_size):
    """A network that is dealt out waits in every call for all of them: 5 images at 7 timesteps make shares of
    9, 9, 9 and 8 evaluations."""
    validation = Validation(Objective(ZERO, "v_prediction"), points=7)
    calls, sums = [0] * 4, []
    for k in range(4):

        def predict(noisy, timesteps, images, k=k):
            calls[k] += 1
            return noisy

        sums.append(validation.sums(predict, LATENTS, batch_size=batch_size, share=(k, 4)))
    whole = validation.sums(lambda noisy, *_: noisy, LATENTS)
    assert set(calls) == {math.ceil(9 / batch_size)} and torch.allclose(sum(sums), whole, rtol=1e-5)


def test_noise_is_independent_between_images_and_timesteps():
    validation = Validation(Objective(ZERO, "v_prediction"))
    drawn = torch.stack([validation.noise(i, t, (64, 64)).flatten() for i in range(4) for t in (1, 2, 999)])
    assert (torch.corrcoef(drawn) - torch.eye(12)).abs().max() < 5 / math.sqrt(4096)


def test_training_goes_on_as_if_nothing_had_happened():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Conv2d(4, 4, 1))
    frozen = torch.nn.Dropout(0.5).eval()
    objective = Objective(ZERO, "v_prediction", timesteps=TimestepSampler(ZERO, stratified=True))

    def predict(noisy, timesteps, images):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        return model(noisy)

    torch.manual_seed(0)
    expected = (objective.draw(LATENTS).noisy, torch.rand(4))
    objective.timesteps.load_state_dict({**objective.timesteps.state_dict(), "drawn": 0})
    torch.manual_seed(0)
    Validation(objective)(predict, LATENTS, models=(model, frozen))
    assert model.training and not frozen.training
    assert torch.equal(objective.draw(LATENTS).noisy, expected[0]) and torch.equal(torch.rand(4), expected[1])

    def fails(noisy, timesteps, images):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Validation(objective)(fails, LATENTS, models=(model,))
    assert model.training


def test_gathered_parts_are_let_go_after_it_also_on_errors():
    """FSDP2's modules have a method ``reshard``, which their backward pass calls: none comes here."""
    calls = []

    class Part(torch.nn.Conv2d):
        def reshard(self):
            calls.append(self.training)

    model = torch.nn.Sequential(torch.nn.Dropout(0.5), Part(4, 4, 1))
    validation = Validation(Objective(ZERO, "v_prediction"), points=2)

    def predict(noisy, timesteps, images):
        assert len(calls) == before
        return model(noisy)

    def fails(noisy, timesteps, images):
        raise RuntimeError("out of memory")

    before = len(calls)
    validation(predict, LATENTS, models=(model,))
    assert calls == [True]
    with pytest.raises(RuntimeError, match="out of memory"):
        validation(fails, LATENTS, models=(model,))
    assert calls == [True, True]


SHARDED = """
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from sdxl_fixes import NoiseSchedule, Objective
from sdxl_fixes.validation import Validation

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 4, 1))
whole = [p.detach().clone() for p in model.parameters()]
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
fully_shard(model[0], mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
validation = Validation(Objective(NoiseSchedule.sdxl(), "v_prediction"), points=3)
share = (torch.distributed.get_rank(), 2)
sums = validation.sums(lambda noisy, *_: model(noisy), latents, (model,), batch_size=2, share=share)
torch.distributed.all_reduce(sums)
alone = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 4, 1))
with torch.no_grad():
    for p, value in zip(alone.parameters(), whole):
        p.copy_(value)
wanted = validation.sums(lambda noisy, *_: alone(noisy), latents, batch_size=2)
torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=0)
assert all(isinstance(p, DTensor) for p in model.parameters()), "gathered parts were not let go"
assert [*map(id, model.parameters())] == [*map(id, optimizer.param_groups[0]["params"])]
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_network_that_fsdp2_deals_out(tmp_path):
    """Two gloo processes have the sums of a whole network, and then train the optimizer's parameters."""
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, *TWO, str(tmp_path / "sharded.py")]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_impossible_numbers_of_points_are_refused():
    for points in (0, 1001):
        with pytest.raises(
            ValueError, match=rf"points must lie in 1..1000, the trained timesteps, got {points}"
        ):
            Validation(Objective(ZERO, "v_prediction"), points=points)
    with pytest.raises(ValueError, match=r"noise has shape \(1,\), the latents \(5, 4, 16, 16\)"):
        Objective(ZERO, "v_prediction").draw(LATENTS, noise=torch.zeros(1))


def test_half_precision_latents_and_flow():
    for prediction_type in ("flow_prediction", "sample"):
        numbers = Validation(Objective(ZERO, prediction_type), points=2)(zero, LATENTS.bfloat16())
        assert all(math.isfinite(value) for value in numbers.values())


def test_huber_s_batch_gain_does_not_make_it_depend_on_the_batch():
    validation = Validation(Objective(ZERO, "v_prediction", ScheduledHuber(l2_gradient="batch")), points=4)
    plain = Validation(Objective(ZERO, "v_prediction", ScheduledHuber()), points=4)
    assert validation(zero, LATENTS, batch_size=3) == pytest.approx(
        validation(zero, LATENTS, batch_size=8), rel=1e-6
    )
    assert validation(zero, LATENTS)["loss"] == plain(zero, LATENTS)["loss"]


def test_parts_of_a_model_go_back_to_their_own_modes():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval())
    model[1].eval()

    def predict(noisy, timesteps, images):
        assert not any(module.training for module in model.modules())
        return noisy

    Validation(Objective(ZERO, "v_prediction"), points=1)(predict, LATENTS, models=(model,))
    assert [module.training for module in model.modules()] == [True, True, False]
