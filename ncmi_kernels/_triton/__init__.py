"""The Triton backend. Imported by the first call that asks for it: importing triton takes a while, and may fail."""

from ncmi_kernels._triton import center, centroid_grad, centroid_stats, focus, input_grad, loss, reduce, terms  # noqa: F401
from ncmi_kernels._triton.ops import register

__all__ = ["OPERATORS"]

OPERATORS = register()
