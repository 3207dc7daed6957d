"""The operators on Triton: outputs allocated, kernels launched.

Called directly in eager mode; under torch.compile through the dispatcher, as opaque operators of a namespace of their
own. Shapes: B rows, M columns, C classes.
"""

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.library import Library

from ncmi_kernels import _backends, _schema
from ncmi_kernels._options import REDUCTIONS
from ncmi_kernels._triton import kernels

NAMESPACE = "ncmi_kernels_triton"
INTERPRETED = _backends.triton_interprets()

LARGEST_ON_CHIP = 16384  # columns; longer rows are read in stretches, once for every pass over them
RESCUE_COLUMNS = 128  # at once, where a row is read again because its squares overflowed
FINISH_BLOCK = 512  # rows a program of finish_kernel has
LARGEST_WHOLE = 8192  # rows up to which each of its programs sums over the whole batch itself
LARGEST_CHUNKS = 128  # of rows, for sums over the batch
SMALLEST_CHUNK = 64  # rows
LARGEST_WHOLE_CENTER = 65536  # chunks * columns up to which one program moves the centre

# Of all kernels. Fusing multiplications with additions is no longer the default from Triton 3.10 on.
COMPILING = {"sanitize_overflow": False, "enable_fp_fusion": True}

_HALF = (torch.bfloat16, torch.float16)
_TL = {torch.float32: tl.float32, torch.float64: tl.float64}
_DOUBLE, _INT64, _ARITHMETIC = (torch.float64,), (torch.int64,), tuple(_TL)


class Tile(NamedTuple):
    """What a program works on."""

    rows: int
    columns: int  # at once
    stretches: int  # of that many columns in a row held on chip; 0: the row is read in a loop
    keep: bool  # the gradient of a row on chip too; else it is formed twice
    vec: int  # neighbours that a sum adds before it goes to float64
    warps: int


@lru_cache(maxsize=1024)
def row_tile(
    columns: int, dtype: torch.dtype, with_grad: bool, centroid_to_sample: bool = False, near: bool = False
) -> Tile:
    """For kernels by row of an input [B, columns].

    A thread has 64 elements, so that sums across threads and what is done once for a row are little beside the work on
    elements; half as many where a gradient is held on chip as well, or features are not known to be `near`, and of
    float64 a quarter. Short rows share a program.
    """
    double, half = dtype == torch.float64, dtype in _HALF
    vec = 8 if half else 4
    # Past these, registers spill.
    on_chip = LARGEST_ON_CHIP // (4 if double else 2 if with_grad and centroid_to_sample else 1)
    if columns > on_chip:
        warps = 8 if half and with_grad else 16
        return Tile(1, 256 * warps, 0, False, vec, warps)
    width = max(16, 1 << (columns - 1).bit_length())
    of_warp = 512 if double else 1024 if with_grad or not near else 2048
    warps = max(1, width // of_warp)
    keep = width < LARGEST_ON_CHIP
    at_once = (256 if keep or half else 128) * warps  # 8 elements a thread, one or two loads
    rows = min(max(1, of_warp * warps // width), at_once // 16)
    stretch = min(width, at_once // rows)
    return Tile(rows, stretch, -(-columns // stretch), keep, vec, warps)


def _power_of_two(n: int, largest: int) -> int:
    return int(min(largest, max(16, 1 << (n - 1).bit_length())))


def _bits(value: float) -> int:
    """The bits of a double, which Triton takes where it would round a float to float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


class Strides(NamedTuple):
    """Strides of a matrix as kernels take them."""

    units: int  # between rows, in units of `align` elements
    column: int
    align: int
    contiguous: bool


def _strides(matrix: Tensor) -> Strides:
    row, column = matrix.stride()
    if column != 1 and matrix.shape[1] > 1:
        return Strides(row, column, 1, False)
    align = 16
    while row % align:
        align //= 2
    return Strides(row // align, 1, align, True)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, **options: Any) -> None:
    """Every launch goes through here."""
    kernel[grid](*args, num_warps=warps, **COMPILING, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Checks: what csrc checks of tensors, before anything is launched or moved
# ----------------------------------------------------------------------------------------------------------------------


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"ncmi_kernels: {what}")


def _check(
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


def _matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = (*_ARITHMETIC, *_HALF)) -> tuple[int, int]:
    """The shape of a matrix of any strides, with columns."""
    _require(tensor.dtype in dtypes, f"{name} must be " + ", ".join(str(dtype)[6:] for dtype in dtypes))
    _require(tensor.dim() == 2, f"{name} must have 2 dimensions")
    _require(tensor.shape[1] > 0, f"{name} must have columns")
    _check_memory(name, tensor)
    return tensor.shape[0], tensor.shape[1]


def _check_batch(
    input: Tensor, target: Tensor, center: Tensor | None, dtype: torch.dtype, classes: int, ignore_index: int
) -> tuple[int, int]:
    """The shape of the input; `dtype` is that of the arithmetic."""
    rows, columns = _matrix("input", input)
    _require(input.dtype is not torch.float64 or dtype is torch.float64, "float64 input needs float64 centroid_logits")
    _check("target", target, input, _INT64, (rows,), strided=True)
    _check("center", center, input, (dtype,), (columns,))
    _check_targets(target, ignore_index, classes)
    return rows, columns


def _check_centroids(
    input: Tensor,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    centroid_to_sample: bool,
) -> None:
    """The statistics of C classes for an input [B, M]; C may be 0 where B is."""
    classes, columns = _matrix("log_activation", log_activation, _ARITHMETIC)
    dtype = (log_activation.dtype,)
    _check("log_activation", log_activation, input, dtype, (classes, columns))
    _check("activation", activation, input, dtype, (classes if centroid_to_sample else 0, columns))
    _check("reference", reference, input, dtype, (2, columns))
    _check("norms", norms, input, _DOUBLE, (classes + 1, _schema.CLASS_STATS))
    _require(input.dim() == 2 and input.shape[1] == columns, "input has an unexpected shape")
    _require(classes > 0 or input.shape[0] == 0, "log_activation must not be empty")


def _check_rows(input: Tensor, rows: Tensor, upstream: Tensor | None) -> None:
    count = input.shape[0]
    _check("rows", rows, input, _DOUBLE, (count, _schema.ROW_STATS))
    if upstream is not None:
        _check("upstream", upstream, input, _ARITHMETIC, (count,) if upstream.dim() else (), strided=True)


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    """What device assertions do on a device, for the interpreter, which has none."""
    if not INTERPRETED:
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: value {int(target[row])} at row {row} is out of range, expected a class in [0, {classes}) or "
            f"ignore_index ({ignore_index})"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------------------------------


def _write_stats(
    centroid_logits: Tensor,
    softmax: bool,
    centroid_to_sample: bool,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
) -> None:
    """What centroid_stats gives of the logits [C, M], into these tensors."""
    classes, columns = centroid_logits.shape
    workspace = norms.new_empty((2, columns))
    residual, weighted = workspace[0], workspace[1]
    tile = row_tile(columns, centroid_logits.dtype, True)
    strides = _strides(centroid_logits)
    launch(
        kernels.centroid_rows_kernel,
        (-(-classes // tile.rows),),
        centroid_logits,
        log_activation,
        activation,
        norms,
        strides.units,
        strides.column,
        classes,
        columns,
        strides.align,
        strides.contiguous,
        kernels.SOFTMAX if softmax else kernels.SHIFTED,
        centroid_to_sample,
        tile.rows,
        tile.columns,
        tile.vec,
        warps=tile.warps,
    )
    launch(
        kernels.centroid_columns_kernel,
        (-(-columns // 16),),
        log_activation,
        activation,
        norms,
        reference,
        residual,
        weighted,
        classes,
        columns,
        centroid_to_sample,
        128,
        16,
    )
    launch(
        kernels.centroid_constants_kernel,
        (1,),
        reference,
        residual,
        weighted,
        norms,
        classes,
        columns,
        centroid_to_sample,
        512,
    )


def centroid_stats(
    centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [C, M] to log_activation [C, M], activation [C or 0, M], reference [2, M], norms [C + 1, 8] float64."""
    classes, columns = _matrix("centroid_logits", centroid_logits, _ARITHMETIC)
    _require(classes > 0, "centroid_logits must not be empty")
    log_activation = centroid_logits.new_empty((classes, columns))
    activation = centroid_logits.new_empty((classes if centroid_to_sample else 0, columns))
    reference = centroid_logits.new_empty((2, columns))
    norms = centroid_logits.new_empty((classes + 1, _schema.CLASS_STATS), dtype=torch.float64)
    with _on(centroid_logits):
        _write_stats(centroid_logits, softmax, centroid_to_sample, log_activation, activation, reference, norms)
    return log_activation, activation, reference, norms


def _launch_rows(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    temperature: float,
    l2_normalize: bool,
    softmax: bool,
    centroid_to_sample: bool,
    ignore_index: int,
    weight: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows' statistics [B, 9] and sums [4, B], float64, as terms_kernel leaves them."""
    rows, columns = input.shape
    classes = log_activation.shape[0]
    stats = norms.new_empty((rows, _schema.ROW_STATS))
    sums = norms.new_empty((4, rows))
    if rows == 0:
        return stats, sums
    double = log_activation.dtype is torch.float64
    # Of a vector of length one over the temperature: |f| <= 1 / temperature.
    reach = 1.0 / temperature if l2_normalize else float("inf")
    kind = kernels.SOFTMAX if softmax else kernels.NEAR if reach <= 1.0 and not double else kernels.NSF
    dtype = log_activation.dtype if double else input.dtype
    tile = row_tile(columns, dtype, grad is not None, centroid_to_sample, kind == kernels.NEAR)
    strides = _strides(input)
    launch(
        kernels.terms_kernel,
        (-(-rows // tile.rows),),
        input,
        target,
        center,
        log_activation,
        activation,
        reference,
        norms,
        weight if grad is not None else None,
        weight_sums,
        stats,
        sums,
        grad,
        strides.units,
        strides.column,
        target.stride(0),
        _bits(1.0 / temperature),
        _bits(eps),
        ignore_index,
        classes,
        rows,
        columns,
        0 if weight_sums is None else weight_sums.shape[0],
        columns,
        strides.align,
        strides.contiguous,
        l2_normalize,
        kind,
        # Every f under -2 takes a length of twice the square root of M; a little less, for rounding.
        kind == kernels.NSF and reach > 1.99 * columns**0.5,
        input.dtype in _HALF,
        min(RESCUE_COLUMNS, tile.columns) if l2_normalize and input.dtype is not torch.float16 else 0,
        centroid_to_sample,
        grad is not None,
        weight_sums is not None,
        tile.rows,
        tile.columns,
        tile.stretches,
        tile.vec,
        2 * LARGEST_CHUNKS,  # not RESCUE_COLUMNS: an index of both would be kept in between, and spill
        tile.keep,
        warps=tile.warps,
    )
    return stats, sums


def _finish(
    target: Tensor,
    norms: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    stats: Tensor,
    result: Tensor,
    means: Tensor | None,
    eps: float,
    ignore_index: int,
    classes: int,
    centroid_to_sample: bool,
    batch_ratio: bool,
    reduction: int,
    finished: bool,
    center: Tensor | None = None,
    batches: Tensor | None = None,
    moved: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The last launch of a call: the one that moves `center` and `batches`, to what `moved` holds."""
    rows = target.shape[0]
    tiles = max(1, -(-rows // FINISH_BLOCK))
    whole = rows <= LARGEST_WHOLE or means is None
    partials = None if whole else norms.new_empty((4, tiles))
    for stage in (kernels.WHOLE,) if whole else (kernels.PARTIAL, kernels.LAST):
        launch(
            kernels.finish_kernel,
            (tiles,),
            target,
            norms,
            weight,
            sums,
            partials,
            stats,
            result,
            means,
            center,
            batches,
            *(moved or (None, None)),
            target.stride(0),
            _bits(eps),
            ignore_index,
            classes,
            rows,
            tiles,
            0 if center is None else center.shape[0],
            centroid_to_sample,
            batch_ratio,
            reduction,
            finished,
            stage,
            FINISH_BLOCK,
            debug=True,
        )


REDUCTIONS_AND_TERMS = (*REDUCTIONS, "terms")


def terms(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    temperature: float,
    l2_normalize: bool,
    softmax: bool,
    centroid_to_sample: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Concentration and separation [2, B], and the rows' statistics [B, 9] float64."""
    classes = log_activation.shape[0]
    _check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    _check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    with _on(input):
        result = log_activation.new_empty((2, target.shape[0]))
        stats, sums = _launch_rows(
            input,
            target,
            center,
            log_activation,
            activation,
            reference,
            norms,
            temperature,
            l2_normalize,
            softmax,
            centroid_to_sample,
            ignore_index,
        )
        reduction = REDUCTIONS_AND_TERMS.index("terms")
        _finish(
            target,
            norms,
            None,
            sums,
            stats,
            result,
            None,
            0.0,
            ignore_index,
            classes,
            centroid_to_sample,
            False,
            reduction,
            False,
        )
    return result, stats


def _column_sums(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    with_sums: bool,
    with_weights: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """By chunk of rows, float64: column sums [chunks, M], how many rows count [chunks], the sum of their weights."""
    rows, columns = input.shape
    chunk_rows = max(SMALLEST_CHUNK, -(-rows // LARGEST_CHUNKS))
    chunks = max(1, -(-rows // chunk_rows))
    sums = input.new_empty((chunks, columns), dtype=torch.float64) if with_sums else None
    counts = input.new_empty((chunks,), dtype=torch.float64)
    weight_sums = input.new_empty((chunks,), dtype=torch.float64) if with_weights else None
    width = _power_of_two(columns, 256)
    strides = _strides(input)
    launch(
        kernels.column_sums_kernel,
        (chunks, -(-columns // width) if with_sums else 1),
        input,
        target,
        weight,
        sums,
        counts,
        weight_sums,
        strides.units,
        strides.column,
        target.stride(0),
        ignore_index,
        classes,
        rows,
        chunk_rows,
        columns,
        strides.align,
        strides.contiguous,
        with_sums,
        with_weights,
        2048 // width if width > 32 else 64,
        width,
        debug=True,
    )
    return sums, counts, weight_sums


def _move_center(
    sums: Tensor, counts: Tensor, center: Tensor, batches: Tensor, momentum: float, in_place: bool
) -> tuple[Tensor, Tensor]:
    """The moved centre and how often it was moved, in tensors of their own; with `in_place` also in `center` [M] and,
    the same tensor, `batches` [].
    """  # noqa: D205
    copy = torch.empty_like(center)
    moved_batches = batches if in_place else torch.empty_like(batches)
    chunks, columns = sums.shape
    whole = chunks * columns <= LARGEST_WHOLE_CENTER
    rows, width = (16, 256) if whole else (32, 64)
    tiles = 1 if whole else -(-columns // width)
    wrongs = None if whole else batches.new_empty((tiles,), dtype=torch.int32)
    for stage in (kernels.WHOLE,) if whole else (kernels.PARTIAL, kernels.LAST):
        launch(
            kernels.move_center_kernel,
            (tiles,),
            sums,
            counts,
            center,
            batches,
            copy,
            center if in_place else None,
            moved_batches,
            wrongs,
            chunks,
            counts.shape[0],
            _bits(momentum),
            tiles,
            columns,
            stage,
            rows,
            width,
            LARGEST_CHUNKS,
            warps=8 if whole else 4,
        )
    return copy, moved_batches


def update_center_(
    center: Tensor,
    num_batches_tracked: Tensor,
    input: Tensor,
    target: Tensor,
    momentum: float,
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """Move `center` [M] towards the mean of the rows of `input` [B, M] that count; returns a copy of it."""
    _require(center.dtype in _ARITHMETIC, "center must be float32, float64")
    _check_batch(input, target, center, center.dtype, num_classes, ignore_index)
    _check("num_batches_tracked", num_batches_tracked, input, _INT64, ())
    with _on(input):
        sums, counts, _ = _column_sums(input, target, None, ignore_index, num_classes, True, False)
        assert sums is not None
        return _move_center(sums, counts, center, num_batches_tracked, momentum, True)[0]


def loss(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    running_center: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    weight: Tensor | None,
    temperature: float,
    l2_normalize: bool,
    softmax: bool,
    centroid_to_sample: bool,
    batch_ratio: bool,
    reduction: int,
    eps: float,
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss [] or [B], the rows' statistics [B, 9], the moved centre [M] or [0], d loss / d input or [0], means [2].

    Statistics and means are float64.
    """
    dtype, classes = log_activation.dtype, log_activation.shape[0]
    _check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    rows, columns = _check_batch(
        input, target, center if running_center is None else running_center, dtype, classes, ignore_index
    )
    _check("weight", weight, input, (dtype,), (classes,))
    _check("num_batches_tracked", num_batches_tracked, input, _INT64, ())
    _require(0 <= reduction < len(REDUCTIONS), "unknown reduction")
    scalar, mean = REDUCTIONS[reduction] != "none", REDUCTIONS[reduction] == "mean"
    _require(mean or not batch_ratio, "ratio over the batch needs reduction mean")
    _require(
        (running_center is None) == (num_batches_tracked is None) and (center is None or running_center is None),
        "pass center, or running_center with num_batches_tracked",
    )
    _require(
        not with_grad or (not batch_ratio and scalar and input.dtype is dtype),
        "with_grad needs ratio by sample, a scalar loss, and input in the arithmetic type",
    )
    normalized = with_grad and mean
    with _on(input):
        result = log_activation.new_empty(() if scalar else (rows,))
        means = norms.new_empty((2,))
        nothing = log_activation.new_empty((0,))
        grad = log_activation.new_empty((rows, columns)) if with_grad else None
        weight_sums = moved = None
        if running_center is not None or normalized:
            moving = running_center is not None
            sums, counts, weight_sums = _column_sums(input, target, weight, ignore_index, classes, moving, normalized)
            if running_center is not None:
                assert num_batches_tracked is not None
                assert sums is not None
                # Until the last launch only a copy: a call that fails has moved nothing.
                moved = _move_center(sums, counts, running_center, num_batches_tracked, momentum, False)
                center = moved[0]
        stats, row_sums = _launch_rows(
            input,
            target,
            center,
            log_activation,
            activation,
            reference,
            norms,
            temperature,
            l2_normalize,
            softmax,
            centroid_to_sample,
            ignore_index,
            weight,
            weight_sums,
            eps,
            grad,
        )
        _finish(
            target,
            norms,
            weight,
            row_sums,
            stats,
            result,
            means,
            eps,
            ignore_index,
            classes,
            centroid_to_sample,
            batch_ratio,
            reduction,
            with_grad,
            running_center,
            num_batches_tracked,
            moved,
        )
    return result, stats, nothing if moved is None else moved[0], nothing if grad is None else grad, means


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """`grad` [B, M] times `upstream` [], in place; 0 stays 0."""
    shape = _matrix("grad", grad, _ARITHMETIC) if grad.numel() else tuple(grad.shape)
    _check("grad", grad, grad, _ARITHMETIC, shape)
    _check("upstream", upstream, grad, (grad.dtype,), ())
    size = grad.numel()
    if size == 0:
        return
    with _on(grad):
        launch(kernels.scale_kernel, (-(-size // 1024),), grad, upstream, size, 1024)


def input_grad(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    rows: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
) -> Tensor:
    """d loss / d input [B, M], in the dtype of `input`; `upstream` is None, a scalar or [B]."""
    classes = log_activation.shape[0]
    _check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    count, columns = _check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    _check_rows(input, rows, upstream)
    _require(
        (input.dtype is torch.float64) == (log_activation.dtype is torch.float64),
        "float64 input and float64 centroid_logits go together",
    )
    grad = torch.empty((count, columns), dtype=input.dtype, device=input.device)
    if count == 0:
        return grad
    tile = row_tile(columns, input.dtype, True, centroid_to_sample)
    strides = _strides(input)
    with _on(input):
        launch(
            kernels.input_grad_kernel,
            (-(-count // tile.rows),),
            input,
            target,
            center,
            log_activation,
            activation,
            reference,
            norms,
            rows,
            upstream,
            grad,
            strides.units,
            strides.column,
            target.stride(0),
            upstream.stride(0) if upstream is not None and upstream.dim() == 1 else 0,
            ignore_index,
            classes,
            count,
            columns,
            strides.align,
            strides.contiguous,
            input.dtype in _HALF,
            centroid_to_sample,
            tile.rows,
            tile.columns,
            tile.stretches,
            tile.keep,
            warps=tile.warps,
        )
    return grad


def _class_sums(
    input: Tensor,
    center: Tensor | None,
    norms: Tensor | None,
    rows: Tensor,
    upstream: Tensor | None,
    order: Tensor,
    begin: Tensor,
    dtype: torch.dtype,
    centroid_to_sample: bool,
) -> tuple[Tensor, Tensor]:
    """Sums by class of the rows in `order`, float64: of own_factor p and of beta p or beta log a [2, C, M].

    And of own_factor and beta [2, C]. Without `norms` only the second of each.
    """
    classes, columns = begin.shape[0] - 1, input.shape[1]
    sums = rows.new_empty((2, classes, columns))
    factor_sums = rows.new_empty((2, classes))
    strides = _strides(input)
    width = _power_of_two(columns, 256)
    launch(
        kernels.class_sums_kernel,
        (classes, -(-columns // width)),
        input,
        center,
        norms,
        rows,
        upstream,
        order,
        begin,
        sums[0],
        sums[1],
        factor_sums,
        strides.units,
        strides.column,
        upstream.stride(0) if upstream is not None and upstream.dim() == 1 else 0,
        classes,
        columns,
        strides.align,
        strides.contiguous,
        _TL[dtype],
        input.dtype in _HALF,
        centroid_to_sample,
        norms is not None,
        4,
        width,
    )
    return sums, factor_sums


def _fold(sums: Tensor, totals: Tensor) -> None:
    """To `totals` [M, or more] the sums of `sums` [C, M] over C."""
    chunks, columns = sums.shape
    launch(kernels.fold_kernel, (-(-columns // 64),), sums, totals, chunks, columns, 32, 64)


def _launch_centroid_grad(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    centroid_logits: Tensor,
    norms: Tensor,
    rows: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
    totals: Tensor | None,
    grad: Tensor | None,
    momentum_buffer: Tensor | None = None,
    lr: float = 0.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """The gradient of the centroids to `grad` [C, M]; without it they take a step of SGD by it."""
    classes, columns = centroid_logits.shape
    dtype = centroid_logits.dtype
    # Rows by class in the order of the batch, ignored ones last. No count is read on the host.
    of_class = torch.where(target == ignore_index, classes, target)
    of_class, order = torch.sort(of_class, stable=True)
    begin = torch.searchsorted(of_class, torch.arange(classes + 1, device=target.device))
    of_centroids = _strides(centroid_logits)
    sums, factor_sums = _class_sums(input, center, norms, rows, upstream, order, begin, dtype, centroid_to_sample)
    folded = totals
    if folded is None:
        folded = norms.new_empty((columns,))
        _fold(sums[1], folded)
    launch(
        kernels.centroid_grad_kernel,
        (classes,),
        centroid_logits,
        norms,
        sums[0],
        sums[1],
        factor_sums,
        folded,
        grad,
        momentum_buffer,
        begin,
        of_centroids.units,
        of_centroids.column,
        classes,
        _bits(lr),
        _bits(momentum),
        _bits(weight_decay),
        columns,
        of_centroids.align,
        of_centroids.contiguous,
        centroid_to_sample,
        totals is not None,
        nesterov,
        _power_of_two(columns, 2048),
        1024,
    )


def centroid_grad(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    centroid_logits: Tensor,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    rows: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
    totals: Tensor | None = None,
) -> Tensor:
    """d loss / d centroid_logits [C, M]; `totals` [M + 1] float64 are for the sums over all rows, as class_totals."""
    _check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    classes, columns = log_activation.shape
    _check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    _check_rows(input, rows, upstream)
    _check("centroid_logits", centroid_logits, input, (log_activation.dtype,), (classes, columns), strided=True)
    _check("totals", totals, input, _DOUBLE, (columns + 1,))
    grad = torch.empty((classes, columns), dtype=centroid_logits.dtype, device=centroid_logits.device)
    with _on(input):
        _launch_centroid_grad(
            input,
            target,
            center,
            centroid_logits,
            norms,
            rows,
            upstream,
            centroid_to_sample,
            ignore_index,
            totals,
            grad,
        )
    return grad


def centroid_step_(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    centroid_logits: Tensor,
    momentum_buffer: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    rows: Tensor,
    softmax: bool,
    centroid_to_sample: bool,
    ignore_index: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """A step of SGD on contiguous `centroid_logits` and `momentum_buffer` [C, M]; the statistics follow."""
    _check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    _check_batch(input, target, center, log_activation.dtype, log_activation.shape[0], ignore_index)
    _check_rows(input, rows, None)
    for name, tensor in (("centroid_logits", centroid_logits), ("momentum_buffer", momentum_buffer)):
        _check(name, tensor, input, (log_activation.dtype,), tuple(log_activation.shape))
    with _on(input):
        _launch_centroid_grad(
            input,
            target,
            center,
            centroid_logits,
            norms,
            rows,
            None,
            centroid_to_sample,
            ignore_index,
            None,
            None,
            momentum_buffer,
            lr,
            momentum,
            weight_decay,
            nesterov,
        )
        _write_stats(centroid_logits, softmax, centroid_to_sample, log_activation, activation, reference, norms)


def class_totals(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    rows: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
) -> Tensor:
    """The sums over all rows that each class's gradient has, [M + 1] float64: of beta p or beta log a, and of beta."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    count, columns = _check_batch(input, target, center, dtype, 2**63 - 1, ignore_index)
    _check_rows(input, rows, upstream)
    # Chunks of the rows that count, the others last, for classes.
    ignored, order = torch.sort((target == ignore_index).to(torch.int32), stable=True)
    chunk_rows = max(SMALLEST_CHUNK, -(-count // LARGEST_CHUNKS))
    begin = torch.arange(0, count + chunk_rows, chunk_rows, device=target.device)
    begin = torch.minimum(begin, (ignored == 0).sum())
    totals = rows.new_empty((columns + 1,))
    with _on(input):
        sums, factor_sums = _class_sums(input, center, None, rows, upstream, order, begin, dtype, centroid_to_sample)
        _fold(sums[1], totals)
        totals[columns] = factor_sums[1].sum()
    return totals


# ----------------------------------------------------------------------------------------------------------------------
# Operators for the dispatcher
# ----------------------------------------------------------------------------------------------------------------------

_schema.define(NAMESPACE)
_implementations = Library(NAMESPACE, "IMPL")
for _name in _schema.SCHEMAS:
    _implementations.impl(_name, globals()[_name], "CompositeExplicitAutograd")


def _eager_or_traced(name: str) -> Callable[..., Any]:
    """The function itself, but while torch.compile or torch.export traces: then an operator that they do not open."""
    eager = globals()[name]
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else eager(*args)

    return run


OPERATORS = _schema.Operators(**{name: _eager_or_traced(name) for name in _schema.SCHEMAS})
