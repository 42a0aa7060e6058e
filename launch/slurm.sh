#!/usr/bin/env bash
# A run under Slurm, with one process on each node for all of its GPUs. Give sbatch the partition,
# the account and the kind of GPU:
#
#   sbatch --nodes=4 --gpus-per-node=8 --partition=NAME launch/slurm.sh \
#       --workdir /shared/runs/m3i --config configs/m3i.py:path=/shared/imagenet
#   bash launch/slurm.sh --dry-run --workdir /shared/runs/m3i --config configs/m3i.py
#       # prints the commands, to be pasted into a shell
#
# Two minutes before the time limit, or in the grace time of a preemption, the run saves and exits
# with 42, and the job requeues itself; also where the signal comes while host.sh installs or Python
# starts (143).
# After scancel the run saves as well, in the seconds that Slurm gives it (KillWait), and the job
# ends. All nodes must see the project and the working directory; submit from the project.
#SBATCH --job-name=m3i
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=m3i-%j.log
set -euo pipefail
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            awk 'NR > 1 && !/^#/ { exit }
                NR > 1 && !/^#( shellcheck|SBATCH)/ { sub(/^# ?/, ""); print }' "$0"
            exit 0
            ;;
    esac
done
# Slurm runs a copy of this file; the project is where the job was submitted
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -f launch/host.sh ]]; then
    echo "slurm.sh: there is no launch/host.sh in $PWD: submit the job from the project" >&2
    exit 2
fi

dry=''
if [[ "${1:-}" == --dry-run ]]; then dry=yes && shift; fi
if [[ -z "$dry" && -z "${SLURM_JOB_ID:-}" ]]; then
    echo "slurm.sh: not in a Slurm job: submit it with sbatch --nodes=2 launch/slurm.sh $*," \
        "or add --dry-run" >&2
    exit 2
fi
if [[ " $* " != *" --workdir"* ]]; then
    echo "slurm.sh: --workdir is missing: a directory that all nodes see" >&2
    exit 2
fi

nodes="${SLURM_JOB_NUM_NODES:-2}"
if [[ -n "${SLURM_JOB_NODELIST:-}" ]] && command -v scontrol >/dev/null; then
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
else
    first=FIRST-NODE
fi
# one port for each job, since jobs may share a node
coordinator="$first:$((61440 + ${SLURM_JOB_ID:-0} % 4096))"

# only srun knows the index of a process; some clusters would bind it to one core
# shellcheck disable=SC2016
step=(srun --kill-on-bad-exit=0 "--ntasks=$nodes" --ntasks-per-node=1 --cpu-bind=none
    bash -c 'M3I_AGAIN=0 exec bash launch/host.sh "$@" --process-id "$SLURM_PROCID"' host
    "$@" --coordinator "$coordinator" --processes "$nodes")
again=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if [[ -n "$dry" ]]; then
    command="$(printf '%q ' "${step[@]}")||"
    command+=" { code=\$?; ((code != 42 && code != 143)) || ${again[*]}; }"
    printf 'cd %q\n' "$PWD"
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        echo "sbatch --nodes=$nodes launch/slurm.sh$(printf ' %q' "$@")"
        printf '# and the job does, on its nodes:\n# '
    fi
    echo "$command"
    exit 0
fi

# This shell waits until the step has saved. --signal and a preemption with grace time reach only
# the step; this shell as well, where Slurm ends the job: after scancel, which would queue it again
# for ever, and at the time limit. What Slurm itself requeues needs nothing here.
ended=''
trap 'ended=yes' TERM
status=0
"${step[@]}" || status=$?
# 143: the signal came while host.sh installed or Python started, when there was nothing to save
limit="${SLURM_JOB_END_TIME:-0}"
if [[ -n "$ended" ]] && ((limit == 0 || $(date +%s) < limit)); then
    echo "slurm.sh: Slurm ends the job (scancel, or a preemption without grace time):" \
        "not requeued here"
elif ((status == 42 || status == 143)); then
    echo "slurm.sh: preempted and saved; requeueing the job"
    "${again[@]}"
fi
exit "$status"
