"""How every kernel is launched."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Of all kernels. Fusing multiplications with additions is no longer the default from Triton 3.10 on.
COMPILING = {"sanitize_overflow": False, "enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, debug: bool = False, **arguments: Any) -> None:
    """Every launch goes through here, the kernel's arguments by name."""
    # In order for Triton, which takes 3 us longer to bind them by name.
    kernel[grid](*map(arguments.__getitem__, kernel.arg_names), num_warps=warps, debug=debug, **COMPILING)
    # Triton has compiled, and would from now on compare all constants that the kernel reads: 0.4 us each, every launch.
    kernel.used_global_vals = {}


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """What makes the device of a tensor the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
