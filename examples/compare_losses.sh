#!/usr/bin/env bash
# Does adapting epsilon help? The Dice loss, PolyDice-1 with epsilon 0 and the adaptive loss, trained
# from the same weights on the same images in the same order, and tested side by side.
#
#   bash examples/compare_losses.sh DATA OUT [SEED ...]
#
# DATA is a folder with images/ and masks/, or "demo"; one seed (0) if none is named. Give several:
# differences between losses are often smaller than those between seeds. Runs that are there already
# are kept, so that the script can be started again.
set -euo pipefail
data=${1:?a folder of images and masks, or demo}
out=${2:?a folder for the runs}
seeds=${*:3}

for seed in ${seeds:-0}; do
  train() {
    local run="$out/$1-$seed"
    [ -e "$run/evaluation/summary.json" ] && return
    local resume=()
    [ -e "$run/checkpoints/last.safetensors" ] && resume=(--resume)
    polyseg train --data "$data" --out "$run" --seed "$seed" "${resume[@]}" "${@:2}"
  }
  train dice --loss dice
  train fixed --loss polydice1 --set control.enabled=false
  train adaptive --loss polydice1
done

[ -e "$out/comparison" ] ||
  polyseg evaluate "$out"/*-[0-9]* --group --baseline dice --out "$out/comparison"
