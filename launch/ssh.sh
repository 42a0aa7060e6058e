#!/usr/bin/env bash
# A run on machines reached by ssh, with one process on each. All machines have the project at the
# same path, and see the working directory.
#
#   bash launch/ssh.sh --hosts node1,node2 --workdir /shared/runs/m3i -- \
#       --config configs/m3i.py:path=/shared/imagenet
#   bash launch/ssh.sh --hosts node1,node2 --workdir /shared/runs/m3i --dry-run -- \
#       --config configs/m3i.py
#
#   --hosts A,B,...   names for ssh (keys and users in ~/.ssh/config); the first is the coordinator
#   --port N          port of the coordinator (default: 8476)
#   --coordinator A   address of the first host for the others (default: its name)
#   --directory DIR   path of the project on the hosts (default: the path here)
#   --env NAME=VALUE  an environment variable of all hosts, which get none of this machine; may be
#                     repeated. No secrets: others can read command lines
#   --dry-run         print the commands, to be pasted into a shell
#
# Exits with the first status that is not 0. Ctrl-C saves the run on all hosts; the same command
# resumes it.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"
# shellcheck source=launch/signals.sh
source "$ROOT/launch/signals.sh"

hosts='' workdir='' port=8476 coordinator='' directory="$ROOT" dry='' variables=()
while (($#)); do
    case "$1" in
        --hosts) hosts="${2:?--hosts needs a list}" && shift 2 ;;
        --workdir) workdir="${2:?--workdir needs a directory}" && shift 2 ;;
        --port) port="${2:?--port needs a number}" && shift 2 ;;
        --coordinator) coordinator="${2:?--coordinator needs an address}" && shift 2 ;;
        --directory) directory="${2:?--directory needs a path}" && shift 2 ;;
        --dry-run) dry=yes && shift ;;
        --env)
            [[ "${2:-}" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE"
            variables+=("$2") && shift 2
            ;;
        --) shift && break ;;
        *) fail "$1: unknown flag; arguments of the run come after --" ;;
    esac
done
[[ -n "$hosts" ]] || fail "--hosts is missing: give the machines, such as --hosts node1,node2"
[[ -n "$workdir" ]] || fail "--workdir is missing: a directory that all machines see"

IFS=, read -ra names <<<"$hosts"
for name in "${names[@]}"; do
    [[ -n "$name" && "$name" != *[[:space:]]* ]] ||
        fail "--hosts $hosts: give names joined by commas alone, such as --hosts node1,node2"
done
coordinator="${coordinator:-${names[0]#*@}}:$port"
# a router forgets a connection without traffic, as while a step compiles
alive=-oServerAliveInterval=60
pids=() file="/tmp/m3i-\$(id -u)-$port.pid"
# ssh forwards no signals: each host writes its process id to a file, for Ctrl-C here
# shellcheck disable=SC2317  # called by the trap
stop() {
    stopped=yes
    for name in "${names[@]}"; do
        # the file may be older than the host's last start
        # shellcheck disable=SC2029  # meant to be expanded here
        ssh "$alive" "$name" "pid=\$(cat $file) && grep -qa host.sh /proc/\$pid/cmdline && kill -TERM \$pid" ||
            true
    done
}
stopped=''
if [[ -z "$dry" ]]; then trap stop INT TERM; fi
for i in "${!names[@]}"; do
    if [[ -n "$stopped" ]]; then break; fi
    command="cd $(printf %q "$directory") && echo \$\$ >$file"
    command+=" && exec env"
    for argument in ${variables[@]+"${variables[@]}"}; do command+=" $(printf %q "$argument")"; done
    command+=" bash launch/host.sh"
    for argument in "$@" --workdir "$workdir" --coordinator "$coordinator" \
        --processes "${#names[@]}" --process-id "$i"; do
        command+=" $(printf %q "$argument")"
    done
    if [[ -n "$dry" ]]; then
        echo "$(quoted ssh "$alive" "${names[$i]}" "$command") </dev/null &"
        continue
    fi
    # shellcheck disable=SC2029  # meant to be expanded here
    ssh "$alive" "${names[$i]}" "$command" </dev/null > >(sed -u "s/^/${names[$i]}: /") 2>&1 &
    pids+=($!)
done
if [[ -n "$dry" ]]; then
    echo wait
    exit 0
fi
((${#pids[@]})) || exit 130 # stopped before the first
status=0
for pid in "${pids[@]}"; do
    code=0
    finish "$pid" || code=$?
    if ((status == 0)); then status=$code; fi
done
exit "$status"
