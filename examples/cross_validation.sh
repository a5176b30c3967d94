#!/usr/bin/env bash
# Cross-validation of one loss (parallel_sweep.sh with FOLDS compares several): train one run for each fold,
# each tested on images that no other fold is tested on.
#
#   bash examples/cross_validation.sh DATA OUT [FOLDS] [KEY=VALUE ...]
#
# Example with settings, of which those with spaces are in quotes:
#
#   bash examples/cross_validation.sh nuclei runs/folds 5 data.size=128 training.epochs=50 \
#     "network.kwargs={channels: [12, 24, 48, 96], strides: [2, 2, 2], num_res_units: 2}"
#
# DATA is a data set or "demo", OUT a folder for the runs, FOLDS is 5 unless given. Settings are those
# of all runs, such as 'data.group=^(patient\d+)_' to keep the images of a patient together. Time: that
# of one training for each fold. Result: OUT/all_folds, with the scores of all images, each by the fold
# that did not train on it. Finished runs are kept, and others resumed.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
data=$1 out=$2 folds=${3:-5}
settings=()
for setting in "${@:4}"; do settings+=(--set "$setting"); done

for ((fold = 0; fold < folds; fold++)); do
  run="$out/fold-$fold"
  [ -e "$run/evaluation/per_image.csv" ] && continue
  resume=()
  [ -e "$run/checkpoints/last.safetensors" ] && resume=(--resume)
  polyseg train --data "$data" --out "$run" --fold $fold --set data.folds=$folds "${resume[@]}" "${settings[@]}"
done

[ -e "$out/all_folds" ] || polyseg evaluate "$out"/fold-* --group --out "$out/all_folds"
