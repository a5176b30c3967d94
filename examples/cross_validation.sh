#!/usr/bin/env bash
# Cross-validation: one run a fold, each tested on the images that no other fold is tested on.
#
#   bash examples/cross_validation.sh DATA OUT [FOLDS] [SETTING ...]
#
# DATA is a folder of a data set or a CSV manifest, or "demo"; FOLDS is 5 unless named. Settings are
# as for --set, such as 'data.group=^(patient\d+)_' to keep a patient's images together. Runs that
# are there already are kept, so that the script can be started again. The scores of all images, each by
# the fold that did not train on it, are then in OUT/all_folds.
set -euo pipefail
data=${1:?a data set, or demo}
out=${2:?a folder for the runs}
folds=${3:-5}
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
