"""The way of a batch in which each sample and centroid have a weight, and no sum over the classes factorises.

That is with `separation_focus` or several centroids a class, R = C K in all; otherwise as :mod:`_plain`. The
divergences of samples and centroids are a product of [B, M] and [M, R], as the logits of a linear head are. A row is
compared with a mixture of the centroids, weighed by how near they are, in the place of the mean of all of them: another
product; and so are the sums over the rows that the centroids' gradient takes. None of the three waits for an upstream
gradient. So a forward pass makes them all, by tiles of rows, of which nothing of size [B, R] is left.

In a table the centroids lie in K sets, each with one of every class. What a sample has with its own class comes of the
sets one after another, each as of the only centroids there are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _ops, _plain, _schema, reference
from ncmi_kernels._modes import jit_tracing
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._schema import OWN_MEAN


def tile_rows(classes: int) -> int:
    """How many rows go through the products at once.

    [rows, classes] is to stay in cache; but for each tile the centroids are read again, and their sums added to, which
    costs as much as the products of a hundred rows.
    """
    return max(256, (1 << 20) // classes // 64 * 64)


def tiles_of(rows: int, classes: int) -> list[slice]:
    """The tiles of a batch."""
    size = tile_rows(classes)
    if rows <= size or torch.compiler.is_compiling() or jit_tracing():  # a loop would be for one size of batch
        return [slice(None)]
    return [slice(first, first + size) for first in range(0, rows, size)]


class Table(NamedTuple):
    """:class:`_schema.Table`, and what matrix products take: outputs of the operator focus_table."""

    log_activation: Tensor  # [R, M]
    activation: Tensor  # [R, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [R + 1, 9] float64
    relative: Tensor  # [R, M], log q less what the classes share
    distribution: Tensor  # [R, M] q less its mean over the classes, or [0, M] for sample_to_centroid
    class_level: Tensor  # [2, R] float64


def table_of(centroid_logits: Tensor, options: Options, backend: str, prior: Tensor | None = None) -> Table:
    """The table of centroid logits [C K, M], float32 or float64. Not differentiable: the autograd Functions are.

    `prior` [C] float64.
    """
    own = options.centroids_per_class
    if own > 1:
        centroid_logits = in_sets(centroid_logits, own)
        prior = None if prior is None else prior.repeat(own) / own
    table = _plain.table_of(centroid_logits, options, backend, prior)
    return Table(*table, *_ops.operators(backend).focus_table(*table, options.centroid_to_sample))


def in_sets(rows: Tensor, own: int) -> Tensor:
    """Rows [C K, M], those of a class adjacent, as K sets: the first of every class, then the second, ..."""
    return rows.unflatten(0, (-1, own)).transpose(0, 1).flatten(0, 1)


def _sets(table: Any, own: int) -> list[_schema.Table]:
    """The table of each set of centroids."""
    log_activation, activation, reference, norms = table[:4]
    size, last = len(log_activation) // own, norms[-1:]
    tables = []
    for first in range(0, len(log_activation), size):
        of = slice(first, first + size)
        norms_of_set = torch.cat([norms[:-1][of], last])
        tables.append(_schema.Table(log_activation[of], activation[of], reference, norms_of_set))
    return tables


class Rows(NamedTuple):
    """What the backward passes need to know of a batch.

    All but the first two fields are there only where the forward pass was asked for them, and the last two only with
    several centroids a class.
    """

    stats: Tensor  # [B, 8] float64, those of the operators; all_mean is that to the row's own mixture
    coefficients: Tensor | None  # [B, 4] float64; None where there are only terms
    mixture: Tensor | None = None  # [B, M] of log q, for centroid_to_sample of q
    class_weights: Tensor | None = None  # [R, 2] float64 and
    weighted: Tensor | None = None  # [R, M], as the operator centroid_grad takes them
    own_mixture: Tensor | None = None  # [B, M] of log a of the centroids of the own class
    own_weights: Tensor | None = None  # [B, K] float64, theirs in it


def forward(input: Tensor, centroid_logits: Tensor, problem: Problem, wanted: tuple[bool, bool]) -> _plain.Found:
    """As :func:`_plain.forward`."""
    options = problem.options
    if problem.table is None:
        table = table_of(centroid_logits, options, problem.backend, problem.class_prior)
        problem = problem._replace(table=table)
    own = own_terms(input, problem)
    rows, found = Products(input, problem, own).reduced(wanted)
    rows = with_own(rows, own, problem, wanted[0])
    return _plain.Found(found.loss.to(centroid_logits.dtype), found.means, rows, problem.table, problem.center)


def terms(input: Tensor, problem: Problem, with_input_grad: bool = False) -> tuple[Tensor, Rows]:
    """As :func:`_plain.terms`."""
    own = own_terms(input, problem)
    rows = Products(input, problem, own).run(with_input_grad, None)
    return own.values, with_own(rows, own, problem, with_input_grad)


class Own(NamedTuple):
    """What the rows have with their own class."""

    values: Tensor  # terms [2, B] float64, of which the separation is still to come
    stats: Tensor  # [B, 8] float64, likewise all_mean
    weights: Tensor | None  # [B, K] float64 of several centroids: how much a row belongs to each


def own_terms(input: Tensor, problem: Problem) -> Own:
    """Of the rows and the first four fields of the problem's table."""
    target, center, _, options, backend, table, *_ = problem
    run, own = _ops.operators(backend).terms, options.centroids_per_class
    last = *options.features, options.ignore_index
    if own == 1:
        values, stats = run(input, target, center, *table[:4], *last)
        return Own(values, stats, None)
    each = [run(input, target, center, *of_set, *last) for of_set in _sets(table, own)]
    divergences = torch.stack([values[0] for values, _ in each], dim=1)
    own_means = torch.stack([stats[:, OWN_MEAN] for _, stats in each], dim=1)
    weights = reference.weights_by_nearness(divergences, options.centroid_focus, torch.ones_like(divergences))
    weights = torch.where((target != options.ignore_index)[:, None], weights, 0)
    values, stats = each[0]
    values[0] = (weights * divergences).sum(dim=1)
    stats[:, OWN_MEAN] = (weights * own_means).sum(dim=1)
    return Own(values, stats, weights)


def with_own(rows: Rows, own: Own, problem: Problem, with_mixture: bool) -> Rows:
    """The rows, and what the backward passes need of several centroids of the own class."""
    if own.weights is None:
        return rows
    mixture = None
    if with_mixture:
        target, log_activation = problem.target, problem.table.log_activation
        first = target.masked_fill(target == problem.options.ignore_index, 0)  # whose weights are 0
        size = len(log_activation) // own.weights.shape[1]
        index = torch.stack([first + begin for begin in range(0, len(log_activation), size)], dim=1)
        weights = own.weights.to(log_activation.dtype)
        mixture = F.embedding_bag(index, log_activation, per_sample_weights=weights, mode="sum")
    return rows._replace(own_mixture=mixture, own_weights=own.weights)


class Products:
    """A pass over the rows of a batch and all centroids, a tile of rows after another."""

    def __init__(self, input: Tensor, problem: Problem, own: Own) -> None:
        self.input, self.problem = input, problem
        self.operators = _ops.operators(problem.backend)
        self.values, self.stats, _ = own
        self.numbers = problem.target  # of the rows' classes among the centroids here
        self.tiles = tiles_of(len(input), len(problem.table.relative))
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
        center, options, table = self.problem.center, self.problem.options, self.problem.table
        run, last = self.operators, (options.centroid_to_sample, options.ignore_index)
        classes = table.distribution if options.centroid_to_sample else table.relative
        mixture = weighted = class_weights = None
        if with_mixture and not self.whole:
            mixture = classes.new_empty(self.input.shape)
        for tile in self.tiles:
            if self.whole:
                input, to, stats = self.input, self.numbers, self.stats
            else:
                input, to, stats = self.input[tile], self.numbers[tile], self.stats[tile]
            x = run.focus_rows(input, to, center, *table[:4], stats, *last)
            weights = x @ classes.T
            self._weigh_(weights, tile, stats, to)
            if with_mixture:
                mixed = self._mixture(weights, None if mixture is None else mixture[tile])
                mixture = mixed if mixture is None else mixture
            if coefficients_of is not None:
                if class_weights is None:
                    class_weights = table.norms.new_zeros((len(classes), _schema.CLASS_WEIGHTS))
                run.focus_sums_(weights, class_weights, stats, coefficients_of(tile), to, *last)
                weighted = weights.T @ x if weighted is None else weighted.addmm_(weights.T, x)
        return Rows(self.stats, None, mixture, class_weights, weighted)

    def _weigh_(self, product: Tensor, tile: slice, stats: Tensor, numbers: Tensor) -> None:
        """The products of a tile to weights; its part of `values` and `stats` becomes complete."""
        options, table = self.problem.options, self.problem.table
        last = options.centroid_to_sample, options.ignore_index, options.centroids_per_class
        of_centroids = table.norms, table.class_level, options.separation_focus
        self.operators.focus_weights_(product, self.values[1, tile], stats, numbers, *of_centroids, *last)

    def _mixture(self, weights: Tensor, out: Tensor | None) -> Tensor:
        """Of the classes by their weights, [rows, M]: what the operator input_grad takes as row_reference."""
        table = self.problem.table
        if self.problem.options.centroid_to_sample:
            return torch.addmm(table.reference[1], weights, table.distribution, out=out)
        return torch.addmm(table.reference[0], weights, table.relative, out=out)

    def reduced(self, wanted: tuple[bool, bool]) -> tuple[Rows, _plain.Reduced]:
        """The pass for gradients of input and centroids where `wanted`, and what the terms come to."""
        # One upstream gradient is a factor that all rows have in common; several are waited for.
        summed = wanted[1] and self.problem.options.reduction != "none"
        rows = self.run(wanted[0], self.coefficients_of if summed else None)
        found = self.reduce()
        if summed and not self.whole:
            rows = self.times_the_factor(rows, found.coefficients)
        return rows._replace(coefficients=found.coefficients), found

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
    last = options.centroid_to_sample, options.ignore_index, rows.mixture, rows.own_mixture
    run = _ops.operators(backend).input_grad
    return run(input, target, center, *table[:4], rows.stats, rows.coefficients, upstream, *last)


def centroid_grad(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None
) -> Tensor:
    """As :func:`_plain.centroid_grad`."""
    target, center, _, options, backend, table, *_ = problem
    coefficients = rows.coefficients
    assert coefficients is not None
    if rows.weighted is None:
        coefficients, upstream = by_row(coefficients, upstream, problem), None
        known = coefficients
        sums = Products(input, problem, own_terms(input, problem)).run(False, lambda tile: known[tile])
        rows = rows._replace(class_weights=sums.class_weights, weighted=sums.weighted)
    own, batch = options.centroids_per_class, (input, target, center)
    last = options.centroid_to_sample, options.ignore_index, None
    run = _ops.operators(backend).centroid_grad
    if own == 1:
        of_rows = rows.stats, coefficients, upstream
        return run(*batch, centroid_logits, *table[:4], *of_rows, *last, rows.class_weights, rows.weighted)
    assert rows.class_weights is not None
    assert rows.weighted is not None
    assert rows.own_weights is not None
    class_weights, weighted = rows.class_weights.unflatten(0, (own, -1)), rows.weighted.unflatten(0, (own, -1))
    grads = []
    for number, of_set in enumerate(_sets(table, own)):
        of_rows = rows.stats, coefficients * rows.own_weights[:, number, None], upstream
        logits, sums_of_set = centroid_logits[number::own], (class_weights[number], weighted[number])
        grads.append(run(*batch, logits, *of_set, *of_rows, *last, *sums_of_set))
    return torch.stack(grads, dim=1).flatten(0, 1)


def by_row(coefficients: Tensor, upstream: Tensor | None, problem: Problem) -> Tensor:
    """Coefficients [B, 4] times upstream gradients [B]; those of ignored rows stay zeros whatever these are."""
    if upstream is None:
        return coefficients
    kept = problem.target != problem.options.ignore_index
    return torch.where(kept, coefficients.T * upstream, 0).T.contiguous()


def centroid_step_(
    input: Tensor,
    centroid_logits: Tensor,
    problem: Problem,
    rows: Rows,
    momentum_buffer: Tensor | None,
    sgd: _schema.SGD,
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
