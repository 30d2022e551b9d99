"""python record.py FILE: inputs and outputs of sd-scripts' own functions, as data, for tests that have no
checkout. Needs SD_SCRIPTS."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import checkouts

sys.path.insert(0, str(checkouts.first()))
import library.custom_train_functions as functions
import library.train_util as train_util
import torch
from diffusers import DDPMScheduler

TIMESTEPS = [0, 1, 17, 250, 499, 500, 750, 900, 950, 990, 998, 999]
RESIDUALS = [-10.0, -1.0, -0.3, -0.01, 0.001, 0.05, 0.5, 2.0]


def scheduler():
    made = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
    )
    functions.prepare_scheduler_for_custom_training(made, "cpu")
    return made


def record():
    t, stock = torch.tensor(TIMESTEPS), scheduler()
    out = {"timesteps": TIMESTEPS, "residuals": RESIDUALS, "thresholds": {}, "losses": {}, "weights": {}}
    for schedule in ("constant", "exponential", "snr"):
        for c, scale in ((0.1, 1.0), (0.3, 1.0), (0.1, 2.5)):
            args = argparse.Namespace(
                loss_type="huber", huber_schedule=schedule, huber_c=c, huber_scale=scale
            )
            out["thresholds"][f"{schedule} {c} {scale}"] = train_util.get_huber_threshold_if_needed(
                args, t, stock
            ).tolist()
    residual = torch.tensor(RESIDUALS).reshape(1, -1, 1, 1)
    for kind in ("huber", "smooth_l1"):
        for delta in (0.1, 0.37, 1.0):
            loss = train_util.conditional_loss(
                residual, torch.zeros_like(residual), kind, "none", torch.tensor([delta])
            )
            out["losses"][f"{kind} {delta}"] = loss.flatten().tolist()
    ones = torch.ones(len(t))
    for v in (False, True):
        name = "v_prediction" if v else "epsilon"
        out["weights"][f"min_snr 5 {name}"] = functions.apply_snr_weight(ones, t, stock, 5.0, v).tolist()
        out["weights"][f"debiased {name}"] = functions.apply_debiased_estimation(ones, t, stock, v).tolist()
    out["weights"]["epsilon_like v_prediction"] = functions.scale_v_prediction_loss_like_noise_prediction(
        ones, t, stock
    ).tolist()
    out["weights"]["plus_v_like 0.1 epsilon"] = functions.add_v_prediction_like_loss(
        ones, t, stock, 0.1
    ).tolist()
    rescaled = scheduler()
    functions.fix_noise_scheduler_betas_for_zero_terminal_snr(rescaled)
    out["ztsnr_alphas_cumprod"] = rescaled.alphas_cumprod[t].tolist()
    args = argparse.Namespace(
        **dict.fromkeys(
            (
                "noise_offset",
                "multires_noise_iterations",
                "min_timestep",
                "max_timestep",
                "adaptive_noise_scale",
            )
        ),
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=False,
        noise_offset_random_strength=False,
    )
    torch.manual_seed(3)
    latents = torch.randn(3, 4, 2, 2)
    noise, noisy, drawn = train_util.get_noise_noisy_latents_and_timesteps(args, stock, latents)
    velocity = stock.get_velocity(latents, noise, drawn)
    tensors = {"latents": latents, "noise": noise, "noisy": noisy, "timesteps": drawn, "velocity": velocity}
    out["noising, seed 3, ip_noise_gamma 0.1"] = {name: tensor.tolist() for name, tensor in tensors.items()}
    return out


if __name__ == "__main__":
    commit = subprocess.run(
        ["git", "-C", str(checkouts.first()), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    Path(sys.argv[1]).write_text(json.dumps({"sd-scripts": commit, **record()}, indent=1) + "\n")
