#!/usr/bin/env bash
# Installs the project for the accelerator of this machine, pre-trains a small M3I model on rendered
# shapes, evaluates it before and after, and prints the results and where the images are.
#
#   bash launch/quickstart.sh                              # in runs/quickstart
#   bash launch/quickstart.sh --config.train.steps=1000    # arguments go to the run; the same
#                                                          # command again resumes it
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

extra="${M3I_EXTRA-$(accelerator)}"
venv="${M3I_VENV:-$ROOT/.venv}"
prepare "$venv" "$extra"
venv="$(cd "$venv" && pwd)"

if [[ -z "$extra" ]]; then
    # level 1 compiles in three quarters of the time; steps, mostly matrix products, take as long
    if [[ "${XLA_FLAGS:-}" != *--xla_backend_optimization_level=* ]]; then
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=1"
    fi
    keep_heap
fi

# the program refuses a flag that is given twice
own=(--config configs/quickstart.py) place=(--workdir runs/quickstart) workdir=runs/quickstart
for ((i = 1; i <= $#; i++)); do
    case "${!i}" in
        --config | --config=*) own=() ;;
        --workdir=*) place=() workdir="${!i#*=}" ;;
        --workdir) next=$((i + 1)) && place=() workdir="${!next:-}" ;;
    esac
done

cd "$ROOT"
"$venv/bin/python" -m m3i_jax.main ${own[@]+"${own[@]}"} ${place[@]+"${place[@]}"} "$@"

"$venv/bin/python" - "$workdir" <<'PYTHON'
import json
import pathlib
import sys

workdir = pathlib.Path(sys.argv[1]).resolve()
log = workdir / "metrics.jsonl"
rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
# a value that is not finite is a text
knn = sorted((row["step"], float(row["eval/knn/top1"])) for row in rows if "eval/knn/top1" in row)
loss = sorted((row["step"], float(row["loss"])) for row in rows if "loss" in row)
print()
for name, values, form in (
    ("kNN top-1 on held-out images", knn, "{:.1%}"),
    ("loss", loss, "{:.3f}"),
):
    if len(values) > 1:
        (first, before), (last, after) = values[0], values[-1]
        print(f"{name}: {form.format(before)} at step {first}, {form.format(after)} at step {last}")
print(f"all metrics:  {log}")
print(f"report:       {workdir / 'report.html'}")
print(f"images:       {workdir / 'panels'}, {workdir / 'pictures'}")
PYTHON
