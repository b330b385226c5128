#!/usr/bin/env bash
# ruff and mypy over the Python code, as python/pyproject.toml configures them. Needs python3; the tools go into an
# environment of their own, target/python-lint.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${CARGO_TARGET_DIR:-$PWD/target}/python-lint
scripts/environment.sh "$folder" ruff==0.17.6 mypy==2.4.1

cd python
"$folder/bin/ruff" check --cache-dir "$folder/ruff" .
"$folder/bin/ruff" format --check --cache-dir "$folder/ruff" .
"$folder/bin/mypy" --cache-dir "$folder/mypy"
