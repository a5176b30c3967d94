#!/usr/bin/env bash
# Train a network of your own, examples/own_network.py, in place of one of MONAI's.
#
#   bash examples/own_network.sh OUT [KEY=VALUE ...]
#
# OUT is a folder for the run; settings are those of the training, by default 10 epochs on the demo.
# Time: that of 10 short epochs on a CPU. Result: OUT/run, and OUT/uncertainty with the difficulty of the
# test images. A checkpoint names the code that it needs, which is imported with --trust only.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 1)) || usage
out=$1
settings=()
for setting in "${@:2}"; do settings+=(--set "$setting"); done
export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}"

polyseg train --out "$out/run" --set training.epochs=10 \
  --set network.name=own_network:build --set network.multiple_of=1 \
  --set "network.kwargs={width: 16, rate: 0.1}" "${settings[@]}"
polyseg estimate-uncertainty "$out/run" --split test --trust --out "$out/uncertainty"
