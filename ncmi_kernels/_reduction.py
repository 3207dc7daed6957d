"""From the terms of the rows to the loss, with the derivatives by the terms."""

import torch
from torch import Tensor

from ncmi_kernels._group import Group
from ncmi_kernels._options import Options


def reduced(
    concentration: Tensor, separation: Tensor, weight: Tensor, kept: Tensor, options: Options, group: Group | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss from the terms and weights [B] of the rows; those that are not `kept` are zero in all three.

    With a `group`, that of the rows of all processes, from those of each. Reduction "none" communicates nothing: the
    losses and means are those of this process.

    Returns:
        the loss [], or [B] for reduction "none"; its derivatives [2, B] by these terms, and the weighted means of both
        terms [2]; all float64.
    """
    a, g, w = concentration.double(), separation.double(), weight.double()
    sums = [w @ a, w @ g, w.sum()]
    if not options.batch_ratio:
        each = a / (g + options.eps)
        sums.append(w @ each)
    total = torch.stack(sums)
    if group is not None and options.reduction != "none":
        group.all_reduce(total)
    means = total[:2] / total[2]
    if options.batch_ratio:
        slope = 1 / (means[1] + options.eps)
        loss = means[0] * slope
        share = w / total[2]
        by_terms = torch.stack([share * slope, share * (-loss * slope)])
        return loss, torch.where(kept, by_terms, 0), means  # without a row that counts the share is 0 / 0
    if options.reduction == "mean":
        w = w / total[2]
        loss = total[3] / total[2]
    else:
        loss = total[3] if options.reduction == "sum" else w * each
    slope = w / (g + options.eps)
    return loss, torch.where(kept, torch.stack([slope, -each * slope]), 0), means


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """What each row counts for, [B] float64: the weight of its class, 0 where ignored; and whether it is not, [B]."""
    kept = target != ignore_index
    if weight is None:
        return kept.double(), kept
    return torch.where(kept, weight.double()[target.masked_fill(~kept, 0)], 0), kept


def refuse_double_backward(name: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"create_graph: got True for a loss with {name}, expected False: double backward is not supported over "
            "several processes"
        )
