"""The operators of a backend, and what they know of the centroids."""

from typing import NamedTuple

from torch import Tensor

from ncmi_kernels import _backends
from ncmi_kernels._options import Options
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


class Table(NamedTuple):
    """What rows are compared with: the outputs of the operator centroid_stats."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [C + 1, 8] float64: a record a class, then one of all


def table_of(centroid_logits: Tensor, options: Options, backend: str) -> Table:
    """The table of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    table = operators(backend).centroid_stats(centroid_logits.detach(), options.softmax, options.centroid_to_sample)
    return Table(*table)


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
