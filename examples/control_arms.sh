#!/usr/bin/env bash
# Does the adaptive loss help, and does it matter which image gets the steep loss? The adaptive loss
# beside the Dice loss, a fixed epsilon of 0, and arms that give the adaptive run's epsilons to other
# images: shuffled at each assessment, permuted once for the whole run, the mean for all, in reversed
# order, and by the size of the mask. All arms of a seed start from the same weights and see the same
# images in the same order.
#
#   bash examples/control_arms.sh DATA OUT SEEDS [KEY=VALUE ...]
#
# Example with settings, of which those with spaces are in quotes:
#
#   bash examples/control_arms.sh nuclei runs/arms "0 1 2 3 4" data.size=128 training.epochs=50 \
#     "network.kwargs={channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
#
# DATA is a folder with images/ and masks/, a CSV manifest (a column "group" names the patients), or
# "demo"; SEEDS are in quotes, such as "0 1 2 3 4": five or more. Settings are for all arms, such as
# uncertainty.metric=dispersion, control.map=weight, or an adaptive loss of your own by loss.name. JOBS
# runs are trained at a time (2), each with one thread; the output of a run is in OUT/logs. Start the script
# again after an interruption: finished runs are kept, an unfinished one is resumed.
# The arm "mean" has the mean steepness of the adaptive run, which is not that of epsilon 0: with the default
# range, -0.4 to 1, and percentile, 50, the median image of a batch has epsilon 0.3.
# Time: that of eight trainings for each seed, of which one makes assessments.
# Result: each arm against the adaptive one, and a sentence that answers both questions; all tables are in
# OUT/comparison.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 3)) || usage
data=$1 seeds=$3
export out=$2
settings=(--set loss.name=polydice1)
for setting in "${@:4}"; do settings+=(--set "$setting"); done
export OMP_NUM_THREADS=1

# Train a run, whose name is the last argument, with the arguments before it; without a word if it is done.
train_one() {
  local name=${!#} options=("${@:1:$#-1}")
  local run="$out/$name" log="$out/logs/$name.txt"
  local seed=${name##*-} arm=${name%-*}
  [ -e "$run/evaluation/summary.json" ] && return
  case $arm in
    adaptive) ;;
    fixed) options+=(--set control.enabled=false) ;;
    dice) options+=(--loss dice --set control.enabled=auto) ;;
    # --trust: the code that a run's settings name is what this script was given.
    *) options=(--replay "$out/adaptive-$seed" --replay-arm "$arm" --trust) ;;
  esac
  [[ $arm =~ adaptive|fixed|dice ]] && options+=(--seed "$seed")
  [ -e "$run/checkpoints/last.safetensors" ] && options+=(--resume --trust)
  if polyseg train --out "$run" "${options[@]}" >>"$log" 2>&1; then
    echo "$name: done"
  else
    echo "$name: failed, see $log" >&2
    return 1
  fi
}
export -f train_one

# Train the named arms of all seeds, JOBS at a time.
train() {
  local names=() arm seed
  for seed in $seeds; do for arm in "$@"; do names+=("$arm-$seed"); done; done
  printf '%s\0' "${names[@]}" |
    xargs -0 -n 1 -P "${JOBS:-2}" bash -c 'train_one "$@"' train_one --data "$data" "${settings[@]}"
}

mkdir -p "$out/logs"
given="$data ${*:4}"
if [ -e "$out/settings.txt" ] && [ "$(cat "$out/settings.txt")" != "$given" ]; then
  echo "$out: its runs have other data or settings ($out/settings.txt); choose another OUT" >&2
  exit 2
fi
echo "$given" >"$out/settings.txt"
train adaptive dice fixed
train shuffled permuted mean inverted size

# With other seeds than before, the comparison is made again.
polyseg evaluate "$out"/*-[0-9]* --group --baseline adaptive --trust --out "$out/comparison" \
  --overwrite --quiet >"$out/logs/comparison.txt"
sed -n '/^## Dice: difference/,/^## /{/^## [^D]/d;p}' "$out/comparison/table.md"
