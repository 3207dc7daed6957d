"""The report for issues: what it says is so, and it comes whatever is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ncmi_kernels
from ncmi_kernels import _backends, env

PACKAGE = Path(ncmi_kernels.__file__).parent


def facts(report):
    lines = report.strip().splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    return dict(line.split(": ", 1) for line in lines[1:-1] if ": " in line)


def test_it_is_so(monkeypatch):
    monkeypatch.setenv("NCMI_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("SECRET_TOKEN", "not for an issue")
    text = env.report()
    found = facts(text)
    assert found["ncmi_kernels"] == ncmi_kernels.__version__
    assert found["python"].split()[0] == sys.version.split()[0]
    assert found["torch"].split(",")[0] == torch.__version__
    assert f"{torch.get_num_threads()} threads of torch" in found["CPU"]
    for name, reason in ncmi_kernels.available_backends().items():
        assert f"backend {name}: {reason or 'runs'}" in text
    assert "NCMI_CPU_CAPABILITY=avx2" in text.splitlines()
    assert "not for an issue" not in text
    if _backends.load_library() is None:
        assert found["CPU kernels"] == torch.ops.ncmi_kernels.cpu_capability()


def test_a_fact_that_cannot_be_found_out(monkeypatch):
    def fails():
        raise OSError("no such thing")

    monkeypatch.setattr(env, "_cpu", fails)
    found = facts(env.report())
    assert found["CPU"] == "unknown, OSError: no such thing"
    assert found["libc"]


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_with_nothing_there(tmp_path, library):
    """Neither the library, nor triton, nor a compiler, nor nvidia-smi; the home directory is not shown."""
    shutil.copytree(PACKAGE, tmp_path / "ncmi_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "triton.py").write_text("raise ImportError(f'no triton in {__file__}')")
    if library == "broken":
        (tmp_path / "ncmi_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in env.VARIABLES},
        "HOME": str(tmp_path),
        "PATH": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "CXX": "ccache c++",
        "CUDA_HOME": str(tmp_path / "cuda"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "ncmi_kernels.env"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = facts(done.stdout)
    assert found["CPU kernels"] == "none, without the compiled library"
    assert found["C++ compiler"] == "ccache not found"
    assert found["nvcc"] == "~/cuda/bin/nvcc not found"
    assert found["NVIDIA driver"] == "nvidia-smi not found"
    assert found["GPU"] == "none that torch finds"
    reason = {"missing": "without its C++ kernels", "broken": "_C.abi3.so could not be loaded"}[library]
    assert reason in found["backend cpu"]
    assert reason in found["backend cuda"]
    assert found["backend triton"] == "triton could not be imported: no triton in ~/triton.py"
    assert found["backend reference"] == "runs"
    assert str(tmp_path) not in done.stdout
