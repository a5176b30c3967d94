#!/usr/bin/env bash
# Run gates A and B of the study of docs/results.md: which measures of difficulty rank images by error, and
# whether it can help to place a steep loss on difficult images.
#
#   bash examples/study.sh DATA RUNS [SET ...]
#
# DATA is the folder of the data sets, RUNS a folder for the runs, outside the repository; SETs are names of
# data sets (all five by default). Time: about 9 trainings (gate A) and 27 (gate B) for each set, of 1 to 2
# minutes of processor time each; two run at once. Result: a row for each run in docs/study.jsonl, and the
# tables in docs/results.md. A run whose row is there is not repeated, and an interrupted one is resumed.
set -euo pipefail
usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
data=$1 runs=$2
sets=()
(($# == 2)) || sets=(--sets "${@:3}")
cd "$(dirname "$0")/.."
for gate in a b; do
  python examples/study.py "$runs" docs/study.jsonl --data "$data" --gate "$gate" "${sets[@]}"
done
python examples/study_analysis.py docs/study.jsonl --page docs/results.md
