"""The backends and options that tests are parametrised over, and bounds on what ncmi_kernels/testing.py finds."""

import pytest
import torch
from conftest import KERNELS, relative

from ncmi_kernels._options import ACTIVATIONS, SEPARATIONS
from ncmi_kernels.testing import HALF, Options, evaluate
from ncmi_kernels.testing import random_problem as make
from ncmi_kernels.testing import to_dtype as to

__all__ = ["ACTIVATIONS", "HALF", "RATIOS", "SEPARATIONS", "Options", "evaluate", "make", "to"]

RATIOS = ("batch", "sample")  # as far as backends go, "soft_margin" differs in what makes terms a loss: test_kernels.py

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
