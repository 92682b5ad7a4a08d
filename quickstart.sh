#!/usr/bin/env bash
# The main job on a fresh machine: make an environment, install, prune the built-in model, measure, save.
# Arguments go to `compressor run`, for example: ./quickstart.sh --set passes.0.expert_pruning.keep=4 --output runs/r4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
install
exec .venv/bin/compressor run recipes/quickstart.yaml "$@"
