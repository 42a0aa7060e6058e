#!/usr/bin/env bash
# The whole check: ruff, mypy, pytest, in a virtual environment of its own that is made on the first call and kept.
#
#   bash launch/test.sh                             # everything but the tests marked slow
#   bash launch/test.sh -m slow                     # those
#   bash launch/test.sh tests/objective -k mask     # arguments go to pytest
#   bash launch/test.sh --random 7                  # files, and the tests of each, in an order drawn with this seed
#   bash launch/test.sh --python python3.13         # with another interpreter, in .venv-test-3.13
#
# The last line is pytest's closing line; the status is pytest's, or 1 if only ruff or mypy complained.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

default="$ROOT/.venv-test"
if [[ "${1:-}" == --python ]]; then
    [[ -n "${2:-}" ]] || fail "--python needs an interpreter, such as --python python3.13"
    works "$2" || fail "--python $2: that does not run, or is older than Python 3.11"
    M3I_PYTHON="$2"
    default="$ROOT/.venv-test-$("$2" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    shift 2
fi
venv="${M3I_VENV:-$default}"
prepare "$venv" test
venv="$(cd "$venv" && pwd)"

# Tests compile hundreds of small programs: kept from run to run, they are most of the time saved. A month unused, they go.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/jax-cache}"
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
find "$JAX_COMPILATION_CACHE_DIR" -type f -atime +30 -delete
# One thread for each library below XLA: on few cores they only take turns.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export PATH="$venv/bin:$PATH"

cd "$ROOT"
complaints=()
python -m ruff check --quiet --output-format concise . || complaints+=(ruff)
python -m mypy || complaints+=(mypy)
status=0
chosen=(-m "not slow")
for argument in "$@"; do
    case "$argument" in -m | -m*) chosen=() ;; esac
done
# Two processes, a file each: much of the suite is compiling, which keeps one core busy.
python -m pytest -q -n "${M3I_TEST_PROCESSES:-2}" --dist loadfile ${chosen[@]+"${chosen[@]}"} "$@" </dev/null || status=$?
if ((${#complaints[@]})); then
    echo "test.sh: ${complaints[*]} complained, see above" >&2
    if ((status == 0)); then status=1; fi
fi
exit "$status"
