"""The criterion: centroids, priors, what is kept of them, the steps that they take."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncmi_kernels import _backends, _loss, _problem, _terms, functional
from ncmi_kernels._center import Centering
from ncmi_kernels._group import Group
from ncmi_kernels._memo import Memo, memory_of, state_of
from ncmi_kernels._modes import concrete, forward_mode, jit_tracing, transforming
from ncmi_kernels._options import OPTION_NAMES, Options, check_choice, check_count, check_fraction
from ncmi_kernels._plain import Found
from ncmi_kernels._problem import problem_of
from ncmi_kernels._schema import SGD
from ncmi_kernels._watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

INITIAL_LOGIT = 10.0


def _holders(tensor: Tensor) -> int:
    """How many hold a tensor's memory: one more for each other tensor that shares it."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ONE_HOLDER = _holders(torch.empty(1))


class BatchTerms(NamedTuple):
    """What the loss of a batch is made of: weighted means over its samples, scalars in float64, in nats."""

    cmi: Tensor  # of the concentration
    gamma: Tensor  # of the separation


class NCMILoss(Centering):
    """NCMI as a criterion (arXiv 2601.02543): what `nn.CrossEntropyLoss` is to cross_entropy.

    Holds the centroids, one for each class or several, and a running centre of the features. The loss is
    :func:`ncmi_loss`; here are the state and the prediction. `feature_dim=None` is the drop-in case: the features are
    the C logits.

    Args:
        num_classes: C >= 2.
        feature_dim: M >= 2, the size of the features; None for `num_classes`.
        temperature: divides the features; > 0.
        center_momentum: in [0, 1], of the running centre; None for no centring.
        l2_normalize: divide the centred features by their length.
        activation: "nsf" or "softmax".
        separation: "sample_to_centroid" or "centroid_to_sample".
        ratio: "batch", "sample" or "soft_margin".
        learn_centroids: whether `centroid_logits` requires a gradient. Fixed centroids cost nothing: what the
            loss needs of them is computed once (again after a change, or a call of `train` or `eval`).
        weight: [C] class weights, or None.
        ignore_index: samples with this target count for nothing, in the centre too.
        reduction: "mean", and but for ratio "batch" also "sum" and "none".
        eps: added to the separation; > 0.
        separation_focus: >= 0; above 0 near classes count for more in the separation (:func:`ncmi_loss`). 10 trains
            better where there are many classes, with `learn_centroids`.
        sharpness: of ratio "soft_margin"; > 0.
        class_prior: [C], how often each class occurs, numbers >= 0 of sum 1, for long-tailed data; None for 1 / C.
        centroids_per_class: K >= 1 (:func:`ncmi_loss`). A sample is predicted as the class of its nearest centroid.
        centroid_focus: >= 0; of several centroids, how much a sample belongs to the nearest one of its class.
        backend: None, "cpu", "cuda", "triton" or "reference".
        process_group: a `torch.distributed.ProcessGroup` whose processes share the loss in training mode, each with a
            batch of its own; None for this process alone. See below.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers; a floating dtype.

    Attributes:
        centroid_logits: Parameter [C K, M], those of a class adjacent; the centroids are its NSF. Initially 10 times
            one-hot rows, or for M < C K random directions of length 10 (from torch's global generator).
        center: buffer [M]. In training mode each forward moves it before it is used: the first batch sets it to
            its mean, later ones to `center_momentum * center + (1 - center_momentum) * mean`. A batch whose mean
            is not finite leaves it alone. So does a forward pass that torch.utils.checkpoint repeats, and one with
            gradients disabled (`torch.no_grad`, `torch.inference_mode`), as evaluation loops have them: to move it
            there, call the criterion within `torch.enable_grad()`.
        last_terms: CMI and Gamma of the last batch. In training mode, but for compiled calls, a `DivergenceWarning`
            comes once if the loss of a batch is not finite or Gamma falls under 10 `eps`.
        class_means: buffer [C, M], the mean distribution of each class; zeros until `fit_class_means` is called.
        scores_temperature: buffer [2], the temperatures of the scores by centroids and by class means; 0 until
            `fit_temperature` is called.

    Note:
        Accumulating gradients: with ratio "sample" the mean of the losses of k micro-batches is the loss of the
        whole batch, at one centre and for micro-batches of equal weight (for others: reduction "sum", divided by the
        weight of the whole batch). With ratio "batch" it is a mean of k ratios, which is not the ratio of the whole
        batch: each micro-batch is held to its own concentration and separation. The centre moves at each one.

        torch.utils.checkpoint around the criterion: use_reentrant=True, which disables gradients first, moves the
        centre in the backward pass. So the gradient is right, but the loss is that at the centre before the batch.
        use_reentrant=False needs no care, but with backend "reference" nothing may move the centre between a forward
        pass and its backward pass. With torch.compile, compile what has the checkpoint in it: within an eager
        checkpoint a compiled criterion moves the centre twice.

        Transforms of torch.func need `eval()` (or center_momentum=None) and raise a RuntimeError otherwise.

        Mixup and cutmix: with ratio "sample" or "soft_margin" `target` may be class probabilities of at most two
        classes a sample, [B, C], [C] or [B, C, d1, ...] of a floating dtype, not differentiated. The loss of a sample
        is the sum of those of its classes, by their probabilities; of one-hot rows it is that of the indices. Costs
        what twice as many samples do. In `last_terms` both classes count alike. Not for `CentroidSGD` and
        `ShardedNCMILoss`, and with a `process_group` for reduction "none" only.

    Shape:
        input [B, M], [M] or [B, M, d1, ...]; target [B], [] or [B, d1, ...]; output a scalar, or for reduction "none"
        a loss for each sample, of the shape of class indices.

    With a `process_group`, as in training under DistributedDataParallel:
        Every process calls the criterion, on a batch that may be smaller than the others' or empty. In training mode
        the centre moves to the mean of all rows, and the loss, the same number on every process, is that of all rows
        in one batch. The gradients are multiplied by the number of processes: averaged, as DistributedDataParallel
        does, they are those of one process with all rows. `DistributedDataParallel(criterion)` does it for learnt
        centroids. With reduction "none" only the centre is shared: the losses and their gradients are those of the
        process's own rows, not multiplied. In eval mode nothing is communicated, as in SyncBatchNorm. Gradients are
        enabled on all processes or on none. A process that fails or hangs is torch.distributed's error in the others,
        after its timeout. Double backward, forward mode and torch.func are refused. Deep copies share the group; a
        state_dict does not contain it; pickling raises RuntimeError.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`ncmi_loss`. Of `process_group`: TypeError where it
            is something else, ValueError where this process is not a member, RuntimeError where torch.distributed is
            missing or not initialized.

    Example:
        >>> import torch
        >>> from ncmi_kernels import NCMILoss
        >>> criterion = NCMILoss(num_classes=10, feature_dim=64)
        >>> features = torch.randn(32, 64, requires_grad=True)
        >>> criterion(features, torch.randint(10, (32,))).backward()
        >>> criterion.predict(features).shape
        torch.Size([32])
    """

    weight: Tensor | None
    class_prior: Tensor | None
    # DistributedDataParallel(criterion) would send them from process 0 at every forward pass.
    _ddp_params_and_buffers_to_ignore = ("class_means",)

    def __init__(
        self,
        num_classes: int,
        feature_dim: int | None = None,
        *,
        temperature: float = 1.0,
        center_momentum: float | None = 0.999999,
        l2_normalize: bool = True,
        activation: str = "nsf",
        separation: str = "sample_to_centroid",
        ratio: str = "batch",
        learn_centroids: bool = True,
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
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options = Options(
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
        functional.warn_if_degenerate(self.options)
        self.num_classes = check_count("num_classes", num_classes, least=2)
        self.feature_dim = num_classes if feature_dim is None else check_count("feature_dim", feature_dim, least=2)
        self.center_momentum = center_momentum
        if not isinstance(learn_centroids, bool):
            raise TypeError(f"learn_centroids: got {learn_centroids!r}, expected True or False")
        if backend is not None:
            check_choice("backend", backend, _backends.BACKENDS)
        self.backend = backend
        self._group = None if process_group is None else Group(process_group)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: got {dtype!r}, expected a floating torch.dtype")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype")

        self.centroid_logits = nn.Parameter(self._new_centroids(device, dtype), requires_grad=learn_centroids)
        self.register_buffer("center", torch.zeros(self.feature_dim, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.int64))
        for name, vector in (("weight", weight), ("class_prior", class_prior)):
            if vector is not None:
                _problem.check_floating(name, vector)
                device_of = self.center if vector.is_meta else vector  # of a meta tensor there is nothing to copy
                _problem.check_vector(name, vector, self.num_classes, device_of)
                _problem.check_constant(name, vector)
                vector = vector.detach().to(device=self.center.device, dtype=dtype, copy=True)
            self.register_buffer(name, vector)
        # There from the start: software that loads by key asks a new module for its keys.
        self.register_buffer("class_means", self._new_class_means(device, dtype))
        self.register_buffer("scores_temperature", torch.zeros(2, device=device, dtype=dtype))
        self._table = Memo()  # of fixed centroids
        self._prior = Memo()  # as the loss takes it
        self._last_terms: Tensor | None = None
        self._keeps_rows = False  # for steps of the centroids
        self._last_batch: tuple[Tensor, Tensor] | None = None  # in training mode, for steps that are given none
        self._last_result = Memo()  # with its rows
        self._watch = Watch()
        self._class_prior(self.center)
        self.reset_parameters()

    @classmethod
    def from_authors(cls, num_classes: int, feature_dim: int | None = None, **options: Any) -> "Self":
        """A criterion with the settings of the authors' best run on CIFAR-100 (github.com/Linfeng-Ye/NCMI).

        `separation="centroid_to_sample"`, `ratio="sample"`, `temperature=0.2`, `center_momentum=0.999999` (the default
        of their script is 0.9999), and fixed centroids, as theirs in effect are. They train the network by SGD with a
        rate of 0.1 and momentum 0.9. The defaults of this class trained better in shorter runs.

        Args:
            num_classes: as of the class, as all others are.
            feature_dim: M >= C for their initial centroids, one-hot rows.
            options: in place of the authors'.

        Raises:
            TypeError, ValueError: as of the class.

        Example:
            >>> from ncmi_kernels import NCMILoss
            >>> NCMILoss.from_authors(num_classes=100, feature_dim=512)
            NCMILoss(num_classes=100, feature_dim=512, temperature=0.2, separation='centroid_to_sample', ratio='sample')
        """
        settings: dict[str, Any] = {
            "temperature": 0.2,
            "center_momentum": 0.999999,
            "separation": "centroid_to_sample",
            "ratio": "sample",
            "learn_centroids": False,
        }
        return cls(num_classes, feature_dim, **settings | options)

    @torch.no_grad()
    def load_authors_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the centre and the class means of a checkpoint of the authors' code, for `predict(class_means=True)`.

        What they save of the centroids are the class means that they evaluate with, as distributions; those of the
        loss are not in it. Their evaluation forms them of features of L1 length one, by a slip, and compares them with
        features of L2 length one: predictions are theirs, and `fit_class_means` gives the better ones of the paper.

        Args:
            checkpoint: what `torch.load` gives of it; "center_dict" and "centroid" are used.

        Raises:
            ValueError: these are missing or do not fit. Nothing has changed then.
        """
        try:
            center, means = checkpoint["center_dict"]["Center"], checkpoint["centroid"]["centroids"]
            center, means = center.to(self.center).flatten(), means.to(self.class_means)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                "checkpoint: got none of the authors' code, expected one with ['center_dict']['Center'] and "
                f"['centroid']['centroids'] ({error!r})"
            ) from error
        if center.shape != self.center.shape or means.shape != self.class_means.shape:
            raise ValueError(
                f"checkpoint: got a centre {tuple(center.shape)} and centroids {tuple(means.shape)}, expected "
                f"{tuple(self.center.shape)} and {tuple(self.class_means.shape)}"
            )
        self.center.copy_(center)
        self.num_batches_tracked.fill_(1)
        self.class_means.copy_(means)
        self._forget_temperature()

    def reset_parameters(self) -> None:
        """Set the centroids and the centre to their initial values and forget what was fitted."""
        with torch.no_grad():
            self._reset_centroids()
            self.center.zero_()
            self.num_batches_tracked.zero_()
            self.class_means.zero_()
            self.scores_temperature.zero_()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features [B, M] (or [M], [B, M, d1, ...]) for targets [B] (or [], [B, d1, ...]).

        Targets of mixup and cutmix, class probabilities [B, C] (or [C], [B, C, d1, ...]): see the class.
        """
        options, shares = self.options, None
        if _problem.is_mixed(input, target):
            shape = input.shape
            input, target, shares = self._mixed(input, target)
            options = replace(options, reduction="none")
        logits = self._whole_centroids()
        _problem.check_batch(input, target, logits)
        center, weight, prior = self._buffers_for(logits)
        backend = _backends.resolve(self.backend, input)
        center, update, moved = self._center_for(center, input, target, logits, backend)
        if logits.requires_grad:
            table = None
            self._table.forget()  # fused optimisers move no version counter
        else:
            table = self._fixed_table(input, logits, backend)
        group = self._group if self.training and options.reduction != "none" else None
        problem = problem_of(input, target, logits, center, weight, options, backend, table, group, update, prior)
        found = _loss.loss(*problem, with_rows=self._keeps_rows)
        if moved is not None:
            self._commit_center(moved)
        self._keep(found, input, target, backend, group)
        loss = found.loss
        if shares is not None:
            return self._by_shares(loss, target, shares, shape)
        return loss.reshape(target.shape) if options.reduction == "none" else loss

    def _mixed(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of two classes as twice as many of one: features [2 N, M], classes [2 N] and their shares [2 N]."""
        if self.options.batch_ratio:
            raise RuntimeError(
                f"target: got dtype {target.dtype} with ratio='batch', expected torch.int64 class indices: the ratio "
                "of a batch is not linear in class probabilities, as ratio='sample' and 'soft_margin' are"
            )
        ignored, reduction = self.options.ignore_index, self.options.reduction
        if 0 <= ignored < self.num_classes:
            raise ValueError(f"ignore_index: got the class {ignored} with class probabilities, expected none of them")
        if self._group is not None and reduction != "none":
            raise RuntimeError(
                f"target: got class probabilities with a process_group and reduction {reduction!r}, expected "
                "reduction='none' and its mean"
            )
        if self._keeps_rows and self.training:
            raise RuntimeError(
                "target: got class probabilities with a CentroidSGD, which takes class indices; expected "
                "criterion.parameters() in an optimiser, or fixed centroids"
            )
        rows, classes, shares = _problem.mixed(input, target, self.num_classes, self.feature_dim)
        return rows.repeat(2, 1), classes, shares

    def _by_shares(self, losses: Tensor, classes: Tensor, shares: Tensor, shape: torch.Size) -> Tensor:
        """The loss of mixed features of a shape, reduced, from those [2 N] of either class."""
        shares = shares.to(losses.dtype)
        each = (shares * losses).view(2, -1).sum(dim=0)
        if self.options.reduction == "none":
            return each.reshape(shape[:1] + shape[2:] if len(shape) > 1 else ())
        if self.options.reduction == "sum":
            return each.sum()
        return each.sum() / (shares if self.weight is None else shares * self.weight[classes]).sum()

    @property
    def last_terms(self) -> BatchTerms | None:
        """CMI and Gamma of the last batch, `forward` in either mode; None before the first one.

        A named tuple of two scalars, `cmi` and `gamma`, float64, in nats: weighted means over the batch. On the device
        of the input, without a graph and without waiting for it. Kept by compiled calls too, but not by those within a
        transform of torch.func.
        """
        return None if self._last_terms is None else BatchTerms(*self._last_terms)

    def _keep(self, found: Found, input: Tensor, target: Tensor, backend: str, group: Group | None) -> None:
        """Keep what is known of a batch: for `last_terms`, and for the step of the centroids."""
        means = found.means
        if means is None or transforming() or forward_mode() or jit_tracing():
            return  # the tensors would outlive the transform
        # Where gradients are disabled it may be of a validation set; the centre stays there as well.
        learns = self._keeps_rows and self.training and torch.is_grad_enabled()
        if learns and not torch.compiler.is_exporting():
            self._last_batch = input.detach(), target
        if not concrete(means):
            if not torch.compiler.is_exporting():
                self._last_terms = means
                self._last_result.forget()
            return
        self.__dict__["_last_terms"] = means  # past Module.__setattr__, which takes a microsecond
        if self._keeps_rows:
            self._last_result.forget()
        if self._keeps_rows and found.rows is not None:
            tensors = self._tensors_of_rows(input, target)
            key = self._key_of_rows(tensors, backend, group)
            if key is not None:
                known = Found(means, means, found.rows)  # without the loss, which has a graph
                self._last_result.keep(key, known, *memory_of(*tensors))
        if self.training:
            self._watch.look(means, self.options, target)

    def _tensors_of_rows(self, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        own = (self._tensor(name) for name in ("centroid_logits", "center", "weight", "class_prior"))
        return tuple(t for t in (input, target, *own) if t is not None)

    def _key_of_rows(self, tensors: tuple[Tensor, ...], backend: str, group: Group | None) -> tuple[Any, ...] | None:
        if any(t.is_inference() or not concrete(t) for t in tensors):
            return None  # no version counter would tell of a change
        return state_of(*tensors), self.options, self.center_momentum is None, backend, group

    def _known(self, input: Tensor, target: Tensor, backend: str) -> Found | None:
        """What the last forward pass gave, if it had this batch and nothing moved since.

        The operators move no version counter of the centre; but what moves it is a forward pass, which is the last one.
        """
        key = self._key_of_rows(self._tensors_of_rows(input, target), backend, self._group)
        known: Found | None = self._last_result.find(key)
        return known

    def _forget(self) -> None:
        """Drop what was computed of the centroids and kept, for changes that no version counter sees."""
        self._table.forget()
        self._prior.forget()
        self._last_result.forget()

    @property
    def center_momentum(self) -> float | None:
        """In [0, 1], of the running centre, or None; assigning checks it."""
        return self._center_momentum

    @center_momentum.setter
    def center_momentum(self, value: float | None) -> None:
        self._center_momentum = None if value is None else check_fraction("center_momentum", value)

    @property
    def process_group(self) -> Any:
        """The processes that share the loss, or None; assigning checks it."""
        return None if self._group is None else self._group.process_group

    @process_group.setter
    def process_group(self, value: Any) -> None:
        self._group = None if value is None else Group(value)

    @torch.no_grad()
    def centroid_gradient(self, features: Tensor, target: Tensor) -> Tensor:
        """The gradient of the loss by `centroid_logits` at the present centre, which does not move.

        What `backward` would add to `centroid_logits.grad`, without a graph and whether or not the parameter requires
        a gradient. With a `process_group`, in either mode, the gradient of the loss of all processes' rows, on each of
        them and not multiplied by their number.

        Args:
            features: as `input` of `forward`.
            target: class indices, as in `forward`.

        Returns:
            [C K, M], in the dtype of `centroid_logits`.

        Raises:
            ValueError: `reduction` is "none", which gives more than one loss.
            TypeError, ValueError, IndexError, RuntimeError: as :func:`ncmi_loss`.
        """
        self._check_one_loss()
        return self._step_gradient(features, target)[0]

    def _step_gradient(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`centroid_gradient`, and the means of the terms [2]: NaN where no row counts."""
        logits = self._whole_centroids()
        _problem.check_batch(features, target, logits)
        center, weight, prior = self._buffers_for(logits)
        backend = _backends.resolve(self.backend, features)
        table = None if logits.requires_grad else self._fixed_table(features, logits, backend)
        known = self._known(features, target, backend)
        self._forget()  # what comes now is a step, perhaps of a fused optimiser, which moves no version counter
        problem = problem_of(
            features, target, logits, center, weight, self.options, backend, table, self._group, None, prior
        )
        grad, means = _loss.centroid_gradient(*problem, known)
        return grad.to(logits.dtype), means

    def extra_repr(self) -> str:
        """The settings that are not at their defaults, after the sizes."""
        changed = [
            f"{name}={getattr(self.options, name)!r}"
            for name in OPTION_NAMES
            if getattr(self.options, name) != getattr(_MODULE_DEFAULTS, name)
        ]
        if self.center_momentum != 0.999999:
            changed.append(f"center_momentum={self.center_momentum!r}")
        if self.backend is not None:
            changed.append(f"backend={self.backend!r}")
        if self._group is not None:
            changed.append(f"process_group of {self._group.size}")
        return ", ".join([f"num_classes={self.num_classes}, feature_dim={self.feature_dim}", *changed])

    # --------------------------------------------------------------------------------------------------------

    def _whole_centroids(self) -> Tensor:
        """The centroid logits; raises RuntimeError where only a part of them is here."""
        logits = self._tensor("centroid_logits")
        if type(logits) is not nn.Parameter:
            remedy = "keep the criterion outside of fully_shard and distribute_module, or use ShardedNCMILoss"
            _problem.refuse_dtensor("centroid_logits", logits, remedy)
        return logits

    def _new_centroids(self, device: Any, dtype: torch.dtype) -> Tensor:
        rows = self.num_classes * self.options.centroids_per_class
        return torch.empty(rows, self.feature_dim, device=device, dtype=dtype)

    def _new_class_means(self, device: Any, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.num_classes, self.feature_dim, device=device, dtype=dtype)

    def _reset_centroids(self) -> None:
        if self.feature_dim >= len(self.centroid_logits):
            self.centroid_logits.zero_().fill_diagonal_(INITIAL_LOGIT)
        else:
            # Fewer dimensions than centroids: random directions are nearly orthogonal in many of them.
            self.centroid_logits.copy_(INITIAL_LOGIT * F.normalize(self.centroid_logits.normal_(), dim=1))

    def _buffers_for(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The running centre, None without centring, class weights and priors; raises for what was assigned amiss."""
        center = None if self._center_momentum is None else self._tensor("center")
        weight = self._tensor("weight")
        if center is not None:
            _problem.check_vector("center", center, self.feature_dim, logits)
        if weight is not None:
            _problem.check_vector("weight", weight, self.num_classes, logits)
            _problem.check_constant("weight", weight)
        return center, weight, self._class_prior(logits)

    def _class_prior(self, like: Tensor) -> Tensor | None:
        """The class priors as the loss takes them, found once for as long as they stay."""
        prior = self._tensor("class_prior")
        if prior is None:
            return None
        if torch.compiler.is_compiling() or transforming() or not concrete(prior) or prior.is_inference():
            return _problem.prior_of(prior, self.num_classes, like)
        key = state_of(prior), prior.requires_grad, self.num_classes, like.device
        found: Tensor | None = self._prior.find(key)
        if found is None:
            with torch.inference_mode(False):  # a graph could not save what was made in it
                found = _problem.prior_of(prior, self.num_classes, like)
            self._prior.keep(key, found, *memory_of(prior))
        return found

    def _fixed_table(self, input: Tensor, logits: Tensor, backend: str) -> Any:
        """The table of fixed centroids, kept for as long as they stay; None where it has to be computed.

        Every in-place operation, optimiser step and load_state_dict moves the version counter. What moves none:

        - fused optimisers. They need a gradient: while there is one nothing is kept, and what gives one drops the
          table, a forward pass with centroids that require it and `centroid_gradient`.
        - other tensors of the same memory, as `torch.nn.utils.vector_to_parameters` makes, and other processes after
          `share_memory`. Nothing is kept while there are any. (Those of the priors' memory are not looked for.)
        - writing through `.data` later, NumPy or a bare collective of torch.distributed, here as in autograd: `train()`
          and `eval()` drop the table for that.
        """
        options = self.options
        prior = self._tensor("class_prior")
        # A traced read would be guarded on versions, which tensors of inference mode do not have.
        if torch.compiler.is_compiling() or (prior is not None and prior.is_inference()):
            return None
        table = self._table.find(self._key_of_table(logits, backend)) if self._table.of is logits else None
        if (
            table is not None
            and (input.dtype is not torch.float64 or logits.dtype is torch.float64)
            and logits.grad is None
        ):
            return table
        self._table.forget()
        if (
            transforming()
            or backend == "reference"
            or type(logits) is not nn.Parameter
            or hasattr(type(self), "unshard")  # FSDP2 renews the parameter's memory behind its version counter
            or logits.is_inference()
            or not (concrete(logits) and concrete(input))
            or logits.dtype not in (torch.float32, torch.float64)
            or (input.dtype == torch.float64 and logits.dtype != torch.float64)
            or logits.grad is not None
            or _holders(logits) > _ONE_HOLDER
            or (logits.is_cpu and logits.is_shared())
        ):
            return None
        with torch.inference_mode(False):  # a graph could not save what was made in it
            table = _terms.way_of(options).table_of(logits, options, backend, self._class_prior(logits))
        self._keep_table(table, backend)
        return table

    def _key_of_table(self, logits: Tensor, backend: str) -> tuple[Any, ...]:
        prior = self._tensor("class_prior")
        of_prior = None if prior is None else state_of(prior)
        return logits._version, logits.data_ptr(), logits.stride(), logits.dtype, of_prior, self.options, backend

    def _keep_table(self, table: Any, backend: str) -> None:
        """Keep the table of the centroids as they are now."""
        logits, prior = self._tensor("centroid_logits"), self._tensor("class_prior")
        alive = logits, logits.detach(), *memory_of(*([] if prior is None else [prior]))
        self._table.keep(self._key_of_table(logits, backend), table, *alive)

    def _check_one_loss(self) -> None:
        if self.options.reduction == "none":
            raise ValueError("reduction: got 'none', expected 'mean' or 'sum' where the centroids take a step")

    # For CentroidSGD.

    def _expect_steps(self) -> nn.Parameter:
        """The centroids, which need no gradient from now on; forward passes keep what a step can use again."""
        self._check_one_loss()
        self._keeps_rows = True
        self.centroid_logits.requires_grad_(False)
        return self.centroid_logits

    def _step_(self, features: Tensor, target: Tensor, momentum_buffer: Tensor | None, sgd: SGD) -> None:
        """Move the centroids by a step of SGD, in one pass with their table where that can be."""
        logits = self._tensor("centroid_logits")
        if not self._step_in_one_pass_(logits, features, target, momentum_buffer, sgd):
            grad, means = self._step_gradient(features, target)
            _loss.sgd_(logits, grad, means, momentum_buffer, sgd)

    def _step_in_one_pass_(
        self, logits: Tensor, features: Tensor, target: Tensor, momentum_buffer: Tensor | None, sgd: SGD
    ) -> bool:
        """Whether that can be; then it is done."""
        backend = _backends.resolve(self.backend, features)
        for written in (logits, momentum_buffer):
            if written is not None and not written.is_contiguous():
                return False
        if self._group is not None or self.options.centroids_per_class > 1:
            return False
        table = self._fixed_table(features, logits, backend)
        if table is None:
            return False
        center, weight, prior = self._buffers_for(logits)
        rows, _, problem = problem_of(
            features, target, logits, center, weight, self.options, backend, table, class_prior=prior
        )
        known = self._known(features, target, backend)
        self._keep_table(_loss.centroid_step_(rows, logits, problem, known, momentum_buffer, sgd), backend)
        return True

    def train(self, mode: bool = True) -> "NCMILoss":
        """As `nn.Module.train`; also forgets what was computed of fixed centroids."""
        self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_terms": None, "_last_batch": None, "_watch": Watch()}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)


def _option_property(name: str) -> property:
    def get(self: NCMILoss) -> Any:
        return getattr(self.options, name)

    def set_(self: NCMILoss, value: Any) -> None:
        if name == "centroids_per_class":
            raise AttributeError(f"{name}: got an assignment, expected none: the centroids were made for it")
        self.options = Options(**{field: getattr(self.options, field) for field in OPTION_NAMES} | {name: value})
        functional.warn_if_degenerate(self.options)

    return property(get, set_, doc=f"The option {name}; assigning checks it.")


for _name in OPTION_NAMES:
    setattr(NCMILoss, _name, _option_property(_name))

_MODULE_DEFAULTS = Options(l2_normalize=True)
