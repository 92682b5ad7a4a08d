#!/usr/bin/env bash
# All checks, the same for people and for CI: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
install "[test,check]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# one thread a worker: more threads than cores make small models many times slower
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
