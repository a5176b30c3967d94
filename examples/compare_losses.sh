#!/usr/bin/env bash
# Does adapting epsilon help? Train the Dice loss, PolyDice-1 with epsilon 0 and the adaptive loss from
# the same weights on the same images in the same order, and compare them on the test images.
#
#   bash examples/compare_losses.sh DATA OUT SEEDS [KEY=VALUE ...]
#
# Example with settings, of which those with spaces are in quotes:
#
#   bash examples/compare_losses.sh nuclei runs/compare "0 1 2" data.size=128 training.epochs=50 \
#     "network.kwargs={channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
#
# DATA is a data set or "demo", OUT a folder for the runs, SEEDS are in quotes, such as "0 1 2", and
# settings are those of all runs. Take several seeds: differences between losses are often smaller
# than those between seeds. The adaptive loss differs from epsilon 0 also in its mean steepness: with the
# default range, -0.4 to 1, and percentile, 50, the median image of a batch has epsilon 0.3. The arm "mean"
# of control_arms.sh separates the two. Time: that of three trainings for each seed, of which the adaptive
# one also makes assessments. Result: OUT/comparison, with means over patients (images where patients are
# unknown) and seeds, and each loss against Dice. Finished runs are kept, and others resumed.
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
    polyseg train --data "$data" --out "$run" --seed "$seed" "${resume[@]}" "${settings[@]}" "${@:2}"
  }
  train dice --loss dice
  train fixed --loss polydice1 --set control.enabled=false
  train adaptive --loss polydice1
done

[ -e "$out/comparison" ] ||
  polyseg evaluate "$out"/*-[0-9]* --group --baseline dice --out "$out/comparison"
