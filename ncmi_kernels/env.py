"""What a report of a problem has to say about the machine: `python -m ncmi_kernels env` prints it as Markdown.

Whatever is missing (the compiled library, triton, a GPU, a compiler) is named in the report and fails nothing.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ncmi_kernels

# What changes which kernels are built, or which run and how. Only these are printed, not the whole environment.
VARIABLES = (
    "NCMI_CPU_CAPABILITY",
    "FORCE_CPU",
    "FORCE_CUDA",
    "FORCE_PYTHON",
    "CC",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)
PACKAGES = ("triton", "numpy", "torchmetrics")


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _told_by(command: list[str], line: str = "") -> str:
    """What a command prints, the first line with `line` in it; or that it is not there."""
    path = shutil.which(command[0])
    if path is None:
        return f"{command[0]} not found"
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=20, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    return next((text for text in said if line in text), f"{command[0]} did not say (status {done.returncode})")


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return _told_by([str(Path(home) / "bin" / "nvcc") if home else "nvcc", "--version"], "release")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {usable} of {os.cpu_count()} logical cores usable, {torch.get_num_threads()} threads of torch"


def _capability() -> str:
    if ncmi_kernels.available_backends()["cpu"] is not None:
        return "none, without the compiled library"
    return str(torch.ops.ncmi_kernels.cpu_capability())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch finds"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB)")
    return ", ".join(found)


def _said(fact: Callable[[], object]) -> str:
    """The fact, or why it could not be found out: a report with a gap is better than none."""
    try:
        return str(fact())
    except Exception as error:
        return f"unknown, {type(error).__name__}: {error}"


def report() -> str:
    """The report, in a Markdown fence, with the home directory written as ~."""
    facts: dict[str, Callable[[], object]] = {
        "ncmi_kernels": lambda: ncmi_kernels.__version__,
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": lambda: f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        **{name: lambda name=name: _package(name) for name in PACKAGES},  # type: ignore[misc]
        "OS": platform.platform,
        "libc": lambda: " ".join(platform.libc_ver()).strip() or "unknown",
        "CPU": _cpu,
        "CPU kernels": _capability,
        "GPU": _gpus,
        "NVIDIA driver": lambda: _told_by(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "C++ compiler": lambda: _told_by([*shlex.split(os.environ.get("CXX") or "c++"), "--version"]),
        "nvcc": _nvcc,
    }
    lines = [f"{name}: {_said(fact)}" for name, fact in facts.items()]
    lines += [f"backend {name}: {reason or 'runs'}" for name, reason in ncmi_kernels.available_backends().items()]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    home = str(Path.home())
    text = "\n".join(lines)
    if home != os.sep:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    print(report())
