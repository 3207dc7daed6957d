"""What a call is about, once its arguments are checked: shapes brought to [N, M], dtypes to that of the arithmetic."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels._group import Group
from ncmi_kernels._modes import concrete
from ncmi_kernels._options import Options

CenterUpdate = tuple[Tensor, float]  # num_batches_tracked [] int64, which is moved too, and the momentum


class Problem(NamedTuple):
    """All that the loss of features [N, M] and centroid logits [C K, M] depends on besides these two."""

    target: Tensor  # [N], int64
    center: Tensor | None  # [M], in the dtype of the arithmetic as `weight` is
    weight: Tensor | None  # [C]
    options: Options
    backend: str
    table: Any = None  # what the backend knows of the centroids, if it does already
    group: Group | None = None  # whose batches share the loss
    center_update: CenterUpdate | None = None  # moves `center`, a running one, before it is used
    shards: Any = None  # how the classes are shared out over the group (of _shards); None where all are here
    class_prior: Tensor | None = None  # [C] float64, of sum 1: prior_of


def problem_of(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    table: Any = None,
    group: Group | None = None,
    center_update: CenterUpdate | None = None,
    class_prior: Tensor | None = None,
) -> tuple[Tensor, Tensor, Problem]:
    """Checked arguments as the loss takes them: features [N, M], centroid logits [C K, M], and the rest."""
    rows, classes = flatten(input, target)
    rows, centroid_logits, center, weight = to_arithmetic_dtype(rows, centroid_logits, center, weight)
    problem = Problem(classes, center, weight, options, backend, table, group, center_update, None, class_prior)
    return rows, centroid_logits, problem


def flatten(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Bring [M], [B, M] or [B, M, d1, ...] and its target to [N, M] and [N], int64."""
    if target.dtype is not torch.int64:
        target = target.long()
    return (input, target) if input.dim() == 2 else (flatten_features(input), target.flatten())


def flatten_features(features: Tensor) -> Tensor:
    """Bring [M], [B, M] or [B, M, d1, ...] to [N, M]."""
    if features.dim() == 2:
        return features
    return features.unsqueeze(0) if features.dim() == 1 else features.movedim(1, -1).flatten(0, -2)


def to_arithmetic_dtype(
    input: Tensor, centroid_logits: Tensor, center: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Everything but a half-precision input in the dtype of the arithmetic: float32, or float64 where one is."""
    if input.dtype is torch.float64 or centroid_logits.dtype is torch.float64:
        input, dtype = input.double(), torch.float64
    else:
        dtype = torch.float32
    if centroid_logits.dtype is not dtype:
        centroid_logits = centroid_logits.to(dtype)
    center = None if center is None else _as_constant(center, dtype)
    return input, centroid_logits, center, None if weight is None else _as_constant(weight, dtype)


def _as_constant(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector as the kernels take it, which a graph can save: autograd refuses what was made in inference mode."""
    if vector.dtype is not dtype or vector.requires_grad or not vector.is_contiguous():
        vector = vector.detach().to(dtype).contiguous()
    if not torch.compiler.is_compiling() and vector.is_inference():
        vector = vector.clone()
    return vector


def check_parameters(
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    centroids_per_class: int,
) -> None:
    """Raise the errors that :func:`ncmi_loss` documents for these."""
    check_floating("centroid_logits", centroid_logits)
    shape, own = tuple(centroid_logits.shape), centroids_per_class
    if len(shape) != 2 or shape[0] < 2 * own or shape[0] % own or shape[1] < 2:
        rows = "[C, M]" if own == 1 else f"[{own} C, M], centroids_per_class rows for each class,"
        raise ValueError(f"centroid_logits: got shape {shape}, expected {rows} with C >= 2 classes and M >= 2")
    classes, columns = shape[0] // own, shape[1]
    if center is not None:
        check_floating("center", center)
        check_vector("center", center, columns, centroid_logits)
    if weight is not None:
        check_floating("weight", weight)
        check_vector("weight", weight, classes, centroid_logits)
        check_constant("weight", weight)


def prior_of(class_prior: Tensor, classes: int, like: Tensor) -> Tensor:
    """Class priors as the loss takes them: float64, and of sum 1 after whatever rounding.

    Raises the errors that :func:`ncmi_loss` documents.
    """
    check_floating("class_prior", class_prior)
    check_vector("class_prior", class_prior, classes, like)
    check_constant("class_prior", class_prior)
    prior = _as_constant(class_prior, torch.float64)
    total = prior.sum()
    wrong = (prior < 0).any() | ~((total - 1).abs() <= max(1e-4, 4 * torch.finfo(class_prior.dtype).eps))
    every, expected = _unwrapped(wrong), "expected numbers >= 0 whose sum is 1, such as counts / counts.sum()"
    if every.device.type != "cpu" or not concrete(every):
        torch._assert_async(~every.any(), f"class_prior: got a negative number, or another sum; {expected}")
    elif every.any():
        least, sums = _unwrapped(prior).min(), _unwrapped(total)[every]
        raise ValueError(f"class_prior: got a minimum of {least:.4g} and a sum of {sums[0]:.6g}, {expected}")
    return prior / total


def check_vector(name: str, vector: Tensor, size: int, like: Tensor) -> None:
    """Raise ValueError or RuntimeError unless `vector` is [size], on the device of `like`."""
    if vector.shape != (size,):
        raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected ({size},)")
    check_device(name, vector, like)


def check_constant(name: str, value: Tensor) -> None:
    """Raise RuntimeError for a tensor whose gradient would be missing without a word."""
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: got a tensor that requires a gradient, expected {name}.detach(): the loss is not differentiable "
            "with respect to it"
        )


def check_batch(input: Tensor, target: Tensor, centroid_logits: Tensor) -> None:
    """Raise the errors that :func:`ncmi_loss` documents for these, but for the range of the targets."""
    check_floating("input", input)
    check_target(target)
    columns = centroid_logits.shape[1]
    shape = input.shape
    dims = len(shape)
    if dims == 0 or shape[min(dims - 1, 1)] != columns:
        raise ValueError(
            f"input: got shape {tuple(shape)}, expected [B, M], [M] or [B, M, d1, ...] with M = {columns}, "
            f"the second dimension of centroid_logits {tuple(centroid_logits.shape)}"
        )
    expected = shape[:1] if dims == 2 else shape[:1] + shape[2:] if dims > 1 else ()
    if target.shape != expected:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected {tuple(expected)} for input {tuple(shape)}"
        )
    device = input.device
    if target.device != device or centroid_logits.device != device:
        check_device("target", target, input)
        check_device("centroid_logits", centroid_logits, input)


def check_target(target: Tensor) -> None:
    """Raise TypeError or RuntimeError unless `target` is a dense tensor of class indices."""
    _check_tensor("target", target)
    if target.dtype is not torch.int64 and target.dtype is not torch.uint8:
        hint = "; class probabilities are not supported here" if target.dtype.is_floating_point else ""
        raise RuntimeError(
            f"target: got dtype {target.dtype}, expected torch.int64 (or torch.uint8) class indices{hint}"
        )


def is_mixed(input: Tensor, target: Tensor) -> bool:
    """Whether a target is class probabilities: floating, and with a dimension of classes."""
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return False
    return isinstance(input, Tensor) and target.dim() == input.dim()


def mixed(input: Tensor, target: Tensor, classes: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of two classes each, from class probabilities [N, C]: features [N, M], classes [2 N], shares [2 N].

    First all of the larger share, then the others, whose share may be 0.

    Raises:
        TypeError, ValueError, RuntimeError: a shape or dtype does not fit; or a row has more than two classes, a
            negative number, or another sum than 1 (on other devices than the CPU: a device-side assertion).
    """
    check_floating("input", input)
    check_floating("target", target)
    check_device("target", target, input)
    check_constant("target", target)
    shape = input.shape
    if not shape or shape[min(len(shape) - 1, 1)] != columns:
        raise ValueError(f"input: got shape {tuple(shape)}, expected [B, M], [M] or [B, M, d1, ...] with M = {columns}")
    expected = (*shape[:1], classes, *shape[2:]) if len(shape) > 1 else (classes,)
    if target.shape != expected:
        raise ValueError(
            f"target: got class probabilities {tuple(target.shape)}, expected {expected} for input {tuple(shape)}"
        )
    probabilities = flatten_features(target.detach())
    shares, indices = probabilities.topk(2, dim=1)
    tolerance = max(1e-4, 4 * torch.finfo(target.dtype).eps)
    rest = probabilities.double().abs().sum(dim=1) - shares.double().sum(dim=1)
    # A share of 0 is of any class: of the other, so that means of terms are not of a third.
    indices = torch.where(shares == 0, indices[:, :1], indices)
    wrong = _unwrapped(~((rest <= tolerance) & ((shares.double().sum(dim=1) - 1).abs() <= tolerance)))
    wanted = "expected at most two classes in a row, of sum 1, as mixup and cutmix make without label smoothing"
    if wrong.device.type != "cpu" or not concrete(wrong):
        torch._assert_async(~wrong.any(), f"target: got other class probabilities; {wanted}")
    elif wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        first, second = (round(share, 4) for share in _unwrapped(shares).reshape(-1, 2)[row].tolist())
        raise ValueError(f"target: the largest class probabilities of row {row} are {first} and {second}, {wanted}")
    return flatten_features(input), indices.t().flatten(), shares.t().flatten()


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise RuntimeError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise RuntimeError(f"{name}: got device {tensor.device}, expected {like.device}, that of the other tensors")


def _unwrapped(tensor: Tensor) -> Tensor:
    """What transforms of torch.func wrap: of a mapped tensor all slices, whichever dimension they are."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_range(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise IndexError for a target that is neither a class nor ignored; the operator of the loss does it itself."""
    target = _unwrapped(target).flatten().long()
    bad = (target < 0) | (target >= classes)
    ignored = ""
    if ignore_index is not None:
        bad &= target != ignore_index
        ignored = f" or ignore_index ({ignore_index})"
    if target.device.type != "cpu" or not concrete(target):
        torch._assert_async(~bad.any(), f"target: a value is not a class in [0, {classes}){ignored}")
    elif bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target: value {int(target[row])} at row {row} is out of range, "
            f"expected a class in [0, {classes}){ignored}"
        )


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise RuntimeError(f"{name}: got {kind}, expected a dense (torch.strided) tensor")
    if type(value) is not Tensor:
        refuse_dtensor(name, value, f"{name}.to_local() and NCMILoss(process_group=...), for rows on several processes")


def refuse_dtensor(name: str, value: Tensor, remedy: str) -> None:
    """Raise RuntimeError for a DTensor, of which the kernels would see nothing but this process's part."""
    if hasattr(type(value), "to_local"):
        raise RuntimeError(f"{name}: got a DTensor, expected a plain tensor: {remedy}")


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, value: Tensor) -> None:
    """Raise TypeError or RuntimeError unless `value` is a dense floating tensor."""
    _check_tensor(name, value)
    if value.dtype not in _FLOATING:
        raise RuntimeError(
            f"{name}: got dtype {value.dtype}, expected torch.float32, torch.float64, torch.bfloat16 or torch.float16"
        )
