#!/usr/bin/env bash
# Runs one host of a run: installs the project once, runs `python -m m3i_jax.main ARGUMENTS`, and
# runs the same command again when it exits with 42 (preempted and saved), unless this host got the
# signal. The other launchers only reach the hosts and set coordinator, number of processes and
# workdir.
#
#   bash launch/host.sh --config configs/m3i.py:path=/mnt/m3i/imagenet --workdir /mnt/m3i/runs/first
#   bash launch/host.sh --dry-run --config configs/m3i.py --workdir runs/m3i    # prints the command
#
# Settings: those of launch/environment.sh, M3I_AGAIN=0: exit with 42 instead of running again, for
# a scheduler that restarts the job, and M3I_ONCE=FILE: a second start of the same command waits for
# the first and exits with its status. FILE is on a disk of this machine. With M3I_START=NAME, which
# differs for every start that is meant, it also does so where the first has ended.
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
# once: only the first of several starts of this command goes on
once() {
    local begun='' code='' own again="${M3I_START:-}"
    own="$(printf '%q ' "${M3I_START:-}" "$@" | cksum)"
    exec 9>>"$M3I_ONCE"
    if ! flock -n 9; then
        echo "host.sh: an earlier start is at work here; waiting for its end" >&2
        flock 9
        again=yes
    fi
    if [[ -n "$again" ]]; then
        { IFS=: read -r begun code <"$M3I_ONCE.status"; } 2>/dev/null || true
        if [[ "$begun" == "$own" && "$code" =~ ^[0-9]+$ ]]; then exit "$code"; fi
    fi
    rm -f "$M3I_ONCE.status"
    # shellcheck disable=SC2064  # `own` is of now
    trap "echo \"$own:\$?\" >\"\$M3I_ONCE.status\"" EXIT
}
if [[ -n "${M3I_ONCE:-}" ]] && command -v flock >/dev/null; then once "$@"; fi

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
    "$venv/bin/python" -m m3i_jax.main "$@" 9>&- & # no process of the run holds the lock
    child=$!
    if [[ -n "$stopped" ]]; then stop; fi # a signal came before `child` was set
    status=0
    finish "$child" || status=$?
    if ((status != 42)) || [[ -n "$stopped" || "${M3I_AGAIN:-1}" == 0 ]]; then exit "$status"; fi
    echo "host.sh: preempted and saved; running the same command again"
done
