#!/usr/bin/env bash
# Runs one host of a run: installs the project once, runs `python -m m3i_jax.main ARGUMENTS`, and
# runs the same command again when it exits with 42 (preempted and saved), unless this host got the
# signal. The other launchers only reach the hosts and set coordinator, number of processes and
# workdir.
#
#   bash launch/host.sh --config configs/m3i.py:path=/mnt/m3i/imagenet --workdir /mnt/m3i/runs/first
#   bash launch/host.sh --dry-run --config configs/m3i.py --workdir runs/m3i    # prints the command
#
# Settings: those of launch/environment.sh, and M3I_AGAIN=0: exit with 42 instead of running again,
# for a scheduler that restarts the job.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
# shellcheck source=launch/signals.sh
source "$ROOT/launch/signals.sh"

venv="${M3I_VENV:-$ROOT/.venv}"
if [[ "${1:-}" == --dry-run ]]; then
    shift
    command="$(quoted "$venv/bin/python" -m m3i_jax.main "$@")"
    echo "# installs the project in $venv, unless it is there"
    if [[ "${M3I_AGAIN:-1}" != 0 ]]; then
        command="while :; do $command; ((\$? == 42)) || break; done"
    fi
    echo "$command"
    exit 0
fi
extra="${M3I_EXTRA-$(accelerator)}"
prepare "$venv" "$extra"
if [[ -z "$extra" ]]; then keep_heap; fi

stopped='' child=''
stop() {
    stopped=yes
    if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT

while true; do
    "$venv/bin/python" -m m3i_jax.main "$@" &
    child=$!
    if [[ -n "$stopped" ]]; then stop; fi # a signal came before `child` was set
    status=0
    finish "$child" || status=$?
    if ((status != 42)) || [[ -n "$stopped" || "${M3I_AGAIN:-1}" == 0 ]]; then exit "$status"; fi
    echo "host.sh: preempted and saved; running the same command again"
done
