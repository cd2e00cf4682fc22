"""The wheel, built from the sdist and installed outside the checkout: what is in it, and that it passes the tests."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"zipvl_kernels", "zipvl_adapters", "zipvl_reference"}
OPERATORS = sorted(path.stem for path in (ROOT / "reference" / "zipvl_reference").glob("[a-z]*.py"))

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source checkout")


def run(*command, cwd):
    """Standard output of a command that has to succeed; a path to the checkout in the environment is not its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from an sdist of the checkout."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    assert list(out.glob("*.tar.gz"))
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel, a foreign package `adapters`, and what runs this test."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    foreign = site / "adapters"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("WHOSE = 'another project'\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # torch, pytest and hypothesis come from here; what an editable install adds to the path does not
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert not [name for name in names if name.endswith((".safetensors", ".pyc"))]


def test_installed_wheel_passes_the_operator_tests(python, tmp_path):
    tests = [tmp_path / f"test_{name}.py" for name in OPERATORS]
    for test in tests:
        shutil.copy(ROOT / "tests" / test.name, test)
    where = run(python, "-c", "import zipvl_kernels; print(zipvl_kernels.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where
    chosen = "(contract and zipvl_kernels) or by_hand or errors or empty"
    quick = [python, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-k", chosen, *tests]
    assert " passed" in run(*quick, cwd=tmp_path)


def test_foreign_adapters_package_is_unharmed(python, tmp_path):
    code = "import zipvl_adapters, zipvl_kernels, adapters; print(adapters.WHOSE)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "another project"
