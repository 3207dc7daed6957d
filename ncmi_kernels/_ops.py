"""The operators of a backend."""

from torch import Tensor

from ncmi_kernels import _backends
from ncmi_kernels._problem import CenterUpdate
from ncmi_kernels._schema import Operators, define, defined

# "cpu" and "cuda": the dispatcher tells them apart by the tensors. Looked up once, as that costs as much as some calls.
_compiled: Operators | None = None
if _backends.load_library() is None:
    define("ncmi_kernels")
    _compiled = defined("ncmi_kernels")


def operators(backend: str) -> Operators:
    """The operators of a backend that can run here."""
    if backend == "triton":
        from ncmi_kernels import _triton

        return _triton.OPERATORS
    assert _compiled is not None
    return _compiled


def update_center_(
    center: Tensor,
    update: CenterUpdate,
    input: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Move `center` [M] towards the mean of the rows of `input`, in place; returns a copy of it."""
    move = operators(backend).update_center_
    return move(center, update[0], input, target, update[1], num_classes, ignore_index)
