#!/usr/bin/env bash
# Makes .venv with the pinned versions and installs the project editable. Quick when nothing has changed.
#   bash setup_env.sh                     uses python3, or the newest of python3.13 .. python3.11 that is found
#   PYTHON=/path/to/python bash setup_env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TORCH=2.13.0
VENV=.venv
STAMP=$VENV/.decomp-bench-stamp

fail() { echo "setup_env.sh: $*" >&2; exit 2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

pick_python() {
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13; name one that is"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if supported "$candidate"; then echo "$candidate"; return; fi
  done
  fail "needs Python 3.11, 3.12 or 3.13; install one, or name it: PYTHON=/path/to/python bash setup_env.sh"
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; }

# The CPU build is ten times smaller; the CUDA build is what the registry gives under the plain version.
wanted_torch() { if [ "$(uname -s)" = Linux ] && ! has_nvidia; then echo cpu; else echo plain; fi; }

fingerprint() {
  { "$1" --version; wanted_torch; echo "$TORCH"; pwd; cat setup_env.sh pyproject.toml .ci/constraints.txt; } | cksum
}

have_torch() {
  "$VENV/bin/python" - "$1" <<'PY' >/dev/null 2>&1
import sys
from importlib.metadata import version
found = version("torch")
wanted = sys.argv[1]
sys.exit(not (found == wanted or (wanted.endswith("+any") and found.split("+")[0] == wanted[:-4])))
PY
}

install_torch() {
  pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$1" --quiet --quiet "${@:2}"; }
  if [ "$(wanted_torch)" = plain ]; then
    have_torch "$TORCH+any" || pip install "torch==$TORCH"
    return
  fi
  have_torch "$TORCH+cpu" && return
  # First the indexes that pip is configured with, which may hold the CPU build; then PyTorch's own; then whatever there is.
  pip install "torch==$TORCH+cpu" 2>/dev/null ||
    pip install "torch==$TORCH+cpu" --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
    pip install "torch==$TORCH"
}

python=$(pick_python)
[ -f .ci/constraints.txt ] || fail ".ci/constraints.txt is missing; restore it with: git checkout .ci/constraints.txt"
if [ -x "$VENV/bin/python" ] && ! supported "$VENV/bin/python"; then
  echo "setup_env.sh: $VENV has an unsupported Python, making it again"
  rm -rf "$VENV"
fi
if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear "$VENV" || fail "cannot make $VENV with $python; install its venv module (Debian: apt install python3-venv)"
fi

wanted=$(fingerprint "$VENV/bin/python")
if [ "$(cat "$STAMP" 2>/dev/null || true)" != "$wanted" ]; then
  rm -f "$STAMP"
  echo "setup_env.sh: installing into $VENV with $("$VENV/bin/python" --version); this takes a minute or two"
  install_torch
  "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --quiet -c .ci/constraints.txt -e ".[dev]"
  echo "$wanted" > "$STAMP"
fi

"$VENV/bin/decomp-bench" doctor
