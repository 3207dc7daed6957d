"""Installing: without kernels, with kernels that do not compile, without torch; packing."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import warnings
import torch
import ncmi_kernels

reason = ncmi_kernels.available_backends()["cpu"]
assert "without its C++ kernels" in reason, reason
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        criterion = ncmi_kernels.NCMILoss(3, 8)
        criterion(torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 2, 0])).backward()
messages = [str(w.message) for w in caught if w.category is ncmi_kernels.BackendWarning]
assert len(messages) == 1, messages
assert "reference path" in messages[0], messages
try:
    ncmi_kernels.NCMILoss(3, 8, backend="cpu")(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
except RuntimeError as error:
    assert "backend: got 'cpu', which cannot run here" in str(error), error
else:
    raise AssertionError("a backend asked for by name that cannot run has to raise")
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads."""
    for name in ("csrc", "ncmi_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def install(source, **variables):
    """`pip install` of a copy into its directory `site`: the exit status and the output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "FORCE_CUDA")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", "site", "."],
        cwd=source,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "variables", [{"PATH": "/nonexistent"}, {"FORCE_PYTHON": "1"}], ids=["none found", "asked for"]
)
def test_without_a_compiler(source, variables):
    """The package installs, says once that it runs its reference path, and refuses "cpu" with the reason."""
    status, output = install(source, **variables)
    assert status == 0, output
    site = source / "site"
    assert "Tag: py3-none-any\n" in next(site.glob("*.dist-info/WHEEL")).read_text()
    assert next(site.glob("*.dist-info/licenses/LICENSE")).read_text() == (ROOT / "LICENSE").read_text()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", USE], cwd=site, env=environment, check=True)
    check = [sys.executable, "-m", "ncmi_kernels", "check"]
    done = subprocess.run(check, cwd=site, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu cannot run here: ncmi_kernels was installed without its C++ kernels" in done.stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_kernels_that_do_not_compile(source):
    """Nothing is installed, and the end of the output says why, and how to do without."""
    for path in (source / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    (source / "csrc" / "cpu" / "ops_cpu.cpp").write_text("#error spoilt")
    status, output = install(source, FORCE_CPU="1")
    assert status != 0, output
    assert "error: #error spoilt" in output
    assert "Traceback" not in output.partition("#error spoilt")[2], output
    assert "FORCE_CPU=1 leaves out the CUDA kernels, FORCE_PYTHON=1 all of them." in output
    assert not (source / "site").exists()


def test_source_distribution(tmp_path):
    """It has all sources, those of the CUDA kernels too where there is no CUDA, and the tests with their helpers."""
    egg_info = ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *egg_info, "sdist", "--formats=tar", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "FORCE_PYTHON": "1"},
        check=True,
    )
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = {
        "csrc": ("*.h", "*.cpp", "*.cu", "*.cuh"),
        "ncmi_kernels": ("*.py", "py.typed"),
        "tests": ("*.py", "*.cpp", "*.h"),
        "benchmarks": ("*.py", "*.csv"),
        "docs": ("*.py", "*.md"),
    }
    for folder, patterns in folders.items():
        for pattern in patterns:
            assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)} <= packed
    assert {"Makefile", "requirements-dev.txt", "setup.py", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("sys.modules['torch'] = None", "import of torch halted"),
        ("import torch; torch.__version__ = '2.11.1+cpu'", "torch: got 2.11.1+cpu, expected 2.12 or later"),
    ],
)
def test_without_torch_or_with_an_old_one(state, message):
    """setup.py says what to install first, instead of a traceback."""
    run = f"import runpy, sys; {state}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Install torch >= 2.12 first" in done.stderr
    assert "Traceback" not in done.stderr
