#!/usr/bin/env bash
# Replaces each ${M3I_...} of a Kubernetes manifest by that environment variable, and applies it.
#
#   M3I_NAME=m3i ... bash launch/apply.sh launch/gke.yaml             # kubectl apply
#   M3I_NAME=m3i ... bash launch/apply.sh launch/gke.yaml --dry-run   # prints it instead
#
# ${M3I_NAME:-VALUE} has a default; a line with an unset ${M3I_NAME:-} is left out.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

file="${1:-}" dry="${2:-}"
[[ -f "$file" ]] || fail "give a file, such as launch/gke.yaml"
[[ -z "$dry" || "$dry" == --dry-run ]] || fail "$dry: unknown flag"

text="$(sed '/^ *#/d' "$file")"
missing=()
shopt -u patsub_replacement 2>/dev/null || true # bash 5.2: & in a value would be the place
# in the bash of macOS, 3.2, too
while IFS= read -r place; do
    name="${place#??}"
    name="${name%\}}"
    name="${name%%:-*}"
    value="${!name:-}"
    if [[ "$value" == *[\"\\\$]* || "$value" == *$'\n'* ]]; then
        fail "$name: must not contain quotes, backslashes, dollars or line ends: $value"
    elif [[ -n "$value" ]]; then
        if [[ "$name" == M3I_ARGUMENTS ]]; then readable "$name"; fi
        text="${text//$place/$value}"
    elif [[ "$place" == *":-}" ]]; then
        text="$(grep -vF "$place" <<<"$text")"
    elif [[ "$place" == *":-"* ]]; then
        value="${place#*:-}"
        value="${value%\}}"
        text="${text//$place/$value}"
    else
        missing+=("$name")
    fi
done < <(grep -oE '[$][{]M3I_[A-Z]+(:-[^}]*)?[}]' <<<"$text" | sort -u)
((${#missing[@]} == 0)) ||
    fail "${missing[*]} not set; the comment at the top of $file describes them"
if [[ -n "$dry" ]]; then
    printf '%s\n' "$text"
else
    kubectl apply -f - <<<"$text"
fi
