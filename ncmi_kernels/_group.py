"""The processes that share a loss, and every collective between them."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Renamed in torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Group:
    """A process group as a module holds it. A deep copy is the group itself, and it cannot be pickled.

    Every collective of this package goes through here.
    """

    def __init__(self, process_group: Any) -> None:
        """Raises the errors that `NCMILoss` documents for `process_group`."""
        if not dist.is_available():
            raise RuntimeError(
                "process_group: got a group, expected None: this torch is built without torch.distributed"
            )
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: got a group without this process, expected one that it is a member of")
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group: got {type(process_group).__name__}, expected a torch.distributed.ProcessGroup or None"
            )
        if not dist.is_initialized():
            raise RuntimeError(
                "process_group: got a group of a torch.distributed that is not initialized, expected a call of "
                "torch.distributed.init_process_group first"
            )
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, which becomes its sum over the processes: the same bits on each."""
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def least(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, which becomes its minimum over the processes."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.process_group)
        return tensor

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """The rows that the others send here, in their order; `send` and `receive` count those to and from each."""
        received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        dist.all_to_all_single(received, tensor.contiguous(), receive, send, group=self.process_group)
        return received

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each process; their numbers may differ."""
        counts = tensor.new_zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(tensor)
        sizes = self.all_reduce(counts).tolist()
        padded = F.pad(tensor, (0, 0, 0, max(sizes) - len(tensor)))
        every = tensor.new_empty((self.size * len(padded), *padded.shape[1:]))
        _all_gather(every, padded, group=self.process_group)
        return [rows[:size] for rows, size in zip(every.view(self.size, *padded.shape), sizes, strict=True)]

    def __deepcopy__(self, memo: Any) -> "Group":
        return self

    def __reduce__(self) -> Any:
        # Dropped in silence, it would come back as another loss: that of each process's own batch.
        raise RuntimeError(
            "process_group: got a module with a process group, which cannot be pickled; expected its state_dict(), or "
            "process_group = None first"
        )
