#!/usr/bin/env bash
# The whole example on made pictures, on the CPU: examples/bigasp/run.sh [FOLDER [PICTURES]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-bigasp_run}
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
small=(--area 16384 --bucket_step 32 --min_side 64 --max_side 256)
$python "$here/made.py" --folder "$out" --count "${2:-400}"
$python "$here/rank.py" --table "$out/pictures.parquet" --pairs "$out/pairs.parquet" --vision "$out/vision" \
  --output "$out/ranked" --rounds 256 --steps 300
$python "$here/encode.py" --table "$out/ranked/scored.parquet" --model "$out/model" --output "$out/latents" --part 128 "${small[@]}"
$python "$here/loader.py" --table "$out/ranked/scored.parquet" --latents "$out/latents" --model "$out/model"
printf '%s\n' 'red circles on a blue ground' 'white squares on a black ground' > "$out/prompts.txt"
$python "$here/train.py" --table "$out/ranked/scored.parquet" --latents "$out/latents" --model "$out/model" --output "$out/trained" \
  --prediction_type v_prediction --zero_terminal_snr --min_snr_gamma 5 --min_snr_floor --stratified_timesteps --ema_decay 0.9 \
  --samples 256 --global_batch 32 --batch_size 8 --warmup 64 --learning_rate 1e-3 --precision fp32 --workers 1 \
  --heldout 16 --stable 8 --evaluate_every 128 --checkpoint_every 128 --train_text_encoder \
  --sample_prompts "$out/prompts.txt" --sample_every 128 --sample_side 128 --sample_steps 5
