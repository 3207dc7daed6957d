"""NCMILoss over processes: one process's loss, gradients, centre and centroids, whatever the batches."""

import copy
import os
import pickle
import random
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ncmi_kernels import NCMILoss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")

C, M = 6, 9
SIZES = [5, 0, 3, 8]  # rows of each process: uneven, one without any
SIZES_OF_TWO = [8, 5]
IGNORED = 4
VARIANTS = [
    {"separation": separation, "ratio": ratio, "reduction": reduction}
    for separation in ("sample_to_centroid", "centroid_to_sample")
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "sum"))
]


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def batches(sizes, dtype=torch.float32, seed=0, ignored=IGNORED):
    """A batch for each process, and all of them in one; about one row in five is ignored."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(sizes), M, generator=generator, dtype=torch.float64) + torch.arange(M) / M
    target = torch.randint(C, (sum(sizes),), generator=generator)
    target[torch.rand(len(target), generator=generator) < 0.2] = ignored
    whole = features.to(dtype), target
    return list(zip(*(tensor.split(sizes) for tensor in whole), strict=True)), whole


def criterion_of(dtype, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    criterion = NCMILoss(C, M, dtype=dtype, **{"center_momentum": 0.5, **options})
    with torch.no_grad():
        criterion.centroid_logits.copy_(torch.randn(C, M, generator=generator, dtype=torch.float64))
    return criterion


def with_group(criterion):
    criterion = copy.deepcopy(criterion)
    criterion.process_group = dist.group.WORLD
    return criterion


def step(criterion, features, target):
    """The loss, its gradients by features and centroids, and what the step left of the centre."""
    features = features.detach().requires_grad_()
    loss = criterion(features, target)
    grads = torch.autograd.grad(loss, [features, criterion.centroid_logits], torch.tensor(3.0, dtype=loss.dtype))
    return loss.detach(), *grads, criterion.center.clone()


def same_on_all(tensor):
    """Whether every process has the same bits."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.detach().contiguous())
    return all(torch.equal(tensor.detach(), other) for other in every)


# ------------------------------------------------------------------------------------------------------------
# Against one process
# ------------------------------------------------------------------------------------------------------------


def check_step(sizes, options, dtype, input_dtype, tolerance):
    rank, size = dist.get_rank(), dist.get_world_size()
    local = criterion_of(dtype, ignore_index=IGNORED, **options)
    shared = with_group(local)
    for seed in range(3):  # the second and third move the centre; and another process is without rows
        each, whole = batches(sizes[seed:] + sizes[:seed], input_dtype, seed)
        features, target = each[rank]
        gradient_here = shared.centroid_gradient(features, target), local.centroid_gradient(*whole)
        loss, by_input, by_centroids, center = step(shared, features, target)
        expected_loss, expected_by_input, expected_by_centroids, expected_center = step(local, *whole)
        expected_here = expected_by_input.split([len(t) for _, t in each])[rank]
        dist.all_reduce(by_centroids)
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
        rounding = tolerance if by_input.dtype == dtype else torch.finfo(by_input.dtype).eps
        assert by_input.dtype == input_dtype
        if len(target):
            assert relative(by_input / size, expected_here) < rounding
        assert relative(by_centroids / size, expected_by_centroids) < tolerance
        assert relative(center, expected_center) < tolerance
        assert relative(*gradient_here) < tolerance
        assert torch.equal(shared.num_batches_tracked, local.num_batches_tracked)
        for tensor in (loss, center, gradient_here[0], by_centroids):
            assert same_on_all(tensor)


def check_steps(sizes):
    weight = torch.rand(C, generator=torch.Generator().manual_seed(2)) + 0.5
    for backend in ("cpu", "reference"):
        for options in VARIANTS:
            options = {**options, "backend": backend}
            check_step(sizes, options, torch.float64, torch.float64, 1e-12)
            check_step(sizes, {**options, "weight": weight, "temperature": 0.3}, torch.float64, torch.float64, 1e-12)
            if backend == "cpu":
                check_step(sizes, options, torch.float32, torch.float32, 1e-6)
                check_step(sizes, {**options, "weight": weight}, torch.float32, torch.bfloat16, 1e-6)
                check_step(sizes, {**options, "center_momentum": None}, torch.float32, torch.float32, 1e-6)
    check_step(sizes, {"activation": "softmax", "l2_normalize": False}, torch.float32, torch.float16, 1e-6)


@pytest.mark.parametrize("sizes", [SIZES_OF_TWO, SIZES], ids=["2", "4"])
def test_a_step_is_that_of_one_process_with_all_rows(sizes):
    processes.run(len(sizes), check_steps, sizes)
