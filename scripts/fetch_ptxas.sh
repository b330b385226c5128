#!/usr/bin/env bash
# Fetches NVIDIA's assembler into target/ptxas/ptxas: 37 MB, without a CUDA toolkit or a GPU.
#
#     scripts/fetch_ptxas.sh          # then: cargo test -p sage-kernels --test assemble
#
# It comes from NVIDIA's wheel on PyPI, of one version and with known hashes, through pip (Debian: python3-pip).
set -euo pipefail
cd "$(dirname "$0")/.."

version=13.0.88
# Of the wheels for x86-64 and for 64-bit Arm; pip refuses any other.
hashes=(
    56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
    c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f
)
folder=target/ptxas

# The version stands beside the program, so that another version here is another fetch there.
if [[ -x $folder/ptxas && $(cat "$folder/version" 2>/dev/null) == "$version" ]]; then
    echo "ptxas $version is there: $folder/ptxas"
    exit
fi
if ! command -v python3 >/dev/null; then
    echo "fetch_ptxas: nothing fetched: there is no python3" >&2
    exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
    echo "fetch_ptxas: nothing fetched: python3 has no pip (Debian: apt-get install python3-pip)" >&2
    exit 1
fi

mkdir -p "$folder"
scratch=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
{
    printf 'nvidia-cuda-nvcc==%s' "$version"
    printf ' --hash=sha256:%s' "${hashes[@]}"
    echo
} >"$scratch/requirements.txt"
python3 -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
    --requirement "$scratch/requirements.txt" --dest "$scratch"
python3 - "$scratch" <<'PYTHON'
import os, pathlib, sys, zipfile

scratch = pathlib.Path(sys.argv[1])
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (scratch / "ptxas").write_bytes(archive.read("nvidia/cu13/bin/ptxas"))
os.chmod(scratch / "ptxas", 0o755)
PYTHON
"$scratch/ptxas" --version | tail -n 1
mv "$scratch/ptxas" "$folder/ptxas"
echo "$version" >"$folder/version"
echo "ptxas $version fetched: $folder/ptxas"
