"""The operators called with arguments that do not fit: an error, nothing moved, no memory touched but theirs."""

import math

import pytest
import torch
from conftest import KERNELS
from torch import Tensor

from ncmi_kernels import _ops, _schema

ROWS, CLASSES, COLUMNS = 7, 5, 19
LONE = 3  # of the columns of norms
ERRORS = (RuntimeError, IndexError)
BY_ROW_OF_FOCUS = ("focus_rows", "focus_nearest", "focus_weights_", "focus_sums_")

# Tables and what is written in place: contiguous only.
CONTIGUOUS = {"center", "running_center", "log_activation", "activation", "reference", "norms", "weight", "rows"}
CONTIGUOUS |= {"totals", "grad", "momentum_buffer", "terms", "coefficients", "row_reference", "row_own", "prior"}
CONTIGUOUS |= {"class_weights", "weighted", "class_level", "product", "separation", "weights", "shared"}


def arguments(run: _schema.Operators, name: str, centroid_to_sample: bool) -> dict[str, object]:
    """Arguments that fit, by the names of the schema."""
    input, target = torch.randn(ROWS, COLUMNS), torch.arange(ROWS) % CLASSES
    logits = 10 * torch.eye(CLASSES, COLUMNS)  # of which the statistics name the column that differs
    tables = ("log_activation", "activation", "reference", "norms")
    stats = dict(zip(tables, run.centroid_stats(logits, False, centroid_to_sample), strict=True))
    terms, rows = run.terms(input, target, None, *stats.values(), 1.0, True, False, centroid_to_sample, -100)
    known = {
        "centroid_logits": logits,
        "input": input,
        "target": target,
        "center": torch.zeros(COLUMNS),
        "running_center": None,
        "num_batches_tracked": None,
        "momentum": 0.9,
        "weight": torch.rand(CLASSES),
        "terms": terms,
        "rows": rows,
        "coefficients": torch.rand(ROWS, _schema.COEFFICIENTS, dtype=torch.float64),
        "row_reference": torch.rand(ROWS, COLUMNS),
        "upstream": torch.rand(()) if name == "centroid_grad" else torch.rand(ROWS),
        "class_weights": torch.rand(CLASSES, _schema.CLASS_WEIGHTS, dtype=torch.float64),
        "weighted": torch.rand(CLASSES, COLUMNS),
        "class_level": torch.rand(2, CLASSES, dtype=torch.float64),
        "prior": torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64),
        "row_own": torch.rand(ROWS, COLUMNS),
        "centroids_per_class": 1,
        "product": torch.rand(ROWS, CLASSES),
        "separation": torch.rand(ROWS, dtype=torch.float64),
        "shared": torch.rand(3, ROWS, dtype=torch.float64) + 0.1,
        "weights": torch.rand(ROWS, CLASSES),
        "totals": torch.ones(4 if name == "reduce" else COLUMNS + 1, dtype=torch.float64),
        "momentum_buffer": torch.zeros(CLASSES, COLUMNS),
        "grad": torch.randn(ROWS, COLUMNS),
        "softmax": False,
        "centroid_to_sample": centroid_to_sample,
        "temperature": 1.0,
        "l2_normalize": True,
        "focus": 5.0 if name == "focus_weights_" else False,
        "batch_ratio": False,
        "reduction": 1,
        "eps": 1e-8,
        "sharpness": 0.0,
        "ignore_index": -100,
        "with_grad": True,
        "lr": 0.1,
        "weight_decay": 0.0,
        "nesterov": False,
        "num_classes": CLASSES,
        **stats,
    }
    if name == "loss":  # with a running centre, which an error must leave where it was
        known |= {"center": None, "running_center": torch.randn(COLUMNS), "num_batches_tracked": torch.tensor(3)}
    if name == "update_center_":
        known |= {"num_batches_tracked": torch.tensor(3)}
    if name == "scale_":
        known |= {"upstream": torch.tensor(2.0)}
    schema = getattr(torch.ops.ncmi_kernels, name).default._schema
    return {argument.name: known[argument.name] for argument in schema.arguments}


def spoilt(name: str, argument: str, good: Tensor) -> list[Tensor]:
    """What `argument` of the operator `name` may not be."""
    zeros = good.new_zeros
    bad = [zeros((1, *good.shape)), good.to(torch.int32)]
    if good.dim():
        bad.append(zeros(()) if argument != "upstream" else zeros((0,)))
    for d, size in enumerate(good.shape):
        if name in ("scale_", "centroid_stats"):
            continue  # of any size
        sizes = {0, size - 1, size + 1} - {-1, size}
        if (name, argument) == ("reduce", "weight"):
            sizes.discard(size + 1)  # of as many classes
        bad += [zeros((*good.shape[:d], other, *good.shape[d + 1 :])) for other in sorted(sizes)]
    if name == "centroid_stats":
        bad += [zeros((0, COLUMNS)), zeros((CLASSES, 0))]
    contiguous = CONTIGUOUS | ({"centroid_logits"} if name == "centroid_step_" else set())
    if argument in contiguous and good.numel():
        bad.append(torch.stack((good, good), dim=-1)[..., 0])
    if good.numel():
        freed = good.clone()
        freed.untyped_storage().resize_(0)
        bad.append(freed)
    return bad


def check_refuses(run: _schema.Operators, name: str, spoiled: dict[str, object]) -> None:
    """An error, which has changed none of the other arguments."""
    tensors = [t for t in spoiled.values() if isinstance(t, Tensor) and t.untyped_storage().nbytes()]
    before = [t.clone() for t in tensors]
    with pytest.raises(ERRORS):
        getattr(run, name)(*spoiled.values())
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t.nan_to_num(7), old.nan_to_num(7)), (name, "moved something")


def check_tensors(run: _schema.Operators, name: str, centroid_to_sample: bool) -> None:
    """Each tensor in turn of another shape, dtype or layout."""
    getattr(run, name)(*arguments(run, name, centroid_to_sample).values())
    good = arguments(run, name, centroid_to_sample)
    for argument, value in good.items():
        for bad in spoilt(name, argument, value) if isinstance(value, Tensor) else []:
            try:
                check_refuses(run, name, {**good, argument: bad})
            except BaseException as error:
                error.add_note(f"{name}: {argument} {bad.dtype} {tuple(bad.shape)} {bad.stride()}")
                raise


def check_combinations(run: _schema.Operators) -> None:
    """Of the operator loss: what no combination of its arguments may break."""
    good = arguments(run, "loss", False)
    reductions = {"reduction": 3}, {"reduction": -1}, {"batch_ratio": True, "reduction": 2}
    reductions += {"sharpness": -1.0}, {"sharpness": math.nan}, {"batch_ratio": True, "sharpness": 1.0}
    for bad in reductions:
        check_refuses(run, "reduce", {**arguments(run, "reduce", False), **bad})
    for bad in (
        *({**bad, "with_grad": False} for bad in reductions),
        {"batch_ratio": True},
        {"reduction": 0},
        {"center": torch.zeros(COLUMNS)},
        {"num_batches_tracked": None},
        {"running_center": None},
        {"input": good["input"].bfloat16()},  # with_grad
        {"input": good["input"].double(), "with_grad": False},
    ):
        check_refuses(run, "loss", {**good, **bad})


def check_targets(run: _schema.Operators, values=(CLASSES, -1, 2**62, -(2**63)), on_a_device=False) -> None:
    """An error. On a device the kernel stops, after which no memory can be read: other rows may have moved before."""
    for name in (
        "terms",
        "reduce",
        "loss",
        "input_grad",
        "centroid_grad",
        "centroid_step_",
        "update_center_",
        *BY_ROW_OF_FOCUS,
    ):
        good = arguments(run, name, False)
        for value in values:
            target = good["target"].clone()
            target[3] = value
            spoiled = {**good, "target": target}
            if on_a_device and name in BY_ROW_OF_FOCUS:
                with pytest.raises(ERRORS):
                    getattr(run, name)(*spoiled.values())
            else:
                check_refuses(run, name, spoiled)


def check_empty_batches(run: _schema.Operators) -> None:
    for name in _schema.SCHEMAS:
        good = arguments(run, name, True)
        by_row = (
            "input",
            "target",
            "rows",
            "coefficients",
            "row_reference",
            "row_own",
            "grad",
            "product",
            "separation",
            "weights",
        )
        empty = {key: good[key][:0] for key in by_row if key in good}
        empty |= {key: good[key][:, :0].contiguous() for key in ("terms", "shared") if key in good}
        if "upstream" in good and good["upstream"].dim():
            empty["upstream"] = good["upstream"][:0]
        getattr(run, name)(*{**good, **empty}.values())


def check_statistics_that_are_none(
    run: _schema.Operators, values=(math.nan, math.inf, -math.inf, 1e300, -1e300, 5.5, -1)
):
    """Any numbers for what the forward pass leaves: wrong results at the most."""
    for name in (
        "terms",
        "reduce",
        "loss",
        "input_grad",
        "centroid_grad",
        "centroid_step_",
        "class_totals",
        *BY_ROW_OF_FOCUS,
    ):
        for table in ("norms", "rows"):
            for value in values:
                good = arguments(run, name, True)
                if table in good:
                    good[table] = good[table].clone()
                    good[table][:, 2] = value  # how the row was activated
                    getattr(run, name)(*good.values())


def check_count_of_batches(run: _schema.Operators) -> None:
    most = torch.tensor(torch.iinfo(torch.int64).max)
    for name in ("loss", "update_center_"):
        run_with = {**arguments(run, name, False), "num_batches_tracked": most}
        getattr(run, name)(*run_with.values())
        assert most == torch.iinfo(torch.int64).max


every_backend = pytest.mark.parametrize("backend", KERNELS)


@every_backend
@pytest.mark.parametrize("centroid_to_sample", [False, True])
@pytest.mark.parametrize("name", _schema.SCHEMAS)
def test_tensors_that_do_not_fit(name, centroid_to_sample, backend):
    check_tensors(_ops.operators(backend), name, centroid_to_sample)


@every_backend
def test_combinations_that_do_not_fit(backend):
    check_combinations(_ops.operators(backend))


def test_targets_out_of_range():
    check_targets(_ops.operators("cpu"))


@every_backend
def test_empty_batches(backend):
    check_empty_batches(_ops.operators(backend))


@every_backend
def test_statistics_that_are_none(backend):
    check_statistics_that_are_none(_ops.operators(backend))


@pytest.mark.parametrize("value", [math.nan, math.inf, COLUMNS, 1e18, -2.0, -1e300])
@pytest.mark.parametrize("name", ["terms", "loss", "input_grad"])
def test_a_lone_column_that_is_none(name, value):
    """Which of the columns differs from all others is an index on the CPU; checked for the classes that are named."""
    run = _ops.operators("cpu")
    good = arguments(run, name, True)
    good["norms"][CLASSES - 1, LONE] = value
    check_refuses(run, name, good)
    good["target"] = good["target"] % (CLASSES - 1)
    getattr(run, name)(*good.values())


@every_backend
def test_the_largest_count_of_batches(backend):
    check_count_of_batches(_ops.operators(backend))
