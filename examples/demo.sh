#!/usr/bin/env bash
# From nothing to a trained network, its uncertainty and its figures, on built-in ultrasound phantoms.
#
#   bash examples/demo.sh [OUT] [KEY=VALUE ...]
#
# OUT is runs/demo unless given; settings are those of the training. Time: about five minutes on two CPU
# cores. Result: OUT/run with test metrics and figures, OUT/uncertainty with the difficulty of the test
# images, OUT/best-and-last with the best weights beside the last, and the figure OUT/polydice.png.
set -euo pipefail
out=${1:-runs/demo}
settings=()
for setting in "${@:2}"; do settings+=(--set "$setting"); done

polyseg train --out "$out/run" "${settings[@]}"
polyseg estimate-uncertainty "$out/run" --split test --samples 50 --out "$out/uncertainty"
polyseg evaluate "$out/run" "$out/run/checkpoints/last.safetensors" --out "$out/best-and-last"
polyseg plot-loss --out "$out/polydice"
