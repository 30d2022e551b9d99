"""A made-up full finetune with the loop of sd-scripts' sdxl_train.py: epochs, accumulation, states, previews,
and data that is drawn anew."""

import json
import math
import random

import library.args as args_util
import library.dataset as dataset_util
import library.logging_util as logging_util
import library.loss as loss_util
import library.model_io as model_io
import library.sampling as sampling
import library.sdxl_model_util as sdxl_model_util
import library.sdxl_train_util as sdxl_train_util
import torch
import training
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from library.custom_train_functions import prepare_scheduler_for_custom_training
from library.sdxl_original_unet import SdxlUNet2DConditionModel
from tqdm import tqdm


class Info:
    num_repeats, bucket_reso = 1, (64, 64)

    def __init__(self, number):
        self.absolute_path = f"/pictures/{number}.png"


class Group(torch.utils.data.Dataset):
    """Five batches, of which every epoch's draws differ."""

    batch_size, seed, epoch, step = 2, 3, 0, 0

    def __init__(self, count):
        self.datasets, self.image_data = [self], {n: Info(n) for n in range(count)}

    def __len__(self):
        return len(self.image_data)

    def set_current_epoch(self, epoch):
        self.epoch = epoch

    def set_current_step(self, step):
        self.step = step

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(100 * self.epoch + index)
        crop = random.random() + float(torch.rand(()))
        return {"latents": torch.randn(2, 4, 8, 8, generator=generator) + crop + self.step, "number": index}


class Tracker:
    """accelerate's trackers, as a file."""

    name = "file"

    def __init__(self, path):
        self.path = path

    def log(self, values, step=None, **_):
        assert all(isinstance(value, (int, float)) for value in values.values())
        with open(self.path, "a") as file:
            print(json.dumps([step, values]), file=file)


def train(args):
    args_util.verify_training_args(args)
    set_seed(args.seed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps or 1)
    train_dataloader = torch.utils.data.DataLoader(
        Group(args.pictures), batch_size=1, shuffle=True, collate_fn=dataset_util.collator_class(0, 0, None)
    )
    unet = SdxlUNet2DConditionModel()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.01, momentum=0.5)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    steps_from_state = None
    if args.resume:
        accelerator.load_state(args.resume)
        steps_from_state = 1
    num_train_epochs = math.ceil(
        args.max_train_steps / math.ceil(len(train_dataloader) / (args.gradient_accumulation_steps or 1))
    )
    progress_bar = tqdm(range(args.max_train_steps), disable=True)
    initial_step = 0
    if steps_from_state is not None:
        initial_step = steps_from_state
    assert initial_step < args.max_train_steps
    global_step = 0
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    prepare_scheduler_for_custom_training(noise_scheduler, accelerator.device)
    sampling.sample_images_common(None, accelerator, args, 0, global_step)
    accelerator.trackers = [Tracker(f"{args.output_dir}/tracked.jsonl")]
    loss_recorder = logging_util.LossRecorder()
    for epoch in range(num_train_epochs):
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
                latents = batch["latents"].to(accelerator.device)
                if torch.any(torch.isnan(latents)):
                    accelerator.print("NaN found in latents, replacing with zeros")
                    latents = torch.nan_to_num(latents, 0, out=latents)
                noise, noisy, timesteps = loss_util.get_noise_noisy_latents_and_timesteps(
                    args, noise_scheduler, latents
                )
                sdxl_train_util.get_size_embeddings(timesteps, accelerator.device)
                prediction = unet(noisy, timesteps)
                huber_c = loss_util.get_huber_threshold_if_needed(args, timesteps, noise_scheduler)
                loss = loss_util.conditional_loss(
                    prediction.float(), noise.float(), args.loss_type, "mean", huber_c
                )
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            done = global_step
            if accelerator.sync_gradients:
                progress_bar.update(1)
                global_step += 1
                sampling.sample_images_common(None, accelerator, args, None, global_step)
                accelerator.save_state(f"{args.output_dir}/step{global_step}-state")
            current_loss = loss.detach().item()
            loss_recorder.add(epoch=epoch, step=step, loss=current_loss)
            avr_loss: float = loss_recorder.moving_average
            logs = {"avr_loss": avr_loss}
            progress_bar.set_postfix(**logs)
            if len(accelerator.trackers) > 0:
                logs = {"loss": current_loss, "average": avr_loss, "lr": lr_scheduler.get_last_lr()[0]}
                accelerator.log(logs, step=global_step)
            with open(f"{args.output_dir}/log.jsonl", "a") as file:
                line = [
                    epoch,
                    step,
                    done,
                    batch["number"],
                    timesteps.tolist(),
                    loss.item(),
                    float(lr_scheduler.get_last_lr()[0]),  # torchao's is a tensor
                ]
                print(json.dumps([*line, loss_recorder.moving_average]), file=file)
            if args.stop_at and global_step >= args.stop_at:
                raise KeyboardInterrupt
            if global_step >= args.max_train_steps:
                break
        accelerator.save_state(f"{args.output_dir}/epoch{epoch + 1}-state")
        accelerator.log({"loss/epoch": loss_recorder.moving_average}, step=epoch + 1)
        sampling.sample_images_common(None, accelerator, args, epoch + 1, global_step)
    sdxl_model_util.save_stable_diffusion_checkpoint(
        f"{args.output_dir}/model.safetensors",
        accelerator.unwrap_model(unet),
        model_io.get_sai_model_spec(None, args),
    )


if __name__ == "__main__":
    args = training.parse()
    train(args)
