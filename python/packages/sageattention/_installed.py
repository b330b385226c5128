"""Whether another distribution has installed files where one of this one's packages lies."""

from __future__ import annotations

import warnings
from pathlib import Path

_OURS = "sageattention"


def warn_if_shared(file: str) -> None:
    """Warns where another distribution owns a package of ours too, which pip does not prevent.

    A wheel cannot leave a file out where another one has it: whoever is installed last has overwritten the other's
    files, and uninstalling either deletes them. All that can be done at run time is to say so.

    Args:
        file: The `__init__.py` of the package.
    """
    package = Path(file).parent
    others = _owners(package) - {_OURS}
    if others:
        names = " ".join(sorted(others))
        warnings.warn(
            f"{package.name}: installed by {names} and by {_OURS}, which has overwritten it; uninstalling one of them "
            f"deletes the other's files. To have the original: pip uninstall {_OURS} {names}, then pip install {names}",
            UserWarning,
            stacklevel=3,
        )


def _owners(package: Path) -> set[str]:
    """Names of the distributions beside a package whose lists of files have it."""
    # As `importlib.metadata` would find them, in a tenth of its time: an import must be fast.
    entry = f"\n{package.name}/__init__.py,".encode()
    owners = set()
    for record in package.parent.glob("*.dist-info/RECORD"):
        if entry in b"\n" + record.read_bytes():
            owners.add(record.parent.name.partition("-")[0].lower().replace("_", "-"))
    return owners
