"""The loss of a training step as the papers have it, in float64, from a step that a script recorded.

And flags, with what they mean in it."""

import itertools

import numpy as np
import torch


def alphas_cumprod(zero_snr=False, beta_end=0.012, sigma=None, count=1000):
    """By the formulas of latent diffusion and of arXiv:2305.08891, float64; with ``sigma`` the latter's
    affine change of the square roots ends there instead of at SNR 0."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, beta_end**0.5, count) ** 2)
    if zero_snr or sigma is not None:
        root, last = np.sqrt(abar), 0.0 if sigma is None else (1 + sigma**2) ** -0.5
        abar = (last + (root - root[-1]) * (root[0] - last) / (root[0] - root[-1])) ** 2
    return torch.from_numpy(abar)


def flow_levels(shift=1.0, count=1000):
    """s of rectified flow by arXiv:2403.03206 eq. 23, u even in (0, 1]: float64."""
    u = torch.arange(1, count + 1, dtype=torch.float64) / count
    return shift * u / (1 + (shift - 1) * u)


def flow_rows(told, shift=1.0):
    """The rows of the table whose T s the network was told, which must be among them."""
    told, table = torch.as_tensor(told, dtype=torch.float64), 1000 * flow_levels(shift)
    rows = (told[:, None] - table).abs().argmin(1)
    assert torch.allclose(told, table[rows], rtol=1e-7, atol=0)
    return rows


def flow_alphas_cumprod(shift=1.0):
    """alpha^2/(alpha^2 + sigma^2) of alpha = 1 - s, sigma = s: what has the same SNR."""
    s = flow_levels(shift)
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


LAST_SIGMA = float(1 / alphas_cumprod()[-1] - 1) ** 0.5  # of SDXL's own schedule: 14.6


def loss(
    prediction,
    target,
    timesteps,
    abar,
    *,
    v=True,
    flow=False,
    loss="l2",
    c=0.1,
    gradient=None,
    min_snr=None,
    floor=False,
    soft=None,
    debiased=False,
    flow_weight=False,
    share=0.0,
    even=0.0,
    u=None,
    mask=None,
    later=None,
):
    """The mean over all elements of rho m g w u, and of ``later``, weights [B] of the trainer's own.

    The mask is [B, 1, H, W]."""
    t, r = timesteps, prediction.double() - target.double()
    column = (slice(None), None, None, None)
    snr = abar[t] / (1 - abar[t])
    delta = ((1 - c) / (1 + snr**-0.5) ** 2 + c)[column]
    root = torch.sqrt(r**2 + delta**2)
    smooth = 2 * (root - delta)
    rho = {"l2": r**2, "l1": r.abs(), "smooth_l1": smooth, "huber": delta * smooth}[loss]
    slope = {"l2": 2 * r, "l1": r.sign(), "smooth_l1": 2 * r / root, "huber": 2 * delta * r / root}[loss]
    m = torch.ones(1, 1, 1, 1, dtype=torch.float64) if mask is None else mask.double()
    w = torch.ones(len(t), dtype=torch.float64)
    # squared error of the prediction over that of x0
    ratio = (snr.sqrt() + 1) ** 2 if flow else snr + 1
    if min_snr:
        w = w * ((snr + floor).clamp(max=min_snr) / ratio if v or flow else min_snr / snr.clamp(min=min_snr))
    if soft:
        w = w * soft / (snr + soft) * (snr / ratio if v or flow else 1)
    if debiased and flow:
        root_snr = snr.clamp(max=1000).sqrt()
        w = w * root_snr / (root_snr + 1) ** 2
    elif debiased:
        # eps has no limit at SNR 0
        w = w / (snr.clamp(max=1000) + 1 if v else snr.clamp(LAST_SIGMA**-2, 1000).sqrt())
    if flow_weight:
        # the error of eps - x0 by that of v, or of eps, at the same noisy latents
        w = w * ((1 + snr.sqrt()) ** 2 / (snr + 1 if v else snr))
    if share:
        above = (1 / abar - 1).sqrt() > LAST_SIGMA + 1e-3
        p = (1 - share) / 1000 + share * above.double() / above.sum()
        w = w / (1000 * p[t])
    if even:
        w = w / (1000 * evenly(abar, even)[t])
    if u is not None:
        w = w * u
    if later is not None:
        w = w * later.double()
    if gradient == "sample":
        gain = ((2 * r * m).flatten(1).norm(dim=1) / (slope * m).flatten(1).norm(dim=1))[column]
    elif gradient == "batch":
        gain = (2 * r * w[column] * m).norm() / (slope * w[column] * m).norm()
    else:
        gain = 1.0
    return float((rho * m * gain * w[column]).mean())


def evenly(abar, share):
    """Probabilities of draws that are, but for this share, uniform in s = sigma/(1 + sigma)."""
    s = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    middle = (s[1:] + s[:-1]) / 2
    first, last = 2 * s[:1] - middle[:1], (2 * s[-1:] - middle[-1:]).clamp(max=1)
    cells = torch.cat([first, middle, last]).diff()
    return (1 - share) * cells / cells.sum() + share / 1000


def trained(latents, noise, prediction, timesteps, abar, *, v=True, flow=False, **form):
    """The loss of a step in which the network was to predict of ``noise`` on ``latents``: epsilon, or v, or
    with ``flow`` noise - latents."""
    latents, noise, prediction = (
        torch.as_tensor(x, dtype=torch.float64) for x in (latents, noise, prediction)
    )
    timesteps = torch.as_tensor(timesteps, dtype=torch.int64)
    alpha, sigma = (root[timesteps].reshape(-1, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))
    target = noise - latents if flow else alpha * noise - sigma * latents if v else noise
    return loss(prediction, target, timesteps, abar, v=v, flow=flow, **form)


# name -> (flags, what they mean above)
LOSSES = {loss: (["--loss_type", loss], dict(loss=loss)) for loss in ("l2", "l1", "huber", "smooth_l1")}
for kind, norm in itertools.product(("huber", "smooth_l1"), ("sample", "batch")):
    flags = ["--loss_type", kind, "--huber_l2_gradient", norm]
    LOSSES[f"{kind} {norm}"] = (flags, dict(loss=kind, gradient=norm))
TIMESTEPS = {
    "uniform": ([], {}),
    "terminal": (["--stratified_timesteps", "--terminal_timestep_share", "0.3"], dict(share=0.3)),
    "stratified": (
        [
            *("--stratified_timesteps", "--timestep_density", "beta", "--timestep_density_weighted"),
            *("--timestep_uniform_share", "0.2"),
        ],
        dict(even=0.2),
    ),
}


FLOW = (["--flow_weighting"], dict(flow_weight=True))  # beside no other weight


def nearest(timesteps, abar, ratio):
    """The timesteps whose s = sigma/(1 + sigma) is nearest to that of ``ratio`` times the sigmas of
    others."""
    sigma = (1 / abar - 1).sqrt()
    wanted = 1 / (1 + 1 / (ratio * sigma[timesteps]))
    return (1 / (1 + 1 / sigma) - wanted[:, None]).abs().argmin(1)


def weights(gamma):
    """The same for weightings; ``gamma`` is the trainer's name for the flag of min-SNR."""
    return {
        "unweighted": ([], {}),
        "min-SNR": ([gamma, "5"], dict(min_snr=5.0)),
        "floor": ([gamma, "5", "--min_snr_floor"], dict(min_snr=5.0, floor=True)),
        "debiased": (["--debiased_estimation_loss"], dict(debiased=True)),
    }


def covering(rows, strength=3):
    """Some of ``rows``, greedily: every ``strength`` values that a row has together one of them has."""
    places = list(itertools.combinations(range(len(rows[0])), strength))
    sets = {row: {tuple((k, row[k]) for k in chosen) for chosen in places} for row in rows}
    open_ = set().union(*sets.values())
    while open_:
        best = max(rows, key=lambda row: len(sets[row] & open_))
        open_ -= sets[best]
        yield best


def average(recorded, decay):
    """Of the weights p after every step: s_1 = p_1, then s_n = d s_(n-1) + (1 - d) p_n with
    d = min(decay, n/(9 + n)), as one weighted sum."""
    ds = [0.0, *(min(decay, n / (9 + n)) for n in range(2, len(recorded) + 1))]
    kept = [float(torch.tensor(ds[k + 1 :], dtype=torch.float64).prod()) for k in range(len(ds))]
    parts = zip(ds, kept, recorded, strict=True)
    return sum((1 - d) * share * p.double() for d, share, p in parts)
