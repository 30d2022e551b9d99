"""A made-up full finetune with the structure of sd-scripts' sdxl_train.py."""

import time

import library.args as args_util
import library.checkpoint_io as checkpoint_io
import library.config_util as config_util
import library.custom_train_functions as custom_train_functions
import library.logging_util as logging_util
import library.loss as loss_util
import library.model_io as model_io
import library.sampling as sampling
import library.sdxl_model_util as sdxl_model_util
import library.sdxl_train_util as sdxl_train_util
import library.strategy_sdxl as strategy_sdxl
import torch
import training
from accelerate import Accelerator
from diffusers import DDPMScheduler
from library.custom_train_functions import (
    add_v_prediction_like_loss,
    apply_debiased_estimation,
    apply_masked_loss,
    apply_snr_weight,
    prepare_scheduler_for_custom_training,
    scale_v_prediction_loss_like_noise_prediction,
)
from library.sdxl_original_unet import SdxlUNet2DConditionModel


def train(args):
    args_util.verify_training_args(args)
    torch.manual_seed(args.seed)
    group = config_util.generate_dataset_group_by_blueprint(list(training.batches(args)))
    collate = config_util.COLLATOR(0, 0, group)
    strategy_sdxl.SdxlTextEncodingStrategy().encode_tokens_with_weights(None, [], [torch.zeros(1, 1, 77)] * 2, [])
    strategy_sdxl.SdxlTextEncoderOutputsCachingStrategy().cache_batch_outputs(None, [], None, [])
    accelerator = Accelerator(cpu=True)
    unet = SdxlUNet2DConditionModel()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.01)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    prepare_scheduler_for_custom_training(noise_scheduler, accelerator.device)
    if args.zero_terminal_snr:
        custom_train_functions.fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler)
    sampling.sample_images_common(None, accelerator, args, 0, 0)
    steps, times, recorder = [], [], logging_util.LossRecorder()
    for number, item in enumerate(group):
        batch = collate([item])
        latents = batch["latents"]
        noise, noisy, timesteps = loss_util.get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)
        sdxl_train_util.get_size_embeddings(timesteps, latents.device)
        prediction = unet(noisy, timesteps)
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
        huber_c = loss_util.get_huber_threshold_if_needed(args, timesteps, noise_scheduler)
        if (
            args.min_snr_gamma
            or args.scale_v_pred_loss_like_noise_pred
            or args.v_pred_like_loss
            or args.debiased_estimation_loss
            or args.masked_loss
        ):
            loss = loss_util.conditional_loss(prediction.float(), target.float(), args.loss_type, "none", huber_c)
            if args.masked_loss:
                loss = apply_masked_loss(loss, batch)
            loss = loss.mean([1, 2, 3])
            if args.min_snr_gamma:
                loss = apply_snr_weight(loss, timesteps, noise_scheduler, args.min_snr_gamma, args.v_parameterization)
            if args.scale_v_pred_loss_like_noise_pred:
                loss = scale_v_prediction_loss_like_noise_prediction(loss, timesteps, noise_scheduler)
            if args.v_pred_like_loss:
                loss = add_v_prediction_like_loss(loss, timesteps, noise_scheduler, args.v_pred_like_loss)
            if args.debiased_estimation_loss:
                loss = apply_debiased_estimation(loss, timesteps, noise_scheduler, args.v_parameterization)
            loss = loss.mean()
        else:
            loss = loss_util.conditional_loss(prediction.float(), target.float(), args.loss_type, "mean", huber_c)
        accelerator.backward(loss)
        gradient = unet.convolution.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        sampling.sample_images_common(None, accelerator, args, None, number + 1)
        if args.save_every_n_steps:
            spec = model_io.get_sai_model_spec(None, args)
            checkpoint_io.save_sd_model_on_epoch_end_or_stepwise_common(
                args, False, accelerator, True, True, 0, 1, number + 1, lambda file, *_, spec=spec: sdxl_model_util.save_stable_diffusion_checkpoint(file, unet, spec), None
            )
        recorder.add(epoch=0, step=number, loss=float(loss.detach()))
        times.append(time.perf_counter())
        steps.append(
            dict(latents=latents, noise=noise, noisy=noisy, timesteps=timesteps, prediction=prediction.detach(), target=target)
            | dict(masks=batch["alpha_masks"], later=None, loss=loss.detach(), gradient=gradient)
        )
    torch.save(steps, f"{args.output_dir}/steps.pt")
    torch.save(times, f"{args.output_dir}/times.pt")
    if args.diffusers:
        sdxl_model_util.save_diffusers_checkpoint(args.output_dir, unet)
    else:
        spec = model_io.get_sai_model_spec(None, args)
        sdxl_model_util.save_stable_diffusion_checkpoint(f"{args.output_dir}/model.safetensors", accelerator.unwrap_model(unet), spec)


if __name__ == "__main__":
    train(training.parse())
