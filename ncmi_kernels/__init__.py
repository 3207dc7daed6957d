"""NCMI, normalized conditional mutual information (arXiv 2601.02543), as fused PyTorch kernels.

Start with :class:`NCMILoss`, a drop-in criterion, or :func:`ncmi_loss`, the function behind it.
"""

from ncmi_kernels._backends import BackendWarning, available_backends
from ncmi_kernels.functional import DegenerateMinimumWarning, log_nsf, ncmi_loss, ncmi_terms, nsf
from ncmi_kernels.modules import NCMILoss
from ncmi_kernels.sharded import ShardedNCMILoss

__version__ = "0.1.0"

__all__ = [
    "BackendWarning",
    "DegenerateMinimumWarning",
    "NCMILoss",
    "ShardedNCMILoss",
    "available_backends",
    "log_nsf",
    "ncmi_loss",
    "ncmi_terms",
    "nsf",
]
