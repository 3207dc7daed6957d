"""The rows of a batch, of every backend: which count, how they lie in memory, what comes from above, what goes back."""

import itertools
import math
from functools import partial

import pytest
import torch
from conftest import KERNELS, device_of, relative
from problems import (
    ACTIVATIONS,
    BOTH,
    LEFT,
    REDUCTIONS,
    SEPARATIONS,
    Options,
    check,
    check_against_float64,
    evaluate,
    every_backend,
    every_ratio,
    every_separation,
    make,
    plain_and_focus,
)

from ncmi_kernels import _loss, _ops, ncmi_loss, ncmi_terms, reference
from ncmi_kernels._problem import problem_of


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
@pytest.mark.parametrize(("focus", "dtype"), [(0.0, torch.float32), (0.0, torch.bfloat16), (10.0, torch.float32)])
def test_layouts(focus, dtype, layout, backend):
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
# The spread is that of the features: rows near the centre of the sigmoid, and not.
@pytest.mark.parametrize(("focus", "spread"), [(0.0, 0.1), (0.0, 2.0), (10.0, 2.0)])
def test_backward_twice_gives_the_same_bits(focus, spread, separation, ratio, reduction, backend):
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


# ------------------------------------------------------------------------------------------------------------
# Means of the terms, beside the loss
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@every_separation
def test_means_of_the_terms(separation, backend, interpreted, monkeypatch):
    """CMI and Gamma of the batch, the same for every ratio and reduction, in float64 and not differentiated."""
    many = 8300  # in several programs, and then in one
    if interpreted:
        monkeypatch.setattr("ncmi_kernels._triton.reduce.LARGEST_WHOLE", 512)
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
