from pathlib import Path

from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file


def save_stable_diffusion_checkpoint(output_file, unet, metadata):
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}, output_file, metadata)


def save_diffusers_checkpoint(output_dir, unet):
    EulerDiscreteScheduler().save_pretrained(Path(output_dir) / "scheduler")
