"""A training step in which everything meets, as the papers have it, in float64: what a frozen epsilon base
says, what a sampler's draws weigh, and the loss of both."""

import random

import numpy as np
import torch
from closed_form import (
    LAST_SIGMA,
    alphas_cumprod,
    covering,
    evenly,
    flow_alphas_cumprod,
    loss,
    nearest,
)

SHIFT = 3.0
# name -> (prediction, SNR table)
TRAINED = {
    "v, zero SNR": ("v", alphas_cumprod(zero_snr=True)),
    "v, stock": ("v", alphas_cumprod()),
    "epsilon, 300": ("epsilon", alphas_cumprod(sigma=300)),
    "flow 1": ("flow", flow_alphas_cumprod()),
    "flow 3": ("flow", flow_alphas_cumprod(SHIFT)),
}
# name -> flags of the schedule, and of the prediction by diffusers' names
FLAGS = {
    "v, zero SNR": ["--zero_terminal_snr", "--prediction_type", "v_prediction"],
    "v, stock": ["--prediction_type", "v_prediction"],
    "epsilon, 300": ["--terminal_sigma", "300"],
    "flow 1": ["--prediction_type", "flow_prediction"],
    "flow 3": ["--prediction_type", "flow_prediction", "--flow_shift", str(SHIFT)],
}
EVEN = ["--timestep_density", "beta", "--timestep_uniform_share", "0.2"]
# name -> (flags, what draws() is told)
DRAWN = {
    "uniform": ([], {}),
    "terminal": (["--terminal_timestep_share", "0.3"], dict(share=0.3)),
    "stratified": (["--stratified_timesteps"], {}),
    "density": (EVEN, dict(even=0.2)),
    "density, weighted": (
        [*EVEN, "--timestep_density_weighted", "--stratified_timesteps"],
        dict(even=0.2, weighted=True),
    ),
    "density, weighted, terminal": (
        [*EVEN, "--timestep_density_weighted", "--terminal_timestep_share", "0.3"],
        dict(even=0.2, weighted=True, share=0.3),
    ),
    "density, terminal": (
        [*EVEN, "--terminal_timestep_share", "0.3", "--stratified_timesteps"],
        dict(even=0.2, share=0.3),
    ),
}
SHIFTED = {"every canvas": ([], {}), "by canvas": (["--resolution_shift", "101"], dict(ratio=64 / 101))}
LOSS = {
    "l2": ([], {}),
    "huber": (["--loss_type", "huber"], dict(loss="huber")),
    "smooth_l1 sample": (
        ["--loss_type", "smooth_l1", "--huber_l2_gradient", "sample"],
        dict(loss="smooth_l1", gradient="sample"),
    ),
    "huber batch": (
        ["--loss_type", "huber", "--huber_l2_gradient", "batch"],
        dict(loss="huber", gradient="batch"),
    ),
}
PERTURBED = {
    "still": [],
    "perturbed": ["--ip_noise_gamma", "0.1"],
    "at random": ["--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength"],
}
KEPT = {"none": None, "half": 0.5, "all": 1.0}
WATCHED = {"no": [], "stable loss": ["--stable_loss_steps", "1", "--stable_loss_images", "4"]}


def weights(gamma):
    """name -> (flags, what the loss is told); ``gamma`` is the trainer's name for the flag of min-SNR."""
    return {
        "unweighted": ([], {}),
        "min-SNR": ([gamma, "5"], dict(min_snr=5.0)),
        "floor": ([gamma, "5", "--min_snr_floor"], dict(min_snr=5.0, floor=True)),
        "soft": (["--soft_min_snr_gamma", "5"], dict(soft=5.0)),
        "debiased": (["--debiased_estimation_loss"], dict(debiased=True)),
        "as flow": (["--flow_weighting"], dict(flow_weight=True)),
    }


def makes_sense(trained, weight, drawn, last=1000):
    """Whether the flags go together: the other combinations are refused."""
    kind, abar = TRAINED[trained]
    above = bool(((1 / abar[:last] - 1).sqrt() > LAST_SIGMA * (1 + 1e-9)).any())
    return not ((kind == "flow" and weight == "as flow") or ("terminal" in drawn and not above))


def some(rows, strength, count):
    """Rows in which every ``strength`` values meet that meet among ``count`` of ``rows``."""
    return covering(random.Random(0).sample(rows, count), strength)


def draws(abar, low=0, high=1000, even=None, weighted=False, share=0.0, ratio=None):
    """What a draw weighs at each timestep, [T]: the distribution that the loss is to be of over that of the
    draws, both carried to the timesteps that those of the range become on a smaller canvas."""
    count, rows = high - low, torch.arange(low, high)
    plain = torch.full((count,), 1 / count, dtype=torch.float64)
    wanted = plain
    if even is not None:
        cells = evenly(abar, 0.0)[low:high]
        plain = (1 - even) * cells / cells.sum() + even / count
        wanted = wanted if weighted else plain
    above = ((1 / abar[low:high] - 1).sqrt() > LAST_SIGMA * (1 + 1e-9)).double()
    p = (1 - share) * plain + (share * above / above.sum() if share else 0)
    if ratio is not None:
        rows = nearest(rows, abar, ratio).clamp(low, high - 1)
    return torch.bincount(rows, wanted, 1000) / torch.bincount(rows, p, 1000).clamp(min=1e-300)


def asked(x0, noise, sigma):
    """A stock base's sample at the ratio ``sigma`` [B] and the timestep that it is told, linear in log sigma
    and no further than it was trained."""
    stock = (1 / alphas_cumprod() - 1).sqrt()
    sigma = sigma.clamp(max=LAST_SIGMA)
    told = torch.from_numpy(np.interp(sigma.log(), stock.log(), np.arange(1000.0)))
    column = sigma.reshape(-1, 1, 1, 1)
    return (x0 + column * noise) / torch.sqrt(1 + column**2), told


def known(abar):
    """Where a stock base was trained, [B]."""
    sigma, first = (1 / abar - 1).sqrt(), (1 / alphas_cumprod()[0] - 1).sqrt()
    return (sigma <= LAST_SIGMA * (1 + 1e-9)) & (sigma >= first * (1 - 1e-9))


def target(kind, x0, noise, abar, said, share):
    """What is trained: data's own, where the base knows any mixed with the epsilon that it ``said``; ``abar``
    [B] is of the samples."""
    sigma = (1 / abar - 1).sqrt()
    alpha, s = (root.reshape(-1, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))

    def of(image, noise):
        return {"v": alpha * noise - s * image, "epsilon": noise, "flow": noise - image}[kind]

    if not share:
        return of(x0, noise)
    column = sigma.clamp(max=LAST_SIGMA).reshape(-1, 1, 1, 1)
    sample, _ = asked(x0, noise, sigma)
    image = sample * torch.sqrt(1 + column**2) - column * said
    return torch.where(
        known(abar).reshape(-1, 1, 1, 1), share * of(image, said) + (1 - share) * of(x0, noise), of(x0, noise)
    )


def right(trained, prediction, goal, rows, u, **form):
    """The step's loss."""
    kind, abar = TRAINED[trained]
    return loss(prediction, goal, rows, abar, v=kind == "v", flow=kind == "flow", u=u, **form)
