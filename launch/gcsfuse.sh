#!/usr/bin/env bash
# Mounts a bucket of Google Cloud Storage, or a folder of one, on this machine for the user who runs
# it, unless it is mounted already. Installs gcsfuse if it is missing (Debian, Ubuntu).
#
#   bash launch/gcsfuse.sh gs://BUCKET/FOLDER               # at /mnt/m3i
#   bash launch/gcsfuse.sh gs://BUCKET /mnt/data
#   bash launch/gcsfuse.sh gs://BUCKET /mnt/data --dry-run  # prints the commands
#
# M3I_GCSFUSE: more flags of gcsfuse, such as --file-cache-max-size-mb=-1 --cache-dir=/tmp/bucket
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

place="${1:-}" directory="${2:-/mnt/m3i}" dry="${3:-}"
if [[ "$directory" == --dry-run ]]; then directory=/mnt/m3i dry=--dry-run; fi
[[ "$place" =~ ^gs://([a-z0-9][a-z0-9._-]+)(/(.*[^/]))?/?$ ]] ||
    fail "${place:-nothing}: give a bucket or a folder of one, such as gs://BUCKET/FOLDER"
bucket="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[3]}"
[[ "$directory" == /* ]] || fail "$directory: give the whole path of a directory"
[[ -z "$dry" || "$dry" == --dry-run ]] || fail "$dry: unknown flag"

read -ra flags <<<"${M3I_GCSFUSE:-}"
# by the user and not by root, since only who mounts a bucket may use it
# A save renames the directory of its checkpoint, which gcsfuse refuses by default in a bucket
# without hierarchical namespace; on large machines it would never notice a file that another host
# has replaced.
mount=(gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=60
    ${folder:+--only-dir "$folder"} ${flags[@]+"${flags[@]}"} "$bucket" "$directory")
own=(sudo install -d -o "$(id -un)" "$directory")
if [[ -n "$dry" ]]; then
    quoted "${own[@]}"
    quoted "${mount[@]}"
    exit 0
fi

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
    local name
    # shellcheck disable=SC1091
    name="gcsfuse-$(. /etc/os-release && echo "$VERSION_CODENAME")"
    curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null || return
    echo "deb [signed-by=$key] $packages $name main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null || return
    # a new machine may be installing updates
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update || return
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse >/dev/null
}

if mountpoint -q "$directory"; then
    mounted="$(findmnt -n -o SOURCE "$directory" || true)"
    [[ "$mounted" == "$bucket" ]] ||
        fail "$directory: ${mounted:-another file system} is mounted there; unmount it first"
    # of which folder, only the process of the mount tells
    # shellcheck disable=SC2009  # fixed text, which pgrep does not match
    mounted="$(ps -eo args= | sed 's/$/ /' | grep -F "gcsfuse " |
        grep -F " $bucket $directory " || true)"
    if [[ -n "$mounted" && "$mounted" != *" --only-dir $folder "* ]] &&
        [[ -n "$folder" || "$mounted" == *" --only-dir "* ]]; then
        fail "$directory: another folder of gs://$bucket is mounted there; unmount it first" \
            "(fusermount -u $directory)"
    fi
    exit 0
fi
if ! command -v gcsfuse >/dev/null; then
    install_gcsfuse || fail "gcsfuse could not be installed; see the messages above"
fi
"${own[@]}" || fail "$directory could not be made"
"${mount[@]}" ||
    fail "$place could not be mounted at $directory; see gcsfuse's message above"
mountpoint -q "$directory" || fail "$place is not mounted at $directory, although gcsfuse ended well"
