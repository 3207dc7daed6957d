"""Every operator, declared once for all backends: its schema, the shapes of its outputs, the columns of its records.

B rows, M columns, C classes. "Arithmetic type": float64 where centroid_logits are, else float32.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from ncmi_kernels._options import REDUCTIONS

# Columns of the operators' `rows`, `coefficients`, `norms` and `class_weights`: csrc/layout.h
ROW_STATS, COEFFICIENTS, CLASS_STATS, CLASS_WEIGHTS = 8, 4, 9, 2
SCALE, SHIFT, INVERSE_NORM, OWN_MEAN, ALL_MEAN, OWN_PRIOR = 0, 3, 4, 5, 6, 7  # of rows
CLASS_LOG_NORM, PRIOR = 0, 8  # of a class's record in norms
MEAN_LOG_NORM = 1  # of the last one


class Table(NamedTuple):
    """What rows are compared with: the outputs of the operator centroid_stats."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [C + 1, 9] float64: a record a class, then one of all


class SGD(NamedTuple):
    """The numbers of a step of torch.optim.SGD, in the order that the operator centroid_step_ takes them."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


_BATCH = "Tensor input, Tensor target, Tensor? center"
_TABLE = "Tensor log_activation, Tensor activation, Tensor reference, Tensor norms"
_FEATURES = "float temperature, bool l2_normalize, bool softmax, bool centroid_to_sample"

SCHEMAS = {
    # What the rows need to know of the centroids, from their logits [C, M] in the arithmetic type:
    # log_activation [C, M]; activation [C, M], or [0, M] for sample_to_centroid; reference [2, M];
    # norms [C + 1, 9] float64. `prior` [C] float64 is what a class counts for in the separation, 1 together (None: all
    # alike). The operators below also take a table (log_activation, activation, norms) of only some of the classes, of
    # which the targets are then row numbers: reference and the last record of norms speak for all C.
    "centroid_stats": (
        f"(Tensor centroid_logits, bool softmax, bool centroid_to_sample, Tensor? prior=None) -> ({_TABLE})"
    ),
    #
    # By row, float64: terms [2, B] = (concentration, separation); rows [B, 8], what the operators below need to form p
    # again, and means under p that the coefficients are made of.
    "terms": f"({_BATCH}, {_TABLE}, {_FEATURES}, int ignore_index) -> (Tensor terms, Tensor rows)",
    #
    # The terms of a batch to its loss, all float64: the loss, a scalar or for reduction 0 (none; 1 mean, 2 sum) [B];
    # coefficients [B, 4] = (own, other, share, constant), what a row's gradient is made of, zeros in ignored rows;
    # means [2], those of both terms over the rows, weighted as the loss is (NaN where no row counts); sums [4] over the
    # rows, of w, w A, w G and for the ratio by sample w A / (G + eps). `totals`, if given, take the place of the sums.
    # With alpha and beta the derivatives of the loss by A and G of a row, a = own_prior of `rows` and b = 1, but with
    # `focus`, whose separation has no part of the own class, a = 0 and b = 1 - own_prior:
    #   sample_to_centroid: own = alpha - a beta, other = b beta, share = 0, constant = own own_mean + other all_mean
    #   centroid_to_sample: own = alpha, other = b beta, share = a beta, constant = own own_mean
    "reduce": (
        "(Tensor terms, Tensor rows, Tensor target, Tensor? weight, Tensor? totals,"
        " bool centroid_to_sample, bool focus, bool batch_ratio, int reduction, float eps, float sharpness,"
        " int ignore_index)"
        " -> (Tensor loss, Tensor coefficients, Tensor means, Tensor sums)"
    ),
    #
    # Both in one call, the loss in the arithmetic type. Given a running centre in the place of center, the rows are
    # centred by moved_center, what update_center_ would make of it ([0] without one), and it is moved once nothing can
    # fail any more. `with_grad`, for the ratio by sample and a scalar loss: d loss / d input [B, M] from the same pass,
    # for an input in the arithmetic type; else grad is [0].
    "loss": (
        f"({_BATCH}, Tensor(a!)? running_center, Tensor(b!)? num_batches_tracked, float momentum, {_TABLE},"
        f" Tensor? weight, {_FEATURES}, bool batch_ratio, int reduction, float eps, float sharpness, int ignore_index,"
        " bool with_grad)"
        " -> (Tensor loss, Tensor rows, Tensor coefficients, Tensor moved_center, Tensor grad, Tensor means)"
    ),
    #
    # grad [B, M] times upstream [], in place; nothing is touched where that is 1. 0, as in ignored rows, stays 0.
    "scale_": "(Tensor(a!) grad, Tensor upstream) -> ()",
    #
    # Backward by row: d loss / d input [B, M] in the dtype of input. `upstream` (a scalar or [B]) multiplies the
    # coefficients. `row_reference` [B, M], in the arithmetic type, is in the place of reference[0], of
    # centroid_to_sample in that of reference[1]: a row each; and so is `row_own` [B, M] in that of log a_y. Before the
    # chain rule of the length, d loss / d f is
    #   sample_to_centroid: (1 - sigma) p [own (log a - log a_y) + other (log a - reference) - constant]
    #   centroid_to_sample: (1 - sigma) {p [own (log a - log a_y) - constant] + other (p - reference) + share (q_y - p)}
    "input_grad": (
        f"({_BATCH}, {_TABLE}, Tensor rows, Tensor coefficients, Tensor? upstream, bool centroid_to_sample,"
        " int ignore_index, Tensor? row_reference=None, Tensor? row_own=None) -> Tensor"
    ),
    #
    # The centroid sums: d loss / d centroid_logits [C, M]. `totals`, as class_totals gives them, stand in for the sums
    # over all rows: those over the rows of a class are of the rows that are passed, which may be none. `class_weights`
    # [C, 2] and `weighted` [C, M], of focus_sums_ and the product after it, do where every row and class have a weight:
    # then `other` of the coefficients is no part of the gradient, and `upstream` is a scalar.
    "centroid_grad": (
        f"({_BATCH}, Tensor centroid_logits, {_TABLE}, Tensor rows, Tensor coefficients, Tensor? upstream,"
        " bool centroid_to_sample, int ignore_index, Tensor? totals=None, Tensor? class_weights=None,"
        " Tensor? weighted=None) -> Tensor"
    ),
    #
    # What every class's gradient has of all rows, [M + 1] float64: sum_i other_i p_i, for centroid_to_sample
    # sum_i other_i log a_i, and last sum_i other_i.
    "class_totals": (
        f"({_BATCH}, Tensor rows, Tensor coefficients, Tensor? upstream, bool centroid_to_sample, int ignore_index)"
        " -> Tensor"
    ),
    #
    # A step of torch.optim.SGD on centroid_logits, by the gradient that centroid_grad would give and that is formed a
    # row at a time; momentum_buffer goes with a momentum. The statistics, those that centroid_stats gave of the
    # centroids, become those of the new ones, in place. A batch without rows that count, or with terms that are not
    # finite, moves nothing.
    "centroid_step_": (
        f"({_BATCH}, Tensor(a!) centroid_logits, Tensor(b!)? momentum_buffer, Tensor(c!) log_activation,"
        " Tensor(d!) activation, Tensor(e!) reference, Tensor(f!) norms, Tensor rows, Tensor coefficients,"
        " bool softmax, bool centroid_to_sample, int ignore_index,"
        " float lr, float momentum, float weight_decay, bool nesterov,"
        " Tensor? class_weights=None, Tensor? weighted=None) -> ()"
    ),
    #
    # With separation_focus, or several centroids a class, every row and centroid have a divergence D, and a weight:
    # softmax_v(log prior_v - focus D_iv / min_u D_iu) over those of the other classes. They come of matrix products,
    # one tile of rows after another. Centroid r is one of class r modulo C. Between these products, with R centroids:
    #
    # The centroids in products: relative [R, M], log q less what all share; distribution [R, M], q less its mean
    # reference[1], or [0, M] for sample_to_centroid; class_level [2, R] float64, first the sum of relative over the
    # columns, for centroid_to_sample that of q relative, before rounding, and then prior.
    "focus_table": f"({_TABLE}, bool centroid_to_sample) -> (Tensor relative, Tensor distribution, Tensor class_level)",
    #
    # The rows in products, [B, M]: x of p = share (base + x), by numbers share and base that a backend forms of `rows`.
    # x is small: 2 sigma - 1, where sigma is not. For centroid_to_sample log p less what the classes share. 0 in
    # ignored rows.
    "focus_rows": f"({_BATCH}, {_TABLE}, Tensor rows, bool centroid_to_sample, int ignore_index) -> Tensor",
    #
    # In place: `product` [B, R], of focus_rows and relative (or distribution), to the weights, 0 for the own class and
    # in ignored rows (and everywhere, where no other class has a prior above 0); `separation` [B] float64; of `rows`
    # all_mean, to that against the centroids by their weights, and own_prior, to the sum over those of the own class.
    #
    # With `shared` [3, B] float64 the centroids here are a part of all. In come the least divergences of all, the first
    # row; out go this part's sums, the other two: of e = prior exp(-focus (D - least) / least), and of e (D - least), 0
    # in ignored rows. `product` becomes e, whose sum over all parts makes it weights; `separation` and `rows` stay.
    "focus_weights_": (
        "(Tensor(a!) product, Tensor(b!) separation, Tensor(c!) rows, Tensor target, Tensor norms, Tensor class_level,"
        " float focus, bool centroid_to_sample, int ignore_index, int centroids_per_class=1,"
        " Tensor(d!)? shared=None) -> ()"
    ),
    #
    # The least divergence of each row of `product`, as above, from the centroids of other classes with a prior above 0:
    # [B] float64. 0 in ignored rows; NaN never is the least. The largest number of the arithmetic type where there is
    # none.
    "focus_nearest": (
        "(Tensor product, Tensor rows, Tensor target, Tensor norms, Tensor class_level, bool centroid_to_sample,"
        " int ignore_index, int centroids_per_class=1) -> Tensor"
    ),
    #
    # In place: `weights` [B, R] times `other` of a row's coefficients, for sample_to_centroid times share too, as their
    # product with focus_rows gives sums over rows of other w p. Added to `class_weights` [R, 2] float64: the sums over
    # the rows of other w, and for sample_to_centroid of other w share base.
    "focus_sums_": (
        "(Tensor(a!) weights, Tensor(b!) class_weights, Tensor rows, Tensor coefficients, Tensor target,"
        " bool centroid_to_sample, int ignore_index) -> ()"
    ),
    #
    # The running centre: set to the mean of the rows at the first batch, then momentum * center +
    # (1 - momentum) * mean. Returns a copy of the new centre, for the graph to keep.
    "update_center_": (
        "(Tensor(a!) center, Tensor(b!) num_batches_tracked, Tensor input, Tensor target, float momentum,"
        " int num_classes, int ignore_index) -> Tensor"
    ),
}


def _rows_of(a: SimpleNamespace) -> Tensor:
    stats: Tensor = a.norms.new_empty((a.input.shape[0], ROW_STATS))
    return stats


def _coefficients(a: SimpleNamespace) -> Tensor:
    coefficients: Tensor = a.target.new_empty((a.target.shape[0], COEFFICIENTS), dtype=torch.float64)
    return coefficients


def _fake_reduce(a: SimpleNamespace) -> tuple[Tensor, ...]:
    loss = a.terms.new_empty(a.target.shape if REDUCTIONS[a.reduction] == "none" else ())
    return loss, _coefficients(a), a.terms.new_empty((2,)), a.terms.new_empty((4,))


def _fake_loss(a: SimpleNamespace) -> tuple[Tensor, ...]:
    log_activation, norms = a.log_activation, a.norms
    return (
        log_activation.new_empty(a.input.shape[:1] if REDUCTIONS[a.reduction] == "none" else ()),
        _rows_of(a),
        _coefficients(a),
        log_activation.new_empty((0 if a.running_center is None else a.input.shape[1],)),
        log_activation.new_empty(a.input.shape if a.with_grad else (0,)),
        norms.new_empty((2,)),
    )


def _fake_centroid_stats(a: SimpleNamespace) -> tuple[Tensor, ...]:
    logits = a.centroid_logits
    classes, columns = logits.shape
    return (
        logits.new_empty((classes, columns)),
        logits.new_empty((classes if a.centroid_to_sample else 0, columns)),
        logits.new_empty((2, columns)),
        logits.new_empty((classes + 1, CLASS_STATS), dtype=torch.float64),
    )


# Of the arguments, by their names: outputs for torch.compile and torch.export. What only writes in place has none.
_FAKES: dict[str, Callable[[SimpleNamespace], Any]] = {
    "centroid_stats": _fake_centroid_stats,
    "terms": lambda a: (a.norms.new_empty((2, a.input.shape[0])), _rows_of(a)),
    "reduce": _fake_reduce,
    "loss": _fake_loss,
    "input_grad": lambda a: a.input.new_empty(a.input.shape),
    "centroid_grad": lambda a: a.centroid_logits.new_empty(a.centroid_logits.shape),
    "class_totals": lambda a: a.rows.new_empty((a.input.shape[1] + 1,)),
    "focus_table": lambda a: (
        a.log_activation.new_empty(a.log_activation.shape),
        a.activation.new_empty(a.activation.shape),
        a.norms.new_empty((2, a.log_activation.shape[0])),
    ),
    "focus_rows": lambda a: a.reference.new_empty(a.input.shape),
    "focus_nearest": lambda a: a.rows.new_empty(a.product.shape[:1]),
    "update_center_": lambda a: a.center.new_empty(a.center.shape),
}


class Operators(SimpleNamespace):
    """One backend's implementation of every operator, by the operator's name."""


_libraries: list[Library] = []  # a registration lasts as long as its library


def define(namespace: str) -> None:
    """Declare the operators in a namespace of torch.ops.

    Calls pass the dispatcher's autograd layer, whose fallback costs as much as the smaller kernels do. No graph is
    lost: those are made by autograd Functions, and outside of these the operators are called where nothing needs one.
    """
    library = Library(namespace, "DEF")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"{namespace}::{name}", _fake_of(namespace, name), lib=library)
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def defined(namespace: str) -> Operators:
    """The operators of a namespace."""
    return Operators(**{name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS})


def _fake_of(namespace: str, operator: str) -> Callable[..., Any]:
    declared = getattr(getattr(torch.ops, namespace), operator).default._schema.arguments
    names, fake = [argument.name for argument in declared], _FAKES.get(operator)

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        # A fake kernel also runs where a single argument is on `meta`.
        devices = {name: value.device for name, value in arguments.items() if isinstance(value, Tensor)}
        if len(set(devices.values())) > 1:
            raise RuntimeError(f"ncmi_kernels: got tensors on several devices, expected one: {devices}")
        return None if fake is None else fake(SimpleNamespace(**arguments))

    return run
