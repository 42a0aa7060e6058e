#!/usr/bin/env bash
# Runs ruff, mypy and pytest in a virtual environment, which the first call creates.
#
#   bash launch/test.sh                            # all tests except those marked slow
#   bash launch/test.sh -m slow                    # the slow tests
#   bash launch/test.sh tests/objective -k mask    # arguments go to pytest
#   bash launch/test.sh --random 7                 # files and the tests of each, shuffled by a seed
#   bash launch/test.sh --python python3.13        # with another interpreter, in .venv-test-3.13
#
# The last line is that of pytest; the status is pytest's, or 1 if only ruff or mypy failed.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

default="$ROOT/.venv-test"
if [[ "${1:-}" == --python ]]; then
    [[ -n "${2:-}" ]] || fail "--python needs an interpreter, such as --python python3.13"
    works "$2" || fail "--python $2: does not run, or is older than Python 3.11"
    M3I_PYTHON="$2"
    default="$ROOT/.venv-test-$("$2" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    shift 2
fi
venv="${M3I_VENV:-$default}"
prepare "$venv" test
venv="$(cd "$venv" && pwd)"

# tests compile hundreds of small programs, and caching them saves most of the time; unused ones are
# deleted after a month
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/jax-cache}"
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
find "$JAX_COMPILATION_CACHE_DIR" -type f -atime +30 -delete
# one thread for each library besides XLA: on few cores more threads are slower
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export PATH="$venv/bin:$PATH"

cd "$ROOT"
failed=()
python -m ruff check --quiet --output-format concise . || failed+=(ruff)
python -m mypy || failed+=(mypy)
status=0
chosen=(-m "not slow")
for argument in "$@"; do
    case "$argument" in -m | -m*) chosen=() ;; esac
done
# three processes, each with whole files: compiling uses one core, and what waits none. The
# order of tests/conftest.py: the longest files first, or shuffled.
python -m pytest -q -n "${M3I_TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder \
    ${chosen[@]+"${chosen[@]}"} "$@" \
    </dev/null || status=$?
if ((${#failed[@]})); then
    echo "test.sh: ${failed[*]} failed, see above" >&2
    if ((status == 0)); then status=1; fi
fi
exit "$status"
