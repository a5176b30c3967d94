#!/usr/bin/env bash
#SBATCH --job-name=polyseg
#SBATCH --array=0-8
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=polyseg-%A_%a.txt
#
# A run for each loss and seed, as an array of Slurm: one task, one run, one GPU.
#
#   sbatch --array=0-8 examples/slurm_array.sh DATA OUT [KEY.SUB=VALUE ...]
#
# LOSSES ("dice polydice polydice1") and SEEDS ("0 1 2") are taken from the environment; the array
# has as many tasks as there are pairs. DATA and OUT lie where all machines see them. A task knows its
# run by its number, and goes on with what is there: it can be requeued, or the array sent again. Two
# minutes before its time is over a run is told to end, and the task puts itself into the queue again.
# When all are done:
#
#   polyseg evaluate OUT/*-s[0-9]* --group --baseline dice --out OUT/comparison
#
# Without Slurm, SLURM_ARRAY_TASK_ID=0 bash examples/slurm_array.sh DATA OUT does the first run.
set -euo pipefail
data=${1:?a data set, or demo}
out=${2:?a folder for the runs}
task=${SLURM_ARRAY_TASK_ID:?the number of the task, which sbatch --array gives}
settings=()
for setting in "${@:3}"; do settings+=(--set "$setting"); done

read -ra losses <<<"${LOSSES:-dice polydice polydice1}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
if ((task >= ${#losses[@]} * ${#seeds[@]})); then
  echo "task $task: there are ${#losses[@]} losses and ${#seeds[@]} seeds only" >&2
  exit 2
fi
loss=${losses[task / ${#seeds[@]}]}
seed=${seeds[task % ${#seeds[@]}]}
run="$out/$loss-s$seed"
[ -e "$run/evaluation/summary.json" ] && exit

# The same on every machine that the task may go on at, for other threads round otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
start=()
[ -n "${SLURM_JOB_ID:-}" ] && start=(srun)
resume=()
[ -e "$run/checkpoints/last.safetensors" ] && resume=(--resume)
code=0
"${start[@]}" polyseg train --quiet --data "$data" --out "$run" --loss "$loss" --seed "$seed" \
  "${resume[@]}" "${settings[@]}" || code=$?
# 128 and the number of SIGUSR1: the time is nearly over, and the last epoch is kept.
if ((code == 138)) && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
