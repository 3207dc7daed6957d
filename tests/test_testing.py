"""ncmi_kernels.testing finds what is wrong, and pairs meet."""

import doctest
import itertools
import math
import secrets
from functools import partial

import pytest
import torch

from ncmi_kernels import _backends, ncmi_loss, testing

needs_kernels = pytest.mark.skipif(_backends.load_library() is not None, reason="no kernels")
reference = partial(ncmi_loss, backend="reference")


def failures(loss):
    return {result.what for result in testing.check(loss, seed=1, single=1e-4) if not result.passed}


@pytest.mark.parametrize("sizes", [(2, 2), (4, 3, 2), (6, 4, 4, *[2] * 10)])
def test_any_two_values_meet(sizes):
    factors = {f"factor {index}": range(size) for index, size in enumerate(sizes)}
    found = testing.pairwise(**factors)
    for one, two in itertools.combinations(factors, 2):
        met = {(each[one], each[two]) for each in found}
        assert met == set(itertools.product(factors[one], factors[two]))
    most = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert most <= len(found) <= 1.5 * most


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    assert testing.relative_error(1.5 * x, x) == pytest.approx(0.5)
    assert testing.relative_error(x, torch.zeros(2)) == 5
    assert testing.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(testing.relative_error(x, torch.tensor([3.0, torch.nan])))


@needs_kernels
def test_the_kernels_pass_with_fresh_numbers():
    """Each seed has its own problems; the limits are several times what is found."""
    seed = secrets.randbelow(2**31)
    results = testing.check("cpu", seed=seed)
    assert [result for result in results if not result.passed] == [], f"seed {seed}"
    assert {result.dtype for result in results} == {"float32", "float64", "bfloat16", "float16"}
    assert max(result.largest for result in results if result.dtype == "float64") > 0


def test_the_same_seed_gives_the_same_problems_and_leaves_the_generator():
    state = torch.random.get_rng_state()
    one, same, other = ([r.errors for r in testing.check(reference, seed=seed, fast=True)] for seed in (3, 3, 4))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)


def scaled_loss(*args, **options):
    return 1.001 * reference(*args, **options)


def without_the_centroids(z, target, xi, **options):
    return reference(z, target, xi.detach(), **options) + 0 * xi.sum()


def nan_for_extremes(z, target, xi, **options):
    return reference(z, target, xi, **options) * (torch.nan if z.abs().max() > 80 else 1)


def without_the_prior(*args, class_prior, **options):
    return reference(*args, **options)


def no_half(z, *args, **options):
    if z.dtype == torch.bfloat16:
        raise RuntimeError("bfloat16: not today")
    return reference(z, *args, **options)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (reference, set()),
        (scaled_loss, {"random", "extreme"}),
        (without_the_centroids, {"random", "extreme", "gradcheck"}),
        (nan_for_extremes, {"extreme"}),
        (without_the_prior, {"random"}),
        (no_half, {"random"}),
    ],
)
def test_what_is_wrong_is_found(loss, expected):
    assert failures(loss) == expected


def test_examples_run():
    failed, attempted = doctest.testmod(testing)
    assert (failed, attempted > 5) == (0, True)


def of_low_precision(z, *args, **options):
    return reference(z, *args, **options).to(z.dtype)


def test_a_loss_of_another_dtype_or_shape_is_found():
    results = testing.check(of_low_precision, seed=1, single=1e-4, fast=True)
    wrong = {(r.what, r.dtype) for r in results if not r.passed}
    assert wrong == {("random", "bfloat16"), ("random", "float16")}
    results = testing.check(lambda *args, **options: reference(*args, **options)[None], seed=1, fast=True)
    assert all("loss: got shape and dtype" in r.note for r in results if r.what != "gradcheck")


def test_what_a_loss_raises_is_a_note():
    notes = {result.note for result in testing.check(no_half, seed=1, fast=True)}
    assert notes == {"", "RuntimeError: bfloat16: not today"}
