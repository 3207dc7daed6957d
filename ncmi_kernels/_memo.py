"""What is computed once and kept: one value, for as long as what it comes from stays as it was."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter


class Memo:
    """One value, with the state of the tensors and the settings that it was computed from.

    A change shows in a tensor's version counter or memory. The memory is kept alive, so that no other tensor gets its
    address; of a parameter the parameter itself, as another tensor of its memory would make it look shared. A copy, or
    one that was pickled, is empty.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: tuple[Any, ...] | None = None

    def keep(self, value: Any, tensors: tuple[Tensor, ...], settings: tuple[Any, ...], *alive: Tensor) -> None:
        """Keep `value`, and `alive` with it."""
        held = [t if isinstance(t, Parameter) else t.detach() for t in tensors]
        states = [(t._version, t.data_ptr(), t.stride(), t.shape, t.dtype) for t in tensors]
        self._entry = states, settings, value, held, alive

    def find(self, tensors: tuple[Tensor, ...], settings: tuple[Any, ...]) -> Any:
        """The value for these, or None."""
        entry = self._entry
        if entry is None or entry[1] != settings or len(entry[0]) != len(tensors):
            return None
        for state, t in zip(entry[0], tensors, strict=False):  # as in `keep`
            if state != (t._version, t.data_ptr(), t.stride(), t.shape, t.dtype):
                return None
        return entry[2]

    def forget(self) -> None:
        """Drop the value, for changes that no version counter sees."""
        if self._entry is not None:
            self._entry = None

    def __reduce__(self) -> Any:
        return Memo, ()
