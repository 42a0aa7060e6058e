#!/usr/bin/env bash
# Every figure that this project claims, measured on this machine, as one table: ratios within one run, or counts; target; met or missed.
#
#   bash launch/bench.sh                       # about a quarter of an hour on two cores, with libtpu (extra tpu) half an hour
#   bash launch/bench.sh --quick               # the same at toy sizes: whether everything runs
#   bash launch/bench.sh flops checkpoint      # some of them
#   bash launch/bench.sh --gpu                 # on an accelerator: MFU at the best batch, PyTorch on the same card, memory, attention
#
# Makes a virtual environment with the extra `bench` (torch, timm, ...) in .venv-bench, once; settings as in launch/environment.sh. What
# needs a package that is missing is reported as not measured.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

accelerated=''
for argument in "$@"; do
    if [[ "$argument" == --gpu ]]; then accelerated="$(accelerator)"; fi
done
venv="${M3I_VENV:-$ROOT/.venv-bench}"
prepare "$venv" "${M3I_EXTRA-bench${accelerated:+,$accelerated}}"
venv="$(cd "$venv" && pwd)"

cd "$ROOT"
exec "$venv/bin/python" -m tests.bench.report "$@"
