"""Where float32 runs out of digits or of exponents: values against float64, and what a failed call leaves behind."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import KERNELS, relative
from torch import Tensor

from ncmi_kernels import _ops, ncmi_loss, ncmi_terms, reference, testing
from ncmi_kernels._options import Options

SEPARATIONS = ("sample_to_centroid", "centroid_to_sample")
every_backend = pytest.mark.parametrize("backend", KERNELS)
every_separation = pytest.mark.parametrize("separation", SEPARATIONS)
# Features far below zero run away with this separation, which the package warns of.
pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


def errors(z: Tensor, target: Tensor, xi: Tensor, backend: str, **options) -> dict[str, float]:
    """Relative errors of the terms, the loss and its gradients, against the literal definition in float64."""
    terms = ncmi_terms(z, target, xi, backend=backend, **options)
    exact = reference.terms(z.double(), target, xi.double(), None, Options(**options), literal=True)
    found = [*map(relative, terms, exact), *testing.errors((z, target, xi, None, None), Options(**options), backend)]
    return dict(zip(("concentration", "separation", "loss", "input", "centroids"), found, strict=True))


def check(errors: dict[str, float], **bounds: float) -> None:
    assert all(errors[name] < bound for name, bound in bounds.items()), errors


# ------------------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------------------


@every_backend
@every_separation
@pytest.mark.parametrize("level", [-2.2, -4.0, -8.0, -16.0, -24.0, -300.0])
def test_rows_far_below_zero(level, separation, backend):
    """As exact as rows about zero. All p are near 1 / M there, and roundings that columns share enter the terms."""
    target = torch.arange(20) % 10
    z = level + 0.04 * torch.randn(20, 512)
    found = errors(z, target, 10 * torch.eye(10, 512), backend, separation=separation)
    check(found, concentration=4e-6, separation=4e-6, loss=5e-6, input=8e-6, centroids=6e-6)
    if separation == "sample_to_centroid":
        check(found, loss=5e-7, input=3e-6, centroids=3e-6)


@every_backend
@every_separation
@pytest.mark.parametrize("level", [-8.0, -24.0])
def test_centroids_far_below_zero(level, separation, backend):
    target = torch.arange(20) % 10
    xi = level + 0.04 * torch.randn(10, 512)
    found = errors(0.04 * torch.randn(20, 512), target, xi, backend, separation=separation)
    check(found, concentration=1.5e-5, separation=1.5e-5, loss=1.5e-5, input=1.5e-5, centroids=3e-5)


@every_backend
def test_rows_on_either_side_of_the_bound(backend):
    """Where the largest f is just above and just below -2 two formulas meet."""
    z = torch.randn(8, 40).abs().neg() - 2
    z[:, 5] = torch.tensor([-2.0, -1.9999, -2.0001, -1.0, 3.0, -2.5, -2.0, -2.0])
    for separation in SEPARATIONS:
        found = errors(z, torch.arange(8) % 3, torch.randn(3, 40), backend, separation=separation)
        check(found, concentration=2e-6, separation=2e-6, loss=2e-6, input=5e-6, centroids=5e-6)


@every_backend
@every_separation
@pytest.mark.parametrize("offset", [1e-6, 1e-3, "noise"])
def test_centroids_that_are_one_hot_but_for_an_offset(offset, separation, backend):
    target = torch.arange(40) % 10
    xi = 10 * torch.eye(10, 512) + (1e-6 * torch.randn(10, 512) if offset == "noise" else offset)
    found = errors(torch.randn(40, 512), target, xi, backend, separation=separation, l2_normalize=True)
    check(found, concentration=1.2e-6, separation=1.2e-6, loss=2e-6, input=4e-6, centroids=5e-6)


@every_backend
@every_separation
@pytest.mark.parametrize("activation", ["nsf", "softmax"])
def test_zeros_of_either_sign(activation, separation, backend):
    target = torch.arange(6) % 3
    z, xi = torch.randn(6, 20), torch.zeros(3, 20)
    z[:, ::2], z[:, 1::4] = 0.0, -0.0
    z[0], xi[:, ::3], xi[0] = -0.0, -0.0, torch.randn(20)
    found = errors(z, target, xi, backend, separation=separation, activation=activation)
    check(found, concentration=2e-6, separation=2e-6, loss=2e-6, input=5e-6, centroids=5e-6)


@every_backend
@every_separation
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e5, 1e9, 1e30])
def test_softmax_of_large_logits(scale, separation, backend):
    target = torch.arange(30) % 20
    z = scale * (torch.randn(30, 20) + 3 * torch.nn.functional.one_hot(target, 20))
    options = {"activation": "softmax", "temperature": 0.3, "separation": separation}
    check(errors(z, target, 10 * torch.eye(20), backend, **options), concentration=5e-7, separation=5e-7, loss=5e-7)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softmax_to_the_end_of_the_range(dtype, backend):
    """A difference of finite logits may be infinite, but not times 0 then."""
    most = torch.finfo(dtype).max
    z = torch.tensor([[most, -most, 0.0], [1e20, 1.0, 2.0], [0.0, -most, -most]], dtype=dtype)
    xi = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10]])
    for target in (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])):
        terms = ncmi_terms(z, target, xi, activation="softmax", backend=backend)
        exact = reference.terms(z.double(), target, xi.double(), None, Options(activation="softmax"), literal=True)
        for a, e in zip(terms, exact, strict=True):
            assert relative(a, e) < 1e-6
    assert ncmi_loss(xi, target, torch.full_like(xi, -most).fill_diagonal_(most), backend=backend).isfinite()


@every_backend
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_length_of_huge_features_drops_out(dtype, separation, backend):
    """Gradients are those of small features, smaller by as much, while they can be written down."""
    base, target = torch.randn(6, 24).to(dtype), torch.arange(6) % 3
    xi = torch.randn(3, 24, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]

    def run(scale: float) -> tuple[Tensor, ...]:
        x, q = (base * scale).requires_grad_(), xi.clone().requires_grad_()
        loss = ncmi_loss(x, target, q, l2_normalize=True, separation=separation, ratio="sample", backend=backend)
        grads = torch.autograd.grad(loss, (x, q))
        return loss.detach(), grads[0].double() * scale, grads[1]

    expected = run(1.0)
    for power in (-20, 64, 67, 80, 100, 112) if dtype != torch.float64 else (-20, 520, 900, 1000):
        for a, e in zip(run(2.0**power), expected, strict=True):
            assert relative(a, e) < rounding, power


@every_backend
@every_separation
def test_terms_are_not_negative(separation, backend):
    """Of distributions that are equal but for rounding, where half of the differences would be."""
    for level in (0.0, 0.3, 3.0):
        xi = level * torch.randn(6, 50)
        for z in (xi, xi.expand(6, 50) + 1e-7, xi[:1].expand(6, 50)):
            q = xi[:1].expand(6, 50) if z.stride(0) == 0 else xi
            for values in ncmi_terms(z, torch.arange(6), q, separation=separation, backend=backend):
                assert bool((values >= 0).all())
    terms = ncmi_terms(torch.full((6, 50), torch.nan), torch.arange(6), xi, separation=separation, backend=backend)
    assert all(bool(values.isnan().all()) for values in terms)


@every_backend
@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
def test_ignored_rows_have_no_gradient_whatever_comes_upstream(upstream, backend):
    z, xi = torch.randn(6, 10, requires_grad=True), torch.randn(3, 10)
    target = torch.tensor([0, -100, 1, 2, -100, 0])
    for ratio in ("batch", "sample"):
        loss = ncmi_loss(z, target, xi, ratio=ratio, backend=backend)
        (grad,) = torch.autograd.grad(loss, z, torch.tensor(upstream))
        assert bool((grad[target == -100] == 0).all())
        assert not grad[target != -100].isfinite().any()


@every_backend
def test_a_step_of_a_batch_without_rows_moves_nothing(backend):
    run = _ops.operators(backend)
    xi, buffer = torch.randn(4, 12), torch.randn(4, 12)
    stats = run.centroid_stats(xi, False, False)
    changing = (xi, buffer, *stats)
    before = [t.clone() for t in changing]
    for z, target in ((torch.randn(5, 12), torch.full((5,), -100)), (torch.randn(0, 12), torch.zeros(0).long())):
        rows = run.loss(
            z, target, None, None, None, 0.0, *stats, None, 1.0, True, False, False, True, 1, 1e-8, 0.0, -100, False
        )[1:3]
        run.centroid_step_(z, target, None, xi, buffer, *stats, *rows, False, False, -100, 1.0, 0.9, 0.1, True)
        for t, old in zip(changing, before, strict=True):
            assert torch.equal(t, old)


# ------------------------------------------------------------------------------------------------------------
# The CPU alone
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """The tests above for the other loops; multiplications and additions are contracted in some and not in others."""
    names = ("default", "avx2", "avx512")
    if names.index(capability) >= names.index(torch.ops.ncmi_kernels.cpu_capability()):
        pytest.skip("not another one here")
    tests = "(zero or bound or one_hot or softmax or length) and cpu"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "NCMI_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def everything(z: Tensor, target: Tensor, xi: Tensor, separation: str, l2: bool, temperature: float) -> list[Tensor]:
    """Whatever the operators give of a batch and these centroids, a step of them included."""
    run, c2s = _ops.operators("cpu"), separation == "centroid_to_sample"
    features, buffer, upstream = (temperature, l2, False, c2s), torch.ones_like(xi), torch.tensor(1.5, dtype=xi.dtype)
    center, batches = torch.zeros(xi.shape[1], dtype=xi.dtype), torch.tensor(1)
    stats = run.centroid_stats(xi, False, c2s)
    by_sample = run.loss(z, target, None, None, None, 0.0, *stats, None, *features, False, 1, 1e-8, 0.0, -100, True)
    loss = run.loss(z, target, None, center, batches, 0.9, *stats, None, *features, True, 1, 1e-8, 0.0, -100, False)
    batch, rows = (z, target, loss[3]), loss[1:3]
    totals = run.class_totals(*batch, *rows, upstream, c2s, -100)
    grads = (
        run.input_grad(*batch, *stats, *rows, upstream, c2s, -100),
        run.centroid_grad(*batch, xi, *stats, *rows, upstream, c2s, -100),
    )
    moved, new = xi.clone(), [t.clone() for t in stats]
    run.centroid_step_(*batch, moved, buffer, *new, *rows, False, c2s, -100, 0.1, 0.9, 0.0, False)
    return [*stats, *by_sample, *loss, center, totals, *grads, moved, buffer, *new]


@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 130, 512), (90, 40, 517), (60, 30, 2111)])
def test_the_same_bits_on_any_number_of_threads(shape, dtype, separation):
    """Centroids that have moved: what columns a thread has decides nothing of how they are computed."""
    rows, classes, columns = shape
    z, target = torch.randn(rows, columns).to(dtype), torch.randint(classes, (rows,))
    target[::7] = -100
    xi = (10 * torch.eye(classes, columns) + 0.3 * torch.randn(classes, columns)).to(dtype)
    before = torch.get_num_threads()
    try:
        for l2, temperature in ((True, 0.05), (True, 1.0), (False, 1.0)):
            torch.set_num_threads(1)
            expected = everything(z, target, xi, separation, l2, temperature)
            for threads in (1, 2, 3, 4, 5, 8):
                torch.set_num_threads(threads)
                for k, (a, e) in enumerate(
                    zip(everything(z, target, xi, separation, l2, temperature), expected, strict=True)
                ):
                    assert torch.equal(a, e), (threads, l2, temperature, k)
    finally:
        torch.set_num_threads(before)


OUT_OF_MEMORY = """
import resource, torch
from ncmi_kernels import CentroidSGD, NCMILoss

torch.set_num_threads(2)
criterion, rows, columns = NCMILoss(10, 1024, ratio="sample"), 40000, 1024
z, y = torch.randn(rows, columns, requires_grad=True), torch.randint(10, (rows,))
wide = NCMILoss(4, 6_000_000, separation="centroid_to_sample")
one, label = torch.randn(4, 6_000_000), torch.tensor([0, 1, 2, 3])
optimizer = CentroidSGD(wide, lr=0.1)
before = wide.centroid_logits.detach().clone()
run = torch.ops.ncmi_kernels
stats = run.centroid_stats(before, False, False)
threads = lambda: run.terms(one, label, None, *stats, 1.0, True, False, False, -100)  # each has memory of its own
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), -1))
for call in (lambda: criterion(z, y), lambda: optimizer.step(one, label), threads):
    try:
        call()
    except MemoryError as error:
        assert "can't allocate memory: you tried to allocate" in str(error), error
    else:
        raise AssertionError("there was enough memory")
assert criterion.num_batches_tracked == 0 and not criterion.center.any()
assert torch.equal(wide.centroid_logits, before)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
criterion(z, y)
assert criterion.num_batches_tracked == 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_out_of_memory():
    """A MemoryError that says so; and nothing has moved: the batch may be tried again in parts."""
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
