"""`separation_focus`: near classes weigh more in the separation."""

import copy
import itertools
import math

import pytest
import torch
from conftest import relative
from test_kernels import LEFT, check_against_the_literal_definition, evaluate, every_backend, make

from ncmi_kernels import CentroidSGD, NCMILoss, _focus, _ops, _schema, ncmi_loss, ncmi_terms, reference
from ncmi_kernels._options import Options

SEPARATIONS = ("sample_to_centroid", "centroid_to_sample")
BATCH, CLASSES, COLUMNS = 9, 7, 11


def problem(dtype=torch.float64):
    z = torch.randn(BATCH, COLUMNS, dtype=dtype, requires_grad=True)
    xi = (2 * torch.randn(CLASSES, COLUMNS, dtype=dtype)).requires_grad_()
    return z, torch.randint(CLASSES, (BATCH,)), xi


def nsf(x):
    return torch.sigmoid(x) / torch.sigmoid(x).sum()


def divergence(p, q):
    return (p * (p / q).log()).sum()


def by_definition(z, target, xi, separation, focus):
    """A and G of each sample, in loops, with the weights as numbers."""
    terms = []
    for row, y in zip(z, target.tolist(), strict=True):
        p, others = nsf(row), [v for v in range(CLASSES) if v != y]
        pairs = {v: (p, nsf(xi[v])) if separation == "sample_to_centroid" else (nsf(xi[v]), p) for v in others}
        distances = {v: divergence(*pairs[v]) for v in others}
        nearest = min(distances.values()).item()
        each = [math.exp(-focus * distances[v].item() / nearest) for v in others]
        separated = sum(w / sum(each) * distances[v] for w, v in zip(each, others, strict=True))
        terms.append(torch.stack((divergence(p, nsf(xi[y])), (CLASSES - 1) / CLASSES * separated)))
    return torch.stack(terms).T


@pytest.mark.parametrize(("separation", "focus"), list(itertools.product(SEPARATIONS, (0.0, 0.5, 10.0))))
def test_against_the_definition(separation, focus):
    z, target, xi = problem()
    expected = by_definition(z, target, xi, separation, focus)
    actual = ncmi_terms(z, target, xi, separation=separation, separation_focus=focus)
    upstream = torch.randn(2, BATCH, dtype=torch.float64)
    assert relative(torch.stack(actual), expected) < 1e-12
    grads = torch.autograd.grad(actual, (z, xi), tuple(upstream))
    for a, e in zip(grads, torch.autograd.grad(expected, (z, xi), upstream), strict=True):
        assert relative(a, e) < 1e-11
    for ratio in ("batch", "sample"):
        loss = ncmi_loss(z, target, xi, separation=separation, separation_focus=focus, ratio=ratio)
        a, g = expected
        assert relative(loss, a.mean() / g.mean() if ratio == "batch" else (a / g).mean()) < 1e-6  # eps
    options = Options(separation=separation, separation_focus=focus)
    literal = reference.terms(z, target, xi, None, options, literal=True)
    assert relative(torch.stack(literal), expected) < 1e-12


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_limits(separation):
    z, target, xi = problem()
    log_p, log_q = (reference.log_activation(x.detach(), "nsf") for x in (z, xi))
    every = reference.divergences(log_p, log_q, separation)
    every[torch.arange(BATCH), target] = torch.inf
    nearest = ncmi_terms(z, target, xi, separation=separation, separation_focus=1e6)[1]
    assert relative(nearest, every.amin(dim=1) * (CLASSES - 1) / CLASSES) < 1e-12
    alike = ncmi_terms(z, target, xi, separation=separation, separation_focus=1e-12)[1]
    assert relative(alike, ncmi_terms(z, target, xi, separation=separation)[1]) < 1e-10


# ------------------------------------------------------------------------------------------------------------
# The kernels against the literal definition in float64.
# ------------------------------------------------------------------------------------------------------------

OPTIONS = list(itertools.product(SEPARATIONS, ("batch", "sample"), ("nsf", "softmax"), (False, True)))


@every_backend
@pytest.mark.parametrize(("separation", "ratio", "activation", "l2"), OPTIONS)
def test_every_variant(separation, ratio, activation, l2, backend):
    options = Options(0.7, l2, activation, separation, ratio, separation_focus=10.0)
    for center, weight, ignore in ((False, False, False), (True, True, True)):
        problem = make(13, 7, 37, center=center, weight=weight, ignore=ignore)
        check_against_the_literal_definition(problem, options, backend)


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_where_the_focus_has_no_choice(separation, backend):
    """Of two classes only one is another; centroids that are all the same are all as near."""
    z, target, xi = problem()
    for classes in (xi[:2].detach(), xi[:1].detach().expand(CLASSES, -1)):
        here = target % len(classes)
        grads = []
        for focus in (0.0, 10.0):
            loss = ncmi_loss(z, here, classes, separation=separation, separation_focus=focus, backend=backend)
            grads.append(torch.cat([loss[None], torch.autograd.grad(loss, z)[0].flatten()]))
        assert relative(*grads) < 1e-9


@every_backend
def test_ignored_rows(backend):
    z, target, xi = problem()
    with torch.no_grad():
        z[3] = math.nan
    target[3] = -100
    kept = target != -100
    for ratio in ("batch", "sample"):
        loss = ncmi_loss(z, target, xi, separation_focus=10.0, ratio=ratio, backend=backend)
        rest = z[kept].detach().requires_grad_()
        expected = ncmi_loss(rest, target[kept], xi, separation_focus=10.0, ratio=ratio, backend=backend)
        assert relative(loss, expected) < 1e-12
        (grad,) = torch.autograd.grad(loss, z)
        assert not grad[3].any()
        assert relative(grad[kept], torch.autograd.grad(expected, rest)[0]) < 1e-12


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 2, 5), (17, 33, 64), (2, 257, 130), (9, 5, 1031)])
def test_odd_sizes(shape, separation, backend, interpreted):
    if interpreted and max(shape) > 100:
        pytest.skip(LEFT)
    options = Options(separation=separation, l2_normalize=shape[2] > 5, separation_focus=3.0)
    problem = make(*shape, center=True, dtype=torch.float32)
    actual, expected = evaluate(problem, options, backend), evaluate(problem, options, "float64", literal=True)
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e) < 5e-6


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_closer_to_float64_than_autograd(separation, backend, interpreted):
    """Features of length one have small divergences."""
    options = Options(1.0, True, "nsf", separation, separation_focus=10.0)
    for centroids in (10 * torch.eye(100, 128), 10 * torch.nn.functional.normalize(torch.randn(100, 128), dim=1)):
        z, target, _, _, _ = make(8 if interpreted else 64, 100, 128, dtype=torch.float32)
        problem = z, target, centroids, z.mean(dim=0), None
        exact = evaluate(problem, options, "float64")
        errors = [
            [relative(a, e) for a, e in zip(evaluate(problem, options, name), exact, strict=True)]
            for name in (backend, "reference")
        ]
        for kernels, autograd in zip(*errors, strict=True):
            assert kernels < autograd / 3


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, separation, backend):
    options = Options(1.0, True, "nsf", separation, separation_focus=10.0)
    z, target, xi, center, _ = make(12, 20, 33, center=True, ignore=True, dtype=torch.float32)
    problem = z.to(dtype), target, xi, center, None
    loss, by_input, by_centroids = evaluate(problem, options, backend)
    expected = evaluate(problem, options, "float64")
    assert (loss.dtype, by_input.dtype) == (torch.float32, dtype)
    assert relative(loss, expected[0]) < 2e-6
    assert relative(by_input, expected[1]) < torch.finfo(dtype).eps
    assert relative(by_centroids, expected[2]) < 5e-6


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_saturated(spread, separation, backend):
    options = Options(separation=separation, ratio="sample", separation_focus=2.0)
    problem = make(11, 6, 40, spread=spread, dtype=torch.float32)
    actual, expected = evaluate(problem, options, backend), evaluate(problem, options, "float64", literal=True)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert relative(a, e) < 1e-5


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_near_zero(separation, backend):
    """Of distributions that differ by a thousandth, digits are lost in the matrix product, but few."""
    options = Options(separation=separation, ratio="sample", separation_focus=2.0)
    problem = make(11, 6, 40, spread=1e-3, dtype=torch.float32)
    expected = evaluate(problem, options, "float64", literal=True)
    for name, bound in ((backend, 1e-3), ("reference", math.inf)):
        errors = [relative(a, e) for a, e in zip(evaluate(problem, options, name), expected, strict=True)]
        assert max(errors) < bound
        if name == "reference":
            assert max(errors) > 0.1  # what plain PyTorch makes of it


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_rows_whose_sum_of_sigma_underflows(separation, backend):
    options = Options(separation=separation, separation_focus=2.0)
    z, target, xi, _, _ = make(8, 5, 12, dtype=torch.float32)
    problem = z - 95, target, xi - 60, None, None
    actual, expected = evaluate(problem, options, backend), evaluate(problem, options, "float64", literal=True)
    for a, e in zip(actual, expected, strict=True):
        assert relative(a, e) < 1e-5


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("l2", [False, True])
def test_rows_apart(l2, separation, backend):
    """NaN in an ignored row leaves no trace; a row that is not finite makes its own loss NaN and its gradient."""
    options = Options(separation=separation, l2_normalize=l2, ratio="sample", reduction="none", separation_focus=5.0)
    z, target, xi, _, _ = make(6, 4, 9, dtype=torch.float32)
    target[2] = -100
    expected = evaluate((z, target, xi, None, None), options, backend)
    for value in (math.nan, math.inf):
        spoilt = z.clone()
        spoilt[2, 1] = value
        for a, e in zip(evaluate((spoilt, target, xi, None, None), options, backend), expected, strict=True):
            assert torch.equal(a, e)
        spoilt[4, 3] = value
        loss, by_input, _ = evaluate((spoilt, target, xi, None, None), options, backend)
        others = torch.arange(6) != 4
        assert loss[4].isnan()
        assert by_input[4].isnan().all()
        assert torch.equal(loss[others], expected[0][others])
        assert torch.equal(by_input[others], expected[1][others])
    assert expected[1][2].eq(0).all()


@every_backend
def test_an_ignore_index_that_is_also_a_row_number(backend):
    z, _, xi, _, _ = make(6, 4, 9)
    target = torch.tensor([1, 2, 0, 3, 1, 2])
    options = Options(ignore_index=2, separation_focus=5.0)
    for a, e in zip(
        evaluate((z, target, xi, None, None), options, backend),
        evaluate((z, target, xi, None, None), options, "float64", literal=True),
        strict=True,
    ):
        assert relative(a, e) < 1e-10


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_terms_for_any_upstream(separation, backend):
    """Each term alone too, and neither."""
    z, target, xi = problem()
    options = {"separation": separation, "separation_focus": 10.0}
    for kept in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        upstream = torch.randn(2, BATCH, dtype=torch.float64) * torch.tensor(kept)[:, None]
        actual = ncmi_terms(z, target, xi, backend=backend, **options)
        expected = ncmi_terms(z, target, xi, backend="reference", **options)
        for a, e in zip(actual, expected, strict=True):
            assert relative(a, e) < 1e-12
        grads = [torch.autograd.grad(terms, (z, xi), tuple(upstream)) for terms in (actual, expected)]
        for a, e in zip(*grads, strict=True):
            assert relative(a, e) < 1e-11


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_and_a_second_backward(reduction, backend):
    z, target, xi = problem(torch.float32)
    arguments = {"ratio": "sample", "reduction": reduction, "separation_focus": 10.0}
    loss = ncmi_loss(z, target, xi, backend=backend, **arguments)
    upstream = torch.randn_like(loss)
    first = torch.autograd.grad(loss, (z, xi), upstream, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (z, xi), upstream, retain_graph=True), strict=True):
        assert torch.equal(a, b)
    (alone,) = torch.autograd.grad(loss, xi, upstream)
    assert torch.equal(alone, first[1])
    wide = [t.detach().double().requires_grad_() for t in (z, xi)]
    expected = ncmi_loss(wide[0], target, wide[1], backend="reference", **arguments)
    for a, e in zip(first, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert relative(a, e) < 5e-6


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_double_backward_is_the_reference_s(separation, backend):
    z, target, xi = problem()
    along = [torch.randn_like(z), torch.randn_like(xi)]
    results = []
    options = {"separation": separation, "separation_focus": 5.0}
    for name in (backend, "reference"):
        loss = ncmi_loss(z, target, xi, backend=name, **options)
        terms = torch.stack(ncmi_terms(z, target, xi, backend=name, **options))
        grads = torch.autograd.grad(loss + (terms**2).sum(), (z, xi), create_graph=True)
        scalar = sum((g * v).sum() for g, v in zip(grads, along, strict=True))
        results.append([*grads, *torch.autograd.grad(scalar, (z, xi))])
    for a, e in zip(*results, strict=True):
        assert relative(a, e) < 1e-10


@every_backend
def test_layouts(backend):
    z, target, xi, _, _ = make(2 * 3 * 4, 5, 12, dtype=torch.float32)
    expected = ncmi_loss(z, target, xi, separation_focus=10.0, backend=backend)
    images = z.reshape(2, 3, 4, 12).movedim(-1, 1)  # [B, M, d1, d2]
    assert torch.equal(ncmi_loss(images, target.reshape(2, 3, 4), xi, separation_focus=10.0, backend=backend), expected)
    columns = xi.T.contiguous().T
    assert torch.equal(ncmi_loss(z, target, columns, separation_focus=10.0, backend=backend), expected)


@every_backend
def test_a_batch_without_rows(backend):
    loss = ncmi_loss(
        torch.empty(0, 6), torch.empty(0, dtype=torch.int64), torch.randn(4, 6), separation_focus=1.0, backend=backend
    )
    assert loss.isnan()
    ignored = torch.full((3,), -100)
    z = torch.randn(3, 6, requires_grad=True)
    loss = ncmi_loss(z, ignored, torch.randn(4, 6), separation_focus=1.0, backend=backend)
    assert loss.isnan()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("shape", [(3, 2051, 24), (130, 9, 3), (3, 2, 1029)])
def test_between_products(shape, separation, dtype, backend, interpreted):
    """More classes, rows and columns than are worked on at once; every sum that the gradient of the centroids takes."""
    if interpreted and max(shape) > 1000 and dtype == torch.float64:
        pytest.skip(LEFT)
    rows, classes, columns = shape
    run, last = _ops.operators(backend), (separation == SEPARATIONS[1], -100)
    z, xi = torch.randn(rows, columns, dtype=dtype), torch.randn(classes, columns, dtype=dtype)
    target = torch.randint(classes, (rows,))
    target[1] = -100
    kept = (target != -100).nonzero()[:, 0]
    table = run.centroid_stats(xi, False, last[0])
    values, stats = run.terms(z, target, None, *table, 1.0, False, False, *last)
    relative_q, distribution, level = run.focus_table(*table, last[0])
    x = run.focus_rows(z, target, None, *table, stats, *last)
    weights = x @ (distribution if last[0] else relative_q).T
    run.focus_weights_(weights, values[1], stats, target, table[3], level, 5.0, *last)

    log_p, log_q = (reference.log_activation(t.double(), "nsf") for t in (z[kept], xi))
    every = reference.divergences(log_p, log_q, separation)
    every[torch.arange(len(kept)), target[kept]] = torch.inf
    expected = torch.softmax(-5 * every / every.amin(dim=1, keepdim=True), dim=1)
    mean = torch.where(every.isinf(), 0, expected * every).sum(dim=1)
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    assert relative(weights[kept], expected) < bound
    assert relative(values[1, kept], mean * (1 - 1 / classes)) < bound
    assert (
        relative(stats[kept, _schema.ALL_MEAN], mean - stats[kept, _schema.INVERSE_NORM].log() - table[3][-1, 1])
        < bound
    )
    assert weights[kept, target[kept]].eq(0).all()
    assert weights[1].eq(0).all()
    assert x[1].eq(0).all()
    assert values[1, 1] == 0

    coefficients = torch.rand(rows, _schema.COEFFICIENTS, dtype=torch.float64)
    coefficients[1] = 0
    before = torch.rand(classes, _schema.CLASS_WEIGHTS, dtype=torch.float64)
    class_weights = before.clone()
    run.focus_sums_(weights, class_weights, stats, coefficients, target, *last)
    other, base = (class_weights - before).T
    weighted = (weights.T @ x).double()
    expected = coefficients[kept, 1, None] * expected
    assert relative(other, expected.sum(dim=0)) < bound
    if last[0]:
        assert relative(other[:, None] * relative_q.double() - weighted, _sums_of(expected, log_q, log_p)) < bound
    else:
        assert relative(base[:, None] + weighted, expected.T @ log_p.exp()) < bound


def _sums_of(weights, log_q, log_p):
    """sum_i w_ic (log q_c - log p_i)."""
    return weights.sum(dim=0)[:, None] * log_q - weights.T @ log_p


def test_a_sample_on_another_centroid():
    xi = torch.randn(4, 30)
    z = xi.clone().requires_grad_()
    target = torch.tensor([1, 2, 3, 0])
    for separation in SEPARATIONS:
        terms = ncmi_terms(z, target, xi, separation=separation, separation_focus=10.0)
        assert terms[1].abs().max() < 1e-6
        assert terms[1].min() >= 0
        assert torch.autograd.grad(terms[1].sum(), z)[0].isfinite().all()
    with torch.no_grad():
        assert ncmi_loss(z[:1] * math.nan, target[:1], xi, separation_focus=10.0).isnan()


# ------------------------------------------------------------------------------------------------------------
# In the criterion.
# ------------------------------------------------------------------------------------------------------------


@every_backend
def test_criterion(backend):
    z, target, _ = problem()
    criterion = NCMILoss(CLASSES, COLUMNS, separation_focus=10.0, dtype=torch.float64, backend=backend)
    assert "separation_focus=10.0" in repr(criterion)
    start = criterion(z, target)
    arguments = {"l2_normalize": True, "separation_focus": 10.0}
    expected = ncmi_loss(z, target, criterion.centroid_logits, center=z.mean(dim=0), backend="reference", **arguments)
    assert relative(start, expected) < 1e-12
    assert relative(criterion.center, z.mean(dim=0)) < 1e-12
    cmi, gamma = ncmi_terms(z, target, criterion.centroid_logits, center=criterion.center, **arguments)
    assert relative(torch.stack(criterion.last_terms), torch.stack((cmi.mean(), gamma.mean()))) < 1e-12
    (grad,) = torch.autograd.grad(start, criterion.centroid_logits)
    assert relative(criterion.centroid_gradient(z, target), grad) < 1e-12
    before = criterion.centroid_logits.detach().clone()
    CentroidSGD(criterion, lr=1.0).step(z, target)
    assert relative(criterion.centroid_logits, before - grad) < 1e-12
    criterion.eval()
    assert criterion(z, target) < start
    criterion.separation_focus = 0.0
    plain = ncmi_loss(z, target, criterion.centroid_logits, center=criterion.center, l2_normalize=True)
    assert relative(criterion(z, target), plain) < 1e-12


@every_backend
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_a_step_of_the_centroids_forms_nothing_of_the_batch_again(separation, backend, monkeypatch):
    """After a forward pass of the batch; another batch, or centroids or a centre that have moved, are formed anew."""
    z, target, _ = problem(torch.float32)
    seen = []
    terms = _focus.terms
    monkeypatch.setattr(_focus, "terms", lambda *args: seen.append(args[0]) or terms(*args))
    criterion = NCMILoss(CLASSES, COLUMNS, separation=separation, separation_focus=10.0, backend=backend)
    other = NCMILoss(CLASSES, COLUMNS, separation=separation, separation_focus=10.0, backend="reference")
    optimizers = [CentroidSGD(each, lr=0.1, momentum=0.9) for each in (criterion, other)]
    for _ in range(3):
        for each, optimizer in zip((criterion, other), optimizers, strict=True):
            each(z, target).backward()
            optimizer.step(z, target)
        assert len(seen) == 1
        seen.clear()
        z = torch.randn_like(z).requires_grad_()
    assert relative(criterion.centroid_logits, other.centroid_logits) < 1e-6
    criterion(z, target)
    optimizers[0].step(z.flip(0), target.flip(0))
    assert len(seen) == 2
    optimizers[0].step(z.flip(0), target.flip(0))
    assert len(seen) == 3


def test_fixed_centroids_are_looked_at_once(monkeypatch):
    z, target, _ = problem(torch.float32)
    criterion = NCMILoss(CLASSES, COLUMNS, separation_focus=10.0, learn_centroids=False)
    first = criterion(z, target)
    monkeypatch.setattr(_focus, "table_of", None)
    assert criterion(z, target) == first
    monkeypatch.undo()
    with torch.no_grad():
        criterion.centroid_logits.mul_(2)
    assert criterion(z, target) != first


@every_backend
def test_transforms_and_compilation(backend):
    z, target, xi = problem()

    def loss(z, xi):
        return ncmi_loss(z, target, xi, separation_focus=10.0, backend=backend)

    expected = torch.autograd.grad(loss(z, xi), (z, xi))
    for a, e in zip(torch.func.grad(loss, (0, 1))(z.detach(), xi.detach()), expected, strict=True):
        assert relative(a, e) < 1e-12
    if backend == "triton":
        return  # the interpreter is not compiled
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, e in zip(torch.autograd.grad(compiled(z, xi), (z, xi)), expected, strict=True):
        assert relative(a, e) < 1e-12


def test_a_compiled_criterion():
    z, target, _ = problem(torch.float32)
    target[1] = -100
    criterion = NCMILoss(CLASSES, COLUMNS, separation_focus=10.0)
    step = torch.compile(copy.deepcopy(criterion), fullgraph=True, backend="aot_eager")
    expected, actual = criterion(z, target), step(z, target)
    assert relative(actual, expected) < 1e-6
    for a, e in zip(*(torch.autograd.grad(loss, z) for loss in (actual, expected)), strict=True):
        assert relative(a, e) < 1e-6


@every_backend
def test_autocast_changes_nothing(backend):
    z, target, xi = problem(torch.float32)
    expected = ncmi_loss(z, target, xi, separation_focus=10.0, backend=backend)
    with torch.autocast(z.device.type, dtype=torch.bfloat16):
        actual = ncmi_loss(z, target, xi, separation_focus=10.0, backend=backend)
        grads = torch.autograd.grad(actual, (z, xi))
    assert torch.equal(actual, expected)
    for a, e in zip(grads, torch.autograd.grad(expected, (z, xi)), strict=True):
        assert torch.equal(a, e)


def test_what_moves_before_the_backward_pass():
    z, target, xi = problem()
    center = torch.randn(COLUMNS, dtype=torch.float64)
    for moved in (center, xi):
        loss = ncmi_loss(z, target, xi, center=center, separation_focus=10.0)
        with torch.no_grad():
            moved.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_divergences_that_round_below_zero_keep_their_gradient(separation):
    log_q = torch.randn(200, 9).log_softmax(dim=1)
    log_p = log_q.clone().requires_grad_()
    own = reference.divergences(log_p, log_q, separation).diagonal()
    assert own.min() >= 0
    (grad,) = torch.autograd.grad(own.sum(), log_p)
    assert relative(grad, log_q.exp() if separation == SEPARATIONS[0] else -log_q.exp()) < 1e-5
