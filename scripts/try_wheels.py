"""Installs both wheels beside numpy, has them compute, uninstalls them, and compares all else with what it was before.

    python3 scripts/try_wheels.py DIR     # DIR has the wheel for this machine, and the shims'

All of it happens in a virtual environment of the Python that runs this, which is removed afterwards. numpy comes from
where pip takes packages. What does not hold is printed, one line each, and the exit status is 1.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SCRIPTS = Path(__file__).parent
OURS = ("sageattention", "sageattention-shims")


def files(folder):
    """Hashes of all files below a folder, without what Python itself compiles of them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def wrong_with(folder, wheels):
    """Uses the wheels in an environment in `folder`, and yields what is not as it was before."""
    venv.create(folder, with_pip=True)
    program = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def python(*arguments):
        subprocess.run([program, *arguments], check=True)

    def pip(command, *arguments):
        python("-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments)

    pip("install", "numpy")
    before = files(folder)
    pip("install", "--no-index", "--find-links", str(wheels), "sageattention[shims]")
    python(str(SCRIPTS / "smoke.py"))
    python("-m", "sageattention_shims")
    pip("uninstall", "--yes", "sageattention-shims")
    python("-c", "import sageattention, numpy; x = numpy.ones((1, 1, 4, 8), 'f'); sageattention.sageattn(x, x, x)")
    pip("uninstall", "--yes", "sageattention")
    after = files(folder)
    for file in sorted(before.keys() | after.keys()):
        if before.get(file) != after.get(file):
            was = "is left behind" if file not in before else "is gone" if file not in after else "is changed"
            yield f"{file} {was} after {' and '.join(OURS)} are uninstalled"


def main(names):
    if len(names) != 1 or not Path(names[0]).is_dir():
        print(f"try_wheels: found {' '.join(names) or 'nothing'}, expected a folder with wheels", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            wrong = list(wrong_with(Path(folder) / "environment", Path(names[0]).resolve()))
        except subprocess.CalledProcessError as error:
            wrong = [str(error)]
    print(*(wrong or ["installed, computed, uninstalled: all else is as it was"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
