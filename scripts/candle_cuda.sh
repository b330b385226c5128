#!/usr/bin/env bash
# Builds what runs candle's CUDA tensors, on a machine without GPU, driver or CUDA toolkit, to be carried to one that has
# the GPU. NVIDIA's compiler and libraries come from its wheels on PyPI, through pip: 0.7 GB.
#
#     scripts/candle_cuda.sh                             # into target/candle_gpu, for Hopper
#     CUDA_COMPUTE_CAP=89 scripts/candle_cuda.sh         # candle's own kernels are for one kind of GPU only
#
# There the programs need the same libraries, of a toolkit or of wheels, beside the driver's:
#
#     export LD_LIBRARY_PATH=$(python3 -c 'import nvidia; print(nvidia.__path__[0])')/cu13/lib
#     test_cuda --test-threads=1 --nocapture
#     attention --device cuda
#
# Where nvcc is installed, plain `cargo test -p sageattention-candle --features cuda` builds too.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=$root/target/candle_gpu

# CUDA 13.0: what a driver of version 580 takes. Of x86-64, with hashes; pip refuses any other.
wheels="
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-nvrtc==13.0.88 --hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
nvidia-cublas==13.0.2.14 --hash=sha256:0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c
nvidia-curand==10.4.0.35 --hash=sha256:1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc
"

# The compiler and the libraries, as a toolkit's folder has them.
fetch_toolkit() {
    local scratch=$root/target/cuda_home.fetch
    rm -rf "$scratch" && mkdir -p "$scratch/wheels"
    echo "$wheels" >"$scratch/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
        --requirement "$scratch/requirements.txt" --dest "$scratch/wheels"
    for wheel in "$scratch"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$scratch/unpacked"
        rm "$wheel"
    done
    local home=$scratch/unpacked/nvidia/cu13
    chmod +x "$home"/bin/* "$home"/nvvm/bin/*
    # The linker's names.
    for library in "$home"/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.*; do
        ln -s "${library##*/}" "${library%%.so.*}.so"
    done
    ln -s lib "$home/lib64"
    # Only a driver's package has libcuda. One to link with and to start without a driver: every function answers that
    # it is not the real one (CUDA_ERROR_STUB_LIBRARY), as the stub in NVIDIA's toolkit does.
    mkdir "$home/lib/stubs"
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$home"/include/cuda*.h | sort -u |
        sed 's/.*/int &(void) { return 34; }/' |
        cc -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" -
    ln -s libcuda.so "$home/lib/stubs/libcuda.so.1"
    rm -rf target/cuda_home && mv "$home" target/cuda_home
    rm -rf "$scratch"
    echo "$wheels" >target/cuda_home/wheels
}

[[ $(cat target/cuda_home/wheels 2>/dev/null) == "$wheels" ]] || fetch_toolkit
export CUDA_HOME=$root/target/cuda_home CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} PATH=$root/target/cuda_home/bin:$PATH
# Candle's products with quantised weights, which nothing here calls, take an hour to optimise.
export NVCC_APPEND_FLAGS=-Xptxas=-O1

# In a folder of its own: the feature changes most of what is built.
target=${CARGO_TARGET_DIR:-$root/target}/candle_cuda
build() { cargo "$@" --release --target-dir "$target" --features sageattention-candle/cuda,sage-examples/cuda; }
mkdir -p "$out"
{
    build test --no-run --message-format=json -p sageattention-candle -p sage-examples --test cuda
    build build --message-format=json -p sageattention-candle -p sage-examples --bins
} | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        name = message["target"]["name"].replace("cuda", "test_cuda")
        shutil.copy(message["executable"], f"{sys.argv[1]}/{name}")
' "$out"
strip "$out"/{test_cuda,attention,generate,embed}

# Here there may be no driver: each program must say so in words.
status=0
output=$(LD_LIBRARY_PATH=$CUDA_HOME/lib:$CUDA_HOME/lib/stubs "$out/attention" --device cuda 2>&1) || status=$?
if [[ $status != 1 || $output != *CUDA_ERROR_STUB_LIBRARY* ]]; then
    echo "attention --device cuda, with a stub for a driver: status $status, $output" >&2
    exit 1
fi
ls -l "$out"
