#!/usr/bin/env bash
# Installs Python 3.13 for the user who runs it, in ~/.local, by uv (https://docs.astral.sh/uv),
# unless a Python is there that the project supports. Machines of Cloud TPU and SkyPilot have 3.10.
#
#   bash launch/python.sh
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

if (find_python) >/dev/null 2>&1; then exit 0; fi
uv="$(command -v uv || echo "$HOME/.local/bin/uv")"
mkdir -p "$HOME/.local/bin"
if [[ ! -x "$uv" ]]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-input --user uv ||
        fail "uv could not be installed; see pip's message above"
    uv="$HOME/.local/bin/uv"
fi
"$uv" python install --no-progress 3.13 ||
    fail "uv could not install Python 3.13; see its message above"
# versions of uv before 0.8 leave that out
[[ -e "$HOME/.local/bin/python3.13" ]] ||
    ln -s "$("$uv" python find 3.13)" "$HOME/.local/bin/python3.13"
find_python >/dev/null
