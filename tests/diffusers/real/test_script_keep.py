"""--keep_base in the unmodified example scripts: the loss that the frozen base, asked beside them in float64,
makes it. Set DIFFUSERS_EXAMPLES."""

import frozen_base
import pytest
import torch
from closed_form import alphas_cumprod, loss
from test_real_scripts import made, pytestmark, run  # noqa: F401  (fixtures)

V = ("--zero_terminal_snr", "--prediction_type", "v_prediction")
FIXES = ("--loss_type", "huber", "--snr_gamma", "5", "--min_snr_floor", "--ip_noise_gamma", "0.1")
FAST = ("--learning_rate", "1e-2")


def right(trace, share, halves=False, steps=3, **form):
    abar, found = alphas_cumprod(zero_snr=True), []
    names = ("latents", "noise", "predictions", "base")
    for *tensors, timesteps in zip(
        *(trace["tensors"][name] for name in names), trace["timesteps"], strict=True
    ):
        x0, noise, prediction, said = map(torch.tensor, tensors)
        goal, t = frozen_base.target(said, x0, noise, timesteps, share), torch.tensor(timesteps)
        parts = [slice(None)] if not halves else [slice(len(t) // 2), slice(len(t) // 2, None)]
        found.append(sum(loss(prediction[p], goal[p], t[p], abar, **form) for p in parts))
    assert len(found) == steps and trace["losses"] == pytest.approx(found, rel=2e-5)


@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "dreambooth"])
def test_the_loss_is_of_the_frozen_base_s_target(run, script):  # noqa: F811
    process, trace = run("module", script, *V, *FAST, "--keep_base", "0.75", tensors="base")
    right(trace, 0.75)
    copied = "a frozen copy of the U-Net" in process.stderr + process.stdout
    assert copied == (script == "t2i")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["t2i", "t2i_lora", "advanced"])
def test_with_every_other_fix_and_checkpointing(run, script):  # noqa: F811
    flags = (*V, *FAST, *FIXES, "--gradient_checkpointing", "--stable_loss_steps", "2", "--keep_base", "1")
    right(run("module", script, *flags, tensors="base")[1], 1.0, loss="huber", min_snr=5.0, floor=True)


@pytest.mark.slow
def test_both_halves_of_prior_preservation(run, made, tmp_path):  # noqa: F811
    flags = (
        *("--with_prior_preservation", "--class_prompt", "a photo", "--num_class_images", "2"),
        *("--class_data_dir", str(made / "plain")),
    )
    right(run("module", "dreambooth", *V, *FAST, *flags, "--keep_base", "1", tensors="base")[1], 1.0, True)


@pytest.mark.slow
def test_a_resumed_finetuning_has_the_base_and_not_the_state(run):  # noqa: F811
    flags = (*V, *FAST, "--keep_base", "1", "--checkpointing_steps", "2")
    run("module", "t2i", *flags)
    again = ("--resume_from_checkpoint", "checkpoint-2")
    right(run("module", "t2i", *flags, *again, tensors="base")[1], 1.0, steps=1)


@pytest.mark.parametrize("script", ["controlnet", "instruct", "inversion"])
def test_scripts_that_train_no_whole_u_net_are_refused(run, script):  # noqa: F811
    process, trace = run("module", script, *V, "--keep_base", "1", check=False)
    assert process.returncode == 2 and "the fix 'keep'" in process.stderr and not trace["losses"]


def test_what_makes_no_sense_is_refused(run):  # noqa: F811
    process, _ = run("module", "t2i", "--keep_base", "1", check=False)
    assert process.returncode == 2 and "is sampled already as your flags train" in process.stderr
    process, _ = run("module", "dreambooth", *V, "--train_text_encoder", "--keep_base", "1", check=False)
    assert process.returncode == 2 and "leave --train_text_encoder" in process.stderr
