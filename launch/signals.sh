# shellcheck shell=bash
# Sourced by the scripts beside it.

# finish PID: waits for a child of this shell to its end, whatever signals come meanwhile, and returns its status. A signal ends `wait`, not
# the run, which is then saving.
finish() {
    local status=0
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if ((status > 128)); then # perhaps of the signal, and the child ended before it was looked at: bash still knows its status
        status=0
        wait "$1" || status=$?
    fi
    return "$status"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then echo "signals.sh: functions for the scripts beside it; it does nothing by itself"; fi
