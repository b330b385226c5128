"""Whether another distribution has installed files where one of this one's packages lies."""

from __future__ import annotations

import importlib.metadata
import warnings

_OURS = "sageattention"


def warn_if_shared(package: str) -> None:
    """Warns where another distribution owns a package of ours too, which pip does not prevent.

    A wheel cannot leave a file out where another one has it: whoever is installed last has overwritten the other's
    files, and uninstalling either deletes them. All that can be done at run time is to say so.
    """
    others = _owners(package) - {_OURS}
    if others:
        names = ", ".join(sorted(others))
        warnings.warn(
            f"{package}: installed by {names} and by {_OURS}, which has overwritten it; uninstalling one of them "
            f"deletes the other's files. To have the original: pip uninstall {_OURS} {names}, then pip install {names}",
            UserWarning,
            stacklevel=3,
        )


def _owners(package: str) -> set[str]:
    """Names of the distributions whose list of files has the package."""
    owners = set()
    for distribution in importlib.metadata.distributions():
        files = distribution.read_text("RECORD") or ""
        if f"\n{package}/__init__.py" in f"\n{files}":
            owners.add(distribution.metadata["Name"].lower().replace("_", "-"))
    return owners
