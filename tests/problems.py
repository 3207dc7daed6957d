"""Random problems, what a backend makes of them, and the comparison with float64."""

from dataclasses import fields

import pytest
import torch
from conftest import KERNELS, relative

from ncmi_kernels import ncmi_loss, reference
from ncmi_kernels._options import ACTIVATIONS, SEPARATIONS, Options

__all__ = ["ACTIVATIONS", "RATIOS", "SEPARATIONS", "Options"]

RATIOS = ("batch", "sample")  # as far as backends go, "soft_margin" differs in what makes terms a loss: test_kernels.py

HALF = (torch.bfloat16, torch.float16)
REDUCTIONS = [("batch", "mean"), ("sample", "mean"), ("sample", "sum"), ("sample", "none")]  # of each ratio
REDUCTIONS += [("soft_margin", "mean"), ("soft_margin", "none")]
BOTH = (False, True)
SINGLE = (2e-6, 5e-6, 5e-6)  # what float32 is off, at most: the loss, its gradients of input and of centroid_logits

# Of the options of a criterion: the operators alone, what has more to do, and plain PyTorch.
WAYS = {"cpu": {"backend": "cpu"}, "focus": {"separation_focus": 5.0}, "reference": {"backend": "reference"}}

every_way = pytest.mark.parametrize("way", WAYS)
every_backend = pytest.mark.parametrize("backend", KERNELS)
every_separation = pytest.mark.parametrize("separation", SEPARATIONS)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)
plain_and_focus = pytest.mark.parametrize("focus", [0.0, 10.0])

# In the interpreter a call takes a tenth of a second and more: there every pair of options meets, not all at once.
LEFT = "left to the other backends"


def make(rows, classes, columns, *, ignore=False, center=False, weight=False, spread=2.0, dtype=torch.float64):
    """A random problem: input, target, centroid_logits, center, weight."""
    target = torch.randint(classes, (rows,))
    if ignore:
        target[::3] = -100
    return (
        (spread * torch.randn(rows, columns, dtype=torch.float64)).to(dtype),
        target,
        (spread * torch.randn(classes, columns, dtype=torch.float64)).to(dtype),
        torch.randn(columns, dtype=torch.float64).to(dtype) if center else None,
        (torch.rand(classes, dtype=torch.float64) + 0.1).to(dtype) if weight else None,
    )


def to(dtype, problem):
    """The same problem in another dtype."""
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in problem)


def evaluate(problem, options: Options, backend: str, literal=False, upstream=1.0, class_prior=None):
    """Loss and gradients of input and centroid_logits. backend "float64" is the literal or collapsed reference."""
    z, target, xi, center, weight = to(torch.float64, problem) if backend == "float64" else problem
    z, xi = z.detach().requires_grad_(), xi.detach().requires_grad_()  # strides as they are, which a clone may not keep
    if backend == "float64":
        loss = reference.loss(z, target, xi, center, weight, options, class_prior, literal=literal)
    else:
        keywords = {each.name: getattr(options, each.name) for each in fields(options) if each.init}
        keywords |= {"center": center, "weight": weight, "class_prior": class_prior}
        loss = ncmi_loss(z, target, xi, backend=backend, **keywords)
    grads = torch.autograd.grad(loss, (z, xi), torch.full_like(loss, upstream))
    return loss.detach(), *grads


def check(actual, expected, bounds):
    """The relative error of each tensor is no more than its bound, or than the one bound of all."""
    bounds = bounds if isinstance(bounds, tuple) else (bounds,) * len(actual)
    for a, e, bound in zip(actual, expected, bounds, strict=True):
        assert relative(a, e) <= bound


def check_against_float64(problem, options: Options, backend: str, bounds, literal=False):
    check(evaluate(problem, options, backend), evaluate(problem, options, "float64", literal), bounds)


def check_against_the_literal_definition(problem, options: Options, backend: str, **others):
    """A problem in float64, of the collapsed reference and the backend, and of the backend in float32."""
    expected = evaluate(problem, options, "float64", literal=True, **others)
    for actual in (evaluate(problem, options, "float64", **others), evaluate(problem, options, backend, **others)):
        check(actual, expected, 1e-10)
    single = to(torch.float32, problem)
    actual = evaluate(single, options, backend, **others)
    check(actual, evaluate(single, options, "float64", literal=True, **others), SINGLE)
    assert {each.dtype for each in actual} == {torch.float32}
