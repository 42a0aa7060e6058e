#!/usr/bin/env bash
# A small run for some hours with a SIGKILL every minute, compared with an undisturbed run: the
# final states must be equal bit for bit, and memory and file descriptors of the undisturbed run
# must not grow. Prints the measurements. The files of a failed comparison are kept.
#
#   bash launch/soak.sh 1                    # hours
#   bash launch/soak.sh 0.1 --every 20       # arguments go to tests/faults/soak.py
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

[[ "${1:-}" =~ ^[0-9]*\.?[0-9]+$ ]] ||
    fail "give the number of hours, such as: bash launch/soak.sh 1"
hours="$1"
shift
venv="${M3I_VENV:-$ROOT/.venv-test}"
prepare "$venv" test
venv="$(cd "$venv" && pwd)"
directory="$(mktemp -d "${TMPDIR:-/tmp}/m3i-soak.XXXXXX")"
cd "$ROOT"
echo "runs in $directory" >&2
"$venv/bin/python" -m tests.faults.soak "$directory" --hours "$hours" "$@"
rm -rf "$directory"
