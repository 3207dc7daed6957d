"""Which backend runs: what was asked for by name, or the fastest that can."""

import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ncmi_kernels._modes import forward_mode

BACKENDS = ("reference", "cpu", "triton", "cuda")


class BackendWarning(UserWarning):
    """The compiled kernels are missing, and the reference path runs in their place."""


def _load_library() -> str | None:
    candidates = sorted(Path(__file__).parent.glob("_C*.so"))
    if not candidates:
        return (
            "ncmi_kernels was installed without its C++ kernels (no compiler was found, or FORCE_PYTHON "
            "was set); reinstall with a C++20 compiler: `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(candidates[0]))
        torch.ops.ncmi_kernels.cpu_capability()
    except (OSError, RuntimeError) as error:
        return f"{candidates[0].name} could not be loaded with torch {torch.__version__}: {error}"
    return None


_failure = _load_library()


def load_library() -> str | None:
    """None if the compiled operators are loaded, else the reason why not."""
    return _failure


@cache
def load_cuda_library() -> str | None:
    """None if the CUDA kernels are loaded, a library beside the one with the operators; else the reason why not."""
    reason = load_library()
    if reason is not None:
        return reason
    candidates = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if not candidates:
        return (
            "ncmi_kernels was installed without its CUDA kernels (no nvcc or no CUDA torch was found, or FORCE_CPU "
            "was set); reinstall with nvcc: `FORCE_CUDA=1 pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(candidates[0]))
    except (OSError, RuntimeError) as error:
        return f"{candidates[0].name} could not be loaded with torch {torch.__version__}: {error.__cause__ or error}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def triton_interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, on any device: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@cache
def load_triton() -> str | None:
    """None if Triton can be imported and has a device to run on, else the reason why not."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton could not be imported: {error}"
    if not torch.cuda.is_available() and not triton_interprets():
        return "torch finds no CUDA device (and TRITON_INTERPRET is not set)"
    return None


def available_backends() -> dict[str, str | None]:
    """What can run here, and why the others cannot.

    Returns:
        A dict from each backend's name to None where it can run, else to the reason why it cannot. There are
        "reference" (plain PyTorch, any device), "cpu" (C++), and for CUDA devices "triton" and "cuda" (CUDA C++).

    Example:
        >>> import ncmi_kernels
        >>> ncmi_kernels.available_backends()["reference"] is None
        True
    """
    return {name: None if name == "reference" else _reason(name) for name in BACKENDS}


def _reason(backend: str) -> str | None:
    if backend == "cpu":
        return load_library()
    return load_triton() if backend == "triton" else load_cuda_library()


@cache
def _warn_reference(reason: str) -> None:
    warnings.warn(f"ncmi_kernels runs its slow PyTorch reference path: {reason}", BackendWarning, stacklevel=6)


_CANDIDATES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def _fastest(device: str) -> str:
    """The first that can run, for a device type. CUDA before Triton: the same bytes, and launches that cost less."""
    if device == "cpu" and load_library() is None:
        return "cpu"
    if device == "meta":
        return "reference"
    candidates = _CANDIDATES.get(device, ())
    reasons = []
    for backend in candidates:
        reason = _reason(backend)
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}" if len(candidates) > 1 else reason)
    _warn_reference("; ".join(reasons) or f"there are no kernels for {device}")
    return "reference"


def resolve(backend: str | None, input: Tensor) -> str:
    """The backend to run on `input`; for forward-mode derivatives the reference, whatever was asked for.

    Raises:
        ValueError: if `backend` is no backend's name.
        RuntimeError: if the backend asked for by name cannot run here, or not on this device.
    """
    device = "cpu" if input.is_cpu else input.device.type  # the latter takes five times as long
    if backend is None:
        return "reference" if forward_mode() else _fastest(device)
    if backend == "reference":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")
    reason = _reason(backend)
    if reason is not None:
        raise RuntimeError(f"backend: got {backend!r}, which cannot run here: {reason}")
    expected = "cpu" if backend == "cpu" else "cuda"
    if device != expected and not (backend == "triton" and triton_interprets()):
        raise RuntimeError(
            f"backend: got {backend!r} for an input on {input.device}, expected a {expected.upper()} tensor"
        )
    return "reference" if forward_mode() else backend
