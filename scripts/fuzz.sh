#!/usr/bin/env bash
# Fuzzes one target for some seconds: scripts/fuzz.sh problem_check|qkv_file [SECONDS] [libFuzzer options]
# Needs cargo-fuzz (`cargo install cargo-fuzz`) and a C++ compiler. A finding is kept under fuzz/artifacts/.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?usage: scripts/fuzz.sh problem_check|qkv_file [SECONDS] [libFuzzer options]}
seconds=${2:-60}
shift $(($# < 2 ? $# : 2))

if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "fuzz: cargo-fuzz is not installed; run: cargo install cargo-fuzz" >&2
    exit 2
fi
options=(-max_len=1024)
if [[ $target == qkv_file ]]; then
    python3 fuzz/seeds.py fuzz/corpus/qkv_file
    options=(-max_len=4096 -dict=fuzz/safetensors.dict)
fi

# The sanitizer's flags belong to nightly compilers; with RUSTC_BOOTSTRAP a stable one takes them too.
export RUSTC_BOOTSTRAP=1 CARGO_INCREMENTAL=0
# A slow call is a finding too: sizes may be large without a single element being there.
exec cargo fuzz run "$target" --target-dir "${CARGO_TARGET_DIR:-$PWD/target}/fuzz" -- \
    "${options[@]}" -max_total_time="$seconds" -timeout=20 -print_final_stats=1 "$@"
