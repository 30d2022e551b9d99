#!/usr/bin/env bash
# Recipe 3 of docs/recipes.md with diffusers' script, from the folder that holds it: [MODEL=...] bash lora_v_ztsnr.sh [more flags].
set -euo pipefail
accelerate launch --num_processes 1 -m sdxl_fixes.diffusers train_text_to_image_lora_sdxl.py \
    --pretrained_model_name_or_path "${MODEL:-Laxhar/noobai-XL-Vpred-1.0}" \
    --train_data_dir train --resolution 1024 --max_token_length 225 --chunk_buckets \
    --train_batch_size 4 --rank 32 --mixed_precision bf16 --gradient_checkpointing \
    --learning_rate 1e-4 --max_train_steps 2000 --lr_scheduler cosine --lr_warmup_steps 100 \
    --prediction_type v_prediction --zero_terminal_snr --snr_gamma 5 --min_snr_floor --stratified_timesteps \
    --seed 42 --output_dir output "$@"
