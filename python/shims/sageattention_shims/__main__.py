"""Says which of the modules are ours, and exits with 1 where one is not."""

import sys

import sageattention_shims


def _line(name: str, file: object, ours: bool) -> str:
    if ours:
        return f"{name}: ours"
    if file is None:
        return f"{name}: not found; put {sageattention_shims.folder()} on PYTHONPATH"
    return f"{name}: another's, {file}; to have ours, uninstall the distribution that it belongs to"


def main() -> int:
    modules = sageattention_shims.folder()
    others = 0
    for name, file in sageattention_shims.found().items():
        ours = file is not None and modules in file.parents
        others += not ours
        print(_line(name, file, ours))
    return 1 if others else 0


sys.exit(main())
