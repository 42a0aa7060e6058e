# shellcheck shell=bash
# Sourced by the other scripts.

# finish PID: waits until a child of this shell ends, also after signals, and returns its status. A
# signal ends `wait`, but not the run, which then saves.
finish() {
    local status=0
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    # may be the signal's status, if the child ended before kill -0: bash still has the child's
    if ((status > 128)); then
        status=0
        wait "$1" || status=$?
    fi
    return "$status"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then echo "signals.sh: functions for the other scripts"; fi
