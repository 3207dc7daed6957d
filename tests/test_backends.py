"""Which backend runs: by name, by default, and what happens where none can; options that warn."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_errors import BACKENDS, CALLS, CENTROIDS, INPUT, TARGET, C, M, call, refused

import ncmi_kernels
from ncmi_kernels import NCMILoss, _backends, functional, ncmi_loss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


@pytest.mark.parametrize("value", ["gpu", "", "CPU", 3, ["cpu"]])
@pytest.mark.parametrize("name", ["loss", "terms"])
def test_unknown_backend(name, value):
    with refused(ValueError, f"backend: got {value!r}", "expected None or one of", "'reference'", "'cpu'"):
        call(CALLS[name], backend=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_of_a_module_that_was_changed(dtype):
    criterion = NCMILoss(C, M, dtype=dtype)
    criterion.backend = "gpu"
    with refused(ValueError, "backend: got 'gpu'", "expected None or one of", "'reference'", "'cpu'"):
        criterion(INPUT, TARGET)
    assert criterion.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["loss", "terms"])
def test_cpu_backend_on_another_device(name):
    tensors = {
        "input": INPUT.to("meta"),
        "target": TARGET.to("meta"),
        "centroid_logits": CENTROIDS.to("meta"),
    }
    with refused(RuntimeError, "backend: got 'cpu'", "on meta", "expected a CPU tensor"):
        call(CALLS[name], **tensors, backend="cpu")


def test_reference_runs_on_any_device():
    tensors = {
        "input": INPUT.to("meta"),
        "target": TARGET.to("meta"),
        "centroid_logits": CENTROIDS.to("meta"),
    }
    for result in (
        call(ncmi_loss, **tensors),
        NCMILoss(C, M, device="meta")(INPUT.to("meta"), TARGET.to("meta")),
    ):
        assert (result.device.type, result.shape, result.dtype) == ("meta", (), torch.float32)


REASON = "the kernels were left at home"


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(_backends, "load_library", lambda: REASON)
    _backends._warn_reference.cache_clear()
    yield
    _backends._warn_reference.cache_clear()


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("name", CALLS)
def test_backend_by_name_that_cannot_run(name):
    with refused(RuntimeError, "backend: got 'cpu'", "cannot run here", REASON):
        call(CALLS[name], backend="cpu")


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_is_unchanged_when_its_backend_cannot_run(dtype):
    criterion = NCMILoss(C, M, backend="cpu", dtype=dtype)
    with refused(RuntimeError, "backend: got 'cpu'", REASON):
        criterion(INPUT, TARGET)
    assert criterion.num_batches_tracked == 0


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("name", CALLS)
def test_missing_kernels_warn_once_and_give_the_reference_result(name):
    with pytest.warns(ncmi_kernels.BackendWarning, match=REASON) as caught:
        results = [call(CALLS[name]) for _ in range(2)]
    assert len(caught) == 1
    expected = call(CALLS[name], backend="reference")
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if name == "loss":
        assert caught[0].filename == __file__  # the line that called, not one inside the package
        reasons = ncmi_kernels.available_backends()
        assert (reasons["reference"], reasons["cpu"]) == (None, REASON)


def test_backends_that_can_run_do_not_warn():
    assert ncmi_kernels.available_backends()["cpu"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in (None, *BACKENDS):
            call(ncmi_loss, backend=backend)


def test_degenerate_settings_warn_once():
    degenerate = {"separation": "centroid_to_sample", "l2_normalize": False}
    functional._warn_degenerate.cache_clear()
    with pytest.warns(ncmi_kernels.DegenerateMinimumWarning, match="minus infinity") as caught:
        call(ncmi_loss, **degenerate), NCMILoss(C, M, **degenerate)
    assert len(caught) == 1
    functional._warn_degenerate.cache_clear()
    criterion = NCMILoss(C, M, l2_normalize=False)
    with pytest.warns(ncmi_kernels.DegenerateMinimumWarning, match="minus infinity"):
        criterion.separation = "centroid_to_sample"
    functional._warn_degenerate.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCMILoss(C, M, **{**degenerate, "l2_normalize": True})
        call(ncmi_loss, l2_normalize=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_other_types(backend):
    """NumPy's integers and fractions are numbers too."""
    criterion = NCMILoss(
        np.int64(C),
        np.int32(M),
        temperature=Fraction(1, 2),
        ignore_index=np.int64(-1),
        eps=np.float32(0.5),
        backend=backend,
    )
    same = NCMILoss(C, M, temperature=0.5, ignore_index=-1, eps=0.5, backend=backend)
    assert (criterion.num_classes, criterion.feature_dim) == (C, M)
    assert torch.equal(criterion(INPUT, TARGET), same(INPUT, TARGET))
