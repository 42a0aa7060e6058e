#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud: requests the slice, waits until it is there, copies this
# project to all workers, mounts the data, runs on all workers, and repeats that after a preemption
# until the run is done. The workers find each other by the slice's metadata.
#
#   bash launch/tpu_vm.sh run --name m3i --project P --zone Z \
#       --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot --data gs://BUCKET \
#       --workdir /mnt/m3i/runs/first -- --config configs/m3i.py:path=/mnt/m3i/imagenet
#   bash launch/tpu_vm.sh delete --name m3i --project P --zone Z
#
#   create | run | delete   create requests the slice; run also creates an absent slice
#   --name, --project, --zone   of the slice
#   --type, --runtime       accelerator type and software version, as in `gcloud compute tpus`
#   --spot                  cheaper, may be preempted
#   --wait MINUTES          how long to wait for the slice (default: 1440)
#   --data gs://BUCKET/...  a bucket or a folder of one, which launch/gcsfuse.sh mounts at /mnt/m3i
#                           on every worker
#   --data DIR              a directory that every worker must have
#   --mount COMMAND         runs on every worker before each start, so more than once; mounts other
#                           file systems of data and working directory. `--mount :` if they are
#   --workdir DIR           a directory that all workers see
#   --env NAME=VALUE        an environment variable of all workers, also of --mount and of
#                           launch/gcsfuse.sh (M3I_GCSFUSE); they get none of this machine. May be
#                           repeated. No secrets: others can read command lines
#   --dry-run               print the commands, to be pasted into a shell
#
# Exits with 0 when the run is done, and with another status when it failed on a slice that still
# exists. After a failure it checks the slice for five minutes, since ssh breaks before Google
# reports a preemption; not if the run refused its settings (2) or does not fit (3). Only `delete`, a
# preemption and a failed request delete the slice: it costs until then. gcloud forwards no signals:
# Ctrl-C here may leave the run on the workers, which `delete` ends. M3I_PAUSE: seconds between two
# checks (default: 30).
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

DATA=/mnt/m3i # where a bucket is mounted
verb="${1:-}" name='' project='' zone='' type='' runtime='' spot='' data='' mount='' workdir='' dry=''
wait=1440 variables=()
case "$verb" in
    create | run | delete) shift ;;
    *) fail "the first argument must be create, run or delete" ;;
esac
while (($#)); do
    case "$1" in
        --spot) spot=--spot && shift ;;
        --dry-run) dry=yes && shift ;;
        --name | --project | --zone | --type | --runtime | --data | --mount | --workdir | --wait)
            [[ -n "${2:-}" ]] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --env)
            [[ "${2:-}" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE"
            variables+=("$2") && shift 2
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
[[ "$wait" =~ ^[0-9]{1,6}$ ]] || fail "--wait $wait: give a whole number of minutes"
wait=$((10#$wait)) # with a leading 0 it would be octal
case "$data" in
    '' | /*) ;;
    gs://*) bash "$ROOT/launch/gcsfuse.sh" "$data" "$DATA" --dry-run >/dev/null || exit 2 ;;
    *) fail "--data $data: give gs://BUCKET, or the whole path of a directory of the workers" ;;
esac
# else every worker would create --workdir on its own disk
if [[ "$verb" == run && -z "$mount" ]]; then
    [[ "$data" == gs://* ]] ||
        fail "--mount or --data gs://BUCKET is missing: with it all workers see --workdir;" \
            "--mount : if they do"
    [[ "$workdir" == "$DATA"/* ]] ||
        fail "--workdir $workdir: is not in the bucket, which is mounted at $DATA;" \
            "or say with --mount how all workers see it"
fi
pause="${M3I_PAUSE:-30}"
location=(--project "$project" --zone "$zone")

# prints a command in a dry run, else runs it
act() {
    if [[ -n "$dry" ]]; then quoted "$@"; else "$@"; fi
}

# prints a comment in a dry run
say() {
    if [[ -n "$dry" ]]; then printf '# %s\n' "$*"; fi
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

# waits until the slice is active, and requests it again after a preemption
ready() {
    local now last='' begun=$SECONDS printed=$SECONDS failures=0 refused=0 kept=0 why
    if [[ -n "$dry" ]]; then
        say "request the slice, unless it exists, and wait until it is there"
        create
        echo "SECONDS=0; until [[ \"\$($(quoted "${describe[@]}"))\" == ACTIVE ]] ||" \
            "((SECONDS > $wait * 60)); do sleep $pause; done"
        return
    fi
    while true; do
        now="$(state)"
        case "$now" in
            ACTIVE) return ;;
            ABSENT) # a moment without network looks the same, and the slice cannot be made then
                create || ((++refused < 3)) ||
                    fail "$name could not be requested; see gcloud's messages above"
                ;;
            SUSPENDED | FAILED) # SUSPENDING cannot be deleted yet
                if [[ "$now" == FAILED ]]; then
                    why="$("${describe[@]:0:$((${#describe[@]} - 1))}" \
                        'value(state.failedData.error.message)' 2>/dev/null || true)"
                    ((++failures < 3)) ||
                        fail "the request for $name failed three times: ${why:-no reason is given}"
                fi
                delete || ((++kept < 3)) ||
                    fail "$name is $now and could not be deleted; see gcloud's messages above"
                ;;
        esac
        if [[ "$now" != ABSENT ]]; then refused=0; fi
        if [[ "$now" != "$last" ]] || ((SECONDS - printed >= 600)); then
            echo "tpu_vm.sh: $name is $now; waited $(((SECONDS - begun) / 60)) of at most $wait" \
                "minutes for it" >&2
            last="$now" printed=$SECONDS
        fi
        ((SECONDS - begun < wait * 60)) ||
            fail "$name is still $now after $wait minutes; it stays in the queue: the same command" \
                "waits on, and launch/tpu_vm.sh delete ends the request"
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
    # a router forgets a connection without traffic, as while a step compiles
    act gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" --worker all \
        --ssh-flag=-oServerAliveInterval=60 --command "$1"
}

copy() {
    local archive=/tmp/m3i.tar.gz argument part parts=() prepared=''
    # also for what mounts and installs: M3I_GCSFUSE, or the proxy of a package index
    for argument in ${variables[@]+"${variables[@]}"}; do
        prepared+="export $(printf %q "$argument") && "
    done
    prepared+='mkdir -p m3i && tar -C m3i -xzf m3i.tar.gz && bash m3i/launch/python.sh'
    if [[ -z "$dry" ]]; then archive="$temporary/m3i.tar.gz"; fi
    # beside a copy of launch/ that `m3i-jax init` made there are recipes in place of the package
    for part in m3i_jax configs launch setup.py pyproject.toml requirements.txt README.md \
        LICENSE; do
        if [[ -e "$ROOT/$part" ]]; then parts+=("$part"); fi
    done
    if [[ -e "$ROOT/launch/VERSION" ]]; then
        for part in "$ROOT"/*.py; do
            if [[ -f "$part" ]]; then parts+=("${part##*/}"); fi
        done
    fi
    say "copy the project to all workers${data:+, and mount or find $data}"
    act tar -C "$ROOT" -czf "$archive" "${parts[@]}" || return
    act gcloud compute tpus tpu-vm scp "$archive" "$name:m3i.tar.gz" "${location[@]}" \
        --worker all || return
    if [[ -n "$mount" ]]; then prepared+=" && { $mount; }"; fi
    case "$data" in
        gs://*) prepared+=" && bash m3i/launch/gcsfuse.sh $(printf %q "$data") $DATA" ;;
        /*)
            prepared+=" && { test -d $(printf %q "$data") || { echo --data $(printf %q "$data"):"
            prepared+=" no such directory on \$HOSTNAME >&2; exit 2; }; }"
            ;;
    esac
    on_all_workers "$prepared"
}

run() {
    # exit 42 of one worker starts all again here: the others would wait for it. gcloud starts the
    # command once more where the connection broke, with the same M3I_START
    local environment='cd m3i && env M3I_AGAIN=0 M3I_ONCE=.once' command='' start='' argument status
    for argument in ${variables[@]+"${variables[@]}"}; do command+=" $(printf %q "$argument")"; done
    command+=' bash launch/host.sh'
    if [[ -z "$dry" ]]; then
        temporary="$(mktemp -d)"
        trap 'rm -rf "$temporary"' EXIT
    fi
    for argument in "$@" --workdir "$workdir"; do command+=" $(printf %q "$argument")"; done
    while true; do
        ready
        status=0
        # once more: a server of packages or keys may be away for a moment
        copy || { sleep "$pause" && copy; } || status=$?
        if ((status == 0)); then
            say "run on all workers"
            if [[ -z "$dry" ]]; then start=" M3I_START=$(date +%s)-$RANDOM"; fi
            on_all_workers "$environment$start$command" || status=$?
        fi
        if [[ -n "$dry" ]]; then
            say "after exit 42: the last command again; after a preemption: the next, and all again"
            say "$(delete)"
            return
        fi
        if ((status == 0)); then return; fi
        if ((status == 2 || status == 3)) || { ((status != 42)) && ! lost; }; then
            fail "the run exited with $status on a slice that still exists; the slice is kept"
        fi
        echo "tpu_vm.sh: preempted; starting again" >&2
    done
}

"$verb" "$@"
