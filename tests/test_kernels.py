"""The kernels of every backend, and the reference, against the literal definition in float64."""

import itertools
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import KERNELS, device_of, relative
from problems import (
    ACTIVATIONS,
    HALF,
    LEFT,
    RATIOS,
    REDUCTIONS,
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
from ncmi_kernels import _loss, _ops, _plain, ncmi_loss, ncmi_terms, reference
from ncmi_kernels._problem import problem_of

BOTH = (False, True)
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
    if interpreted and not (center == weight == ignore or (center != ignore) == l2 == weight):
        pytest.skip(LEFT)
    problem = make(13, 7, 37, center=center, weight=weight, ignore=ignore)
    options = Options(0.7, l2, activation, separation, ratio, separation_focus=focus)
    check_against_the_literal_definition(problem, options, backend)


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
    options = Options(temperature, True, "nsf", separation, ratio)
    worst = torch.zeros(2, 3)
    for _ in range(1 if interpreted else 3):
        z, target, _, _, _ = make(128, 100, 512, dtype=torch.float32)
        problem = z, target, 10 * torch.eye(100, 512), z.mean(0), None
        expected = evaluate(problem, options, "float64")
        for i, path in enumerate((backend, "reference")):
            errors = [relative(a, e) for a, e in zip(evaluate(problem, options, path), expected, strict=True)]
            worst[i] = torch.maximum(worst[i], torch.tensor(errors))
    assert (worst[0] <= 1e-5).all(), worst
    assert (worst[0] * 10 < worst[1]).all(), "the kernels should be far closer to float64 than autograd is"


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("shape", [(64, 10, 100), (33, 100, 17), (16, 1000, 40), (20, 17, 1000), (9, 5, 4097)])
def test_random_centroids_in_float32(shape, separation, ratio, l2, backend, interpreted):
    rows, classes, columns = shape
    shape = rows, min(classes, 60) if interpreted else classes, columns  # programs by class take as long as any
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
def test_every_range_of_the_activation(reach, separation, backend):
    """The kernels choose polynomials by a row's largest |f|; errors stay small on both sides of each border."""
    z, target, xi, _, _ = make(32, 10, 200, dtype=torch.float32, spread=1.0)
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
@every_ratio
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("wide_centroids", [False, True])
@plain_and_focus
def test_half_precision(focus, dtype, separation, ratio, l2, wide_centroids, backend, interpreted):
    if interpreted and focus and not (ratio == "batch" and l2 and wide_centroids):
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
    *((1, 2, 2), (17, 33, 64), (2, 257, 130), (9, 5, 1031)),
]


@every_backend
@every_separation
@pytest.mark.parametrize("size", SIZES, ids=str)
@plain_and_focus
def test_odd_sizes(focus, size, separation, backend, interpreted):
    rows, classes, columns = size
    if interpreted and (max(rows, classes) > 17 or (focus and (rows == 3) == (columns > 3))):
        pytest.skip(LEFT)
    # In float32 the focus takes other products of matrices. In two or three columns they cancel out.
    dtype, bounds = (torch.float32, 5e-6) if focus and columns > 3 else (torch.float64, 1e-10)
    problem = make(*size, center=True, dtype=dtype)
    for l2 in BOTH if rows == 3 else (columns > 19,):
        options = Options(l2_normalize=l2, separation=separation, separation_focus=focus)
        check_against_float64(problem, options, backend, bounds, literal=rows * classes < 10000)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@every_ratio
@plain_and_focus
def test_nothing_to_average(focus, ratio, backend):
    """An empty batch and one of ignored rows only: NaN for the mean, zero gradients, as cross_entropy."""
    xi = torch.randn(4, 6, requires_grad=True)
    loss_of = partial(ncmi_loss, ratio=ratio, separation_focus=focus, backend=backend)
    for rows in (0, 5):
        z = torch.randn(rows, 6, requires_grad=True)
        target = torch.full((rows,), -100)
        loss = loss_of(z, target, xi)
        assert loss.isnan()
        if backend != "reference":
            grads = torch.autograd.grad(loss, (z, xi))
            assert all(bool((g == 0).all()) for g in grads)
        if ratio == "sample":
            assert loss_of(z, target, xi, reduction="sum") == 0
            each = loss_of(z, target, xi, reduction="none")
            assert each.shape == (rows,)
            assert bool((each == 0).all())


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@plain_and_focus
def test_ignored_rows_leave_no_trace(focus, backend):
    """Their content, NaN included, changes no bit; their gradient is written and zero, whatever the upstream."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    z, target, xi, _, _ = make(10, 4, 33, ignore=True, dtype=dtype)
    kept = target != -100
    dirty = z.masked_fill(~kept[:, None], torch.nan)
    # Products of matrices and sums of torch may take other steps where there are fewer rows.
    rounding = 0 if not focus and backend != "reference" else 1e-6 if dtype == torch.float32 else 1e-12
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "none")):
        options = Options(ratio=ratio, reduction=reduction, separation_focus=focus)
        clean = evaluate((z, target, xi, None, None), options, backend)
        check(evaluate((dirty, target, xi, None, None), options, backend), clean, 0)
        loss, *grads = evaluate((z[kept], target[kept], xi, None, None), options, backend)
        check((clean[0][kept] if reduction == "none" else clean[0], clean[1][kept], clean[2]), (loss, *grads), rounding)
        assert bool((clean[1][~kept] == 0).all())


@every_backend
@every_separation
@pytest.mark.parametrize("l2", BOTH)
@plain_and_focus
def test_rows_apart(focus, l2, separation, backend, interpreted):
    """A row that is not finite has a loss and a gradient that are NaN; no other row sees it, nor an ignored one."""
    if interpreted and l2 == bool(focus):
        pytest.skip(LEFT)
    options = Options(separation=separation, l2_normalize=l2, ratio="sample", reduction="none", separation_focus=focus)
    z, target, xi, _, _ = make(6, 4, 9, dtype=torch.float32)
    target[2] = -100
    others = torch.arange(6) != 4
    expected = evaluate((z, target, xi, None, None), options, backend)
    assert expected[1][2].eq(0).all()
    for value in (math.nan, math.inf):
        spoilt = z.clone()
        spoilt[2, 1] = value
        check(evaluate((spoilt, target, xi, None, None), options, backend), expected, 0)
        spoilt[4, 3] = value
        loss, by_input, _ = evaluate((spoilt, target, xi, None, None), options, backend)
        assert loss[4].isnan()
        assert by_input[4].isnan().all()
        check((loss[others], by_input[others]), (expected[0][others], expected[1][others]), 0)


@every_backend
@plain_and_focus
def test_an_ignore_index_that_is_also_a_row_number(focus, backend):
    z, _, xi, _, _ = make(6, 4, 9)
    problem = z, torch.tensor([1, 2, 0, 3, 1, 2]), xi, None, None
    check_against_float64(problem, Options(ignore_index=2, separation_focus=focus), backend, 1e-10, literal=True)


@every_backend
@pytest.mark.parametrize(
    "layout", ["transposed", "every other column", "expanded", "offset", "reversed rows", "column stride 3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@plain_and_focus
def test_layouts(focus, layout, dtype, backend, interpreted):
    if interpreted and focus and dtype == torch.bfloat16:
        pytest.skip(LEFT)
    base = torch.randn(60, 60).to(dtype)
    z = {
        "transposed": base.t()[:20, :31],
        "every other column": base[:20, ::2],
        "expanded": base[:1, :30].expand(20, 30),
        "offset": base[7:27, 5:38],
        "reversed rows": base.flip(0)[:20],
        "column stride 3": base[:20, 1::3],
    }[layout]
    target = torch.arange(20) % 3
    target_strided = torch.stack((target, target + 1), dim=1)[:, 0]
    xi_base = torch.randn(60, 120)
    xi = xi_base[: z.shape[1], :3].t()
    before = base.clone()
    options = Options(separation_focus=focus)
    strided = evaluate((z, target_strided, xi, None, None), options, backend)
    packed = evaluate((z.contiguous(), target, xi.contiguous(), None, None), options, backend)
    # With the focus torch.sigmoid and products of matrices see the strides.
    check(strided, packed, 1e-6 if focus and not z.is_contiguous() else 0)
    assert torch.equal(base, before), "the input was modified"


@every_backend
@plain_and_focus
def test_upstream_gradients(focus, backend):
    """Non-unit, stride-0 and strided upstream gradients."""
    z, target, xi, _, _ = make(8, 3, 21)
    z.requires_grad_(), xi.requires_grad_()
    options = Options(ratio="sample", reduction="none", separation_focus=focus)
    losses = ncmi_loss(z, target, xi, ratio="sample", reduction="none", separation_focus=focus, backend=backend)
    exact = reference.loss(z, target, xi, None, None, options, literal=True)
    factors = torch.randn(16, dtype=torch.float64)[::2]
    for upstream in (factors, torch.tensor(3.0, dtype=torch.float64).expand(8)):
        check(*(torch.autograd.grad(each, (z, xi), upstream, retain_graph=True) for each in (losses, exact)), 1e-10)
    mean = ncmi_loss(z, target, xi, separation_focus=focus, backend=backend)
    one, three = (torch.autograd.grad(factor * mean, z, retain_graph=True)[0] for factor in (1, 3))
    assert relative(three, 3 * one) < 1e-14


@every_backend
@pytest.mark.parametrize(("ratio", "reduction"), REDUCTIONS)
@every_separation
@pytest.mark.parametrize("spread", [0.1, 2.0])  # of the features: rows near the centre of the sigmoid, and not
@plain_and_focus
def test_backward_twice_gives_the_same_bits(focus, spread, separation, ratio, reduction, backend, interpreted):
    if interpreted and (focus or reduction == "sum") and (spread < 1) == (ratio == "batch"):
        pytest.skip(LEFT)
    z, target, xi, center, weight = make(
        9, 3, 121, center=True, weight=True, ignore=True, spread=spread, dtype=torch.float32
    )
    z.requires_grad_(), xi.requires_grad_()
    options = {"separation": separation, "ratio": ratio, "reduction": reduction, "separation_focus": focus}
    losses = ncmi_loss(z, target, xi, center=spread * center, weight=weight, backend=backend, **options)
    upstream = torch.full_like(losses, 3.7)
    first = torch.autograd.grad(losses, (z, xi), upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    (alone,) = torch.autograd.grad(losses, xi, upstream, retain_graph=True)
    assert torch.equal(alone, first[1])
    second = torch.autograd.grad(losses, (z, xi), upstream)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c), "the second pass wrote to the result of the first"
    problem = z, target, xi, spread * center, weight
    check(first, evaluate(problem, Options(**options), "float64", upstream=3.7)[1:], 5e-6)


@every_backend
@every_separation
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_forward_pass_for_any_upstream(separation, reduction, backend):
    """ratio="sample" makes the gradient of input in the forward pass; what follows may still scale it, or drop it."""
    problem = make(40, 5, 133, center=True, weight=True, ignore=True, dtype=torch.float32)
    for l2 in (False, True):
        options = Options(0.7, l2, separation=separation, ratio="sample", reduction=reduction)
        for upstream in (1.0, 0.0, -2.5, 1e-20):
            # For 0 both are exactly zero.
            expected = evaluate(problem, options, "float64", literal=True, upstream=upstream)
            check(evaluate(problem, options, backend, upstream=upstream), expected, 5e-6)


@every_backend
def test_gradients_only_where_asked_for(monkeypatch, backend):
    calls = []
    for name in ("input_grad", "centroid_grad"):
        operator = getattr(_ops.operators(backend), name)
        monkeypatch.setattr(
            _ops.operators(backend),
            name,
            staticmethod(lambda *a, name=name, operator=operator: calls.append(name) or operator(*a)),
        )
    z, target, xi, _, _ = make(8, 3, 21)
    ncmi_loss(z.requires_grad_(), target, xi, backend=backend).backward()
    assert calls == ["input_grad"]
    ncmi_loss(z.detach(), target, xi.requires_grad_(), backend=backend).backward()
    assert calls == ["input_grad", "centroid_grad"]


@every_backend
def test_the_forward_pass_makes_a_gradient_only_where_it_is_used(monkeypatch, backend):
    made = []
    operator = _ops.operators(backend).loss

    def loss(*arguments):
        results = operator(*arguments)
        made.append(results[4].numel() > 0)
        return results

    monkeypatch.setattr(_ops.operators(backend), "loss", loss)
    z, target, xi, _, _ = make(8, 3, 21, dtype=torch.float32)
    for input, reduction, ratio, gradients in (
        (z.clone().requires_grad_(), "mean", "sample", True),
        (z.clone().requires_grad_(), "sum", "sample", True),
        (z.clone().requires_grad_(), "mean", "sample", False),
        (z.clone().requires_grad_(), "none", "sample", True),
        (z.clone().requires_grad_(), "mean", "batch", True),
        (z.half().requires_grad_(), "mean", "sample", True),
        (z, "mean", "sample", True),
    ):
        with torch.set_grad_enabled(gradients):
            ncmi_loss(input, target, xi, reduction=reduction, ratio=ratio, backend=backend)
    assert made == [True, True, False, False, False, False, False]


def level(value, rows, columns=30):
    return value + torch.linspace(-3, 3, columns).expand(rows, columns)


SATURATED = {  # input and centroid_logits; at -200 the sum of the sigmoids underflows in float32
    "rows at -200": lambda: (level(-200, 4), torch.randn(3, 30)),
    "rows at 200": lambda: (level(200, 4), torch.randn(3, 30)),
    "centroids": lambda: (torch.randn(6, 30), torch.cat((level(-200, 1), level(60, 1), level(0, 1) + torch.randn(30)))),
    "all below": lambda: (2 * torch.randn(8, 12) - 95, 2 * torch.randn(5, 12) - 60),
    "spread 30": lambda: (30 * torch.randn(11, 40), 30 * torch.randn(6, 40)),
    "spread 300": lambda: (300 * torch.randn(11, 40), 300 * torch.randn(6, 40)),
}


@every_backend
@every_separation
@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize(("focus", "ratio"), [(0.0, "batch"), (10.0, "sample")])
def test_saturated(focus, ratio, name, separation, backend):
    """The distribution and its gradient are right, or what is nothing in float64 is next to nothing."""
    z, xi = SATURATED[name]()
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
@plain_and_focus
def test_terms(focus, activation, separation, backend):
    """And their gradients for any upstream gradient: each term alone too, and neither."""
    z, target, xi, c, _ = make(9, 5, 33, center=True)
    z.requires_grad_(), xi.requires_grad_()
    options = Options(0.5, True, activation, separation, separation_focus=focus)
    expected = reference.terms(z, target, xi, c, options, literal=True)
    keywords = {"activation": activation, "separation": separation, "separation_focus": focus, "backend": backend}
    actual = ncmi_terms(z, target, xi, center=c, temperature=0.5, l2_normalize=True, **keywords)
    check(actual, tuple(expected), 1e-10)
    for kept in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        upstream = (torch.randn(2, 9, dtype=torch.float64) * torch.tensor(kept)[:, None]).unbind()
        check(*(torch.autograd.grad(each, (z, xi), upstream, retain_graph=True) for each in (actual, expected)), 1e-10)
    # One of the two alone.
    lone = ncmi_terms(z, target, xi, center=c, **keywords)[1].sum()
    full = Options(activation=activation, separation=separation, separation_focus=focus)
    exact = reference.terms(z, target, xi, c, full)[1].sum()
    check(*(torch.autograd.grad(each, z) for each in (lone, exact)), 1e-10)


@every_backend
def test_gradients_of_identical_distributions_vanish(backend):
    """p = q for every class: both terms are zero, and the ratio is 0 / eps."""
    xi = torch.randn(1, 30).expand(4, 30)
    z = xi.clone()
    loss, *_ = evaluate((z, torch.arange(4), xi, None, None), Options(), backend)
    assert loss.abs() < 1.0
    concentration, separation = ncmi_terms(z, torch.arange(4), xi, backend=backend)
    assert concentration.abs().max() < 1e-9
    assert separation.abs().max() < 1e-7


@every_backend
@plain_and_focus
def test_autocast_changes_nothing(focus, backend):
    z, target, xi, _, _ = make(8, 3, 21, dtype=torch.float32)
    z.requires_grad_(), xi.requires_grad_()
    loss_of = partial(ncmi_loss, separation_focus=focus)
    expected = loss_of(z, target, xi, backend=backend)
    grads = torch.autograd.grad(expected, (z, xi), retain_graph=True)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        actual = loss_of(z, target, xi, backend=backend)
        check((actual, *torch.autograd.grad(actual, (z, xi))), (expected, *grads), 0)
        assert relative(loss_of(z, target, xi, backend="reference"), expected) < 1e-5
        assert loss_of(z.bfloat16(), target, xi, backend=backend).dtype == torch.float32


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


# ------------------------------------------------------------------------------------------------------------
# Means of the terms, beside the loss
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@every_separation
def test_means_of_the_terms(separation, backend, interpreted, monkeypatch):
    """CMI and Gamma of the batch, the same for every ratio and reduction, in float64 and not differentiated."""
    many = 8300  # in several programs, and then in one
    if interpreted:
        monkeypatch.setattr("ncmi_kernels._triton.launches.LARGEST_WHOLE", 512)
        many = 530
    for dtype, rows, weighted in ((torch.float64, 13, False), (torch.float32, 13, True), (torch.float32, many, True)):
        z, target, xi, center, weight = make(rows, 5, 4, center=True, weight=weighted, ignore=True, dtype=dtype)
        kept = target != -100
        wide = z[kept].double(), target[kept], xi.double(), center.double()
        exact = torch.stack(reference.terms(*wide, Options(separation=separation), literal=True))
        factor = weight.double()[target[kept]] if weighted else torch.ones_like(exact[0])
        expected = exact @ factor / factor.sum()
        for ratio, reduction in REDUCTIONS:
            options = Options(separation=separation, ratio=ratio, reduction=reduction)
            for input in (z, z.clone().requires_grad_()) if options.scalar_by_sample else (z,):
                actual = _loss.loss(*problem_of(input, target, xi, center, weight, options, backend)).means
                assert actual.dtype == torch.float64
                assert not actual.requires_grad
                assert actual.shape == (2,)
                for a, e in zip(actual, expected, strict=True):
                    assert relative(a, e) < (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_means_of_no_terms(backend):
    z, xi = torch.randn(5, 6), torch.randn(4, 6)
    for rows, (ratio, reduction) in itertools.product((0, 5), REDUCTIONS):
        options = Options(ratio=ratio, reduction=reduction)
        batch = z[:rows], torch.full((rows,), -100), xi, None, None
        assert bool(_loss.loss(*problem_of(*batch, options, backend)).means.isnan().all())


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_means_of_the_terms_in_a_compiled_step(backend):
    z, target, xi, _, _ = make(7, 3, 12, dtype=torch.float32)
    z.requires_grad_(), xi.requires_grad_()

    def step(z, xi):
        return _loss.loss(*problem_of(z, target, xi, None, None, Options(), backend))[:2]

    loss, means = step(z, xi)
    compiled_loss, compiled_means = torch.compile(step, fullgraph=True, backend="aot_eager")(z, xi)
    assert torch.equal(compiled_means, means)
    assert not compiled_means.requires_grad
    for a, e in zip(torch.autograd.grad(compiled_loss, (z, xi)), torch.autograd.grad(loss, (z, xi)), strict=True):
        assert relative(a, e) < 1e-6


# ------------------------------------------------------------------------------------------------------------
# From terms to the loss; the gradient from a reference of each row's own
# ------------------------------------------------------------------------------------------------------------


def check_reduce(run, separation, focus, ratio, reduction):
    """Loss, means and sums by the definition in float64, coefficients by the derivatives that autograd has of it."""
    options = Options(separation=separation, ratio=ratio, reduction=reduction, separation_focus=focus, eps=1e-3)
    for rows, classes, weighted, shared in ((9, 4, True, False), (9, 4, False, True), (2100, 3, True, True)):
        values = torch.rand(2, rows, dtype=torch.float64) + 0.1
        stats = torch.randn(rows, 7, dtype=torch.float64)
        target = torch.randint(classes, (rows,))
        target[::3] = -100
        kept = target != -100
        values[:, ~kept] = 0
        norms = torch.full((classes + 1, 8), torch.nan, dtype=torch.float64)
        norms[-1, 2] = 5  # classes there are, of which the table has some
        weight = torch.rand(classes) + 0.5 if weighted else None
        w = torch.ones(rows).double() if weight is None else weight.double()[target.clamp(min=0)]
        w = torch.where(kept, w, 0)
        a, g = values.clone().requires_grad_()
        leaf = a, g
        each = a / (g + options.eps)
        sums = torch.stack([w.sum(), w @ a, w @ g, w @ each * (ratio == "sample")])
        given = torch.tensor([7.0, 3.0, 4.0, 5.0 * (ratio == "sample")]).double() if shared else None
        total = sums if given is None else sums + (given - sums).detach()  # of all processes: the others' are constant
        if ratio == "batch":
            expected = (total[1] / total[0]) / (total[2] / total[0] + options.eps)
        elif reduction == "none":
            expected = w * each
        else:
            expected = total[3] / total[0] if reduction == "mean" else total[3]
        alpha, beta = torch.autograd.grad(expected.sum(), leaf)
        by_all, by_own = (0.8, 0.0) if focus else (1.0, 0.2)
        own_mean, all_mean = stats[:, 5], stats[:, 6]
        if separation == "centroid_to_sample":
            coefficients = [alpha, by_all * beta, by_own * beta, alpha * own_mean]
        else:
            own = alpha - by_own * beta
            coefficients = [own, by_all * beta, 0 * beta, own * own_mean + by_all * beta * all_mean]
        arguments = values, stats, target, norms, weight, given, *options.for_reduce
        loss, actual, means, own_sums = run.reduce(*arguments)
        assert relative(loss, expected) < 1e-12
        assert relative(actual, torch.stack(coefficients, dim=1)) < 1e-12
        assert bool((actual[~kept] == 0).all())
        assert relative(means, total[1:3] / total[0]) < 1e-12
        if given is None:
            assert relative(own_sums, sums) < 1e-12
        for t, again in zip((loss, actual, means, own_sums), run.reduce(*arguments), strict=True):
            assert torch.equal(t, again)


@every_backend
@every_separation
@plain_and_focus
@pytest.mark.parametrize(("ratio", "reduction"), REDUCTIONS)
def test_reduce(ratio, reduction, focus, separation, backend):
    check_reduce(_ops.operators(backend), separation, focus, ratio, reduction)


def check_row_references(run, dtype, separation, activation):
    """The gradient of own A_i + other KL to a mixture of each row's own, against autograd in float64."""
    c2s = separation == "centroid_to_sample"
    options = Options(0.7, True, activation, separation)
    for rows, classes, columns in ((7, 5, 33), (3, 2, 2100)):
        z, target, xi, center, _ = make(rows, classes, columns, center=True, ignore=True, dtype=dtype)
        table = run.centroid_stats(xi, options.softmax, c2s)
        stats = run.terms(z, target, center, *table, *options.for_terms)[1]
        kept, y = target != -100, target.clamp(min=0)
        log_q = reference.log_activation(torch.randn(rows, columns).double(), "softmax")
        own, other = torch.randn(2, rows, dtype=torch.float64)
        wide = z.double().requires_grad_()
        log_p = reference.log_probabilities(wide, center.double(), 0.7, True, activation)
        log_own = reference.log_activation(xi.double(), activation)[y]
        divergence = reference.kl_divergence(log_q, log_p) if c2s else reference.kl_divergence(log_p, log_q)
        total = (torch.where(kept, own * reference.kl_divergence(log_p, log_own) + other * divergence, 0)).sum()
        (expected,) = torch.autograd.grad(2 * total, wide)
        # Means under p are of log a, or log 2 a for NSF, which has the normaliser of p in it, with what the row is
        # compared with.
        log_a = log_p.detach() - stats[:, 4, None].log() + (math.log(2) if activation == "nsf" else 0)
        constant = own * stats[:, 5]
        if not c2s:
            constant = constant + other * (log_p.exp() * (log_a - log_q)).sum(dim=1).detach()
        coefficients = torch.stack([own, other, torch.zeros(rows).double(), constant], dim=1)
        coefficients[~kept] = 0
        mixture = (log_q.exp() if c2s else log_q).to(dtype)
        upstream = torch.tensor(2.0, dtype=dtype)
        batch = z, target, center, *table, stats, coefficients, upstream, c2s, -100
        assert relative(run.input_grad(*batch, mixture), expected) < (1e-12 if dtype == torch.float64 else 3e-6)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_for_each_row(dtype, separation, activation, backend):
    check_row_references(_ops.operators(backend), dtype, separation, activation)


# ------------------------------------------------------------------------------------------------------------
# Tables of some of the classes
# ------------------------------------------------------------------------------------------------------------


def present_classes(stats: _plain.Table, target: Tensor):
    """The table of only the classes that occur, and the targets as row numbers in it."""
    present = target[target != -100].unique()
    renumbered = torch.where(target == -100, target, torch.searchsorted(present, target.clamp(min=0)))
    log_activation, activation, reference, norms = stats
    records = torch.cat((present, torch.tensor([len(norms) - 1], device=target.device)))
    table = (
        log_activation[present],
        activation[present] if len(activation) else activation,
        reference,
        norms[records].contiguous(),
    )
    return present, _plain.Table(*table), renumbered


def case_of_few_classes(dtype, separation, run, **options):
    """A batch with 5 of 40 classes: its problem, statistics, and arguments of the operator loss."""
    z, target, xi, center, weight = make(11, 32, 37, center=True, weight=True, ignore=True, dtype=dtype, **options)
    target[target >= 0] %= 5
    xi[7] = 0  # one whose columns are all equal
    c2s = separation == "centroid_to_sample"
    stats = _plain.Table(*run.centroid_stats(xi, False, c2s))
    return (z, 7 * target.clamp(min=0) + target.clamp(max=0), xi, center, weight), stats, c2s


def loss_of(run, problem, stats, target, weight, c2s, batch_ratio=True):
    z, _, _, center, _ = problem
    with_grad = not batch_ratio
    options = (0.7, True, False, c2s, batch_ratio, 1, 1e-8, -100, with_grad)
    return run.loss(z, target, center, None, None, 0.0, *stats, weight, *options)


def check_present_classes(run, dtype, separation):
    problem, stats, c2s = case_of_few_classes(dtype, separation, run)
    z, target, xi, center, weight = problem
    present, table, renumbered = present_classes(stats, target)
    assert 1 < len(present) < len(xi) / 4
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    for batch_ratio in (True, False):
        loss, stats_of_rows, coefficients, _, grad, means = loss_of(
            run, problem, stats, target, weight, c2s, batch_ratio
        )
        rows = stats_of_rows, coefficients
        few = loss_of(run, problem, table, renumbered, weight[present], c2s, batch_ratio)
        for a, e in zip(few, (loss, *rows, torch.empty(0), grad, means), strict=True):
            assert relative(a, e) < rounding
        upstream = torch.full_like(loss, 2.0)
        whole = run.input_grad(z, target, center, *stats, *rows, upstream, c2s, -100)
        assert whole.abs().max() > 0
        assert relative(run.input_grad(z, renumbered, center, *table, *few[1:3], upstream, c2s, -100), whole) < rounding
        whole = run.centroid_grad(z, target, center, xi, *stats, *rows, upstream, c2s, -100)
        own = run.centroid_grad(z, renumbered, center, xi[present], *table, *few[1:3], upstream, c2s, -100)
        assert relative(own, whole[present]) < rounding
    options = (0.7, True, False, c2s, -100)
    few, whole = (run.terms(z, y, center, *s, *options)[0] for y, s in ((renumbered, table), (target, stats)))
    assert relative(few, whole) < rounding


@every_backend
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_of_the_classes_that_occur(dtype, separation, backend):
    """1/C is that of all classes: the same numbers as from the whole table."""
    check_present_classes(_ops.operators(backend), dtype, separation)


def check_totals(run, dtype, separation):
    """Against sums in float64; and the centroid gradient is the part of each class plus that of all rows."""
    for spread in (0.1, 2.0) if dtype == torch.float32 else (2.0,):
        problem, stats, c2s = case_of_few_classes(dtype, separation, run, spread=spread)
        z, target, xi, center, weight = problem
        loss, *rows = loss_of(run, problem, stats, target, weight, c2s)[:3]
        upstream = torch.full_like(loss, -2.0)
        totals = run.class_totals(z, target, center, *rows, upstream, c2s, -100)
        kept = target != -100
        log_p = reference.log_probabilities(z[kept].double(), center.double(), 0.7, True, "nsf")
        beta = -2.0 * rows[1][kept, 1]
        expected = beta @ (log_p if c2s else log_p.exp())
        sums, beta_sum = totals[:-1], totals[-1]
        assert relative(beta_sum, beta.sum()) < 1e-12
        if c2s:  # of log a, which is log p up to a number for each row
            sums, expected = sums - sums.mean(), expected - expected.mean()
        assert relative(sums, expected) < (1e-12 if dtype == torch.float64 else 1e-6)

        def grad(count, y, logits, table, of_rows, *given, z=z, center=center, upstream=upstream, c2s=c2s):
            batch = z[:count], y[:count], center, logits, *table, *(each[:count] for each in of_rows)
            return run.centroid_grad(*batch, upstream, c2s, -100, *given)

        rounding = 1e-12 if dtype == torch.float64 else 1e-6
        whole = grad(len(z), target, xi, stats, rows)
        assert whole.abs().max() > 0
        assert relative(grad(len(z), target, xi, stats, rows, totals), whole) < rounding
        zeros = torch.zeros_like(totals)
        of_all = grad(0, target, xi, stats, rows, totals)
        own = grad(len(z), target, xi, stats, rows, zeros)
        assert relative(of_all + own, whole) < rounding
        present, table, renumbered = present_classes(stats, target)
        absent = torch.ones(len(xi), dtype=torch.bool)
        absent[present] = False
        assert relative(of_all[absent], whole[absent]) < rounding
        assert bool((own[absent] == 0).all())
        few = loss_of(run, problem, table, renumbered, weight[present], c2s)[1:3]
        assert relative(grad(len(z), renumbered, xi[present], table, few, zeros), own[present]) < rounding
        assert relative(grad(0, renumbered, xi[present], table, few, totals), of_all[present]) < rounding
    ignored = z * float("nan"), torch.full_like(target, -100), center, *rows
    for batch in (ignored, (z[:0], target[:0], center, *(each[:0] for each in rows))):
        nothing = run.class_totals(*batch, None, c2s, -100)
        assert torch.equal(nothing, torch.zeros(z.shape[1] + 1, dtype=torch.float64))
    assert bool((grad(0, target, xi, stats, rows) == 0).all())


@every_backend
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_of_the_centroid_gradient(dtype, separation, backend):
    check_totals(_ops.operators(backend), dtype, separation)


def check_totals_of_many(run, separation):
    c2s = separation == "centroid_to_sample"
    for rows, columns, dtype in ((300, 33, torch.float32), (5, 2100, torch.float32), (9, 40, torch.bfloat16)):
        z, target, xi, _, _ = make(rows, 3, columns, ignore=True, dtype=torch.float32)
        z = (z * torch.logspace(-3, 1, rows)[:, None]).to(dtype)
        stats = run.centroid_stats(xi, False, c2s)
        of_rows = run.terms(z, target, None, *stats, 1.0, False, False, c2s, -100)[1], torch.rand(rows, 4).double()
        upstream = torch.rand(2 * rows)[::2]
        totals = run.class_totals(z, target, None, *of_rows, upstream, c2s, -100)
        kept = target != -100
        log_p = reference.log_probabilities(z[kept].double(), None, 1.0, False, "nsf")
        beta = (upstream.double() * of_rows[1][:, 1])[kept]
        expected = beta @ (log_p if c2s else log_p.exp())
        sums = totals[:-1]
        if c2s:
            sums, expected = sums - sums.mean(), expected - expected.mean()
        assert relative(totals[-1], beta.sum()) < 1e-12
        assert relative(sums, expected) < (2e-6 if dtype == torch.float32 else 1e-5)
        again = run.class_totals(z, target, None, *of_rows, upstream, c2s, -100)
        assert torch.equal(totals, again)


@every_backend
@every_separation
def test_totals_of_many_rows_and_columns(separation, backend):
    """More of either than one owner has; half precision; an upstream gradient for each row."""
    check_totals_of_many(_ops.operators(backend), separation)


# ------------------------------------------------------------------------------------------------------------
# A step of the centroids
# ------------------------------------------------------------------------------------------------------------

# momentum, weight decay as a part of what the gradient moves, nesterov
SGD = ((0.0, 0.0, False), (0.0, 0.3, False), (0.9, 0.0, False), (0.9, 0.3, True))
# More rows than classes and fewer, of which some have none; none at all; more columns than a program has at once.
STEPS = ((13, 7, 37), (0, 7, 37), (4, 7, 2100))


def check_step(run, dtype, separation, activation, sgd):
    """Against torch.optim.SGD on the gradient of centroid_grad; and the statistics are those of the new centroids."""
    c2s, softmax = separation == "centroid_to_sample", activation == "softmax"
    momentum, decay, nesterov = sgd
    for rows, classes, columns in STEPS:
        z, target, xi, center, weight = make(
            rows, classes, columns, center=True, weight=True, ignore=True, spread=1.0, dtype=dtype
        )
        target[target >= 0] %= classes - 2
        z[target == -100] = float("nan")
        stats = run.centroid_stats(xi, softmax, c2s)
        options = (0.7, True, softmax, c2s, True, 1, 1e-8, -100, False)
        of_rows = run.loss(z, target, center, None, None, 0.0, *stats, weight, *options)[1:3]
        expected = torch.nn.Parameter(xi.clone())
        expected.grad = run.centroid_grad(z, target, center, xi, *stats, *of_rows, None, c2s, -100)
        # So large a step that what it rounds to is not most of the difference.
        lr = (xi.norm() / expected.grad.norm()).item() if rows else 1.0
        rate = {"lr": lr, "momentum": momentum, "weight_decay": decay / lr, "nesterov": nesterov}
        optimizer = torch.optim.SGD([expected], **rate)
        before, buffer = xi.clone(), None
        if momentum:
            buffer = (torch.randn(classes, columns, dtype=torch.float64) / lr).to(dtype)
            optimizer.state[expected]["momentum_buffer"] = buffer.clone()
        if rows:  # else nothing moves
            optimizer.step()
        run.centroid_step_(z, target, center, xi, buffer, *stats, *of_rows, softmax, c2s, -100, *rate.values())
        rounding = 1e-6 if dtype == torch.float32 else 1e-13
        moved = expected.detach() - before
        assert moved.norm() > 0.1 * before.norm() if rows else not moved.any()
        assert relative(xi - before, moved) < rounding
        if momentum:
            assert relative(buffer, optimizer.state[expected]["momentum_buffer"]) < rounding
        for actual, fresh in zip(stats, run.centroid_stats(xi, softmax, c2s), strict=True):
            assert torch.equal(actual, fresh)
    # A batch that is not finite moves nothing.
    z[0, 0], target[0] = float("inf"), 0
    stats = run.centroid_stats(xi, softmax, c2s)
    of_rows = run.loss(z, target, center, None, None, 0.0, *stats, weight, *options)[1:3]
    changing = (xi, *stats) if buffer is None else (xi, buffer, *stats)
    before = [t.clone() for t in changing]
    run.centroid_step_(z, target, center, xi, buffer, *stats, *of_rows, softmax, c2s, -100, *rate.values())
    for t, old in zip(changing, before, strict=True):
        assert torch.equal(t, old)


def check_step_refuses_strides(run):
    z, target, xi, _, _ = make(5, 4, 4, dtype=torch.float32)
    stats = run.centroid_stats(xi, False, False)
    of_rows = run.loss(z, target, None, None, None, 0.0, *stats, None, *Options().for_loss, False)[1:3]
    before = xi.clone()
    for name, logits, buffer in (("centroid_logits", xi.t(), None), ("momentum_buffer", xi, torch.zeros_like(xi).t())):
        with pytest.raises(RuntimeError, match=f"{name} must be contiguous"):
            run.centroid_step_(
                z, target, None, logits, buffer, *stats, *of_rows, False, False, -100, 1.0, 0.9, 0.0, False
            )
    assert torch.equal(xi, before)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sgd", SGD)
def test_a_step_of_sgd(sgd, dtype, separation, activation, backend, interpreted):
    double, c2s = dtype == torch.float64, separation == "centroid_to_sample"
    if interpreted and ((activation == "softmax") != sgd[2] or (SGD.index(sgd) + double + c2s) % 2):
        pytest.skip(LEFT)
    check_step(_ops.operators(backend), dtype, separation, activation, sgd)


@every_backend
def test_a_step_refuses_strides(backend):
    check_step_refuses_strides(_ops.operators(backend))


# ------------------------------------------------------------------------------------------------------------
# The operators themselves
# ------------------------------------------------------------------------------------------------------------


def operator_calls(dtype: torch.dtype, separation: str, ratio: str):
    """Every operator with arguments that fit each other."""
    ops = torch.ops.ncmi_kernels
    z, target, xi, center, weight = make(6, 3, 20, center=True, weight=True, ignore=True, dtype=torch.float32)
    if dtype == torch.float64:
        z, xi, center, weight = (t.double() for t in (z, xi, center, weight))
    else:
        z = z.to(dtype)
    c2s, batch = separation == "centroid_to_sample", ratio == "batch"
    stats = ops.centroid_stats(xi, False, c2s)
    features = (0.5, True, False, c2s)
    moving, tracked = center.clone(), torch.tensor(1)
    options = (*stats, weight, *features, batch, 1, 1e-8, -100, not batch and z.dtype is xi.dtype)
    reduced = (z, target, center, None, None, 0.0, *options)
    loss, *rows = ops.loss(*reduced)[:3]
    terms, _ = ops.terms(z, target, center, *stats, *features, -100)
    mixture = torch.rand(6, 20).to(xi.dtype)
    upstream = torch.full_like(loss, 2.0)
    totals = torch.zeros(21, dtype=torch.float64)
    return [
        (ops.centroid_stats, (xi, False, c2s)),
        (ops.terms, (z, target, center, *stats, *features, -100)),
        (ops.loss, reduced),
        (ops.loss, (z, target, None, moving, tracked, 0.9, *options)),
        *(
            (ops.reduce, (terms, rows[0], target, stats[3], weight, sums, c2s, False, batch, 1, 1e-8, -100))
            for sums in (None, torch.rand(4).double())
        ),
        (ops.reduce, (terms, rows[0], target, stats[3], None, None, c2s, True, False, 0, 1e-8, -100)),
        (ops.input_grad, (z, target, center, *stats, *rows, upstream, c2s, -100)),
        (ops.input_grad, (z, target, center, *stats, *rows, None, c2s, -100, mixture)),
        (ops.centroid_grad, (z, target, center, xi, *stats, *rows, upstream, c2s, -100)),
        (ops.centroid_grad, (z, target, center, xi, *stats, *rows, upstream, c2s, -100, totals)),
        (ops.class_totals, (z, target, center, *rows, upstream, c2s, -100)),
        *(
            (
                ops.centroid_step_,
                (z, target, center, xi, buffer, *stats, *rows, False, c2s, -100, 0.5, momentum, 1e-3, momentum > 0),
            )
            for momentum, buffer in ((0.9, torch.randn_like(xi)), (0.0, None))
        ),
        (ops.scale_, (torch.randn_like(xi), upstream)),
        (ops.update_center_, (center.clone(), torch.tensor(1), z, target, 0.9, 3, -100)),
    ]


@pytest.mark.parametrize(
    ("dtype", "separation", "ratio"),
    # Any two of them meet: a call takes half a second.
    [
        (dtype, separation, RATIOS[(i + j) % 2])
        for i, dtype in enumerate((torch.float32, torch.float64, *HALF))
        for j, separation in enumerate(SEPARATIONS)
    ],
)
def test_opcheck(dtype, separation, ratio):
    for operator, arguments in operator_calls(dtype, separation, ratio):
        torch.library.opcheck(operator, arguments)


@every_backend
@every_separation
def test_every_element_of_every_output_is_written(separation, backend, interpreted):
    """Outputs land in freed memory that was filled with NaN: an element that a kernel forgets shows."""
    run, options = _ops.operators(backend), Options(separation=separation)
    for rows, classes, columns in ((5, 3, 17), (40, 30, 65), (50, 40, 500) if interpreted else (300, 200, 500)):
        problem = make(rows, classes, columns, ignore=True, dtype=torch.float32)
        z, target, xi, center, weight = problem

        def fill(rows=rows, classes=classes, columns=columns):
            garbage = [torch.full((size,), float("nan")) for size in (rows * columns, classes * columns) * 4]
            del garbage

        for _ in range(3):
            fill()
            for result in evaluate(problem, options, backend):
                assert bool(result.isfinite().all())
        if interpreted and columns > 100:
            continue  # seconds
        stats = _plain.table_of(xi, options, backend)
        of_rows = run.loss(z, target, center, None, None, 0.0, *stats, weight, *options.for_loss, False)[1:3]
        fill()
        run.centroid_step_(
            *(z, target, center, xi, None, *stats, *of_rows, False, options.centroid_to_sample, -100),
            *(1.0, 0.0, 0.0, False),
        )
        for result in (xi, *stats):
            assert bool(result.isfinite().all())


CAPABILITY_SCRIPT = """
import torch
from ncmi_kernels import ncmi_loss
assert torch.ops.ncmi_kernels.cpu_capability() == "{capability}"
results = []
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for separation in ("sample_to_centroid", "centroid_to_sample"):
        for l2 in (False, True):
            generator = torch.Generator().manual_seed(1)
            z = torch.randn(20, 133, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            xi = torch.randn(7, 133, generator=generator, dtype=torch.float64)
            xi = xi.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
            loss = ncmi_loss(z, torch.arange(20) % 7, xi, l2_normalize=l2, separation=separation, backend="cpu")
            results.append((loss.detach(), *torch.autograd.grad(loss, (z, xi))))
torch.save(results, "{path}")
"""


def test_instruction_sets_agree(tmp_path):
    """The plain and the AVX2 kernels against the ones that this processor runs, each in a process of its own."""
    best = torch.ops.ncmi_kernels.cpu_capability()
    names = ["default", "avx2", "avx512"]
    results = {}
    for capability in names[: names.index(best) + 1]:
        path = tmp_path / f"{capability}.pt"
        subprocess.run(
            [sys.executable, "-c", CAPABILITY_SCRIPT.format(capability=capability, path=path)],
            check=True,
            env={**os.environ, "NCMI_CPU_CAPABILITY": capability},
        )
        results[capability] = torch.load(path)
    for capability, result in results.items():
        for ours, theirs in zip(result, results[best], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                bound = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 3e-3}[a.dtype]
                assert relative(a, b) < bound, capability


def test_unknown_instruction_set_is_refused():
    code = "import torch, ncmi_kernels; torch.ops.ncmi_kernels.cpu_capability()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "NCMI_CPU_CAPABILITY": "avx1024"},
    )
    assert run.returncode != 0
    assert "NCMI_CPU_CAPABILITY is 'avx1024', expected" in run.stderr


def test_half_conversions_are_those_of_torch():
    """Every float16 and bfloat16 bit pattern in; gradients of every magnitude out, rounded to nearest even."""
    for dtype in HALF:
        bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 64)
        target = torch.zeros(len(bits), dtype=torch.int64)
        center, tracked = torch.zeros(64), torch.zeros((), dtype=torch.int64)
        for row in (0, 100, 481, 700, 1000):
            copy = torch.ops.ncmi_kernels.update_center_(center, tracked, bits[row : row + 1], target[:1], 0.0, 2, -100)
            if bits[row].isfinite().all():
                assert torch.equal(copy, bits[row].float())
        z, xi = torch.randn(40, 64), torch.randn(2, 64)
        y = torch.arange(40) % 2
        for scale in torch.logspace(-12, 12, 25).tolist():
            low = z.to(dtype).requires_grad_()
            wide = z.to(dtype).float().requires_grad_()
            for leaf in (low, wide):
                (scale * ncmi_loss(leaf, y, xi, backend="cpu")).backward()
            assert torch.equal(low.grad, wide.grad.to(dtype))


@every_backend
@pytest.mark.parametrize("strides", [(2**30 + 8, 1), (1, 2**27 + 8)], ids=["rows", "columns"])
def test_offsets_past_2_to_the_31(strides, backend):
    """Views into memory of which only the pages that they show are ever touched."""
    memory = torch.empty(2 * strides[0] + 23 * strides[1] + 1, dtype=torch.bfloat16)
    z, target, xi, center, _ = make(3, 3, 24, center=True, dtype=torch.float32)
    far = memory.as_strided((3, 24), strides).copy_(z)
    for separation in SEPARATIONS:
        options = Options(l2_normalize=True, separation=separation)
        near_by = evaluate((far.contiguous(), target, xi, center, None), options, backend)
        assert near_by[1].abs().max() > 0
        for a, e in zip(evaluate((far, target, xi, center, None), options, backend), near_by, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("backend", [p for p in KERNELS if "triton" in p.values])
def test_a_launch_that_fails_has_moved_nothing(stages, backend, monkeypatch):
    """Whichever of a training step it is: the batch may be tried again."""
    from ncmi_kernels._triton import launches, ops

    monkeypatch.setattr(launches, "LARGEST_WHOLE", 6 if stages == 1 else 5)
    launch, failing, launched = launches.launch, 0, 0

    def count(*args, **options):
        nonlocal launched
        launched += 1
        if launched == failing:
            raise RuntimeError("out of memory")
        launch(*args, **options)

    monkeypatch.setattr(launches, "launch", count)
    z, y, stats = torch.randn(6, 3), torch.arange(6) % 4, ops.centroid_stats(torch.randn(4, 3), False, False)
    center, batches = torch.randn(3), torch.tensor(2)
    before = center.clone()
    while failing < 10:
        failing, launched = failing + 1, 0
        try:
            ops.loss(
                *(z, y, None, center, batches, 0.9, *stats, None, 1.0, True, False, False, True, 1, 1e-8, -100, False)
            )
        except RuntimeError:
            assert batches == 2
            assert torch.equal(center, before)
        else:
            break
    assert failing == launched + 1 == 4 + stages
    assert batches == 3
    assert not torch.equal(center, before)


@every_backend
@every_separation
def test_near_zero(separation, backend):
    """A and G are of second order in features and centroids there: what rounds relative to 1 loses them."""
    z, target, xi, _, _ = make(40, 3, 24, spread=0.05, dtype=torch.float32)
    for problem in ((z, target, xi, None, None), (z, target, xi, z.mean(0), None)):
        check_against_float64(problem, Options(separation=separation), backend, SINGLE, literal=True)


@every_backend
def test_large_batch_of_one_class_against_reference(backend) -> None:
    """More rows of one class than are summed in float32 before going to float64."""
    z: Tensor = 0.05 * torch.randn(1000, 24)
    problem = z, torch.zeros(1000, dtype=torch.int64), 0.1 * torch.randn(3, 24), None, None
    for separation in SEPARATIONS:
        check_against_float64(problem, Options(separation=separation), backend, 5e-6)
