"""The loss of every backend, and of the reference, against the literal definition in float64."""

import itertools
from functools import partial

import pytest
import torch
from conftest import relative
from problems import (
    ACTIVATIONS,
    BOTH,
    HALF,
    LEFT,
    RATIOS,
    SEPARATIONS,
    SINGLE,
    Options,
    check,
    check_against_float64,
    check_against_the_literal_definition,
    evaluate,
    every_backend,
    every_ratio,
    every_separation,
    make,
    plain_and_focus,
    to,
)
from torch import Tensor

import ncmi_kernels
from ncmi_kernels import ncmi_loss, ncmi_terms
from ncmi_kernels.testing import EXTREMES

# With the focus center, weight and ignored rows come together or not at all.
VARIANTS = [
    (*variant, focus)
    for focus in (0.0, 10.0)
    for variant in itertools.product(SEPARATIONS, RATIOS, ACTIVATIONS, BOTH, BOTH, BOTH, BOTH)
    if not focus or variant[4] == variant[5] == variant[6]
]


@every_backend
@pytest.mark.parametrize(("separation", "ratio", "activation", "l2", "center", "weight", "ignore", "focus"), VARIANTS)
def test_every_variant_matches_the_literal_definition(
    separation, ratio, activation, l2, center, weight, ignore, focus, backend, interpreted
):
    s, r, a = separation == SEPARATIONS[1], ratio == RATIOS[1], activation == ACTIVATIONS[1]
    # A design in which any three options meet, with the focus any two.
    design = (s ^ r ^ a ^ l2,) * 3 if focus else (s ^ r ^ a, r ^ a ^ l2, s ^ a ^ l2)
    if interpreted and (center, weight, ignore) != design:
        pytest.skip(LEFT)
    problem = make(13, 7, 37, center=center, weight=weight, ignore=ignore)
    options = Options(0.7, l2, activation, separation, ratio, separation_focus=focus)
    check_against_the_literal_definition(problem, options, backend)


@every_backend
@plain_and_focus
@every_separation
@pytest.mark.parametrize(("sharpness", "reduction"), [(0.5, "none"), (1.0, "sum"), (4.0, "mean"), (30.0, "mean")])
def test_soft_margin(sharpness, reduction, separation, focus, backend):
    problem = make(13, 7, 37, center=True, weight=True, ignore=True)
    options = {"separation": separation, "separation_focus": focus, "reduction": reduction}
    check_against_the_literal_definition(
        problem, Options(0.7, True, ratio="soft_margin", sharpness=sharpness, **options), backend
    )


@every_backend
def test_soft_margin_of_a_sample_on_its_centroid(backend):
    """r = 0, whose logarithm is none: no loss, and no pull, of which a small sharpness would make any number."""
    xi = (
        torch.randn(4, 1, dtype=torch.float64).expand(4, 30).contiguous()
    )  # q and p are uniform: A is 0 to the last bit
    xi[3] = torch.randn(30)
    for sharpness in (0.3, 0.5, 1.0, 4.0):
        z = xi[:3].clone().requires_grad_()
        loss = ncmi_loss(z, torch.arange(3), xi, ratio="soft_margin", sharpness=sharpness, backend=backend)
        (grad,) = torch.autograd.grad(loss, z)
        assert 0 <= loss < 1e-6
        assert grad.abs().max() < 1e-12


@every_backend
@pytest.mark.parametrize("center", BOTH)
@pytest.mark.parametrize("l2", BOTH)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_ratio
@every_separation
def test_gradcheck(separation, ratio, activation, l2, center, backend, interpreted):
    if interpreted and (center or not (activation == "nsf") == l2 == (ratio == "batch")):
        pytest.skip(LEFT)
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=interpreted)  # fast: in random directions
    options = {"l2_normalize": l2, "activation": activation, "separation": separation, "temperature": 0.7}
    z, target, xi, c, w = make(5, 3, 6, center=center, weight=True, ignore=True, spread=1.0)
    z, xi = z.requires_grad_(), xi.requires_grad_()
    inside = target.clamp(min=0)
    for reduction in ("mean",) if ratio == "batch" else ("mean", "sum", "none"):
        assert gradcheck(
            lambda a, b, reduction=reduction: ncmi_loss(
                a, target, b, center=c, weight=w, ratio=ratio, reduction=reduction, backend=backend, **options
            ),
            (z, xi),
        )
    assert gradcheck(lambda a, b: ncmi_terms(a, inside, b, center=c, backend=backend, **options), (z, xi))


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_authors_regime_in_float32(separation, ratio, temperature, backend, interpreted):
    """Unit features and one-hot centroids: p and q differ by a percent, and so much the more do roundings count."""
    if interpreted and (ratio == "batch") != (temperature == 0.2):
        pytest.skip(LEFT)
    options = Options(temperature, True, "nsf", separation, ratio)
    rows, classes = (16, 20) if interpreted else (128, 100)
    worst = torch.zeros(2, 3)
    for _ in range(1 if interpreted else 3):
        z, target, _, _, _ = make(rows, classes, 512, dtype=torch.float32)
        problem = z, target, 10 * torch.eye(classes, 512), z.mean(0), None
        expected = evaluate(problem, options, "float64")
        for i, path in enumerate((backend, "reference")):
            errors = [relative(a, e) for a, e in zip(evaluate(problem, options, path), expected, strict=True)]
            worst[i] = torch.maximum(worst[i], torch.tensor(errors))
    assert (worst[0] <= 1e-5).all(), worst
    assert (worst[0] * 10 < worst[1]).all(), "the kernels should be far closer to float64 than autograd is"


RANDOM = [(64, 10, 100), (33, 100, 17), (16, 1000, 40), (20, 17, 1000), (9, 5, 4097)]


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("shape", RANDOM)
def test_random_centroids_in_float32(shape, separation, ratio, l2, backend, interpreted):
    if interpreted:
        (rows, classes, columns), number = shape, RANDOM.index(shape)
        # Any two options meet, and each meets every shape.
        other = separation == SEPARATIONS[1]
        if (ratio == RATIOS[1], l2) != (other ^ number % 2, other ^ number // 2 % 2):
            pytest.skip(LEFT)
        shape = min(rows, 16), min(classes, 60), columns  # programs by class take as long as any
    options = Options(1.0, l2, "nsf", separation, ratio)
    problem = make(*shape, center=True, dtype=torch.float32)
    expected = evaluate(problem, options, "float64")
    ours, autograd = (evaluate(problem, options, path) for path in (backend, "reference"))
    for a, r, e, bound in zip(ours, autograd, expected, (2e-6, 5e-6, 5e-6), strict=True):
        assert relative(a, e) <= bound
        # "no further off than autograd", but for what either rounds its own result by
        assert relative(a, e) <= relative(r, e) + 5e-7


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("columns", [3, 4, 17, 130])
def test_centroids_equal_in_all_columns_but_one(columns, ratio, separation, backend, interpreted):
    """Such rows are not read from the table but written out from two numbers (OwnRows); dense rows come between."""
    if interpreted and (columns, ratio) != (17, "batch"):
        pytest.skip(LEFT)
    z, target, xi, center, _ = make(60, 12, columns, center=True, dtype=torch.float32)
    for c, (lone, value, other) in enumerate(
        [(0, 10, 0), (1, 10, 0), (columns - 1, 10, 0), (2, -3, 0), (0, 1, 2), (1, 5, 2), (2, 2, 2), (0, -40, -50)]
    ):
        xi[c] = other
        xi[c, lone] = value
    for l2 in (True, False):
        options = Options(1.0, l2, "nsf", separation, ratio)
        problem = z, target, xi, center, None
        expected = evaluate(problem, options, "float64", literal=True)
        check(evaluate(problem, options, backend), expected, SINGLE)
        check(evaluate(to(torch.float64, problem), options, backend), expected, 1e-10)


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("columns", [64, 200, 1000])
def test_centroids_that_began_one_hot(columns, ratio, separation, backend, interpreted):
    """Large in a few columns and small in the others, where the kernels take other formulas."""
    if interpreted and (columns, ratio) != (200, "batch"):
        pytest.skip(LEFT)
    z, target, _, center, _ = make(50, 20, columns, center=True, dtype=torch.float32)
    xi = 10 * torch.eye(20, columns) + 0.3 * torch.randn(20, columns)
    xi[3, -1] = -20.0
    options = Options(1.0, True, "nsf", separation, ratio)
    problem = z, target, xi, center, None
    expected = evaluate(problem, options, "float64")
    ours, autograd = (evaluate(problem, options, each) for each in (backend, "reference"))
    for a, r, e, bound in zip(ours, autograd, expected, (2e-6, 5e-6, 5e-6), strict=True):
        assert relative(a, e) <= bound
        assert relative(a, e) <= relative(r, e) + 1e-7


@every_backend
@pytest.mark.parametrize("reach", [1e-3, 0.1, 0.24, 0.26, 0.9, 1.1, 4.0, 30.0])
@every_separation
def test_every_range_of_the_activation(reach, separation, backend, interpreted):
    """The kernels choose polynomials by a row's largest |f|; errors stay small on both sides of each border."""
    z, target, xi, _, _ = make(8 if interpreted else 32, 10, 200, dtype=torch.float32, spread=1.0)
    z = reach * z / z.abs().amax(dim=1, keepdim=True)
    options = Options(separation=separation)
    for logits, bound in ((xi, 5e-6), (10 * torch.eye(10, 200), 1e-5)):
        check_against_float64((z, target, logits, None, None), options, backend, bound)


@every_backend
def test_rows_of_every_range_in_one_class(backend):
    """Rows that are summed differently meet in the gradient of one centroid."""
    z, _, xi, _, _ = make(12, 2, 50, dtype=torch.float32, spread=1.0)
    z = z * torch.logspace(-3, 2, 12)[:, None]
    for target in (torch.zeros(12, dtype=torch.int64), torch.arange(12) % 2):
        for separation, ratio in itertools.product(SEPARATIONS, RATIOS):
            options = Options(separation=separation, ratio=ratio)
            check_against_float64((z, target, xi, None, None), options, backend, 5e-6)


@every_backend
@pytest.mark.parametrize("dtype", HALF)
@every_separation
@pytest.mark.parametrize(
    ("focus", "ratio", "l2", "wide_centroids"),
    [*itertools.product([0.0], RATIOS, BOTH, BOTH), (10.0, "batch", True, True)],
)
def test_half_precision(focus, ratio, l2, wide_centroids, dtype, separation, backend, interpreted):
    if interpreted and wide_centroids != l2:
        pytest.skip(LEFT)
    z, target, xi, center, _ = make(24, 9, 133, center=True, dtype=dtype, spread=1.0)
    problem = z, target, xi.float() if wide_centroids else xi, center, None
    options = Options(0.5, l2, "nsf", separation, ratio, separation_focus=focus)
    # Upstream 64: the gradients are well inside float16's range, as under a GradScaler.
    expected = evaluate(problem, options, "float64", upstream=64.0)
    loss, grad_z, grad_xi = evaluate(problem, options, backend, upstream=64.0)
    assert loss.dtype == torch.float32
    assert grad_z.dtype == dtype
    assert relative(loss, expected[0]) < 2e-6
    for grad, exact in ((grad_z, expected[1]), (grad_xi, expected[2])):
        rounding = relative(exact.to(grad.dtype), exact)  # what storing the exact gradient would cost
        assert relative(grad, exact) <= 1.05 * rounding + 5e-6


SIZES = [  # rows, classes, columns
    *((3, 4, columns) for columns in (2, 3, 15, 16, 17, 63, 64, 65, 80, 1000, 4097)),
    *((rows, classes, 19) for rows in (1, 2, 50) for classes in (2, 3, 17, 1000, 4097)),
]
SIZES_WITH_FOCUS = ((1, 2, 2), (3, 2, 5), (17, 33, 64), (2, 257, 130), (9, 5, 1031))


@every_backend
@every_separation
@pytest.mark.parametrize(
    ("focus", "size"), [(0.0, size) for size in SIZES] + [(3.0, size) for size in SIZES_WITH_FOCUS], ids=str
)
def test_odd_sizes(focus, size, separation, backend, interpreted):
    rows, classes, columns = size
    if interpreted and (max(rows, classes) > 17 or (focus and columns > 100)):
        if size != (50, 1000, 19):
            pytest.skip(LEFT)
        size = 50, 257, 19
    # In float32 the focus takes other products of matrices. In two or three columns they cancel out.
    dtype, bounds = (torch.float32, 5e-6) if focus and columns > 3 else (torch.float64, 1e-10)
    problem = make(*size, center=True, dtype=dtype)
    for l2 in BOTH if rows == 3 else (columns > 19,):
        options = Options(l2_normalize=l2, separation=separation, separation_focus=focus)
        check_against_float64(problem, options, backend, bounds, literal=rows * classes < 10000)


@every_backend
@every_separation
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(("focus", "ratio"), [(0.0, "batch"), (10.0, "sample")])
def test_saturated(focus, ratio, name, separation, backend):
    """The distribution and its gradient are right, or what is nothing in float64 is next to nothing."""
    z, xi = EXTREMES[name]()
    problem = z, torch.arange(len(z)) % len(xi), xi, None, None
    for activation in ACTIVATIONS if name == "centroids" else ("nsf",):
        options = Options(activation=activation, separation=separation, ratio=ratio, separation_focus=focus / 5)
        expected = evaluate(problem, options, "float64", literal=True)
        for a, e in zip(evaluate(problem, options, backend), expected, strict=True):
            assert relative(a, e) < 1e-5 or max(a.abs().max(), e.abs().max()) < 1e-30


@every_backend
@pytest.mark.parametrize("huge", [1e4, 1e18, 3e37])
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_huge_element(huge, l2, activation, backend):
    """The square of 1e20 overflows float32; a vector with it has a direction all the same."""
    z = torch.randn(3, 30)
    z[torch.arange(3), torch.arange(3) * 7] = huge
    options = Options(1.0, l2, activation)
    problem = z, torch.arange(3), torch.randn(3, 30), None, None
    loss, grad_z, grad_xi = evaluate(problem, options, backend)
    expected = evaluate(problem, options, "float64")
    assert relative(loss, expected[0]) < 1e-5
    assert bool(grad_z.isfinite().all())
    assert relative(grad_xi, expected[2]) < 1e-5


@every_backend
def test_feature_vector_of_zeros(backend):
    """Its length is under the floor of 1e-12: divided by the floor, as torch.nn.functional.normalize."""
    z = torch.randn(3, 20)
    z[1] = 0
    problem = z, torch.arange(3), torch.randn(3, 20), None, None
    check_against_float64(problem, Options(l2_normalize=True), backend, 1e-5)


@every_backend
def test_confident_predictions(backend):
    """p on the own centroid, far from the others: the concentration is near zero, the loss and gradients finite.

    What is left of it is rounding for the most part, that of the centroids' two levels above all: six draws of them are
    compared with autograd, which has six times the error over many.
    """
    for separation, ratio in itertools.product(SEPARATIONS, RATIOS):
        options = Options(separation=separation, ratio=ratio)
        squares = torch.zeros(2, 3)  # of the relative errors of ours and autograd's; loss, gradients
        for _ in range(6):
            xi = (4.5 + torch.rand(())) * (2 * torch.eye(5, 40) - 1)
            problem = xi + 1e-3 * torch.randn_like(xi), torch.arange(5), xi, None, None
            expected = evaluate(problem, options, "float64")
            for path, errors in zip((backend, "reference"), squares, strict=True):
                for k, (a, e) in enumerate(zip(evaluate(problem, options, path), expected, strict=True)):
                    assert bool(a.isfinite().all())
                    errors[k] += relative(a, e) ** 2
        assert bool((squares[0].sqrt() <= 1.1 * squares[1].sqrt() + 5e-6).all()), squares.sqrt()


@every_backend
@every_separation
def test_near_zero(separation, backend):
    """A and G are of second order in features and centroids there: what rounds relative to 1 loses them.

    For centroid_to_sample, whose gradients are made of differences p - q, the bounds are twice the largest errors of
    120 draws on the CPU.
    """
    z, target, xi, _, _ = make(40, 3, 24, spread=0.05, dtype=torch.float32)
    bounds = SINGLE if separation == "sample_to_centroid" else (7e-6, 1e-5, 2e-5)
    for problem in ((z, target, xi, None, None), (z, target, xi, z.mean(0), None)):
        check_against_float64(problem, Options(separation=separation), backend, bounds, literal=True)


@every_backend
def test_large_batch_of_one_class_against_reference(backend) -> None:
    """More rows of one class than are summed in float32 before going to float64."""
    z: Tensor = 0.05 * torch.randn(1000, 24)
    problem = z, torch.zeros(1000, dtype=torch.int64), 0.1 * torch.randn(3, 24), None, None
    for separation in SEPARATIONS:
        check_against_float64(problem, Options(separation=separation), backend, 5e-6)


def test_nsf_is_a_distribution_and_its_logarithm_right_everywhere():
    x = torch.cat((torch.randn(5, 12), torch.full((1, 12), -200.0), torch.full((1, 12), 200.0)))
    exact = (torch.sigmoid(x.double()) / torch.sigmoid(x.double()).sum(-1, keepdim=True)).log()
    assert relative(ncmi_kernels.log_nsf(x), exact) < 1e-6
    assert relative(ncmi_kernels.nsf(x).sum(-1), torch.ones(7)) < 1e-6
    assert torch.equal(ncmi_kernels.nsf(x, dim=0), ncmi_kernels.nsf(x.t()).t())
    assert ncmi_kernels.nsf(x.bfloat16()).dtype == torch.bfloat16
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ncmi_kernels.nsf, y)
    assert torch.autograd.gradgradcheck(ncmi_kernels.log_nsf, y)
