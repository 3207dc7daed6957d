"""Which backend runs: what was asked for by name, or the fastest that can."""

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu")


class BackendWarning(UserWarning):
    """The compiled kernels are missing, and the reference path runs in their place."""


def _load_library() -> str | None:
    candidates = sorted(Path(__file__).parent.glob("_C*.so"))
    if not candidates:
        return (
            "ncmi_kernels was installed without its C++ kernels (no compiler was found, or compiling failed); "
            "reinstall with a C++20 compiler and `pip install --no-build-isolation -v .` to see why"
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


def available_backends() -> dict[str, str | None]:
    """What can run here, and why the others cannot.

    Returns:
        A dict from each backend's name to None where it can run, else to the reason why it cannot:
        "reference" (plain PyTorch, any device and dtype) and "cpu" (C++, float32, float64, bfloat16, float16).

    Example:
        >>> import ncmi_kernels
        >>> ncmi_kernels.available_backends()["reference"] is None
        True
    """
    return {"reference": None, "cpu": load_library()}


@cache
def _warn_reference(reason: str) -> None:
    warnings.warn(f"ncmi_kernels runs its slow PyTorch reference path: {reason}", BackendWarning, stacklevel=5)


def resolve(backend: str | None, input: Tensor) -> str:
    """The backend to run on `input`.

    Raises:
        ValueError: if `backend` is no backend's name.
        RuntimeError: if the backend asked for by name cannot run here, or not on this device.
    """
    if backend is None:
        if input.device.type != "cpu":
            return "reference"
        reason = load_library()
        if reason is None:
            return "cpu"
        _warn_reference(reason)
        return "reference"
    if backend == "reference":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")
    reason = load_library()
    if reason is not None:
        raise RuntimeError(f"backend: got {backend!r}, which cannot run here: {reason}")
    if input.device.type != "cpu":
        raise RuntimeError(f"backend: got 'cpu' for an input on {input.device}, expected a CPU tensor")
    return backend
