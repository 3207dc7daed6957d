"""From the rows' sums, or their terms, to the loss, and to the coefficients of the rows' gradients."""

import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._options import REDUCTIONS
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Moving, Reduced, Reducing, RowTerms
from ncmi_kernels._triton.checks import ARITHMETIC, DOUBLE, check, check_matrix, check_reducing, check_target
from ncmi_kernels._triton.elements import (
    ALL_MEAN,
    INVERSE_NORM,
    LAST,
    LOG_NORM,
    OWN_MEAN,
    OWN_PRIOR,
    PARTIAL,
    PRIOR,
    RECORD,
    ROW_KIND,
    STATS,
    WHOLE,
    checked,
    coefficients_of,
    double,
    ratio_of,
    store_coefficients,
    terms_of,
)
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import bits

FINISH_BLOCK = 512  # rows a program of finish_kernel has
LARGEST_WHOLE = 8192  # rows up to which each of its programs sums over the whole batch itself

NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SUM = tl.constexpr(2)
TERMS = tl.constexpr(3)  # no loss: the terms themselves


@triton.jit
def _terms_tile(
    row, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Of BLOCK rows: A and G (0 where a row does not count), 1 / S, the means under p, the class's prior and weight."""
    y, live, wrong = checked(target, row, target_stride, ignore_index, classes, B)
    tl.device_assert(wrong == 0, "target: out of range, expected a class in [0, C) or ignore_index")
    first = tl.load(terms + row, mask=live, other=1.0)
    second = tl.load(terms + B + row, mask=live, other=0.0)
    if GIVEN:
        concentration = first
        separation = second
        inverse_norm = tl.load(rows + row * STATS + INVERSE_NORM, mask=live, other=0.0)
        own_mean = tl.load(rows + row * STATS + OWN_MEAN, mask=live, other=0.0)
        all_mean = tl.load(rows + row * STATS + ALL_MEAN, mask=live, other=0.0)
        own_prior = tl.load(rows + row * STATS + OWN_PRIOR, mask=live, other=0.0)
    else:
        kind = tl.load(rows + row * STATS + ROW_KIND, mask=live, other=0.0)
        total = tl.load(terms + 2 * B.to(tl.int64) + row, mask=live, other=0.0)
        own_cross = tl.load(terms + 3 * B.to(tl.int64) + row, mask=live, other=0.0) if CENTROID_TO_SAMPLE else second
        own_log_norm = tl.load(norms + y * RECORD + LOG_NORM)
        own_prior = tl.load(norms + y * RECORD + PRIOR, mask=live, other=0.0)
        concentration, separation, inverse_norm, own_mean, all_mean = terms_of(
            kind, first, second, total, own_cross, own_log_norm, own_prior, norms, classes, CENTROID_TO_SAMPLE
        )
        inverse_norm = tl.where(live, inverse_norm, 0.0)
        own_mean = tl.where(live, own_mean, 0.0)
        all_mean = tl.where(live, all_mean, 0.0)
    concentration = tl.where(live, concentration, 0.0)
    separation = tl.where(live, separation, 0.0)
    factor = tl.where(live, 1.0, concentration * 0.0)
    if weight is not None:
        factor = tl.load(weight + y, mask=live, other=0.0).to(tl.float64)
    factor = tl.where(live, factor, 0.0)
    return concentration, separation, inverse_norm, own_mean, all_mean, own_prior, factor, live


@triton.jit
def _batch_sums(
    concentration, separation, factor, live, eps, sharpness, BATCH_RATIO: tl.constexpr, SOFT: tl.constexpr
):  # fmt: skip
    """Of BLOCK rows: the sums of w, of w A, of w G, and by sample of w times the ratio."""
    first = tl.sum(tl.where(live, factor * concentration, 0.0), axis=0)
    second = tl.sum(tl.where(live, factor * separation, 0.0), axis=0)
    third = tl.full([], 0.0, tl.float64)
    if not BATCH_RATIO:
        ratio, _, _ = ratio_of(concentration, separation, eps, sharpness, SOFT)
        third = tl.sum(tl.where(live, factor * ratio, 0.0), axis=0)
    return tl.sum(factor, axis=0), first, second, third


@triton.jit(
    do_not_specialize=["target_stride", "eps", "sharpness", "ignore_index", "classes", "B", "tiles", "columns"],
    debug=True,
)
def finish_kernel(
    target, norms, weight, terms, totals, partials, rows, coefficients, loss, means, sums, center, batches,
    moved_center, moved_batches, target_stride, eps, sharpness, ignore_index, classes, B, tiles,
    columns, CENTROID_TO_SAMPLE: tl.constexpr, FOCUS: tl.constexpr, BATCH_RATIO: tl.constexpr, SOFT: tl.constexpr,
    REDUCTION: tl.constexpr, GIVEN: tl.constexpr, STAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the sums of the rows to what REDUCTION asks for: the loss [] or [B], or for TERMS A and G [2, B].

    `terms` are the rows' sums [4, B], and the columns of `rows` [B, 8] that terms_kernel left out are written; or with
    GIVEN they are A and G [2, B]. But for TERMS also `means` [2] of A and G, and where there are pointers for them
    `coefficients` [B, 4] and the `sums` [4] over the rows. Those are formed in stages: PARTIAL writes its own to
    `partials` [4, tiles], LAST reads them; WHOLE does without. Or they are not formed, and are those in `totals` [4].

    Where there is a `center` [columns], this moves it, as nothing comes after that could fail.
    """
    eps = double(eps)
    sharpness = double(sharpness)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    concentration, separation, inverse_norm, own_mean, all_mean, own_prior, factor, live = _terms_tile(
        row, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE, GIVEN
    )
    if STAGE == PARTIAL:
        weights, first, second, third = _batch_sums(
            concentration, separation, factor, live, eps, sharpness, BATCH_RATIO, SOFT
        )  # fmt: skip
        tile = partials + tl.program_id(0)
        tl.store(tile, weights)
        tl.store(tile + tiles, first)
        tl.store(tile + 2 * tiles, second)
        tl.store(tile + 3 * tiles, third)
    else:
        if not GIVEN:
            of_row = rows + row * STATS
            tl.store(of_row + INVERSE_NORM, inverse_norm, mask=row < B)
            tl.store(of_row + OWN_MEAN, own_mean, mask=row < B)
            tl.store(of_row + ALL_MEAN, all_mean, mask=row < B)
            tl.store(of_row + OWN_PRIOR, own_prior, mask=row < B)
        if REDUCTION == TERMS:
            tl.store(loss + row, concentration, mask=row < B)
            tl.store(loss + B + row, separation, mask=row < B)
        else:
            if totals is not None:
                weights = tl.load(totals)
                first = tl.load(totals + 1)
                second = tl.load(totals + 2)
                third = tl.load(totals + 3)
            else:
                # Summed over a block at the end, in one order for any number of programs.
                weights = tl.full([], 0.0, tl.float64)
                first = weights
                second = weights
                third = weights
                for tile in range(0, tiles if STAGE == WHOLE else tl.cdiv(tiles, BLOCK)):
                    i = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
                    if STAGE == WHOLE:
                        a, g, _, _, _, _, w, counts = _terms_tile(
                            i, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B,
                            CENTROID_TO_SAMPLE, GIVEN,
                        )  # fmt: skip
                        d_weights, d_first, d_second, d_third = _batch_sums(
                            a, g, w, counts, eps, sharpness, BATCH_RATIO, SOFT
                        )  # fmt: skip
                    else:
                        d_weights = tl.sum(tl.load(partials + i, mask=i < tiles, other=0.0), axis=0)
                        d_first = tl.sum(tl.load(partials + tiles + i, mask=i < tiles, other=0.0), axis=0)
                        d_second = tl.sum(tl.load(partials + 2 * tiles + i, mask=i < tiles, other=0.0), axis=0)
                        d_third = tl.sum(tl.load(partials + 3 * tiles + i, mask=i < tiles, other=0.0), axis=0)
                    weights += d_weights
                    first += d_first
                    second += d_second
                    third += d_third
            # No row that counts: 0 / 0, as cross_entropy.
            first_mean = first / weights
            second_mean = second / weights
            if REDUCTION == MEAN:
                factor = factor / weights
            ratio, by_concentration, by_separation = ratio_of(
                first_mean if BATCH_RATIO else concentration, second_mean if BATCH_RATIO else separation, eps,
                sharpness, SOFT,
            )  # fmt: skip
            if coefficients is not None:
                made = coefficients_of(
                    own_mean, all_mean, own_prior, factor * by_concentration, factor * by_separation,
                    CENTROID_TO_SAMPLE, FOCUS,
                )  # fmt: skip
                store_coefficients(coefficients, row, B, live, made)
            if REDUCTION == NONE:
                value = tl.where(live, factor * ratio, 0.0)
                tl.store(loss + row, value.to(loss.dtype.element_ty), mask=row < B)
            if tl.program_id(0) == 0:
                if REDUCTION != NONE:
                    if BATCH_RATIO:
                        value = ratio
                    elif REDUCTION == MEAN:
                        value = third / weights
                    else:
                        value = third
                    tl.store(loss, value.to(loss.dtype.element_ty))
                tl.store(means, first_mean)
                tl.store(means + 1, second_mean)
                if sums is not None:
                    tl.store(sums, weights)
                    tl.store(sums + 1, first)
                    tl.store(sums + 2, second)
                    tl.store(sums + 3, third)
        if center is not None:
            for start in range(tl.program_id(0) * BLOCK, columns, tiles * BLOCK):
                k = start + tl.arange(0, BLOCK)
                tl.store(center + k, tl.load(moved_center + k, mask=k < columns), mask=k < columns)
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(moved_batches))


def _classes_of(weight: Tensor | None) -> int:
    """How many the weights tell of; without them a target may be any."""
    return 2**63 - 1 if weight is None else weight.numel()


def finish(
    target: Tensor,
    ignore_index: int,
    norms: Tensor | None,
    of_rows: RowTerms,
    by: Reducing,
    to: Reduced,
    moving: Moving | None = None,
) -> None:
    """The last launch of a call: `moving` is done here. Terms that are given need no `norms`."""
    stats, terms, given = of_rows
    weight, batch_ratio, reduction, eps, sharpness, centroid_to_sample, focus, totals = by
    loss, coefficients, means, sums = to
    center, batches, moved_center, moved_batches = moving or (None, None, None, None)
    rows = target.shape[0]
    tiles = max(1, -(-rows // FINISH_BLOCK))
    whole = rows <= LARGEST_WHOLE or means is None or totals is not None
    partials = None if whole else terms.new_empty((4, tiles))
    for stage in (WHOLE,) if whole else (PARTIAL, LAST):
        launches.launch(
            finish_kernel,
            (tiles,),
            target=target,
            norms=norms,
            weight=weight,
            terms=terms,
            totals=totals,
            partials=partials,
            rows=stats,
            coefficients=coefficients,
            loss=loss,
            means=means,
            sums=sums,
            center=center,
            batches=batches,
            moved_center=moved_center,
            moved_batches=moved_batches,
            target_stride=target.stride(0),
            eps=bits(eps),
            sharpness=bits(sharpness),
            ignore_index=ignore_index,
            classes=_classes_of(weight) if norms is None else norms.shape[0] - 1,
            B=rows,
            tiles=tiles,
            columns=0 if center is None else center.shape[0],
            CENTROID_TO_SAMPLE=centroid_to_sample,
            FOCUS=focus,
            BATCH_RATIO=batch_ratio,
            SOFT=sharpness > 0,
            REDUCTION=reduction,
            GIVEN=given,
            STAGE=stage,
            BLOCK=FINISH_BLOCK,
            debug=True,
        )


@operator
def reduce(
    terms: Tensor,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    totals: Tensor | None,
    centroid_to_sample: bool,
    focus: bool,
    batch_ratio: bool,
    reduction: int,
    eps: float,
    sharpness: float,
    ignore_index: int,
) -> Reduced:
    """The loss [] or [B] of terms [2, B], the rows' coefficients [B, 4], means [2] and sums [4], float64."""
    count, _ = check_matrix("rows", rows, DOUBLE)
    classes = _classes_of(weight)
    check("rows", rows, terms, DOUBLE, (count, _schema.ROW_STATS))
    check("terms", terms, terms, DOUBLE, (2, count))
    check_target(target, terms, count, classes, ignore_index)
    check("weight", weight, terms, ARITHMETIC, (classes,))
    check("totals", totals, terms, DOUBLE, (4,))
    by = Reducing(weight, batch_ratio, reduction, eps, sharpness, centroid_to_sample, focus, totals)
    check_reducing(by)
    with launches.on(terms):
        loss = terms.new_empty((count,) if REDUCTIONS[reduction] == "none" else ())
        coefficients = terms.new_empty((count, _schema.COEFFICIENTS))
        reduced = Reduced(loss, coefficients, terms.new_empty((2,)), terms.new_empty((4,)))
        finish(target, ignore_index, None, RowTerms(rows, terms, True), by, reduced)
    return reduced


@triton.jit(do_not_specialize=["size"])
def scale_kernel(grad, upstream, size, BLOCK: tl.constexpr):
    """`grad` [size] times `upstream` [], in place; neither read nor written where that is 1.

    Rows that do not count stay 0, whatever comes.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(upstream)
    if factor != 1.0:
        value = tl.load(grad + i, mask=i < size)
        tl.store(grad + i, tl.where(value == 0.0, value, value * factor), mask=i < size)


@operator
def scale_(grad: Tensor, upstream: Tensor) -> None:
    """`grad` [B, M] times `upstream` [], in place; 0 stays 0."""
    shape = check_matrix("grad", grad, ARITHMETIC) if grad.numel() else tuple(grad.shape)
    check("grad", grad, grad, ARITHMETIC, shape)
    check("upstream", upstream, grad, (grad.dtype,), ())
    size = grad.numel()
    if size:
        with launches.on(grad):
            launches.launch(scale_kernel, (-(-size // 1024),), grad=grad, upstream=upstream, size=size, BLOCK=1024)
