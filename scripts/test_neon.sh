#!/usr/bin/env bash
# Runs the tests of sageattention-core and sage-cpu as 64-bit ARM code (NEON) under qemu, on an x86-64 Debian machine.
# Arguments go to the test binaries, e.g. `scripts/test_neon.sh neon`.
#
# Rust's standard library for ARM comes from Debian's rustc-web packages, so nothing is needed beyond apt. Missing
# packages are installed when this runs as root; otherwise, or where they do not exist, the tests are skipped and the
# reason is printed. NEON=require turns a skip into a failure; NEON_CPU is qemu's -cpu, e.g. cortex-a57 (plain NEON).
set -euo pipefail
cd "$(dirname "$0")/.."

triple=aarch64-unknown-linux-gnu
packages=(rustc-web cargo-web libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

skip() {
    echo "test_neon: skipped: $1" >&2
    if [[ ${NEON:-} == require ]]; then exit 1; fi
    exit 0
}

if [[ $(uname -m) == aarch64 ]]; then
    exec cargo test --package sageattention-core --package sage-cpu --lib -- "$@"
fi

scripts/debian_packages.sh "${packages[@]}" || skip "there is no compiler for $triple, or no qemu"

# A compiler of another version than the workspace's: a target folder of its own keeps the two apart.
export RUSTC=/usr/bin/rustc RUSTDOC=/usr/bin/rustdoc
export CARGO_TARGET_DIR=${NEON_TARGET_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/neon}
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# No -L: libc6:arm64, which the standard library depends on, is found as on an ARM machine. With
# -L /usr/aarch64-linux-gnu the cross compiler's loader would meet that libc, and the first thread would hang.
# `-cpu max` has every extension that qemu knows, among them dot products and int8 matrix products.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu ${NEON_CPU:-max}"
# Emulation is 20 to 40 times slower: fewer random cases.
export PROPTEST_CASES=${PROPTEST_CASES:-16}
unset RUSTUP_TOOLCHAIN RUSTC_WRAPPER RUSTFLAGS
echo "test_neon: $("$RUSTC" --version), $(qemu-aarch64 --version | head -n 1)" >&2
/usr/bin/cargo test --locked --package sageattention-core --package sage-cpu --lib --target "$triple" -- "$@"
