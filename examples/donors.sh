#!/usr/bin/env bash
# Does D go with the error of networks that had not seen the image? Two donors, each trained on half of
# a run's training images (groups stay whole) with the run's own settings, and tested on the other
# half; then the correlation of the run's D with the error of the donor that did not see the image.
#
#   bash examples/donors.sh RUN OUT [KEY.SUB=VALUE ...]
#
# RUN is a finished run, OUT a folder for the donors; settings are for both donors. Donors that are there
# already are kept, so that the script can be started again.
set -euo pipefail
run=${1:?a run}
out=${2:?a folder for the donors}
settings=()
for setting in "${@:3}"; do settings+=(--set "$setting"); done

mkdir -p "$out"
[ -e "$out/donor-b.json" ] || python "$(dirname "$0")/donor_splits.py" "$run" "$out"
for donor in "$out/donor-a" "$out/donor-b"; do
  [ -e "$donor/evaluation/per_image.csv" ] && continue
  resume=()
  [ -e "$donor/checkpoints/last.safetensors" ] && resume=(--resume)
  polyseg train "$run/config.yaml" --split "$donor.json" --out "$donor" \
    --set data.fold=null "${resume[@]}" "${settings[@]}"
done

polyseg schedule validity "$run" --donors "$out/donor-a" "$out/donor-b"
