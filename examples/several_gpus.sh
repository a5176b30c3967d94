#!/usr/bin/env bash
# One run on all GPUs of a machine, or in several processes on its CPU.
#
#   bash examples/several_gpus.sh DATA OUT [PROCESSES] [KEY.SUB=VALUE ...]
#
# DATA is a folder of a data set or a CSV manifest, or "demo". PROCESSES is a number, or "auto" as it
# is unless named: one a GPU, or one a core where there is no GPU. On a machine with GPUs the setting
# training.device=cpu leaves them alone. training.batch_size stays that of all processes together.
# Started again it goes on from the last epoch. docs/scaling.md tells the rest, and of several machines.
set -euo pipefail
data=${1:?a data set, or demo}
out=${2:?a folder for the run}
processes=${3:-auto}
settings=()
for setting in "${@:4}"; do settings+=(--set "$setting"); done

resume=()
[ -e "$out/checkpoints/last.safetensors" ] && resume=(--resume)
torchrun --standalone --nproc-per-node "$processes" -m polyseg train \
  --data "$data" --out "$out" "${resume[@]}" "${settings[@]}"
