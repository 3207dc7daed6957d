"""NCMI for very many classes: each process holds a part of the centroids, and [C, M] exists on none."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _backends, _loss, _problem, reference
from ncmi_kernels._group import Group
from ncmi_kernels._memo import memory_of, state_of
from ncmi_kernels._prediction import check_fitted
from ncmi_kernels._problem import Problem, problem_of
from ncmi_kernels._shards import NOBODY, FocusShards, Lookup, Shard, Shards
from ncmi_kernels.modules import INITIAL_LOGIT, NCMILoss

BLOCK = 1024  # centroids that are drawn from one seed


class ShardedNCMILoss(NCMILoss):
    """:class:`NCMILoss` with the classes shared out over the processes of a device mesh, C / N to each.

    For classes too many for one process. Each process calls it on a batch of its own, in the same order as the others;
    the loss is that of all rows against all classes. Between the processes go O(M) sums over the classes and, of the
    rows of the centroids, those of the classes that occur in the batches: O(B M), whatever C is. With
    `separation_focus` or several centroids a class, every process compares the rows of all with its centroids, and
    these rows go between the processes as well.

    Args:
        num_classes: C >= 2. Process r of N has the classes [r R, (r + 1) R) with R = ceil(C / N); the last ones may
            have fewer or none. With `centroids_per_class`, of which no class's may be split, a multiple of N (classes
            with a `class_prior` of 0 change no loss).
        feature_dim: M >= 2; None for `num_classes`.
        device_mesh: a `torch.distributed.device_mesh.DeviceMesh` of one dimension. Its group is the `process_group`,
            its devices those of the parameters and buffers.
        options: as of :class:`NCMILoss`, but for `process_group` and `device`. `backend` cannot be "reference".

    Attributes:
        centroid_logits: Parameter, a DTensor [C K, M] with placement Shard(0), for torch.optim, `clip_grad_norm_` and
            torch.distributed.checkpoint, which may load it on another number of processes. Initially as in NCMILoss,
            the same for every N; random directions come from torch's global generator of process 0.
        center: buffer [M], whole on every process.
        weight, class_prior: buffers [C], likewise, and the same on every process.
        class_means: buffer [C, M], a DTensor shared out as `centroid_logits` is.

    Loss and gradients:
        As in `NCMILoss(process_group=...)`: the loss is the same on every process, and the gradient of `input` is
        multiplied by N, for the average that DistributedDataParallel takes. Here this holds in eval mode too, where
        only the centre stays. The gradient of `centroid_logits` is the true one, and nothing is to average it: keep the
        criterion outside of DistributedDataParallel and `fully_shard`. The upstream gradient has to be the same on all
        processes. With reduction "none" each process has the losses of its own rows, and their gradient by `input` is
        not multiplied.

    `scores`, `probabilities` and `fit_temperature` raise RuntimeError: [B, C] is what the sharding avoids. Every other
    method that takes features, `centroids` aside, is a collective: all processes call it equally often, whatever
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
    def _classes_per_process(self) -> int:
        return -(-self.num_classes // self._processes.size)

    @property
    def _first_class(self) -> int:
        return min(self.num_classes, self._processes.rank * self._classes_per_process)

    @property
    def _num_classes_here(self) -> int:
        return min(self.num_classes - self._first_class, self._classes_per_process)

    def _new_centroids(self, device: Any, dtype: torch.dtype) -> Tensor:
        own, size = self.options.centroids_per_class, self._processes.size
        rows_by_dtensor = -(-self.num_classes * own // size)
        if rows_by_dtensor != own * self._classes_per_process:
            raise ValueError(
                f"num_classes: got {self.num_classes}, expected a multiple of the {size} processes with "
                f"centroids_per_class {own}, so that no class is split (one of class_prior 0 changes no loss)"
            )
        rows = self._num_classes_here * own
        return self._as_dtensor(torch.empty(rows, self.feature_dim, device=device, dtype=dtype), own)

    def _as_dtensor(self, local: Tensor, rows_per_class: int) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self.num_classes * rows_per_class, self.feature_dim))
        return DTensor.from_local(
            local, self.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.feature_dim, 1)
        )

    def _new_class_means(self, device: Any, dtype: torch.dtype) -> Tensor:
        return self._as_dtensor(torch.zeros(self._num_classes_here, self.feature_dim, device=device, dtype=dtype), 1)

    def _reset_centroids(self) -> None:
        local, first = self._own(self.centroid_logits), self._first_class * self.options.centroids_per_class
        if self.feature_dim >= len(self.centroid_logits):
            local.zero_()
            local[torch.arange(len(local)), torch.arange(first, first + len(local))] = INITIAL_LOGIT
            return
        # By blocks, so that a centroid begins alike wherever it is.
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
        """As of :class:`NCMILoss` with a process group; a DTensor [C K, M] like `centroid_logits`."""
        return super().centroid_gradient(features, target)

    def _step_gradient(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        backend = self._backend_for(features, target)
        self._forget()
        center, weight, prior = self._buffers_for(self.centroid_logits)
        grad, means = _loss.centroid_gradient(*self._problem(features, target, center, weight, prior, backend))
        return self._as_dtensor(grad.to(self.centroid_logits.dtype), self.options.centroids_per_class), means

    def centroids(self) -> Tensor:
        """The centroids as distributions, a DTensor [C K, M] like `centroid_logits`. Differentiable."""
        local = _to_local(self.centroid_logits)
        centroids = reference.log_activation(local, self.options.activation).exp()
        return self._as_dtensor(centroids, self.options.centroids_per_class)

    def _relative_scores(self, features: Tensor, class_means: bool) -> tuple[Tensor, Tensor]:
        """Refused, and with it `scores`, `probabilities` and `fit_temperature`: [B, C] is what the sharding avoids."""
        raise RuntimeError("scores: got centroids on several processes, expected predict(features) in its place")

    def probabilities(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """Refused, before a temperature is asked for that cannot be fitted."""
        return self._relative_scores(features, class_means)[0]

    def load_authors_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refused: their class means are on one process."""
        raise RuntimeError("checkpoint: got it for centroids on several processes, expected NCMILoss")

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
        if class_means:
            check_fitted(sums[-1])
        relative = (log_q - sums[:-1] / sums[-1].clamp(min=1)).to(log_q.dtype)

        # Every process scores all features against its own classes, and sends the best back: score and class.
        best, rows_per_class = [], 1 if class_means else self.options.centroids_per_class
        every = group.all_gather(p.to(log_q.dtype))
        for others in every:
            if not len(relative):
                best.append(torch.full((len(others), 2), -torch.inf, dtype=torch.float64, device=p.device))
                continue
            with reference.no_autocast(features.device):
                score = (others @ relative.T).masked_fill_(missing, -torch.inf)
            index = score.argmax(dim=1, keepdim=True)
            number = index // rows_per_class + self._first_class
            best.append(torch.cat([score.gather(1, index).double(), number.double()], dim=1))
        sizes = [len(others) for others in every]
        found = group.all_to_all(torch.cat(best), sizes, [len(p)] * group.size).view(group.size, len(p), 2)
        winner = found[:, :, 0].argmax(dim=0, keepdim=True)
        return found[:, :, 1].gather(0, winner)[0].long().reshape(self._check_features(features))

    @torch.no_grad()
    def fit_class_means(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """As of :class:`NCMILoss`, over the batches of all processes; their numbers may differ.

        Returns:
            A DTensor [C, M], shared out as `centroid_logits`.
        """
        group, local = self._processes, self._own(self.centroid_logits)
        shape = self._num_classes_here, self.feature_dim + 1
        total = local.new_zeros(shape, dtype=torch.float64)  # the last column counts
        mine = iter(batches)
        while True:
            batch = next(mine, None)
            if not group.all_reduce(total.new_full((1,), batch is not None)):
                break
            features, target = batch or (local[:0], total[:0, 0].long())
            p, classes, kept = self._counted_probabilities(features, target)
            lookup, present = Lookup.of(classes.masked_fill(~kept, NOBODY), NOBODY, self._classes_per_process, group)
            sums = total.new_zeros((len(present), self.feature_dim + 1))
            counted = torch.cat([p, kept.double()[:, None]], dim=1)
            lookup.give(sums.index_add_(0, lookup.target.masked_fill(~kept, 0), counted), total, group)
        self.class_means = self._as_dtensor((total[:, :-1] / total[:, -1:].clamp(min=1)).to(local.dtype), 1)
        return self.class_means

    # --------------------------------------------------------------------------------------------------------

    def _own(self, table: Tensor) -> Tensor:
        return _to_local(table).detach()

    def _backend_for(self, input: Tensor, target: Tensor) -> str:
        """The backend that runs; raises unless these arguments and settings can be computed."""
        _problem.check_batch(input, target, self.centroid_logits)
        _problem.check_range(target, self.num_classes, self.options.ignore_index)
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
        shards = self._way
        shard = None if logits.requires_grad else self._fixed_shard(input, prior, backend)
        return rows, logits, problem._replace(table=shard, shards=shards, class_prior=prior)

    @property
    def _way(self) -> Shards | FocusShards:
        kind = FocusShards if self.options.every_pair else Shards
        return kind(self._classes_per_process, self._first_class)

    def _fixed_shard(self, input: Tensor, prior: Tensor, backend: str) -> Shard:
        """What is known of fixed centroids, kept as in `NCMILoss._fixed_table`."""
        logits = self.centroid_logits
        # Operations on the DTensor move its counter, those on what its to_local() gives that of the rows. The rows of a
        # detached DTensor count for themselves: writing through them cannot be seen, as through `.data`.
        local = _to_local(logits)
        given = [] if self.class_prior is None else [self.class_prior]
        if any(t.is_inference() for t in given):  # which no version counter tells of
            wide = _problem.to_arithmetic_dtype(input, local, None, None)[1]
            return self._way.shard_of(wide, self.options, backend, prior)
        key = state_of(local, *given), self.options, backend, logits._version, input.dtype
        shard: Shard | None = self._table.find(key)
        if shard is None:
            with torch.inference_mode(False):  # a graph is to save it
                wide = _problem.to_arithmetic_dtype(input, local, None, None)[1]
                shard = self._way.shard_of(wide, self.options, backend, prior)
            self._table.keep(key, shard, local, *memory_of(*given))
        return shard


def _to_local(table: Any) -> Tensor:
    """The rows of a DTensor that this process has; differentiable."""
    local: Tensor = table.to_local()
    return local
