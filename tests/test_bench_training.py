"""The benchmarks of a training step and of sharded classes: what they measure is a step, and the counts are right."""

import importlib.util
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import relative

from ncmi_kernels import available_backends
from ncmi_kernels._timing import Entry

if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("sklearn") is None:
    pytest.skip("the benchmarks need matplotlib and scikit-learn", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_parts
import bench_sharded
import bench_step
import records
from cases import TINY, Shape, batch

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ kernels")


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_steps_by_phase(tmp_path):
    path, figure = tmp_path / "step.csv", tmp_path / "step.png"
    arguments = ["--seconds", "0", "--threads", "1", "--tasks", "digits", "--shapes", "8x5x16"]
    assert bench_step.main([*arguments, "--csv", str(path), "--png", str(figure)]) == 0
    rows = records.read_rows(path, bench_step.Row)
    steps = {row.method: row for row in rows if row.task == "digits" and row.phase == "step"}
    assert list(steps) == list(bench_step.METHODS)
    for method, step in steps.items():
        phases = [row for row in rows if row.method == method and row.task == "digits" and row is not step]
        learns = method in ("NCMI, alternating", "NCMI, jointly")
        assert [row.phase for row in phases] == [*bench_step.PHASES[:-1], *bench_step.PHASES[-1:] * learns]
        assert sum(row.median_us for row in phases) == pytest.approx(step.median_us, rel=0.5)
        assert 0 < step.share < 1
    centroid_steps = [row for row in rows if row.task == "centroid step"]
    assert [row.method for row in centroid_steps] == list(bench_step.WAYS)
    assert centroid_steps[0].ratio == 1
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_share_and_ratio_are_of_the_same_round():
    """A machine that is four times slower in some rounds leaves both as they are."""
    phases = dict(zip(bench_step.PHASES, (10.0, 2.0, 3.0, 20.0, 5.0, 10.0), strict=True))
    for speeds in ((4, 1, 1), (4, 4, 1)):
        training, ours, other = (Entry(name) for name in ("NCMI, jointly", "CentroidSGD", "another"))
        for number, speed in enumerate(speeds):
            training.rounds[number] = bench_step.with_share({name: speed * time for name, time in phases.items()})
            ours.rounds[number], other.rounds[number] = {"step": 1.0 * speed}, {"step": 3.0 * speed}
        *_, step = bench_step.rows_of([training], bench_step.TASKS[0])
        assert (step.phase, step.share, step.median_us) == ("step", 0.3, 50 * sorted(speeds)[1])
        assert [row.ratio for row in bench_step.rows_of([ours, other], Shape(8, 5, 16))] == [1, 3]


def test_every_centroid_step_is_the_same_step():
    z, y = batch(TINY)
    moved = {}
    for name, way in bench_step.WAYS.items():
        stepper = way.build(TINY)
        before = stepper.criterion.centroid_logits.detach().clone()
        for _ in range(3):
            stepper.prepare(z, y)
            centre = stepper.criterion.center.clone()
            stepper(z, y)
            assert torch.equal(stepper.criterion.center, centre), "the centre moves in the network's step"
        moved[name] = stepper.criterion.centroid_logits.detach() - before
    expected = moved["PyTorch, autograd, SGD"]
    assert expected.abs().max() > 0
    for change in moved.values():
        assert relative(change, expected) < 1e-3


def test_parts_are_the_whole(tmp_path):
    path = tmp_path / "parts.csv"
    threads = torch.get_num_threads()
    bench_parts.main(["--threads", "1", "--shapes", "6x4x10", "--seconds", "0", "--csv", str(path)])
    torch.set_num_threads(threads)
    rows = records.read_rows(path, records.Row)
    for method in bench_parts.METHODS:
        times = {row.phase: row.median_us for row in rows if row.implementation == method}
        assert list(times) == [bench_parts.WHOLE, *bench_parts.PARTS, bench_parts.REST]
        assert (times["centroids"] > 0) == (method == bench_parts.METHODS[-1])  # learnt
        assert sum(times.values()) == pytest.approx(2 * times[bench_parts.WHOLE], rel=1e-4)


def test_every_operator_of_a_step_belongs_to_a_part():
    """What is counted as the rest is none of the package's."""
    of_parts = {name for operators in bench_parts.PARTS.values() for name in operators}
    for name, step in bench_parts.steps_of((300, 7000, 10), torch.device("cpu"), None).items():
        if name in bench_parts.METHODS:
            with torch.profiler.profile() as profiler:
                step.full()
            called = {event.key for event in profiler.key_averages()}
            assert {key for key in called if key.startswith("ncmi_kernels::") or "mm" in key} <= of_parts


def test_sharded_command_line(tmp_path):
    path = tmp_path / "sharded.csv"
    sizes = ["--processes", "2", "--classes", "10", "40", "--batch", "8", "--features", "16"]
    bench_sharded.main([*sizes, "--csv", str(path)])
    rows = records.read_rows(path, records.Row)
    assert [(row.C, row.method) for row in rows] == [(C, method) for C in (10, 40) for method in bench_sharded.METHODS]
    for row in rows:
        assert (row.processes, row.B, row.M) == (2, 8, 16)
        assert row.payload_bytes > 0
        assert row.loopback_bytes is None or row.loopback_bytes > row.payload_bytes
        assert row.milliseconds > 0


def test_training_moves_what_it_should():
    task = bench_step.TASKS[0]
    for method in bench_step.METHODS:
        training = bench_step.Training(task, method)
        weights = [p.clone() for p in training.network.parameters()]
        centroids = [p.clone() for p in training.criterion.parameters()]
        training.step()
        assert any(not torch.equal(a, b) for a, b in zip(weights, training.network.parameters(), strict=True))
        moved = any(not torch.equal(a, b) for a, b in zip(centroids, training.criterion.parameters(), strict=True))
        assert moved == (method in ("NCMI, alternating", "NCMI, jointly"))


def test_jointly_is_the_recipe_of_the_readme():
    """The centroids in a group of the network's optimiser, at a rate of their own and without weight decay."""
    training, expected = (bench_step.Training(bench_step.TASKS[0], "NCMI, jointly") for _ in range(2))
    groups = [
        {"params": expected.network.parameters(), "weight_decay": 5e-4},
        {"params": expected.criterion.parameters(), "lr": 0.1, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    for _ in range(3):
        training.step()
        optimizer.zero_grad()
        expected.criterion(expected.network(training.images), training.target).backward()
        optimizer.step()
    for part in ("network", "criterion"):
        both = (getattr(each, part).parameters() for each in (training, expected))
        for actual, wanted in zip(*both, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


def check_bytes():
    rank, size = dist.get_rank(), dist.get_world_size()
    group = bench_sharded.CountingGroup(dist.group.WORLD)
    # Cross-entropy is right, so what it sends is what one has to send.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, 2, 2, 5])
    whole = weight.clone().requires_grad_()
    loss = F.cross_entropy(features @ whole.T, target)
    by_features, by_weight = torch.autograd.grad(loss, [features, whole])
    cross_entropy = bench_sharded.ShardedCrossEntropy(7, 5, group)
    cross_entropy.weight = weight[4 * rank : 4 * (rank + 1)]
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    actual = cross_entropy(features.detach()[mine], target[mine])
    torch.testing.assert_close(actual[0], loss.detach(), rtol=1e-12, atol=0)
    assert relative(actual[1], by_features[mine]) < 1e-12
    assert relative(actual[2], by_weight[4 * rank : 4 * (rank + 1)]) < 1e-12

    # The counts: an all-reduce of 24 bytes, an all-to-all of one row of two to the other, an all-gather.
    bench_sharded.CountingGroup.sent = 0
    group.all_reduce(torch.zeros(3, dtype=torch.float64))
    assert bench_sharded.CountingGroup.sent == 2 * 24 * (size - 1) / size
    bench_sharded.CountingGroup.sent = 0
    group.all_to_all(torch.zeros(2, 4), [1, 1], [1, 1])
    assert bench_sharded.CountingGroup.sent == 16

    sent = {}
    for method in bench_sharded.METHODS:
        for classes in (40, 4000):
            step = bench_sharded.make_step(method, 16, classes, 32)
            step()
            bench_sharded.CountingGroup.sent = 0
            step()
            sent[method, classes] = group.all_reduce(torch.tensor([bench_sharded.CountingGroup.sent])).item() / size
    return sent


def test_bytes_do_not_grow_with_the_classes():
    sent = processes.run(2, check_bytes)[0]
    rows = 16 * 32 * 4 / 2  # half of a batch's own-class rows, B M float32, belong to the other process
    for method, most in zip(bench_sharded.METHODS, (1.6, 2.8, 8, 5), strict=True):
        few, many = sent[method, 40], sent[method, 4000]
        assert few <= many <= most * rows + 1500  # and sums over the classes, O(M)
    assert sent[bench_sharded.METHODS[1], 4000] > sent[bench_sharded.METHODS[0], 4000] + 0.5 * rows
