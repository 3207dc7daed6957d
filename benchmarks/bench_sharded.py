"""Bytes that a process sends in a training step with the classes shared out over processes, as the classes grow.

    python benchmarks/bench_sharded.py [--csv FILE] [--processes 4] [--classes 1000 ...]

ShardedNCMILoss, with fixed and with learnt centroids, and with a focus, beside a softmax cross-entropy whose linear
head is shared out by classes. The processes are started here and talk through gloo on this machine.

Two counts a step, both means over the processes and the steps:
- payload: what is handed to the collectives, as the usual algorithms send it. An all-reduce of n bytes over N
  processes: 2 n (N - 1) / N (ring). An all-to-all: what is for others. An all-gather of n bytes: n (N - 1). The
  reduce-scatter of cross-entropy is an all-to-all and a sum.
- loopback: what the kernel counted on the loopback device, with headers, acknowledgements and gloo's own messages, over
  the number of processes (Linux, and where nothing else uses it).

Cross-entropy in this form (each process has C / N rows of the head): all features are gathered on every process, which
has the logits of all rows for its classes; the maximum, the sum of exponentials and the logit of the target are reduced
by row; the gradient by the features is reduced to the process that they came from.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import at_least, positive
from devices import describe_machine
from records import MACHINE, Row, pivot
from runner import arguments_of, measure_all
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from ncmi_kernels import ShardedNCMILoss
from ncmi_kernels._group import Group
from ncmi_kernels._tables import show

CLASSES = (1_000, 10_000, 100_000, 1_000_000)
STEPS = 3
METHODS = ("NCMI, fixed centroids", "NCMI, learnt centroids", "NCMI with a focus, learnt centroids", "cross-entropy")


COLUMNS = (*MACHINE, "processes", "B", "C", "M", "method", "payload_bytes", "loopback_bytes", "milliseconds")


class CountingGroup(Group):
    """Counts the payload of the collectives that this process takes part in."""

    sent = 0.0

    def all_reduce(self, tensor: Tensor) -> Tensor:  # noqa: D102
        CountingGroup.sent += 2 * tensor.nbytes * (self.size - 1) / self.size
        return super().all_reduce(tensor)

    def least(self, tensor: Tensor) -> Tensor:  # noqa: D102
        CountingGroup.sent += 2 * tensor.nbytes * (self.size - 1) / self.size
        return super().least(tensor)

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int]) -> Tensor:  # noqa: D102
        bytes_a_row = tensor.nbytes / max(1, len(tensor))
        CountingGroup.sent += bytes_a_row * (sum(send) - send[self.rank])
        return super().all_to_all(tensor, send, receive)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:  # noqa: D102
        CountingGroup.sent += tensor.nbytes * (self.size - 1)  # and the counts, an all-reduce
        return super().all_gather(tensor)


class ShardedCrossEntropy:
    """cross_entropy(features @ weight.T, target) over the rows of all processes, each with C / N rows of `weight`."""

    def __init__(self, classes: int, columns: int, group: Group) -> None:
        self.group = group
        self.rows = -(-classes // group.size)
        self.first = min(classes, group.rank * self.rows)
        generator = torch.Generator().manual_seed(group.rank)
        self.weight = 0.01 * torch.randn(min(self.rows, classes - self.first), columns, generator=generator)

    def __call__(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its gradients by this process's features and weight, both of the mean over all rows."""
        group = self.group
        every = group.all_gather(features)
        sizes = [len(each) for each in every]
        every_target = torch.cat(group.all_gather(target[:, None])).flatten() - self.first
        gathered = torch.cat(every)
        logits = gathered @ self.weight.T
        largest = -group.least(-logits.amax(dim=1))  # keeps the exponentials in range
        mine = (every_target >= 0) & (every_target < len(self.weight))
        rows = mine.nonzero().flatten()
        logits -= largest[:, None]
        own = torch.zeros_like(largest)
        own[rows] = logits[rows, every_target[rows]]
        p = logits.exp_()
        sums = group.all_reduce(torch.stack([p.sum(dim=1), own]))
        loss = (sums[0].log() - sums[1]).mean()
        p /= sums[0][:, None]
        p[rows, every_target[rows]] -= 1
        p /= len(gathered)
        received = group.all_to_all(p @ self.weight, sizes, [len(features)] * group.size)
        return loss, received.view(group.size, *features.shape).sum(dim=0), p.T @ gathered


# ------------------------------------------------------------------------------------------------------------


def loopback_bytes() -> int | None:
    """What the loopback device has sent so far."""
    devices = Path("/proc/net/dev")
    if not devices.exists():
        return None
    lines = [line.split(":") for line in devices.read_text().splitlines() if ":" in line]
    return next((int(counts.split()[8]) for name, counts in lines if name.strip() == "lo"), None)


def make_step(method: str, B: int, C: int, M: int) -> Callable[[], object]:
    """One training step of the loss, on features of this process's own."""
    group = CountingGroup(dist.group.WORLD)
    generator = torch.Generator().manual_seed(1000 + group.rank)
    features, target = torch.randn(B, M, generator=generator), torch.randint(C, (B,), generator=generator)
    if method == "cross-entropy":
        cross_entropy = ShardedCrossEntropy(C, M, group)
        return lambda: cross_entropy(features, target)
    mesh = init_device_mesh("cpu", (group.size,))
    options = {"learn_centroids": "learnt" in method, "separation_focus": 5.0 if "focus" in method else 0.0}
    criterion = ShardedNCMILoss(C, M, device_mesh=mesh, **options)
    criterion._group = group

    def step() -> None:
        criterion.zero_grad()
        criterion(features.clone().requires_grad_(), target).backward()

    return step


def work(rank: int, size: int, store: str, B: int, C: int, M: int, results: Any) -> None:
    """What each process does; the first one reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for method in METHODS:
        step = make_step(method, B, C, M)
        step()
        dist.barrier()
        CountingGroup.sent, before, start = 0.0, loopback_bytes(), time.perf_counter()
        for _ in range(STEPS):
            step()
        dist.barrier()
        seconds, after = time.perf_counter() - start, loopback_bytes()
        sent = torch.tensor([CountingGroup.sent])
        dist.all_reduce(sent)
        loopback = None if after is None or before is None else round((after - before) / size / STEPS)
        if rank == 0:
            found = {"payload_bytes": round(sent.item() / size / STEPS), "loopback_bytes": loopback}
            results.put({"method": method, **found, "milliseconds": 1e3 * seconds / STEPS})
    # The interpreter does not end: DTensor keeps gloo's threads past destroy_process_group, and one that lets go of a
    # tensor then waits for an interpreter that is gone, which aborts the process (pytorch/pytorch#179291).
    dist.barrier()
    os._exit(0)


def measure(C: int, seconds: float, processes: int, B: int, M: int) -> list[Row]:
    """A row for each method with so many classes; a few steps, whatever the time."""
    results = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        spawn(work, (processes, str(Path(directory) / "store"), B, C, M, results), nprocs=processes)
    return [Row(processes=processes, B=B, C=C, M=M, **results.get()) for _ in METHODS]


def cell(row: Row) -> str:
    """KiB of payload, and in brackets what the kernel counted."""
    loopback = "" if row.loopback_bytes is None else f" ({row.loopback_bytes / 1024:.0f})"
    return f"{(row.payload_bytes or 0) / 1024:.0f}{loopback}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = arguments_of(__doc__)
    parser.add_argument("--processes", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--classes", type=at_least(2), nargs="+", default=CLASSES, help="(default: 1e3 to 1e6)")
    parser.add_argument("--batch", type=positive, default=64, help="rows of each process (default: %(default)s)")
    parser.add_argument("--features", type=at_least(2), default=128, help="M (default: %(default)s)")
    options = parser.parse_args(arguments)
    sizes = partial(measure, processes=options.processes, B=options.batch, M=options.features)
    names, lines = pivot(
        measure_all(options.classes, sizes, options, COLUMNS, describe_machine()),
        lambda row: (row.processes, row.shape),
        "method",
        cell,
    )
    show(["processes", "B, C, M; KiB a step", *names], lines)


if __name__ == "__main__":
    main()
