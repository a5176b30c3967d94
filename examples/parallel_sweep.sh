#!/usr/bin/env bash
# A sweep on one machine, several runs at a time: each arm with each seed, and in each fold if wanted.
#
#   JOBS=4 bash examples/parallel_sweep.sh DATA OUT SEEDS [KEY=VALUE ...]
#
# Example, two losses in five folds, with settings, of which those with spaces are in quotes:
#
#   FOLDS=5 ARMS="dice adaptive" bash examples/parallel_sweep.sh nuclei runs/sweep "0 1 2" \
#     data.size=128 training.epochs=50 \
#     "network.kwargs={channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
#
# DATA is a data set or "demo", OUT a folder for the runs, SEEDS are in quotes, such as "0 1 2", and
# settings are those of all runs. The arms and their own settings are below. From the environment come
#
#   ARMS   the arms to train ("dice fixed adaptive")
#   FOLDS  the number of folds of a cross-validation; without it all runs have the same split
#   JOBS   the number of runs at a time (2)
#   GPUS   the numbers of the GPUs to share among the runs, such as "0 1 2 3"
#
# It uses GNU parallel where that is installed, else xargs. Time: that of arms x seeds x folds
# trainings over JOBS. Result: OUT/comparison, with each arm against the first; the output of each run
# is in OUT/logs. A run that fails stops no other. Finished runs are kept, and others resumed.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 3)) || usage
export data=$1 out=$2
seeds=$3
shared=()
for setting in "${@:4}"; do shared+=(--set "$setting"); done
# The number of threads changes rounding; with one, a run can be resumed with any number of JOBS.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} FOLDS=${FOLDS:-} GPUS=${GPUS:-}

settings_of() {
  case $1 in
    dice) echo loss.name=dice ;;
    fixed) echo loss.name=polydice1 control.enabled=false ;;
    adaptive) echo loss.name=polydice1 ;;
    *) echo "$1: is not an arm (dice, fixed, adaptive)" >&2 && return 2 ;;
  esac
}

# Train the run that the last argument names, such as adaptive-s0 or adaptive-f3-s0.
train_one() {
  local name=${!#} options=("${@:1:$#-1}") own gpus
  local run="$out/$name" log="$out/logs/$name.txt"
  [ -e "$run/evaluation/summary.json" ] && return
  read -ra own <<<"$(settings_of "${name%%-*}")"
  for setting in "${own[@]}"; do options+=(--set "$setting"); done
  [[ $name =~ -f([0-9]+)- ]] && options+=(--fold "${BASH_REMATCH[1]}" --set "data.folds=$FOLDS")
  [ -e "$run/checkpoints/last.safetensors" ] && options+=(--resume)
  if [ -n "$GPUS" ]; then
    read -ra gpus <<<"$GPUS"
    export CUDA_VISIBLE_DEVICES=${gpus[${SLOT:-$PARALLEL_JOBSLOT} % ${#gpus[@]}]}
  fi
  if polyseg train --data "$data" --out "$run" --seed "${name##*-s}" "${options[@]}" >>"$log" 2>&1; then
    echo "$name: done"
  else
    echo "$name: failed, see $log" >&2
    return 1
  fi
}
export -f train_one settings_of

read -ra arms <<<"${ARMS:-dice fixed adaptive}"
names=()
for arm in "${arms[@]}"; do
  settings_of "$arm" >/dev/null
  for seed in $seeds; do
    [ -n "$FOLDS" ] || names+=("$arm-s$seed")
    for ((fold = 0; fold < ${FOLDS:-0}; fold++)); do names+=("$arm-f$fold-s$seed"); done
  done
done

if parallel --version 2>/dev/null | grep -q GNU; then
  at_a_time=(parallel --null --quote --jobs "${JOBS:-2}")
else
  at_a_time=(xargs -0 -n 1 -P "${JOBS:-2}")
  [ -n "$GPUS" ] && at_a_time+=(--process-slot-var=SLOT)
fi
mkdir -p "$out/logs"
printf '%s\0' "${names[@]}" | "${at_a_time[@]}" bash -c 'train_one "$@"' train_one "${shared[@]}"

baseline=()
((${#arms[@]} > 1)) && baseline=(--baseline "${arms[0]}")
[ -e "$out/comparison" ] ||
  polyseg evaluate "$out"/*-s[0-9]* --group "${baseline[@]}" --out "$out/comparison"
