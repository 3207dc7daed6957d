"""Signs that training has failed, seen without making the host wait for a device."""

import math
import warnings

import torch
from torch import Tensor

CUDA_INTERVAL = 16  # batches from one look to the next where a look is a copy and an event


class DivergenceWarning(RuntimeWarning):
    """A training batch had a loss that is not finite, or hardly any separation."""


class Watch:
    """Looks at the means of the terms of one training batch after another; warns once."""

    def __init__(self) -> None:
        self.warned = False
        self._batches = 0
        self._copy: Tensor | None = None  # in pinned memory; there once _event has passed
        self._event: torch.cuda.Event | None = None

    def look(self, means: Tensor, eps: float) -> None:
        """Warn if `means` [2] float64, CMI and Gamma of a batch, or on CUDA those of an earlier batch, tell to."""
        if self.warned:
            return
        if means.device.type == "cpu":
            self._judge(means, eps)
        elif means.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            if self._event is not None and self._event.query():
                assert self._copy is not None
                self._event = None
                self._judge(self._copy, eps)
            if self._event is None and self._batches % CUDA_INTERVAL == 0:
                self._copy = torch.empty_like(means, device="cpu", pin_memory=True)
                self._copy.copy_(means, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
            self._batches += 1

    def _judge(self, means: Tensor, eps: float) -> None:
        concentration, separation = means.tolist()
        if not math.isfinite(concentration + separation):
            trouble = "the loss of a batch is not finite; look at the features and at the learning rate"
        elif separation < 10 * eps:
            trouble = (
                "the separation of a batch is next to nothing, so eps decides the loss; the features or the centroids "
                "of all classes have become alike"
            )
        else:
            return
        self.warned = True
        warnings.warn(
            f"NCMILoss: {trouble} (CMI {concentration:.3g}, Gamma {separation:.3g}, eps {eps:.3g}). "
            "NCMILoss.last_terms has both of the last batch; this warning does not come again.",
            DivergenceWarning,
            stacklevel=7,
        )
