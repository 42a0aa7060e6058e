#!/usr/bin/env bash
# A small run for so many hours with a SIGKILL every minute, beside the same run left alone: the end must be the same bits, and memory and
# descriptors of the one that is left alone must not grow. Prints what it measured. What a run that fails leaves is kept.
#
#   bash launch/soak.sh 1                    # hours
#   bash launch/soak.sh 0.1 --every 20       # arguments go to tests/faults/soak.py
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

[[ "${1:-}" =~ ^[0-9]*\.?[0-9]+$ ]] || fail "how many hours? such as: bash launch/soak.sh 1"
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
