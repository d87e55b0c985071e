#!/bin/bash
# Everything that a GPU can show: the laws on it, all benchmarks, and the commands at the shapes of 1.5B and 8B models.
# Run     recipes/gpu/check.sh [--output check.json] [--work FOLDER] [--size 1.5B]
# Needs   pip install -e '.[test]', one CUDA GPU (80 GB for the 8B shapes), 60 GB of disk in --work for these
# Note    without a GPU it runs at tiny shapes on the CPU, which shows only that it runs. The exit code is 1 where a part failed.
set -eu
cd "$(dirname "$0")/../.."
exec python recipes/gpu/check.py "$@"
