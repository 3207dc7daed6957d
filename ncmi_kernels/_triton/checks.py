"""What csrc checks of tensors, before anything is launched or moved."""

import torch
from torch import Tensor

from ncmi_kernels import _backends, _schema
from ncmi_kernels._options import REDUCTIONS
from ncmi_kernels._schema import Table
from ncmi_kernels._triton.arguments import Batch, Reducing, Rows
from ncmi_kernels._triton.tiles import HALF

INTERPRETED = _backends.triton_interprets()
DOUBLE, INT64, ARITHMETIC = (torch.float64,), (torch.int64,), (torch.float32, torch.float64)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"ncmi_kernels: {what}")


def check(
    name: str,
    tensor: Tensor | None,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    strided: bool = False,
) -> None:
    """Raise RuntimeError if this is not one of `shape` and one of `dtypes`, contiguous, on the device of `like`."""
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise RuntimeError(f"ncmi_kernels: {name} has an unexpected dtype")
    if tensor.shape != shape:
        raise RuntimeError(f"ncmi_kernels: {name} has an unexpected shape")
    if not strided and not tensor.is_contiguous():
        raise RuntimeError(f"ncmi_kernels: {name} must be contiguous")
    if tensor.device != like.device:
        raise RuntimeError(f"ncmi_kernels: {name} is on an unexpected device")
    _check_memory(name, tensor)


def _check_memory(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError if the storage was freed. On the meta device it has no address, but a size."""
    if not tensor.data_ptr() and tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(f"ncmi_kernels: {name} has no memory")


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (*ARITHMETIC, *HALF)) -> tuple[int, int]:
    """The shape of a matrix of any strides, with columns."""
    require(tensor.dtype in dtypes, f"{name} must be " + ", ".join(str(dtype)[6:] for dtype in dtypes))
    require(tensor.dim() == 2, f"{name} must have 2 dimensions")
    require(tensor.shape[1] > 0, f"{name} must have columns")
    _check_memory(name, tensor)
    return tensor.shape[0], tensor.shape[1]


def check_batch(batch: Batch, dtype: torch.dtype, classes: int) -> tuple[int, int]:
    """The shape of the input; `dtype` is that of the arithmetic."""
    input, target, center, ignore_index = batch
    rows, columns = check_matrix("input", input)
    require(input.dtype is not torch.float64 or dtype is torch.float64, "float64 input needs float64 centroid_logits")
    check("center", center, input, (dtype,), (columns,))
    check_target(target, input, rows, classes, ignore_index)
    return rows, columns


def check_target(target: Tensor, like: Tensor, rows: int, classes: int, ignore_index: int) -> None:
    check("target", target, like, INT64, (rows,), strided=True)
    if INTERPRETED:
        _check_targets(target, ignore_index, classes)


def check_reducing(by: Reducing) -> None:
    require(0 <= by.reduction < len(REDUCTIONS), "unknown reduction")
    require(REDUCTIONS[by.reduction] == "mean" or not by.batch_ratio, "ratio over the batch needs reduction mean")
    right = by.sharpness == 0 if by.batch_ratio else by.sharpness >= 0
    require(right, "sharpness must be >= 0, and 0 for the ratio over the batch")


def check_table(input: Tensor, table: Table, centroid_to_sample: bool) -> None:
    """The table of C classes for an input [B, M]; C may be 0 where B is."""
    log_activation, activation, reference, norms = table
    classes, columns = check_matrix("log_activation", log_activation, ARITHMETIC)
    dtype = (log_activation.dtype,)
    check("log_activation", log_activation, input, dtype, (classes, columns))
    check("activation", activation, input, dtype, (classes if centroid_to_sample else 0, columns))
    check("reference", reference, input, dtype, (2, columns))
    check("norms", norms, input, DOUBLE, (classes + 1, _schema.CLASS_STATS))
    require(input.dim() == 2 and input.shape[1] == columns, "input has an unexpected shape")
    require(classes > 0 or input.shape[0] == 0, "log_activation must not be empty")


def check_rows(input: Tensor, rows: Rows) -> None:
    count, upstream = input.shape[0], rows.upstream
    check("rows", rows.stats, input, DOUBLE, (count, _schema.ROW_STATS))
    check("coefficients", rows.coefficients, input, DOUBLE, (count, _schema.COEFFICIENTS))
    if upstream is not None:
        check("upstream", upstream, input, ARITHMETIC, (count,) if upstream.dim() else (), strided=True)


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """What device assertions do on a device, for the interpreter, which has none."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: value {int(target[row])} at row {row} is out of range, expected a class in [0, {classes}) or "
            f"ignore_index ({ignore_index})"
        )
