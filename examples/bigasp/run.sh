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
