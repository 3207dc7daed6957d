"""What autograd Functions save, and the backward passes that are no plain ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def grads_by_autograd(
    function: Callable[[], Any], inputs: Sequence[Tensor], wanted: Sequence[bool], upstream: Any
) -> tuple[Tensor | None, ...]:
    """For a backward pass that is no plain one: the gradients of `function`, each where it is wanted, else None."""
    create_graph = torch.is_grad_enabled()
    leaves = [each for each, needed in zip(inputs, wanted, strict=False) if needed]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(), leaves, upstream, create_graph=create_graph))
    return tuple(next(found) if needed else None for needed in wanted)


def apply(function: type[torch.autograd.Function], input: Tensor, centroid_logits: Tensor, *others: Any) -> Any:
    """`function.apply` where no transform of torch.func is active: what it does for those costs as much again."""
    if torch.compiler.is_compiling():
        return function.apply(input, centroid_logits, *others)
    alive = torch._C._functorch.unwrap_if_dead  # a tensor that outlived its transform
    # mypy: the base class of torch.autograd.Function has no stubs.
    return super(torch.autograd.Function, function).apply(alive(input), alive(centroid_logits), *others)  # type: ignore[misc]


def save(ctx: Any, *tensors: Any) -> None:
    """Save what a backward pass needs, for :func:`saved`: autograd lets go of it after that pass, and hooks see it.

    The first two are the centre, or None, and the centroid logits.
    """
    ctx.save_for_backward(*tensors)
    if torch.compiler.is_compiling():
        return
    logits = tensors[1]
    if type(logits) in (Tensor, Parameter) and not logits.is_inference():
        ctx.before = tensors[0], logits._version, logits.data_ptr()
    else:  # no version, or as of a fake tensor no address
        ctx.before = tensors[0], None, None


def saved(ctx: Any) -> tuple[Sequence[Any], bool]:
    """What :func:`save` was given, and whether it is of a forward pass that was repeated at another centre.

    torch.utils.checkpoint without re-entrance repeats a forward pass when its tensors are asked for. By then others may
    have moved the running centre: that of before is the one to use, and what was found of the rows is to be found
    again.

    Raises:
        RuntimeError: the centroids of the repeated pass were modified. (Of others autograd's own error tells.)
    """
    tensors = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return tensors, False
    center, version, address = ctx.before
    if version is not None:
        logits = tensors[1]
        if logits._version != version and logits.data_ptr() == address:  # else a copy of theirs
            raise RuntimeError(
                "centroid_logits: modified by an inplace operation since the forward pass, expected the backward pass "
                "first"
            )
    if tensors[0] is center or center is None or torch.equal(tensors[0], center):
        return tensors, False
    return (center, *tensors[1:]), True


def restored(way: Any, kept: Sequence[Any]) -> tuple[Any, Any]:
    """The `Rows` and the `Table` of a way, from their fields one after the other."""
    count = len(way.Rows._fields)
    return way.Rows(*kept[:count]), way.Table(*kept[count:])
