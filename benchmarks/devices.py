"""What the benchmarks run on: how memory is measured there, and what is written down of it.

On a CPU the memory of a step is found in a process of its own (`memory_worker`). glibc is asked, so blocks of ATen and
the malloc of any library count alike: malloc maps every block of 16 KiB or more separately there and keeps the
high-water mark of the mapped bytes (smaller blocks do not count). The kernel's mark of the resident set would be off by
hundreds of KiB, as Linux counts pages by CPU, in batches; torch.profiler does not see malloc. Needs Linux with glibc
2.33; unknown elsewhere.
"""

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import ncmi_kernels

CPU = torch.device("cpu")

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
MAPPED_FROM = 16 * 1024
MAX_CHUNKS = 20_000


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: what a GPU has, or the system within the limit of the cgroup."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(re.findall(r"MemAvailable: *(\d+)", meminfo.read_text())[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (maximum := limit.read_text().strip()) != "max":
        free = min(free, int(maximum) - int(used.read_text()))
    return free


# ------------------------------------------------------------------------------------------------------------
# What numbers depend on, for the columns of the same names
# ------------------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device = CPU) -> dict[str, Any]:
    """What every benchmark writes down: model of the device, versions, the CPU kernels' instruction set, date."""
    on_cpu = ncmi_kernels.available_backends()["cpu"] is None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "torch": torch.__version__,
        "ncmi_kernels": ncmi_kernels.__version__,
        "cpu_capability": torch.ops.ncmi_kernels.cpu_capability() if on_cpu else "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_gpu() -> dict[str, str]:
    """What the numbers of a GPU depend on besides."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        driver = done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = ""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"driver": driver, "cuda": torch.version.cuda or "", "triton": triton}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------------
# Memory of a CPU
# ------------------------------------------------------------------------------------------------------------


def memory_worker() -> ProcessPoolExecutor:
    """A process to run `peak_of` in."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_map_blocks_separately)


def _map_blocks_separately() -> None:
    if hasattr(LIBC, "mallinfo2"):
        LIBC.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        LIBC.mallopt(M_ARENA_MAX, 1)  # a thread's arena would come with room for some blocks


class _MallInfo(ctypes.Structure):
    """Struct mallinfo2 of malloc.h; hblkhd is the number of mapped bytes."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("0", "1", "2", "3", "hblkhd", "5", "6", "7", "8", "9"))


def peak_of(function: Callable[[], object]) -> int | None:
    """Bytes that `function` has allocated at once, at most; None if unknown. To be run by `memory_worker`."""
    if not hasattr(LIBC, "mallinfo2"):
        return None
    LIBC.mallinfo2.restype = _MallInfo
    LIBC.malloc.restype = ctypes.c_void_p
    LIBC.malloc.argtypes = (ctypes.c_size_t,)
    LIBC.free.argtypes = (ctypes.c_void_p,)
    gc.collect()
    # malloc prefers the free chunks of its heap to a mapping: use them up, until it maps a block.
    mapped = LIBC.mallinfo2().hblkhd
    for _ in range(MAX_CHUNKS):
        block = LIBC.malloc(MAPPED_FROM)
        if LIBC.mallinfo2().hblkhd > mapped:
            LIBC.free(block)
            break
    else:
        return None  # this malloc is not glibc's
    # The mark cannot be set back, so what is allocated is brought up to it, by a block that is never touched.
    ballast = LIBC.malloc(max(MAPPED_FROM, _most_mapped_bytes() - mapped))
    if not ballast:
        return None
    before = LIBC.mallinfo2().hblkhd
    function()
    peak = _most_mapped_bytes() - before
    LIBC.free(ballast)
    return peak


def _most_mapped_bytes() -> int:
    """The high-water mark, which glibc gives only as text on stderr."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        LIBC.malloc_stats()
        os.dup2(stderr, 2)
        os.close(stderr)
        file.seek(0)
        text = file.read().decode()
    return int(text.split("max mmap bytes")[1].split()[1])
