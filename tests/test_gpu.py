"""What only a GPU can show of the "triton" and "cuda" backends; test_accuracy.py compares their numbers with float64.

A backend that cannot run here is skipped with its reason. With its name in NCMI_REQUIRE_BACKENDS (separated by
commas) that is a failure instead: `make gpu-report` must not pass because nothing was tested.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REQUIRED, relative
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss, _plain, _timing, available_backends, ncmi_loss, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_gpu
from cases import LITERAL, MEMORY_SHAPE, SMALL_SHAPES, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED, reason="torch finds no CUDA device"),
]

RATIOS = ("batch", "sample")
HALF_AND_SINGLE = (torch.bfloat16, torch.float32)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = available_backends()[request.param]
    if reason is None:
        return request.param
    if request.param in REQUIRED:
        pytest.fail(f"{request.param} is in NCMI_REQUIRE_BACKENDS and cannot run: {reason}")
    pytest.skip(reason)


def problem(rows, classes, columns, dtype=torch.float32, device="cuda"):
    """Features that require a gradient, and targets."""
    z = torch.randn(rows, columns).to(device, dtype).requires_grad_()
    return z, torch.randint(classes, (rows,)).to(device)


def step(criterion, z, y):
    """Loss and gradients of one step; the running centre moves."""
    loss = criterion(z, y)
    wanted = [z, *(each for each in criterion.parameters() if each.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def same_bits(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, e)


# ------------------------------------------------------------------------------------------------------------
# Graphs, compilation, autocast
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("focus", [0.0, 10.0])
def test_a_captured_training_step_gives_the_bits_of_an_eager_one(backend, ratio, learn, dtype, focus):
    """Forward, backward and the optimiser's step in one graph; the features are what is trained."""
    start, _ = problem(96, 10, 200, dtype)
    targets = torch.randint(10, (9, 96), device="cuda")
    options = {"ratio": ratio, "separation_focus": focus, "learn_centroids": learn}
    fresh = NCMILoss(10, 200, backend=backend, device="cuda", **options)

    def train(graphed):
        criterion = copy.deepcopy(fresh)
        z = start.detach().clone().requires_grad_()
        y = targets[0].clone()
        last = torch.zeros((), device="cuda")
        wanted = [z, *(each for each in criterion.parameters() if each.requires_grad)]
        optimizer = torch.optim.SGD(wanted, lr=0.5, momentum=0.9)

        def train_step():
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(z, y)
            loss.backward()
            optimizer.step()
            last.copy_(loss.detach())

        losses = []
        graph = None
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # as the steps before a capture have to be
            for number, target in enumerate(targets):
                y.copy_(target)
                if graphed and number == 3:
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        train_step()
                if graph is None:
                    train_step()
                else:
                    graph.replay()
                losses.append(last.clone())
        torch.cuda.synchronize()
        return [torch.stack(losses), z.detach(), criterion.centroid_logits.detach(), criterion.center]

    expected = train(graphed=False)
    assert len(expected[0].unique()) == len(targets), "each step should change the loss"
    same_bits(train(graphed=True), expected)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_captured_step_of_a_network_under_autocast(backend, ratio):
    """Network, criterion, clipping and the optimiser's step in one graph, in bfloat16."""
    x, y = torch.randn(9, 96, 32, device="cuda"), torch.randint(10, (9, 96), device="cuda")
    fresh = nn.ModuleList([nn.Linear(32, 64, device="cuda"), NCMILoss(10, 64, ratio=ratio, backend=backend)]).cuda()

    def train(graphed):
        network, criterion = modules = copy.deepcopy(fresh)
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.5, momentum=0.9)
        static_x, static_y = x[0].clone(), y[0].clone()

        def train_step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):  # as a capture wants it
                loss = criterion(network(static_x), static_y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 0.1)
            optimizer.step()

        graph = None
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for number in range(len(x)):
                static_x.copy_(x[number])
                static_y.copy_(y[number])
                if graphed and number == 3:
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        train_step()
                if graph is None:
                    train_step()
                else:
                    graph.replay()
        torch.cuda.synchronize()
        assert criterion.num_batches_tracked.item() == len(x)
        return [p.detach() for p in modules.parameters()] + [criterion.center]

    same_bits(train(graphed=True), train(graphed=False))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_compiles_without_graph_breaks(backend, ratio, learn, dtype):
    torch.compiler.reset()
    eager = NCMILoss(10, 100, ratio=ratio, learn_centroids=learn, backend=backend, device="cuda")
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    for _ in range(2):
        z, y = problem(48, 10, 100, dtype)
        for actual, expected in zip(step(compiled, z, y), step(eager, z, y), strict=True):
            assert actual.dtype is expected.dtype
            # A half-precision gradient may be rounded before or after it meets the upstream gradient.
            assert relative(actual, expected) < (1e-2 if actual.dtype is torch.bfloat16 else 1e-5)
        assert relative(other.center, eager.center) < 1e-6
    assert other.num_batches_tracked.item() == 2


def test_under_autocast(backend):
    layer = nn.Linear(32, 64, device="cuda")
    criterion = NCMILoss(10, 64, backend=backend, device="cuda").eval()
    x, y = torch.randn(48, 32, device="cuda"), torch.randint(10, (48,), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features = layer(x)
        assert features.dtype is torch.bfloat16
        loss = criterion(features, y)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, criterion(features, y)), "autocast should change nothing inside the loss"
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------------------
# Devices, streams, host
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("ratio", RATIOS)
def test_second_device(backend, ratio):
    """With the first one current: kernels have to go where the tensors are."""
    criterion = NCMILoss(10, 100, ratio=ratio, backend=backend, device="cuda:0")
    z, y = problem(48, 10, 100, device="cuda:0")
    expected = step(copy.deepcopy(criterion), z, y)
    assert torch.cuda.current_device() == 0
    there = criterion.to("cuda:1")
    results = step(there, z.detach().to("cuda:1").requires_grad_(), y.to("cuda:1"))
    for actual, reference_ in zip(results, expected, strict=True):
        assert actual.device == torch.device("cuda:1")
        assert relative(actual.cpu(), reference_.cpu()) < 1e-6
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("learn", [False, True])
def test_the_current_stream_is_used(backend, ratio, learn):
    """The features arrive late on a stream of their own: a kernel on any other stream would read what was there."""
    criterion = NCMILoss(10, 300, ratio=ratio, learn_centroids=learn, backend=backend, device="cuda")
    z, y = problem(64, 10, 300)
    expected = step(copy.deepcopy(criterion), z, y)
    late = z.detach().clone()
    slot = torch.zeros_like(late).requires_grad_()
    other = copy.deepcopy(criterion)
    step(copy.deepcopy(criterion), slot, y)  # loads and compiles what would else take its time
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            slot.copy_(late)
        results = step(other, slot, y)
    assert not stream.query(), "the device should still be waiting"
    stream.synchronize()
    same_bits(results, expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("focus", [0.0, 10.0])
def test_the_host_never_waits(backend, ratio, learn, dtype, focus):
    options = {"ratio": ratio, "separation_focus": focus, "learn_centroids": learn}
    criterion = NCMILoss(10, 300, backend=backend, device="cuda", **options)
    z, y = problem(64, 10, 300, dtype)
    step(criterion, z, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            z.sum().item()
        for upstream in (1.0, 0.5):
            loss = criterion(z, y)
            wanted = [z, criterion.centroid_logits] if learn else [z]
            torch.autograd.grad(loss, wanted, torch.full_like(loss, upstream))
        with torch.no_grad():
            criterion(z, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["target", "centroid_logits", "center", "weight"])
def test_arguments_on_the_cpu_are_refused(backend, name):
    z, y = problem(8, 3, 16)
    arguments = {
        "target": y,
        "centroid_logits": torch.randn(3, 16, device="cuda"),
        "center": torch.zeros(16, device="cuda"),
        "weight": torch.ones(3, device="cuda"),
    }
    ncmi_loss(z, **arguments, backend=backend)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match="got device"):
        ncmi_loss(z, **arguments, backend=backend)


def test_a_cpu_input_is_refused(backend):
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter takes any device")
    z, y = problem(8, 3, 16, device="cpu")
    with pytest.raises(RuntimeError, match="expected a CUDA tensor"):
        ncmi_loss(z, y, torch.randn(3, 16), backend=backend)


OUT_OF_RANGE = """
import sys, torch, ncmi_kernels
z = torch.randn(64, 32, device="cuda", requires_grad=True)
y = torch.randint(10, (64,), device="cuda")
criterion = ncmi_kernels.NCMILoss(10, 32, backend=sys.argv[1], device="cuda")
criterion(z, y).backward()
torch.cuda.synchronize()
print("in range", flush=True)
y[40] = int(sys.argv[2])
criterion(z, y).backward()
torch.cuda.synchronize()
print("out of range", flush=True)
"""


@pytest.mark.parametrize("target", [10, -1])
def test_a_target_out_of_range_hits_a_device_side_assertion(backend, target):
    """In a process of its own, which cannot use the device any more afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE, backend, str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0, done.stdout
    assert done.stdout == "in range\n", done.stdout + done.stderr
    assert "device-side assert" in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------------
# What a step costs
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_launches(backend, shape, ratio, dtype):
    """Fixed centroids; the centre's update is included."""
    criterion = NCMILoss(shape.C, shape.M, ratio=ratio, learn_centroids=False, backend=backend, device="cuda")
    z, y = problem(*shape, dtype)
    forward = bench_gpu.kernels_of(bench_gpu.Step(criterion, z, y, bench_gpu.FORWARD))
    backward = bench_gpu.kernels_of(bench_gpu.Step(criterion, z, y, bench_gpu.BACKWARD))
    assert 1 <= len(forward) <= 4, forward
    assert 1 <= len(backward) <= 2, backward


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("learn", [False, True])
def test_peak_memory_is_a_hundredth_of_the_literal_forms(backend, ratio, learn):
    shape = MEMORY_SHAPE
    device = _timing.Cuda()
    obstacle = LITERAL.obstacle(shape, device.torch_device)
    if obstacle:
        pytest.skip(obstacle)
    z, y = problem(*shape)
    peaks = []
    ours = NCMILoss(shape.C, shape.M, ratio=ratio, learn_centroids=learn, backend=backend, device="cuda")
    for criterion in (LITERAL.build(shape).cuda(), ours):
        few = Shape(2, shape.C, shape.M)
        bench_gpu.Step(copy.deepcopy(criterion), *problem(*few), bench_gpu.FULL).run()
        peaks.append(device.peak(bench_gpu.Step(criterion, z, y, bench_gpu.FULL).run))
    assert peaks[0] > 3 * 4 * shape.B * shape.C * shape.M, "the literal form should have been measured"
    assert z.numel() * 4 <= peaks[1] <= peaks[0] / 100, peaks


@pytest.mark.parametrize("shape", [(300, 10, 257), (4096, 100, 128), (37, 10, 70001)])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_twenty_runs_give_the_same_bits(backend, shape, ratio, dtype):
    fresh = NCMILoss(*shape[1:], ratio=ratio, backend=backend, device="cuda")
    z, y = problem(*shape, dtype)

    def run():
        criterion = copy.deepcopy(fresh)
        return [*step(criterion, z, y), criterion.center]

    expected = run()
    for _ in range(19):
        same_bits(run(), expected)


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_training_follows_float64(backend, ratio):
    start, y = problem(64, 5, 40)
    criterion = NCMILoss(5, 40, ratio=ratio, center_momentum=None, backend=backend, device="cuda")

    def train(z, xi, loss_of):
        optimizer = torch.optim.SGD([z, xi], lr=2.0)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = loss_of(z, xi)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double().cpu())
        return torch.stack(losses), z.detach(), xi.detach()

    double_z, double_xi = (t.detach().double().requires_grad_() for t in (start, criterion.centroid_logits))
    expected = train(
        double_z,
        double_xi,
        lambda z, xi: reference.loss(z, y, xi, None, None, criterion.options, literal=True),
    )
    z = start.detach().clone().requires_grad_()
    actual = train(z, criterion.centroid_logits, lambda z, xi: criterion(z, y))
    assert expected[0][-1] < 0.95 * expected[0][0], "it should learn something"
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e) < 1e-5
    assert relative(actual[1] - start, expected[1] - start) < 1e-4


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("separation", ["sample_to_centroid", "centroid_to_sample"])
# A warp a row; several kilobytes; more classes than rows.
@pytest.mark.parametrize("shape", [(64, 5, 40), (300, 10, 4096), (33, 700, 257)])
def test_steps_of_the_centroids_are_those_of_torch_sgd(backend, dtype, separation, shape, monkeypatch):
    rows, classes, columns = shape
    expected = NCMILoss(classes, columns, separation=separation, backend=backend, device="cuda")
    actual = copy.deepcopy(expected)
    logits, start = expected.centroid_logits, expected.centroid_logits.detach().clone()
    sgd = {"lr": 30.0, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    theirs, ours = torch.optim.SGD([logits], **sgd), CentroidSGD(actual, **sgd)
    monkeypatch.setattr(actual, "_step_gradient", lambda *_: pytest.fail("formed a gradient"))
    for number in range(5):
        z, y = problem(rows, classes, columns, dtype)
        y[::5] = -100
        for criterion in (expected.train(), actual):
            criterion(z, y)  # moves the centre, which then stays
        theirs.zero_grad()
        expected.eval()(z, y).backward()
        theirs.step()
        try:
            if number == 3:  # all is compiled by then
                torch.cuda.set_sync_debug_mode("error")
            ours.step(z, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        moved = logits.detach() - start
        assert moved.norm() > 0
        bound = 1e-6 * max(1.0, (start.norm() / moved.norm()).item())
        assert relative(actual.centroid_logits - start, moved) <= bound
        kept = actual._fixed_table(z, actual.centroid_logits, backend)
        fresh = _plain.table_of(actual.centroid_logits, actual.options, backend)
        assert all(torch.equal(a, e) for a, e in zip(kept, fresh, strict=True))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_state_is_that_of_the_cpu_backend(backend, dtype, ratio):
    on_cpu = NCMILoss(10, 100, ratio=ratio, center_momentum=0.9, backend="cpu")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    on_gpu.backend = backend
    for number in range(5):
        z, y = problem(33, 10, 100, dtype, device="cpu")
        y[::5] = -100
        if number == 3:
            z.data[1, 2] = float("nan")  # the centre stays where it is
            on_cpu(z, y), on_gpu(z.cuda(), y.cuda())
            continue
        there = z.detach().cuda().requires_grad_()
        results = zip(step(on_gpu, there, y.cuda()), step(on_cpu, z, y), strict=True)
        for actual, expected in results:
            assert relative(actual.cpu(), expected) < (1e-2 if actual.dtype is torch.bfloat16 else 1e-5)
    assert on_gpu.num_batches_tracked.item() == on_cpu.num_batches_tracked.item() == 4
    assert relative(on_gpu.center.cpu(), on_cpu.center) < 1e-6
    back = NCMILoss(10, 100, ratio=ratio, center_momentum=0.9, backend="cpu")
    back.load_state_dict(on_gpu.state_dict())
    assert torch.equal(back.center, on_gpu.center.cpu())
