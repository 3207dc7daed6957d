"""The running centre of a criterion: what it is for a batch, and what a batch makes of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops, _problem
from ncmi_kernels._group import Group
from ncmi_kernels._modes import jit_tracing, transforming
from ncmi_kernels._prediction import Predictor
from ncmi_kernels._problem import CenterUpdate


def _repeated() -> bool:
    """Whether torch.utils.checkpoint repeats a forward pass that has moved the centre: this is a backward pass.

    With use_reentrant=True the first one had gradients disabled, and moved nothing.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return False
    return bool(torch._C._current_autograd_node().name() != "CheckpointFunctionBackward")


class _Moved(NamedTuple):
    """The running centre after a batch, not committed yet."""

    center: Tensor  # [M]
    batches: Tensor  # [] int64, num_batches_tracked


class Centering(Predictor):
    """The part of :class:`NCMILoss` that moves the centre; that class makes the parameters and buffers."""

    num_batches_tracked: Tensor
    _group: Group | None
    _center_momentum: float | None

    def _tensor(self, name: str) -> Any:
        """A parameter or buffer; `nn.Module.__getattr__` takes half a microsecond to find it."""
        if name in self._buffers:
            return self._buffers[name]
        if name in self._parameters:
            return self._parameters[name]
        return getattr(self, name)  # as torch.nn.utils.parametrize has it

    def _center_for(
        self, center: Tensor | None, input: Tensor, target: Tensor, logits: Tensor, backend: str
    ) -> tuple[Tensor | None, CenterUpdate | None, _Moved | None]:
        """The centre to use in place of `center`, the running one; and what moves that.

        Either the operator `loss` does it, told how by the second value, or the third is to be committed once the loss
        is there. So a forward pass that fails has moved nothing.
        """
        momentum = self._center_momentum
        if center is None or momentum is None:
            return None, None, None
        if not (self.training and torch.is_grad_enabled()):
            # The graph keeps the centre, and a batch in training mode may move it before the backward pass.
            graph = torch.is_grad_enabled() and (input.requires_grad or logits.requires_grad)
            return center.clone() if graph else center, None, None
        if transforming():
            raise RuntimeError(
                "training: got True inside a torch.func transform, expected criterion.eval() or center_momentum=None: "
                "a transform cannot move the running centre"
            )
        if _repeated():
            return center, None, None
        compiling = torch.compiler.is_compiling()
        dtype, batches = center.dtype, self._tensor("num_batches_tracked")
        if (
            backend != "reference"
            and self._group is None
            and dtype is logits.dtype
            and (dtype is torch.float64 or (dtype is torch.float32 and input.dtype is not torch.float64))
            and center.is_contiguous()
        ):
            if not (self.options.every_pair or compiling or jit_tracing()):
                return center, (batches, momentum), None
            moved = _Moved(center.clone(), batches.clone())
            rows, classes = _problem.flatten(input.detach(), target)
            _ops.update_center_(
                moved.center,
                (moved.batches, momentum),
                rows,
                classes,
                self.num_classes,
                self.options.ignore_index,
                backend,
            )
        else:
            with torch.no_grad():
                moved = self._move_center(*_problem.flatten(input, target))
        return moved.center, None, moved

    def _move_center(self, rows: Tensor, classes: Tensor) -> _Moved:
        """What the operator update_center_ does, in PyTorch and without a host sync; over all processes of a group."""
        assert self.center_momentum is not None
        _problem.check_range(classes, self.num_classes, self.options.ignore_index)
        kept = (classes != self.options.ignore_index)[:, None]
        sums = torch.cat([torch.where(kept, rows, 0).sum(dim=0, dtype=torch.float64), kept.sum(dim=0)])
        if self._group is not None:
            self._group.all_reduce(sums)
        mean = sums[:-1] / sums[-1]
        moved = self.center_momentum * self.center.double() + (1 - self.center_momentum) * mean
        moved = torch.where(self.num_batches_tracked == 0, mean, moved).to(self.center.dtype)
        usable = moved.isfinite().all()
        return _Moved(torch.where(usable, moved, self.center), self.num_batches_tracked + usable)

    @torch.no_grad()
    def _commit_center(self, moved: _Moved) -> None:
        self.center.copy_(moved.center)
        self.num_batches_tracked.copy_(moved.batches)
