#!/usr/bin/env bash
# A virtual environment in a folder with just these packages; what is there already stays.
#
#     scripts/environment.sh FOLDER PACKAGE==VERSION…
#
# Needs python3; what Debian's lacks for it is installed as root.
set -euo pipefail

folder=${1:?the folder}
packages="${*:2}"
[[ $(cat "$folder/installed" 2>/dev/null) != "$packages" ]] || exit 0
rm -rf "$folder"
if ! python3 -m venv "$folder" 2>/dev/null; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv
    rm -rf "$folder"
    python3 -m venv "$folder"
fi
python=$folder/bin/python
# Where Windows has a virtual environment's programs.
[[ -d $folder/bin ]] || python=$folder/Scripts/python.exe
"$python" -m pip install --quiet --disable-pip-version-check "${@:2}"
echo "$packages" >"$folder/installed"
