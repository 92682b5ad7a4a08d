#!/usr/bin/env bash
# All checks, the same for people and for CI: style, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh
install "[test,check]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# types are checked beside the tests, and said after them
said=$(mktemp)
.venv/bin/mypy >"$said" 2>&1 &
types=$!
tests=0
# one thread a worker: more threads than cores make small models many times slower
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist loadfile "$@" || tests=$?
checked=0
wait "$types" || checked=$?
cat "$said"
rm "$said"
exit $((tests ? tests : checked))
