# Sourced by quickstart.sh and test.sh, from the repository's root: makes .venv once and installs the package into it.
#   PYTHON   the Python to use (default python3; 3.11 or newer)
#   TORCH    what to give pip for torch, if it is not there yet. On Linux without a GPU
#            TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" saves gigabytes.

install() {
  local python=${PYTHON:-python3}
  if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "moe-compressor needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON." >&2
      exit 2
    }
    echo "making .venv"
    "$python" -m venv .venv
  fi
  # compiled is what is imported, when it is: the rest, which is most of it, takes half of an installation's time
  unset PYTHONDONTWRITEBYTECODE
  # shellcheck disable=SC2086  # TORCH may hold several words
  .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet --no-compile ${TORCH:-torch==2.13.0}
  echo "installing moe-compressor${1:-} into .venv"
  .venv/bin/python -m pip install --quiet --no-compile --editable ".${1:-}"
}
