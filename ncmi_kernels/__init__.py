"""NCMI, normalized conditional mutual information (arXiv 2601.02543), as fused PyTorch kernels.

Start with :class:`NCMILoss`, a drop-in criterion, or :func:`ncmi_loss`, the function behind it. With torchmetrics
there is also :class:`NCMIMetric`.
"""

from typing import TYPE_CHECKING, Any

from ncmi_kernels._backends import BackendWarning, available_backends
from ncmi_kernels._watch import DivergenceWarning
from ncmi_kernels.functional import DegenerateMinimumWarning, log_nsf, ncmi_loss, ncmi_terms, nsf
from ncmi_kernels.modules import NCMILoss
from ncmi_kernels.optim import CentroidSGD
from ncmi_kernels.sharded import ShardedNCMILoss

if TYPE_CHECKING:
    from ncmi_kernels.metrics import NCMIMetric as NCMIMetric

__version__ = "0.1.0"

__all__ = [
    "BackendWarning",
    "CentroidSGD",
    "DegenerateMinimumWarning",
    "DivergenceWarning",
    "NCMILoss",
    "ShardedNCMILoss",
    "available_backends",
    "log_nsf",
    "ncmi_loss",
    "ncmi_terms",
    "nsf",
]


def __getattr__(name: str) -> Any:
    # torchmetrics is optional, and takes longer to import than all of this package.
    if name == "NCMIMetric":
        from ncmi_kernels.metrics import NCMIMetric

        return NCMIMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
