#!/usr/bin/env bash
# Train an adapter in a pipeline, hold it to a threshold, and fail with a code that says what went wrong.
#
#   recipes/ci-pipeline.sh ROWS TASK:METRIC=VALUE OUTPUT_DIR [MODEL]
#
# ROWS        training rows (JSON Lines, CSV, ...), as `braces train --data` takes them
# THRESHOLD   what the adapter must reach, such as embedded_popqa:acc=0.5
# OUTPUT_DIR  adapter and scores; an interrupted job that finds its folder again continues where it stopped
# MODEL       folder or hub id; without it the small model that ships with braces
#
# The environment may set MAX_STEPS (optimizer steps, 150) and LIMIT (documents of the task, all).
#
# Exit codes are those of braces: 0 reached; 5 not reached; 2 usage; 3 bad rows; 4 the model cannot be loaded; 1 else.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
rows=$1 threshold=$2 output=$3
model=()
[ "$#" -lt 4 ] || model=(--model "$4")
limit=()
[ -z "${LIMIT:-}" ] || limit=(--limit "$LIMIT")

braces train "${model[@]}" --data "$rows" --max-steps "${MAX_STEPS:-150}" --output-dir "$output/adapter" \
    --resume --format json
braces eval --adapter "$output/adapter" --tasks "${threshold%%:*}" "${limit[@]}" --fail-under "$threshold" \
    --output-dir "$output/scores" --overwrite --format json
