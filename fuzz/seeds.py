"""Writes the seed corpus of the target `qkv_file`: small safetensors files, whole and damaged.

    python3 fuzz/seeds.py fuzz/corpus/qkv_file
"""

import itertools
import json
import pathlib
import struct
import sys

SIZES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def file(tensors, metadata=None, pad=True):
    """A safetensors file of {name: (dtype, shape)}, whose bytes count upwards."""
    header, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype]
        for size in shape:
            end = start + (end - start) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(i % 251 for i in range(end))


def qkv(dtype, shape, prefix=""):
    return {prefix + name: (dtype, shape) for name in "qkv"}


def seeds():
    for dtype, shape in itertools.product(SIZES, ([1, 2, 3, 4], [2, 2, 2], [3], [], [0, 4], [1, 1, 1, 2, 2])):
        yield f"{dtype}-{'x'.join(map(str, shape)) or 'scalar'}", file(qkv(dtype, shape))
    layers = {**qkv("F16", [1, 1, 2, 2], "layer2."), **qkv("F16", [1, 1, 2, 2], "layer10.")}
    yield "layers", file(layers, {"license": "Apache-2.0"})
    yield "masks", file({**qkv("F32", [1, 1, 2, 2]), "mask": ("BOOL", [2, 2]), "bias": ("F32", [1, 1, 2, 2])})
    yield "no-k", file({"q": ("F32", [2]), "v": ("F32", [2])})
    yield "empty", file({})
    yield "unpadded", file(qkv("BF16", [1, 1, 1, 1]), pad=False)
    yield "names", file(qkv("F32", [1], "schicht.ä\n\u001b[31m"))

    whole = file(qkv("F32", [1, 1, 2, 2]))
    yield "nothing", b""
    yield "length-only", whole[:8]
    yield "cut-header", whole[:40]
    yield "cut-data", whole[:-5]
    yield "longer", whole + b"more"
    yield "long-header", struct.pack("<Q", 2**63) + whole[8:]
    yield "overlap", whole.replace(b'"data_offsets":[16,32]', b'"data_offsets":[15,31]')
    yield "backwards", whole.replace(b'"data_offsets":[16,32]', b'"data_offsets":[32,16]')
    yield "huge-shape", whole.replace(b'"shape":[1,1,2,2]', b'"shape":[4294967296,4294967296]')
    yield "negative", whole.replace(b'"shape":[1,1,2,2]', b'"shape":[-1,1,2,2]')
    yield "twice", whole.replace(b'"k":', b'"q":')
    yield "deep", struct.pack("<Q", 2000) + b"[" * 2000


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds():
        (folder / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
