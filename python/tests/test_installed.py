"""A package of ours that another distribution has installed too is reported when it is imported."""

import subprocess
import sys
import warnings

import pytest
from sageattention._installed import warn_if_shared


def install(folder, name, version, files):
    """What pip leaves behind of a wheel, by the rules of installed distributions."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.mark.parametrize("package", ["sageattn3", "spas_sage_attn"])
def test_another_owner_is_named(tmp_path, monkeypatch, package):
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "unrelated", "1.0", ["unrelated/__init__.py", f"unrelated/{package}/__init__.py"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_shared(package)
    install(tmp_path, package, "0.1.0", [f"{package}/__init__.py", f"{package}/core.py"])
    with pytest.warns(UserWarning, match=f"{package}: installed by .* and by sageattention, .* pip install"):
        warn_if_shared(package)


def test_the_import_itself_warns(tmp_path):
    install(tmp_path, "spas_sage_attn", "0.1.0", ["spas_sage_attn/__init__.py"])
    program = f"import sys; sys.path.append({str(tmp_path)!r}); import spas_sage_attn, sageattn3"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "spas_sage_attn: installed by spas-sage-attn and by sageattention" in done.stderr
    assert "sageattn3: installed" not in done.stderr
