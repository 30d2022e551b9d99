"""--keep_base on the made-up sd-scripts: the loss for the base's own target, in closed form and float64; what
cannot be converted is refused before anything is loaded."""

import pytest
import torch
from closed_form import LAST_SIGMA, alphas_cumprod, loss
from made_up_trainer import build, forget, run, steps

V = ["--zero_terminal_snr", "--v_parameterization"]
SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py")
CASES = {
    "alone": ([], {}),
    "huber": (
        ["--loss_type", "huber", "--huber_l2_gradient", "sample"],
        dict(loss="huber", gradient="sample"),
    ),
    "weights": (["--min_snr_gamma", "5", "--min_snr_floor"], dict(min_snr=5.0, floor=True)),
    "masked, stratified, perturbed": (
        [
            "--masked_loss",
            "--stratified_timesteps",
            "--ip_noise_gamma",
            "0.5",
            "--ip_noise_gamma_random_strength",
        ],
        {},
    ),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    yield build(tmp_path_factory.mktemp("trainer"))
    forget()


def frozen():
    """The base's weights: those that the scripts start with."""
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False)


def target(step, share, abar):
    """The base's epsilon on the unperturbed sample as v, mixed with the data's v where sigma <= 14.6."""
    t, x0, noise = step["timesteps"], step["latents"].double(), step["noise"].double()
    alpha, s = (root[t].reshape(-1, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))
    x = alpha * x0 + s * noise
    base = (frozen()(x) - s * x) / alpha
    known = s / alpha <= LAST_SIGMA * (1 + 1e-9)
    data = alpha * noise - s * x0
    return torch.where(known, share * base + (1 - share) * data, data)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_loss_is_of_the_base_s_target(trainer, script, share, case):
    flags, form = CASES[case]
    run(trainer, script, *V, "--keep_base", str(share), "--seed", "0", "--max_train_steps", "6", *flags)
    abar, recorded = alphas_cumprod(zero_snr=True), steps(trainer)
    assert len(recorded) == 6
    for step in recorded:
        mask = step["masks"]
        if mask is not None:
            mask = mask.double().reshape(-1, 1, 8, 2, 8, 2).mean((3, 5))
        parts = (step["prediction"], target(step, share, abar), step["timesteps"], abar)
        expected = loss(*parts, mask=mask, later=step["later"], **form)
        assert float(step["loss"]) == pytest.approx(expected, rel=2e-5)
        plain = loss(step["prediction"], step["target"], step["timesteps"], abar, mask=mask, **form)
        assert abs(plain / expected - 1) > 1e-3  # the data's own target would show


def test_the_stable_loss_is_reached_though_the_base_is_asked_first(trainer, caplog):
    flags = ["--stable_loss_steps", "1", "--stable_loss_images", "4", "--max_train_steps", "1"]
    with caplog.at_level("INFO"):
        run(trainer, "sdxl_train.py", *V, *flags, "--keep_base", "1")
    assert "step 1: stable loss" in caplog.text and "(4 images x 10 timesteps)" in caplog.text
    assert "100 % of the target the frozen base's own (epsilon, sigma 0.02917 to 14.6146)" in caplog.text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--keep_base", "1"],
            "the base is sampled already as your flags train, epsilon, sigma 0.02917 to 14.6",
        ),
        ([*V, "--keep_base", "1.5"], "--keep_base 1.5: expected a share in (0, 1], or leave it out"),
        ([*V, "--keep_base", "-1"], "--keep_base -1: expected a share in (0, 1], or leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(trainer, flags, sentence, capsys):
    with pytest.raises(SystemExit):
        run(trainer, "sdxl_train.py", *flags)
    assert sentence in capsys.readouterr().err


def test_without_the_flag_nothing_is_asked(trainer, monkeypatch):
    """Off is bit-identical: the same losses, and no second call."""
    run(trainer, "sdxl_train.py", *V, "--keep_base", "0")
    off = steps(trainer)
    run(trainer, "sdxl_train.py", *V)
    assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(off, steps(trainer), strict=True))
