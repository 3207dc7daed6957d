"""The operators of every backend, each against its own definition."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import KERNELS, relative
from problems import (
    ACTIVATIONS,
    HALF,
    LEFT,
    RATIOS,
    REDUCTIONS,
    SEPARATIONS,
    Options,
    evaluate,
    every_backend,
    every_separation,
    make,
    plain_and_focus,
)
from torch import Tensor

from ncmi_kernels import _ops, _plain, ncmi_loss, ncmi_terms, reference

# ------------------------------------------------------------------------------------------------------------
# From terms to the loss; the gradient from a reference of each row's own
# ------------------------------------------------------------------------------------------------------------


def check_reduce(run, separation, focus, ratio, reduction):
    """Loss, means and sums by the definition in float64, coefficients by the derivatives that autograd has of it."""
    options = Options(separation=separation, ratio=ratio, reduction=reduction, separation_focus=focus, eps=1e-3)
    for rows, classes, weighted, shared in ((9, 4, True, False), (9, 4, False, True), (2100, 3, True, True)):
        values = torch.rand(2, rows, dtype=torch.float64) + 0.1
        stats = torch.randn(rows, 8, dtype=torch.float64)
        stats[:, 7] = torch.rand(rows)
        target = torch.randint(classes, (rows,))
        target[::3] = -100
        kept = target != -100
        values[:, ~kept] = 0
        weight = torch.rand(classes) + 0.5 if weighted else None
        w = torch.ones(rows).double() if weight is None else weight.double()[target.clamp(min=0)]
        w = torch.where(kept, w, 0)
        a, g = values.clone().requires_grad_()
        leaf = a, g
        each = a / (g + options.eps)
        if ratio == "soft_margin":
            each = torch.log1p(each**options.sharpness) / options.sharpness
        sums = torch.stack([w.sum(), w @ a, w @ g, w @ each * (ratio != "batch")])
        given = torch.tensor([7.0, 3.0, 4.0, 5.0 * (ratio != "batch")]).double() if shared else None
        total = sums if given is None else sums + (given - sums).detach()  # of all processes: the others' are constant
        if ratio == "batch":
            expected = (total[1] / total[0]) / (total[2] / total[0] + options.eps)
        elif reduction == "none":
            expected = w * each
        else:
            expected = total[3] / total[0] if reduction == "mean" else total[3]
        alpha, beta = torch.autograd.grad(expected.sum(), leaf)
        own_mean, all_mean, own_prior = stats[:, 5:].T
        by_all, by_own = (1 - own_prior, 0 * own_prior) if focus else (1 + 0 * own_prior, own_prior)
        if separation == "centroid_to_sample":
            coefficients = [alpha, by_all * beta, by_own * beta, alpha * own_mean]
        else:
            own = alpha - by_own * beta
            coefficients = [own, by_all * beta, 0 * beta, own * own_mean + by_all * beta * all_mean]
        arguments = values, stats, target, weight, given, options.centroid_to_sample, focus > 0, *options.loss
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
        stats = run.terms(z, target, center, *table, *options.features, options.ignore_index)[1]
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
    options = (0.7, True, False, c2s, batch_ratio, 1, 1e-8, 0.0, -100, with_grad)
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
        options = (0.7, True, softmax, c2s, True, 1, 1e-8, 0.0, -100, False)
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
    of_rows = run.loss(z, target, None, None, None, 0.0, *stats, None, *Options().features, *Options().loss, False)[1:3]
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
    options = (*stats, weight, *features, batch, 1, 1e-8, 0.0, -100, not batch and z.dtype is xi.dtype)
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
            (ops.reduce, (terms, rows[0], target, weight, sums, c2s, False, batch, 1, 1e-8, 0.0, -100))
            for sums in (None, torch.rand(4).double())
        ),
        (ops.reduce, (terms, rows[0], target, None, None, c2s, True, False, 0, 1e-8, 0.0, -100)),
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
        of_rows = run.loss(z, target, center, None, None, 0.0, *stats, weight, *options.features, *options.loss, False)[
            1:3
        ]
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


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("backend", [p for p in KERNELS if "triton" in p.values])
def test_a_launch_that_fails_has_moved_nothing(stages, backend, monkeypatch):
    """Whichever of a training step it is: the batch may be tried again."""
    from ncmi_kernels._triton import OPERATORS as ops
    from ncmi_kernels._triton import launches, reduce

    monkeypatch.setattr(reduce, "LARGEST_WHOLE", 6 if stages == 1 else 5)
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
    before, options = center.clone(), (1.0, True, False, False, True, 1, 1e-8, 0.0, -100, False)
    while failing < 10:
        failing, launched = failing + 1, 0
        try:
            ops.loss(z, y, None, center, batches, 0.9, *stats, None, *options)
        except RuntimeError:
            assert batches == 2
            assert torch.equal(center, before)
        else:
            break
    assert failing == launched + 1 == 4 + stages
    assert batches == 3
    assert not torch.equal(center, before)


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
