"""Fixtures and the comparison with float64 that all tests of numbers share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh numbers for each test, the same ones each run."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm()
    return ((actual - expected).norm() / torch.where(scale == 0, 1.0, scale)).item()
