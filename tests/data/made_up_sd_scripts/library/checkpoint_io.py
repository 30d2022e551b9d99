import os

import library.huggingface_util as huggingface_util


def save_sd_model_on_epoch_end_or_stepwise_common(
    args, on_epoch_end, accelerator, save_stable_diffusion_format, use_safetensors, epoch, num_train_epochs, global_step, sd_saver, diffusers_saver
):
    """Saves, uploads, and removes the file of two saves before."""
    name = "step{:08d}.safetensors"
    file = os.path.join(args.output_dir, name.format(global_step))
    sd_saver(file, epoch, global_step)
    huggingface_util.upload(args, file, "/" + os.path.basename(file))
    old = os.path.join(args.output_dir, name.format(global_step - 2))
    if os.path.exists(old):
        os.remove(old)
