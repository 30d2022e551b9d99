"""A network whose every answer is known, the steps at which UIs are asked to sample it, and what diffusers'
own Euler makes of both. The UIs' Pythons import this file, too: only torch is needed at its top."""

import torch


class Network(torch.nn.Module):
    """Says something of what it is given and told."""

    dtype = storage_dtype = computation_dtype = torch.float32

    def forward(self, given, told, *args, **others):
        return 0.4 * given + 0.0003 * told.reshape(-1, 1, 1, 1)


def noise():
    return torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2)


def steps(timesteps):
    """The timesteps of 8 steps."""
    return [t * (timesteps - 1) // 999 for t in (999, 856, 713, 571, 428, 285, 142, 0)]


def sampled_by_diffusers(sampling, sigmas):
    """8 steps of diffusers' Euler from noise(); sigmas, the table that is expected of the UI, is where a UI
    ends zero terminal SNR."""
    import diffusers
    import numpy as np

    x, times = noise(), steps(len(sigmas))
    if sampling.prediction_type == "flow_prediction":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas[times].tolist())
        for t in scheduler.timesteps:
            x = scheduler.step(Network()(x, t), t, x).prev_sample
        return x.flatten().numpy()
    schedule = sampling.schedule
    if schedule.zero_terminal:
        schedule = schedule.with_terminal_sigma(sigmas[-1], "last")
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=len(sigmas),
        trained_betas=np.array(schedule.betas),
        prediction_type=sampling.prediction_type,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(timesteps=times)
    np.testing.assert_allclose(scheduler.sigmas[:-1], sigmas[times], rtol=1e-3)
    x = x * sigmas[-1]
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x.flatten().numpy()
