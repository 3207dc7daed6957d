"""NCMI of a classifier on a data set, as a metric of torchmetrics.

The two-pass definition needs the class means before the divergences from them. One pass is enough because the
divergence from a mean splits (the compensation identity): for samples p_i of one class with mean s, and any q,

    sum_i KL(p_i || q) = sum_i KL(p_i || s) + n KL(s || q)

With q the mean of more samples, this merges two parts of a class into one; with q another class's centroid, it is the
separation. It adds what is never negative, where sums of p log p would have to be subtracted from each other, and lose
most of their digits once the samples are close to their centroid.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncmi_kernels import _problem, reference
from ncmi_kernels._options import Options, check_choice, check_count

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        f"torchmetrics: got {error}, expected the package that NCMIMetric needs: pip install torchmetrics"
    ) from error

VALUES = ("cmi", "gamma", "ncmi")
_TINY = torch.finfo(torch.float64).tiny


class NCMIMetric(Metric):
    r"""CMI, Gamma and NCMI = CMI / Gamma of a classifier on a data set, in one pass (arXiv 2601.02543).

    The centroids are the class means of the data set itself. With p_i the distribution of sample i, s_c the mean of
    p_i over the samples of class c, N samples and C classes,

    .. math::
        \mathrm{CMI} = \frac{1}{N} \sum_i \mathrm{KL}(p_i \| s_{y_i}), \qquad
        \Gamma = \frac{1}{N} \sum_i \sum_{v \ne y_i} \pi_v \mathrm{KL}(p_i \| s_v)

    in nats, or KL(s_v || p_i) in Gamma; the prior of a class pi_v is 1 / C or as given. Computed in float64 from
    features of any floating dtype, within 1e-10 of the exact values where these are above 1e-6 nats. The state,
    [C, M + 2] numbers (and [C, M] more for "centroid_to_sample"), stays float64 whatever `.to`, `.half` or `set_dtype`
    ask for, and adds up over processes. No two metrics share it in the compute groups of a
    `torchmetrics.MetricCollection`.

    A class without samples has no centroid and counts for nothing: the sum over v is over the classes that have
    samples, and so are C and the sum of the priors, as if there were no others. With one such class Gamma is 0 and NCMI
    infinite. With no sample at all, everything is NaN. A centroid's probability below 2e-308 counts as that in its
    logarithm.

    Args:
        num_classes: C >= 2.
        feature_dim: M >= 2, the size of the features; None for `num_classes`.
        activation: "nsf", or "softmax", where the features are the logits of a softmax classifier.
        separation: "sample_to_centroid", KL(p_i || s_v), or "centroid_to_sample", KL(s_v || p_i).
        temperature: divides the features; > 0.
        l2_normalize: divide the centred features by their length.
        center: [M], subtracted from the features, or None. It is copied to the device of the metric, and never part of
            its state_dict; `metric.center.copy_(criterion.center)` follows one that moves.
        class_prior: [C], how often each class occurs, numbers >= 0 of sum 1; None for 1 / C. It is copied to the device
            of the metric, and never part of its state_dict.
        ignore_index: samples with this target count for nothing.
        value: "cmi", "gamma" or "ncmi", for `compute` to return that alone: what Lightning's `self.log` and
            `torchmetrics.MetricTracker` expect. None for all three.
        **kwargs: those of every `torchmetrics.Metric`, such as `process_group` and `sync_on_compute`.

    Shape:
        features [B, M], [M] or [B, M, d1, ...], floating; target [B], [] or [B, d1, ...], int64 or uint8; `compute`
        returns {"cmi", "gamma", "ncmi"}, float64 scalars, or the one of them that `value` names.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError: an argument is not of the expected Python type.
        ValueError: a shape does not fit, or an option is unknown or out of its range.
        IndexError: a target is neither a class nor `ignore_index` (on other devices than the CPU: a device-side
            assertion).
        RuntimeError: a dtype, device or layout is not supported.

    Example:
        >>> import torch
        >>> from ncmi_kernels import NCMIMetric
        >>> metric = NCMIMetric(num_classes=2, activation="softmax")
        >>> for logits in ([2.0, 0.0], [1.0, 0.0]):
        ...     metric.update(torch.tensor([logits, logits[::-1]]), torch.tensor([0, 1]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'cmi': 0.0183, 'gamma': 0.4447, 'ncmi': 0.0412}
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    moments: Tensor
    log_p: Tensor
    center: Tensor | None
    class_prior: Tensor | None

    def __init__(
        self,
        num_classes: int,
        feature_dim: int | None = None,
        *,
        activation: str = "nsf",
        separation: str = "sample_to_centroid",
        temperature: float = 1.0,
        l2_normalize: bool = False,
        center: Tensor | None = None,
        class_prior: Tensor | None = None,
        ignore_index: int = -100,
        value: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if value is not None:
            check_choice("value", value, VALUES)
        self.value = value
        self.options = Options(temperature, l2_normalize, activation, separation, ignore_index=ignore_index)
        self.num_classes = check_count("num_classes", num_classes, least=2)
        self.feature_dim = num_classes if feature_dim is None else check_count("feature_dim", feature_dim, least=2)
        # A MetricCollection makes one, for good, of metrics whose states are close after the first update (torchmetrics
        # 1.4: the first of their states), where settings or centres may part them later. NaN is close to nothing.
        self.add_state("ungrouped", torch.tensor(math.nan, dtype=torch.float64), dist_reduce_fx="max")
        moments = torch.zeros(self.num_classes, 2 + self.feature_dim, dtype=torch.float64)
        self.add_state("moments", moments, dist_reduce_fx=_merge_processes)
        if self.options.centroid_to_sample:
            # Relative to the uniform distribution, -log M: NSF stays near it, and small numbers lose less in a sum.
            self.add_state("log_p", torch.zeros_like(moments[:, 2:]), dist_reduce_fx="sum")
        if center is not None:
            _problem.check_floating("center", center)
            if center.shape != (self.feature_dim,):
                raise ValueError(f"center: got shape {tuple(center.shape)}, expected ({self.feature_dim},)")
            center = center.detach().to(moments.device, torch.float64, copy=True)
        self.register_buffer("center", center, persistent=False)
        if class_prior is not None:
            class_prior = _problem.prior_of(class_prior, self.num_classes, class_prior).to(moments.device, copy=True)
        self.register_buffer("class_prior", class_prior, persistent=False)

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Of the separation alone."""
        return self.value == "gamma"

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            features: NSF's input, or logits for "softmax"; [B, M], [M] or [B, M, d1, ...].
            target: [B], [] or [B, d1, ...].
        """
        self._check(features, target)
        features, target = _problem.flatten(features, target)
        target = target.long()
        _problem.check_range(target, self.num_classes, self.options.ignore_index)
        kept = target != self.options.ignore_index
        target = target[kept]
        with reference.no_autocast(features.device):
            log_p = reference.log_probabilities(
                features.detach()[kept].double(),
                self.center,
                self.options.temperature,
                self.options.l2_normalize,
                self.options.activation,
            )
        p = log_p.exp()
        samples = torch.cat([torch.ones_like(p[:, :1]), torch.zeros_like(p[:, :1]), p], dim=1)
        classes, index = target.unique(return_inverse=True)
        parts = torch.cat([self.moments[classes], samples])
        index = torch.cat([torch.arange(len(classes), device=index.device), index])
        # Not in place: torchmetrics keeps the tensor of before, and other metrics of a collection may share it.
        self.moments = self.moments.index_copy(0, classes, _merge(parts, index, len(classes)))
        if self.options.centroid_to_sample:
            self.log_p = self.log_p.index_add(0, target, log_p + math.log(self.feature_dim))

    def compute(self) -> Any:
        """{"cmi", "gamma", "ncmi"} of the samples so far, of all processes: float64 scalars; or that of `value`."""
        count, spread, total_p = self.moments[:, 0], self.moments[:, 1], self.moments[:, 2:]
        present = count > 0
        prior = present.double() if self.class_prior is None else self.class_prior * present
        total = prior.sum()
        prior = prior / total.masked_fill(total == 0, 1)
        whole = prior.sum()  # 1, or 0 where no class counts
        s = total_p / count.clamp(min=1)[:, None]
        # Logarithms relative to the mean centroid, which is the same for all and drops out: the smaller they are, the
        # less the differences between classes lose.
        mean_s = (prior[:, None] * s).sum(dim=0)
        log_s = (s / mean_s.clamp(min=_TINY)).clamp(min=_TINY).log().masked_fill(~present[:, None], 0)
        if self.options.centroid_to_sample:
            log_p = self.log_p / count.clamp(min=1)[:, None]
            log_p = log_p - (self.feature_dim * mean_s.clamp(min=_TINY)).log()
            every = (prior[:, None] * s * log_s).sum() - (mean_s * log_p).sum(dim=1)
            own = (s * (log_s - log_p)).sum(dim=1)
            separation = count * (every - prior * own)
        else:
            # sum_v prior_v KL(s_c || s_v)
            between = (s * (whole * log_s - (prior[:, None] * log_s).sum(dim=0))).sum(dim=1)
            separation = (whole - prior) * spread + count * between
        samples = count.sum()
        cmi, gamma = spread.sum() / samples, separation.sum() / samples
        values = dict(zip(VALUES, (cmi, gamma, cmi / gamma), strict=True))
        return values if self.value is None else values[self.value]

    def plot(
        self,
        val: dict[str, Tensor] | Tensor | Sequence[dict[str, Tensor]] | Sequence[Tensor] | None = None,
        ax: Any = None,
    ) -> tuple[Any, Any]:
        """Draw values by matplotlib, as every metric of torchmetrics does.

        Args:
            val: what `compute` or `forward` returned, or a list of such, drawn as a curve each; None for `compute()`.
            ax: the axes of matplotlib to draw into; None for new ones.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _check(self, features: Tensor, target: Tensor) -> None:
        _problem.check_floating("features", features)
        _problem.check_target(target)
        shape = features.shape
        if len(shape) == 0 or shape[min(len(shape) - 1, 1)] != self.feature_dim:
            raise ValueError(
                f"features: got shape {tuple(shape)}, expected [B, M], [M] or [B, M, d1, ...] with M = "
                f"{self.feature_dim}, the metric's feature_dim"
            )
        expected = shape[:1] + shape[2:] if len(shape) > 1 else ()
        if target.shape != expected:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, expected {tuple(expected)} for features {tuple(shape)}"
            )
        _problem.check_device("target", target, features)
        if features.device != self.moments.device:
            raise RuntimeError(
                f"features: got device {features.device}, expected {self.moments.device}, that of the metric; "
                "metric.to(device) moves it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Change devices as `fn` does, but no dtypes: a model that holds the metric may be cast to bfloat16."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, with - p + q in each term, which sums to zero.

    Every term is positive then, and p close to q loses nothing: it is of second order in p - q, and so is its rounding.
    """
    x = (p - q) / q.clamp(min=_TINY)
    return (q * (torch.special.xlog1py(1 + x, x) - x)).sum(dim=-1)


def _merge(moments: Tensor, index: Tensor, classes: int) -> Tensor:
    """Sum up by class.

    Args:
        moments: [R, 2 + M] parts of classes, each n, sum_i KL(p_i || s) and sum_i p_i. A sample is a part of one.
        index: [R] the class of each part.
        classes: how many there are.

    Returns:
        [classes, 2 + M], the same of whole classes.
    """
    total = moments.new_zeros(classes, moments.shape[1]).index_add_(0, index, moments)
    part_mean, mean = (rows[:, 2:] / rows[:, :1].clamp(min=1) for rows in (moments, total))
    total[:, 1].index_add_(0, index, moments[:, 0] * _divergence(part_mean, mean[index]))
    return total


def _merge_processes(moments: Tensor) -> Tensor:
    """One state [C, 2 + M] from those of several processes, [P, C, 2 + M]."""
    processes, classes, _ = moments.shape
    index = torch.arange(classes, device=moments.device).repeat(processes)
    return _merge(moments.flatten(0, 1), index, classes)
