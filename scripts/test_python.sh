#!/usr/bin/env bash
# Builds both Python wheels, installs them into clean environments, runs python/README.md's examples and python/tests.
# Needs rustup's cargo and python3 (on Debian, what python3 lacks is installed as root). The first run downloads torch
# with its CUDA libraries, several GB, into target/python-test; later ones find them there.
#
#     scripts/test_python.sh [PYTEST OPTIONS]      # all of it
#     scripts/test_python.sh wheel DIR             # only build the wheels, into DIR, to be carried to a machine
set -euo pipefail
cd "$(dirname "$0")/.."

maturin="maturin==1.16.0"
frameworks="torch==2.15.0 numpy jax transformers==5.24.0 diffusers==0.42.1 pytest"
max_wheel_bytes=10000000
target=${CARGO_TARGET_DIR:-$PWD/target}

pip_install() {
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

# Both wheels, `sageattention` and `sageattention-shims`, into the folder $1.
build_wheels() {
    local tools=$target/python-build
    scripts/environment.sh "$tools" "$maturin"
    rm -f "$1"/sageattention-*.whl "$1"/sageattention_shims-*.whl
    "$tools/bin/maturin" build --release --locked --manifest-path python/Cargo.toml --target-dir "$target" --out "$1"
    "$tools/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1" ./python/shims
}

if [[ ${1:-} == wheel ]]; then
    build_wheels "${2:?the folder for the wheels}"
    exit
fi

export SAGEATTENTION_WHEELS=$target/python-wheel
build_wheels "$SAGEATTENTION_WHEELS"
wheel=$(echo "$SAGEATTENTION_WHEELS"/sageattention-*.whl)
shims=$(echo "$SAGEATTENTION_WHEELS"/sageattention_shims-*.whl)
bytes=$(stat -c %s "$wheel")
echo "test_python: $(basename "$wheel"), $bytes bytes"
if ((bytes >= max_wheel_bytes)); then
    echo "test_python: the wheel has $bytes bytes, expected fewer than $max_wheel_bytes" >&2
    exit 1
fi

echo "test_python: a clean environment, numpy alone"
clean=$target/python-clean
rm -rf "$clean"
scripts/environment.sh "$clean" numpy
pip_install "$clean" "${wheel}[shims]" "$shims"
"$clean/bin/python" -m sageattention_shims
"$clean/bin/python" - <<'PYTHON'
import numpy
from sageattention import sageattn

q = k = v = numpy.random.default_rng(0).standard_normal((1, 8, 1024, 64), dtype=numpy.float32)
out = sageattn(q, k, v, is_causal=True)
print("test_python:", type(out).__module__, out.shape, out.dtype)
PYTHON

tests=$target/python-test
echo "test_python: an environment with $frameworks"
# shellcheck disable=SC2086 -- a list
scripts/environment.sh "$tests" $frameworks
pip_install "$tests" --force-reinstall --no-deps "$wheel" "$shims"

echo "test_python: the examples of python/README.md that are marked to be run"
awk '/^<!-- run -->$/ { run = 1 } run && /^```python$/ { inside = 1; next } /^```$/ { run = inside = 0 } inside' \
    python/README.md >"$target/python-example.py"
echo 'print("test_python:", out.shape, out.dtype)' >>"$target/python-example.py"
"$tests/bin/python" "$target/python-example.py"

"$tests/bin/python" -m pytest python/tests "$@"
