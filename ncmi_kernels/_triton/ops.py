"""The registry of the operators.

Called directly in eager mode; under torch.compile through the dispatcher, as opaque operators of a namespace of their
own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.library import Library

from ncmi_kernels import _schema

NAMESPACE = "ncmi_kernels_triton"
F = TypeVar("F", bound=Callable[..., Any])

_functions: dict[str, Callable[..., Any]] = {}
_libraries: list[Library] = []  # a registration lasts as long as its library


def operator(function: F) -> F:
    """Mark what checks, allocates and launches, under the name that its operator is declared with."""
    _functions[function.__name__] = function
    return function


def register() -> _schema.Operators:
    """Every operator that is declared, once all of them are marked."""
    _schema.define(NAMESPACE)
    library = Library(NAMESPACE, "IMPL")
    _libraries.append(library)
    for name in _schema.SCHEMAS:
        library.impl(name, _functions[name], "CompositeExplicitAutograd")
    return _schema.Operators(**{name: _eager_or_traced(name) for name in _schema.SCHEMAS})


def _eager_or_traced(name: str) -> Callable[..., Any]:
    """The function itself, but while torch.compile or torch.export traces: then an operator that they do not open."""
    eager = _functions[name]
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else eager(*args)

    return run
