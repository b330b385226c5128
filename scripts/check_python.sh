#!/usr/bin/env bash
# ruff and mypy over the Python code, as python/pyproject.toml configures them. Needs python3; the tools go into an
# environment of their own, target/python-lint.
set -euo pipefail
cd "$(dirname "$0")/.."

tools="ruff==0.17.6 mypy==2.4.1"
folder=${CARGO_TARGET_DIR:-$PWD/target}/python-lint
if [[ $(cat "$folder/installed" 2>/dev/null) != "$tools" ]]; then
    rm -rf "$folder"
    if ! python3 -m venv "$folder" 2>/dev/null; then
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv
        rm -rf "$folder"
        python3 -m venv "$folder"
    fi
    # shellcheck disable=SC2086 -- a list
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check $tools
    echo "$tools" >"$folder/installed"
fi

cd python
"$folder/bin/ruff" check --cache-dir "$folder/ruff" .
"$folder/bin/ruff" format --check --cache-dir "$folder/ruff" .
"$folder/bin/mypy" --cache-dir "$folder/mypy"
