import math

import torch


def timestep_embedding(timesteps, dim, max_period=10000):
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, dim // 2, dtype=torch.float32) / (dim // 2))
    angles = timesteps[:, None].float() * freqs.to(device=timesteps.device)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def get_size_embeddings(sizes, device):
    return timestep_embedding(torch.flatten(sizes), 8).to(device)
