#!/usr/bin/env bash
# Installs, pre-trains, fine-tunes and evaluates a small ST-MoE: about nine minutes
# on two cores. Run again, it resumes. The runs land in runs/quickstart.
# `bash scripts/quickstart.sh DIRECTORY runlocal` takes a few steps of each.
source "$(dirname "$0")/env.sh"
run=${1:-runs/quickstart}
size=${2:-}
st-moe train --config=configs/st_moe_tiny.py:$size --workdir="$run/pretrain"
st-moe train --config=configs/finetune.py:$size --config.init="$run/pretrain" --workdir="$run/finetune"
st-moe train --config=configs/finetune.py:scratch,$size --config.init="$run/pretrain" --workdir="$run/scratch"
st-moe report "$run/pretrain" "$run/finetune" --baseline="$run/scratch"
echo 'To go on (README, "Look around"), st-moe in your shell: source .venv/bin/activate'
