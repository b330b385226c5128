#!/usr/bin/env bash
# Compares this crate's CPU attention with PyTorch's and candle's: same shapes, same machine, same number of threads.
# Builds what is needed, then scripts/bench_cpu.py measures and prints the tables. Most of the time goes to
# candle at 8192 keys, minutes for each call in bf16; CONTESTANTS=torch,full,int8 leaves it out.
#
#   THREADS=2            threads for everyone
#   ROUNDS=3             times that each contestant has its turn at a shape
#   CONTESTANTS=...      torch,candle,full,int8
#   SEQ_LENS=... HEAD_DIMS=... DTYPES=...   512,2048,8192  64,128  f32,bf16
#   OUT_JSON=FILE        also write every sample there
#   PEERS_PYTHON=PYTHON  a Python that has torch; otherwise one is installed (several GB) under target/peers-venv
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.15.0
target=${CARGO_TARGET_DIR:-$PWD/target}
contestants=${CONTESTANTS:-torch,candle,full,int8}

wants() { [[ ",$contestants," == *",$1,"* ]]; }

python=${PEERS_PYTHON:-}
if [[ -z $python ]] && wants torch; then
    venv=$target/peers-venv
    python=$venv/bin/python
    if ! "$python" -c 'import torch' 2>/dev/null; then
        echo "bench_cpu: installing torch $torch_version under $venv" >&2
        python3 -m venv "$venv"
        "$python" -m pip install --quiet "torch==$torch_version" numpy
    fi
fi
python=${python:-python3}
if wants torch && ! "$python" -c 'import torch'; then
    echo "bench_cpu: PEERS_PYTHON is $python, expected a Python that has torch" >&2
    exit 2
fi

# candle and the bandwidth probe get every instruction that this machine has. Ours is built as users build it, and
# chooses its instructions when it runs.
echo "bench_cpu: building the peers" >&2
RUSTFLAGS="-C target-cpu=native" \
    cargo build --quiet --release --locked --manifest-path benches/peers/Cargo.toml --target-dir "$target/peers"
if wants full || wants int8; then
    echo "bench_cpu: building sageattn" >&2
    cargo build --quiet --release --locked --package sageattn --target-dir "$target"
fi

export THREADS=${THREADS:-2} CONTESTANTS=$contestants
PEERS_BIN=$target/peers/release SAGEATTN=$target/release/sageattn exec "$python" scripts/bench_cpu.py
