"""How kernels divide their work, and numbers and strides as they take them."""

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_ON_CHIP = 16384  # columns; longer rows are read in stretches, once for every pass over them
LARGEST_CHUNKS = 128  # of rows, for sums over the batch

HALF = (torch.bfloat16, torch.float16)


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
    double, half = dtype == torch.float64, dtype in HALF
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


def rows_of_chunk(rows: int) -> int:
    """How many rows of a batch are summed together: LARGEST_CHUNKS are then enough."""
    return max(64, -(-rows // LARGEST_CHUNKS))


def power_of_two(n: int, largest: int) -> int:
    return int(min(largest, max(16, 1 << (n - 1).bit_length())))


def bits(value: float) -> int:
    """The bits of a double, which Triton takes where it would round a float to float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def strides_of(matrix: Tensor) -> dict[str, Any]:
    """Strides of a matrix by the names that kernels have for them: between rows in units of ALIGN elements."""
    row, column = matrix.stride()
    if column != 1 and matrix.shape[1] > 1:
        return {"unit_stride": row, "column_stride": column, "ALIGN": 1, "CONTIGUOUS": False}
    align = 16
    while row % align:
        align //= 2
    return {"unit_stride": row // align, "column_stride": 1, "ALIGN": align, "CONTIGUOUS": True}
