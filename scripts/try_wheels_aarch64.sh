#!/usr/bin/env bash
# Whether the wheel for 64-bit Arm computes: Debian's Python for it, in a folder of its own, under qemu on x86-64 Debian.
#
#     scripts/try_wheels_aarch64.sh DIR     # DIR has that wheel and the shims': scripts/wheels.sh makes both
#
# Needs root, as apt is told of the architecture. Nothing of it is installed: packages are unpacked into
# target/aarch64-python.
set -euo pipefail
wheels=$(cd "${1:?the folder with the wheels}" && pwd)
cd "$(dirname "$0")/.."

folder=${CARGO_TARGET_DIR:-$PWD/target}/aarch64-python
debian=(libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 liblzma5 libpython3.11-minimal libpython3.11-stdlib libssl3 libstdc++6
    libuuid1 python3.11-minimal zlib1g)

scripts/debian_packages.sh qemu-user python3-pip
if [[ ! -f $folder/complete ]]; then
    rm -rf "$folder"
    mkdir -p "$folder/packages" "$folder/root"
    dpkg --add-architecture arm64
    apt-get update --quiet=2
    (cd "$folder/packages" && apt-get download --quiet=2 "${debian[@]/%/:arm64}")
    for package in "$folder"/packages/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done
    touch "$folder/complete"
fi

wheel=$(compgen -G "$wheels/sageattention-*manylinux*aarch64.whl") || {
    echo "try_wheels_aarch64: $wheels has no wheel for 64-bit Arm, expected what scripts/wheels.sh builds" >&2
    exit 1
}
# What is for another machine than pip's own goes into a folder only.
rm -rf "$folder/site"
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" --only-binary :all: \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --platform manylinux_2_17_aarch64 \
    --platform manylinux_2_28_aarch64 --find-links "$wheels" numpy "${wheel}[shims]"

# One thread for numpy, whose matrix products have nothing to do with what is tested.
PYTHONPATH=$folder/site:$folder/site/sageattention_shims/modules OPENBLAS_NUM_THREADS=1 \
    qemu-aarch64 -cpu max -L "$folder/root" "$folder/root/usr/bin/python3.11" scripts/smoke.py
