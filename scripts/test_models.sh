#!/usr/bin/env bash
# Both examples on the real weights (fetched once, into target/models) and a short text: fails when quality falls below
# its bounds. On two cores about three minutes, beyond the build and the download.
#
#     scripts/test_models.sh
#
# The bounds, and what was measured on these very texts, stand beside each command.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}

scripts/fetch_models.sh >/dev/null
cargo build --release -p sage-examples

step() {
    printf '\n==> %s\n' "$*"
    "$target/release/$@"
}

# Perplexity within 0.5% of exact attention's and the same most likely token at 98% of the places: @MEASURED_PPL@.
step generate perplexity --tokens 1025 --context 512 --method sage,int8 --max-change 0.5 --min-agreement 98
# INT8 keys and values: the answers begin with the same words.
step generate chat --tokens 16 --min-equal 8
# Padded batches: @MEASURED_EMBED@.
step embed --passages 32 --batch 8 --min-cosine 0.9995
