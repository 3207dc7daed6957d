"""The way of a batch with `separation_focus`, whose sum over the classes does not factorise: as :mod:`_plain`.

The divergences of all samples and classes are a product of [B, M] and [M, C], as the logits of a linear head are. A
row is compared with a mixture of the centroids, weighed by how near they are, in the place of the mean of all of them:
another product; and so are the sums over the rows that the centroids' gradient takes. None of the three waits for an
upstream gradient. So a forward pass makes them all, by tiles of rows, of which nothing of size [B, C] is left.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops, _plain, reference
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._schema import CLASS_WEIGHTS, SGD


def tile_rows(classes: int) -> int:
    """How many rows go through the products at once.

    [rows, classes] is to stay in cache; but for each tile the centroids are read again, and their sums added to, which
    costs as much as the products of a hundred rows.
    """
    return max(256, (1 << 20) // classes // 64 * 64)


class Table(NamedTuple):
    """:class:`_plain.Table`, and what matrix products take: outputs of the operator focus_table."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [C + 1, 8] float64
    relative: Tensor  # [C, M], log q less what the classes share
    distribution: Tensor  # [C, M] q, or [0, M] for sample_to_centroid
    class_level: Tensor  # [C] float64


def table_of(centroid_logits: Tensor, options: Options, backend: str) -> Table:
    """The table of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    table = _plain.table_of(centroid_logits, options, backend)
    return Table(*table, *_ops.operators(backend).focus_table(*table, options.centroid_to_sample))


class Rows(NamedTuple):
    """What the backward passes need to know of a batch; the last three where the forward pass was to make them."""

    stats: Tensor  # [B, 7] float64, those of the operators; all_mean is that to the row's own mixture
    coefficients: Tensor | None  # [B, 4] float64; None where there are only terms
    mixture: Tensor | None = None  # [B, M] of log q, for centroid_to_sample of q
    class_weights: Tensor | None = None  # [C, 2] float64 and
    weighted: Tensor | None = None  # [C, M], as the operator centroid_grad takes them


def forward(input: Tensor, centroid_logits: Tensor, problem: Problem, wanted: tuple[bool, bool]) -> _plain.Found:
    """As :func:`_plain.forward`."""
    options = problem.options
    if problem.table is None:
        problem = problem._replace(table=table_of(centroid_logits, options, problem.backend))
    products = _Products(input, problem)
    # One upstream gradient is a factor that all rows have in common; several are waited for.
    summed = wanted[1] and options.reduction != "none"
    rows = products.run(wanted[0], products.coefficients_of if summed else None)
    found = products.reduce()
    if summed and not products.whole:
        rows = products.times_the_factor(rows, found.coefficients)
    rows = rows._replace(coefficients=found.coefficients)
    return _plain.Found(found.loss.to(centroid_logits.dtype), found.means, rows, problem.table, problem.center)


def terms(input: Tensor, problem: Problem, with_input_grad: bool = False) -> tuple[Tensor, Rows]:
    """As :func:`_plain.terms`."""
    products = _Products(input, problem)
    rows = products.run(with_input_grad, None)
    return products.values, rows


class _Products:
    """A pass over the rows of a batch, a tile after another."""

    def __init__(self, input: Tensor, problem: Problem) -> None:
        self.input, self.problem = input, problem
        target, center, _, options, backend, table, *_ = problem
        self.operators = _ops.operators(backend)
        self.values, self.stats = self.operators.terms(
            input, target, center, *table[:4], *options.features, options.ignore_index
        )
        self.tiles = [slice(None)]
        if not torch.compiler.is_compiling():  # a loop would be for one size of batch
            count, size = len(input), tile_rows(len(table.relative))
            if count > size:
                self.tiles = [slice(first, first + size) for first in range(0, count, size)]
        self._reduced: _plain.Reduced | None = None
        self._factors: list[Tensor] = []

    @property
    def whole(self) -> bool:
        """Whether there is one tile, the batch."""
        return len(self.tiles) == 1

    def run(self, with_mixture: bool, coefficients_of: Callable[[slice], Tensor] | None) -> Rows:
        """`coefficients_of` a tile, asked for once its terms are known; None where no sums over the rows are wanted."""
        with reference.no_autocast(self.input.device):
            return self._run(with_mixture, coefficients_of)

    def _run(self, with_mixture: bool, coefficients_of: Callable[[slice], Tensor] | None) -> Rows:
        target, center, _, options, _, table, *_ = self.problem
        run, last = self.operators, (options.centroid_to_sample, options.ignore_index)
        classes = table.distribution if options.centroid_to_sample else table.relative
        mixture = weighted = class_weights = None
        if with_mixture and not self.whole:
            mixture = classes.new_empty(self.input.shape)
        for tile in self.tiles:
            if self.whole:
                input, to, stats, separation = self.input, target, self.stats, self.values[1]
            else:
                input, to, stats, separation = self.input[tile], target[tile], self.stats[tile], self.values[1, tile]
            x = run.focus_rows(input, to, center, *table[:4], stats, *last)
            weights = x @ classes.T
            run.focus_weights_(
                weights, separation, stats, to, table.norms, table.class_level, options.separation_focus, *last
            )
            if with_mixture:
                mixed = self._mixture(weights, None if mixture is None else mixture[tile])
                mixture = mixed if mixture is None else mixture
            if coefficients_of is not None:
                if class_weights is None:
                    class_weights = table.norms.new_zeros((len(classes), CLASS_WEIGHTS))
                run.focus_sums_(weights, class_weights, stats, coefficients_of(tile), to, *last)
                weighted = weights.T @ x if weighted is None else weighted.addmm_(weights.T, x)
        return Rows(self.stats, None, mixture, class_weights, weighted)

    def _mixture(self, weights: Tensor, out: Tensor | None) -> Tensor:
        """Of the classes by their weights, [rows, M]: what the operator input_grad takes as row_reference."""
        table = self.problem.table
        if self.problem.options.centroid_to_sample:
            return torch.mm(weights, table.distribution, out=out)
        return torch.addmm(table.reference[0], weights, table.relative, out=out)

    def reduce(self) -> _plain.Reduced:
        """What the terms of all rows come to."""
        if self._reduced is None:
            self._reduced = _plain.reduce(self.values, self.stats, self.problem)
        return self._reduced

    def coefficients_of(self, tile: slice) -> Tensor:
        """Those of the rows of a tile; of one among several up to a factor that takes all of them to know."""
        if self.whole:
            return self.reduce().coefficients
        target, _, weight, options, _, table, *_ = self.problem
        ones = table.norms.new_ones(4)
        values = self.values[:, tile].contiguous()
        batch = values, self.stats[tile], target[tile], weight, ones
        coefficients: Tensor = self.operators.reduce(*batch, options.centroid_to_sample, True, *options.loss)[1]
        self._factors.append(coefficients[:, 1].sum())
        return coefficients

    def times_the_factor(self, rows: Rows, coefficients: Tensor) -> Rows:
        """The sums over the rows by the coefficients that are now known."""
        assert rows.weighted is not None
        assert rows.class_weights is not None
        by = coefficients[:, 1].sum() / torch.stack(self._factors).sum()
        by = torch.where(rows.class_weights[:, 0].any(), by, 0)  # every coefficient is 0, and so is every sum
        return rows._replace(class_weights=rows.class_weights * by, weighted=rows.weighted.mul_(by.to(rows.weighted)))


def input_grad(input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
    """As :func:`_plain.input_grad`."""
    target, center, _, options, backend, table, *_ = problem
    last = options.centroid_to_sample, options.ignore_index, rows.mixture
    run = _ops.operators(backend).input_grad
    return run(input, target, center, *table[:4], rows.stats, rows.coefficients, upstream, *last)


def centroid_grad(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None
) -> Tensor:
    """As :func:`_plain.centroid_grad`."""
    target, center, _, options, backend, table, *_ = problem
    coefficients = rows.coefficients
    if rows.weighted is None:
        assert coefficients is not None
        if upstream is not None:
            # Ignored rows have zeros, which an infinite gradient would not keep.
            kept = target != options.ignore_index
            coefficients, upstream = torch.where(kept, coefficients.T * upstream, 0).T.contiguous(), None
        by_row = coefficients
        again = _Products(input, problem).run(False, lambda tile: by_row[tile])
        rows = rows._replace(class_weights=again.class_weights, weighted=again.weighted)
    last = options.centroid_to_sample, options.ignore_index, None, rows.class_weights, rows.weighted
    run = _ops.operators(backend).centroid_grad
    return run(input, target, center, centroid_logits, *table[:4], rows.stats, coefficients, upstream, *last)


def centroid_step_(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows, momentum_buffer: Tensor | None, sgd: SGD
) -> Table:
    """As :func:`_plain.centroid_step_`."""
    target, center, _, options, backend, table, *_ = problem
    assert rows.weighted is not None
    flags = options.softmax, options.centroid_to_sample, options.ignore_index
    run, plain = _ops.operators(backend), table[:4]
    of_batch = rows.stats, rows.coefficients
    last = *sgd, rows.class_weights, rows.weighted
    run.centroid_step_(input, target, center, centroid_logits, momentum_buffer, *plain, *of_batch, *flags, *last)
    return Table(*plain, *run.focus_table(*plain, options.centroid_to_sample))
