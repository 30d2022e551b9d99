"""A training script of our own with the structure of diffusers' SDXL examples: what the adapter needs to
find, in a second of CPU time.

The "U-Net" is a convolution, with --unet one of diffusers' class. Every step's inputs are written to
steps.pt, so that a test can work the losses out by itself.
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from pipelines import StableDiffusionXLPipeline  # a stand-in for diffusers' (tests/data/pipelines.py)
from safetensors.torch import save_file


def parse_args(input_args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--snr_gamma", type=float, default=None)
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--do_edm_style_training", action="store_true")
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--fixed_timestep", type=int, default=None)
    parser.add_argument("--no_loss", action="store_true")
    parser.add_argument("--no_velocity", action="store_true")
    parser.add_argument("--noise_again", type=int, default=None)
    parser.add_argument("--auxiliary_loss", action="store_true")
    parser.add_argument("--skipped_step", type=int, default=None)
    parser.add_argument("--unet", action="store_true")
    parser.add_argument("--save_nothing", action="store_true")
    return parser.parse_args(input_args)


def small_unet(told):
    """What it is told of the noise goes to ``told``."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    unet.time_proj.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    return unet


def main(args):
    accelerator = Accelerator()
    torch.manual_seed(args.seed)
    StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path).save(
        "class_images", args.output_dir
    )
    if args.do_edm_style_training:
        noise_scheduler = EulerDiscreteScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler"
        )
    else:
        noise_scheduler = DDPMScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler"
        )
    weight_dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    told = []
    unet = small_unet(told) if args.unet else torch.nn.Conv2d(4, 4, 3, padding=1)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.01)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
    steps = []
    for number in range(args.max_train_steps):
        model_input = torch.randn(args.train_batch_size, 4, 8, 8).to(weight_dtype)
        noise = torch.randn_like(model_input)
        timesteps = torch.randint(
            0, noise_scheduler.config.num_train_timesteps, (len(model_input),), device=model_input.device
        ).long()
        if args.fixed_timestep is not None:
            timesteps = torch.full_like(timesteps, args.fixed_timestep)
        noisy = noise_scheduler.add_noise(model_input, noise, timesteps)
        if args.noise_again is not None:
            again = torch.full_like(timesteps, args.noise_again)
            noise_scheduler.add_noise(model_input, noise, again)
        if args.unet:
            model_pred = unet(noisy.float(), timesteps, torch.zeros(len(noisy), 1, 8))[0]
        else:
            model_pred = unet(noisy.float())
        if noise_scheduler.config.prediction_type == "v_prediction" and not args.no_velocity:
            target = noise_scheduler.get_velocity(model_input, noise, timesteps)
        else:
            target = noise
        step = dict(
            model_input=model_input,
            noise=noise,
            timesteps=timesteps,
            noisy=noisy,
            model_pred=model_pred,
            target=target,
            **({"told": told.pop()} if args.unet else {}),
        )
        prior_loss = 0.0
        if args.with_prior_preservation:
            model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
            target, target_prior = torch.chunk(target, 2, dim=0)
            prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
        if args.no_loss:
            loss = (model_pred.float() - target.float()).abs().mean()
        elif args.snr_gamma is None:
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        else:
            snr = compute_snr(noise_scheduler, timesteps)
            weights = snr.clamp(max=args.snr_gamma) / snr
            loss = (
                F.mse_loss(model_pred.float(), target.float(), reduction="none").mean([1, 2, 3]) * weights
            ).mean()
        loss = loss + prior_loss
        if args.auxiliary_loss:
            loss = loss + F.mse_loss(
                model_pred.float(),
                model_pred.detach().float().mean([2, 3], keepdim=True).expand_as(model_pred),
            )
        if number == args.skipped_step:
            continue
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({name: tensor.detach().clone() for name, tensor in (step | {"loss": loss}).items()})
    accelerator.save_state(os.path.join(args.output_dir, "checkpoint"))
    torch.save(steps, os.path.join(args.output_dir, "steps.pt"))
    if args.save_nothing:
        return
    StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path).save_pretrained(
        args.output_dir
    )
    weight = next(accelerator.unwrap_model(unet).parameters()).detach().contiguous()
    save_file(
        {"unet.conv.lora_A.weight": weight},
        os.path.join(args.output_dir, "lora.safetensors"),
        metadata={"format": "pt"},
    )
    save_file({"encoder.conv.weight": weight}, os.path.join(args.output_dir, "vae.safetensors"))
    with open(os.path.join(args.output_dir, "args.json"), "w") as file:
        json.dump(
            {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | None)},
            file,
        )


if __name__ == "__main__":
    args = parse_args()
    main(args)
