"""The ways of a batch whose classes are shared out over the processes of a group."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _focus, _ops, _plain, _schema
from ncmi_kernels._group import Group
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem

NOBODY = -1  # the ignore_index of targets that were renumbered
BLOCK = 1024  # classes that are summed in float64 at once


class Lookup(NamedTuple):
    """The rows of the shards that a batch needs: which, from whom, and which rows here the others need."""

    target: Tensor  # [B], renumbered among the classes that occur; `NOBODY` for ignored rows
    rows: Tensor  # of this process's centroids, those that are needed, process by process
    counts: Tensor  # [2, processes], on the CPU: of the classes that occur those of each, and of `rows` those for each

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, classes_per_process: int, group: Group) -> tuple["Lookup", Tensor]:
        """Of targets [B]; and the classes that occur, in order: class 0, which no row has, where none counts."""
        kept = target != ignore_index
        present, numbers = torch.unique(target[kept], return_inverse=True)
        if not len(present):
            present = present.new_zeros(1)
        renumbered = torch.full_like(target, NOBODY).masked_scatter_(kept, numbers)
        owner = present // classes_per_process
        asked = torch.bincount(owner, minlength=group.size)
        wanted = group.all_to_all(asked, [1] * group.size, [1] * group.size)
        counts = torch.stack([asked, wanted]).cpu()
        rows = group.all_to_all(present - owner * classes_per_process, *counts.tolist())
        return cls(renumbered, rows, counts), present

    def fetch(self, local: Tensor, group: Group) -> Tensor:
        """The rows of the batch's classes, [classes, ...], from the shards `local`."""
        asked, wanted = self.counts.tolist()
        return group.all_to_all(local[self.rows], wanted, asked)

    def give(self, rows: Tensor, local: Tensor, group: Group) -> None:
        """Add rows [classes, ...] to the shards `local` that they belong to, in the order of the processes."""
        asked, wanted = self.counts.tolist()
        received = group.all_to_all(rows, asked, wanted)
        for index, part in zip(self.rows.split(wanted), received.split(wanted), strict=True):
            local.index_add_(0, index, part)


class Shard(NamedTuple):
    """What is known of this process's centroids: their table, None if it would be empty; their part of the sums."""

    table: _schema.Table | None
    sums: Tensor  # float64, [M + 1] or [3 M + 1]


def shard_of(logits: Tensor, options: Options, backend: str, prior: Tensor) -> Shard:
    """Sums over the classes in float64, by their priors [classes], as the operator centroid_stats forms them.

    sample_to_centroid: of log a [M] and log_norm; centroid_to_sample: of q, q log a and q log_norm [M each], log_norm.
    """
    sums = logits.new_zeros(3 if options.centroid_to_sample else 1, logits.shape[1], dtype=torch.float64)
    if not len(logits):
        return Shard(None, torch.cat([sums.flatten(), sums.new_zeros(1)]))
    table = _plain.table_of(logits, options, backend, prior)
    log_norms, share = table.norms[:-1, :1], prior[:, None]
    for begin in range(0, len(logits), BLOCK):
        block = slice(begin, begin + BLOCK)
        log_a = table.log_activation[block].double()
        if options.centroid_to_sample:
            log_norm = log_norms[block]
            q = share[block] * table.activation[block].double() * (-log_norm).exp()
            sums += torch.stack([q.sum(dim=0), (q * log_a).sum(dim=0), (q * log_norm).sum(dim=0)])
        else:
            sums += (share[block] * log_a).sum(dim=0)
    return Shard(table, torch.cat([sums.flatten(), (share * log_norms).sum(dim=0)]))


def _of_all(means: Tensor, columns: int, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """`reference` [2, M] and the record of all classes [9], from the sums over all: as the operator centroid_stats."""
    if options.centroid_to_sample:
        q, q_log, q_norm = means[:-1].view(3, columns)
        exact = torch.where(q > 0, q_log / q, 0)
        norm = torch.where(q > 0, q_norm / q, 0)
        weight = q.to(dtype).double()
        constant, weight_sum = (weight * norm).sum(), weight.sum()
        by, reference_sum = weight, (weight * exact.to(dtype)).sum()
    else:
        exact, constant = means[:-1], means[-1]
        by = exact.to(dtype).double().softmax(dim=0)
        weight, weight_sum = torch.zeros_like(by), torch.ones_like(constant)
        reference_sum = exact.to(dtype).double().sum()
    # What rounding loses enters the mean under p; under the mean centroid instead it goes into the constant.
    lost = (by * (exact - exact.to(dtype).double())).sum()
    record = torch.zeros(_schema.CLASS_STATS, dtype=torch.float64, device=means.device)
    record[:3] = torch.stack([weight_sum, constant - lost, reference_sum])
    return torch.stack([exact, weight]).to(dtype), record


class Occurring(NamedTuple):
    """The classes that occur in a batch, as this process knows them."""

    table: _schema.Table  # of their centroids
    here: _schema.Table  # of this process's centroids; both have the reference and the last record of all processes
    logits: Tensor  # [classes K, M]
    lookup: Lookup
    classes: Tensor  # their numbers


def by_class(rows: Tensor, own: int) -> Tensor:
    """Rows [C K, M], those of a class adjacent, as [C, K M]."""
    return rows.view(len(rows) // own, own * rows.shape[1])


@dataclass(frozen=True)
class _Shards:
    """How the classes are shared out, and what both ways do.

    Rows are compared with those of the centroids that they need, under numbers of their own; what is said of all
    classes comes of sums over all processes.
    """

    classes_per_process: int
    first: int  # of the classes here

    def shard_of(self, logits: Tensor, options: Options, backend: str, prior: Tensor) -> Shard:
        """What is known of this process's centroids [classes K, M]; `prior` [C] float64 is that of all classes."""
        return shard_of(logits, options, backend, self._prior_here(prior, logits, options))

    def _prior_here(self, prior: Tensor, logits: Tensor, options: Options) -> Tensor:
        classes = len(logits) // options.centroids_per_class
        return prior[self.first : self.first + classes].contiguous()

    def _occurring(self, logits: Tensor, problem: Problem) -> Occurring:
        target, _, _, options, backend, shard, group, *_ = problem
        prior, own = problem.class_prior, options.centroids_per_class
        assert group is not None
        assert prior is not None
        if not isinstance(shard, Shard):
            shard = self.shard_of(logits, options, backend, prior)
        sums = group.all_reduce(shard.sums.clone())
        reference, record = _of_all(sums, logits.shape[1], logits.dtype, options)
        lookup, present = Lookup.of(target, options.ignore_index, self.classes_per_process, group)
        own_logits = lookup.fetch(by_class(logits.contiguous(), own), group).view(-1, logits.shape[1])

        def of_all(table: _schema.Table) -> _schema.Table:
            return table._replace(reference=reference, norms=torch.cat([table.norms[:-1], record[None]]))

        its_prior = prior.index_select(0, present).repeat(own) / own
        table = of_all(_plain.table_of(_focus.in_sets(own_logits, own), options, backend, its_prior))
        here = table if shard.table is None else of_all(shard.table)
        return Occurring(table, here, own_logits, lookup, present)

    def _of_occurring(
        self, problem: Problem, target: Tensor, table: _schema.Table, weight: Tensor | None = None
    ) -> Problem:
        """The problem of the classes that occur in the batch, where rows that are ignored have `NOBODY`."""
        options = replace(problem.options, ignore_index=NOBODY)
        group = None if options.reduction == "none" else problem.group
        return problem._replace(target=target, weight=weight, options=options, table=table, group=group, shards=None)


class Shards(_Shards):
    """As :mod:`_plain`."""

    class Rows(NamedTuple):
        """As :class:`_plain.Rows`, and the classes that occur."""

        stats: Tensor
        coefficients: Tensor
        logits: Tensor  # [classes, M], of the classes that occur
        target: Tensor  # these are the fields of Lookup
        rows: Tensor
        counts: Tensor

    class Table(NamedTuple):
        """As :class:`_schema.Table`, of the classes that occur, and of this process's. Both have `reference`."""

        log_activation: Tensor
        activation: Tensor
        reference: Tensor
        norms: Tensor
        shard_log_activation: Tensor  # [classes here, M]
        shard_activation: Tensor
        shard_norms: Tensor

        def of_shard(self) -> _schema.Table:
            """That of this process's centroids."""
            return _schema.Table(self.shard_log_activation, self.shard_activation, self.reference, self.shard_norms)

    def forward(self, input: Tensor, logits: Tensor, problem: Problem, wanted: tuple[bool, bool]) -> _plain.Found:
        """As :func:`_plain.forward`, from this process's logits."""
        own, here, own_logits, lookup, present = self._occurring(logits, problem)
        count, weight = len(logits), problem.weight
        table = self.Table(*own, here.log_activation[:count], here.activation[:count], here.norms)
        counted = None if weight is None else weight.index_select(0, present)
        found = _plain.forward(input, own_logits, self._of_occurring(problem, lookup.target, own, counted), wanted)
        stats, coefficients = found.rows
        return found._replace(rows=self.Rows(stats, coefficients, own_logits, *lookup), table=table)

    def input_grad(self, input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
        """As :func:`_plain.input_grad`."""
        own = self._of_occurring(problem, rows.target, _schema.Table(*problem.table[:4]))
        return _plain.input_grad(input, own, _plain.Rows(*rows[:2]), upstream)

    def centroid_grad(
        self, input: Tensor, logits: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None
    ) -> Tensor:
        """As :func:`_plain.centroid_grad`, by this process's logits: the part of all rows of all processes."""
        group = problem.group
        assert group is not None
        own = self._of_occurring(problem, rows.target, _schema.Table(*problem.table[:4]))
        of_rows = _plain.Rows(*rows[:2])
        totals = group.all_reduce(_plain.class_totals(input, own, of_rows, upstream))
        nothing = torch.zeros_like(totals)
        of_own = _plain.centroid_grad(input, rows.logits, own, of_rows, upstream, nothing)
        grad = torch.zeros_like(logits)
        if len(logits):
            none = own._replace(target=rows.target[:0], table=problem.table.of_shard())
            no_rows = _plain.Rows(rows.stats[:0], rows.coefficients[:0])
            grad = _plain.centroid_grad(input[:0], logits, none, no_rows, None, totals)
        Lookup(*rows[3:]).give(of_own, grad, group)
        return grad


class FocusShards(_Shards):
    """As :mod:`_focus`: each process weighs its own centroids, for the rows of all processes.

    Between the processes go, in a pass over the products, the rows and their statistics; of each row a minimum and two
    sums; and where a gradient of the input is wanted, the parts of its mixture. A row whose class is elsewhere is here
    of one class more than there are, which has a prior of 0 and so no weight for any row.
    """

    def shard_of(self, logits: Tensor, options: Options, backend: str, prior: Tensor) -> Shard:
        """As of :class:`_Shards`; the table has the further class."""
        own = options.centroids_per_class
        its_prior = F.pad(self._prior_here(prior, logits, options), (0, 1)).repeat(own) / own
        return shard_of(_focus.in_sets(F.pad(logits, (0, 0, 0, own)), own), options, backend, its_prior)

    class Rows(NamedTuple):
        """As :class:`_focus.Rows` and :class:`Shards.Rows`; the sums are those of this process's centroids."""

        stats: Tensor
        coefficients: Tensor
        mixture: Tensor | None
        class_weights: Tensor | None
        weighted: Tensor | None
        own_mixture: Tensor | None
        own_weights: Tensor | None
        logits: Tensor
        target: Tensor
        rows: Tensor
        counts: Tensor

    class Table(NamedTuple):
        """As :class:`Shards.Table`, the second part as :class:`_focus.Table`, with the further class."""

        log_activation: Tensor
        activation: Tensor
        reference: Tensor
        norms: Tensor
        shard_log_activation: Tensor
        shard_activation: Tensor
        shard_norms: Tensor
        shard_relative: Tensor
        shard_distribution: Tensor
        shard_class_level: Tensor

        def of_shard(self) -> _focus.Table:
            """That of this process's centroids."""
            log_activation, activation, *rest = self[4:]
            return _focus.Table(log_activation, activation, self.reference, *rest)

    def forward(self, input: Tensor, logits: Tensor, problem: Problem, wanted: tuple[bool, bool]) -> _plain.Found:
        """As :func:`_plain.forward`, from this process's logits."""
        own, here, own_logits, lookup, _ = self._occurring(logits, problem)
        options = problem.options
        products_take = _ops.operators(problem.backend).focus_table(*here, options.centroid_to_sample)
        table = self.Table(*own, here.log_activation, here.activation, here.norms, *products_take)
        mine = self._of_occurring(problem, lookup.target, own)
        own_terms = _focus.own_terms(input, mine)
        products = _Part(input, problem._replace(table=table), own_terms, self, wanted[0])
        of_all, found = products.reduced((products.with_mixture, wanted[1]))
        part, mixture = products.mine, None
        if of_all.mixture is not None:
            mixture = products.mixture_of_all(of_all.mixture)
        # Copies: a part of what all have would keep the whole.
        stats, coefficients = of_all.stats[part].clone(), found.coefficients[part].clone()
        rows = of_all._replace(stats=stats, coefficients=coefficients, mixture=mixture if wanted[0] else None)
        rows = _focus.with_own(rows, own_terms, mine, wanted[0])
        loss, means = found.loss.to(logits.dtype), found.means
        if options.reduction == "none":
            values = products.values[:, part].contiguous()
            loss, means = loss[part].clone(), _plain.reduce(values, stats, problem._replace(group=None)).means
        if rows.weighted is not None or not wanted[1]:  # no pass over the products is to come
            table = self.Table(*table[:7], *(each.new_empty(0) for each in products_take))
        of_batch: tuple[Any, ...] = *rows, own_logits, *lookup
        return _plain.Found(loss, means, self.Rows(*of_batch), table, problem.center)

    def input_grad(self, input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
        """As :func:`_plain.input_grad`."""
        own = self._of_occurring(problem, rows.target, _schema.Table(*problem.table[:4]))
        return _focus.input_grad(input, own, _focus.Rows(*rows[:7]), upstream)

    def centroid_grad(
        self, input: Tensor, logits: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None
    ) -> Tensor:
        """As :func:`_plain.centroid_grad`, by this process's logits: the part of all rows of all processes."""
        group, own = problem.group, problem.options.centroids_per_class
        assert group is not None
        mine = self._of_occurring(problem, rows.target, _schema.Table(*problem.table[:4]))
        of_rows = _focus.Rows(*rows[:7])
        if rows.weighted is None:
            coefficients, upstream = _focus.by_row(rows.coefficients, upstream, mine), None
            products = _Part(input, problem, _focus.own_terms(input, mine), self, False)
            of_all = torch.cat(group.all_gather(coefficients))
            sums = products.run(False, lambda tile: of_all[tile])
            of_rows = of_rows._replace(
                coefficients=coefficients, class_weights=sums.class_weights, weighted=sums.weighted
            )
        assert of_rows.class_weights is not None
        assert of_rows.weighted is not None
        nothing = of_rows._replace(
            class_weights=of_rows.class_weights.new_zeros((len(rows.logits), _schema.CLASS_WEIGHTS)),
            weighted=torch.zeros_like(rows.logits),
        )
        of_own = _focus.centroid_grad(input, rows.logits, mine, nothing, upstream)
        grad = torch.zeros_like(logits)
        if len(logits):

            def without_further(of_centroids: Tensor) -> Tensor:
                return of_centroids.unflatten(0, (own, -1))[:, :-1].flatten(0, 1)

            log_activation, activation, reference, norms = problem.table.of_shard()[:4]
            if problem.options.centroid_to_sample:
                activation = without_further(activation)
            norms = torch.cat([without_further(norms[:-1]), norms[-1:]])
            table = _schema.Table(without_further(log_activation), activation, reference, norms)
            none = _focus.Rows(
                rows.stats[:0],
                rows.coefficients[:0],
                class_weights=without_further(of_rows.class_weights),
                weighted=without_further(of_rows.weighted),
                own_weights=None if rows.own_weights is None else rows.own_weights[:0],
            )
            here = mine._replace(target=rows.target[:0], table=table)
            grad = _focus.centroid_grad(input[:0], logits, here, none, upstream)
        Lookup(*rows[8:]).give(by_class(of_own, own), by_class(grad, own), group)
        return grad


class _Part(_focus.Products):
    """The rows of all processes and the centroids of this one."""

    def __init__(
        self, input: Tensor, problem: Problem, own: _focus.Own, shards: FocusShards, with_mixture: bool
    ) -> None:
        """`own`: of the rows here; `problem` has a FocusShards.Table. `with_mixture`: whether these rows need one."""
        options, group = problem.options, problem.group
        assert group is not None
        self.group = group
        ignored = problem.target == options.ignore_index
        target = problem.target.masked_fill(ignored, NOBODY)[:, None].double()
        every = group.all_gather(torch.cat([own.stats, own.values.T, target], dim=1))
        self.sizes = [len(rows) for rows in every]
        before = sum(self.sizes[: group.rank])
        self.mine = slice(before, before + len(input))
        stats, values, target = torch.cat(every).split([own.stats.shape[1], 2, 1], dim=1)
        target, table = target[:, 0].long(), problem.table.of_shard()
        # What one process alone wants, or has in another dtype (one without rows, say), all have to know.
        narrow = torch.bfloat16, torch.float16
        votes = group.all_reduce(
            target.new_tensor([with_mixture, *(input.dtype is dtype for dtype in narrow)])
        ).tolist()
        self.with_mixture = votes[0] > 0
        if group.size not in votes[1:]:
            input = input.to(table.relative.dtype)
        input = torch.cat(group.all_gather(input.contiguous()))
        options = replace(options, ignore_index=NOBODY)
        problem = problem._replace(target=target, options=options, table=table, group=None, shards=None)
        super().__init__(input, problem, _focus.Own(values.T.contiguous(), stats.contiguous(), None))
        # The same tiles on every process, whatever it has of centroids.
        self.tiles = _focus.tiles_of(len(input), options.centroids_per_class * shards.classes_per_process)
        further = len(table.relative) // options.centroids_per_class - 1
        number = target - shards.first
        number = torch.where((number >= 0) & (number < further), number, further)
        self.numbers = torch.where(target == NOBODY, NOBODY, number)

    def _weigh_(self, product: Tensor, tile: slice, stats: Tensor, numbers: Tensor) -> None:
        options, table, run = self.problem.options, self.problem.table, self.operators
        last = options.centroid_to_sample, options.ignore_index, options.centroids_per_class
        nearest = run.focus_nearest(product, stats, numbers, table.norms, table.class_level, *last)
        self.group.least(nearest)
        shared = torch.stack([nearest, torch.zeros_like(nearest), torch.zeros_like(nearest)])
        of_centroids = table.norms, table.class_level, options.separation_focus
        run.focus_weights_(product, self.values[1, tile], stats, numbers, *of_centroids, *last, shared)
        total, weighted = self.group.all_reduce(shared[1:])
        alone = (total == 0) & (weighted == 0)  # no other class has a prior
        inverse = torch.where(alone, 0, 1 / total)
        product *= inverse.to(product.dtype)[:, None]
        mean = torch.where(alone, 0, nearest + weighted * inverse)
        prior = self.problem.class_prior
        assert prior is not None
        own_prior = prior[self.problem.target[tile].clamp(min=0)]
        log_norm = -stats[:, _schema.INVERSE_NORM].log() - table.norms[-1, _schema.MEAN_LOG_NORM]
        stats[:, _schema.ALL_MEAN] = mean + log_norm
        stats[:, _schema.OWN_PRIOR] = own_prior
        self.values[1, tile] = mean * (1 - own_prior)

    def _mixture(self, weights: Tensor, out: Tensor | None) -> Tensor:
        """The part of it that the centroids here have."""
        table = self.problem.table
        classes = table.distribution if self.problem.options.centroid_to_sample else table.relative
        return torch.mm(weights, classes, out=out)

    def mixture_of_all(self, part: Tensor) -> Tensor:
        """That of the rows here, of all centroids."""
        rows, processes = self.sizes[self.group.rank], self.group.size
        parts = self.group.all_to_all(part, self.sizes, [rows] * processes)
        common = self.problem.table.reference[int(self.problem.options.centroid_to_sample)]
        return parts.view(processes, rows, part.shape[1]).sum(dim=0) + common
