"""The package as pip gets it: an sdist, the wheel built from it, and an environment with that wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from pages_support import ROOT


def called(*words, cwd):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both files, built without a network from what git has."""
    source = tmp_path_factory.mktemp("source")
    listed = called("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    called(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    return out


def test_both_hold_the_package_and_its_data(dist):
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "neftsurgery").rglob("*.py") if path.stat().st_size
    }
    data = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "neftsurgery").rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".nbc", ".nbi")
    }
    assert "neftsurgery/neurons/architectures.json" in data
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules | data <= names
    assert not [name for name in names if not name.startswith(("neftsurgery/", "neftsurgery-"))]
    with tarfile.open(sdist) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert modules | data | {"README.md", "LICENSE", "pyproject.toml"} <= held


def test_the_wheel_works_where_it_is_installed(dist, tmp_path):
    """Its dependencies come from this environment: no index is asked."""
    called(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    home = Path(called(python, "-c", ask, cwd=tmp_path).strip())
    (home / "dependencies.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    (wheel,) = dist.glob("*.whl")
    called(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    found = called(python, "-c", "import neftsurgery; print(neftsurgery.__file__)", cwd=tmp_path)
    assert found.startswith(str(tmp_path))
    shown = called(tmp_path / "venv" / "bin" / "neftsurgery", "demo", "--files-only", "try", cwd=tmp_path)
    assert "All checks passed" in shown
    assert (tmp_path / "try" / "report.html").exists()
