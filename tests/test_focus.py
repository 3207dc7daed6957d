"""`separation_focus`: near classes weigh more in the separation."""

import itertools
import math

import pytest
import torch
from conftest import KERNELS, relative

from ncmi_kernels import BackendWarning, CentroidSGD, NCMILoss, ncmi_loss, ncmi_terms, reference
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


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(separation, dtype):
    """Small divergences, as of features of length one: no further from float64 than with equal weights."""
    xi = 10 * torch.eye(100, 128)
    z = torch.randn(64, 128).to(dtype)
    target = torch.randint(100, (64,))

    def errors(focus):
        results = []
        for input, logits in ((z, xi), (z.double(), xi.double())):
            leaf = input.detach().requires_grad_()
            options = {"l2_normalize": True, "separation": separation, "separation_focus": focus}
            loss = ncmi_loss(leaf, target, logits, **options, backend="reference")
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        assert results[0][0].dtype == torch.float32
        return [relative(a, e) for a, e in zip(*results, strict=True)]

    loss_error, grad_error = errors(10.0)
    plain_loss_error, plain_grad_error = errors(0.0)
    assert loss_error < plain_loss_error
    assert grad_error < plain_grad_error + torch.finfo(dtype).eps


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


def test_no_backend_by_name_but_the_reference(recwarn):
    z, target, xi = problem()
    for (backend,) in (each.values for each in KERNELS):
        with pytest.raises(RuntimeError, match=f"backend: got '{backend}' with separation_focus=2.0, expected None or"):
            ncmi_loss(z, target, xi, separation_focus=2, backend=backend)
    named = ncmi_loss(z, target, xi, separation_focus=2, backend="reference")
    assert relative(ncmi_loss(z, target, xi, separation_focus=2), named) < 1e-14
    assert not [warning for warning in recwarn if issubclass(warning.category, BackendWarning)]


def test_criterion():
    z, target, _ = problem()
    criterion = NCMILoss(CLASSES, COLUMNS, separation_focus=10.0, dtype=torch.float64)
    assert "separation_focus=10.0" in repr(criterion)
    start = criterion(z, target)
    expected = ncmi_loss(
        z,
        target,
        criterion.centroid_logits,
        center=z.mean(dim=0),
        l2_normalize=True,
        separation_focus=10.0,
    )
    assert relative(start, expected) < 1e-12
    (grad,) = torch.autograd.grad(start, criterion.centroid_logits)
    assert relative(criterion.centroid_gradient(z, target), grad) < 1e-12
    before = criterion.centroid_logits.detach().clone()
    optimizer = CentroidSGD(criterion, lr=1.0)
    optimizer.step(z, target)
    assert relative(criterion.centroid_logits, before - grad) < 1e-12
    criterion.eval()
    assert criterion(z, target) < start
    criterion.separation_focus = 0.0  # the kernels again
    plain = ncmi_loss(z, target, criterion.centroid_logits, center=criterion.center, l2_normalize=True)
    assert relative(criterion(z, target), plain) < 1e-12


def test_transforms_and_compilation():
    z, target, xi = problem()

    def loss(z, xi):
        return ncmi_loss(z, target, xi, separation_focus=10.0)

    expected = torch.autograd.grad(loss(z, xi), (z, xi))
    for a, e in zip(torch.func.grad(loss, (0, 1))(z.detach(), xi.detach()), expected, strict=True):
        assert relative(a, e) < 1e-12
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(z, xi), (z, xi)), expected, strict=True):
        assert relative(a, e) < 1e-12
