#!/usr/bin/env bash
# Measures the project's performance figures on this machine, as one table of ratios within a run or
# counts, with their targets.
#
#   bash launch/bench.sh                     # about 15 minutes on two cores, 30 with the extra tpu
#   bash launch/bench.sh --quick             # at toy sizes, to check that everything runs
#   bash launch/bench.sh flops checkpoint    # some of the benchmarks
#   bash launch/bench.sh --gpu               # on an accelerator: MFU at the best batch, PyTorch on
#                                            # the same device, memory, attention
#
# Creates a virtual environment with the extra `bench` (torch, timm, ...) in .venv-bench once; for
# its settings see launch/environment.sh. A benchmark whose package is missing is reported as not
# measured.
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
