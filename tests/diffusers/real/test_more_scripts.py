"""Scripts beside text-to-image, DreamBooth and ControlNet: every fix that has a place there gives the loss
that closed forms in float64 give for what the script drew and predicted. Of all SDXL scripts: doctor's
verdict is what a start does. Set DIFFUSERS_EXAMPLES."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_script as runner
from safetensors import safe_open
from test_real_scripts import made, pytestmark, run  # noqa: F401  (fixtures)

from sdxl_fixes import NoiseSchedule

HERE = Path(__file__).resolve().parent
V_ZTSNR = ("--zero_terminal_snr", "--prediction_type", "v_prediction")
RESCALED = ("--terminal_sigma", "300", "--terminal_sigma_method", "rescale")
CASES = {
    "schedule": V_ZTSNR,
    "loss": ("--loss_type", "huber"),
    "weighting": ("--snr_gamma", "5"),
    "noise": ("--ip_noise_gamma", "0.1"),
    "timesteps": ("--stratified_timesteps",),
}
CASES["all"] = tuple(flag for flags in CASES.values() for flag in flags)
SAVED = {
    "instruct": ("unet/diffusion_pytorch_model.safetensors",),
    "inversion": ("learned_embeds.safetensors", "learned_embeds_2.safetensors"),
    "adapter": ("diffusion_pytorch_model.safetensors",),
    "lpl": ("unet/diffusion_pytorch_model.safetensors",),
}


def coefficients(flags):
    """(alpha, sigma) of every timestep: SDXL's own, or its alphas moved affinely so that the first stays and
    the last ends as asked."""
    alpha = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if "--zero_terminal_snr" in flags or "--terminal_sigma" in flags:
        last = 0 if "--zero_terminal_snr" in flags else (1 + 300**2) ** -0.5
        alpha = alpha[0] - (alpha[0] - alpha) * (alpha[0] - last) / (alpha[0] - alpha[-1])
    return alpha, np.sqrt(1 - alpha**2)


def steps(trace, flags):
    """Of every step: timesteps [B], and alpha and sigma of them [B, 1, 1, 1], and the traced tensors in
    float64."""
    tables = coefficients(flags)
    tensors = {
        name: [np.array(value, dtype=np.float64) for value in values]
        for name, values in trace["tensors"].items()
    }
    for k, timesteps in enumerate(np.array(step, dtype=int) for step in trace["timesteps"]):
        alpha, sigma = (table[timesteps].reshape(-1, 1, 1, 1) for table in tables)
        yield timesteps, alpha, sigma, {name: values[k] for name, values in tensors.items()}


def records(folder, script, flags):
    """Every file that the script saved carries the schedule."""
    for name in SAVED[script]:
        with safe_open(folder / name, framework="pt") as file:
            record = NoiseSchedule.from_json(file.metadata()["sdxl_fixes.schedule"])
        assert np.allclose(record.sqrt_alphas_cumprod, coefficients(flags)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("script", ["instruct", "inversion"])
def test_the_loss_is_the_closed_form(run, tmp_path, script, case):  # noqa: F811
    flags = CASES[case]
    _, trace = run("module", script, *flags, tensors=True)
    losses = []
    for timesteps, alpha, sigma, each in steps(trace, flags):
        clean, noise = each["latents"], each["noise"]
        perturbation = each["noisy"] - (alpha * clean + sigma * noise)
        assert (np.abs(perturbation).max() > 1e-3) == ("--ip_noise_gamma" in flags)
        residual = each["predictions"] - (
            alpha * noise - sigma * clean if "--prediction_type" in flags else noise
        )
        loss = residual**2
        if "--loss_type" in flags:
            with np.errstate(divide="ignore"):
                delta = 0.9 / (1 + sigma / alpha) ** 2 + 0.1
            loss = 2 * delta * (np.sqrt(residual**2 + delta**2) - delta)
        if "--snr_gamma" in flags:
            snr = (alpha / sigma) ** 2
            loss = loss * np.minimum(snr, 5) / (snr + 1 if "--prediction_type" in flags else snr)
        if "--stratified_timesteps" in flags:
            assert sorted(timesteps // 500) == [0, 1]
        losses.append(loss.mean())
    assert len(losses) == 3 and trace["losses"] == pytest.approx(losses, rel=1e-5)
    if case in ("schedule", "all"):
        records(tmp_path / "run" / "out", script, flags)


def test_the_adapter_trains_the_sigmas_that_it_is_asked_for(run, tmp_path):  # noqa: F811
    """Its loss, of the denoised image and weighted by 1 / sigma^2, is that of the noise."""
    _, trace = run("module", "adapter", *RESCALED, tensors=True)
    losses = []
    for _, alpha, sigma, each in steps(trace, RESCALED):
        assert np.allclose(each["noisy"], alpha * each["latents"] + sigma * each["noise"], atol=1e-5)
        losses.append(((each["predictions"] - each["noise"]) ** 2).mean())
    # it computes with images of sigma 300 in float32
    assert len(losses) == 3 and trace["losses"] == pytest.approx(losses, rel=1e-3)
    records(tmp_path / "run" / "out", "adapter", RESCALED)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--terminal_sigma", "300", *V_ZTSNR[1:]), "measures v_prediction as if it were epsilon"),
        (V_ZTSNR[:1], "which must be finite"),
    ],
)
def test_the_adapter_refuses_what_it_cannot_train(run, flags, said):  # noqa: F811
    process, _ = run("module", "adapter", *flags, check=False)
    last = process.stderr.strip().splitlines()[-1]
    assert (
        process.returncode == 2
        and last.startswith("sdxl-fixes: this script noises by sigma")
        and said in last
    )


def test_a_perceptual_loss_compares_images_on_the_trained_schedule(run, tmp_path):  # noqa: F811
    every = ("--lpl_t_threshold", "1000", "--lpl_start", "0", "--lpl_weight", "0.5")
    flags = (*RESCALED, *V_ZTSNR[1:])
    _, trace = run("module", "lpl", *flags, *every, tensors=True)
    losses = []
    for _, alpha, sigma, each in steps(trace, flags):
        clean = each["estimated"]
        assert np.allclose(each["noisy"], alpha * clean + sigma * each["noise"], atol=1e-5)
        assert np.allclose(each["estimates"], alpha * each["noisy"] - sigma * each["predictions"], atol=1e-5)
        plain = ((each["predictions"] - alpha * each["noise"] + sigma * clean) ** 2).mean()
        losses.append(plain + 0.5 * each["perceptual"].mean())
    assert len(losses) == 3 and trace["losses"] == pytest.approx(losses, rel=1e-5)
    records(tmp_path / "run" / "out", "lpl", flags)


def test_a_placeholder_of_many_vectors_is_encoded_in_chunks(run):  # noqa: F811
    _, trace = run("module", "inversion", "--max_token_length", "150", "--num_vectors", "80")
    assert set(trace["tokens"]) == {154} and len(trace["losses"]) == 3
    _, plain = run("module", "inversion", "--max_token_length", "150", folder="plain")
    assert plain["losses"] == run("unpatched", "inversion", folder="unpatched")[1]["losses"]


def test_prompts_that_are_encoded_one_by_one_have_one_length(run):  # noqa: F811
    """Those of InstructPix2Pix, with the empty prompt that takes their place now and then."""
    for dropout in ((), ("--conditioning_dropout_prob", "0.3")):
        _, trace = run("module", "instruct", "--max_token_length", "225", *dropout)
        assert trace["tokens"] == [231] * 3 and len(trace["losses"]) == 3


@pytest.fixture(scope="module")
def starts(made):  # noqa: F811
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    examples = Path(os.environ["DIFFUSERS_EXAMPLES"]).resolve()
    command = [sys.executable, str(HERE / "starts.py"), str(examples), str(made / "base")]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=made, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert set(runner.SCRIPTS.values()) <= set(found)
    return found


def test_doctor_says_of_every_sdxl_script_what_its_start_does(starts):
    wrong, refused = [], set()
    for script, found in starts.items():
        report, fits = found["doctor"]
        head, *rest = report.splitlines()
        if ": refused, " in head:
            why = head.partition(": refused, ")[2]
            wrong += [
                (script, fix)
                for fix, said in found["starts"].items()
                if said is None or f"cannot be fixed: {why}; " not in said
            ]
            wrong += [(script, "doctor")] if fits or rest else []
            refused.add(script)
            continue
        verdicts = {
            words[0]: words[1:] for words in (line.split(maxsplit=2) for line in rest if line[:1].isalpha())
        }
        for fix, said in found["starts"].items():
            if fix in verdicts:
                place = verdicts[fix][0] == "fits"
                because = verdicts[fix][1].removeprefix("place ").strip()
                wrong += (
                    []
                    if place == (said is None) and (place or because in said)
                    else [(script, fix, verdicts[fix], said)]
                )
        wrong += [] if found["starts"]["nothing"] is None else [(script, "nothing")]
        wrong += [] if fits else [(script, "libraries")]
    assert not wrong
    assert not refused & set(runner.SCRIPTS.values())
    assert len(refused) + len(runner.SCRIPTS) == len(starts), "a script that is neither tried nor refused"


def test_a_refusal_is_one_sentence(starts):
    for script, found in starts.items():
        for fix, said in found["starts"].items():
            if said is not None:
                lines = [line for line in said.strip().splitlines() if "Warning" not in line]
                assert len(lines) == 1 and lines[0].startswith("sdxl-fixes: "), (script, fix, said)
