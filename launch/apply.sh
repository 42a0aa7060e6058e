#!/usr/bin/env bash
# Replaces each ${M3I_...} of a Kubernetes manifest by that environment variable, and applies it.
#
#   M3I_NAME=m3i ... bash launch/apply.sh launch/gke.yaml             # kubectl apply
#   M3I_NAME=m3i ... bash launch/apply.sh launch/gke.yaml --dry-run   # prints it instead
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "$@"

file="${1:-}" dry="${2:-}"
[[ -f "$file" ]] || fail "give a file, such as launch/gke.yaml"
[[ -z "$dry" || "$dry" == --dry-run ]] || fail "$dry: unknown flag"

text="$(sed '/^ *#/d' "$file")"
missing=()
mapfile -t names < <(grep -o '[$][{]M3I_[A-Z]*}' <<<"$text" | grep -o 'M3I_[A-Z]*' | sort -u)
for name in "${names[@]}"; do
    value="${!name:-}"
    if [[ -z "$value" ]]; then
        missing+=("$name")
    elif [[ "$value" == *[\"\\\$]* || "$value" == *$'\n'* ]]; then
        fail "$name: must not contain quotes, backslashes, dollars or line ends: $value"
    fi
    text="${text//"\${$name}"/"$value"}"
done
((${#missing[@]} == 0)) ||
    fail "${missing[*]} not set; the comment at the top of $file describes them"
if [[ -n "$dry" ]]; then
    printf '%s\n' "$text"
else
    kubectl apply -f - <<<"$text"
fi
