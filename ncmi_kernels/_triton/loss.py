"""The loss of a batch in one call: its running centre moved, its terms, and what these are reduced to."""

from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._options import REDUCTIONS, Features
from ncmi_kernels._schema import Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch, Moving, Reduced, Reducing
from ncmi_kernels._triton.center import column_sums, move_center
from ncmi_kernels._triton.checks import INT64, check, check_batch, check_reducing, check_table, require
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.reduce import finish
from ncmi_kernels._triton.terms import launch_terms


@operator
def loss(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    running_center: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    weight: Tensor | None,
    temperature: float,
    l2_normalize: bool,
    softmax: bool,
    centroid_to_sample: bool,
    batch_ratio: bool,
    reduction: int,
    eps: float,
    sharpness: float,
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """The loss [] or [B], the rows' statistics [B, 8] and coefficients [B, 4], the moved centre [M] or [0],
    d loss / d input or [0], means [2].
    """  # noqa: D205
    batch = Batch(input, target, center if running_center is None else running_center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    features = Features(temperature, l2_normalize, softmax, centroid_to_sample)
    by = Reducing(weight, batch_ratio, reduction, eps, sharpness, centroid_to_sample)
    check_table(input, table, centroid_to_sample)
    dtype, classes = log_activation.dtype, log_activation.shape[0]
    rows, columns = check_batch(batch, dtype, classes)
    check("weight", weight, input, (dtype,), (classes,))
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    check_reducing(by)
    scalar, mean = REDUCTIONS[reduction] != "none", REDUCTIONS[reduction] == "mean"
    require(
        (running_center is None) == (num_batches_tracked is None) and (center is None or running_center is None),
        "pass center, or running_center with num_batches_tracked",
    )
    require(
        not with_grad or (not batch_ratio and scalar and input.dtype is dtype),
        "with_grad needs ratio by sample, a scalar loss, and input in the arithmetic type",
    )
    normalized = with_grad and mean
    with launches.on(input):
        result = log_activation.new_empty(() if scalar else (rows,))
        coefficients = norms.new_empty((rows, _schema.COEFFICIENTS))
        means = norms.new_empty((2,))
        moved_center = grad = log_activation.new_empty((0,))
        weight_sums = moving = None
        if running_center is not None or normalized:
            sums, counts, weight_sums = column_sums(batch, classes, weight, running_center is not None, normalized)
            if running_center is not None:
                assert num_batches_tracked is not None
                assert sums is not None
                # Until the last launch only a copy: a call that fails has moved nothing.
                moved = move_center(sums, counts, running_center, num_batches_tracked, momentum, False)
                moving = Moving(running_center, num_batches_tracked, *moved)
                moved_center = moving.moved_center
                batch = Batch(input, target, moved_center, ignore_index)
        if with_grad:
            grad = log_activation.new_empty((rows, columns))
            of_rows = launch_terms(batch, table, features, by, weight_sums, coefficients, grad)
            reduced = Reduced(result, None, means)
        else:
            of_rows = launch_terms(batch, table, features)
            reduced = Reduced(result, coefficients, means)
        finish(target, ignore_index, norms, of_rows, by, reduced, moving)
    return result, of_rows.stats, coefficients, moved_center, grad, means
