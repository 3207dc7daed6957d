"""NCMI in plain PyTorch: the definition, and the same collapsed over the classes.

:func:`literal_terms` is to be read beside the paper (arXiv 2601.02543). It builds the [B, C, M] tensor that the
kernels exist to avoid. :func:`collapsed_terms` is the same arithmetic without it. Both run on any device and
floating dtype, and differentiate as often as torch does; half-precision input is computed in float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ncmi_kernels._group import Group
from ncmi_kernels._options import Options


def log_activation(x: Tensor, activation: str) -> Tensor:
    """Logarithm of the normalised activation along the last dimension.

    Args:
        x: [..., M], any floating dtype.
        activation: "nsf", log(sigma(x_k) / sum_j sigma(x_j)), or "softmax".

    Returns:
        [..., M], same dtype.
    """
    log_value = F.logsigmoid(x) if activation == "nsf" else x
    return log_value - log_value.logsumexp(dim=-1, keepdim=True)


def log_probabilities(
    input: Tensor, center: Tensor | None, temperature: float, l2_normalize: bool, activation: str
) -> Tensor:
    """Log p [B, M]: features centred, optionally normalised to length one, divided by the temperature, activated.

    An element that is NaN or infinite makes its whole row NaN: the sigmoid saturates and would hide it.
    """
    x = input if center is None else input - center
    poison = (x * 0).sum(dim=-1, keepdim=True)
    if l2_normalize:
        # As torch.nn.functional.normalize; but squares of huge features do not overflow, and a row of length zero has
        # second derivatives.
        largest = x.detach().abs().amax(dim=-1, keepdim=True)
        x = x / torch.where(largest > 1e15, largest, 1)
        short = x.detach().norm(dim=-1, keepdim=True) < 1e-12
        x = x / x.masked_fill(short, 1).norm(dim=-1, keepdim=True).masked_fill(short, 1e-12)
    return log_activation(x / temperature, activation) + poison


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, where it is on: turning it off costs as much as a small kernel."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def literal_terms(
    log_p: Tensor, target: Tensor, log_q: Tensor, options: Options, class_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Concentration and separation as they are defined.

        A_i = KL(p_i || q_{y_i})
        G_i = sum over v != y_i of prior_v KL(p_i || q_v)    "sample_to_centroid"
                                or prior_v KL(q_v || p_i)    "centroid_to_sample"

    Args:
        log_p: [B, M] log-probabilities of the samples.
        target: [B] classes, int64.
        log_q: [C K, M] log-probabilities of the centroids, those of a class adjacent.
        options: which divergence, and how several centroids and near classes are weighed: :func:`concentration_of` and
            :func:`separation_of`.
        class_prior: [C] of sum 1; None for 1 / C each.

    Returns:
        A [B] and G [B].
    """
    samples = log_p[:, None, :].expand(-1, len(log_q), -1)  # [B, C K, M]
    centroids = log_q[None, :, :].expand_as(samples)
    if options.separation == "sample_to_centroid":
        divergence = kl_divergence(samples, centroids)  # [B, C K]
    else:
        divergence = kl_divergence(centroids, samples)
    return (
        concentration_of(log_p, target, log_q, options),
        separation_of(divergence, target, options, class_prior),
    )


def concentration_of(log_p: Tensor, target: Tensor, log_q: Tensor, options: Options) -> Tensor:
    """A [B]: the divergence from the own centroid, or from those of the own class by :func:`weights_by_nearness`."""
    if options.centroids_per_class == 1:
        return kl_divergence(log_p, log_q.index_select(0, target))
    own = log_q.unflatten(0, (-1, options.centroids_per_class)).index_select(0, target)  # [B, K, M]
    divergence = kl_divergence(log_p[:, None, :], own)
    weights = weights_by_nearness(divergence, options.centroid_focus, torch.ones_like(divergence))
    return (weights * divergence).sum(dim=1)


def separation_of(divergence: Tensor, target: Tensor, options: Options, class_prior: Tensor | None = None) -> Tensor:
    """G [B] from the divergences [B, C K]: the sum over the other classes by their priors, or by nearness as well.

    The centroids of a class share its prior. With a focus they have :func:`weights_by_nearness`, times what the priors
    of the other classes add up to.
    """
    count, own_count = divergence.shape[1], options.centroids_per_class
    own = target[:, None] == torch.arange(count, device=target.device) // own_count  # one_hot would ask for values
    if class_prior is None:
        prior = divergence.new_full((count,), 1 / count)
    else:
        prior = class_prior.to(divergence.dtype).repeat_interleave(own_count) / own_count
    weights = others = torch.where(own, 0, prior)
    if options.separation_focus:
        weights = weights_by_nearness(divergence, options.separation_focus, others) * others.sum(dim=1, keepdim=True)
    return (weights * divergence.masked_fill(others == 0, 0)).sum(dim=1)


def weights_by_nearness(divergence: Tensor, focus: float, prior: Tensor) -> Tensor:
    """prior exp(-focus D_iv / min_u D_iu) over each row of divergences [B, R], made to sum to 1; both take prior > 0.

    They are not differentiated; if they were, a sample could raise its separation by looking at far classes.
    """
    distance = divergence.detach()
    weights = prior
    if focus:
        nearest = distance.masked_fill(prior == 0, torch.inf).amin(dim=1, keepdim=True)
        nearest = nearest.clamp(min=torch.finfo(divergence.dtype).tiny)
        weights = prior * torch.exp(-focus * ((distance - nearest).clamp(min=0) / nearest))
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)  # where no class counts, nor does any weight


def divergences(log_p: Tensor, log_q: Tensor, separation: str) -> Tensor:
    """All divergences [B, C] of samples and centroids, by a matrix product in place of a [B, C, M] tensor.

    Logarithms are taken relative to the mean over the classes: they are then as small as the divergences, which the
    entropies, equal in both terms, would drown.
    """
    mean = log_q.mean(dim=0)
    p, q = log_p.exp(), log_q.exp()
    log_p, log_q = log_p - mean, log_q - mean
    if separation == "sample_to_centroid":
        divergence = (p * log_p).sum(dim=1, keepdim=True) - p @ log_q.T
    else:
        divergence = (q * log_q).sum(dim=1) - log_p @ q.T
    return divergence - divergence.detach().clamp(max=0)  # rounding may leave less than 0, and its gradient stays


def collapsed_terms(
    log_p: Tensor, target: Tensor, log_q: Tensor, options: Options, class_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`literal_terms` in O((B + C) M): the sums over samples and classes factorise.

    With means over the classes by their priors:

    sample_to_centroid: G_i = sum_k p_k (log p_k - mean_c log q_ck) - prior_{y_i} A_i
    centroid_to_sample: G_i = mean_c sum_k q_ck log q_ck - sum_k mean_c q_ck log p_k - prior_{y_i} KL(q_{y_i} || p_i)

    With weights for every sample and centroid they do not: O(B C M) operations then, but still no [B, C, M].
    """
    concentration = concentration_of(log_p, target, log_q, options)
    if options.every_pair:
        divergence = divergences(log_p, log_q, options.separation)
        return concentration, separation_of(divergence, target, options, class_prior)
    prior = log_q.new_full((len(log_q),), 1 / len(log_q)) if class_prior is None else class_prior.to(log_q.dtype)
    own_prior = prior.index_select(0, target)
    if options.separation == "sample_to_centroid":
        mean_log_q = (prior[:, None] * log_q).sum(dim=0)
        return concentration, kl_divergence(log_p, mean_log_q) - own_prior * concentration
    q = prior[:, None] * log_q.exp()
    every_class = (q * log_q).sum() - (log_p * q.sum(dim=0)).sum(dim=-1)
    return concentration, every_class - own_prior * kl_divergence(log_q.index_select(0, target), log_p)


def terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    options: Options,
    class_prior: Tensor | None = None,
    *,
    literal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Concentration A [B] and separation G [B] from features [B, M] and centroid logits [C K, M]."""
    dtype = torch.promote_types(torch.promote_types(input.dtype, centroid_logits.dtype), torch.float32)
    with no_autocast(input.device):
        log_p = log_probabilities(
            input.to(dtype),
            None if center is None else center.detach().to(dtype),
            options.temperature,
            options.l2_normalize,
            options.activation,
        )
        log_q = log_probabilities(centroid_logits.to(dtype), None, 1.0, False, options.activation)
        compute = literal_terms if literal else collapsed_terms
        return compute(log_p, target, log_q, options, class_prior)


def weighted_terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    class_prior: Tensor | None = None,
    *,
    literal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`terms`, and what each row counts for: the weight of its class. All three [B], and 0 for ignored rows."""
    kept = target != options.ignore_index
    classes = target.masked_fill(~kept, 0)
    input = torch.where(kept[:, None], input, 0)  # an ignored row may hold NaN, which zero times anything would keep
    concentration, separation = terms(input, classes, centroid_logits, center, options, class_prior, literal=literal)
    return weigh(concentration, separation, kept, classes, weight)


def weigh(
    concentration: Tensor, separation: Tensor, kept: Tensor, classes: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`weighted_terms` from the terms; of rows that are not `kept`, `classes` has any class."""
    concentration = torch.where(kept, concentration, 0)
    separation = torch.where(kept, separation, 0)
    w = kept.to(concentration.dtype)
    if weight is not None:
        w = w * weight.detach().to(concentration.dtype)[classes]
    return concentration, separation, w


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    class_prior: Tensor | None = None,
    *,
    literal: bool = False,
) -> Tensor:
    """The loss from [B, M] features: a scalar, or [B] for reduction "none".

    With w_i the weight of sample i's class, sums over the samples that are not ignored, and W = sum_i w_i:

        ratio "sample":      l_i = A_i / (G_i + eps), and mean = sum_i w_i l_i / W
        ratio "soft_margin": l_i = log(1 + (A_i / (G_i + eps))^sharpness) / sharpness, and likewise
        ratio "batch":       (sum_i w_i A_i / W) / (sum_i w_i G_i / W + eps)
    """
    return loss_and_means(input, target, centroid_logits, center, weight, options, class_prior, literal=literal)[0]


def loss_and_means(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    class_prior: Tensor | None = None,
    *,
    literal: bool = False,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`loss`, and CMI and Gamma of the batch [2] float64: sum_i w_i A_i / W and sum_i w_i G_i / W, detached.

    With a `group`, of the batches of all processes (but the losses of reduction "none"); gradients are multiplied by
    their number, of which the average that DistributedDataParallel takes leaves the sum.
    """
    weighted = weighted_terms(input, target, centroid_logits, center, weight, options, class_prior, literal=literal)
    return reduce(*weighted, options, group)


def reduce(
    concentration: Tensor, separation: Tensor, w: Tensor, options: Options, group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`loss_and_means` from what :func:`weighted_terms` gives."""
    dtype = concentration.dtype
    if group is not None:  # sums over very many rows
        concentration, separation, w = concentration.double(), separation.double(), w.double()
    sums = [w.sum(), (w * concentration).sum(), (w * separation).sum()]
    if not options.batch_ratio:
        each = w * ratio_by_sample(concentration, separation, options)
        sums.append(each.sum())
    if group is not None:
        sums = list(_sums_of_all(torch.stack(sums), group))
    weight, cmi, gamma = sums[:3]
    means = torch.stack([cmi, gamma]).detach().double() / weight.detach().double()
    if options.batch_ratio:
        loss = (cmi / weight) / (gamma / weight + options.eps)
    elif options.reduction == "none":
        loss = each
    else:
        loss = sums[3] / weight if options.reduction == "mean" else sums[3]
    return loss.to(dtype), means


def ratio_by_sample(concentration: Tensor, separation: Tensor, options: Options) -> Tensor:
    """r = A / (G + eps) of each sample [B]; with the soft margin log(1 + r^sharpness) / sharpness."""
    ratio = concentration / (separation + options.eps)
    if options.ratio != "soft_margin":
        return ratio
    log_ratio = ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log()
    return F.softplus(options.sharpness * log_ratio, threshold=700) / options.sharpness


def _sums_of_all(sums: Tensor, group: Group) -> Tensor:
    """The sums over all processes; their gradients are this process's, times the number of processes."""
    if sums.requires_grad:
        sums.register_hook(lambda grad: refuse_double_backward())
    own = group.size * sums
    return group.all_reduce(sums.detach().clone()) + (own - own.detach())  # the same bits on each process


def refuse_double_backward() -> None:
    """In the backward pass of a loss over several processes: raises where that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True for a loss over several processes (process_group, device_mesh), expected False: "
            "double backward is not supported there"
        )
