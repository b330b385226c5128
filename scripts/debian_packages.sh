#!/usr/bin/env bash
# Installs those of some Debian packages that are missing. Where it cannot, the reason is one line and the status is 1.
#
#     scripts/debian_packages.sh PACKAGE[:ARCHITECTURE]…
set -euo pipefail

refuse() {
    echo "debian_packages: $*" >&2
    exit 1
}

command -v dpkg-query >/dev/null || refuse "this is not a Debian machine, and these packages are needed: $*"
missing=()
for package in "$@"; do
    status=$(dpkg-query --show --showformat='${Status}\n' "$package" 2>/dev/null || true)
    grep -q '^install ok installed$' <<<"$status" || missing+=("$package")
done
((${#missing[@]})) || exit 0
[[ $(id -u) == 0 ]] || refuse "not root, and these packages are missing: ${missing[*]}"
echo "debian_packages: installing ${missing[*]}" >&2
for package in "${missing[@]}"; do
    [[ $package != *:* ]] || dpkg --add-architecture "${package#*:}"
done
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    refuse "apt could not install ${missing[*]}"
fi
