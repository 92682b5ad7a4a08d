#!/usr/bin/env bash
# The main job on a fresh machine: make an environment, install, prune the built-in model, measure, save; then the same
# with as many experts in every layer, which loads everywhere and loses more.
# Arguments go to `compressor run`, and only the first is done then:
#   ./quickstart.sh --set passes.0.expert_pruning.keep.mean=4 --output runs/r4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
install
.venv/bin/compressor run recipes/quickstart.yaml "$@"
if [ $# -eq 0 ]; then
  .venv/bin/compressor run recipes/quickstart-uniform.yaml
fi
