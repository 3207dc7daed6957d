"""Installing where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
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


def test_without_a_compiler(tmp_path):
    """The package installs, says once that it runs its reference path, and refuses "cpu" with the reason."""
    source, target = tmp_path / "source", tmp_path / "site"
    for name in ("csrc", "ncmi_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    environment = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        ".",
    ]
    done = subprocess.run([*install, "-v"], cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the C++ kernels could not be built" in done.stdout + done.stderr
    assert next(target.glob("*.dist-info/licenses/LICENSE")).read_text() == (ROOT / "LICENSE").read_text()
    subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, check=True)


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
