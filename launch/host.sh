#!/usr/bin/env bash
# What every host of a run does, whoever started it: installs once, runs `python -m m3i_jax.main ARGUMENTS`, and runs the same command again
# when it ends with 42 (preempted and saved), unless it was this host that was told to go. The launchers beside it differ only in how they
# reach the hosts, and in coordinator, count and working directory.
#
#   bash launch/host.sh --config configs/m3i.py:path=/mnt/m3i/imagenet --workdir /mnt/m3i/runs/first
#   bash launch/host.sh --dry-run --config configs/m3i.py --workdir runs/m3i     # prints the command
#
# Settings: those of launch/environment.sh, and M3I_AGAIN=0: end with 42 instead of running again (where a scheduler does that).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
# shellcheck source=launch/signals.sh
source "$ROOT/launch/signals.sh"

venv="${M3I_VENV:-$ROOT/.venv}"
if [[ "${1:-}" == --dry-run ]]; then
    shift
    printf '+'
    printf ' %q' "$venv/bin/python" -m m3i_jax.main "$@"
    printf '\n+ again while it ends with 42: %s\n' "$([[ "${M3I_AGAIN:-1}" == 0 ]] && echo no || echo yes)"
    exit 0
fi
extra="${M3I_EXTRA-$(accelerator)}"
prepare "$venv" "$extra"
if [[ -z "$extra" ]]; then keep_heap; fi

told='' child=''
tell() {
    told=yes
    if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap tell TERM INT

while true; do
    "$venv/bin/python" -m m3i_jax.main "$@" &
    child=$!
    status=0
    finish "$child" || status=$?
    if ((status != 42)) || [[ -n "$told" || "${M3I_AGAIN:-1}" == 0 ]]; then exit "$status"; fi
    echo "host.sh: preempted and saved; running the same command again"
done
