"""Which of `sageattn3`, `spas_sage_attn` and `sparse_sageattn` an import would take from here.

The modules lie in the folder `modules` of this package. A file `sageattention_shims.pth` puts that folder at the end of
Python's path: no file of another distribution is overwritten, and where the original of a module is installed, the
original is what an import finds. `python -m sageattention_shims` says which are ours.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Optional

__version__ = "3.0.0"

__all__ = ["NAMES", "folder", "found"]

NAMES = ("sageattn3", "spas_sage_attn", "sparse_sageattn")


def folder() -> Path:
    """The folder of the modules, for `PYTHONPATH` where Python reads no `.pth` file: after `pip install --target`."""
    return Path(__file__).parent / "modules"


def found() -> dict[str, Optional[Path]]:
    """The file that an import of each module would run, without importing it; None where there is none."""
    files = {}
    for name in NAMES:
        spec = importlib.util.find_spec(name)
        files[name] = None if spec is None or spec.origin is None else Path(spec.origin)
    return files
