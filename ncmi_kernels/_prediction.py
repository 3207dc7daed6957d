"""What a criterion does without targets: the class of a sample, and the mean distribution of each class."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ncmi_kernels import _problem, reference
from ncmi_kernels._modes import concrete
from ncmi_kernels._options import Options


class Predictor(nn.Module):
    """The part of :class:`NCMILoss` that needs no loss; that class makes the parameters and buffers."""

    num_classes: int
    feature_dim: int
    options: Options
    center_momentum: float | None
    centroid_logits: nn.Parameter
    center: Tensor
    class_means: Tensor
    scores_temperature: Tensor

    def centroids(self) -> Tensor:
        """The centroids [C K, M] as distributions: each row sums to one. Differentiable."""
        return reference.log_activation(self.centroid_logits, self.options.activation).exp()

    @torch.no_grad()
    def scores(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """Scores of the classes, sum_k p_k log q_ck: the higher the nearer (argmin_c KL(p || q_c)).

        Of several centroids a class has, the nearest counts.

        Args:
            features: [B, M], [M] or [B, M, d1, ...].
            class_means: score against the means of `fit_class_means`, the paper's evaluation, instead of the
                centroids. A class that the fit had no sample of scores -inf.

        Returns:
            [B, C], [C] or [B, C, d1, ...]; float32, or float64 where the features or the centroids are.

        Raises:
            RuntimeError: class means asked for before they were fitted, or a dtype or device is not supported.
            TypeError, ValueError: `features` is no tensor, or of another shape.
        """
        relative, common = self._relative_scores(features, class_means)
        scores = (relative + common[:, None]).reshape(*self._check_features(features), self.num_classes)
        return scores.movedim(-1, min(1, features.dim() - 1))

    @torch.no_grad()
    def predict(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """The class (int64) of the highest score: [B], [] or [B, d1, ...]. Arguments and errors as of `scores`."""
        highest = self._relative_scores(features, class_means)[0].argmax(dim=1)
        return highest.reshape(self._check_features(features))

    @torch.no_grad()
    def probabilities(self, features: Tensor, *, class_means: bool = False) -> Tensor:
        """Probabilities of the classes: softmax of the scores over the temperature of `fit_temperature`.

        The scores themselves differ by next to nothing: without a temperature all classes would be as likely.

        Args:
            features: as of `scores`.
            class_means: as of `scores`; each of the two has a temperature of its own.

        Returns:
            [B, C], [C] or [B, C, d1, ...], of sum 1; float32 or float64. 0 for a class without a mean.

        Raises:
            RuntimeError: no temperature was fitted for these scores.
            TypeError, ValueError, RuntimeError: as of `scores`.
        """
        temperature = self.scores_temperature[int(class_means)]
        _check(
            temperature > 0,
            f"temperature: not fitted yet, expected a call of fit_temperature(class_means={class_means})",
        )
        relative, _ = self._relative_scores(features, class_means)
        p = (relative / temperature).softmax(dim=1).reshape(*self._check_features(features), self.num_classes)
        return p.movedim(-1, min(1, features.dim() - 1))

    @torch.no_grad()
    def fit_temperature(self, features: Tensor, target: Tensor, *, class_means: bool = False) -> Tensor:
        """Fit the temperature of `probabilities`: that which makes the targets likeliest (arXiv 1706.04599).

        Call it after training, and after `fit_class_means`, on samples that the network was not trained on. The
        predictions stay. Part of the state_dict. Between exp(-7) and exp(7) times the mean standard deviation of the
        scores of a sample: at the lower end where all targets have the highest score.

        Args:
            features: as of `scores`, of all samples at once.
            target: class indices as of `forward`; samples of `ignore_index` are skipped, and with `class_means` those
                of a class without a mean, which has no part in the probabilities.
            class_means: as of `scores`.

        Returns:
            The temperature, a scalar.

        Raises:
            ValueError: no sample counts, or a feature is not finite.
            RuntimeError: the criterion's dtype cannot hold the temperature, as float16 where there are many features.
            TypeError, ValueError, IndexError, RuntimeError: as of `scores` and :func:`ncmi_loss`.
        """
        _problem.check_batch(features, target, self.centroid_logits)
        rows, classes = _problem.flatten(features, target)
        _problem.check_range(classes, self.num_classes, self.options.ignore_index)
        kept = classes != self.options.ignore_index
        scores, classes = self._relative_scores(rows[kept], class_means)[0].double(), classes[kept]
        present = ~scores.isneginf().all(dim=0)  # nowhere but for classes without a mean
        counted = present[classes]
        if not counted.any():
            raise ValueError("target: got no sample that counts, expected one at least")
        own, scores = scores.gather(1, classes[:, None])[counted], scores[counted][:, present]
        if not scores.isfinite().all():
            raise ValueError("features: got a number that is not finite, or too large, expected finite ones")
        spread = scores.std(dim=1, correction=0).mean().clamp(min=torch.finfo(torch.float32).tiny)
        highest = scores.amax(dim=1, keepdim=True)
        scores, own = (scores - highest) / spread, (own - highest) / spread
        # The likelihood is concave in 1 / temperature: bisection of its slope finds the only maximum.
        low, high = spread.new_tensor(-7.0), spread.new_tensor(7.0)
        for _ in range(50):
            middle = (low + high) / 2
            slope = ((middle.exp() * scores).softmax(dim=1) * scores - own / scores.shape[1]).sum()
            low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
        temperature = spread / high.exp()
        stored = temperature.to(self.scores_temperature.dtype)
        if not (stored - temperature).abs() <= 0.01 * temperature:
            raise RuntimeError(
                f"temperature: got {temperature:.3g}, which {stored.dtype} cannot hold; expected float32"
            )
        self.scores_temperature[int(class_means)] = stored
        return stored

    def _relative_scores(self, features: Tensor, class_means: bool) -> tuple[Tensor, Tensor]:
        """Scores [B, C] less what all classes of a sample share, and that [B].

        The differences between classes may be small beside the scores; adding what they share would round them.
        """
        log_q = self._log_centroids(class_means)
        log_p = self._log_probabilities(features)
        missing = log_q[:, 0].isneginf()
        log_q = log_q.masked_fill(missing[:, None], 0).to(torch.promote_types(log_p.dtype, log_q.dtype))
        p = log_p.to(log_q.dtype).exp()
        present = (~missing).sum()
        if class_means:
            check_fitted(present)
        shared = log_q.sum(dim=0) / present.clamp(min=1)
        with reference.no_autocast(features.device):
            relative, common = p @ (log_q - shared).T, p @ shared
        relative = relative.masked_fill(missing, -torch.inf)
        if len(log_q) > self.num_classes:
            relative = relative.unflatten(1, (self.num_classes, -1)).amax(dim=2)
        return relative, common

    @torch.no_grad()
    def fit_class_means(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Set `class_means` to the mean distribution of each class: the paper's centroids for evaluation.

        Streams: state of O(C M), one batch at a time. Part of the state_dict from then on.

        Args:
            batches: pairs of features and class indices, as `forward` takes them; those of `ignore_index` are skipped.
                A temperature of earlier class means is forgotten.

        Returns:
            [C, M]; a class without samples has a row of zeros.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as :func:`ncmi_loss`.
        """
        with torch.inference_mode(False):  # a buffer made in it could not be changed in place outside
            logits = self.centroid_logits
            total = logits.new_zeros(self.num_classes, self.feature_dim, dtype=torch.float64)
            count = total.new_zeros(self.num_classes)
            for features, target in batches:
                p, classes, kept = self._counted_probabilities(features, target)
                total.index_add_(0, classes, p)
                count.index_add_(0, classes, kept.double())
            self.class_means = (total / count.clamp(min=1)[:, None]).to(self.centroid_logits.dtype)
            self._forget_temperature()
        return self.class_means

    # --------------------------------------------------------------------------------------------------------

    def _forget_temperature(self) -> None:
        """That of class means that are no more."""
        with torch.no_grad():
            self.scores_temperature[1] = 0

    def _counted_probabilities(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For a fit: p [N, M] float64 and classes [N] of its rows, both 0 where ignored; and which are not [N]."""
        _problem.check_batch(features, target, self.centroid_logits)
        rows, classes = _problem.flatten(features, target)
        _problem.check_range(classes, self.num_classes, self.options.ignore_index)
        kept = classes != self.options.ignore_index
        p = self._log_probabilities(rows).exp().double()
        return torch.where(kept[:, None], p, 0), classes.masked_fill(~kept, 0), kept

    def _check_features(self, features: Tensor) -> torch.Size:
        """The shape of `features` without that of a vector; raises unless they are [B, M], [M] or [B, M, d1, ...]."""
        _problem.check_floating("features", features)
        _problem.check_device("features", features, self.centroid_logits)
        shape = features.shape
        if not shape or shape[min(1, len(shape) - 1)] != self.feature_dim:
            raise ValueError(
                f"features: got shape {tuple(shape)}, expected [B, M], [M] or [B, M, d1, ...] with M = "
                f"{self.feature_dim}"
            )
        return shape[:1] + shape[2:] if len(shape) > 1 else torch.Size()

    def _log_probabilities(self, features: Tensor) -> Tensor:
        """Log p [N, M] of features [B, M], [M] or [B, M, d1, ...]."""
        self._check_features(features)
        center = None if self.center_momentum is None else self.center
        if center is not None:
            _problem.check_vector("center", center, self.feature_dim, self.centroid_logits)
        dtype = torch.promote_types(torch.promote_types(features.dtype, self.centroid_logits.dtype), torch.float32)
        with reference.no_autocast(features.device):
            return reference.log_probabilities(
                _problem.flatten_features(features).to(dtype),
                None if center is None else center.to(dtype),
                self.options.temperature,
                self.options.l2_normalize,
                self.options.activation,
            )

    def _own(self, table: Tensor) -> Tensor:
        """The rows of a [C, M] parameter or buffer that this process holds."""
        return table

    def _log_centroids(self, class_means: bool) -> Tensor:
        dtype = torch.promote_types(self.centroid_logits.dtype, torch.float32)
        if not class_means:
            return reference.log_activation(self._own(self.centroid_logits).to(dtype), self.options.activation)
        expected = (self.num_classes, self.feature_dim)
        if self.class_means.shape != expected:
            raise ValueError(f"class_means: got shape {tuple(self.class_means.shape)}, expected {expected}")
        _problem.check_device("class_means", self.class_means, self.centroid_logits)
        means = self._own(self.class_means).to(dtype)
        missing = means.sum(dim=1, keepdim=True) == 0
        return means.clamp(min=torch.finfo(dtype).tiny).log().masked_fill(missing, -torch.inf)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        logits = state_dict.get(prefix + "centroid_logits")
        if logits is not None and logits.dim() == 2:
            saved, rest = divmod(len(logits), self.num_classes)
            if saved and not rest and saved != self.options.centroids_per_class:
                errors: list[str] = args[-1]
                errors.append(
                    f"centroids_per_class: got {saved} in the state_dict, {tuple(logits.shape)} centroid_logits for "
                    f"{self.num_classes} classes, expected {self.options.centroids_per_class}"
                )
        if logits is not None:  # those saved earlier have no temperature
            unfitted = torch.zeros_like(self.scores_temperature, device=logits.device)
            state_dict.setdefault(prefix + "scores_temperature", unfitted)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_fitted(present: Tensor) -> None:
    """Raise RuntimeError where the class means are those of no class."""
    _check(present > 0, "class_means: not fitted yet, expected a call of fit_class_means first")


def _check(condition: Tensor, message: str) -> None:
    """Raise RuntimeError unless a condition holds; on other devices than the CPU by a device-side assertion."""
    if condition.device.type != "cpu" or not concrete(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise RuntimeError(message)
