"""Compares every place that holds a version with the newest entry of CHANGELOG.md: its first, or Python's its second.

    python3 scripts/check_versions.py [TAG]     # and the tag of a release: `v` and the crates' version

Prints what does not agree, one line each, and exits with 1. Needs Python 3.11.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def toml(path):
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def text(path, pattern):
    """What the pattern's group matches first in a file; None where it matches nothing."""
    found = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def crates():
    """Places that hold the version of the crates."""
    workspace = toml("Cargo.toml")["workspace"]
    yield "Cargo.toml: workspace.package.version", workspace["package"]["version"]
    manifests = {path.parent: toml(path.relative_to(ROOT)) for path in ROOT.glob("crates/*/Cargo.toml")}
    for name, dependency in workspace["dependencies"].items():
        if "path" in dependency and manifests[ROOT / dependency["path"]]["package"].get("publish", True):
            yield f"Cargo.toml: workspace.dependencies.{name}", dependency.get("version")
    for folder, manifest in manifests.items():
        for name, dependency in manifest.get("dependencies", {}).items():
            if isinstance(dependency, dict) and "path" in dependency:
                yield f"{folder.name}/Cargo.toml: dependencies.{name}", dependency.get("version")


def python():
    """Places that hold the version of the Python distributions."""
    main, shims = (toml(path)["project"] for path in ("python/pyproject.toml", "python/shims/pyproject.toml"))
    yield "python/pyproject.toml: project.version", main["version"]
    (extra,) = main["optional-dependencies"]["shims"]
    yield "python/pyproject.toml: the extra `shims`", extra.removeprefix("sageattention-shims==")
    yield "python/shims/pyproject.toml: project.version", shims["version"]
    (needed,) = shims["dependencies"]
    yield "python/shims/pyproject.toml: project.dependencies", needed.removeprefix("sageattention==")
    for package in ("packages/sageattention", "shims/sageattention_shims"):
        path = f"python/{package}/__init__.py"
        yield f"{path}: __version__", text(path, r'^__version__ = "(.*)"$')


def main(tag):
    version, state = r"\d+\.\d+\.\d+", r"\((?:unreleased|\d{4}-\d\d-\d\d)\)$"
    of_crates = text("CHANGELOG.md", rf"^## ({version}), Python {version} {state}")
    of_python = text("CHANGELOG.md", rf"^## {version}, Python ({version}) {state}")
    wrong = [
        f"{place} is {found}, expected {expected}, as CHANGELOG.md has it"
        for places, expected in ((crates(), of_crates), (python(), of_python))
        for place, found in places
        if found != expected
    ]
    if tag is not None and tag != f"v{of_crates}":
        wrong.append(f"the tag is {tag}, expected v{of_crates}")
    if tag is not None and text("CHANGELOG.md", r"^## .*(\(unreleased\))$") is not None:
        wrong.append("CHANGELOG.md: an entry is unreleased, expected the date of the release")
    print(*wrong, sep="\n") if wrong else print(f"crates {of_crates}, Python {of_python}: all places agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
