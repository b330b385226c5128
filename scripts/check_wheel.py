"""Checks wheels before anybody installs them: name and tags, size, modules, metadata, licences, libraries.

    python3 scripts/check_wheel.py FILE...

What does not hold is printed, one line each, and the exit status is 1. That a Linux wheel asks no more of libc than its
tag says, and for no other library, maturin checks when it builds one; here the tag is compared with the policies that
we promise.
"""

import re
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

MOST_BYTES = 10_000_000
SHIMS = {"sageattn3", "spas_sage_attn", "sparse_sageattn"}

# Platforms that releases are for. A tag may give a platform's old name as well, with a dot between the two, in either
# order. One wheel is for every CPython from 3.9 on, by the stable interface.
PLATFORMS = (
    r"manylinux(_2_17|2014)_(x86_64|aarch64)",
    r"musllinux_1_2_(x86_64|aarch64)",
    r"win_amd64",
    r"macosx_\d+_\d+_(arm64|x86_64)",
)

# Libraries that every Windows has; a wheel that needs another, such as a compiler's, would not import elsewhere.
WINDOWS_LIBRARIES = (
    r"(?i)(advapi32|bcrypt|bcryptprimitives|kernel32|ntdll|python3|userenv|ws2_32|msvcrt|ucrtbase|vcruntime140(_1)?"
    r"|api-ms-win-[a-z0-9-]+)\.dll"
)


def metadata(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return BytesParser().parsebytes(wheel.read(path))


def imported_libraries(image):
    """Names of the libraries in a Windows image's import table."""

    def number(at, size):
        return int.from_bytes(image[at : at + size], "little")

    def offset(address):
        """Where in the file an address of the loaded image lies."""
        for section in sections:
            start, size, raw = number(section + 12, 4), number(section + 16, 4), number(section + 20, 4)
            if start <= address < start + size:
                return raw + address - start
        raise ValueError(f"image: address {address:#x} is in no section")

    header = number(0x3C, 4)
    optional, count = header + 24, number(header + 6, 2)
    first = optional + number(header + 20, 2)
    sections = [first + 40 * i for i in range(count)]
    # The second entry of the directory, behind the optional header of a 64-bit image.
    entry = offset(number(optional + 112 + 8, 4))
    names = []
    while name := number(entry + 12, 4):
        start = offset(name)
        names.append(image[start : image.index(b"\0", start)].decode())
        entry += 20
    return names


def wrong_with(path):
    """What does not hold of a wheel."""
    match = re.fullmatch(r"(sageattention(?:_shims)?)-(\d+\.\d+\.\d+)-([^-]+)-([^-]+)-([^-]+)\.whl", path.name)
    if match is None:
        yield "its name is not that of a wheel of ours"
        return
    name, version, *tags = match.groups()
    if path.stat().st_size >= MOST_BYTES:
        yield f"has {path.stat().st_size} bytes, expected fewer than {MOST_BYTES}"
    with zipfile.ZipFile(path) as wheel:
        files = wheel.namelist()
        info = f"{name}-{version}.dist-info"
        tops = {file.partition("/")[0] for file in files}
        if name == "sageattention":
            platform = "|".join(PLATFORMS)
            if tags[:2] != ["cp39", "abi3"] or not all(re.fullmatch(platform, tag) for tag in tags[2].split(".")):
                yield f"its tags are {'-'.join(tags)}, expected cp39-abi3 and one of {', '.join(PLATFORMS)}"
            native = "sageattention/_native.pyd" if tags[2].startswith("win") else "sageattention/_native.abi3.so"
            needed = {native, "sageattention/__init__.py", "sageattention/_native.pyi", "sageattention/py.typed"}
            expected = {"sageattention", info}
        else:
            if tags != ["py3", "none", "any"]:
                yield f"its tags are {'-'.join(tags)}, expected py3-none-any"
            needed = {
                f"sageattention_shims/modules/{module}/{file}"
                for module in SHIMS
                for file in ("__init__.py", "py.typed")
            }
            needed |= {"sageattention_shims/__init__.py", "sageattention_shims.pth"}
            expected = {"sageattention_shims", "sageattention_shims.pth", info}
        needed |= {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"}
        if tops != expected:
            yield f"has {', '.join(sorted(tops))}, expected {', '.join(sorted(expected))}"
        for file in sorted(needed - set(files)):
            yield f"lacks {file}"
        said = metadata(wheel, "METADATA")
        if said["Version"] != version or said["Requires-Python"] != ">=3.9":
            yield f"its metadata has version {said['Version']} and Python {said['Requires-Python']}"
        if name == "sageattention":
            plain = [wanted for wanted in said.get_all("Requires-Dist", []) if "extra ==" not in wanted]
            if plain:
                yield f"requires {', '.join(plain)}, expected nothing without an extra"
            if tags[2].startswith("win") and native in files:
                foreign = [
                    library
                    for library in imported_libraries(wheel.read(native))
                    if not re.fullmatch(WINDOWS_LIBRARIES, library)
                ]
                if foreign:
                    yield f"needs {', '.join(foreign)}, which a Windows does not have"


def main(names):
    if not names:
        print("check_wheel: expected the names of wheels", file=sys.stderr)
        return 2
    failed = False
    for path in map(Path, names):
        found = list(wrong_with(path))
        failed |= bool(found)
        print(
            *(f"{path.name}: {line}" for line in found or [f"{path.stat().st_size} bytes, as it should be"]), sep="\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
