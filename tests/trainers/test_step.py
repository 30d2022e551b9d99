"""The loss of one step in every way that adapters ask for it, and which timesteps a part of a batch has."""

import pytest
import torch
from closed_form import alphas_cumprod, loss

from sdxl_fixes import Debiased, Loss, MinSNR, NoiseSchedule, ScheduledHuber
from sdxl_fixes.errors import FixError
from sdxl_fixes.trainers.step import StepLoss, StepState

SCHEDULE, ABAR = NoiseSchedule.sdxl().zero_terminal_snr(), alphas_cumprod(zero_snr=True)
T = torch.tensor([10, 400, 800, 999])


def tensors(seed=0):
    """prediction, target [4, 4, 8, 8] with residuals on different scales."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return prediction * torch.tensor([0.1, 1.0, 3.0, 10.0]).reshape(-1, 1, 1, 1), target


def mask():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))


IMPORTANCE, LATER = torch.tensor([2.0, 0.5, 1.0, 3.0]), torch.tensor([1.0, 0.25, 1.0, 0.25])
MIN_SNR = MinSNR(5, floor=True)
FORM = dict(min_snr=5.0, floor=True)
HUBERS = [(kind, gradient) for kind in ("huber", "smooth_l1") for gradient in (None, "sample", "batch")]


@pytest.mark.parametrize("later", [None, LATER], ids=["", "later"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "gradient"), [("l2", None), ("l1", None), *HUBERS])
def test_mask_importance_and_the_trainers_own_weights(kind, gradient, masked, later):
    """``later`` is in the gain of l2_gradient="batch", not in the result: the trainer multiplies by it."""
    function = Loss(kind) if kind in ("l2", "l1") else ScheduledHuber(kind, l2_gradient=gradient)
    step_loss, (prediction, target) = StepLoss(SCHEDULE, "v_prediction", function, MIN_SNR), tensors()
    m = mask() if masked else None
    ours = step_loss(prediction, target, T, m, IMPORTANCE, later, reduction="sample")
    ours = ours if later is None else ours * later
    together = IMPORTANCE if later is None else IMPORTANCE * later
    form = dict(loss=kind, gradient=gradient, mask=m, later=together, **FORM)
    assert ours.mean().item() == pytest.approx(loss(prediction, target, T, ABAR, **form), rel=2e-6)


def test_the_trainers_own_weights_matter_to_the_batchs_gradient_alone():
    prediction, target = tensors()
    for gradient, matters in ((None, False), ("sample", False), ("batch", True)):
        step_loss = StepLoss(SCHEDULE, "v_prediction", ScheduledHuber(l2_gradient=gradient))
        without, with_them = step_loss(prediction, target, T), step_loss(prediction, target, T, later=LATER)
        assert (without.item() != pytest.approx(with_them.item(), rel=1e-4)) == matters


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_reductions_are_of_the_same_values(kind):
    function = Loss(kind) if kind in ("l2", "l1") else ScheduledHuber(kind)
    step_loss, (prediction, target) = StepLoss(SCHEDULE, "v_prediction", function, MIN_SNR), tensors()
    parts, reductions = (prediction, target, T, mask(), IMPORTANCE), ("none", "sample", "sum", "mean")
    got = {reduction: step_loss(*parts, reduction=reduction) for reduction in reductions}
    assert [tuple(got[r].shape) for r in got] == [(4, 4, 8, 8), (4,), (), ()]
    values = got["none"].double()
    torch.testing.assert_close(got["sample"].double(), values.mean((1, 2, 3)), rtol=1e-6, atol=0)
    assert got["sum"].item() == pytest.approx(values.sum().item(), rel=1e-6)
    assert got["mean"].item() == pytest.approx(values.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="unknown reduction 'median': expected one of mean, sum"):
        step_loss(prediction, target, T, reduction="median")


@pytest.mark.parametrize("masked", [False, True])
def test_a_trainers_own_loss_takes_the_place_of_ours_and_is_weighted_the_same(masked):
    (prediction, target), m = tensors(), mask() if masked else None
    step_loss = StepLoss(SCHEDULE, "v_prediction", ScheduledHuber(), MIN_SNR)  # whose Huber is then not asked
    own = (prediction - target) ** 2
    ours = step_loss(prediction, target, T, m, IMPORTANCE, values=own)
    form = dict(loss="l2", mask=m, later=IMPORTANCE, **FORM)
    assert ours.item() == pytest.approx(loss(prediction, target, T, ABAR, **form), rel=2e-6)
    line = (prediction[:, :, 0], target[:, :, 0], T, None, IMPORTANCE)
    three = step_loss(*line, values=own[:, :, 0], reduction="none")  # of any shape [B, ...]
    torch.testing.assert_close(three, own[:, :, 0] * step_loss.weights(T, IMPORTANCE).reshape(-1, 1, 1))


def test_weights_are_a_product_and_none_where_all_are_1():
    plain, weighted = (StepLoss(SCHEDULE, "v_prediction", weighting=w) for w in (None, Debiased()))
    assert plain.weights(T) is None and plain.weights(T, IMPORTANCE) is IMPORTANCE
    snr = ABAR[T] / (1 - ABAR[T])
    right = 1 / (snr.clamp(max=1000) + 1)
    torch.testing.assert_close(weighted.weights(T).double(), right, rtol=1e-6, atol=0)
    both = weighted.weights(T, IMPORTANCE).double()
    torch.testing.assert_close(both, right * IMPORTANCE, rtol=1e-6, atol=0)


def test_the_delta_of_the_timesteps():
    huber = StepLoss(SCHEDULE, "v_prediction", ScheduledHuber(c=0.2))
    right = 0.8 / (1 + ((1 - ABAR[T]) / ABAR[T]).sqrt()) ** 2 + 0.2
    torch.testing.assert_close(huber.delta(T).double(), right, rtol=1e-6, atol=0)
    assert huber.delta(T, 4).shape == (4, 1, 1, 1) and StepLoss(SCHEDULE, "v_prediction").delta(T) is None


# ---------------------------------------------------------------- which timesteps a part of a batch has


def state(count=4):
    return StepState(timesteps=torch.arange(count))


def batch(count=4):
    return torch.randn(count, 4, 2, 2, requires_grad=True) * 1.0


SPLITS = {
    "chunk": lambda x: torch.chunk(x, 2, dim=0),
    "split": lambda x: torch.split(x, 2),
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2),
}
AFTER = {
    "as it is": lambda x: x,
    "a cast": lambda x: x.float(),
    "to bfloat16 and back": lambda x: x.bfloat16().float(),
    "a view": lambda x: x.reshape(2, -1),
    "another memory format": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_have_their_own_timesteps(split, after, dtype):
    first, second = (after(half) for half in split(batch().to(dtype)))
    assert state().of(first).tolist() == [0, 1] and state().of(second).tolist() == [2, 3]
    assert state().of(second).tolist() == [2, 3]  # asked again, and in any order


def test_a_whole_batch_has_all_of_them_however_it_came_about():
    for whole in (batch(), batch().float(), batch().detach(), torch.cat(torch.chunk(batch(), 2))):
        assert state().of(whole).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "part",
    [
        lambda: batch()[:2],  # a slice: which one cannot be told
        lambda: torch.chunk(batch().detach(), 2)[0],  # no history
        lambda: batch().tensor_split(2)[0],  # slices
        lambda: torch.chunk(batch(), 4)[0],  # a quarter
        lambda: batch(3),
        lambda: sum(torch.chunk(batch(), 2)),  # of both
    ],
)
def test_a_part_that_cannot_be_told_stops_the_training(part):
    with pytest.raises(FixError, match=r"^the loss is of \d samples and 4 were noised, .*: give --fixes all"):
        state().of(part())


def test_a_loss_before_any_noising_stops_the_training():
    with pytest.raises(FixError, match=r"^a loss was computed before any latents were noised: give --fixes"):
        StepState().of(batch())


def test_noise_in_half_precision_is_perturbed_in_float32():
    """A perturbation of a tenth, drawn and added in bfloat16, would lose most of its digits."""
    from sdxl_fixes.checkpoint import Sampling
    from sdxl_fixes.noise import InputPerturbation
    from sdxl_fixes.trainers.noising import Noising

    schedule, t = NoiseSchedule.sdxl(), torch.tensor([0, 999])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.manual_seed(2)
    trained = Sampling(schedule, "epsilon")
    noisy = Noising(trained, InputPerturbation(0.1)).add_noise(torch.zeros(2, 4, 8, 8), noise, t)
    torch.manual_seed(2)
    seen = noise.double() + 0.1 * torch.randn(2, 4, 8, 8).double()
    sigma = torch.from_numpy(schedule.sqrt_one_minus_alphas_cumprod[t.numpy()]).reshape(-1, 1, 1, 1)
    assert torch.allclose(noisy.double(), sigma * seen, rtol=1e-6, atol=1e-7)
