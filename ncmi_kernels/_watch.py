"""Signs that training has failed, seen without making the host wait for a device."""

import math
import warnings

import torch
from torch import Tensor

from ncmi_kernels._options import Options

CUDA_INTERVAL = 16  # batches from one look to the next where a look is a copy and an event


class DivergenceWarning(RuntimeWarning):
    """A training batch had a loss that is not finite, or hardly any separation."""


def _is_trouble(concentration: float, separation: float, options: Options) -> bool:
    return not math.isfinite(concentration + separation) or separation < 10 * options.eps


class Watch:
    """Looks at the means of the terms of one training batch after another; warns once."""

    def __init__(self) -> None:
        self.warned = False
        self._batches = 0
        self._copy: Tensor | None = None  # in pinned memory; there once _event has passed
        self._event: torch.cuda.Event | None = None

    def look(self, means: Tensor, options: Options, target: Tensor) -> None:
        """Warn if `means` [2] float64, CMI and Gamma of a batch, or on CUDA those of an earlier batch, tell to.

        Without a target that counts they are NaN, which is no trouble.
        """
        if self.warned:
            return
        if means.is_cpu:
            concentration, separation = means.tolist()
            if _is_trouble(concentration, separation, options) and (target.long() != options.ignore_index).any():
                self._warn(concentration, separation, options.eps)
        elif means.is_cuda and not torch.cuda.is_current_stream_capturing():
            if self._event is not None and self._event.query():
                assert self._copy is not None
                self._event = None
                concentration, separation, counts = self._copy.tolist()
                if _is_trouble(concentration, separation, options) and counts:
                    self._warn(concentration, separation, options.eps)
            if self._event is None and self._batches % CUDA_INTERVAL == 0:
                counts_too = torch.cat([means, (target.long() != options.ignore_index).any().double().view(1)])
                self._copy = torch.empty_like(counts_too, device="cpu", pin_memory=True)
                self._copy.copy_(counts_too, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
            self._batches += 1

    def _warn(self, concentration: float, separation: float, eps: float) -> None:
        if math.isfinite(concentration + separation):
            trouble = (
                "the separation of a batch is next to nothing, so eps decides the loss; the features or the centroids "
                "of all classes have become alike"
            )
        else:
            trouble = "the loss of a batch is not finite; look at the features and at the learning rate"
        self.warned = True
        warnings.warn(
            f"NCMILoss: {trouble} (CMI {concentration:.3g}, Gamma {separation:.3g}, eps {eps:.3g}). "
            "NCMILoss.last_terms has both of the last batch; this warning does not come again.",
            DivergenceWarning,
            stacklevel=7,
        )
