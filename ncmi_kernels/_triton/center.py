"""The running centre, from the column sums of a batch; and what its rows weigh together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch
from ncmi_kernels._triton.checks import ARITHMETIC, INT64, check, check_batch, require
from ncmi_kernels._triton.elements import LAST, PARTIAL, WHOLE, checked, double, load_features
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import LARGEST_CHUNKS, bits, power_of_two, rows_of_chunk, strides_of

LARGEST_WHOLE_CENTER = 65536  # chunks * columns up to which one program moves the centre


@triton.jit(
    do_not_specialize=["unit_stride", "column_stride", "target_stride", "ignore_index", "classes", "B", "chunk_rows"],
    debug=True,
)
def column_sums_kernel(
    input, target, weight, sums, counts, weight_sums, unit_stride, column_stride, target_stride, ignore_index, classes,
    B, chunk_rows, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, WITH_SUMS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of rows that count: column sums to `sums` [chunks, M], how many, and the sum of their weights."""
    chunk = tl.program_id(0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    UNROLL: tl.constexpr = 4  # rows that are added before they go to a double
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    count = tl.full([ROWS], 0.0, tl.float64)
    weights = tl.full([ROWS], 0.0, tl.float64)
    first = chunk.to(tl.int64) * chunk_rows
    last = tl.minimum(first + chunk_rows, B)
    for begin in range(0, chunk_rows, ROWS * UNROLL):
        partial = tl.full([ROWS, COLUMNS], 0.0, dtype)
        for step in tl.static_range(UNROLL):
            row = first + begin + step * ROWS + tl.arange(0, ROWS)
            y, live, wrong = checked(target, row, target_stride, ignore_index, classes, last)
            if WITH_SUMS:
                partial += load_features(
                    input, None, row, live, 0, k, k < M, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, False
                )
            tl.device_assert(wrong == 0, "target: out of range, expected a class in [0, C) or ignore_index")
            counted = tl.where(live, 1.0, 0.0).to(tl.float64)
            count += counted
            if WITH_WEIGHTS:
                if weight is not None:
                    weights += tl.load(weight + y, mask=live, other=0.0).to(tl.float64)
                else:
                    weights += counted
        total += partial.to(tl.float64)
    if WITH_SUMS:
        tl.store(sums + chunk.to(tl.int64) * M + k, tl.sum(total, axis=0), mask=k < M)
    if tl.program_id(1) == 0:
        tl.store(counts + chunk, tl.sum(count, axis=0))
        if WITH_WEIGHTS:
            tl.store(weight_sums + chunk, tl.sum(weights, axis=0))


def column_sums(
    batch: Batch, classes: int, weight: Tensor | None, with_sums: bool, with_weights: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """By chunk of rows, float64: column sums [chunks, M], how many rows count [chunks], the sum of their weights."""
    input, target, _, ignore_index = batch
    rows, columns = input.shape
    chunk_rows = rows_of_chunk(rows)
    chunks = max(1, -(-rows // chunk_rows))
    sums = input.new_empty((chunks, columns), dtype=torch.float64) if with_sums else None
    counts = input.new_empty((chunks,), dtype=torch.float64)
    weight_sums = input.new_empty((chunks,), dtype=torch.float64) if with_weights else None
    width = power_of_two(columns, 256)
    launches.launch(
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


@triton.jit
def _moved(sums, center, k, chunks, M, count, keep, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the moved centre in its dtype; and as it was."""
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & (k < M)[None, :]
        total += tl.load(sums + (chunk.to(tl.int64) * M)[:, None] + k[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, axis=0) / count
    before = tl.load(center + k, mask=k < M, other=0.0)
    moved = tl.where(keep == 0.0, mean, keep * before.to(tl.float64) + (1.0 - keep) * mean)
    return moved.to(center.dtype.element_ty), before


@triton.jit(do_not_specialize=["chunks", "count_chunks", "momentum", "tiles"])
def move_center_kernel(
    sums, counts, center, batches, copy, moved_center, moved_batches, wrongs, chunks, count_chunks, momentum, tiles, M,
    STAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`center` [M] moved by the column sums [chunks, M], to `copy` [M], and `batches`, how often, to `moved_batches`.

    And, where there is one, to `moved_center`; that and `moved_batches` may be `center` and `batches` themselves. A
    batch without rows says nothing, and one NaN, or a mean too large, must not stay in the centre for good: then both
    are as before. STAGE: WHOLE, one program does it all; else each
    has COLUMNS columns, which PARTIAL leaves in `copy` and whether any is not finite in `wrongs` [tiles], and LAST
    makes final.
    """
    start = tl.program_id(0) * COLUMNS
    end = M if STAGE == WHOLE else start + COLUMNS
    # Nobody reads what LAST changes: `batches` and the centre are read by the stage before.
    tracked = tl.load(batches)
    if STAGE == LAST:
        wrong = tl.full([COLUMNS], 0, tl.int32)
        for first in range(0, tiles, COLUMNS):
            tile = first + tl.arange(0, COLUMNS)
            wrong |= tl.load(wrongs + tile, mask=tile < tiles, other=0)
        finite = tl.sum(wrong, axis=0) == 0
        k = start + tl.arange(0, COLUMNS)
        moved = tl.load(copy + k, mask=k < M, other=0.0)
        before = tl.load(center + k, mask=k < M, other=0.0)
        moved = tl.where(finite, moved, before)
        if moved_center is not None:
            tl.store(moved_center + k, moved, mask=k < M)
        tl.store(copy + k, moved, mask=k < M)
    else:
        chunk = tl.arange(0, CHUNKS)
        count = tl.sum(tl.load(counts + chunk, mask=chunk < count_chunks, other=0.0), axis=0)
        keep = tl.where(tracked == 0, 0.0, double(momentum))
        wrong = tl.full([COLUMNS], 0, tl.int32)
        for at in range(start, end, COLUMNS):
            k = at + tl.arange(0, COLUMNS)
            moved, before = _moved(sums, center, k, chunks, M, count, keep, ROWS, COLUMNS)
            wrong |= ((k < M) & ((tl.abs(moved) < float("inf")) == 0)).to(tl.int32)
            if STAGE == PARTIAL:
                tl.store(copy + k, moved, mask=k < M)
        finite = (tl.sum(wrong, axis=0) == 0) & (count > 0.0)
        if STAGE == PARTIAL:
            tl.store(wrongs + tl.program_id(0), tl.where(finite, 0, 1))
        else:
            for at in range(start, end, COLUMNS):
                k = at + tl.arange(0, COLUMNS)
                moved, before = _moved(sums, center, k, chunks, M, count, keep, ROWS, COLUMNS)
                moved = tl.where(finite, moved, before)
                if moved_center is not None:
                    tl.store(moved_center + k, moved, mask=k < M)
                tl.store(copy + k, moved, mask=k < M)
    if STAGE != PARTIAL and tl.program_id(0) == 0:
        tl.store(moved_batches, tracked + tl.where(finite & (tracked < 2**63 - 1), 1, 0))


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
        launches.launch(
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


@operator
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
    require(center.dtype in ARITHMETIC, "center must be float32, float64")
    batch = Batch(input, target, center, ignore_index)
    check_batch(batch, center.dtype, num_classes)
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    with launches.on(input):
        sums, counts, _ = column_sums(batch, num_classes, None, True, False)
        assert sums is not None
        return move_center(sums, counts, center, num_batches_tracked, momentum, True)[0]
