#!/usr/bin/env bash
# Everything that needs a real GPU, in one go: tests, NVIDIA's memory and race checkers, accuracy, use of the machine,
# benchmarks beside the peers.
#
#     scripts/gpu.sh [tests] [python] [first-call] [sanitize] [accuracy] [bench-hopper] [profile]   # all by default
#     scripts/gpu.sh first-call                                   # compiling: cold, warm, and with a read-only home
#     scripts/gpu.sh bench-quick                                  # two lengths, one round
#     scripts/gpu.sh sweep                                        # some 160 shapes, large and small, beside 16-bit peers
#     scripts/gpu.sh regret                                       # the same shapes: our plan beside all that it weighed
#     scripts/gpu.sh multi                                        # all GPUs of this machine: rings, Ulysses, scaling
#     scripts/gpu.sh end-to-end                                   # whole models of diffusers and transformers, beside SDPA
#     scripts/gpu.sh build DIR                                    # only build programs and wheels, to be carried along
#     GPU_BIN=DIR scripts/gpu.sh …                                # run such programs instead of building
#     SCHEMES=auto,full scripts/gpu.sh …                          # measure these schemes
#     SAGE_GPU_TARGET=sm_75 scripts/gpu.sh …                      # an older GPU's kernels, on the one that is here
#     GPU_OUT=DIR scripts/gpu.sh …                                # keep times and counters there as files
#
# Needs the driver. `python` needs a Python with torch and pytest, installs the wheels into a folder of its own, and tests
# numpy, JAX, CuPy, transformers and diffusers where they are installed. `sanitize` needs compute-sanitizer and `profile`
# ncu; accuracy and benchmarks need Python with torch (and take the peers named in scripts/bench_gpu.py where they are
# installed). What is missing is said, not skipped silently.
set -euo pipefail
cd "$(dirname "$0")/.."

# Builds test programs and benchmarks, and copies them to a folder under fixed names.
build() {
    mkdir -p "$1"
    {
        cargo test --no-run --message-format=json -p sage-cuda --test gpu
        cargo test --no-run --message-format=json -p sageattention --test gpu --test gpu_kv_cache \
            --test gpu_random --test gpu_edges --test gpu_table --test gpu_predict --test gpu_warm_up --test sinks
        cargo build --message-format=json -p sageattention --example bench_gpu --example bench_gpu_kv_cache \
            --example bench_gpu_predict
        cargo build --message-format=json -p sageattn
    } | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") != "compiler-artifact" or not message.get("executable"):
        continue
    name = message["target"]["name"]
    if name == "gpu":
        name = "test_cuda" if "/cuda/" in message["target"]["src_path"] else "test_attention"
    name = name.replace("gpu_", "test_") if name.startswith("gpu_") else name
    name = "test_sinks" if name == "sinks" else name
    shutil.copy(message["executable"], f"{sys.argv[1]}/{name}")
' "$1"
    ls "$1"
}

if [[ ${1:-} == build ]]; then
    build "${2:?the folder to build into}"
    scripts/test_python.sh wheel "$2"
    exit
fi
bin=${GPU_BIN:-target/gpu}
[[ -n ${GPU_BIN:-} ]] || build "$bin"

schemes=${SCHEMES:-auto,int8-fp8,sage2-int8-fp8-per-thread,full}

heading() { printf '\n== %s\n' "$1"; }

tests() {
    export SAGE_REQUIRE_GPU=1
    heading "CUDA layer"
    "$bin/test_cuda" --test-threads=1 --nocapture
    heading "attention against the oracle"
    "$bin/test_attention" --test-threads=1 --nocapture
    heading "KV cache against the oracle"
    "$bin/test_kv_cache" --test-threads=1 --nocapture
    heading "the table of cases, edges and random calls against the oracle"
    "$bin/test_table" --nocapture
    "$bin/test_edges" --test-threads=1 --nocapture
    "$bin/test_random" --nocapture
    heading "predicted block maps against the oracle"
    "$bin/test_predict" --test-threads=1 --nocapture
    heading "attention sinks"
    "$bin/test_sinks" --test-threads=1 --nocapture
    heading "kernels that are compiled before calls"
    "$bin/test_warm_up" --test-threads=1 --nocapture
}

# What compiling takes: with empty caches, with warm ones, and where the driver cannot write to its own.
first_call() {
    heading "the first call"
    local folder
    folder=$(mktemp -d)
    mkdir "$folder/home"
    warm() {
        printf '\n%s\n' "$1"
        shift
        env -u CUDA_CACHE_PATH -u CUDA_CACHE_DISABLE "$@" "$bin/sageattn" warm 1,32/8,4096,128 4,32/8,1x4096,128 --causal
    }
    for home in "$folder/home" /proc; do
        for caches in empty warm; do
            warm "home $home, caches $caches" HOME="$home" SAGEATTENTION_CACHE_DIR="$folder/of$home"
        done
    done
    warm "home /proc, one thread, caches empty" HOME=/proc SAGEATTENTION_CACHE_DIR="$folder/one" taskset -c 0
    warm "home /proc, the driver remembers nothing" HOME=/proc CUDA_CACHE_DISABLE=1 \
        SAGEATTENTION_CACHE_DIR="$folder/of/proc"
    rm -rf "$folder"
}

# Both wheels, installed into the folder $1.
install_wheels() {
    local wheels=("$bin"/sageattention-*.whl "$bin"/sageattention_shims-*.whl)
    if [[ ! -f ${wheels[0]} || ! -f ${wheels[1]} ]]; then
        if [[ -n ${GPU_BIN:-} ]]; then
            echo "left out: the two wheels are not in $bin; scripts/gpu.sh build puts them there"
            return 1
        fi
        scripts/test_python.sh wheel "$bin"
        wheels=("$bin"/sageattention-*.whl "$bin"/sageattention_shims-*.whl)
    fi
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$1" "${wheels[@]}"
}

# Runs a command in whose Python the wheels are installed.
with_wheels() {
    local folder code=0
    folder=$(mktemp -d)
    install_wheels "$folder" || { rm -rf "$folder"; return 0; }
    # Python reads no .pth file outside site-packages: the shims' folder is named as well.
    PYTHONPATH=$folder:$folder/sageattention_shims/modules${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 \
        SAGEATTENTION_WHEELS=$(realpath "$bin") "$@" || code=$?
    rm -rf "$folder"
    return "$code"
}

# Attention spread over all GPUs of this machine, through NCCL.
multi() {
    heading "many GPUs"
    python3 -c 'import torch' || { echo "left out: Python has no torch here"; return; }
    local gpus
    gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus < 2)); then
        echo "left out: there is one GPU here at most"
        return
    fi
    with_wheels python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" scripts/multi_gpu.py \
        ${GPU_OUT:+--json "$GPU_OUT/multi.json"}
}

# Whole models, ours beside torch's own attention.
end_to_end() {
    heading "whole models"
    python3 -c 'import torch' || { echo "left out: Python has no torch here"; return; }
    with_wheels python3 scripts/end_to_end.py ${GPU_OUT:+--json "$GPU_OUT/end-to-end.json"}
}

# The Python suite, with what this machine has to import.
python_suite() {
    heading "Python"
    python3 -c 'import torch, pytest' || { echo "left out: Python has no torch and pytest here"; return; }
    local module
    for module in numpy jax cupy transformers diffusers; do
        python3 -c "import $module" 2>/dev/null || echo "left out: tests of $module, which Python does not have here"
    done
    # Kernels are compiled, one a process at a time: several processes share that out.
    local workers=()
    if python3 -c 'import xdist' 2>/dev/null; then
        workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
    else
        echo "one process: Python has no pytest-xdist here"
    fi
    with_wheels python3 -m pytest python/tests -p no:cacheprovider -q "${workers[@]}"
}

# A representative set under the checkers, which make kernels some hundred times slower.
sanitize() {
    heading "compute-sanitizer"
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
    if [[ -z $sanitizer ]]; then
        echo "left out: there is no compute-sanitizer here"
        return
    fi
    for tool in memcheck racecheck initcheck; do
        printf '%-10s ' "$tool"
        "$sanitizer" --tool "$tool" --error-exitcode 1 "$bin/test_attention" sanitized --exact \
            --nocapture 2>&1 | grep -E '========= (ERROR|RACECHECK) SUMMARY|calls computed' | tr '\n' ' '
        echo
    done
}

# Runs a script of ours that needs torch.
with_torch() {
    python3 -c 'import torch' || { echo "left out: Python has no torch here"; return; }
    python3 "$@" --schemes "$schemes"
}

accuracy() {
    heading "accuracy"
    with_torch scripts/accuracy_gpu.py "$bin/sageattn"
}

profile() {
    heading "use of the machine"
    python3 scripts/profile_gpu.py "$bin/bench_gpu" --schemes "$schemes" ${GPU_OUT:+--log "$GPU_OUT/ncu.csv"}
}

bench() {
    heading "speed"
    with_torch scripts/bench_gpu.py "$bin/bench_gpu" "$@" ${GPU_OUT:+--json "$GPU_OUT/bench.json"}
}

# Our default choice on many shapes.
sweep() {
    heading "sweep of shapes"
    python3 -c 'import torch' || { echo "left out: Python has no torch here"; return; }
    python3 scripts/sweep_gpu.py "$bin/bench_gpu" "$@" ${GPU_OUT:+--json "$GPU_OUT/sweep.json"}
}

[[ $# -gt 0 ]] || set -- tests python first-call sanitize accuracy bench-hopper profile
for part in "$@"; do
    case $part in
        tests) tests ;;
        python) python_suite ;;
        first-call) first_call ;;
        multi) multi ;;
        end-to-end) end_to_end ;;
        sanitize) sanitize ;;
        accuracy) accuracy ;;
        profile) profile ;;
        bench-hopper) bench ;;
        sweep) sweep ;;
        regret) sweep --choices auto --peers none --rounds 1 --alternatives ;;
        bench-quick) bench --rounds 1 --shapes grid --lengths 4096,8192 ;;
        *)
            echo "gpu.sh: part is $part, expected tests, python, first-call, sanitize, accuracy, profile, bench-hopper," \
                "bench-quick, sweep, regret, multi or end-to-end" >&2
            exit 2
            ;;
    esac
done
