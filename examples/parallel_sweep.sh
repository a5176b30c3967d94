#!/usr/bin/env bash
# A sweep on one machine, several runs at a time: each arm with each seed, and in each fold if wanted.
#
#   JOBS=4 bash examples/parallel_sweep.sh DATA OUT SEEDS [KEY.SUB=VALUE ...]
#
# DATA is a folder of a data set or a CSV manifest, or "demo"; SEEDS are in quotes, such as "0 1 2";
# settings are for all runs. The arms and their own settings stand below. From the environment come
#
#   ARMS   those of the arms that are wanted ("dice fixed adaptive")
#   FOLDS  the number of folds of a cross-validation; without it all runs have the same split
#   JOBS   runs at a time (2)
#   GPUS   numbers of the GPUs that runs are dealt to, such as "0 1 2 3"
#
# By GNU parallel where it is, else by xargs. What a run says is in OUT/logs; one that fails stops none
# of the others. Runs that are there already are kept, so that the script can be started again. All in
# OUT are then compared in OUT/comparison with the first arm.
set -euo pipefail
export data=${1:?a data set, or demo}
export out=${2:?a folder for the runs}
seeds=${3:?seeds, such as \"0 1 2\"}
shared=()
for setting in "${@:4}"; do shared+=(--set "$setting"); done
# Other numbers of threads round otherwise: one, so that a run goes on whatever JOBS is then.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} FOLDS=${FOLDS:-} GPUS=${GPUS:-}

settings_of() {
  case $1 in
    dice) echo loss.name=dice ;;
    fixed) echo loss.name=polydice1 control.enabled=false ;;
    adaptive) echo loss.name=polydice1 ;;
    *) echo "$1: is none of the arms" >&2 && return 2 ;;
  esac
}

# Train what the last argument names, such as adaptive-s0 or adaptive-f3-s0, with the arguments before.
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
