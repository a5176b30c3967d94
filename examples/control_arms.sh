#!/usr/bin/env bash
# Does it matter which image gets the steep loss? Train the adaptive loss and its control arms: the same
# epsilons shuffled over the images, their mean in each epoch for all images, and in inverted order; a
# fixed epsilon of 0; and the Dice loss. All arms of a seed have the same initial weights, images and order.
#
#   bash examples/control_arms.sh DATA OUT SEEDS [KEY=VALUE ...]
#
# DATA is a data set or "demo", OUT a folder for the runs, SEEDS are in quotes, such as "0 1 2", and
# settings are those of all arms. Time: that of six trainings for each seed, of which one makes
# assessments. Result: OUT/comparison, with means over images and seeds, and each arm against the
# adaptive one; docs/results.md has two such tables. Finished runs are kept, and others resumed.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 3)) || usage
data=$1 out=$2 seeds=$3
settings=()
for setting in "${@:4}"; do settings+=(--set "$setting"); done

for seed in $seeds; do
  train() {
    local run="$out/$1-$seed"
    [ -e "$run/evaluation/summary.json" ] && return
    local resume=()
    [ -e "$run/checkpoints/last.safetensors" ] && resume=(--resume)
    polyseg train --out "$run" "${resume[@]}" "${@:2}"
  }
  new=(--data "$data" --seed "$seed" "${settings[@]}")
  train adaptive "${new[@]}" --loss polydice1
  train fixed "${new[@]}" --loss polydice1 --set control.enabled=false
  train dice "${new[@]}" --loss dice
  for arm in shuffled mean inverted; do
    train $arm --replay "$out/adaptive-$seed" --replay-arm $arm
  done
done

[ -e "$out/comparison" ] ||
  polyseg evaluate "$out"/*-[0-9]* --group --baseline adaptive --out "$out/comparison"
