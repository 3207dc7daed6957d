"""The functional API: arguments checked, shapes brought to [B, M], backend chosen."""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels import _backends, _loss, _terms
from ncmi_kernels._options import Options
from ncmi_kernels._problem import (
    check_batch,
    check_floating,
    check_parameters,
    check_range,
    prior_of,
    problem_of,
)

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
    sharpness: float = 4.0,
    class_prior: Tensor | None = None,
    centroids_per_class: int = 1,
    centroid_focus: float = 4.0,
    backend: str | None = None,
) -> Tensor:
    r"""Normalized conditional mutual information of a batch, the ratio CMI / Gamma (arXiv 2601.02543).

    With x = input - center, made of length one where `l2_normalize`, the distribution of a sample and of a
    class are p = nsf(x / temperature) and q = nsf(centroid_logits), where nsf(f)_k = sigmoid(f_k) / sum_j
    sigmoid(f_j). Each sample has a concentration and a separation,

    .. math::
        A_i = \mathrm{KL}(p_i \| q_{y_i}), \qquad G_i = \frac{1}{C} \sum_{v \ne y_i} \mathrm{KL}(p_i \| q_v)

    and the loss is the ratio of their means, or a mean over their ratios. Costs O((B + C) M); nothing of size
    B C outlives a tile of `separation_focus` or `centroids_per_class`. Sums and normalisers are float64, everything
    else float32 (float64 for float64 arguments).

    Differentiable any number of times, in reverse and forward mode, and by all transforms of torch.func. Values and
    reverse-mode first derivatives come from the backend. Further derivatives, everything within forward mode (jvp,
    jacfwd, hessian, `torch.autograd.forward_ad`) and several upstream gradients at once (`is_grads_batched`,
    `vectorize=True`) come from PyTorch. vmap makes one batch of what it maps, unless it maps `centroid_logits`,
    `center` or `class_prior`, or the centroids' gradient is wanted: then it runs the backend once for each slice.

    Args:
        input: features or logits, [B, M], [M] or [B, M, d1, ...]; float32, float64, bfloat16 or float16.
        target: class indices, int64 or uint8, [B], [] or [B, d1, ...], each in [0, C) or `ignore_index`.
        centroid_logits: [C, M], C >= 2, M >= 2; a floating dtype. Differentiable, as `input` is. With
            `centroids_per_class` K [C K, M], those of a class adjacent.
        center: [M], subtracted from the features; never differentiated.
        temperature: divides the features; > 0.
        l2_normalize: divide each centred feature vector by max(its length, 1e-12) first.
        activation: "nsf", or "softmax" for the ablation.
        separation: "sample_to_centroid", KL(p_i || q_v), or "centroid_to_sample", KL(q_v || p_i). The latter
            without `l2_normalize` has a degenerate minimum: one coordinate runs to minus infinity.
        ratio: "batch", mean(A) / (mean(G) + eps); "sample", mean(r) with r = A / (G + eps); or "soft_margin",
            mean(log(1 + r^sharpness) / sharpness), which pulls the less at a sample, the smaller its r is.
        weight: [C], class weights; the means become weighted means, as in cross_entropy. Not differentiable.
        ignore_index: samples with this target count for nothing and get a zero gradient.
        reduction: "mean" (weighted; NaN where no sample counts), and but for ratio "batch" also "sum" and "none".
        eps: added to the separation; > 0.
        separation_focus: >= 0. Above 0 the other classes no longer count alike in the separation but the more, the
            nearer they are to the sample. With D_iv the divergence of the separation and minimum and softmax over
            v != y_i:

            .. math::
                G_i = \frac{C - 1}{C} \sum_{v \ne y_i} w_{iv} D_{iv}, \qquad
                w_i = \text{softmax}_v(-\text{focus} \, D_{iv} / \min_u D_{iu})

            where w is not differentiated. 0 is the paper's G, 10 trains networks for many classes better. The sum no
            longer factorises: this costs O(B C M) operations, matrix products as large as those of a linear head, by
            tiles of rows (in torch.compile of the whole batch). Of these products sums are in the type of the
            arithmetic, and the same bits every time are as far as torch.mm gives them.
        sharpness: of the soft margin; > 0.
        class_prior: [C], how often each class occurs, numbers >= 0 of sum 1, for long-tailed data; None for 1 / C. The
            other classes then count by it in the separation, the sum over v != y_i of prior_v D_iv. With a focus
            w_i is proportional to prior_v exp(...), and 1 - prior_{y_i} is in the place of (C - 1) / C. Not
            differentiable.
        centroids_per_class: K >= 1. With several, every centroid of another class has its D_iv, and counts for 1 / K of
            the prior of its class. The concentration is, with sums over the centroids u of the own class,

            .. math::
                A_i = \sum_u w'_{iu} \mathrm{KL}(p_i \| q_u), \qquad
                w'_i = \text{softmax}_u(-\text{centroid\_focus} \, \mathrm{KL}(p_i \| q_u) / \min_t
                \mathrm{KL}(p_i \| q_t))

            where w' is not differentiated. This costs the matrix products of the focus, and K passes over the features.
        centroid_focus: >= 0; the larger, the more a sample belongs to the nearest centroid of its class alone.
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
        temperature,
        l2_normalize,
        activation,
        separation,
        ratio,
        ignore_index,
        reduction,
        eps,
        separation_focus,
        sharpness,
        centroids_per_class,
        centroid_focus,
    )
    warn_if_degenerate(options)
    check_parameters(centroid_logits, center, weight, options.centroids_per_class)
    check_batch(input, target, centroid_logits)
    if class_prior is not None:
        class_prior = prior_of(class_prior, len(centroid_logits) // options.centroids_per_class, centroid_logits)
    resolved = _backends.resolve(backend, input)
    problem = problem_of(input, target, centroid_logits, center, weight, options, resolved, class_prior=class_prior)
    result = _loss.loss(*problem).loss
    return result.reshape(target.shape) if options.reduction == "none" else result


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
    class_prior: Tensor | None = None,
    centroids_per_class: int = 1,
    centroid_focus: float = 4.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two terms of :func:`ncmi_loss` by sample, to be combined otherwise; both are differentiable.

    Args:
        input: as in :func:`ncmi_loss`, and so are all others.
        target: every one a class: there is no ignore_index here.
        centroid_logits: [C, M], or [C K, M].
        center: [M] or None.
        temperature: > 0.
        l2_normalize: divide the centred features by their length.
        activation: "nsf" or "softmax".
        separation: "sample_to_centroid" or "centroid_to_sample".
        separation_focus: >= 0.
        class_prior: [C] or None.
        centroids_per_class: K >= 1.
        centroid_focus: >= 0.
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
        centroids_per_class=centroids_per_class,
        centroid_focus=centroid_focus,
    )
    check_parameters(centroid_logits, center, None, options.centroids_per_class)
    check_batch(input, target, centroid_logits)
    if class_prior is not None:
        class_prior = prior_of(class_prior, len(centroid_logits) // options.centroids_per_class, centroid_logits)
    resolved = _backends.resolve(backend, input)
    rows, logits, problem = problem_of(
        input, target, centroid_logits, center, None, options, resolved, class_prior=class_prior
    )
    check_range(problem.target, len(logits) // options.centroids_per_class, None)
    concentration, separated = _terms.terms(rows, logits, problem)
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
