# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python, makes a virtual environment, installs the project into it, and does none of that again
# while nothing has changed. Settings (environment variables):
#   M3I_VENV     directory of the virtual environment (each script has its own default)
#   M3I_PYTHON   interpreter to make it with (default: python3, else the newest that is new enough)
#   M3I_EXTRA    extra to install for the accelerator (default: for the one that is found; empty: CPU)
#   M3I_INSTALL  0: use the environment as it is, install nothing

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# usage ARGUMENTS: with --help or -h among them, before any --, prints the head of the script, which is its
# manual, and ends with 0. Called before anything is made or installed.
usage() {
    local argument
    for argument in "$@"; do
        case "$argument" in
            --) return ;;
            -h | --help)
                awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#( shellcheck|SBATCH)/ { sub(/^# ?/, ""); print }' "$0"
                exit 0
                ;;
        esac
    done
}

# works PYTHON [MINOR]: it runs, and is Python 3.11 or newer, or exactly 3.MINOR
works() {
    "$1" -c 'import sys; v = sys.version_info[:2]; sys.exit(not (v == (3, int(sys.argv[1])) if sys.argv[1:] else v >= (3, 11)))' "${@:2}" \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${M3I_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if works "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found (tried ${M3I_PYTHON:-python3, python3.11 to python3.14}): install one, or name it in M3I_PYTHON"
}

# The extra for the accelerator of this machine; nothing on a CPU. A control node alone (/dev/vfio/vfio, /dev/accel/) is no TPU.
accelerator() {
    if [[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU* ]]; then
        echo cuda
    elif [[ -n "${TPU_NAME:-}" ]] || compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        echo tpu
    fi
}

# On a CPU every step frees and asks again for large buffers. Kept in the heap, in pages of 2 MB, they are not faulted in anew each time: a
# quarter of the processor time of a large step, for about twice the memory. Two heaps a core, for small steps ask often and would wait for
# one. Settings that are there already stay.
keep_heap() {
    export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-$((2 * $(getconf _NPROCESSORS_ONLN)))}" MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}" MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}

# locked PYTHON TEXT: takes the lock of the open file 9, for as long as this shell has it open, and says TEXT if that waits. By Python, for
# macOS has no flock(1); on NFS the lock holds between hosts. A file system without locks is no reason not to start.
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
    print(f"no lock ({error.strerror}): start one host first if several share this directory", flush=True)
PYTHON
}

# prepare DIR EXTRA: leaves in DIR a virtual environment with the project (editable) and that extra, at the versions of requirements.txt.
# Hosts that share DIR do that one after the other, and find it done.
prepare() {
    local venv="${1%/}" extra="$2" python stamp lock
    if [[ "${M3I_INSTALL:-1}" == 0 ]]; then
        [[ -x "$venv/bin/python" ]] || fail "M3I_INSTALL=0, but there is no environment at $venv: set M3I_VENV to one, or leave M3I_INSTALL out"
        return
    fi
    python="$(find_python)"
    stamp="$("$python" -V) extra=$extra root=$ROOT $(cat "$ROOT/setup.py" "$ROOT/requirements.txt" "$ROOT/m3i_jax/version.py" | cksum)"
    if prepared; then return; fi
    mkdir -p "$(dirname "$venv")"
    # Beside it, for making it again empties it; an environment in a directory of somebody else's has it inside.
    lock="$venv.lock"
    if [[ ! -w "$(dirname "$venv")" ]]; then lock="$venv/.m3i_lock"; fi
    {
        locked "$python" "another process is making $venv; waiting for it"
        ls "$(dirname "$venv")" "$venv" "$venv/bin" >/dev/null 2>&1 || true # so that a shared file system looks again
        if ! prepared; then build; fi
    } 9>"$lock"
}

# The two steps of `prepare`, with its variables.
prepared() {
    [[ -x "$venv/bin/python" && "$(cat "$venv/.m3i_stamp" 2>/dev/null)" == "$stamp" ]]
}

build() {
    # Only an environment that we made is made anew for another Python; somebody else's is only added to.
    if [[ ! -x "$venv/bin/python" ]]; then
        echo "making $venv with $("$python" -V)"
        "$python" -m venv "$venv" || fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
    elif [[ -f "$venv/.m3i_stamp" && "$("$venv/bin/python" -V)" != "$("$python" -V)" ]]; then
        echo "making $venv again, with $("$python" -V)"
        "$python" -m venv --clear "$venv" || fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
    fi
    rm -f "$venv/.m3i_stamp"
    echo "installing m3i_jax${extra:+ with [$extra]} into $venv"
    "$venv/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check --no-input \
        -e "$ROOT${extra:+[$extra]}" -c "$ROOT/requirements.txt" || fail "the installation failed; pip's reason is above"
    echo "$stamp" >"$venv/.m3i_stamp"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then usage --help; fi
