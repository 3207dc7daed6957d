"""The Triton backend. Imported by the first call that asks for it: importing triton takes a while, and may fail."""

from ncmi_kernels._triton.ops import OPERATORS

__all__ = ["OPERATORS"]
