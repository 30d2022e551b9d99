#!/usr/bin/env bash
# Recipe 4 of docs/recipes.md with diffusers' script, on one card of 48 GB, from the folder that holds it: bash epsilon.sh [more flags].
set -euo pipefail
accelerate launch --num_processes 1 -m sdxl_fixes.diffusers train_text_to_image_sdxl.py \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --train_data_dir train --resolution 1024 --random_flip --true_crop_coordinates \
    --max_token_length 225 --chunk_buckets --proportion_empty_prompts 0.05 \
    --train_batch_size 4 --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam \
    --learning_rate 1e-5 --max_train_steps 25000 --lr_scheduler constant_with_warmup --lr_warmup_steps 250 \
    --snr_gamma 5 --stratified_timesteps --float32_noising \
    --seed 42 --output_dir output "$@"
