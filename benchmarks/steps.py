"""Steps of a criterion on the CPU, timed: what bench_loss.py and compare.py share.

compare.py runs this with older revisions of the package, so nothing here is theirs.
"""

import resource
import time

import torch
from cases import FORWARD, FULL, NO_GRAD
from torch import Tensor, nn

FAULTS = "page faults, "


def train_step(criterion: nn.Module, z: Tensor, y: Tensor) -> dict[str, float]:
    """A forward and backward step; gives both training modes."""
    _forget_gradients(criterion, z)
    before, start = _faults(), time.perf_counter_ns()
    loss = criterion(z, y)
    forward = time.perf_counter_ns() - start
    middle, start = _faults(), time.perf_counter_ns()
    loss.backward()
    del loss
    backward = time.perf_counter_ns() - start
    times = {FORWARD: forward / 1e3, FULL: (forward + backward) / 1e3}
    return {**times, FAULTS + FORWARD: middle - before, FAULTS + FULL: _faults() - before}


def no_grad_step(criterion: nn.Module, z: Tensor, y: Tensor) -> dict[str, float]:
    """A forward step without a graph."""
    _forget_gradients(criterion, z)
    with torch.no_grad():
        before, start = _faults(), time.perf_counter_ns()
        loss = criterion(z, y)
        del loss
        forward = time.perf_counter_ns() - start
    return {NO_GRAD: forward / 1e3, FAULTS + NO_GRAD: _faults() - before}


def _forget_gradients(criterion: nn.Module, z: Tensor) -> None:
    z.grad = None
    criterion.zero_grad(set_to_none=True)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
