#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud: requests the slice, copies this project to all workers, runs
# on all of them, and repeats that after a preemption until the run is done. The workers find each
# other by the slice's metadata.
#
#   bash launch/tpu_vm.sh run --name m3i --project P --zone Z \
#       --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot \
#       --mount 'sudo mkdir -p /mnt/m3i; mountpoint -q /mnt/m3i || sudo mount FS:/share /mnt/m3i' \
#       --workdir /mnt/m3i/runs/first -- --config configs/m3i.py:path=/mnt/m3i/imagenet
#   bash launch/tpu_vm.sh delete --name m3i --project P --zone Z
#
#   create | run | delete   create requests the slice; run also creates an absent slice
#   --name, --project, --zone   of the slice
#   --type, --runtime       accelerator type and software version, as in `gcloud compute tpus`
#   --spot                  cheaper, may be preempted
#   --mount COMMAND         runs on every worker before each start, so more than once; mounts the
#                           file system of data and working directory. `--mount :` if it is mounted
#   --workdir DIR           a directory that all workers see
#   --dry-run               print the commands
#
# Exits with 0 when the run is done, and with another status when it failed on a slice that still
# exists. After a failure it checks the slice for five minutes, since ssh breaks before Google
# reports a preemption; not if the run refused its settings (2). Only `delete` and a preemption
# delete the slice: it costs until then. M3I_PAUSE: seconds between two checks (default: 30).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

verb="${1:-}" name='' project='' zone='' type='' runtime='' spot='' mount='' workdir='' dry=''
case "$verb" in
    create | run | delete) shift ;;
    *) fail "the first argument must be create, run or delete" ;;
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
        *) fail "$1: unknown flag; arguments of the run come after --" ;;
    esac
done
needed=(name project zone)
if [[ "$verb" != delete ]]; then needed+=(type runtime); fi
if [[ "$verb" == run ]]; then needed+=(workdir); fi
for flag in "${needed[@]}"; do
    [[ -n "${!flag}" ]] || fail "--$flag is missing"
done
# without it every worker would create --workdir on its own disk
[[ "$verb" != run || -n "$mount" ]] ||
    fail "--mount is missing: a command after which all workers see --workdir; --mount : if they do"
pause="${M3I_PAUSE:-30}"
location=(--project "$project" --zone "$zone")

# prints a command in a dry run, else runs it
act() {
    if [[ -n "$dry" ]]; then
        printf '+'
        printf ' %q' "$@"
        printf '\n'
    else
        "$@"
    fi
}

describe=(gcloud compute tpus queued-resources describe "$name" "${location[@]}"
    --format 'value(state.state)')
# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...; ABSENT
state() {
    if [[ -n "$dry" ]]; then
        echo ABSENT
    else
        "${describe[@]}" 2>/dev/null || echo ABSENT
    fi
}

create() {
    # shellcheck disable=SC2086  # --spot or nothing
    act gcloud compute tpus queued-resources create "$name" --node-id "$name" "${location[@]}" \
        --accelerator-type "$type" --runtime-version "$runtime" $spot
}

delete() {
    act gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet
}

# waits until the slice is active, and requests it again if it fails
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
            echo "+ every $pause seconds until it prints ACTIVE:$(printf ' %q' "${describe[@]}")"
            return
        fi
        if [[ "$now" != ABSENT ]]; then echo "tpu_vm.sh: $name is $now" >&2; fi
        sleep "$pause"
    done
}

# whether the slice was preempted, checked several times
lost() {
    local i
    echo "tpu_vm.sh: the run ended; checking whether $name still exists" >&2
    for i in {1..10}; do
        if [[ "$(state)" != ACTIVE ]]; then return; fi
        if ((i < 10)); then sleep "$pause"; fi
    done
    return 1
}

on_all_workers() {
    act gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" --worker all --command "$1"
}

copy() {
    local archive=/tmp/m3i.tar.gz
    if [[ -z "$dry" ]]; then archive="$(mktemp --suffix .tar.gz)"; fi
    act tar -C "$ROOT" -czf "$archive" m3i_jax configs launch setup.py pyproject.toml \
        requirements.txt README.md LICENSE
    act gcloud compute tpus tpu-vm scp "$archive" "$name:m3i.tar.gz" "${location[@]}" --worker all
    if [[ -z "$dry" ]]; then rm -f "$archive"; fi
    on_all_workers "mkdir -p m3i && tar -C m3i -xzf m3i.tar.gz && { $mount; }"
}

run() {
    local command='cd m3i && bash launch/host.sh' argument status
    for argument in "$@" --workdir "$workdir"; do command+=" $(printf %q "$argument")"; done
    while true; do
        ready
        status=0
        copy && on_all_workers "$command" || status=$?
        if [[ -n "$dry" ]]; then
            echo "+ after a preemption: delete, and all of this again;" \
                "after exit 42: the last command again"
            return
        fi
        if ((status == 0)); then return; fi
        if ((status == 2)) || { ((status != 42)) && ! lost; }; then
            fail "the run exited with $status on a slice that still exists; the slice is kept"
        fi
        echo "tpu_vm.sh: preempted; starting again" >&2
    done
}

"$verb" "$@"
