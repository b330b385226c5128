#!/usr/bin/env bash
# Runs Windows programs under Wine, on an x86-64 Debian machine: tests of core, of the processor's kernels, of a few GPU
# kernels in the emulator, of what lies on disk, and of the command; then the command with a driver that is a fake.
# Arguments go to the test programs, e.g. `scripts/test_windows.sh paths`.
#
# The compiler is rustup's, for its target x86_64-pc-windows-gnu; linker and Wine are Debian's. What is missing is installed
# where this runs as root; where that cannot be, nothing is tested and the reason is printed. WINDOWS=require turns a skip
# into a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

triple=x86_64-pc-windows-gnu

skip() {
    echo "test_windows: skipped: $1" >&2
    if [[ ${WINDOWS:-} == require ]]; then exit 1; fi
    exit 0
}

scripts/debian_packages.sh gcc-mingw-w64-x86-64 wine64 || skip "there is no Wine, or no linker"
rustup target list --installed | grep -qx "$triple" || rustup target add "$triple" ||
    skip "rustup cannot fetch the standard library of $triple"

# Debian's wine64 brings its program, and the package `wine`, which it does without, the one on the path.
wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)

# Other profiles than those of the workspace: a target folder of its own keeps the two apart.
export CARGO_TARGET_DIR=${WINDOWS_TARGET_DIR:-${CARGO_TARGET_DIR:-$PWD/target}/windows}
export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=false PROPTEST_CASES=${PROPTEST_CASES:-16}
export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER=$wine
libraries=$CARGO_TARGET_DIR/libraries
mkdir -p "$libraries" "$CARGO_TARGET_DIR/driver"

# Rust's standard library takes its random numbers from a library that Wine 8 does not have. Wine looks for libraries in
# WINEPATH last, so that a newer one finds its own.
x86_64-w64-mingw32-gcc -shared -O1 -x c -o "$libraries/bcryptprimitives.dll" - -ladvapi32 <<'C'
#include <windows.h>
BOOLEAN WINAPI SystemFunction036(void *, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(unsigned char *to, SIZE_T bytes) { return SystemFunction036(to, bytes); }
C

# A Windows of this script's own, without the parts that it would offer to download.
export WINEPREFIX=$CARGO_TARGET_DIR/wine WINEARCH=win64 WINEDEBUG=-all WINEDLLOVERRIDES="mscoree,mshtml="
export WINEPATH=$libraries
unset RUSTC_WRAPPER RUSTFLAGS

echo "test_windows: $(rustc --version), $("$wine" --version)" >&2
# What these crates compute is little, and compiling them well takes longer than it saves.
quickly=()
for crate in sage-kernels sage-gpu sageattn; do quickly+=(--config "profile.dev.package.$crate.opt-level=1"); done
windows_tests() {
    cargo test "${quickly[@]}" --locked --target "$triple" "$@"
}

windows_tests --package sage-cuda --package sageattn --lib --bins --test disk_cache --test paths --test commands \
    --test bad_calls --test hostile_files -- "$@"
windows_tests --package sage-kernels --test heads_as_rows --test sinks -- "$@"
windows_tests --package sageattention-core --package sage-cpu --lib -- "$@"

# The driver's library is found by the name that it has on Windows, and what it compiles is kept in the user's own folder.
echo "test_windows: the command with a fake driver" >&2
rustc --target "$triple" --edition=2024 --crate-type=cdylib --crate-name=cuda --cap-lints=allow \
    --cfg named --cfg whole --cfg clusters --cfg any_kernel \
    -o "$CARGO_TARGET_DIR/driver/nvcuda.dll" crates/cuda/tests/fake_driver/libcuda.rs
program=$CARGO_TARGET_DIR/$triple/debug/sageattn.exe
local=$("$wine" cmd /c 'echo %LOCALAPPDATA%' | tr -d '\r')
warm() {
    WINEPATH="$libraries;$CARGO_TARGET_DIR/driver" "$wine" "$program" warm 2,8,300,64 1,8/2,7x500,128 --causal --lse --json
}
said=$("$wine" "$program" warm 1,8,2048,128 2>&1 || true)
if [[ $said != *"expected nvcuda.dll, which the NVIDIA driver installs"* ]]; then
    echo "test_windows: without a driver \`sageattn warm\` says: $said" >&2
    exit 1
fi
rm -rf "$WINEPREFIX"/drive_c/users/*/AppData/Local/sageattention
warm >"$CARGO_TARGET_DIR/first.json"
warm >"$CARGO_TARGET_DIR/second.json"
python3 - "$CARGO_TARGET_DIR" "$local" <<'PYTHON'
import json
import sys
from pathlib import Path

folder, local = Path(sys.argv[1]), sys.argv[2]
first, second = (json.loads((folder / f"{run}.json").read_text()) for run in ("first", "second"))
origins = [{kernel["from"] for kernel in run["kernels"]} for run in (first, second)]
print(f"test_windows: {len(first['kernels'])} kernels, {origins[0]}, then {origins[1]}, in {second['disk_cache']}")
assert first["disk_cache"] == local + "\\sageattention", (first["disk_cache"], local)
assert "compiled" in origins[0] and "disk" in origins[1] and "compiled" not in origins[1], origins
PYTHON
