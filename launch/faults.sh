#!/usr/bin/env bash
# Runs the fault matrix with its long versions, and writes the results to tests/faults/RESULTS.md.
# Takes one to two hours on two cores.
#
#   bash launch/faults.sh                    # all rows
#   bash launch/faults.sh tests/faults/test_saves.py
#   bash launch/faults.sh -k "flipped"       # arguments go to pytest; tests that do not run keep
#                                            # their last result (RESULTS.json)
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

venv="${M3I_VENV:-$ROOT/.venv-test}"
prepare "$venv" test
venv="$(cd "$venv" && pwd)"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$venv/jax-cache}"
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"

cd "$ROOT"
export M3I_FAULTS_RESULTS="${M3I_FAULTS_RESULTS:-tests/faults/RESULTS.md}"
where=tests
for argument in "$@"; do
    # test_matrix.py as well: the conftest.py beside it writes the table
    if [[ -e "${argument%%::*}" ]]; then where=tests/faults/test_matrix.py; fi
done
status=0
# one process: several tests measure time or fill a disk
"$venv/bin/python" -m pytest -q -n 0 -m row "$where" "$@" </dev/null || status=$?
echo "$M3I_FAULTS_RESULTS"
exit "$status"
