#!/bin/bash
# All tests that take a device, all benchmarks, and the commands with the shapes of 1.5B and 8B models.
# Run     recipes/gpu/check.sh [--output check.json] [--work FOLDER] [--size 1.5B]
# Needs   pip install -e '.[test]', one CUDA GPU (80 GB for the 8B shapes), 60 GB of disk in --work for these
# Note    without a GPU tiny shapes run on the CPU. The exit code is 1 if a part fails.
set -eu
cd "$(dirname "$0")/../.."
exec python recipes/gpu/check.py "$@"
