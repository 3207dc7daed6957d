"""Fixtures, and the backends."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It looks at this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ncmi_kernels import _backends
from ncmi_kernels.testing import device_of
from ncmi_kernels.testing import relative_error as relative

__all__ = ["KERNELS", "REQUIRED", "device_of", "relative"]

if _backends.triton_interprets() and _backends.load_triton() is None:
    from triton.runtime.interpreter import InterpretedFunction

    # A kernel that calls a function of its own module has patched what that needs already. Doing it again for every
    # call takes a third of the time of a test. Triton's own functions need more, before 3.9.
    patch_and_call = InterpretedFunction.__call__
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: (
        patch_and_call(self, *args, **kwargs)
        if self.fn.__module__.startswith("triton.")
        else self.rewrite()(*args, **kwargs)
    )

# Those with kernels. "cuda", and "triton" where there is a GPU, run on it.
KERNELS = [
    pytest.param("cpu"),
    pytest.param("triton", marks=[pytest.mark.gpu] if torch.cuda.is_available() else []),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


# Backends whose tests fail where they cannot run, and are not skipped.
REQUIRED = [name for name in os.environ.get("NCMI_REQUIRE_BACKENDS", "").split(",") if name]


def pytest_configure() -> None:
    """Of several processes of pytest-xdist each has its part of the threads."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test of one backend makes, it makes where that backend runs."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with torch.device(device_of(backend)) if isinstance(backend, str) else nullcontext():
        yield


@pytest.fixture
def interpreted(backend: str) -> bool:
    """Whether the test runs a backend in Triton's interpreter: correct, but milliseconds for each program."""
    return backend == "triton" and device_of(backend) == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and backends that cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not REQUIRED:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            continue
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec else None
        reason = _backends.available_backends().get(backend) if backend in ("triton", "cuda") else None
        if reason is not None and backend not in REQUIRED:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh numbers for each test, the same ones each run."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))
