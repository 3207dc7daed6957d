"""The optimiser of the centroids: the other half of alternating training."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ncmi_kernels._options import check_positive
from ncmi_kernels._problem import check_batch
from ncmi_kernels._schema import SGD
from ncmi_kernels.modules import NCMILoss


def _no_momentum(logits: Tensor) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode could not be changed outside of it
        return torch.zeros_like(logits, requires_grad=False)


class CentroidSGD(torch.optim.Optimizer):
    r"""SGD on the centroids of an :class:`NCMILoss`, which forms their gradient itself.

    Training alternates (arXiv 2601.02543): a step of the network with the centroids fixed, then a step of the
    centroids with the network fixed. This is the second one; it takes the features of the batch, and no graph:

        >>> import torch
        >>> from ncmi_kernels import CentroidSGD, NCMILoss
        >>> network = torch.nn.Linear(20, 64)
        >>> criterion = NCMILoss(num_classes=10, feature_dim=64)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
        >>> centroid_optimizer = CentroidSGD(criterion, lr=0.1, momentum=0.9)
        >>> input, target = torch.randn(32, 20), torch.randint(10, (32,))
        >>> features = network(input)
        >>> criterion(features, target).backward()
        >>> optimizer.step()
        >>> centroid_optimizer.step(features, target)

    The update is that of :class:`torch.optim.SGD` on the gradient of the loss by `centroid_logits`. Where the compiled
    kernels run it is one pass over [C, M]: each class's gradient is formed, applied and dropped while it is in cache,
    and the statistics that the next forward pass needs of the new centroids come out of the same pass. The centre
    that the criterion has at the moment is used and does not move. What the criterion's forward pass found of the
    same features, at the same centroids and centre, is used again: so step with the features that it had. Step after
    `backward`, which needs the centroids of the forward pass and raises otherwise.

    A batch whose loss is not finite moves nothing, neither by momentum nor by weight decay: one without a row that
    counts, or half-precision features that overflow, as a `torch.amp.GradScaler` skips the network's step.

    The constructor sets `criterion.centroid_logits.requires_grad` to False, so that `backward` forms no gradient that
    nobody takes. Learning-rate schedulers, `state_dict`, torch.distributed.checkpoint and step hooks work as with any
    optimiser. With several
    processes give the criterion their `process_group`: without one, each moves its centroids by its own batches. To
    train the centroids jointly with the network instead, give `criterion.parameters()` to the network's optimiser and
    leave this one out.

    Args:
        criterion: whose centroids; an NCMILoss whose `reduction` is not "none".
        lr: >= 0.
        momentum: >= 0.
        weight_decay: >= 0, an L2 penalty on the centroid logits.
        nesterov: Nesterov momentum; needs `momentum` > 0.
        start_step: calls of `step` that come before this one are counted and do nothing, so that the features form
            around the initial centroids first.

    Raises:
        TypeError, ValueError: an argument is not as above; or `criterion.reduction` is "none".
    """

    criterion: NCMILoss
    # For torch.amp.GradScaler.step: there is no gradient to unscale, and what overflowed moves nothing anyway.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        criterion: NCMILoss,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        start_step: int = 0,
    ) -> None:
        if not isinstance(criterion, NCMILoss):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected an NCMILoss")
        if nesterov and momentum == 0:
            raise ValueError("momentum: got 0 with nesterov=True, expected a number > 0")
        if not isinstance(start_step, Integral) or isinstance(start_step, bool):
            raise TypeError(f"start_step: got {start_step!r}, expected an integer >= 0")
        if start_step < 0:
            raise ValueError(f"start_step: got {start_step!r}, expected an integer >= 0")
        self.criterion = criterion
        defaults = {
            "lr": check_positive("lr", lr, zero=True),
            "momentum": check_positive("momentum", momentum, zero=True),
            "weight_decay": check_positive("weight_decay", weight_decay, zero=True),
            "nesterov": nesterov,
            "start_step": int(start_step),
        }
        logits = criterion._expect_steps()
        super().__init__([logits], defaults)
        # All there will be, so that torch.distributed.checkpoint finds in a new optimiser what it has to load.
        self.state[logits] = {"step": 0}
        if momentum:
            self.state[logits]["momentum_buffer"] = _no_momentum(logits)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the group of the centroids; there can be no other one."""
        if self.param_groups:
            raise ValueError("param_group: got a second group, expected only that of the criterion's centroids")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser, but that all is in the one param group, and `state` is empty.

        From `state`, torch.distributed.checkpoint drops what belongs to a parameter that requires no gradient.
        """
        result = super().state_dict()
        (group,) = result["param_groups"]
        group.update(result["state"].pop(group["params"][0], {}))
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: it is the state of another optimiser, or of other centroids.
        """
        # States saved earlier have in `state`, as other optimisers do, what stands in the param group now.
        states = state_dict.get("state", {})
        groups = [dict(group) for group in state_dict.get("param_groups", ())]
        for group in groups:
            for parameter in group["params"]:
                group.update(states.get(parameter, {}))
        missing = [name for group in groups for name in (*self.defaults, "step") if name not in group]
        if len(groups) != 1 or missing:
            without = f" without {', '.join(missing)}" if missing else ""
            raise ValueError(f"state_dict: got that of another optimiser{without}, expected that of a CentroidSGD")
        (group,) = groups
        state = {name: group.pop(name) for name in ("step", "momentum_buffer") if name in group}
        (logits,), buffer = self.param_groups[0]["params"], state.get("momentum_buffer")
        if buffer is not None and buffer.shape != logits.shape:
            raise ValueError(
                f"state_dict: got a momentum_buffer of shape {tuple(buffer.shape)}, expected {tuple(logits.shape)}"
            )
        super().load_state_dict({"state": {group["params"][0]: state}, "param_groups": [group]})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "criterion": self.criterion}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        features: Tensor | Callable[[], Any] | None = None,
        target: Tensor | None = None,
        *,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Move the centroids against the gradient of the loss of a batch.

        Without a batch, as frameworks call `step`, it is that of the criterion's last forward pass in training mode:
        of accumulated gradients the last micro-batch. A batch is kept from one such pass to the next.

        Args:
            features: [B, M], [M] or [B, M, d1, ...], as given to the criterion; their graph is not used.
            target: [B], [] or [B, d1, ...], class indices.
            closure: called first, with gradients enabled, as that of any optimiser; may be the only argument.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: one of `features` and `target` without the other.
            RuntimeError: `criterion.centroid_logits` was replaced by another parameter; or there is no batch, neither
                given nor from a forward pass since this optimiser was made (or the criterion was copied).
            TypeError, ValueError, IndexError, RuntimeError: as :func:`ncmi_loss`; the centroids have not moved then.
        """
        (group,) = self.param_groups
        (logits,) = group["params"]
        if logits is not self.criterion.centroid_logits:
            raise RuntimeError("criterion: its centroid_logits is another parameter now, expected a new CentroidSGD")
        self.criterion._check_one_loss()
        result = None
        if callable(features):
            features, closure = None, features
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if features is None and target is None:
            if self.criterion._last_batch is None:
                raise RuntimeError(
                    "features: got none, and the criterion has had no forward pass in training mode since this "
                    "optimiser was made; expected one before step(), or step(features, target)"
                )
            features, target = self.criterion._last_batch
        if features is None or target is None:
            missing = "features" if features is None else "target"
            raise TypeError(f"{missing}: got None, expected step(features, target) with both, or neither")
        state = self.state[logits]
        count = state.get("step", 0)
        check_batch(features, target, logits)
        if count >= group["start_step"]:
            buffer = state.get("momentum_buffer")
            moved_on = buffer is not None and (buffer.dtype, buffer.device) != (logits.dtype, logits.device)
            if moved_on and count == group["start_step"]:
                buffer = None  # the criterion has moved before the first step: nothing is lost
            elif moved_on:
                raise RuntimeError(
                    f"momentum_buffer: got {buffer.dtype} on {buffer.device}, expected {logits.dtype} on "
                    f"{logits.device} as the centroids: load its state_dict again after moving the criterion"
                )
            if buffer is None and group["momentum"] != 0:
                buffer = _no_momentum(logits)
            sgd = SGD(float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])
            self.criterion._step_(features, target, buffer if sgd.momentum else None, sgd)
            if buffer is not None:
                state["momentum_buffer"] = buffer
        state["step"] = count + 1
        return result
