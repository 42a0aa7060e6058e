#!/usr/bin/env bash
# A run on a TPU slice of a cluster of Google's Cluster Toolkit 1.90 or newer: its command gcluster
# makes a JobSet with a Kueue queue, as launch/gke.yaml does where only kubectl is at hand. The
# variables are those of launch/gke.yaml:
#
#   gcluster job config set project P    # once; and cluster, and location
#   export M3I_NAME=m3i M3I_IMAGE=REGISTRY/m3i:1 M3I_ACCELERATOR=tpu-v6e-slice M3I_TOPOLOGY=4x4 ...
#   bash launch/gcluster.sh --dry-run    # prints the command
#   bash launch/gcluster.sh
#   bash launch/gcluster.sh -- --dry-run-out m3i.yaml    # flags after -- go to gcluster
#
# Needs M3I_NAME (at most 28 characters), M3I_IMAGE, M3I_ACCELERATOR, M3I_TOPOLOGY, M3I_BUCKET,
# M3I_ACCOUNT, M3I_WORKDIR and M3I_ARGUMENTS, and reads M3I_QUEUE (gcluster finds a single queue
# itself) and M3I_RESTARTS (default: 100). gcluster counts all restarts alike, also those after exit
# 42, so there are more of them than in gke.yaml. Refused settings (exit 2) and a model that does
# not fit (3) end the run at once. The bucket must have a hierarchical namespace: gcluster passes no
# mount options, and but for large machines gcsfuse renames directories in no other bucket. On those
# (v5p, v6e and eight chips of v5e) it keeps what it knows of a file while it is mounted, so that a
# host does not notice a file that another replaces; launch/gke.yaml sets a minute.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

dry=''
if [[ "${1:-}" == --dry-run ]]; then dry=yes && shift; fi
if (($#)); then
    [[ "$1" == -- ]] || fail "$1: unknown flag; flags of gcluster come after --"
    shift
fi
missing=()
for name in NAME IMAGE ACCELERATOR TOPOLOGY BUCKET ACCOUNT WORKDIR ARGUMENTS; do
    name="M3I_$name"
    if [[ -z "${!name:-}" ]]; then missing+=("$name"); fi
done
((${#missing[@]} == 0)) ||
    fail "${missing[*]} not set; the comment at the top of launch/gke.yaml describes them"
readable M3I_ARGUMENTS
((${#M3I_NAME} <= 28)) || fail "M3I_NAME: $M3I_NAME has more than gcluster's 28 characters"

run="bash launch/host.sh $M3I_ARGUMENTS --workdir $(quoted "$M3I_WORKDIR")"
# 1: failed, or a host was lost; 134: JAX ended it, since the first host was lost; 137, 143: killed
# with its pod. The shared memory of the node is for the batches of data workers: without it a
# container has 64 MiB, and gcluster has no other volume in memory
command=(gcluster job submit --name "$M3I_NAME" --image "$M3I_IMAGE"
    --compute-type "$M3I_ACCELERATOR" --topology "$M3I_TOPOLOGY"
    --mount "gs://${M3I_BUCKET#gs://}:/mnt/m3i:rw" --mount /dev/shm:/dev/shm:rw
    --service-account "$M3I_ACCOUNT"
    --grace-period 120s --restarts "${M3I_RESTARTS:-100}" --restart-on-exit-codes "1,42,134,137,143"
    ${M3I_QUEUE:+--queue "$M3I_QUEUE"}
    --command "cd /m3i && M3I_AGAIN=0 exec $run" "$@")
if [[ -n "$dry" ]]; then
    quoted "${command[@]}"
else
    command -v gcluster >/dev/null ||
        fail "gcluster is not installed; launch/apply.sh needs only kubectl"
    exec "${command[@]}"
fi
