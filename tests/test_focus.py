"""`separation_focus`: near classes weigh more in the separation.

Here is what the focus alone has. What a plain batch has too, the other files try with and without it.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import relative
from problems import (
    LEFT,
    REDUCTIONS,
    SEPARATIONS,
    Options,
    check,
    evaluate,
    every_backend,
    every_ratio,
    every_separation,
    make,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ncmi_kernels import _focus, ncmi_loss, ncmi_terms, reference

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
    check(grads, torch.autograd.grad(expected, (z, xi), upstream), 1e-11)
    for ratio in ("batch", "sample"):
        loss = ncmi_loss(z, target, xi, separation=separation, separation_focus=focus, ratio=ratio)
        a, g = expected
        assert relative(loss, a.mean() / g.mean() if ratio == "batch" else (a / g).mean()) < 1e-6  # eps
    options = Options(separation=separation, separation_focus=focus)
    literal = reference.terms(z, target, xi, None, options, literal=True)
    assert relative(torch.stack(literal), expected) < 1e-12


@every_separation
def test_limits(separation):
    z, target, xi = problem()
    log_p, log_q = (reference.log_activation(x.detach(), "nsf") for x in (z, xi))
    every = reference.divergences(log_p, log_q, separation)
    every[torch.arange(BATCH), target] = torch.inf
    nearest = ncmi_terms(z, target, xi, separation=separation, separation_focus=1e6)[1]
    assert relative(nearest, every.amin(dim=1) * (CLASSES - 1) / CLASSES) < 1e-12
    alike = ncmi_terms(z, target, xi, separation=separation, separation_focus=1e-12)[1]
    assert relative(alike, ncmi_terms(z, target, xi, separation=separation)[1]) < 1e-10


@every_backend
@every_separation
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
@every_separation
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


def in_the_authors_regime(rows, classes, columns):
    """Unit features and one-hot centroids: p and q differ by a percent, and so much the more do roundings count."""
    z, target, _, _, _ = make(rows, classes, columns, dtype=torch.float32)
    return z, target, 10 * torch.eye(classes, columns), z.mean(dim=0), None


def largest_errors(actual, exact):
    """By the largest number of each tensor."""
    return [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, exact, strict=True)]


@every_backend
@every_separation
@every_ratio
@pytest.mark.parametrize("shape", [(64, 10, 32), (128, 100, 512), (256, 1000, 1000)])
@pytest.mark.parametrize("regime", ["authors", "dense"])
def test_errors_of_float32(regime, shape, ratio, separation, backend, interpreted):
    if interpreted:
        if shape[0] != 128 or (ratio == "batch") != (separation == SEPARATIONS[0]):
            pytest.skip(LEFT)
        shape = 16, 20, 512
    authors = regime == "authors"
    problem = in_the_authors_regime(*shape) if authors else make(*shape, center=True, dtype=torch.float32)
    options = Options(l2_normalize=authors, separation=separation, ratio=ratio, separation_focus=10.0)
    loss, *grads = largest_errors(evaluate(problem, options, backend), evaluate(problem, options, "float64"))
    assert loss <= 2e-7
    assert max(grads) <= 1.5e-6


class TensorFloat32(TorchDispatchMode):
    """Matrix products as with `torch.set_float32_matmul_precision("high")` on a GPU: of operands with 11 bits."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)  # to the nearest even


@every_separation
@every_ratio
def test_products_in_tensor_float_32(ratio, separation):
    """No large part meets a product: 11 bits of a small one are enough. Of p and q themselves 5e-4 would be lost."""
    problem = in_the_authors_regime(256, 1000, 1000)
    options = Options(l2_normalize=True, separation=separation, ratio=ratio, separation_focus=10.0)
    with TensorFloat32() as mode:
        actual = evaluate(problem, options, "cpu")
    assert mode.products == 3
    assert max(largest_errors(actual, evaluate(problem, options, "float64"))) <= 1e-5


@every_backend
@every_separation
@pytest.mark.parametrize(("ratio", "reduction"), REDUCTIONS)
def test_several_tiles(ratio, reduction, separation, backend, monkeypatch):
    """Of which none knows the coefficients of its rows: those take the whole batch."""
    monkeypatch.setattr(_focus, "tile_rows", lambda classes: 64)
    z, target, xi, center, weight = make(150, CLASSES, COLUMNS, center=True, weight=True, ignore=True)
    options = Options(separation=separation, ratio=ratio, reduction=reduction, separation_focus=5.0)
    problem = z, target, xi, center, weight
    check(evaluate(problem, options, backend), evaluate(problem, options, "float64", literal=True), 1e-10)
    ignored = z, torch.full_like(target, -100), xi, center, weight
    grads = evaluate(ignored, replace(options, ratio="sample", reduction="sum"), backend)[1:]
    assert all(bool((grad == 0).all()) for grad in grads)


@every_separation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_between_the_passes(reduction, separation):
    """The gradient of the input takes a mixture [B, M], that of the centroids sums [C, M]; nothing is [B, C]."""
    rows, classes, columns = 40, 300, 8
    z, xi = torch.randn(rows, columns, requires_grad=True), torch.randn(classes, columns, requires_grad=True)
    target, kept = torch.randint(classes, (rows,)), []
    options = {"separation": separation, "ratio": "sample", "reduction": reduction, "separation_focus": 5.0}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ncmi_loss(z, target, xi, **options)
    assert max(kept) <= max(classes * columns, (classes + 1) * 9) < rows * classes


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


@every_separation
def test_divergences_that_round_below_zero_keep_their_gradient(separation):
    log_q = torch.randn(200, 9).log_softmax(dim=1)
    log_p = log_q.clone().requires_grad_()
    own = reference.divergences(log_p, log_q, separation).diagonal()
    assert own.min() >= 0
    (grad,) = torch.autograd.grad(own.sum(), log_p)
    assert relative(grad, log_q.exp() if separation == SEPARATIONS[0] else -log_q.exp()) < 1e-5
