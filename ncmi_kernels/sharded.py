"""NCMI for very many classes: each process holds a part of the centroids, and [C, M] exists on none."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _backends, _loss, _plain, _problem, _schema, reference
from ncmi_kernels._group import Group
from ncmi_kernels._memo import memory_of, state_of
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem, problem_of
from ncmi_kernels.modules import INITIAL_LOGIT, NCMILoss

NOBODY = -1  # the ignore_index of targets that were renumbered
BLOCK = 1024  # classes whose initial centroids come from one seed; rows that are summed in float64 at once


class ShardedNCMILoss(NCMILoss):
    """:class:`NCMILoss` with the C centroids shared out over the processes of a device mesh, C / N rows to each.

    For classes too many for one process. Each process calls it on a batch of its own, in the same order as the others;
    the loss is that of all rows against all classes. Between the processes go O(M) sums over the classes and, of the
    rows of the centroids, those of the classes that occur in the batches: O(B M), whatever C is.

    Args:
        num_classes: C >= 2. Process r of N holds rows [r R, (r + 1) R) with R = ceil(C / N); the last ones may have
            fewer or none.
        feature_dim: M >= 2; None for `num_classes`.
        device_mesh: a `torch.distributed.device_mesh.DeviceMesh` of one dimension. Its group is the `process_group`,
            its devices those of the parameters and buffers.
        options: as of :class:`NCMILoss`, but for `process_group` and `device`. `backend` cannot be "reference", and
            `separation_focus` is 0, `centroids_per_class` 1.

    Attributes:
        centroid_logits: Parameter, a DTensor [C, M] with placement Shard(0), for torch.optim, `clip_grad_norm_` and
            torch.distributed.checkpoint, which may load it on another number of processes. Initially as in NCMILoss,
            the same for every N; random directions come from torch's global generator of process 0.
        center: buffer [M], whole on every process.
        weight, class_prior: buffers [C], likewise, and the same on every process.
        class_means: buffer, a DTensor like `centroid_logits`, once `fit_class_means` was called.

    Loss and gradients:
        As in `NCMILoss(process_group=...)`: the loss is the same on every process, and the gradient of `input` is
        multiplied by N, for the average that DistributedDataParallel takes. Here this holds in eval mode too, where
        only the centre stays. The gradient of `centroid_logits` is the true one, and nothing is to average it: keep the
        criterion outside of DistributedDataParallel and `fully_shard`. The upstream gradient has to be the same on all
        processes. With reduction "none" each process has the losses of its own rows, and their gradient by `input` is
        not multiplied.

    Every method that takes features, `centroids` aside, is a collective: all processes call it equally often, whatever
    their batches hold.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :class:`NCMILoss`; of `device_mesh`: TypeError where it is
            something else, ValueError where it has more dimensions or is without this process. RuntimeError where no
            kernels can run.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from ncmi_kernels import ShardedNCMILoss
        >>> alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # with torchrun: {}
        >>> dist.init_process_group("gloo", **alone)
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> criterion = ShardedNCMILoss(num_classes=10_000, feature_dim=64, device_mesh=mesh)
        >>> features = torch.randn(8, 64, requires_grad=True)
        >>> criterion(features, torch.randint(10_000, (8,))).backward()
        >>> criterion.predict(features).shape
        torch.Size([8])
        >>> dist.destroy_process_group()
    """

    def __init__(self, num_classes: int, feature_dim: int | None = None, *, device_mesh: Any, **options: Any) -> None:
        for name in ("process_group", "device"):
            if name in options:
                raise TypeError(f"{name}: got {options[name]!r}, expected none beside device_mesh, which determines it")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "device_mesh: got no initialized torch.distributed, expected a call of init_device_mesh or "
                "init_process_group first"
            )
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(device_mesh, DeviceMesh):
            raise TypeError(f"device_mesh: got {type(device_mesh).__name__}, expected a DeviceMesh")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: got {device_mesh.ndim} dimensions, expected one: a part of it by name")
        if device_mesh.get_coordinate() is None:
            raise ValueError("device_mesh: got a mesh without this process, expected one that it belongs to")
        if options.get("centroids_per_class", 1) != 1:
            raise ValueError(
                f"centroids_per_class: got {options['centroids_per_class']!r}, expected 1: centroids on several "
                "processes have no weight for each sample"
            )
        self.device_mesh = device_mesh
        super().__init__(
            num_classes,
            feature_dim,
            process_group=device_mesh.get_group(),
            device=device_mesh.device_type,
            **options,
        )

    @property
    def process_group(self) -> Any:
        """The group of the device mesh; cannot be assigned."""
        return self._processes.process_group

    @process_group.setter
    def process_group(self, value: Any) -> None:
        raise AttributeError("process_group: got an assignment, expected none: device_mesh determines it")

    @property
    def _processes(self) -> Group:
        assert self._group is not None
        return self._group

    @property
    def _rows_per_process(self) -> int:
        return -(-self.num_classes // self._processes.size)

    @property
    def _first_class(self) -> int:
        return min(self.num_classes, self._processes.rank * self._rows_per_process)

    def _new_centroids(self, device: Any, dtype: torch.dtype) -> Tensor:
        rows = min(self.num_classes - self._first_class, self._rows_per_process)
        return self._as_dtensor(torch.empty(rows, self.feature_dim, device=device, dtype=dtype))

    def _as_dtensor(self, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self.num_classes, self.feature_dim))
        return DTensor.from_local(
            local, self.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.feature_dim, 1)
        )

    def _reset_centroids(self) -> None:
        local, first = self._own(self.centroid_logits), self._first_class
        if self.feature_dim >= self.num_classes:
            local.zero_()
            local[torch.arange(len(local)), torch.arange(first, first + len(local))] = INITIAL_LOGIT
            return
        # By blocks of classes, so that a class begins alike wherever it is.
        seed = torch.randint(2**62, (1,)).to(local.device)
        dist.broadcast(seed, group=self.process_group, group_src=0)
        last = first + len(local)
        for begin in range(first // BLOCK * BLOCK, last, BLOCK):
            generator = torch.Generator().manual_seed(int(seed) + begin)
            rows = INITIAL_LOGIT * F.normalize(torch.randn(BLOCK, self.feature_dim, generator=generator), dim=1)
            here = slice(max(begin, first), min(begin + BLOCK, last))
            local[here.start - first : here.stop - first] = rows[here.start - begin : here.stop - begin].to(local)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of all processes' features [B, M] (or [M], [B, M, d1, ...]); targets [B] (or [], [B, d1, ...])."""
        backend = self._backend_for(input, target)
        center, weight, prior = self._buffers_for(self.centroid_logits)
        center, _, moved = self._center_for(center, input, target, self.centroid_logits, backend)
        found = _loss.loss(*self._problem(input, target, center, weight, prior, backend))
        if moved is not None:
            self._commit_center(moved)
        self._keep(found._replace(rows=None), input, target, backend, self._processes)  # no step takes them again
        return found.loss.reshape(target.shape) if self.options.reduction == "none" else found.loss

    def centroid_gradient(self, features: Tensor, target: Tensor) -> Tensor:
        """As of :class:`NCMILoss` with a process group; a DTensor [C, M] like `centroid_logits`."""
        return super().centroid_gradient(features, target)

    def _step_gradient(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        backend = self._backend_for(features, target)
        self._forget()
        center, weight, prior = self._buffers_for(self.centroid_logits)
        grad, means = _loss.centroid_gradient(*self._problem(features, target, center, weight, prior, backend))
        return self._as_dtensor(grad.to(self.centroid_logits.dtype)), means

    def centroids(self) -> Tensor:
        """The centroids as distributions, a DTensor [C, M] like `centroid_logits`. Differentiable."""
        local = _to_local(self.centroid_logits)
        return self._as_dtensor(reference.log_activation(local, self.options.activation).exp())

    def scores(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """Refused: [B, C] is what the sharding avoids.

        Raises:
            RuntimeError: always; `predict` gives the class of the highest score.
        """
        raise RuntimeError("scores: got centroids on several processes, expected predict(features) in its place")

    @torch.no_grad()
    def predict(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """As of :class:`NCMILoss`, for each process's own features; their number may differ between processes."""
        group = self._processes
        p = self._log_probabilities(features).exp()
        log_q = self._log_centroids(class_means)
        missing = log_q.isneginf().any(dim=1)
        log_q = log_q.masked_fill(missing[:, None], 0).to(torch.promote_types(p.dtype, log_q.dtype))
        # As in NCMILoss: what all classes share is left out, as it would round the differences between them.
        sums = group.all_reduce(torch.cat([log_q.sum(dim=0, dtype=torch.float64), (~missing).sum(dim=0, keepdim=True)]))
        relative = (log_q - sums[:-1] / sums[-1].clamp(min=1)).to(log_q.dtype)

        # Every process scores all features against its own classes, and sends the best back: score and class.
        best = []
        every = group.all_gather(p.to(log_q.dtype))
        for others in every:
            if not len(relative):
                best.append(torch.full((len(others), 2), -torch.inf, dtype=torch.float64, device=p.device))
                continue
            with reference.no_autocast(features.device):
                score = (others @ relative.T).masked_fill_(missing, -torch.inf)
            index = score.argmax(dim=1, keepdim=True)
            best.append(torch.cat([score.gather(1, index).double(), (index + self._first_class).double()], dim=1))
        sizes = [len(others) for others in every]
        found = group.all_to_all(torch.cat(best), sizes, [len(p)] * group.size).view(group.size, len(p), 2)
        winner = found[:, :, 0].argmax(dim=0, keepdim=True)
        return found[:, :, 1].gather(0, winner)[0].long().reshape(self._check_features(features))

    @torch.no_grad()
    def fit_class_means(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """As of :class:`NCMILoss`, over the batches of all processes; their numbers may differ.

        Returns:
            A DTensor [C, M] like `centroid_logits`.
        """
        group, local = self._processes, self._own(self.centroid_logits)
        total = local.new_zeros((len(local), self.feature_dim + 1), dtype=torch.float64)  # the last column counts
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if not group.all_reduce(total.new_full((1,), batch is not None)):
                break
            features, target = batch or (local[:0], total[:0, 0].long())
            p, classes, kept = self._counted_probabilities(features, target)
            lookup, present = Lookup.of(classes.masked_fill(~kept, NOBODY), NOBODY, self._rows_per_process, group)
            sums = total.new_zeros((len(present), self.feature_dim + 1))
            counted = torch.cat([p, kept.double()[:, None]], dim=1)
            lookup.give(sums.index_add_(0, lookup.target.masked_fill(~kept, 0), counted), total, group)
        self.class_means = self._as_dtensor((total[:, :-1] / total[:, -1:].clamp(min=1)).to(local.dtype))
        return self.class_means

    # --------------------------------------------------------------------------------------------------------

    def _own(self, table: Tensor) -> Tensor:
        return _to_local(table).detach()

    def _is_fitted(self, class_means: Tensor) -> bool:
        # A process without rows cannot tell.
        return bool(self._processes.all_reduce(self._own(class_means).any().double()))

    def _backend_for(self, input: Tensor, target: Tensor) -> str:
        """The backend that runs; raises unless these arguments and settings can be computed."""
        _problem.check_batch(input, target, self.centroid_logits)
        _problem.check_range(target, self.num_classes, self.options.ignore_index)
        if self.options.separation_focus:
            raise ValueError(
                f"separation_focus: got {self.options.separation_focus}, expected 0: centroids on several processes "
                "have no weight for each sample"
            )
        backend = _backends.resolve(self.backend, input)
        if backend == "reference":
            raise RuntimeError(
                "backend: got 'reference', expected one with kernels: there is no reference for centroids on several "
                "processes (ncmi_kernels.available_backends() tells what can run)"
            )
        return backend

    def _problem(
        self,
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        weight: Tensor | None,
        prior: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Problem]:
        logits = _to_local(self.centroid_logits)
        rows, logits, problem = problem_of(
            input, target, logits, center, weight, self.options, backend, group=self._processes, class_prior=prior
        )
        prior = problem.class_prior
        if prior is None:
            prior = logits.new_full((1,), 1 / self.num_classes, dtype=torch.float64).expand(self.num_classes)
        shards = Shards(self._rows_per_process, self._first_class)
        shard = None if logits.requires_grad else self._fixed_shard(input, shards.prior_here(prior, logits), backend)
        return rows, logits, problem._replace(table=shard, shards=shards, class_prior=prior)

    def _fixed_shard(self, input: Tensor, prior: Tensor, backend: str) -> "Shard":
        """What is known of fixed centroids, kept as in `NCMILoss._fixed_table`."""
        logits = self.centroid_logits
        # Operations on the DTensor move its counter, those on what its to_local() gives that of the rows. The rows of a
        # detached DTensor count for themselves: writing through them cannot be seen, as through `.data`.
        local = _to_local(logits)
        given = [] if self.class_prior is None else [self.class_prior]
        if any(t.is_inference() for t in given):  # which no version counter tells of
            return shard_of(_problem.to_arithmetic_dtype(input, local, None, None)[1], self.options, backend, prior)
        key = state_of(local, *given), self.options, backend, logits._version, input.dtype
        shard: Shard | None = self._table.find(key)
        if shard is None:
            wide = _problem.to_arithmetic_dtype(input, local, None, None)[1]
            shard = shard_of(wide, self.options, backend, prior)
            self._table.keep(key, shard, local, *memory_of(*given))
        return shard


def _to_local(table: Any) -> Tensor:
    """The rows of a DTensor that this process has; differentiable."""
    local: Tensor = table.to_local()
    return local


class Lookup(NamedTuple):
    """The rows of the shards that a batch needs: which, from whom, and which rows here the others need."""

    target: Tensor  # [B], renumbered among the classes that occur; `NOBODY` for ignored rows
    rows: Tensor  # of this process's centroids, those that are needed, process by process
    counts: Tensor  # [2, processes], on the CPU: of the classes that occur those of each, and of `rows` those for each

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, rows_per_process: int, group: Group) -> tuple["Lookup", Tensor]:
        """Of targets [B]; and the classes that occur, in order: class 0, which no row has, where none counts."""
        kept = target != ignore_index
        present, numbers = torch.unique(target[kept], return_inverse=True)
        if not len(present):
            present = present.new_zeros(1)
        renumbered = torch.full_like(target, NOBODY).masked_scatter_(kept, numbers)
        owner = present // rows_per_process
        asked = torch.bincount(owner, minlength=group.size)
        wanted = group.all_to_all(asked, [1] * group.size, [1] * group.size)
        counts = torch.stack([asked, wanted]).cpu()
        rows = group.all_to_all(present - owner * rows_per_process, *counts.tolist())
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
    """What is known of this process's centroids: their table, None without any, and their part of the sums."""

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


@dataclass(frozen=True)
class Shards:
    """The way of a batch whose classes are shared out over the processes of a group: as :mod:`_plain`.

    Rows are compared with those of the centroids that they need, under numbers of their own; what is said of all
    classes comes of sums over all processes.
    """

    rows_per_process: int
    first: int  # of the classes here

    def prior_here(self, prior: Tensor, logits: Tensor) -> Tensor:
        """Of priors [C] those of this process's classes, which have these logits."""
        return prior[self.first : self.first + len(logits)].contiguous()

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
        target, _, weight, options, backend, shard, group, *_ = problem
        prior = problem.class_prior
        assert group is not None
        assert prior is not None
        if not isinstance(shard, Shard):
            shard = shard_of(logits, options, backend, self.prior_here(prior, logits))
        sums = group.all_reduce(shard.sums.clone())
        reference, record = _of_all(sums, logits.shape[1], logits.dtype, options)
        lookup, present = Lookup.of(target, options.ignore_index, self.rows_per_process, group)
        own_logits = lookup.fetch(logits, group)

        def of_all(table: _schema.Table) -> _schema.Table:
            return table._replace(reference=reference, norms=torch.cat([table.norms[:-1], record[None]]))

        own = of_all(_plain.table_of(own_logits, options, backend, prior.index_select(0, present)))
        here = own if shard.table is None else of_all(shard.table)
        count = len(logits)
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

    def _of_occurring(
        self, problem: Problem, target: Tensor, table: _schema.Table, weight: Tensor | None = None
    ) -> Problem:
        """The problem of the classes that occur in the batch, where rows that are ignored have `NOBODY`."""
        options = replace(problem.options, ignore_index=NOBODY)
        group = None if options.reduction == "none" else problem.group
        return problem._replace(target=target, weight=weight, options=options, table=table, group=group, shards=None)
