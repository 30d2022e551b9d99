import torch


def get_timesteps(min_timestep, max_timestep, b_size, device):
    if min_timestep < max_timestep:
        return torch.randint(min_timestep, max_timestep, (b_size,)).to(device)
    return torch.full((b_size,), max_timestep, device=device)


def get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents):
    noise = torch.randn_like(latents)
    timesteps = get_timesteps(args.min_timestep or 0, args.max_timestep or 1000, len(latents), latents.device)
    seen = noise
    if args.ip_noise_gamma:
        strength = torch.rand(1) if args.ip_noise_gamma_random_strength else 1.0
        seen = noise + args.ip_noise_gamma * strength * torch.randn_like(latents)
    return noise, noise_scheduler.add_noise(latents, seen, timesteps), timesteps


def get_huber_threshold_if_needed(args, timesteps, noise_scheduler):
    if args.loss_type not in ("huber", "smooth_l1"):
        return None
    return torch.full((len(timesteps),), args.huber_c)


def conditional_loss(model_pred, target, loss_type, reduction, huber_c=None):
    residual = model_pred - target
    if loss_type == "l2":
        values = residual**2
    elif loss_type == "l1":
        values = residual.abs()
    else:
        delta = huber_c.view(-1, 1, 1, 1)
        values = 2 * (torch.sqrt(residual**2 + delta**2) - delta) * (delta if loss_type == "huber" else 1)
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()
