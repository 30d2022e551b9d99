#!/usr/bin/env bash
# Recipe 5 of docs/recipes.md with diffusers' script, from the folder that holds it: GPUS=32 bash big_flow.sh [more flags].
# As many accumulation steps as cards, because the script's learning rate is right for no other number: 4096 = cards^2 x images.
set -euo pipefail
GPUS=${GPUS:-32}
accelerate launch --multi_gpu --num_processes "$GPUS" -m sdxl_fixes.diffusers train_text_to_image_sdxl.py \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --train_data_dir train --resolution 1024 --random_flip --true_crop_coordinates \
    --max_token_length 225 --chunk_buckets --proportion_empty_prompts 0.05 \
    --train_batch_size $((4096 / (GPUS * GPUS))) --gradient_accumulation_steps "$GPUS" \
    --mixed_precision bf16 --gradient_checkpointing --allow_tf32 \
    --learning_rate 1e-4 --adam_weight_decay 0.1 --max_grad_norm 1.0 \
    --max_train_steps 36622 --lr_scheduler cosine --lr_warmup_steps 24 \
    --prediction_type flow_prediction --flow_shift 1 --stratified_timesteps \
    --seed 42 --checkpointing_steps 1000 --output_dir output "$@"
