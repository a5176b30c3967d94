#!/usr/bin/env bash
# Train one run on all GPUs of a machine, or in several processes on its CPU.
#
#   bash examples/several_gpus.sh DATA OUT [PROCESSES] [KEY=VALUE ...]
#
# DATA is a data set or "demo", OUT a folder for the run. PROCESSES is a number, or "auto", the default:
# one for each GPU, or for each core where there is no GPU. Settings are those of the run;
# training.device=cpu leaves GPUs unused, and training.batch_size stays that of all processes together.
# Time: not measured on GPUs; docs/scaling.md says what several processes cost. Result: a run in OUT,
# as of one process. Started again, it resumes the run from its last epoch.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
data=$1 out=$2 processes=${3:-auto}
settings=()
for setting in "${@:4}"; do settings+=(--set "$setting"); done

resume=()
[ -e "$out/checkpoints/last.safetensors" ] && resume=(--resume)
torchrun --standalone --nproc-per-node "$processes" -m polyseg train \
  --data "$data" --out "$out" "${resume[@]}" "${settings[@]}"
