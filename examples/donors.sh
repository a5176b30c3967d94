#!/usr/bin/env bash
# Does D correlate with the error of networks that had not seen the image? Train two donors, each on half
# of a run's training images (groups stay whole) with the run's own settings, and test each on the other
# half. Then correlate the run's D with the error of the donor that did not see the image.
#
#   bash examples/donors.sh RUN OUT [KEY=VALUE ...]
#
# RUN is a finished run, OUT a folder for the donors, and settings are those of both donors. Time: that of
# two trainings, each on half of the images. Result: OUT/donor-a and OUT/donor-b, runs with their test
# metrics, and the correlations, which are printed. Finished donors are kept.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
run=$1 out=$2
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
