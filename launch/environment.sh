# shellcheck shell=bash
# Sourced by the other scripts: finds a Python, creates a virtual environment and installs the
# project into it, again only after a change. Settings (environment variables):
#   M3I_VENV     directory of the virtual environment (each script has a default)
#   M3I_PYTHON   interpreter for it (default: python3, else the newest supported one)
#   M3I_EXTRA    extra to install (default: that of the detected accelerator; empty: CPU)
#   M3I_INSTALL  0: use the environment as it is, install nothing

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# usage ARGUMENTS: with --help or -h before any --, prints the comment at the top of the script and
# exits with 0. Called before anything is created or installed.
usage() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --) return ;;
            -h | --help)
                awk 'NR > 1 && !/^#/ { exit }
                    NR > 1 && !/^#( shellcheck|SBATCH)/ { sub(/^# ?/, ""); print }' "$0"
                exit 0
                ;;
        esac
    done
}

# quoted COMMAND...: prints a command, such that a shell can read it
quoted() {
    local word between=''
    for word in "$@"; do
        if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            # shellcheck disable=SC2001  # quotes in a replacement differ between versions of bash
            word="'$(sed "s/'/'\\\\''/g" <<<"$word")'"
        fi
        printf '%s%s' "$between" "$word"
        between=' '
    done
    printf '\n'
}

# readable NAME: refuses a variable with words that a shell cannot read, as that of a pod or a task
readable() {
    bash -n -c ": ${!1}" 2>/dev/null ||
        fail "$1: a shell cannot read ${!1}: put quotes around words with brackets or blanks," \
            "such as '--config.parallel.mesh=(1,-1,1)'"
}

# works PYTHON [MINOR]: it runs, and is Python 3.11 or newer, or exactly 3.MINOR
works() {
    "$1" -c 'import sys
v = sys.version_info[:2]
sys.exit(not (v == (3, int(sys.argv[1])) if sys.argv[1:] else v >= (3, 11)))' "${@:2}" \
        >/dev/null 2>&1
}

find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    candidates+=("$HOME/.local/bin/python3.13") # of launch/python.sh, which may be on no PATH
    if [[ -n "${M3I_PYTHON:-}" ]]; then candidates=("$M3I_PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if works "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer (tried ${M3I_PYTHON:-python3, python3.11 to python3.14}):" \
        "install one (launch/python.sh does), or set M3I_PYTHON"
}

# The extra for the accelerator of this machine; nothing on a CPU. Only numbered devices are TPUs,
# not the control node /dev/vfio/vfio.
accelerator() {
    if [[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU* ]]; then
        echo cuda
    elif [[ -n "${TPU_NAME:-}" ]] || compgen -G '/dev/accel[0-9]*' >/dev/null ||
        compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        echo tpu
    fi
}

# On a CPU every step frees and allocates large buffers. Kept in the heap in pages of 2 MB, they
# need no page faults: that saves a quarter of the processor time of a large step, for about twice
# the memory. Two arenas a core, since small steps allocate often and would wait for a single one.
# Variables that are set already are kept.
keep_heap() {
    export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-$((2 * $(getconf _NPROCESSORS_ONLN)))}"
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
    export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}

# locked PYTHON TEXT: locks the open file 9 until this shell closes it, and prints TEXT if that
# waits. In Python, since macOS has no flock(1); on NFS the lock holds between hosts. Without file
# locks it prints a warning and continues.
locked() {
    "$1" - "$2" <<'PYTHON'
import fcntl
import sys

try:
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        print(sys.argv[1], flush=True)
        fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    print(
        f"no file locks ({error.strerror}): if hosts share this directory, start one host first",
        flush=True,
    )
PYTHON
}

# prepare DIR EXTRA: creates in DIR a virtual environment with the project (editable) and that
# extra, at the versions of requirements.txt; beside a copy of launch/ that `m3i-jax init` made,
# with the released version that made it. Of hosts that share DIR, the first does it and the
# others wait.
prepare() {
    local venv="${1%/}" extra="$2" python stamp lock requirement
    if [[ "${M3I_INSTALL:-1}" == 0 ]]; then
        [[ -x "$venv/bin/python" ]] ||
            fail "M3I_INSTALL=0, but $venv is no environment: set M3I_VENV, or unset M3I_INSTALL"
        return
    fi
    python="$(find_python)"
    if [[ -f "$ROOT/setup.py" ]]; then
        stamp="$(cat "$ROOT/setup.py" "$ROOT/requirements.txt" "$ROOT/m3i_jax/version.py" | cksum)"
        requirement=(-e "${ROOT}[${extra:-train}]" -c "$ROOT/requirements.txt")
    else
        [[ -f "$ROOT/launch/VERSION" ]] ||
            fail "there is no project in $ROOT: copy these scripts by m3i-jax init DIR --launch"
        stamp="$(cat "$ROOT/launch/VERSION")"
        requirement=("m3i-jax[${extra:-train}]==$stamp")
    fi
    stamp="$("$python" -V) extra=$extra root=$ROOT $stamp"
    if prepared; then return; fi
    mkdir -p "$(dirname "$venv")"
    # beside DIR, since a new environment empties DIR; inside, if the parent directory is read-only
    lock="$venv.lock"
    if [[ ! -w "$(dirname "$venv")" ]]; then lock="$venv/.m3i_lock"; fi
    {
        locked "$python" "another process is creating $venv; waiting for it"
        # refreshes the directory cache of a shared file system
        ls "$(dirname "$venv")" "$venv" "$venv/bin" >/dev/null 2>&1 || true
        if ! prepared; then build; fi
    } 9>"$lock"
}

# the two steps of `prepare`, with its variables
prepared() {
    [[ -x "$venv/bin/python" && "$(cat "$venv/.m3i_stamp" 2>/dev/null)" == "$stamp" ]]
}

build() {
    local version failed="$python cannot create a virtual environment"
    failed+=" (on Debian and Ubuntu: apt-get install python3-venv)"
    version="$("$python" -V)"
    # another Python: an environment of ours is created again, one of the user only added to
    if [[ ! -x "$venv/bin/python" ]]; then
        echo "creating $venv with $version"
        "$python" -m venv "$venv" || fail "$failed"
    elif [[ -f "$venv/.m3i_stamp" && "$("$venv/bin/python" -V)" != "$version" ]]; then
        echo "creating $venv again, with $version"
        "$python" -m venv --clear "$venv" || fail "$failed"
    fi
    rm -f "$venv/.m3i_stamp"
    echo "installing m3i_jax with [${extra:-train}] into $venv"
    "$venv/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check \
        --no-input "${requirement[@]}" ||
        fail "the installation failed; see pip's message above"
    echo "$stamp" >"$venv/.m3i_stamp"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then usage --help; fi
