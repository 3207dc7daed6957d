"""What is refused, with which exception, and what the message says; and that NaN is never hidden."""

import math
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from ncmi_kernels import NCMILoss, log_nsf, ncmi_loss, ncmi_terms, nsf

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


BACKENDS = ("cpu", "reference")


B, C, M = 5, 4, 6


MIN = torch.iinfo(torch.int64).min


RNG = torch.Generator().manual_seed(0)


INPUT = torch.randn(B, M, generator=RNG)


TARGET = torch.tensor([0, 3, 1, 2, 3])


CENTROIDS = torch.randn(C, M, generator=RNG)


CENTER = torch.randn(M, generator=RNG)


WEIGHT = torch.rand(C, generator=RNG)
PRIOR = torch.full((C,), 1 / C)


@contextmanager
def refused(exception, *parts):
    """The block raises exactly `exception`, with every one of `parts` in its message."""
    with pytest.raises(exception) as caught:
        yield
    assert type(caught.value) is exception
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message


def call(function, **changes):
    return function(**{"input": INPUT, "target": TARGET, "centroid_logits": CENTROIDS, **changes})


def through_module(mode, input, target, centroid_logits, **options):
    return NCMILoss(C, M, **options).train(mode == "train")(input, target)


CALLS = {
    "loss": ncmi_loss,
    "terms": ncmi_terms,
    "train": partial(through_module, "train"),
    "eval": partial(through_module, "eval"),
}


def quiet(tensor, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its sparse CSR layout is in beta
        return getattr(tensor, method)()


def bad_tensors(name, good):
    """Changes of one argument that no function takes, whatever the argument is."""
    yield {name: good.tolist()}, TypeError, (f"{name}: got list", "expected a torch.Tensor")
    yield {name: good.numpy()}, TypeError, (f"{name}: got ndarray", "expected a torch.Tensor")
    yield {name: 1.0}, TypeError, (f"{name}: got float", "expected a torch.Tensor")
    sparse = (f"{name}: got layout torch.sparse_coo", "expected a dense (torch.strided) tensor")
    yield {name: good.to_sparse()}, RuntimeError, sparse


def bad_floats(name, good):
    yield from bad_tensors(name, good)
    for dtype in (torch.int64, torch.int32, torch.bool, torch.complex64):
        parts = (f"{name}: got dtype {dtype}", "expected torch.float32", "torch.bfloat16")
        yield {name: good.to(dtype)}, RuntimeError, parts


def bad_batches():
    yield from bad_floats("input", INPUT)
    yield from bad_tensors("target", TARGET)
    layout = "input: got layout torch.sparse_csr"
    yield {"input": quiet(INPUT, "to_sparse_csr")}, RuntimeError, (layout, "torch.strided")
    for dtype in (torch.int32, torch.int8, torch.bool, torch.float32, torch.float64):
        hint = ("class probabilities are not supported",) if dtype.is_floating_point else ()
        parts = (f"target: got dtype {dtype}", "expected torch.int64", *hint)
        yield {"target": TARGET.to(dtype)}, RuntimeError, parts
    yield {"target": torch.rand(B, C)}, RuntimeError, ("target: got dtype torch.float32", "torch.int64")
    for shape in ((), (M + 1,), (B, M - 1), (M, B), (B, M + 1, 2), (B, 2, M), (0,), (1, 0)):
        parts = (f"input: got shape {shape}", "expected [B, M], [M] or [B, M, d1, ...]", f"M = {M}")
        yield {"input": torch.zeros(shape), "target": torch.zeros((), dtype=torch.int64)}, ValueError, parts
    for input, target, expected in (
        ((B, M), (B + 1,), (B,)),
        ((B, M), (B, 1), (B,)),
        ((B, M), (), (B,)),
        ((B, M), (0,), (B,)),
        ((M,), (1,), ()),
        ((M,), (M,), ()),
        ((B, M, 2), (B,), (B, 2)),
        ((B, M, 2, 3), (B, 3, 2), (B, 2, 3)),
        ((0, M), (1,), (0,)),
    ):
        changes = {"input": torch.zeros(input), "target": torch.zeros(target, dtype=torch.int64)}
        parts = (f"target: got shape {target}", f"expected {expected}", f"input {input}")
        yield changes, ValueError, parts
    yield {"target": TARGET.to("meta")}, RuntimeError, ("target: got device meta", "expected cpu")
    yield {"input": INPUT.to("meta")}, RuntimeError, ("target: got device cpu", "expected meta")
    both = {"input": INPUT.to("meta"), "target": TARGET.to("meta")}
    yield both, RuntimeError, ("centroid_logits: got device cpu", "expected meta")


def test_weights_that_require_a_gradient():
    weight = torch.ones(C, requires_grad=True)
    with refused(RuntimeError, "weight: got a tensor that requires a gradient", "weight.detach()"):
        call(ncmi_loss, weight=weight)
    with refused(RuntimeError, "weight: got a tensor that requires a gradient", "weight.detach()"):
        NCMILoss(C, M, weight=weight)
    with torch.no_grad():
        call(ncmi_loss, weight=weight)


def bad_parameters(with_weight):
    yield from bad_floats("centroid_logits", CENTROIDS)
    yield {"centroid_logits": None}, TypeError, ("centroid_logits: got NoneType", "torch.Tensor")
    for shape in ((), (M,), (1, M), (0, M), (C, 0), (C, 1), (C, M, 1)):
        parts = (f"centroid_logits: got shape {shape}", "expected [C, M] with C >= 2 classes and M >= 2")
        yield {"centroid_logits": torch.zeros(shape)}, ValueError, parts
    columns = ("input: got shape (5, 6)", "M = 7", "centroid_logits (4, 7)")
    yield {"centroid_logits": torch.zeros(C, M + 1)}, ValueError, columns
    meta = ("centroid_logits: got device meta", "expected cpu")
    yield {"centroid_logits": CENTROIDS.to("meta")}, RuntimeError, meta
    of_classes = ((C + 1,), (M,), (1, C), (C, 1), (), (0,))
    vectors = [("center", CENTER, M, ((M + 1,), (C,), (1, M), (B, M), (), (0,)))]
    vectors.append(("class_prior", PRIOR, C, of_classes))
    if with_weight:
        vectors.append(("weight", WEIGHT, C, of_classes))
    for name, good, size, shapes in vectors:
        yield from bad_floats(name, good)
        for shape in shapes:
            parts = (f"{name}: got shape {shape}", f"expected ({size},)")
            yield {name: torch.zeros(shape)}, ValueError, parts
        yield {name: good.to("meta")}, RuntimeError, (f"{name}: got device meta", "expected cpu")
    yield from bad_priors()
    for own, rows in ((2, C + 1), (3, C), (4, C), (5, 2 * C)):
        parts = (f"centroid_logits: got shape ({rows}, {M})", f"expected [{own} C, M]", "centroids_per_class rows")
        yield {"centroid_logits": torch.zeros(rows, M), "centroids_per_class": own}, ValueError, parts


def bad_priors():
    for least, total in ((-0.125, 1.0), (0.125, 0.75), (0.25, 2.0), (math.nan, math.nan), (math.inf, math.inf)):
        prior = torch.tensor([least] + [(total - least) / (C - 1)] * (C - 1))
        parts = ("class_prior: got a minimum of", f"a sum of {prior.sum():.6g}", "expected numbers >= 0 whose sum is 1")
        yield {"class_prior": prior}, ValueError, parts
    yield {"class_prior": torch.ones(C) * 7}, ValueError, ("class_prior: got a minimum of 7 and a sum of 28",)


def check_all(function, cases, **options):
    for changes, exception, parts in cases:
        with refused(exception, *parts):
            call(function, **changes, **options)


# ------------------------------------------------------------------------------------------------------------
# Tensor arguments
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", CALLS)
def test_batch_that_does_not_fit(name, backend):
    check_all(CALLS[name], bad_batches(), backend=backend)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", ["loss", "terms"])
def test_parameters_that_do_not_fit(name, backend):
    check_all(CALLS[name], bad_parameters(with_weight=name == "loss"), backend=backend)


@pytest.mark.parametrize("function", [nsf, log_nsf])
def test_nsf_arguments(function):
    for changes, exception, parts in bad_floats("input", INPUT):
        with refused(exception, *parts):
            function(**changes)
    with refused(IndexError, "Dimension out of range", "[-2, 1]", "7"):
        function(INPUT, dim=7)


def bad_features():
    yield from bad_floats("features", INPUT)
    for shape in ((), (M + 1,), (B, M + 1), (B, 1, M), (0,)):
        parts = (f"features: got shape {shape}", "expected [B, M], [M] or [B, M, d1, ...]", f"M = {M}")
        yield {"features": torch.zeros(shape)}, ValueError, parts
    yield {"features": INPUT.to("meta")}, RuntimeError, ("features: got device meta", "expected cpu")


BAD_FEATURES = [
    pytest.param(*case, id=f"{case[1].__name__}-{case[2][0].split('got ')[1].replace(' ', '-')}")
    for case in bad_features()
]


@pytest.mark.parametrize(("changes", "exception", "parts"), BAD_FEATURES)
@pytest.mark.parametrize("method", ["scores", "predict"])
def test_features_that_do_not_fit(method, changes, exception, parts):
    with refused(exception, *parts):
        getattr(NCMILoss(C, M), method)(**changes)


@pytest.mark.parametrize("method", ["scores", "predict"])
def test_class_means_before_fit(method):
    with refused(RuntimeError, "class_means: not fitted", "fit_class_means"):
        getattr(NCMILoss(C, M), method)(INPUT, class_means=True)


def bad_fits():
    for changes, exception, parts in bad_batches():
        if changes.keys() & {"input", "target"} and exception is not ValueError:
            yield changes, exception, parts
    for shape in ((), (M + 1,), (B, M + 1), (B, 1, M)):
        # Out of range as well: that must not hide the shape behind an error about tensor indexing.
        for value in (0, C):
            changes = {"input": torch.zeros(shape), "target": torch.full(shape[:1] + shape[2:], value)}
            yield changes, ValueError, (f"got shape {shape}",)
    yield {"target": TARGET[1:]}, ValueError, ("target: got shape (4,)", "expected (5,)")
    yield {"target": TARGET + 1}, IndexError, ("target: value 4 at row 1", "[0, 4)", "ignore_index (-100)")


def test_fit_class_means_refuses_a_batch_and_keeps_the_class_means():
    criterion = NCMILoss(C, M)
    fitted = criterion.fit_class_means([(INPUT, TARGET)]).clone()
    problems = []
    for changes, exception, parts in bad_fits():
        batch = (changes.get("input", INPUT), changes.get("target", TARGET))
        try:
            with refused(exception, *parts):
                criterion.fit_class_means([(INPUT, TARGET.flip(0)), batch])
        except Exception as error:
            problems.append((parts, f"{type(error).__name__}: {error}"))
        assert torch.equal(criterion.class_means, fitted)
    assert problems == []


# ------------------------------------------------------------------------------------------------------------
# Target range
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [C, C + 7, 2**40, -1, -100, 255, MIN])
@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_target_out_of_range(name, backend, row, value):
    options = {"ignore_index": -7} if name != "terms" else {}
    target = TARGET.clone()
    target[row] = value
    parts = [f"target: value {value} at row {row}", f"expected a class in [0, {C})"]
    parts += ["ignore_index (-7)"] * bool(options)
    with refused(IndexError, *parts):
        call(CALLS[name], target=target, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_out_of_range_in_more_dimensions_names_the_flattened_row(backend):
    target = torch.zeros(2, 3, 2, dtype=torch.int64)
    target[1, 0, 1] = C
    with refused(IndexError, f"target: value {C} at row 7", f"[0, {C})"):
        ncmi_loss(torch.randn(2, M, 3, 2), target, CENTROIDS, backend=backend)
    with refused(IndexError, f"target: value {C} at row 0", f"[0, {C})"):
        ncmi_loss(INPUT[0], torch.tensor(C), CENTROIDS, backend=backend)


@pytest.mark.parametrize("ignore_index", [-100, -1, 255, C, 2, MIN])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["loss", "train", "eval"])
def test_ignore_index_is_no_error(name, backend, ignore_index):
    target = TARGET.clone()
    target[3] = ignore_index
    kept = torch.tensor([0, 1, 2, 4])
    options = {"ignore_index": ignore_index, "backend": backend}
    result = call(CALLS[name], target=target, **options)
    expected = call(CALLS[name], input=INPUT[kept], target=target[kept], **options)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejected_batch_leaves_the_module_as_it_was(backend):
    criterion = NCMILoss(C, M, center_momentum=0.5, backend=backend)
    criterion(INPUT, TARGET)
    before = {name: tensor.clone() for name, tensor in criterion.state_dict().items()}
    cases = [*bad_batches()]
    cases.append(({"target": TARGET + 1}, IndexError, ("target: value 4 at row 1",)))
    for changes, exception, parts in cases:
        with refused(exception, *parts):
            call(lambda input, target, centroid_logits: criterion(input, target), **changes)
        for name, tensor in criterion.state_dict().items():
            assert torch.equal(tensor, before[name]), (name, parts)
    criterion(INPUT + 1, TARGET)
    assert criterion.num_batches_tracked == 2
    assert not torch.equal(criterion.center, before["center"])


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------

CHOICES = {
    "activation": ("nsf", "softmax"),
    "separation": ("sample_to_centroid", "centroid_to_sample"),
    "ratio": ("batch", "sample", "soft_margin"),
    "reduction": ("none", "mean", "sum"),
}


def bad_options():
    for name in ("temperature", "eps", "sharpness"):
        for value in (0, 0.0, -1, -1e-9, 10**400, math.nan, math.inf, -math.inf, np.float32("nan")):
            yield name, value, ValueError, (f"{name}: got {value!r}", "expected a finite number > 0")
        for value in ("1", None, True, [1.0], 1j, torch.tensor(1.0)):
            yield name, value, TypeError, (f"{name}: got {value!r}", "expected a number > 0")
    for name in ("separation_focus", "centroid_focus"):
        for value in (-1, -1e-9, 10**400, math.nan, math.inf):
            yield name, value, ValueError, (f"{name}: got", "expected a finite number >= 0")
        for value in ("1", None, False, torch.tensor(1.0)):
            yield name, value, TypeError, (f"{name}: got", "expected a number >= 0")
    for name, choices in CHOICES.items():
        for value in ("", "other", choices[0].upper(), None, 0, True, [choices[0]]):
            expected = (f"{name}: got {value!r}", "expected one of", *map(repr, choices))
            yield name, value, ValueError, expected
    for value in (1, 0, None, "yes", torch.tensor(True)):
        yield "l2_normalize", value, TypeError, (f"l2_normalize: got {value!r}", "expected True or False")
    for value in (2**63, -(2**63) - 1):
        yield "ignore_index", value, ValueError, (f"ignore_index: got {value!r}", "expected an integer of 64 bits")
    for value in (1.0, None, "-100", True, torch.tensor(-1)):
        yield "ignore_index", value, TypeError, (f"ignore_index: got {value!r}", "expected an integer")


BAD_OPTIONS = [*bad_options()]


def one_option(function, name, value):
    return partial(call, function, **{name: value})


@pytest.mark.parametrize("name", sorted({case[0] for case in BAD_OPTIONS}))
def test_options_that_do_not_exist_or_are_out_of_range(name):
    cases = [case for case in BAD_OPTIONS if case[0] == name]
    assert len(cases) >= 5
    criterion = NCMILoss(C, M)
    default = getattr(criterion, name)
    for _, value, exception, parts in cases:
        functions = [one_option(ncmi_loss, name, value), partial(NCMILoss, C, M, **{name: value})]
        functions.append(partial(setattr, criterion, name, value))
        if name not in ("ratio", "reduction", "ignore_index", "eps", "sharpness"):
            functions.append(one_option(ncmi_terms, name, value))
        for function in functions:
            with refused(exception, *parts):
                function()
        assert getattr(criterion, name) == default


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reduction_of_the_batch_ratio(reduction):
    parts = (f"reduction: got {reduction!r}", "ratio='batch'", "expected 'mean'", "ratio='sample'")
    with refused(ValueError, *parts):
        call(ncmi_loss, ratio="batch", reduction=reduction)
    with refused(ValueError, *parts):
        NCMILoss(C, M, reduction=reduction)
    criterion = NCMILoss(C, M)
    with refused(ValueError, *parts):
        criterion.reduction = reduction
    criterion = NCMILoss(C, M, ratio="sample", reduction=reduction)
    with refused(ValueError, *parts):
        criterion.ratio = "batch"
    assert (criterion.ratio, criterion.reduction) == ("sample", reduction)


def bad_constructions():
    counts = ("num_classes", {}, 2), ("feature_dim", {"num_classes": C}, 2), ("centroids_per_class", {}, 1)
    for name, good, least in counts:
        for value in (least - 1, -3):
            parts = (f"{name}: got {value}", f"expected an integer >= {least}")
            yield {**good, name: value}, ValueError, parts
        for value in (3.0, "3", True, torch.tensor(3)):
            parts = (f"{name}: got {value!r}", f"expected an integer >= {least}")
            yield {**good, name: value}, TypeError, parts
    yield from bad_priors()
    yield {"num_classes": None}, TypeError, ("num_classes: got None", "expected an integer >= 2")
    for value in (-0.1, 1.1, math.nan, math.inf, -1, 2):
        parts = (f"center_momentum: got {value!r}", "expected a number in [0, 1]")
        yield {"center_momentum": value}, ValueError, parts
    for value in ("0.9", True, [0.9], torch.tensor(0.9)):
        parts = (f"center_momentum: got {value!r}", "expected a number in [0, 1]")
        yield {"center_momentum": value}, TypeError, parts
    for value in ("yes", 1, None):
        yield (
            {"learn_centroids": value},
            TypeError,
            (f"learn_centroids: got {value!r}", "expected True or False"),
        )
    for value in (torch.int64, torch.bool, torch.complex64):
        yield {"dtype": value}, ValueError, (f"dtype: got {value}", "expected a floating dtype")
    yield {"dtype": "float32"}, TypeError, ("dtype: got 'float32'", "expected")
    for shape in ((C + 1,), (M,), (1, C), (), (0,)):
        parts = (f"weight: got shape {shape}", f"expected ({C},)")
        yield {"weight": torch.ones(shape)}, ValueError, parts
    for value in (WEIGHT.tolist(), WEIGHT.numpy(), 1.0):
        parts = (f"weight: got {type(value).__name__}", "expected a torch.Tensor")
        yield {"weight": value}, TypeError, parts
    yield (
        {"weight": WEIGHT.to_sparse()},
        RuntimeError,
        ("weight: got layout torch.sparse_coo", "torch.strided"),
    )
    yield {"weight": WEIGHT + 0j}, RuntimeError, ("weight: got dtype torch.complex64", "torch.float32")
    yield {"weight": WEIGHT.to("meta")}, RuntimeError, ("weight", "meta", "cpu")
    for value in ("gpu", "", "CPU", 3):
        yield {"backend": value}, ValueError, (f"backend: got {value!r}", "'reference'", "'cpu'")


BAD_CONSTRUCTIONS = [pytest.param(*case, id=f"{list(case[0])[-1]}-{i}") for i, case in enumerate(bad_constructions())]


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize(("options", "exception", "parts"), BAD_CONSTRUCTIONS)
def test_constructor(options, exception, parts):
    arguments = {"num_classes": C, "feature_dim": M, **options}
    with refused(exception, *parts):
        NCMILoss(**arguments)


# ------------------------------------------------------------------------------------------------------------
# NaN and infinity
# ------------------------------------------------------------------------------------------------------------


def spoilt(tensor, row, value):
    tensor = tensor.clone()
    tensor[row, 2] = value
    return tensor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("separation", CHOICES["separation"])
@pytest.mark.parametrize("activation", CHOICES["activation"])
@pytest.mark.parametrize("l2_normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_reach_the_loss(backend, l2_normalize, activation, separation, dtype, value):
    options = {"l2_normalize": l2_normalize, "activation": activation, "separation": separation}
    options["backend"] = backend
    by_sample = {"ratio": "sample", "reduction": "none", **options}
    clean = call(ncmi_loss, input=INPUT.to(dtype), **by_sample)
    assert clean.isfinite().all()

    input = spoilt(INPUT, 1, value).to(dtype)
    other = torch.tensor([0, 2, 3, 4])
    each = call(ncmi_loss, input=input, **by_sample)
    assert not each[1].isfinite()
    torch.testing.assert_close(each[other], clean[other], rtol=0, atol=0)
    concentration, separated = call(ncmi_terms, input=input, **options)
    assert not concentration[1].isfinite()
    assert concentration[other].isfinite().all()
    assert separated[other].isfinite().all()
    for ratio in CHOICES["ratio"]:
        assert not call(ncmi_loss, input=input, ratio=ratio, **options).isfinite()

    # One centroid is in the separation of every sample, in the concentration of its class's only.
    centroids = spoilt(CENTROIDS, 2, value).to(dtype)
    for changes in ({"centroid_logits": centroids}, {"center": spoilt(CENTER[None], 0, value)[0].to(dtype)}):
        assert not call(ncmi_loss, input=INPUT.to(dtype), **changes, **by_sample).isfinite().any()
        assert not call(ncmi_loss, input=INPUT.to(dtype), **changes, **options).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_batch_does_not_stay_in_the_centre(value, first, backend):
    criterion = NCMILoss(C, M, center_momentum=0.5, backend=backend)
    if not first:
        criterion(INPUT, TARGET)
    center, batches = criterion.center.clone(), criterion.num_batches_tracked.clone()
    assert not criterion(spoilt(INPUT, 1, value), TARGET).isfinite()
    assert torch.equal(criterion.center, center)
    assert torch.equal(criterion.num_batches_tracked, batches)
    assert criterion(INPUT, TARGET).isfinite()
    assert criterion.num_batches_tracked == batches + 1
    assert criterion.center.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("module_dtype", "input_dtype", "scale"),
    [(torch.float32, torch.float64, 1e300), (torch.float16, torch.float32, 1e6)],
)
def test_mean_beyond_the_centre_s_range_does_not_stay_in_it(module_dtype, input_dtype, scale, backend):
    criterion = NCMILoss(C, M, center_momentum=0.0, dtype=module_dtype, backend=backend)
    criterion(INPUT.to(module_dtype), TARGET)
    center = criterion.center.clone()
    criterion(INPUT.to(input_dtype) * scale, TARGET)
    assert torch.equal(criterion.center, center)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_value_of_an_ignored_sample_counts_for_nothing(backend):
    target = TARGET.clone()
    target[1] = -100
    criterion = NCMILoss(C, M, backend=backend)
    result = criterion(spoilt(INPUT, 1, math.nan), target)
    assert result.isfinite()
    assert criterion.center.isfinite().all()
    assert criterion.num_batches_tracked == 1
