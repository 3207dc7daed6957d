"""What goes together in the arguments of operators. Shapes: B rows, M columns, C classes."""

from typing import Any, NamedTuple

from torch import Tensor

from ncmi_kernels._schema import SGD


class Batch(NamedTuple):
    """The rows and their classes."""

    input: Tensor  # [B, M]
    target: Tensor  # [B]
    center: Tensor | None  # [M]
    ignore_index: int


class Reducing(NamedTuple):
    """How terms become a loss."""

    weight: Tensor | None  # [C]
    batch_ratio: bool
    reduction: Any  # an index into REDUCTIONS, or TERMS
    eps: float
    sharpness: float  # of the soft margin; 0: none
    centroid_to_sample: bool
    focus: bool = False
    totals: Tensor | None = None  # [4] in the place of the sums over the rows


class RowTerms(NamedTuple):
    """What the forward pass has of the rows."""

    stats: Tensor  # [B, 8]
    sums: Tensor  # [4, B] that the terms are made of
    given: bool  # they are the terms themselves, A and G in the first two rows


class Reduced(NamedTuple):
    """What they come to; None is not written."""

    loss: Tensor  # [], [B], or for TERMS [2, B]
    coefficients: Tensor | None = None  # [B, 4]
    means: Tensor | None = None  # [2]; None for TERMS alone
    sums: Tensor | None = None  # [4]


class Moving(NamedTuple):
    """A running centre and how often it was moved, and what both are to be."""

    center: Tensor  # [M]
    batches: Tensor  # []
    moved_center: Tensor
    moved_batches: Tensor


class Rows(NamedTuple):
    """What a backward pass has of the rows."""

    stats: Tensor  # [B, 8]
    coefficients: Tensor  # [B, 4]
    upstream: Tensor | None  # [] or [B], which multiplies the coefficients

    @property
    def upstream_stride(self) -> int:
        return self.upstream.stride(0) if self.upstream is not None and self.upstream.dim() else 0


class OfAllRows(NamedTuple):
    """What stands in for the sums over all rows in the gradient of the centroids; None where these are formed."""

    totals: Tensor | None = None  # [M + 1], the same for each class
    class_weights: Tensor | None = None  # [C, 2] and
    weighted: Tensor | None = None  # [C, M], of each class


class Step(NamedTuple):
    """A step of the centroids by their gradient."""

    momentum_buffer: Tensor | None  # [C, M]
    sgd: SGD
