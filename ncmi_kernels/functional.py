"""The functional API: arguments checked, shapes brought to [B, M], backend chosen."""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _backends, _focus, _ops, reference
from ncmi_kernels._modes import concrete
from ncmi_kernels._options import Options

_NOTHING_IGNORED = torch.iinfo(torch.int64).min


class DegenerateMinimumWarning(UserWarning):
    """The settings have a minimum that the loss reaches without separating the classes."""


def ncmi_loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    *,
    center: Tensor | None = None,
    temperature: float = 1.0,
    l2_normalize: bool = False,
    activation: str = "nsf",
    separation: str = "sample_to_centroid",
    ratio: str = "batch",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    eps: float = 1e-8,
    separation_focus: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Normalized conditional mutual information of a batch, the ratio CMI / Gamma (arXiv 2601.02543).

    With x = input - center, made of length one where `l2_normalize`, the distribution of a sample and of a
    class are p = nsf(x / temperature) and q = nsf(centroid_logits), where nsf(f)_k = sigmoid(f_k) / sum_j
    sigmoid(f_j). Each sample has a concentration and a separation,

    .. math::
        A_i = \mathrm{KL}(p_i \| q_{y_i}), \qquad G_i = \frac{1}{C} \sum_{v \ne y_i} \mathrm{KL}(p_i \| q_v)

    and the loss is the ratio of their means, or the mean of their ratios. Costs O((B + C) M); nothing of size
    B C is formed (but with `separation_focus`). Sums and normalisers are float64, everything else float32 (float64 for
    float64 arguments).

    Differentiable any number of times, in reverse and forward mode, and by all transforms of torch.func. Values and
    reverse-mode first derivatives come from the backend. Further derivatives, everything within forward mode (jvp,
    jacfwd, hessian, `torch.autograd.forward_ad`) and several upstream gradients at once (`is_grads_batched`,
    `vectorize=True`) come from PyTorch. vmap makes one batch of what it maps, unless it maps `centroid_logits` or
    `center` or the centroids' gradient is wanted: then it runs the backend once for each slice.

    Args:
        input: features or logits, [B, M], [M] or [B, M, d1, ...]; float32, float64, bfloat16 or float16.
        target: class indices, int64 or uint8, [B], [] or [B, d1, ...], each in [0, C) or `ignore_index`.
        centroid_logits: [C, M], C >= 2, M >= 2; a floating dtype. Differentiable, as `input` is.
        center: [M], subtracted from the features; never differentiated.
        temperature: divides the features; > 0.
        l2_normalize: divide each centred feature vector by max(its length, 1e-12) first.
        activation: "nsf", or "softmax" for the ablation.
        separation: "sample_to_centroid", KL(p_i || q_v), or "centroid_to_sample", KL(q_v || p_i). The latter
            without `l2_normalize` has a degenerate minimum: one coordinate runs to minus infinity.
        ratio: "batch", mean(A) / (mean(G) + eps), or "sample", mean(A / (G + eps)).
        weight: [C], class weights; the means become weighted means, as in cross_entropy. Not differentiable.
        ignore_index: samples with this target count for nothing and get a zero gradient.
        reduction: "mean" (weighted; NaN where no sample counts), and for ratio "sample" also "sum" and "none".
        eps: added to the separation; > 0.
        separation_focus: >= 0. Above 0 the other classes no longer count alike in the separation but the more, the
            nearer they are to the sample. With D_iv the divergence of the separation and minimum and softmax over
            v != y_i:

            .. math::
                G_i = \frac{C - 1}{C} \sum_{v \ne y_i} w_{iv} D_{iv}, \qquad
                w_i = \text{softmax}_v(-\text{focus} \, D_{iv} / \min_u D_{iu})

            where w is not differentiated. 0 is the paper's G, 10 trains networks for many classes better. The sum no
            longer factorises: this costs O(B C M) operations, two matrix products as large as those of a linear head,
            and O(B C) memory. Of these products sums are in the type of the arithmetic, and the same bits every time
            are as far as torch.mm gives them.
        backend: None for the fastest that can run, or one by name: "cpu" (C++), "cuda" (CUDA C++), "triton" or
            "reference" (PyTorch).

    Returns:
        A scalar, or for reduction "none" a tensor of target's shape; float32, or float64 where `input` or
        `centroid_logits` is: never rounded to the low precision of the input.

    Raises:
        TypeError: an argument is not of the expected Python type.
        ValueError: a shape does not fit, or an option is unknown or out of its range.
        IndexError: a target is neither a class nor `ignore_index` (on other devices than the CPU: a device-side
            assertion).
        RuntimeError: a dtype, device or layout is not supported, or the backend asked for cannot run.

    Example:
        >>> import torch, ncmi_kernels
        >>> centroid_logits = 10 * torch.eye(3)
        >>> loss = ncmi_kernels.ncmi_loss(torch.eye(3), torch.arange(3), centroid_logits)
        >>> round(loss.item(), 4)
        0.1737
    """
    options = Options(
        temperature, l2_normalize, activation, separation, ratio, ignore_index, reduction, eps, separation_focus
    )
    warn_if_degenerate(options)
    check_parameters(centroid_logits, center, weight)
    check_batch(input, target, centroid_logits)
    return loss(input, target, centroid_logits, center, weight, options, _backends.resolve(backend, input))


def ncmi_terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    *,
    center: Tensor | None = None,
    temperature: float = 1.0,
    l2_normalize: bool = False,
    activation: str = "nsf",
    separation: str = "sample_to_centroid",
    separation_focus: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of :func:`ncmi_loss` by sample, to be combined otherwise; both are differentiable.

    Args:
        input: as in :func:`ncmi_loss`, and so are all others.
        target: every one a class: there is no ignore_index here.
        centroid_logits: [C, M].
        center: [M] or None.
        temperature: > 0.
        l2_normalize: divide the centred features by their length.
        activation: "nsf" or "softmax".
        separation: "sample_to_centroid" or "centroid_to_sample".
        separation_focus: >= 0.
        backend: None, "cpu", "cuda", "triton" or "reference".

    Returns:
        concentration A and separation G, each of target's shape; float32 or float64.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ncmi_loss`.

    Example:
        >>> import torch, ncmi_kernels
        >>> input, target, centroid_logits = torch.eye(3), torch.arange(3), 10 * torch.eye(3)
        >>> concentration, separation = ncmi_kernels.ncmi_terms(input, target, centroid_logits)
        >>> round((concentration / separation).mean().item(), 4)  # as ratio="sample" has it
        0.1737
    """
    options = Options(
        temperature,
        l2_normalize,
        activation,
        separation,
        ignore_index=_NOTHING_IGNORED,
        separation_focus=separation_focus,
    )
    check_parameters(centroid_logits, center, None)
    check_batch(input, target, centroid_logits)
    rows, classes = flatten(input, target)
    rows, centroid_logits, center, _ = to_arithmetic_dtype(rows, centroid_logits, center, None)
    check_range(classes, len(centroid_logits), None)
    backend = _backends.resolve(backend, input)
    if backend == "reference":
        concentration, separated = reference.terms(rows, classes, centroid_logits, center, options)
    else:
        path = _focus if options.separation_focus else _ops
        concentration, separated = path.terms(rows, classes, centroid_logits, center, options, backend)
    return concentration.reshape(target.shape), separated.reshape(target.shape)


def log_nsf(input: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of the normalised sigmoid function along `dim`: log(sigmoid(x_k) / sum_j sigmoid(x_j)).

    Right where the sum underflows (every x very negative), and its gradient too.

    Args:
        input: any shape, floating dtype; half precision is computed in float32.
        dim: the dimension that is normalised.

    Returns:
        Shape and dtype of `input`.

    Raises:
        TypeError: `input` is no tensor.
        RuntimeError: the dtype or layout of `input` is not supported.
        IndexError: `input` has no dimension `dim`.

    Example:
        >>> import torch, ncmi_kernels
        >>> x = torch.full((2,), -200.0)  # the sum of the sigmoids underflows
        >>> ncmi_kernels.log_nsf(x).exp()
        tensor([0.5000, 0.5000])
    """
    check_floating("input", input)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    log_sigmoid = F.logsigmoid(x)
    return (log_sigmoid - log_sigmoid.logsumexp(dim=dim, keepdim=True)).to(input.dtype)


def nsf(input: Tensor, dim: int = -1) -> Tensor:
    """Normalised sigmoid function along `dim`: sigmoid(x_k) / sum_j sigmoid(x_j) (arXiv 2601.02543).

    Args:
        input: any shape, floating dtype; half precision is computed in float32.
        dim: the dimension that is normalised.

    Returns:
        Shape and dtype of `input`; non-negative, with sum 1 along `dim`.

    Raises:
        TypeError, RuntimeError, IndexError: as :func:`log_nsf`.

    Example:
        >>> import torch, ncmi_kernels
        >>> x = torch.tensor([100.0, 0.0, 100.0])  # sigmoids 1, 1/2 and 1
        >>> ncmi_kernels.nsf(x)
        tensor([0.4000, 0.2000, 0.4000])
    """
    check_floating("input", input)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    return log_nsf(x, dim).exp().to(input.dtype)


# ------------------------------------------------------------------------------------------------------------
# Shared with the module.
# ------------------------------------------------------------------------------------------------------------


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: Any = None,
    update: _ops.CenterUpdate | None = None,
    *,
    seen: list[Any] | None = None,
) -> Tensor:
    """:func:`ncmi_loss` on checked arguments and a resolved backend; the last three as :func:`_ops.loss` has them."""
    rows, classes = flatten(input, target)
    rows, centroid_logits, center, weight = to_arithmetic_dtype(rows, centroid_logits, center, weight)
    if backend == "reference":
        check_range(classes, len(centroid_logits), options.ignore_index)
        result = reference.loss(rows, classes, centroid_logits, center, weight, options, means=seen)
    else:
        others = classes, centroid_logits, center, weight, options, backend, stats
        if options.separation_focus:
            result = _focus.loss(rows, *others, seen=seen)
        else:
            result = _ops.loss(rows, *others, update, seen=seen)
    return result.reshape(target.shape) if options.reduction == "none" else result


def centroid_gradient(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: Any = None,
    seen_rows: _focus.Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """Without a graph: the gradient of :func:`loss` by `centroid_logits` [C, M], in its dtype, and means of terms [2].

    The means are NaN where no row counts.
    """
    logits = centroid_logits.detach()
    if backend == "reference":
        means: list[Tensor] = []
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            value = loss(input.detach(), target, leaf, center, weight, options, backend, seen=means)
            return torch.autograd.grad(value, leaf)[0], means[0]
    rows, classes = flatten(input.detach(), target)
    rows, wide, center, weight = to_arithmetic_dtype(rows, logits, center, weight)
    others = (classes, wide, center, weight, options, backend, stats)
    if options.separation_focus:
        grad, mean_terms = _focus.centroid_gradient(rows, *others, seen_rows)
    else:
        grad, mean_terms = _ops.centroid_gradient(rows, *others)
    return grad.to(logits.dtype), mean_terms


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
    return input, centroid_logits, _as_constant(center, dtype), _as_constant(weight, dtype)


def _as_constant(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A vector as the kernels take it, which a graph can save: autograd refuses what was made in inference mode."""
    if vector is None:
        return None
    if vector.dtype is not dtype or vector.requires_grad or not vector.is_contiguous():
        vector = vector.detach().to(dtype).contiguous()
    if not torch.compiler.is_compiling() and vector.is_inference():
        vector = vector.clone()
    return vector


@cache
def _warn_degenerate() -> None:
    warnings.warn(
        "separation='centroid_to_sample' without l2_normalize has a degenerate minimum: one feature runs to minus "
        "infinity, the separation grows without bound and accuracy collapses. Use l2_normalize=True or "
        "separation='sample_to_centroid'.",
        DegenerateMinimumWarning,
        stacklevel=4,
    )


def warn_if_degenerate(options: Options) -> None:
    """Warn once in a process about the settings with a degenerate minimum."""
    if options.centroid_to_sample and not options.l2_normalize and not torch.compiler.is_compiling():
        _warn_degenerate()


def check_parameters(centroid_logits: Tensor, center: Tensor | None, weight: Tensor | None) -> None:
    """Raise the errors that :func:`ncmi_loss` documents for these."""
    check_floating("centroid_logits", centroid_logits)
    if centroid_logits.dim() != 2 or min(centroid_logits.shape) < 2:
        raise ValueError(
            f"centroid_logits: got shape {tuple(centroid_logits.shape)}, expected [C, M] with C >= 2 classes and M >= 2"
        )
    classes, columns = centroid_logits.shape
    if center is not None:
        check_floating("center", center)
        check_vector("center", center, columns, centroid_logits)
    if weight is not None:
        check_floating("weight", weight)
        check_vector("weight", weight, classes, centroid_logits)
        check_constant("weight", weight)


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
        hint = "; class probabilities are not supported" if target.dtype.is_floating_point else ""
        raise RuntimeError(
            f"target: got dtype {target.dtype}, expected torch.int64 (or torch.uint8) class indices{hint}"
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise RuntimeError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise RuntimeError(f"{name}: got device {tensor.device}, expected {like.device}, that of the other tensors")


def check_range(target: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raise IndexError for a target that is neither a class nor ignored; the operator of the loss does it itself."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(target):
        target = torch._C._functorch.get_unwrapped(
            target
        )  # all slices of a mapped target, whichever dimension they are
    target = target.flatten().long()
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
