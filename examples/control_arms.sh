#!/usr/bin/env bash
# Does it matter which image gets the steep loss? The adaptive loss beside its control arms: the same
# epsilons shuffled over the images, each epoch's mean for all, and in reversed order; a fixed
# epsilon of 0; and the Dice loss. All arms of a seed have the same weights to start from, the same
# images and the same order.
#
#   bash examples/control_arms.sh DATA OUT SEEDS [KEY.SUB=VALUE ...]
#
# DATA is a folder with images/ and masks/, or "demo"; SEEDS are in quotes, such as "0 1 2"; settings
# are for all arms. Runs that are there already are kept, so that the script can be started again.
# What comes out is in OUT/comparison: means over images and seeds, and each arm against the adaptive.
set -euo pipefail
data=${1:?a folder of images and masks, or demo}
out=${2:?a folder for the runs}
seeds=${3:?seeds, such as \"0 1 2\"}
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
