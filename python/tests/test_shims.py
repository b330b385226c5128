"""The shims beside an original of the same name: neither harms the other, whichever comes first and whichever goes."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sageattention
import sageattention_shims

# Where scripts/test_python.sh and scripts/gpu.sh put the wheels that they test.
WHEELS = os.environ.get("SAGEATTENTION_WHEELS")

MODULE = "spas_sage_attn"
ORIGINAL = {
    f"{MODULE}/__init__.py": "WHOSE = 'original'\n",
    f"{MODULE}/core.py": "KERNEL = 'nvcc'\n",
    f"{MODULE}-0.1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 0.1.0\n",
    f"{MODULE}-0.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def wheels():
    if WHEELS is None:
        pytest.skip("SAGEATTENTION_WHEELS names no folder with the wheels")
    return [str(next(Path(WHEELS).glob(f"{name}-*.whl"))) for name in ("sageattention", "sageattention_shims")]


@pytest.fixture
def original(tmp_path):
    """A wheel such as the original's would be."""
    path = tmp_path / f"{MODULE}-0.1.0-py3-none-any.whl"
    record = f"{MODULE}-0.1.0.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in ORIGINAL.items():
            wheel.writestr(name, text)
        wheel.writestr(record, "".join(f"{name},,\n" for name in [*ORIGINAL, record]))
    return str(path)


class Environment:
    def __init__(self, folder):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # What the tests themselves import must not be found in it.
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def pip(self, *arguments):
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        subprocess.run([*pip, *arguments], check=True, capture_output=True, text=True, env=self.variables)

    def install(self, *files):
        self.pip("install", "--no-index", "--no-deps", *files)

    def run(self, *arguments):
        return subprocess.run([self.python, *arguments], capture_output=True, text=True, env=self.variables)

    def owner(self):
        """Whose module an import finds."""
        return self.run("-c", f"import {MODULE}; print(getattr({MODULE}, 'WHOSE', 'ours'))").stdout.strip()

    def files(self):
        """What the original's files are, by their hashes."""
        site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        return {name: hashlib.sha256((site / name).read_bytes()).hexdigest() for name in ORIGINAL}


@pytest.mark.parametrize("first", ["original", "ours"])
def test_an_original_stays_whole(tmp_path, original, first):
    ours = wheels()
    environment = Environment(tmp_path / "environment")
    for files in ([original], ours) if first == "original" else (ours, [original]):
        environment.install(*files)
    whole = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in ORIGINAL.items()}
    assert environment.files() == whole
    assert environment.owner() == "original"
    told = environment.run("-m", "sageattention_shims")
    assert told.returncode == 1 and "sageattn3: ours" in told.stdout and f"{MODULE}: another's" in told.stdout

    environment.pip("uninstall", "--yes", "sageattention-shims", "sageattention")
    assert environment.files() == whole and environment.owner() == "original"


def test_ours_are_found_once_the_original_is_gone(tmp_path, original):
    environment = Environment(tmp_path / "environment")
    environment.install(original, *wheels())
    environment.pip("uninstall", "--yes", MODULE)
    assert environment.owner() == "ours"
    told = environment.run("-m", "sageattention_shims")
    assert told.returncode == 0 and told.stdout.count(": ours\n") == 3, told.stdout + told.stderr


def test_the_main_wheel_has_no_module_of_another_name():
    with zipfile.ZipFile(wheels()[0]) as wheel:
        tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sageattention"}


def test_both_distributions_are_of_one_version():
    assert sageattention_shims.__version__ == sageattention.__version__


def test_the_modules_that_other_tests_import_are_ours():
    modules = sageattention_shims.folder()
    assert [modules in file.parents for file in sageattention_shims.found().values()] == [True] * 3
