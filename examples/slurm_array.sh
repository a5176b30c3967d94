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
#   sbatch --array=0-8 examples/slurm_array.sh DATA OUT [KEY=VALUE ...]
#
# DATA is a data set and OUT a folder for the runs, which all machines can reach; settings are those of
# all runs. LOSSES ("dice polydice polydice1") and SEEDS ("0 1 2") come from the environment, and the
# array has as many tasks as there are pairs. Two minutes before its time limit a task ends its run and
# requeues itself; finished runs are kept, and others resumed. Time: that of one training for each task,
# not measured under Slurm. Result: a run in OUT for each loss and seed, compared by
#
#   polyseg evaluate OUT/*-s[0-9]* --group --baseline dice --out OUT/comparison
#
# Without Slurm, SLURM_ARRAY_TASK_ID=0 bash examples/slurm_array.sh DATA OUT trains the first run.
set -euo pipefail
usage() {
  sed -n '2,/^set/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
data=$1 out=$2
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

# The number of threads changes rounding, so it must be the same on every machine of the task.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
start=()
[ -n "${SLURM_JOB_ID:-}" ] && start=(srun)
resume=()
[ -e "$run/checkpoints/last.safetensors" ] && resume=(--resume)
code=0
"${start[@]}" polyseg train --quiet --data "$data" --out "$run" --loss "$loss" --seed "$seed" \
  "${resume[@]}" "${settings[@]}" || code=$?
# 128 and the number of SIGUSR1: the time limit is near, and the last epoch is kept.
if ((code == 138)) && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
