#!/usr/bin/env bash
# From nothing to a trained, measured network and its figures, on made-up ultrasound images.
#
#   bash examples/demo.sh [OUT]
#
# The training takes about five minutes on two CPU cores, the rest seconds.
set -euo pipefail
out=${1:-runs/demo}

polyseg train --out "$out/run"
polyseg estimate-uncertainty "$out/run" --split test --samples 50 --out "$out/uncertainty"
polyseg evaluate "$out/run" "$out/run/checkpoints/last.safetensors" --out "$out/best-and-last"
polyseg plot-loss --out "$out/polydice"
