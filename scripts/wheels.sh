#!/usr/bin/env bash
# Builds the Python wheel, or the command, for other machines than this one, and checks what it built.
#
#     scripts/wheels.sh [--out DIR] TARGET…               # wheels and the shims', into target/wheels/dist by default
#     scripts/wheels.sh --command [--out DIR] TARGET…     # the command `sageattn`, an archive for each target
#     scripts/wheels.sh --targets                         # what a target may be
#
# One target after the other, as each is a release build of everything. Needs rustup's cargo with the standard library of
# the targets (`rustup target add TARGET`) and python3. For Linux, zig links against the oldest libc of the tag's policy;
# it comes from PyPI, as maturin does, into an environment of their own. For Windows' GNU target the linker is Debian's
# gcc-mingw-w64-x86-64. Targets of macOS and of Microsoft's compiler are built on machines of their own kind.
set -euo pipefail
cd "$(dirname "$0")/.."

# The version that .github/workflows and scripts/test_python.sh have as well.
tools_packages=(maturin==1.16.0 cargo-zigbuild==0.24.1 ziglang==0.17.1)

# Each target with the tag of its wheel, and the oldest libc that programs for it are linked against.
targets="\
x86_64-unknown-linux-gnu    manylinux_2_17 2.17
aarch64-unknown-linux-gnu   manylinux_2_17 2.17
x86_64-unknown-linux-musl   musllinux_1_2  -
aarch64-unknown-linux-musl  musllinux_1_2  -
x86_64-pc-windows-gnu       -              -
x86_64-pc-windows-msvc      -              -
x86_64-apple-darwin         -              -
aarch64-apple-darwin        -              -"

fail() {
    echo "wheels: $*" >&2
    exit 2
}

usage() {
    sed -n 's/^#     //p' "$0" >&2
    exit 2
}

# The columns of a target.
row_of() {
    awk -v target="$1" '$1 == target { print $2, $3; found = 1 } END { exit !found }' <<<"$targets" ||
        fail "TARGET is $1, expected one of:"$'\n'"$(awk '{ print "    " $1 }' <<<"$targets")"
}

what=wheel
out=
while [[ ${1:-} == -* ]]; do
    case $1 in
        --command) what='command' ;;
        --out) out=${2:?--out needs a folder} && shift ;;
        --targets) awk '{ print $1 }' <<<"$targets" && exit ;;
        *) usage ;;
    esac
    shift
done
(($#)) || usage
# All of them are looked at before the first is built, as a build takes minutes.
for target in "$@"; do row_of "$target" >/dev/null; done

folder=${CARGO_TARGET_DIR:-$PWD/target}/wheels
out=${out:-$folder/dist}
mkdir -p "$out"
tools=$folder/tools
scripts/environment.sh "$tools" "${tools_packages[@]}"
programs=$tools/bin
[[ -d $programs ]] || programs=$tools/Scripts
export PATH=$programs:$PATH CARGO_INCREMENTAL=0

build_wheel() {
    local target=$1 policy=$2 built=$folder/built build=(maturin build --release --locked)
    [[ $policy == - ]] || build+=(--zig --compatibility "$policy")
    rm -rf "$built"
    "${build[@]}" --manifest-path python/Cargo.toml --target "$target" --target-dir "$folder" --out "$built"
    python scripts/check_wheel.py "$built"/*.whl
    mv "$built"/*.whl "$out"
}

build_command() {
    local target=$1 libc=$2 build=(build) asked=$1 program name=sageattn-$1
    # The linker of the host is right for none but the host's own libc.
    if [[ $target == *-linux-* ]]; then
        build=(zigbuild)
        [[ $libc == - ]] || asked=$target.$libc
    fi
    cargo "${build[@]}" --release --locked --package sageattn --target "$asked" --target-dir "$folder"
    program=$folder/$target/release/sageattn
    [[ $target != *-windows-* ]] || program=$program.exe
    rm -rf "${folder:?}/$name"
    mkdir "$folder/$name"
    cp "$program" LICENSE NOTICE crates/cli/README.md "$folder/$name"
    tar -czf "$out/$name.tar.gz" -C "$folder" "$name"
    echo "$name.tar.gz: $(wc -c <"$out/$name.tar.gz") bytes"
}

for target in "$@"; do
    read -r policy libc < <(row_of "$target")
    case $what in
        wheel) build_wheel "$target" "$policy" ;;
        command) build_command "$target" "$libc" ;;
    esac
done

# One wheel of the shims is for every machine.
if [[ $what == wheel ]]; then
    python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out" ./python/shims
    python scripts/check_wheel.py "$out"/sageattention_shims-*.whl
fi
