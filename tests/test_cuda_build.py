"""Compiling the CUDA kernels, which needs nvcc and no GPU; building, or not, and loading, or not, their library."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ncmi_kernels"
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

# The most registers that any variant of a kernel takes on any of the architectures. 65536 of an SM's registers go to
# blocks of up to 512 threads for those by row (1024 where they take up to 64), 256 for the sums that take more than 64
# and 1024 for the rest.
REGISTERS = {
    "centroid_rows_kernel": 80,
    "class_begin_kernel": 18,
    "class_grad_kernel": 85,
    "class_grad_sums_kernel": 146,
    "sums_over_classes_kernel": 46,
    "column_sums_kernel": 120,
    "columns_kernel": 62,
    "commit_center_kernel": 40,
    "constants_kernel": 64,
    "finish_terms_kernel": 38,
    "focus_nearest_kernel": 64,
    "focus_rows_kernel": 54,
    "focus_sums_kernel": 58,
    "focus_table_kernel": 56,
    "focus_weights_kernel": 72,
    "fold_focus_sums_kernel": 40,
    "fold_totals_kernel": 32,
    "input_grad_kernel": 96,
    "move_center_kernel": 62,
    "reduce_kernel": 64,
    "reduce_partials_kernel": 60,
    "row_totals_kernel": 102,
    "scale_kernel": 32,
    "sort_keys_kernel": 25,
    "terms_kernel": 104,
    "totals_kernel": 32,
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """For each source and architecture nvcc's exit status and what it and ptxas had to say."""
    directory = tmp_path_factory.mktemp("cubin")

    def run(job):
        source, architecture = job
        command = [NVCC, "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v,-warn-spills,-Werror"]
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020C000000000000"]
        command += [f"-isystem={path}" for path in cpp_extension.include_paths()]
        command += [str(ROOT / "csrc" / "cuda" / source), "-o", str(directory / f"{source}.{architecture}.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


def kernels_of(report):
    """(name, bytes of stack, bytes spilled, registers) of each kernel in what ptxas reports."""
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\s+ptxas info\s+: Used (\d+) registers"
    )
    for mangled, stack, stores, loads, registers in re.findall(pattern, report):
        yield re.search(r"\d([a-z_]+_kernel)", mangled)[1], int(stack), int(stores) + int(loads), int(registers)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_stack_or_spills(compiled, source, architecture):
    status, report = compiled[source, architecture]
    assert status == 0, [line for line in report.splitlines() if "info" not in line]
    assert "warning" not in report, [line for line in report.splitlines() if "warning" in line]
    kernels = list(kernels_of(report))
    assert len(kernels) == report.count("Compiling entry function")
    for name, stack, spilled, registers in kernels:
        assert stack == 0, (name, stack)
        assert spilled == 0, (name, spilled)
        assert registers <= REGISTERS[name], (name, registers)


@needs_nvcc
def test_the_recorded_registers_are_those_of_the_kernels(compiled):
    """No kernel is missing from the record, and none of its numbers has room for a regression of an eighth."""
    most = dict.fromkeys(REGISTERS, 0)
    for _, report in compiled.values():
        for name, _, _, registers in kernels_of(report):
            most[name] = max(most[name], registers)
    for name, registers in REGISTERS.items():
        assert registers * 7 / 8 <= most[name], (name, most[name])


# Runs setup.py with the function setup() replaced, and as if torch had been built with CUDA, or not.
SETUP = """
import json, os, runpy
import setuptools, torch

torch.version.cuda = {cuda!r}
captured = {{}}
setuptools.setup = captured.update
runpy.run_path("setup.py")
extensions = captured["ext_modules"]
print(json.dumps({{
    "names": [extension.name for extension in extensions],
    "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST"),
    "sources": [source for extension in extensions for source in extension.sources],
}}))
"""


def setup(cuda=None, **environment):
    """What setup.py would build, as a dict, or the message with which it ends."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FORCE_") and k != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(cuda=cuda)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


CPU, CUDA = "ncmi_kernels._C", "ncmi_kernels._cuda"


def test_without_cuda_in_torch():
    result = setup()
    assert result["names"] == [CPU]
    assert not any("cuda" in source for source in result["sources"])


@needs_nvcc
def test_what_is_built_with_cuda():
    assert setup(FORCE_CUDA="1")["names"] == [CPU, CUDA]
    result = setup(cuda="13.0")
    assert result["names"] == [CPU, CUDA]
    assert {f"csrc/cuda/{name}" for name in SOURCES} < set(result["sources"])
    assert setup(cuda="13.0", FORCE_CUDA="0")["names"] == [CPU, CUDA]
    assert setup(cuda="13.0", FORCE_CPU="1")["names"] == [CPU]
    assert setup(cuda="13.0", FORCE_PYTHON="1")["names"] == []
    assert "exclude each other" in setup(FORCE_CUDA="1", FORCE_CPU="1")
    assert "exclude each other" in setup(FORCE_CUDA="1", FORCE_PYTHON="1")


@needs_nvcc
def test_architectures():
    assert setup(FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")["architectures"] == "9.0"
    assert re.fullmatch(r"8\.0;9\.0(;10\.0)?\+PTX", setup(FORCE_CUDA="1")["architectures"])


USE = """
import torch
import ncmi_kernels

backends = ncmi_kernels.available_backends()
assert backends["cpu"] is None, backends
print(backends["cuda"])
ncmi_kernels.NCMILoss(3, 8)(torch.randn(4, 8, requires_grad=True), torch.tensor([0, 1, 2, 0])).backward()
try:
    ncmi_kernels.NCMILoss(3, 8, backend="cuda")(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
except RuntimeError as error:
    assert "backend: got 'cuda', which cannot run here" in str(error), error
else:
    raise AssertionError("a backend asked for by name that cannot run has to raise")
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package, without CUDA kernels."""
    if not list(PACKAGE.glob("_C*.so")):
        pytest.skip("the CPU kernels are not built")
    shutil.copytree(PACKAGE, tmp_path / "ncmi_kernels", ignore=shutil.ignore_patterns("_cuda*.so", "__pycache__"))
    return tmp_path


def reason(package):
    """Why the CUDA kernels of a package cannot be used, after its CPU kernels were."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_library_that_is_not_there(package):
    assert "installed without its CUDA kernels" in reason(package)


def test_a_library_that_is_none(package):
    (package / "ncmi_kernels" / "_cuda.abi3.so").write_bytes(b"not a library")
    assert re.search(
        r"_cuda\.abi3\.so could not be loaded with torch .*invalid ELF header|file too short", reason(package)
    )


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_library_with_a_symbol_that_torch_lacks(package):
    source = package / "missing.c"
    source.write_text("int torch_has_no_such_function(void); int f(void) { return torch_has_no_such_function(); }")
    library = package / "ncmi_kernels" / "_cuda.abi3.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert "_cuda.abi3.so could not be loaded" in reason(package)
    assert "torch_has_no_such_function" in reason(package)
