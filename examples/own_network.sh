#!/usr/bin/env bash
# A network of one's own, examples/own_network.py, in place of MONAI's.
#
#   bash examples/own_network.sh [OUT]
#
# A checkpoint names the code that it needs, and that is only imported with --trust.
set -euo pipefail
out=${1:-runs/own-network}
export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)"

polyseg train --out "$out/run" --epochs 10 \
  --set network.name=own_network:build --set network.multiple_of=1 \
  --set "network.kwargs={width: 16, rate: 0.1}"
polyseg estimate-uncertainty "$out/run" --split test --trust --out "$out/uncertainty"
