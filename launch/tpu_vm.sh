#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud: orders it, copies this project to all workers, runs on all of them, and after a preemption does all
# of that again, until the run is done. The workers find each other by the slice's metadata.
#
#   bash launch/tpu_vm.sh run --name m3i --project P --zone Z --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot \
#       --mount 'sudo mkdir -p /mnt/m3i; mountpoint -q /mnt/m3i || sudo mount FILESTORE:/share /mnt/m3i' --workdir /mnt/m3i/runs/first -- \
#       --config configs/m3i.py:path=/mnt/m3i/imagenet
#   bash launch/tpu_vm.sh delete --name m3i --project P --zone Z
#
#   create | run | delete   create only orders the slice; run creates it if it is not there
#   --name, --project, --zone   of the slice
#   --type, --runtime       accelerator type and software version, as `gcloud compute tpus` names them
#   --spot                  cheaper, and may be taken away
#   --mount COMMAND         run on every worker before each start, so more than once: makes data and working
#                           directory visible, as a shared file system; --mount : where workers see both
#   --workdir DIR           a directory that all workers see
#   --dry-run               print the commands
#
# Ends with 0 when the run is done, and with another status when it failed on a slice that is still there: a run that ends is looked after for
# five minutes, for ssh breaks before Google says that the slice goes; not if it refused its settings (2). The slice is never deleted except by
# `delete` and after a preemption: it costs until then. M3I_PAUSE: seconds between two looks at it (30).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

verb="${1:-}" name='' project='' zone='' type='' runtime='' spot='' mount='' workdir='' dry=''
case "$verb" in
    create | run | delete) shift ;;
    *) fail "say create, run or delete first" ;;
esac
while (($#)); do
    case "$1" in
        --spot) spot=--spot && shift ;;
        --dry-run) dry=yes && shift ;;
        --name | --project | --zone | --type | --runtime | --mount | --workdir)
            [[ -n "${2:-}" ]] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --) shift && break ;;
        *) fail "$1: there is no such flag; arguments of the run come after --" ;;
    esac
done
needed=(name project zone)
if [[ "$verb" != delete ]]; then needed+=(type runtime); fi
if [[ "$verb" == run ]]; then needed+=(workdir); fi
for flag in "${needed[@]}"; do
    [[ -n "${!flag}" ]] || fail "--$flag is missing"
done
# Without it every worker would make a --workdir on its own disk.
[[ "$verb" != run || -n "$mount" ]] || fail "--mount is missing: a command that lets every worker see --workdir; --mount : if they do"
pause="${M3I_PAUSE:-30}"
place=(--project "$project" --zone "$zone")

# Prints a command in a dry run, else runs it.
act() {
    if [[ -n "$dry" ]]; then
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

look=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)')
# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...; ABSENT
state() {
    if [[ -n "$dry" ]]; then
        echo ABSENT
    else
        "${look[@]}" 2>/dev/null || echo ABSENT
    fi
}

create() {
    # shellcheck disable=SC2086  # --spot or nothing
    act gcloud compute tpus queued-resources create "$name" --node-id "$name" "${place[@]}" \
        --accelerator-type "$type" --runtime-version "$runtime" $spot
}

delete() {
    act gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Until the slice is there, ordered anew as often as that takes.
ready() {
    local now
    while true; do
        now="$(state)"
        case "$now" in
            ACTIVE) return ;;
            ABSENT) create ;;
            FAILED | SUSPENDED | SUSPENDING) delete ;;
        esac
        if [[ -n "$dry" ]]; then
            echo "+ every $pause seconds until it prints ACTIVE:$(printf ' %q' "${look[@]}")"
            return
        fi
        if [[ "$now" != ABSENT ]]; then echo "tpu_vm.sh: $name is $now" >&2; fi
        sleep "$pause"
    done
}

# Whether the slice is taken away; looked at several times.
lost() {
    local i
    echo "tpu_vm.sh: the run ended; looking whether $name is still there" >&2
    for i in {1..10}; do
        if [[ "$(state)" != ACTIVE ]]; then return; fi
        if ((i < 10)); then sleep "$pause"; fi
    done
    return 1
}

everywhere() {
    act gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker all --command "$1"
}

copy() {
    local archive=/tmp/m3i.tar.gz
    if [[ -z "$dry" ]]; then archive="$(mktemp --suffix .tar.gz)"; fi
    act tar -C "$ROOT" -czf "$archive" m3i_jax configs launch setup.py pyproject.toml requirements.txt README.md LICENSE
    act gcloud compute tpus tpu-vm scp "$archive" "$name:m3i.tar.gz" "${place[@]}" --worker all
    if [[ -z "$dry" ]]; then rm -f "$archive"; fi
    everywhere "mkdir -p m3i && tar -C m3i -xzf m3i.tar.gz && { $mount; }"
}

run() {
    local command='cd m3i && bash launch/host.sh' argument status
    for argument in "$@" --workdir "$workdir"; do command+=" $(printf %q "$argument")"; done
    while true; do
        ready
        status=0
        copy && everywhere "$command" || status=$?
        if [[ -n "$dry" ]]; then
            echo "+ if the slice was preempted: delete, and all of this again; if it ends with 42: the last command again"
            return
        fi
        if ((status == 0)); then return; fi
        if ((status == 2)) || { ((status != 42)) && ! lost; }; then
            fail "the run ended with $status on a slice that is still there; the slice is kept"
        fi
        echo "tpu_vm.sh: preempted; going on" >&2
    done
}

"$verb" "$@"
