"""What the made-up scripts share: their flags, their data and a record of every step, from which a test works the losses out by itself."""

import argparse

import library.args as args_util
import library.custom_train_functions as custom_train_functions
import torch


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--config_file")
    parser.add_argument("--loss_type", default="l2")
    parser.add_argument("--huber_schedule", default="snr")
    parser.add_argument("--huber_c", type=float, default=0.1)
    parser.add_argument("--huber_scale", type=float, default=1.0)
    for name in ("min_timestep", "max_timestep", "sample_every_n_steps", "save_every_n_steps", "save_last_n_steps", "max_token_length"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("zero_terminal_snr", "v_parameterization", "masked_loss", "ip_noise_gamma_random_strength", "diffusers", "regularise"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--ip_noise_gamma", type=float)
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--max_train_steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    custom_train_functions.add_custom_train_arguments(parser)
    return args_util.read_config_from_file(parser.parse_args(), parser)


def batches(args):
    """Latents on different scales, so that weights of samples matter; a mask; weights of a picture and a regularisation picture."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.max_train_steps):
        latents = torch.randn(4, 4, 8, 8, generator=generator) * torch.tensor([0.2, 1.0, 3.0, 0.05]).view(-1, 1, 1, 1)
        weights = torch.tensor([1.0, args.prior_loss_weight, 1.0, args.prior_loss_weight]) if args.regularise else torch.ones(4)
        masks = torch.rand(4, 16, 16, generator=generator) if args.masked_loss else None
        yield {"latents": latents, "alpha_masks": masks, "loss_weights": weights}
