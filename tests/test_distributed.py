"""Criteria over processes: one process's loss, gradients, centre and centroids, whatever the batches."""

import copy
import os
import pickle
import signal
import time
from datetime import timedelta
from itertools import cycle
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import relative
from groups import (
    IGNORED,
    SEVERAL,
    SIZES,
    VARIANTS,
    WEIGHED,
    C,
    M,
    batches,
    close,
    criterion_of,
    own,
    pair,
    same_on_all,
    step,
    summed,
    with_group,
)
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ncmi_kernels import CentroidSGD, NCMILoss, _focus

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")

# A group shares out the rows; shards have classes of their own, too: even, uneven, and fewer than there are processes.
KINDS = [("group", 2), ("group", 4), ("shards", 2), ("shards", 4)]
CLASSES = {2: [2, 7], 4: [2, 7, 13]}
SEVERAL_FOCUSED = {"centroids_per_class": 3, "separation_focus": 3.0}
STEPS_TOGETHER = 20  # of training: every process has been without rows


# ------------------------------------------------------------------------------------------------------------
# Against one process
# ------------------------------------------------------------------------------------------------------------


def check_step(kind, classes, options, dtype, input_dtype, tolerance):
    rank, size = dist.get_rank(), dist.get_world_size()
    sizes = SIZES[size]
    shared, plain = pair(kind, classes, dtype, **options)
    # The second batch moves the centre, finds fixed centroids in the cache, and another process is without rows.
    for seed in range(2):
        each, whole = batches(sizes[seed:] + sizes[:seed], input_dtype, seed, classes=classes)
        if seed == 0:
            here = shared.centroid_gradient(*each[rank])  # the centre does not move in it
            close(here, plain.centroid_gradient(*whole), tolerance)
        loss, by_input, *by_centroids = step(shared, *each[rank])
        expected_loss, expected_by_input, *expected_by_centroids = step(plain, *whole)
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
        assert by_input.dtype == input_dtype
        rounding = tolerance if input_dtype == dtype else torch.finfo(input_dtype).eps
        close(by_input / size, expected_by_input.split([len(target) for _, target in each])[rank], rounding)
        assert len(by_centroids) == shared.centroid_logits.requires_grad
        for actual, expected in zip(map(summed, by_centroids), expected_by_centroids, strict=True):
            assert isinstance(actual, DTensor) == (kind == "shards")
            close(actual if kind == "shards" else actual / size, expected, tolerance)
        close(shared.center, plain.center, tolerance)
        assert torch.equal(shared.num_batches_tracked, plain.num_batches_tracked)
        for actual, expected in zip(shared.last_terms, plain.last_terms, strict=True):
            torch.testing.assert_close(actual, expected, rtol=max(tolerance, 1e-12), atol=0)
        if seed == 1:  # and of a batch that has been through the forward pass
            here = shared.centroid_gradient(*each[rank])
            close(here, plain.centroid_gradient(*whole), tolerance)
        assert same_on_all(loss, shared.center, *((here, *by_centroids) if kind == "group" else ()))


def check_steps_of_a_group():
    weight = torch.rand(C, generator=torch.Generator().manual_seed(2)) + 0.5
    for options in VARIANTS:
        for focus in (0.0, 5.0) if options["reduction"] == "mean" else (0.0,):
            options = {**options, "separation_focus": focus}
            reference = {**options, "backend": "reference", "weight": weight}
            check_step("group", C, reference, torch.float64, torch.float64, 1e-12)
            check_step("group", C, options, torch.float64, torch.float64, 1e-12)
            single = {**options, "weight": weight}
            if focus:
                check_step("group", C, single, torch.float64, torch.float64, 1e-12)
                check_step("group", C, single, torch.float32, torch.bfloat16, 5e-6)
            else:
                check_step("group", C, single, torch.float32, torch.float32, 1e-6)
    check_step("group", C, {"weight": weight, "center_momentum": None}, torch.float32, torch.bfloat16, 1e-6)
    check_step("group", C, {"activation": "softmax", "l2_normalize": False}, torch.float32, torch.float16, 1e-6)


def check_steps_of_shards():
    weight_of = {n: torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.5 for n in (2, 7, 13)}
    for classes in CLASSES[dist.get_world_size()]:
        for index, options in enumerate(VARIANTS):
            learn = index % 2 == 0
            double = {**options, "learn_centroids": learn}
            check_step("shards", classes, double, torch.float64, torch.float64, 1e-11)
            single = {**options, "learn_centroids": not learn, "weight": weight_of[classes]}
            check_step("shards", classes, single, torch.float32, torch.float32, 2e-6)
        check_step("shards", classes, {"center_momentum": None}, torch.float32, torch.bfloat16, 2e-6)
        softmax = {"activation": "softmax", "l2_normalize": False}
        check_step("shards", classes, softmax, torch.float32, torch.float32, 2e-6)


def check_steps_of_weighed_shards():
    size = dist.get_world_size()
    weight = torch.rand(13, generator=torch.Generator().manual_seed(2)) + 0.5
    cases = [*zip(cycle(CLASSES[size]), WEIGHED), *zip(cycle((4, 8, 4)), SEVERAL)]
    for index, (classes, options) in enumerate(cases):
        for rows in (256, 4):  # in a tile
            _focus.tile_rows = lambda _, rows=rows: rows
            options = {**options, "learn_centroids": (index // 2 + rows // 256) % 2 == 0}
            if index % 2:
                check_step("shards", classes, options, torch.float64, torch.float64, 1e-11)
            else:
                options["weight"] = weight[:classes]
                check_step("shards", classes, options, torch.float32, torch.float32, 5e-6)
    for number in (0, 3):
        check_step("shards", 8, {**SEVERAL[number], "center_momentum": None}, torch.float32, torch.bfloat16, 5e-6)
        check_step("shards", 8, {**SEVERAL[number], "activation": "softmax"}, torch.float32, torch.float16, 5e-6)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_a_step_is_that_of_one_process_with_all_rows_and_classes(kind, size):
    processes.run(size, check_steps_of_a_group if kind == "group" else check_steps_of_shards)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_in_which_every_sample_and_centroid_have_a_weight(size):
    processes.run(size, check_steps_of_weighed_shards)


def check_special_batches(kind, classes, more):
    rank, size = dist.get_rank(), dist.get_world_size()

    # Without a reduction the losses stay the process's own; the centre is that of all rows.
    shared, plain = pair(kind, classes, torch.float64, ratio="sample", reduction="none", ignore_index=-7, **more)
    each, whole = batches(SIZES[2], torch.float64, ignored=-7, classes=classes)
    rows = slice(0, 8) if rank == 0 else slice(8, 13)
    upstream = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    loss, by_input, by_centroids = step(shared, *each[rank], upstream[rows])
    expected_loss, expected_by_input, expected_by_centroids = step(plain, *whole, upstream)
    close(loss, expected_loss[rows], 1e-11)
    close(by_input, expected_by_input[rows], 1e-11)
    close(summed(by_centroids), expected_by_centroids, 1e-11)
    close(shared.center, plain.center, 1e-11)
    if kind == "shards":
        close(shared.eval()(*each[rank]), plain.eval()(*each[rank]), 1e-11)
        for actual, expected in zip(shared.last_terms, plain.last_terms, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)

    # [B, M, d1]: the rows are spread over all positions but the second.
    shared, plain = pair(kind, classes, torch.float64, **more)
    image = torch.randn(4, M, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = torch.randint(classes, (4, 5), generator=torch.Generator().manual_seed(4))
    loss, by_input, _ = step(shared, image[rank::size], target[rank::size])
    expected_loss, expected_by_input, _ = step(plain, image, target)
    tolerance = 1e-12 if kind == "group" else 1e-11
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    close(by_input / size, expected_by_input[rank::size], tolerance)
    close(shared.center, plain.center, 1e-12)

    # No row anywhere: as one process. And one NaN: in the loss of all, and not in the centre.
    before = shared.center.clone()
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "sum")):
        shared.ratio, shared.reduction = ("batch", "mean") if ratio == "batch" else ("sample", reduction)
        empty = shared(torch.zeros(rank, M).double(), torch.full((rank,), IGNORED))
        assert empty.isnan() if reduction == "mean" else empty == 0
        ignored = torch.randn(2, M).double().requires_grad_()
        shared(ignored, torch.full((2,), IGNORED)).backward()
        assert not ignored.grad.any()
        assert not own(shared.centroid_logits.grad).any()
        poisoned = image[0].T.clone()
        poisoned[0, 0] = torch.nan if rank == 0 else 0
        assert shared(poisoned, torch.zeros(5, dtype=torch.int64)).isnan()
        assert torch.equal(shared.center, before)


@pytest.mark.parametrize(
    ("kind", "classes", "more"),
    [("group", 7, {}), ("shards", 7, {}), ("shards", 7, {"separation_focus": 3.0}), ("shards", 8, SEVERAL_FOCUSED)],
)
def test_no_reduction_more_dimensions_no_rows_and_nan(kind, classes, more):
    processes.run(2, check_special_batches, kind, classes, more)


def check_collectives():
    """Two in a training step, none in eval mode, where each process has another number of batches."""
    rank = dist.get_rank()
    criterion = with_group(criterion_of(torch.float32))
    counted = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (counted.append(tensor.numel()), all_reduce(tensor, **options))[1]
    features, target = batches(SIZES[2])[0][rank]
    features.requires_grad_()
    criterion(features, target.clamp(max=3)).backward()
    assert counted == [M + 1, 4]
    criterion.ratio, criterion.center_momentum = "sample", None
    criterion(features, target).backward()
    assert counted == [M + 1, 4, 4]
    for _ in range(rank):
        criterion.eval()(features, target).backward()
    assert len(counted) == 3


def test_number_of_collectives():
    processes.run(2, check_collectives)


# ------------------------------------------------------------------------------------------------------------
# Training under DistributedDataParallel
# ------------------------------------------------------------------------------------------------------------


def check_training(sizes):
    rank = dist.get_rank()
    torch.manual_seed(0)
    network = nn.Linear(M, M, dtype=torch.float64)
    criterion = criterion_of(torch.float64, ignore_index=IGNORED)
    shared = with_group(criterion)
    alone = [network, criterion]
    together = [DistributedDataParallel(copy.deepcopy(network)), DistributedDataParallel(shared)]
    optimizers = [
        torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.5, momentum=0.9)
        for modules in (alone, together)
    ]
    for iteration in range(STEPS_TOGETHER):
        sizes = sizes[1:] + sizes[:1]
        each, whole = batches(sizes, torch.float64, seed=iteration)
        for (model, loss_of), optimizer, (features, target) in zip(
            (alone, together), optimizers, (whole, each[rank]), strict=True
        ):
            optimizer.zero_grad()
            loss_of(model(features), target).backward()
            optimizer.step()
        assert same_on_all(shared.center, shared.centroid_logits, shared.num_batches_tracked)
    moved = (criterion.centroid_logits - criterion_of(torch.float64).centroid_logits).norm().item()
    assert moved > 0.1
    for tensor, expected in (
        (shared.center, criterion.center),
        (shared.centroid_logits, criterion.centroid_logits),
        (together[0].module.weight, network.weight),
    ):
        assert relative(tensor, expected) < 1e-10


def check_alternating(sizes):
    rank = dist.get_rank()
    for backend in ("cpu", "reference"):
        criterion = criterion_of(torch.float32, ignore_index=IGNORED, backend=backend)
        shared = with_group(criterion)
        start = criterion.centroid_logits.detach().clone()
        optimizers = [CentroidSGD(each, 5.0, 0.9, 1e-4, nesterov=True) for each in (criterion, shared)]
        for iteration in range(STEPS_TOGETHER):
            sizes = sizes[1:] + sizes[:1]
            each, whole = batches(sizes, seed=iteration)
            for loss_of, optimizer, batch in zip((criterion, shared), optimizers, (whole, each[rank]), strict=True):
                loss_of(*batch)
                optimizer.step(*batch)
            assert same_on_all(shared.center, shared.centroid_logits)
        assert (criterion.centroid_logits - start).norm() > 0.1
        assert relative(shared.centroid_logits, criterion.centroid_logits) < 1e-5
        assert relative(shared.center, criterion.center) < 1e-6


def check_broadcast():
    """DDP sends rank 0's centroids to the others, which have used theirs: what was kept of those does not count."""
    rank = dist.get_rank()
    criterion = criterion_of(torch.float64, seed=rank, learn_centroids=False).eval()
    _, (features, target) = batches(SIZES[2], torch.float64, ignored=0)
    before = criterion(features, target)
    assert torch.equal(criterion(features, target), before)
    model = nn.ModuleDict({"network": nn.Linear(M, M, dtype=torch.float64), "criterion": criterion})
    DistributedDataParallel(model)
    after = criterion(features, target)
    assert torch.equal(after, criterion_of(torch.float64, seed=0, learn_centroids=False).eval()(features, target))
    assert torch.equal(after, before) == (rank == 0)
    assert same_on_all(after)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_alternating_training_is_that_of_one_process(sizes):
    processes.run(len(sizes), check_alternating, sizes)


def test_broadcast_centroids_count():
    processes.run(2, check_broadcast)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_training_is_that_of_one_process(sizes):
    """And centre and centroids are the same bits on all processes after each step."""
    processes.run(len(sizes), check_training, sizes)


# ------------------------------------------------------------------------------------------------------------
# What fails
# ------------------------------------------------------------------------------------------------------------


def fail_beside(how):
    """Process 1 fails before the third step; process 0 gives the error that it gets."""
    features, target = batches([8])[1]
    criterion = criterion_of(torch.float32)
    criterion.process_group = dist.new_group(timeout=timedelta(seconds=2 if how == "hangs" else 60))
    for _ in range(2):
        criterion(features, target)
    if dist.get_rank() == 1:
        dist.barrier()
        if how == "hangs":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    start = time.monotonic()
    try:
        criterion(features, target)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("no error")


@pytest.mark.parametrize(("how", "expected"), [("dies", "onnection"), ("hangs", "imed out")])
def test_a_process_that_fails_is_an_error_in_the_others(how, expected):
    (message, seconds), failed = processes.run(2, fail_beside, how, enough=1 if how == "hangs" else 2)
    assert failed is None
    assert expected in message
    assert seconds < 30


def refused(exception, function, *parts):
    with pytest.raises(exception) as caught:
        function()
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value


def check_refused():
    refused(TypeError, lambda: NCMILoss(C, process_group="world"), "process_group: got str, expected a torch.distr")
    other = dist.new_group([0])
    if dist.get_rank() == 1:
        refused(ValueError, lambda: NCMILoss(C, process_group=other), "process_group: got a group without this process")
    criterion = with_group(criterion_of(torch.float32))
    features, target = batches(SIZES[2])[0][dist.get_rank()]
    features.requires_grad_()
    loss = criterion(features, target.clamp(max=3))
    refused(RuntimeError, lambda: torch.autograd.grad(loss, features, create_graph=True), "create_graph: got True")
    # What is communicated has no tangents: they would be of this process alone.
    for backend in (None, "reference"):
        criterion.backend, criterion.center_momentum = backend, None
        plain, ones, classes = features.detach(), torch.ones_like(features), target.clamp(max=3)

        def of(features, classes=classes):
            return criterion(features, classes)

        def dual(of=of, plain=plain, ones=ones):
            with forward_ad.dual_level():
                return of(forward_ad.make_dual(plain, ones))

        parts = "process_group: got several processes within", "expected None"
        refused(RuntimeError, dual, *parts)
        refused(RuntimeError, lambda of=of, plain=plain, ones=ones: torch.func.jvp(of, (plain,), (ones,)), *parts)
        refused(RuntimeError, lambda of=of, plain=plain: torch.func.grad(of)(plain), *parts)
    dist.barrier()
    dist.destroy_process_group()
    refused(RuntimeError, lambda: NCMILoss(C, process_group=criterion.process_group), "not initialized")


def test_what_is_refused():
    processes.run(2, check_refused)


def check_several_upstream_gradients():
    upstream = torch.tensor([1.0, -2.0, 0.5])
    for options in ({}, {"separation_focus": 5.0}, {"ratio": "sample"}, {"backend": "reference"}):
        criterion = with_group(criterion_of(torch.float32))
        for name, value in options.items():
            setattr(criterion, name, value)
        features, target = batches(SIZES[2])[0][dist.get_rank()]
        leaves = features.float().requires_grad_(), criterion.centroid_logits.requires_grad_()
        loss = criterion(leaves[0], target.clamp(max=3))
        each = [torch.autograd.grad(loss, leaves, one, retain_graph=True) for one in upstream]
        at_once = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
        for a, *e in zip(at_once, *each, strict=True):
            assert relative(a, torch.stack(e)) < 1e-6


def test_several_upstream_gradients_at_once():
    processes.run(2, check_several_upstream_gradients)


def check_copies():
    criterion = with_group(criterion_of(torch.float32))
    assert copy.deepcopy(criterion).process_group is criterion.process_group
    assert "process_group of 1" in repr(criterion)
    assert not any("group" in key for key in criterion.state_dict())
    refused(RuntimeError, lambda: pickle.dumps(criterion), "process_group: got a module", "state_dict()")
    criterion.process_group = None
    assert pickle.loads(pickle.dumps(criterion)).process_group is None


def test_copies_and_checkpoints():
    processes.run(1, check_copies)


# ------------------------------------------------------------------------------------------------------------
# Killed and resumed
# ------------------------------------------------------------------------------------------------------------

STEPS = 9


def train(directory, kill_at=None):
    """STEPS steps with a checkpoint after each, from the last one that every process has in `directory`.

    In step `kill_at` the last process is killed. Returns the losses of all steps and the bytes of the final weights.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    paths = [[Path(directory) / f"step{n}-rank{r}.pt" for r in range(size)] for n in range(STEPS + 1)]
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(M, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, M))
    criterion = NCMILoss(C, M, process_group=dist.group.WORLD if size > 1 else None, center_momentum=0.9)
    model, loss_of = (network, criterion) if size == 1 else map(DistributedDataParallel, (network, criterion))
    parameters = [*network.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sampler = torch.utils.data.DistributedSampler(range(24), num_replicas=size, rank=rank)
    samples = torch.randn(24, M, generator=torch.Generator().manual_seed(0))

    losses = []
    stateful = [network, criterion, optimizer, scheduler]
    done = max((n for n in range(STEPS + 1) if all(path.exists() for path in paths[n])), default=None)
    if done is not None:
        checkpoint = torch.load(paths[done][rank])
        losses = checkpoint["losses"]
        for part, state in zip(stateful, checkpoint["states"], strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(checkpoint["rng"])
    while len(losses) < STEPS:
        epoch, batch = divmod(len(losses), -(-len(sampler) // 5))
        sampler.set_epoch(epoch)
        rows = torch.tensor(list(sampler)[5 * batch : 5 * batch + 5])
        features = samples[rows] + 0.1 * torch.randn(len(rows), M)
        optimizer.zero_grad()
        loss = loss_of(model(features), rows % C)
        if len(losses) == kill_at and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            loss.backward()
        except RuntimeError:
            assert len(losses) == kill_at
            return None
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        checkpoint = {
            "losses": losses,
            "states": [part.state_dict() for part in stateful],
            "rng": torch.get_rng_state(),
        }
        path = paths[len(losses)][rank]
        torch.save(checkpoint, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return losses, [tensor.detach().numpy().tobytes() for tensor in (*parameters, criterion.center)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_killed_and_resumed_has_the_bits_of_an_uninterrupted_one(size, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    expected = processes.run(size, train, uninterrupted)
    assert len(set(expected[0][0])) == STEPS
    killed = tmp_path / "killed"
    killed.mkdir()
    # One run, killed again and again: before any checkpoint, within an epoch and at its end.
    for kill_at in (0, 2, 3, 8):
        assert processes.run(size, train, killed, kill_at) == [None] * size
    assert processes.run(size, train, killed) == expected
