"""A package of ours that another distribution has installed too is reported when it is imported."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import sageattention
from sageattention._installed import warn_if_shared


def install(folder, name, files):
    """What pip leaves behind of a wheel, by the rules of installed distributions."""
    metadata = folder / f"{name}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.mark.parametrize("package", ["sageattn3", "spas_sage_attn", "sparse_sageattn"])
def test_another_owner_of_the_file_is_named(tmp_path, package):
    here = tmp_path / "here"
    file = f"{package}/__init__.py"
    install(here, "sageattention", [file])
    install(here, "unrelated", ["unrelated/__init__.py", f"unrelated/{file}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_shared(str(here / file))
    install(here, package, [file, f"{package}/core.py"])
    name = package.replace("_", "-")
    with pytest.warns(
        UserWarning, match=f"{package}: installed by {name} and by sageattention, .* pip install {name}$"
    ):
        warn_if_shared(str(here / file))


def test_the_import_itself_warns(tmp_path):
    site = Path(sageattention.__file__).parent.parent
    for package in ("sageattention", "sageattn3", "spas_sage_attn", "sparse_sageattn"):
        shutil.copytree(site / package, tmp_path / package)
    install(tmp_path, "spas_sage_attn", ["spas_sage_attn/__init__.py"])
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import spas_sage_attn, sageattn3"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "spas_sage_attn: installed by spas-sage-attn and by sageattention" in done.stderr
    assert "sageattn3: installed" not in done.stderr
