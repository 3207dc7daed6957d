"""What is computed once and kept: one value, for as long as what it comes from stays as it was."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter


class Memo:
    """One value under one key, which tells the state of all that the value comes from.

    A change of a tensor shows in its version counter or memory (:func:`state_of`). The memory is kept alive, so that no
    other tensor gets its address. A copy of a memo, or one that was pickled, is empty.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._value: Any = None
        self._alive: tuple[Tensor, ...] = ()
        self.of: Tensor | None = None  # the first of those that are kept alive

    def keep(self, key: tuple[Any, ...], value: Any, *alive: Tensor) -> None:
        """Keep `value`, and the tensors `alive` with it."""
        self._key, self._value, self._alive, self.of = key, value, alive, alive[0]

    def find(self, key: tuple[Any, ...] | None) -> Any:
        """The value for this key, or None."""
        return self._value if self._key == key else None

    def forget(self) -> None:
        """Drop the value, for changes that no version counter sees."""
        if self._key is not None:
            self._key, self._value, self._alive, self.of = None, None, (), None

    def __reduce__(self) -> Any:
        return Memo, ()


def state_of(*tensors: Tensor) -> tuple[Any, ...]:
    """What an operation on these tensors, or in their place, would change."""
    return tuple((t._version, t.data_ptr(), t.stride(), t.shape, t.dtype) for t in tensors)


def memory_of(*tensors: Tensor) -> list[Tensor]:
    """What keeps the tensors' memory. Of a parameter itself: another tensor of its memory makes it look shared."""
    return [t if isinstance(t, Parameter) else t.detach() for t in tensors]
