"""The examples in the docstrings of what is public run, and show what they print."""

import contextlib
import doctest
import importlib.util
import inspect
import io

import pytest

import ncmi_kernels
from ncmi_kernels import _backends

NAMES = [*ncmi_kernels.__all__, "NCMIMetric"]


def examples_of(name):
    """The doctests of a public name, its methods' too, with nothing imported but what they import."""
    found = doctest.DocTestFinder(recurse=True).find(getattr(ncmi_kernels, name), name, globs={})
    return [test for test in found if test.examples]


def available(name):
    if name == "NCMIMetric" and importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("needs torchmetrics")
    if name == "ShardedNCMILoss" and _backends.load_library() is not None:
        pytest.skip("has no reference path, and there are no kernels")
    return getattr(ncmi_kernels, name)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one(name):
    thing = available(name)
    if inspect.isclass(thing) and issubclass(thing, Warning):
        assert thing.__doc__
    else:
        assert any(test.name == name for test in examples_of(name)), f"{name}: its docstring has no example"


@pytest.mark.parametrize("name", NAMES)
def test_they_run(name):
    available(name)
    for test in examples_of(name):
        out = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            failed, attempted = doctest.DocTestRunner().run(test, out=out.write)
        assert attempted == len(test.examples), f"{test.name}: examples that are skipped"
        assert failed == 0, out.getvalue()
