"""The CUDA kernels themselves, run on the CPU (tests/cuda_emulation), against the literal definition in float64."""

import ctypes
import itertools
import math
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import test_accuracy
import test_centroids
import test_extremes
import test_focus
import test_focus_operators
import test_operators
import torch
from conftest import relative
from test_kernels import (
    ACTIVATIONS,
    SGD,
    check_present_classes,
    check_reduce,
    check_row_references,
    check_step,
    check_step_refuses_strides,
    check_totals,
    check_totals_of_many,
)
from torch.utils import cpp_extension

import ncmi_kernels
from ncmi_kernels import _focus, _loss, _ops, _schema, ncmi_loss, ncmi_terms, reference
from ncmi_kernels._options import Options
from ncmi_kernels._problem import problem_of
from ncmi_kernels.testing import evaluate, random_problem

ROOT = Path(__file__).parent.parent
EMULATION = Path(__file__).parent / "cuda_emulation"
SEPARATIONS = ("sample_to_centroid", "centroid_to_sample")
RATIOS = ("batch", "sample")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """csrc/cuda compiled by the host compiler."""
    directory = tmp_path_factory.mktemp("emulation")
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATION / "emulation.cpp"]
    flags = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020C000000000000"]
    flags += ["-include", str(EMULATION / "emulation.h")]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    objects = [str(directory / f"{source.name}.o") for source in sources]
    compiling = [
        subprocess.Popen(["g++", *flags, "-c", str(source), "-o", out], stderr=subprocess.PIPE, text=True)
        for source, out in zip(sources, objects, strict=True)
    ]
    for process in compiling:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    path = directory / "ncmi_emulated.so"
    link = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", str(path), *objects, *link], check=True)
    _schema.define("ncmi_emulated")
    torch.ops.load_library(str(path))
    return path


@pytest.fixture
def emulated(library):
    """The operators, as "cpu" and "cuda" have them."""
    return _schema.defined("ncmi_emulated")


@pytest.fixture
def runs(emulated, monkeypatch):
    """Run the emulated kernels in the place of the CPU's, on outputs and workspace that are full of NaN."""
    monkeypatch.setattr(_ops, "operators", lambda backend: emulated)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def launches(library):
    """Kernels launched so far."""
    count = ctypes.CDLL(str(library)).emulation_launches
    count.restype = ctypes.c_int64
    return count


make = partial(random_problem, dtype=torch.float32)


def kernels(problem, upstream=1.0, **options):
    """Loss and gradients of input and centroid_logits."""
    return evaluate(problem, Options(**options), "cpu", upstream=upstream)


def exactly(problem, upstream=1.0, **options):
    """The same in float64, by the literal definition."""
    return evaluate(problem, Options(**options), "float64", literal=True, upstream=upstream)


def check(problem, bounds, upstream=1.0, **options):
    actual, expected = kernels(problem, upstream, **options), exactly(problem, upstream, **options)
    for a, e, bound in zip(actual, expected, bounds, strict=True):
        assert relative(a, e) < bound


FLOAT32 = (2e-6, 5e-6, 5e-6)
FLOAT64 = (1e-10, 1e-10, 1e-10)


@pytest.mark.parametrize("columns", [36, 37], ids=["in 16 bytes", "one by one"])
@pytest.mark.parametrize("activation", ["nsf", "softmax"])
@pytest.mark.parametrize("ratio", [*RATIOS, "soft_margin"])
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_every_variant(runs, separation, ratio, activation, columns):
    for l2, center, weight, ignore in itertools.product((False, True), repeat=4):
        options = {"temperature": 0.7, "l2_normalize": l2, "activation": activation}
        options |= {"separation": separation, "ratio": ratio}
        for dtype, bounds in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
            problem = make(13, 7, columns, center=center, weight=weight, ignore=ignore, dtype=dtype)
            check(problem, bounds, **options)


@pytest.mark.parametrize("columns", [36, 37], ids=["in 16 bytes", "one by one"])
@pytest.mark.parametrize("activation", ["nsf", "softmax"])
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_every_variant_of_the_focus(runs, separation, activation, columns):
    """input_grad with a reference for each row, and coefficients of a separation that is no mean over the classes."""
    for l2, center, ignore in itertools.product((False, True), repeat=3):
        options = {"temperature": 0.7, "l2_normalize": l2, "activation": activation}
        options |= {"separation": separation, "separation_focus": 5.0}
        for dtype, bounds in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
            problem = make(13, 7, columns, center=center, weight=center, ignore=ignore, dtype=dtype)
            check(problem, bounds, **options)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_focus_by_tiles(runs, monkeypatch, separation, ratio):
    monkeypatch.setattr(_focus, "tile_rows", lambda classes: 64)
    problem = make(150, 7, 37, center=True, weight=True, ignore=True)
    check(problem, FLOAT32, -3.0, separation=separation, ratio=ratio, separation_focus=5.0)
    if ratio == "sample":
        check(problem, FLOAT32, separation=separation, ratio=ratio, reduction="none", separation_focus=5.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", test_focus_operators.BOUNDS)
def test_operators_of_the_focus(emulated, runs, dtype, separation, activation):
    test_focus_operators.check_every_kind(emulated, dtype, separation, activation)


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("shape", test_focus_operators.LARGE)
def test_operators_of_the_focus_of_large_shapes(emulated, runs, shape, separation):
    test_focus_operators.check_large(emulated, shape, separation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_the_focus(emulated, runs, dtype, separation, activation):
    test_focus_operators.check_every_part(emulated, dtype, separation, activation)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_divergences_that_are_none(emulated, runs, separation):
    test_focus_operators.check_divergences(emulated, separation)
    test_focus_operators.check_priors_of_none(emulated, separation)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_focus_of_every_range(runs, separation):
    for size in test_accuracy.SIZES_WITH_FOCUS:
        test_accuracy.test_odd_sizes(3.0, size, separation, "cpu", interpreted=False)
    for dtype in (torch.bfloat16, torch.float16):
        test_accuracy.test_half_precision(10.0, "batch", True, True, dtype, separation, "cpu", interpreted=False)
    test_focus.test_where_the_focus_has_no_choice(separation, "cpu")


def test_launches_of_the_focus(emulated, launches):
    """One an operator, but that several blocks' sums over the rows are added up."""
    for rows, of_sums in ((70, 1), (600, 2)):
        z, target, xi, _, _ = make(rows, 40, 8)
        its = test_focus_operators.Operands(emulated, (z, target, xi, None, None), "sample_to_centroid")
        run = its.run
        coefficients, class_weights = test_focus_operators.of_rows(its), torch.zeros(40, 2, dtype=torch.float64)
        last = its.stats, target, its.table[3], its.level, 5.0, False, -100
        for expected, operator, arguments in (
            (1, run.focus_table, (*its.table, False)),
            (1, run.focus_rows, (z, target, None, *its.table, its.stats, False, -100)),
            (1, run.focus_nearest, (its.weights, its.stats, target, its.table[3], its.level, False, -100)),
            (1, run.focus_weights_, (its.weights, its.separation, *last)),
            (of_sums, run.focus_sums_, (its.weights, class_weights, its.stats, coefficients, target, False, -100)),
        ):
            before = launches()
            operator(*arguments)
            assert launches() - before == expected


# A warp a row; a block; registers no longer enough; one element at a time.
@pytest.mark.parametrize("columns", [2, 4, 512, 516, 8192, 8200, 8201])
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("l2", [False, True])
def test_every_layout_of_a_row(runs, columns, separation, l2):
    for ratio in RATIOS:
        check(make(5, 4, columns, center=True), FLOAT32, l2_normalize=l2, separation=separation, ratio=ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [133, 136, 520, 8200])
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("l2", [False, True])
def test_half_precision(runs, dtype, columns, separation, l2):
    problem = make(6, 5, columns, center=True, dtype=dtype, spread=1.0)
    options = {"temperature": 0.5, "l2_normalize": l2, "separation": separation}
    loss, grad_z, grad_xi = kernels(problem, 64.0, **options)
    expected = exactly(problem, 64.0, **options)
    assert loss.dtype == torch.float32
    assert relative(loss, expected[0]) < 2e-6
    for grad, exact in ((grad_z, expected[1]), (grad_xi, expected[2])):
        rounding = relative(exact.to(grad.dtype), exact)  # what storing the exact gradient would cost
        assert relative(grad, exact) <= 1.05 * rounding + 5e-6


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_authors_regime(runs, separation, temperature):
    """p and q differ by a percent, and so much the more do roundings count."""
    z, target, _, _, _ = make(64, 100, 512)
    problem = z, target, 10 * torch.eye(100, 512), z.mean(0), None
    for ratio in RATIOS:
        options = {"temperature": temperature, "l2_normalize": True, "separation": separation, "ratio": ratio}
        check(problem, (1e-5, 1e-5, 1e-5), **options)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_focus_in_the_authors_regime(runs, separation):
    z, target, _, _, _ = make(64, 100, 128)
    problem = z, target, 10 * torch.eye(100, 128), z.mean(0), None
    check(problem, (1e-6, 5e-6, 2e-6), l2_normalize=True, separation=separation, separation_focus=10.0)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_every_range_of_the_activation(runs, separation):
    """Rows that are activated differently meet in the gradient of one centroid."""
    for columns in (40, 41):
        z, _, xi, _, _ = make(12, 2, columns, spread=1.0)
        z = z * torch.logspace(-3, 2, 12)[:, None]
        for ratio in RATIOS:
            problem = z, torch.zeros(12, dtype=torch.int64), xi, None, None
            check(problem, (5e-6, 5e-6, 5e-6), separation=separation, ratio=ratio)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_near_zero(runs, separation):
    """A and G are of second order in features and centroids there: what rounds relative to 1 loses them."""
    check(make(40, 3, 24, spread=0.1), FLOAT32, separation=separation)


@pytest.mark.parametrize("value", [-200.0, 200.0])
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_saturated_rows_and_centroids(runs, value, separation):
    z, target, xi, _, _ = make(5, 3, 24, spread=1.0)
    for problem in ((z + value, target, xi, None, None), (z, target, xi + value, None, None)):
        for ratio in RATIOS:
            actual = kernels(problem, separation=separation, ratio=ratio)
            expected = exactly(problem, separation=separation, ratio=ratio)
            assert relative(actual[0], expected[0]) < 1e-5
            for a, e in zip(actual[1:], expected[1:], strict=True):
                assert (a - e).norm() < 1e-4 * e.norm() + 1e-30


@pytest.mark.parametrize("huge", [1e18, 3e37])
def test_one_huge_element(runs, huge):
    for columns in (24, 25):
        z, target, xi, _, _ = make(4, 3, columns)
        z[1, 2] = huge
        loss, grad_z, grad_xi = kernels((z, target, xi, None, None), l2_normalize=True)
        expected = exactly((z, target, xi, None, None), l2_normalize=True)
        assert relative(loss, expected[0]) < 1e-5
        assert bool(grad_z.isfinite().all())
        assert relative(grad_xi, expected[2]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_loss(runs, value):
    for columns, l2, ratio in itertools.product((24, 25), (False, True), RATIOS):
        z, target, xi, _, _ = make(4, 3, columns)
        z[1, 2] = value
        assert ncmi_loss(z, target, xi, l2_normalize=l2, ratio=ratio, backend="cpu").isnan()


def test_ignored_rows_leave_no_trace(runs):
    z, target, xi, _, _ = make(10, 4, 36, ignore=True)
    kept = target != -100
    dirty = torch.where(kept[:, None], z, float("nan"))
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "none")):
        clean = kernels((z, target, xi, None, None), ratio=ratio, reduction=reduction)
        for a, e in zip(kernels((dirty, target, xi, None, None), ratio=ratio, reduction=reduction), clean, strict=True):
            assert torch.equal(a, e)
        assert bool((clean[1][~kept] == 0).all())


def test_nothing_to_average(runs):
    xi = torch.randn(4, 6, requires_grad=True)
    for rows, ratio in itertools.product((0, 5), RATIOS):
        z = torch.randn(rows, 6, requires_grad=True)
        target = torch.full((rows,), -100)
        loss = ncmi_loss(z, target, xi, ratio=ratio, backend="cpu")
        assert loss.isnan()
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, (z, xi)))
    assert ncmi_loss(z, target, xi, ratio="sample", reduction="sum", backend="cpu") == 0


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_reductions_and_upstream_gradients(runs, separation):
    problem = make(9, 4, 40, weight=True, ignore=True)
    for reduction in ("mean", "sum", "none"):
        check(problem, FLOAT32, 3.7, separation=separation, ratio="sample", reduction=reduction)
    z, target, xi, _, weight = problem
    z, xi = z.requires_grad_(), xi.requires_grad_()
    losses = ncmi_loss(z, target, xi, weight=weight, ratio="sample", reduction="none", backend="cpu")
    factors = torch.randn(18)[::2]
    grads = torch.autograd.grad(losses, (z, xi), factors)
    options = Options(ratio="sample", reduction="none")
    wide = z.detach().double().requires_grad_(), xi.detach().double().requires_grad_()
    exact = reference.loss(wide[0], target, wide[1], None, weight.double(), options, literal=True)
    for a, e in zip(grads, torch.autograd.grad(exact, wide, factors.double()), strict=True):
        assert relative(a, e) < 5e-6


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_means_of_the_terms(runs, separation):
    for rows in (13, 8200, 0):  # more than one block sums; NaN
        z, target, xi, center, weight = make(rows, 5, 4, center=True, weight=True, ignore=True)
        kept = target != -100
        wide = z[kept].double(), target[kept], xi.double(), center.double()
        exact = torch.stack(reference.terms(*wide, Options(separation=separation), literal=True))
        factor = weight.double()[target[kept]]
        expected = exact @ factor / factor.sum()
        for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "sum"), ("sample", "none")):
            options = Options(separation=separation, ratio=ratio, reduction=reduction)
            for input in (z, z.clone().requires_grad_()) if options.scalar_by_sample else (z,):
                means = _loss.loss(*problem_of(input, target, xi, center, weight, options, "cpu")).means
                assert means.dtype == torch.float64
                assert bool(means.isnan().all()) if rows == 0 else relative(means, expected) < 2e-6


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_reduce(emulated, runs, separation):
    reductions = ("batch", "mean"), ("sample", "mean"), ("sample", "sum"), ("sample", "none")
    for focus, (ratio, reduction) in itertools.product((0.0, 10.0), reductions):
        check_reduce(emulated, separation, focus, ratio, reduction)


@pytest.mark.parametrize("rows", [0, 13, 8200])  # 8200: more than one block sums
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_the_loss_is_the_terms_reduced(emulated, runs, launches, separation, rows):
    """From the rows' sums as from the terms, and from totals: the same bits."""
    z, target, xi, _, weight = make(rows, 5, 4, weight=True, ignore=True)
    c2s = separation == "centroid_to_sample"
    table = emulated.centroid_stats(xi, False, c2s)
    terms, stats = emulated.terms(z, target, None, *table, 1.0, False, False, c2s, -100)
    terms[:, target == -100] = float("nan")
    for options in ((True, 1), (False, 1), (False, 2), (False, 0)):
        settings = *options, 1e-8, 0.0, -100
        expected = emulated.loss(
            z, target, None, None, None, 0.0, *table, weight, 1.0, False, False, c2s, *settings, False
        )
        totals = None
        for several in (rows > 8192, False):
            before = launches()
            loss, coefficients, means, totals = emulated.reduce(
                terms, stats, target, weight, totals, c2s, False, *settings
            )
            assert launches() - before == 1 + several
            actual = loss.float(), stats, coefficients, *expected[3:5], means
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a.nan_to_num(7), e.nan_to_num(7))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_for_each_row(emulated, runs, dtype, separation, activation):
    check_row_references(emulated, dtype, separation, activation)


def some_priors(classes):
    """Of which one is 0."""
    prior = torch.rand(classes, dtype=torch.float64) + 0.1
    prior[1] = 0
    return prior / prior.sum()


# A chunk of classes and several; columns that one block finishes, and that blocks share.
@pytest.mark.parametrize("shape", [(5, 36), (70, 37), (3, 66000)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_by_priors(emulated, runs, dtype, separation, activation, shape):
    """Those of the CPU; and without priors those of priors that are alike, to the bit."""
    xi, bound = 2 * torch.randn(shape, dtype=dtype), 1e-6 if dtype == torch.float32 else 1e-13
    run, how = emulated.centroid_stats, (activation == "softmax", separation == "centroid_to_sample")
    prior = some_priors(len(xi))
    actual, expected = (ops.centroid_stats(xi, *how, prior) for ops in (emulated, _ops._compiled))
    for a, e in zip(actual[:3], expected[:3], strict=True):
        assert relative(a, e) < bound
    assert torch.equal(actual[3][:-1, _schema.PRIOR], prior)
    for column in (0, 1):  # of the norms' last record, and the one that classes have of log_norm
        assert relative(actual[3][-1, column], expected[3][-1, column]) < bound
    assert relative(actual[3][:-1, 0], expected[3][:-1, 0]) < bound
    alike = torch.full((len(xi),), 1 / len(xi), dtype=torch.float64)
    for a, e in zip(run(xi, *how, None), run(xi, *how, alike), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_priors(emulated, runs, dtype, separation, activation):
    """Terms, loss, gradients and a step by them, against the definition in float64."""
    softmax, c2s = activation == "softmax", separation == "centroid_to_sample"
    bound, loss_bound = (5e-6, 2e-6) if dtype == torch.float32 else (1e-11, 1e-12)
    features = 0.7, True, softmax, c2s
    for columns, ratio in itertools.product((36, 37), RATIOS):
        z, target, xi, center, weight = make(13, 5, columns, center=True, weight=True, ignore=True, dtype=dtype)
        target[1] = 1  # the class whose prior is 0
        prior, kept = some_priors(len(xi)), target != -100
        wide, wide_xi = z.double().requires_grad_(), xi.double().requires_grad_()
        log_p = reference.log_probabilities(wide[kept], center.double(), 0.7, True, activation)
        log_q, y = reference.log_activation(wide_xi, activation), target[kept]
        others = prior.expand(len(y), -1).clone()
        others[torch.arange(len(y)), y] = 0
        a = reference.kl_divergence(log_p, log_q[y])
        g = (others * reference.divergences(log_p, log_q, separation)).sum(dim=1)
        w = weight.double()[y]
        exact = (w @ a) / (w @ g) if ratio == "batch" else w @ (a / g) / w.sum()
        expected = torch.autograd.grad(exact, (wide, wide_xi))

        table = emulated.centroid_stats(xi, softmax, c2s, prior)
        values, stats = emulated.terms(z, target, center, *table, *features, -100)
        assert relative(values[:, kept], torch.stack([a, g])) < loss_bound
        assert torch.equal(stats[kept, _schema.OWN_PRIOR], prior[y])
        assert bool((stats[~kept] == 0).all())
        settings = ratio == "batch", 1, 0.0, 0.0, -100
        for with_grad in {False, ratio == "sample"}:
            loss, rows, coefficients, _, grad, _ = emulated.loss(
                z, target, center, None, None, 0.0, *table, weight, *features, *settings, with_grad
            )
            assert relative(loss, exact) < loss_bound
            assert torch.equal(rows, stats)
            known = rows, coefficients
            if not with_grad:
                grad = emulated.input_grad(z, target, center, *table, *known, None, c2s, -100)
            assert relative(grad, expected[0]) < bound
        grad = emulated.centroid_grad(z, target, center, xi, *table, *known, None, c2s, -100)
        assert relative(grad, expected[1]) < bound
        moved, rate = xi.clone(), (xi.norm() / grad.norm()).item()
        emulated.centroid_step_(
            z, target, center, moved, None, *table, *known, softmax, c2s, -100, rate, 0.0, 0.0, False
        )
        assert relative(moved - xi, -rate * grad) < (1e-6 if dtype == torch.float32 else 1e-13)
        for after, fresh in zip(table, emulated.centroid_stats(moved, softmax, c2s, prior), strict=True):
            assert torch.equal(after, fresh)


# Rows of a warp and of a block, and classes that are fewer than its threads and more.
@pytest.mark.parametrize(("classes", "each"), [(5, 1), (5, 2), (5, 3), (3, 200), (700, 3)])
@pytest.mark.parametrize("focus", [0.0, 5.0])
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_several_centroids_a_class(emulated, runs, dtype, separation, focus, classes, each):
    """By priors of which those of a class are 0, or all but those of a class."""
    c2s, centroids, rows = separation == "centroid_to_sample", classes * each, 9
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    z, target, xi, _, _ = make(rows, centroids, 12, dtype=dtype)
    target %= classes
    target[0], target[1], target[2] = -100, 0, 1
    class_of = torch.arange(centroids) % classes
    own = class_of == target[:, None]
    some = torch.rand(centroids, dtype=torch.float64) + 0.1
    for prior in (torch.where(class_of == 1, 0, some), torch.where(class_of == 0, some, 0)):
        prior = prior / prior.sum()
        table = emulated.centroid_stats(xi, False, c2s, prior)
        values, stats = emulated.terms(z, target, None, *table, 0.7, False, False, c2s, -100)
        relative_q, distribution, level = emulated.focus_table(*table, c2s)
        assert torch.equal(level[1], prior)
        x = emulated.focus_rows(z, target, None, *table, stats, c2s, -100)
        weights, separated = x @ (distribution if c2s else relative_q).T, values[1].clone()
        emulated.focus_weights_(weights, separated, stats, target, table[3], level, focus, c2s, -100, each)

        log_p = reference.log_probabilities(z.double(), None, 0.7, False, "nsf")
        d = reference.divergences(log_p, reference.log_activation(xi.double(), "nsf"), separation)
        counts = ~own & (prior > 0) & (target != -100)[:, None]
        nearest = torch.where(counts, d, torch.inf).amin(dim=1, keepdim=True)
        exact = torch.where(counts, prior.log() - focus * d / nearest, -torch.inf).softmax(dim=1).nan_to_num(0)
        own_prior = torch.where(own, prior, 0).sum(dim=1)
        assert bool((weights[~counts] == 0).all())
        assert relative(weights, exact) < bound
        mixture = (exact * d).sum(dim=1)
        assert relative(separated, mixture * (1 - own_prior)) < bound
        assert bool((separated[~counts.any(dim=1)] == 0).all())
        assert relative(stats[:, _schema.OWN_PRIOR], own_prior) < 1e-14
        kept = target != -100
        log_norm = -stats[kept, _schema.INVERSE_NORM].log() - table[3][-1, _schema.MEAN_LOG_NORM]
        assert (stats[kept, _schema.ALL_MEAN] - log_norm - mixture[kept]).norm() < bound * mixture.norm()
    with pytest.raises(RuntimeError, match="centroids_per_class"):
        emulated.focus_weights_(weights, separated, stats, target, table[3], level, focus, c2s, -100, centroids + 1)


@pytest.mark.parametrize("variant", [v for v in test_centroids.VARIANTS if v[2] > 1 or v[3]])
def test_loss_of_several_centroids_and_by_priors(runs, variant):
    test_centroids.test_every_variant_matches_the_literal_definition(*variant, "cpu", interpreted=False)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_centroids_and_priors_that_make_no_difference(runs, separation):
    for focus in (0.0, 5.0):
        test_centroids.test_what_makes_no_difference(separation, focus, "cpu")
    for dtype in (torch.bfloat16, torch.float16):
        test_centroids.test_half_precision(dtype, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_own_centroid_for_each_row(emulated, runs, dtype, separation, activation):
    """The gradient of own KL to a mixture of each row's own, and other KL to another, against autograd in float64."""
    c2s = separation == "centroid_to_sample"
    for rows, columns in ((7, 33), (3, 2100)):
        z, target, xi, center, _ = make(rows, 5, columns, center=True, ignore=True, dtype=dtype)
        table = emulated.centroid_stats(xi, activation == "softmax", c2s)
        stats = emulated.terms(z, target, center, *table, 0.7, True, activation == "softmax", c2s, -100)[1]
        kept = (target != -100).double()
        log_own, log_q = reference.log_activation(torch.randn(2, rows, columns).double(), "softmax")
        own, other = torch.randn(2, rows, dtype=torch.float64) * kept
        wide = z.double().requires_grad_()
        log_p = reference.log_probabilities(wide, center.double(), 0.7, True, activation)
        divergence = reference.kl_divergence(log_q, log_p) if c2s else reference.kl_divergence(log_p, log_q)
        (expected,) = torch.autograd.grad(own @ reference.kl_divergence(log_p, log_own) + other @ divergence, wide)
        # Means under p are of log a, and so is what comes in with each row: both up to one number for all columns.
        log_p = log_p.detach()
        constant = own * reference.kl_divergence(log_p, log_own)
        if not c2s:
            constant = constant + other * reference.kl_divergence(log_p, log_q)
        # log 2 a for NSF.
        shift = -stats[:, _schema.INVERSE_NORM, None].log() + (math.log(2) if activation == "nsf" else 0)
        coefficients = torch.stack([own, other, torch.zeros(rows).double(), constant], dim=1)
        row_own, row_reference = log_own + shift, log_q.exp() if c2s else log_q + shift
        given = row_reference.to(dtype), row_own.to(dtype)
        actual = emulated.input_grad(z, target, center, *table, stats, coefficients, None, c2s, -100, *given)
        assert relative(actual, expected) < (1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_of_the_classes_that_occur(emulated, runs, dtype, separation):
    check_present_classes(emulated, dtype, separation)
    check_totals(emulated, dtype, separation)
    check_totals_of_many(emulated, separation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_sgd(emulated, runs, dtype, separation, activation):
    for sgd in SGD:
        check_step(emulated, dtype, separation, activation, sgd)
    check_step_refuses_strides(emulated)


def test_terms(runs):
    for columns, separation in itertools.product((36, 37), SEPARATIONS):
        z, target, xi, center, _ = make(7, 4, columns, center=True)
        z, xi = z.requires_grad_(), xi.requires_grad_()
        terms = ncmi_terms(z, target, xi, center=center, separation=separation, backend="cpu")
        wide = z.detach().double().requires_grad_(), xi.detach().double().requires_grad_()
        exact = reference.terms(wide[0], target, wide[1], center.double(), Options(separation=separation))
        upstream = torch.randn(7), torch.randn(7)
        grads = torch.autograd.grad(terms, (z, xi), upstream)
        expected = torch.autograd.grad(exact, wide, tuple(u.double() for u in upstream))
        for a, e in zip((*terms, *grads), (*exact, *expected), strict=True):
            assert relative(a, e) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_the_tensors(runs, dtype):
    base = torch.randn(60, 64).to(dtype)
    target = torch.stack((torch.arange(20) % 3, torch.arange(20)), dim=1)[:, 0]
    for z in (base.t()[:20, :32], base[:20, ::2], base[:1, :32].expand(20, 32), base[7:27, 5:37], base[:20, 8:40]):
        xi = torch.randn(60, 120)[:32, :3].t()
        strided = kernels((z, target, xi, None, None))
        expected = exactly((z, target, xi, None, None))
        for a, e, bound in zip(strided, expected, FLOAT32, strict=True):
            assert relative(a, e) < bound + relative(e.to(a.dtype), e) * 1.05


def test_many_rows_and_many_columns(runs):
    """What blocks share beyond a size: the sums over rows, over columns, the centre."""
    check(make(8200, 3, 4, weight=True, ignore=True), (2e-6, 5e-6, 5e-6))
    check(make(2, 2, 66000), FLOAT32)
    check(make(2, 2, 66000), FLOAT32, separation="centroid_to_sample", l2_normalize=True)


@pytest.mark.parametrize("shape", [(5, 12), (70, 13), (300, 260), (2, 66000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_center(emulated, runs, shape, dtype):
    rows, columns = shape
    z, target = torch.randn(rows, columns).to(dtype), torch.randint(3, (rows,))
    target[1] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    center, batches = torch.zeros(columns, dtype=wide), torch.tensor(0)
    expected = z[target != -100].double().mean(0)
    copy = emulated.update_center_(center, batches, z, target, 0.9, 3, -100)
    assert torch.equal(copy, center)
    assert batches == 1
    assert relative(center, expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    second = emulated.update_center_(center, batches, z * 2, target, 0.75, 3, -100)
    assert batches == 2
    assert relative(second, 1.25 * expected) < (1e-12 if dtype == torch.float64 else 1e-6)

    before = center.clone()
    dirty = z.clone()
    dirty[0, columns // 2] = float("inf")
    for batch, y in ((dirty, target), (z, torch.full_like(target, -100)), (z[:0], target[:0])):
        if batch is dirty and target[0] == -100:
            continue
        copy = emulated.update_center_(center, batches, batch, y, 0.9, 3, -100)
        assert torch.equal(center, before)
        assert torch.equal(copy, before)
        assert batches == 2


def test_training_step_with_a_running_center(runs):
    """The module with these kernels and with the CPU's, for two steps."""
    results = []
    for operators in (_ops.operators("cuda"), _ops._compiled):
        for ratio in RATIOS:
            _ops.operators = lambda backend, operators=operators: operators  # restored by the fixture
            torch.manual_seed(1)
            criterion = ncmi_kernels.NCMILoss(5, 24, ratio=ratio, backend="cpu")
            z = torch.randn(9, 24)
            for step in range(2):
                x = (z * (step + 1)).requires_grad_()
                loss = criterion(x, torch.arange(9) % 5)
                loss.backward()
                results.append((loss.detach(), x.grad, *(b.clone() for b in criterion.buffers())))
    for ours, cpus in zip(results[:4], results[4:], strict=True):
        for a, e in zip(ours, cpus, strict=True):
            assert relative(a.double(), e.double()) < 5e-6


def test_same_outputs_as_the_cpu_operators(emulated, runs):
    """Shapes, dtypes and strides of every output, which the fake kernels promise."""
    cpu = _ops._compiled
    for separation in (False, True):
        z, target, xi, _, _ = make(6, 4, 20)
        stats = [ops.centroid_stats(xi, False, separation) for ops in (emulated, cpu)]
        center, batches = torch.zeros(20), torch.tensor(0)
        outputs = []
        for ops, s in zip((emulated, cpu), stats, strict=True):
            terms = ops.terms(z, target, None, *s, 1.0, False, False, separation, -100)
            loss = [
                ops.loss(
                    z, target, None, center.clone(), batches.clone(), 0.9, *s, None, 1.0, True, False, separation,
                    batch, reduction, 1e-8, 0.0, -100, with_grad,
                )
                for batch, reduction, with_grad in ((True, 1, False), (False, 1, True), (False, 0, False))
            ]  # fmt: skip
            reduced = [
                ops.reduce(*terms, target, None, None, separation, False, batch, reduction, 1e-8, 0.0, -100)
                for batch, reduction in ((True, 1), (False, 0))
            ]
            rest, rows, upstream = (z, target, None), loss[0][1:3], torch.tensor(2.0)
            grad = ops.input_grad(*rest, *s, *rows, upstream, separation, -100)
            xi_grad = ops.centroid_grad(*rest, xi, *s, *rows, upstream, separation, -100)
            totals = ops.class_totals(*rest, *rows, upstream, separation, -100)
            factors = *ops.focus_table(*s, separation), ops.focus_rows(*rest, *s, rows[0], separation, -100)
            outputs.append([*s, *terms, *itertools.chain(*loss, *reduced), grad, xi_grad, totals, *factors])
        for a, e in zip(*outputs, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_where_float32_runs_out(runs, separation):
    for level in (-2.2, -4.0, -8.0, -16.0, -24.0, -300.0):
        test_extremes.test_rows_far_below_zero(level, separation, "cpu")
    for level in (-8.0, -24.0):
        test_extremes.test_centroids_far_below_zero(level, separation, "cpu")
    for offset in (1e-6, 1e-3, "noise"):
        test_extremes.test_centroids_that_are_one_hot_but_for_an_offset(offset, separation, "cpu")
    for scale in (1e2, 1e5, 1e30):
        test_extremes.test_softmax_of_large_logits(scale, separation, "cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        test_extremes.test_the_length_of_huge_features_drops_out(dtype, separation, "cpu")
    test_extremes.test_terms_are_not_negative(separation, "cpu")


def test_extremes_of_either_separation(runs):
    test_extremes.test_rows_on_either_side_of_the_bound("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        test_extremes.test_softmax_to_the_end_of_the_range(dtype, "cpu")
    for upstream in (torch.inf, torch.nan):
        test_extremes.test_ignored_rows_have_no_gradient_whatever_comes_upstream(upstream, "cpu")
    test_extremes.test_a_step_of_a_batch_without_rows_moves_nothing("cpu")


@pytest.mark.parametrize("name", _schema.SCHEMAS)
def test_tensors_that_do_not_fit(emulated, name):
    for centroid_to_sample in (False, True):
        test_operators.check_tensors(emulated, name, centroid_to_sample)


def test_arguments_that_do_not_fit(emulated):
    test_operators.check_combinations(emulated)
    test_operators.check_targets(emulated, on_a_device=True)
    test_operators.check_empty_batches(emulated)
    test_operators.check_statistics_that_are_none(emulated)
    test_operators.check_count_of_batches(emulated)


def test_a_target_out_of_range_stops_the_kernel(runs):
    z, target, xi, _, _ = make(4, 3, 8)
    for wrong in (3, -1):
        target[2] = wrong
        with pytest.raises(RuntimeError, match="target is out of range"):
            ncmi_loss(z, target, xi, backend="cpu")


@pytest.mark.parametrize("separation_focus", [0.0, 5.0])
@pytest.mark.parametrize(("ratio", "reduction"), [("batch", "mean"), ("sample", "mean"), ("sample", "none")])
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_the_same_bits_again(runs, separation, ratio, reduction, spread, separation_focus):
    z, target, xi, _, weight = make(9, 3, 124, weight=True, ignore=True, spread=spread)
    z.requires_grad_(), xi.requires_grad_()
    options = {"separation": separation, "ratio": ratio, "reduction": reduction, "separation_focus": separation_focus}
    losses = [ncmi_loss(z, target, xi, weight=weight, **options, backend="cpu") for _ in range(2)]
    assert torch.equal(*losses)
    upstream = torch.full_like(losses[0], 3.7)
    first = torch.autograd.grad(losses[0], (z, xi), upstream, retain_graph=True)
    for loss in losses:
        for a, b in zip(first, torch.autograd.grad(loss, (z, xi), upstream), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(128, 100, 512), (256, 1000, 1000), (4096, 100, 128)])
def test_launches_of_a_step(emulated, launches, shape):
    """With fixed centroids: at most 4 forward, the centre's update included, and 2 backward."""
    count, classes, columns = shape
    z, target = torch.randn(count, columns), torch.randint(classes, (count,))
    stats = emulated.centroid_stats(10 * torch.eye(classes, columns), False, False)
    center, batches = torch.zeros(columns), torch.tensor(0)
    for batch_ratio in (True, False):
        before = launches()
        _, rows, coefficients, moved, grad, _ = emulated.loss(
            z, target, None, center, batches, 0.9, *stats, None, 1.0, True, False, False, batch_ratio, 1, 1e-8, 0.0,
            -100, not batch_ratio,
        )  # fmt: skip
        assert launches() - before == 4
        before = launches()
        if batch_ratio:
            emulated.input_grad(z, target, moved, *stats, rows, coefficients, torch.tensor(2.0), False, -100)
        else:
            emulated.scale_(grad, torch.tensor(2.0))
        assert launches() - before == 1
