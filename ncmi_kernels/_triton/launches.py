"""What operators launch: of each kernel the tile, the grid, and its arguments.

Shapes: B rows, M columns, C classes.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._schema import SGD, Table
from ncmi_kernels._triton.arguments import Batch, Features, Moving, Reduced, Reducing, Rows
from ncmi_kernels._triton.batch import (
    LAST,
    PARTIAL,
    WHOLE,
    column_sums_kernel,
    finish_kernel,
    fold_kernel,
    move_center_kernel,
    scale_kernel,
)
from ncmi_kernels._triton.centroids import (
    centroid_columns_kernel,
    centroid_constants_kernel,
    centroid_grad_kernel,
    centroid_rows_kernel,
    class_sums_kernel,
)
from ncmi_kernels._triton.elements import NEAR, NSF, SHIFTED, SOFTMAX
from ncmi_kernels._triton.input_grad import input_grad_kernel
from ncmi_kernels._triton.rows import terms_kernel
from ncmi_kernels._triton.tiles import HALF, bits, power_of_two, row_tile, strides_of

RESCUE_COLUMNS = 128  # at once, where a row is read again because its squares overflowed
FINISH_BLOCK = 512  # rows a program of finish_kernel has
LARGEST_WHOLE = 8192  # rows up to which each of its programs sums over the whole batch itself
LARGEST_CHUNKS = 128  # of rows, for sums over the batch
SMALLEST_CHUNK = 64  # rows
LARGEST_WHOLE_CENTER = 65536  # chunks * columns up to which one program moves the centre

# Of all kernels. Fusing multiplications with additions is no longer the default from Triton 3.10 on.
COMPILING = {"sanitize_overflow": False, "enable_fp_fusion": True}

_TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, debug: bool = False, **arguments: Any) -> None:
    """Every launch goes through here, the kernel's arguments by name."""
    # In order for Triton, which takes 3 us longer to bind them by name.
    kernel[grid](*map(arguments.__getitem__, kernel.arg_names), num_warps=warps, debug=debug, **COMPILING)
    # Triton has compiled, and would from now on compare all constants that the kernel reads: 0.4 us each, every launch.
    kernel.used_global_vals = {}


def centroid_stats(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool, table: Table) -> None:
    """What centroid_stats gives of the logits [C, M], into this table."""
    log_activation, activation, reference, norms = table
    classes, columns = centroid_logits.shape
    workspace = norms.new_empty((2, columns))
    residual, weighted = workspace[0], workspace[1]
    tile = row_tile(columns, centroid_logits.dtype, True)
    launch(
        centroid_rows_kernel,
        (-(-classes // tile.rows),),
        logits=centroid_logits,
        log_activation=log_activation,
        activation=activation,
        norms=norms,
        **strides_of(centroid_logits),
        classes=classes,
        M=columns,
        KIND=SOFTMAX if softmax else SHIFTED,
        WITH_ACTIVATION=centroid_to_sample,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        VEC=tile.vec,
        warps=tile.warps,
    )
    launch(
        centroid_columns_kernel,
        (-(-columns // 16),),
        log_activation=log_activation,
        activation=activation,
        norms=norms,
        reference=reference,
        residual=residual,
        weighted=weighted,
        classes=classes,
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        ROWS=128,
        COLUMNS=16,
    )
    launch(
        centroid_constants_kernel,
        (1,),
        reference=reference,
        residual=residual,
        weighted=weighted,
        norms=norms,
        classes=classes,
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        COLUMNS=512,
    )


def terms(
    batch: Batch,
    table: Table,
    features: Features,
    reducing: Reducing | None = None,
    weight_sums: Tensor | None = None,
    coefficients: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows' statistics [B, 7] and sums [4, B], float64, as terms_kernel leaves them.

    With `grad` [B, M], terms in the place of sums, and the gradient of the loss that `reducing` tells of in the same
    pass, with its `coefficients` [B, 4].
    """
    input, target, center, ignore_index = batch
    log_activation, activation, reference, norms = table
    temperature, l2_normalize, softmax, centroid_to_sample = features
    rows, columns = input.shape
    stats = norms.new_empty((rows, _schema.ROW_STATS))
    sums = norms.new_empty((4, rows))
    if rows == 0:
        return stats, sums
    double = log_activation.dtype is torch.float64
    # Of a vector of length one over the temperature: |f| <= 1 / temperature.
    reach = 1.0 / temperature if l2_normalize else float("inf")
    kind = SOFTMAX if softmax else NEAR if reach <= 1.0 and not double else NSF
    dtype = log_activation.dtype if double else input.dtype
    tile = row_tile(columns, dtype, grad is not None, centroid_to_sample, kind == NEAR)
    launch(
        terms_kernel,
        (-(-rows // tile.rows),),
        input=input,
        target=target,
        center=center,
        log_activation=log_activation,
        activation=activation,
        reference=reference,
        norms=norms,
        weight=None if reducing is None else reducing.weight,
        weight_sums=weight_sums,
        rows=stats,
        coefficients=coefficients,
        sums=sums,
        grad=grad,
        **strides_of(input),
        target_stride=target.stride(0),
        inverse_temperature_bits=bits(1.0 / temperature),
        eps=bits(0.0 if reducing is None else reducing.eps),
        ignore_index=ignore_index,
        classes=log_activation.shape[0],
        B=rows,
        columns=columns,
        chunks=0 if weight_sums is None else weight_sums.shape[0],
        M=columns,
        L2=l2_normalize,
        KIND=kind,
        # Every f under -2 takes a length of twice the square root of M; a little less, for rounding.
        MAY_SHIFT=kind == NSF and reach > 1.99 * columns**0.5,
        FAST=input.dtype in HALF,
        RESCUE=min(RESCUE_COLUMNS, tile.columns) if l2_normalize and input.dtype is not torch.float16 else 0,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        WITH_GRAD=grad is not None,
        NORMALIZED=weight_sums is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STRETCHES=tile.stretches,
        VEC=tile.vec,
        CHUNKS=2 * LARGEST_CHUNKS,  # not RESCUE_COLUMNS: an index of both would be kept in between, and spill
        KEEP=tile.keep,
        warps=tile.warps,
    )
    return stats, sums


def finish(
    target: Tensor,
    ignore_index: int,
    norms: Tensor,
    reducing: Reducing,
    terms: Tensor,
    stats: Tensor,
    reduced: Reduced,
    given: bool = False,
    totals: Tensor | None = None,
    moving: Moving | None = None,
) -> None:
    """From the sums of the rows, or `given` their terms, to what is asked for.

    The last launch of a call: `moving` is done here.
    """
    weight, batch_ratio, reduction, eps, centroid_to_sample, focus = reducing
    loss, coefficients, means, sums = reduced
    center, batches, moved_center, moved_batches = moving or (None, None, None, None)
    rows = target.shape[0]
    tiles = max(1, -(-rows // FINISH_BLOCK))
    whole = rows <= LARGEST_WHOLE or means is None or totals is not None
    partials = None if whole else norms.new_empty((4, tiles))
    for stage in (WHOLE,) if whole else (PARTIAL, LAST):
        launch(
            finish_kernel,
            (tiles,),
            target=target,
            norms=norms,
            weight=weight,
            terms=terms,
            totals=totals,
            partials=partials,
            rows=stats,
            coefficients=coefficients,
            loss=loss,
            means=means,
            sums=sums,
            center=center,
            batches=batches,
            moved_center=moved_center,
            moved_batches=moved_batches,
            target_stride=target.stride(0),
            eps=bits(eps),
            ignore_index=ignore_index,
            classes=norms.shape[0] - 1,
            B=rows,
            tiles=tiles,
            columns=0 if center is None else center.shape[0],
            CENTROID_TO_SAMPLE=centroid_to_sample,
            FOCUS=focus,
            BATCH_RATIO=batch_ratio,
            REDUCTION=reduction,
            GIVEN=given,
            STAGE=stage,
            BLOCK=FINISH_BLOCK,
            debug=True,
        )


def column_sums(
    batch: Batch, classes: int, weight: Tensor | None, with_sums: bool, with_weights: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """By chunk of rows, float64: column sums [chunks, M], how many rows count [chunks], the sum of their weights."""
    input, target, _, ignore_index = batch
    rows, columns = input.shape
    chunk_rows = max(SMALLEST_CHUNK, -(-rows // LARGEST_CHUNKS))
    chunks = max(1, -(-rows // chunk_rows))
    sums = input.new_empty((chunks, columns), dtype=torch.float64) if with_sums else None
    counts = input.new_empty((chunks,), dtype=torch.float64)
    weight_sums = input.new_empty((chunks,), dtype=torch.float64) if with_weights else None
    width = power_of_two(columns, 256)
    launch(
        column_sums_kernel,
        (chunks, -(-columns // width) if with_sums else 1),
        input=input,
        target=target,
        weight=weight,
        sums=sums,
        counts=counts,
        weight_sums=weight_sums,
        **strides_of(input),
        target_stride=target.stride(0),
        ignore_index=ignore_index,
        classes=classes,
        B=rows,
        chunk_rows=chunk_rows,
        M=columns,
        WITH_SUMS=with_sums,
        WITH_WEIGHTS=with_weights,
        ROWS=2048 // width if width > 32 else 64,
        COLUMNS=width,
        debug=True,
    )
    return sums, counts, weight_sums


def move_center(
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
    for stage in (WHOLE,) if whole else (PARTIAL, LAST):
        launch(
            move_center_kernel,
            (tiles,),
            sums=sums,
            counts=counts,
            center=center,
            batches=batches,
            copy=copy,
            moved_center=center if in_place else None,
            moved_batches=moved_batches,
            wrongs=wrongs,
            chunks=chunks,
            count_chunks=counts.shape[0],
            momentum=bits(momentum),
            tiles=tiles,
            M=columns,
            STAGE=stage,
            ROWS=rows,
            COLUMNS=width,
            CHUNKS=LARGEST_CHUNKS,
            warps=8 if whole else 4,
        )
    return copy, moved_batches


def scale(grad: Tensor, upstream: Tensor) -> None:
    """`grad` [B, M] times `upstream` [], in place."""
    size = grad.numel()
    launch(scale_kernel, (-(-size // 1024),), grad=grad, upstream=upstream, size=size, BLOCK=1024)


def input_grad(
    batch: Batch, table: Table, rows: Rows, centroid_to_sample: bool, row_reference: Tensor | None, grad: Tensor
) -> None:
    """d loss / d input to `grad` [B, M]."""
    input, target, center, ignore_index = batch
    count, columns = input.shape
    tile = row_tile(columns, input.dtype, True, centroid_to_sample)
    launch(
        input_grad_kernel,
        (-(-count // tile.rows),),
        input=input,
        target=target,
        center=center,
        log_activation=table.log_activation,
        activation=table.activation,
        reference=table.reference,
        row_reference=row_reference,
        norms=table.norms,
        rows=rows.stats,
        coefficients=rows.coefficients,
        upstream=rows.upstream,
        grad=grad,
        **strides_of(input),
        target_stride=target.stride(0),
        upstream_stride=rows.upstream_stride,
        ignore_index=ignore_index,
        classes=table.log_activation.shape[0],
        B=count,
        M=columns,
        FAST=input.dtype in HALF,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STRETCHES=tile.stretches,
        KEEP=tile.keep,
        warps=tile.warps,
    )


def class_sums(
    batch: Batch,
    rows: Rows,
    order: Tensor,
    begin: Tensor,
    dtype: torch.dtype,
    centroid_to_sample: bool,
    with_own: bool,
) -> tuple[Tensor, Tensor]:
    """Sums by class of the rows in `order`, float64: of own p and of other p or other log a [2, C, M].

    And of own and other [2, C]. Without `with_own` only the second of each.
    """
    input, center = batch.input, batch.center
    classes, columns = begin.shape[0] - 1, input.shape[1]
    sums = rows.stats.new_empty((2, classes, columns))
    factor_sums = rows.stats.new_empty((2, classes))
    width = power_of_two(columns, 256)
    launch(
        class_sums_kernel,
        (classes, -(-columns // width)),
        input=input,
        center=center,
        rows=rows.stats,
        coefficients=rows.coefficients,
        upstream=rows.upstream,
        order=order,
        class_begin=begin,
        own_sums=sums[0],
        all_sums=sums[1],
        factor_sums=factor_sums,
        **strides_of(input),
        upstream_stride=rows.upstream_stride,
        classes=classes,
        M=columns,
        DTYPE=_TL[dtype],
        FAST=input.dtype in HALF,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        WITH_OWN=with_own,
        ROWS=4,
        COLUMNS=width,
    )
    return sums, factor_sums


def fold(sums: Tensor, totals: Tensor) -> None:
    """To `totals` [M, or more] the sums of `sums` [C, M] over C."""
    chunks, columns = sums.shape
    launch(fold_kernel, (-(-columns // 64),), sums=sums, folded=totals, chunks=chunks, M=columns, ROWS=32, COLUMNS=64)


def centroid_grad(
    batch: Batch,
    centroid_logits: Tensor,
    norms: Tensor,
    rows: Rows,
    centroid_to_sample: bool,
    totals: Tensor | None = None,
    grad: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    sgd: SGD | None = None,
) -> None:
    """The gradient of the centroids to `grad` [C, M]; without it they take a step by it."""
    target = batch.target
    classes, columns = centroid_logits.shape
    lr, momentum, weight_decay, nesterov = sgd or (0.0, 0.0, 0.0, False)
    # Rows by class in the order of the batch, ignored ones last. No count is read on the host.
    of_class = torch.where(target == batch.ignore_index, classes, target)
    of_class, order = torch.sort(of_class, stable=True)
    begin = torch.searchsorted(of_class, torch.arange(classes + 1, device=target.device))
    sums, factor_sums = class_sums(batch, rows, order, begin, centroid_logits.dtype, centroid_to_sample, True)
    folded = totals
    if folded is None:
        folded = norms.new_empty((columns,))
        fold(sums[1], folded)
    launch(
        centroid_grad_kernel,
        (classes,),
        logits=centroid_logits,
        norms=norms,
        own_sums=sums[0],
        all_sums=sums[1],
        factor_sums=factor_sums,
        totals=folded,
        grad=grad,
        momentum_buffer=momentum_buffer,
        class_begin=begin,
        **strides_of(centroid_logits),
        classes=classes,
        lr=bits(lr),
        momentum=bits(momentum),
        weight_decay=bits(weight_decay),
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        GIVEN=totals is not None,
        NESTEROV=nesterov,
        COLUMNS=power_of_two(columns, 2048),
        CLASSES=1024,
    )
