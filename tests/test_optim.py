"""CentroidSGD: the update against torch.optim.SGD on autograd's gradient, and the cache that it fills."""

import copy

import pytest
import torch
from conftest import relative
from problems import WAYS, every_backend, every_ratio, every_separation, every_way, plain_and_focus
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss, _focus, _plain

B, C, M = 40, 7, 50


SETTINGS = {
    "defaults": {},
    "by sample": {"ratio": "sample", "temperature": 0.2},
    "sum": {"ratio": "sample", "reduction": "sum"},
    "centroid_to_sample": {"separation": "centroid_to_sample"},
    "softmax": {"activation": "softmax", "l2_normalize": False},
    "focus": {"separation_focus": 10.0, "temperature": 0.2},  # at 1 these steps diverge, and roundings with them
    "several": {"centroids_per_class": 2, "temperature": 0.2},
    "no centre": {"center_momentum": None},
    "weights": {"weight": torch.rand(C, generator=torch.Generator().manual_seed(3)) + 0.5, "ignore_index": 2},
    "priors": {
        "class_prior": torch.arange(1.0, C + 1) / (C * (C + 1) / 2),
        "separation_focus": 2.0,
        "temperature": 0.2,
    },
}


SGD = {
    "plain": {"lr": 30.0},
    "momentum": {"lr": 30.0, "momentum": 0.9},
    "nesterov": {"lr": 30.0, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "weight decay": {"lr": 30.0, "weight_decay": 1e-3},
}


BACKENDS = ["cpu", "reference"]


def batches(count=5, dtype=torch.float32, rows=B, classes=C, columns=M):
    """Features that the centre moves with, and targets in which some classes are missing."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        features = 0.5 + torch.randn(rows, columns, generator=generator, dtype=dtype)
        yield features, torch.randint(classes - 1, (rows,), generator=generator)


def pair(dtype=torch.float32, classes=C, columns=M, **options):
    """Two criteria alike, with centroids that are not one-hot."""
    criterion = NCMILoss(classes, columns, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        criterion.centroid_logits.add_(torch.randn(criterion.centroid_logits.shape, generator=generator, dtype=dtype))
    return criterion, copy.deepcopy(criterion)


def by_autograd(criterion, optimizer, features, target):
    """A step by autograd, at the centre that the criterion has, which stays."""
    criterion.eval()
    optimizer.zero_grad()
    criterion(features, target).backward()
    optimizer.step()
    criterion.train()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sgd", SGD)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_step_of_torch_sgd_on_the_gradient_of_autograd(setting, sgd, dtype, backend):
    expected, actual = pair(dtype, backend=backend, **SETTINGS[setting])
    start = actual.centroid_logits.detach().clone()
    ours = CentroidSGD(actual, **SGD[sgd])
    theirs = torch.optim.SGD([expected.centroid_logits], **SGD[sgd])
    for features, target in batches(dtype=dtype):
        for criterion in (expected, actual):
            criterion(features, target)  # moves the centre
        by_autograd(expected, theirs, features, target)
        ours.step(features, target)
    moved = expected.centroid_logits - start
    assert moved.norm() > 1e-3
    # Two optimisers round each step relative to the logits, not to what these have moved by.
    tolerance = 1e-6 if dtype is torch.float32 else 1e-13
    assert relative(actual.centroid_logits, expected.centroid_logits) <= tolerance
    assert relative(actual.centroid_logits - start, moved) <= tolerance * max(1, (start.norm() / moved.norm()).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_separation
def test_against_float64_in_the_regime_of_the_authors(separation, dtype):
    options = {"temperature": 0.2, "separation": separation}
    truth = NCMILoss(100, 512, dtype=torch.float64, backend="reference", **options)
    actual = NCMILoss(100, 512, **options)
    start = actual.centroid_logits.detach().clone()
    (features, target), *_ = batches(1, rows=128, classes=100, columns=512)
    features = features.to(dtype)
    for criterion in (truth, actual):
        criterion(features.double() if criterion is truth else features, target)
    CentroidSGD(truth, 1e4).step(features.double(), target)
    CentroidSGD(actual, 1e4).step(features, target)
    moved = truth.centroid_logits - start
    assert moved.norm() > 1  # beside which the rounding of a logit of 10 is nothing
    assert relative(actual.centroid_logits - start, moved) <= 1e-5


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 2, 3), (0, 3, 5), (200, 3, 17), (5, 70, 1000), (4, 3, 4097)])
@every_separation
def test_odd_sizes(shape, separation):
    rows, classes, columns = shape
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(classes, columns, generator=generator)
    features = torch.randn(rows, columns, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    if columns == 1:  # one column has one distribution: no gradient
        target.zero_()
    criteria = []
    for _ in range(2):
        criterion = NCMILoss(classes, max(2, columns), separation=separation, ratio="sample", reduction="sum")
        criterion.centroid_logits = nn.Parameter(logits.clone())
        criterion.center_momentum = None
        criteria.append(criterion)
    expected, actual = criteria
    by_autograd(expected, torch.optim.SGD([expected.centroid_logits], 5.0, momentum=0.5), features, target)
    CentroidSGD(actual, 5.0, 0.5).step(features, target)
    assert relative(actual.centroid_logits, expected.centroid_logits) <= 1e-6


def test_shapes_of_features():
    images, maps = pair()
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(3, M, 4, generator=generator)
    target = torch.randint(C, (3, 4), generator=generator)
    CentroidSGD(maps, 30.0).step(features, target)
    CentroidSGD(images, 30.0).step(features.transpose(1, 2).reshape(12, M), target.flatten())
    assert torch.equal(maps.centroid_logits, images.centroid_logits)


# ------------------------------------------------------------------------------------------------------------
# The statistics that come out of the step
# ------------------------------------------------------------------------------------------------------------


@every_separation
def test_the_next_forward_pass_computes_no_statistics(separation, monkeypatch):
    calls, compute = [], _plain.table_of
    monkeypatch.setattr(_plain, "table_of", lambda *args: calls.append(args) or compute(*args))
    criterion = pair(separation=separation)[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9)
    losses = []
    for features, target in batches(4):
        losses.append(criterion(features, target).item())
        optimizer.step(features, target)
    assert len(calls) == 1
    after = criterion.eval()(features, target)  # eval() forgets the statistics, so they are computed once more
    assert len(calls) == 2
    optimizer.step(features, target)
    kept = criterion(features, target)
    assert len(calls) == 2
    criterion.eval()
    assert torch.equal(kept, criterion(features, target))
    assert not torch.equal(kept, after)
    assert len(set(losses)) == len(losses)


def test_a_step_is_seen_by_version_counters():
    """So that autograd refuses a backward pass of the centroids that would use what the step has overwritten."""
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9)
    (features, target), *_ = batches(1)
    optimizer.step(features, target)
    buffer = optimizer.state[criterion.centroid_logits]["momentum_buffer"]
    versions = criterion.centroid_logits._version, buffer._version
    optimizer.step(features, target)
    assert criterion.centroid_logits._version > versions[0]
    assert buffer._version > versions[1]
    loss = criterion(features.requires_grad_(), target)
    optimizer.step(features, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_that_hooks_on_saved_tensors_made_do_not_see_a_step():
    criterion = pair()[1]
    start = copy.deepcopy(criterion.state_dict())
    optimizer = CentroidSGD(criterion, 30.0)
    (features, target), *_ = batches(1)
    criterion(features, target)
    (expected,) = torch.autograd.grad(criterion(features.requires_grad_(), target), features)
    criterion.load_state_dict(start)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        criterion(features, target)
        loss = criterion(features, target)
    optimizer.step(features, target)
    assert torch.equal(torch.autograd.grad(loss, features)[0], expected)  # copies of all that it needs


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode(first):
    """Its tensors have no version counters: what was found of them is not kept."""
    criterion, other = pair()
    optimizer, of_other = CentroidSGD(criterion, 30.0), CentroidSGD(other, 30.0)
    given = list(batches(2))
    if first:
        criterion(*given[0]), other(*given[0])
    with torch.inference_mode():
        features = given[1][0] * 1
        criterion.eval()(features, given[1][1])
    criterion.train()
    optimizer.step(features, given[1][1])
    of_other.step(*given[1])
    assert torch.equal(criterion.centroid_logits, other.centroid_logits)


@pytest.mark.parametrize("sgd", SGD)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_ratio
@every_way
@pytest.mark.filterwarnings("ignore::ncmi_kernels.DivergenceWarning")
def test_a_batch_that_is_not_finite_moves_nothing(way, ratio, value, sgd):
    criterion = pair(**WAYS[way], ratio=ratio)[1]
    optimizer = CentroidSGD(criterion, **SGD[sgd])
    given = list(batches(3))
    criterion(*given[0]), optimizer.step(*given[0])
    before = criterion.centroid_logits.clone()
    buffer = optimizer.state[criterion.centroid_logits].get("momentum_buffer")
    momentum = None if buffer is None else buffer.clone()
    bad = given[1][0].half()
    bad[3, 4] = value
    criterion(bad, given[1][1]), optimizer.step(bad, given[1][1])
    assert torch.equal(criterion.centroid_logits, before)
    assert buffer is None or torch.equal(buffer, momentum)
    criterion(*given[2]), optimizer.step(*given[2])
    assert criterion.centroid_logits.isfinite().all()
    assert not torch.equal(criterion.centroid_logits, before)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("sgd", SGD)
@every_way
def test_a_batch_without_a_row_that_counts_moves_nothing(way, sgd, rows):
    criterion = pair(**WAYS[way])[1]
    optimizer = CentroidSGD(criterion, **SGD[sgd])
    for features, target in batches(2):
        criterion(features, target), optimizer.step(features, target)
    before = copy.deepcopy((criterion.centroid_logits.detach(), optimizer.state_dict()))
    nothing = torch.randn(rows, M), torch.full((rows,), -100)
    criterion(*nothing), optimizer.step(*nothing)
    before[1]["param_groups"][0]["step"] += 1
    after = criterion.centroid_logits.detach(), optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    features, target = next(batches(1))
    twin = copy.deepcopy(criterion)
    twin._forget()
    assert torch.equal(criterion.eval()(features, target), twin.eval()(features, target))


def test_export_with_an_optimiser_of_the_centroids():
    criterion = pair()[1].eval()
    CentroidSGD(criterion, 30.0)
    (features, target), *_ = batches(1)
    for strict in (True, False):
        exported = torch.export.export(criterion, (features, target), strict=strict).module()
        assert torch.equal(exported(features, target), criterion(features, target))


def test_other_edits_between_steps_count():
    edited, fresh = pair()
    optimizer = CentroidSGD(edited, 30.0)
    ((first, second),), other = list(batches(1)), nn.init.normal_(torch.empty(C, M))
    optimizer.step(first, second)
    with torch.no_grad():
        edited.centroid_logits.copy_(other)
        fresh.centroid_logits.copy_(other)
    optimizer.step(first, second)
    CentroidSGD(fresh, 30.0).step(first, second)
    assert torch.equal(edited.centroid_logits, fresh.centroid_logits)


@pytest.fixture
def calls(monkeypatch):
    """How often a batch has gone through a forward pass."""
    seen = []
    for way in (_plain, _focus):
        monkeypatch.setattr(way, "forward", lambda *args, run=way.forward: seen.append(None) or run(*args))
    return seen


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("detached", [True, False])
def test_what_the_forward_pass_found_is_used_again(setting, detached, calls):
    criterion, other = pair(**SETTINGS[setting])
    optimizer, of_other = CentroidSGD(criterion, 30.0, 0.9), CentroidSGD(other, 30.0, 0.9)
    for features, target in batches(3):
        leaf = features.requires_grad_()
        criterion(leaf, target).backward()
        other(features.clone(), target)
        calls.clear()
        optimizer.step(leaf.detach() if detached else leaf, target)
        assert len(calls) == 0
        of_other.step(features, target)
        assert len(calls) == 1
        assert torch.equal(criterion.centroid_logits, other.centroid_logits)


@every_backend
@every_separation
@plain_and_focus
def test_alternating_steps_of_every_backend(focus, separation, backend, calls):
    criterion, other = (
        NCMILoss(C, 11, separation=separation, separation_focus=focus, backend=name) for name in (backend, "reference")
    )
    optimizers = [CentroidSGD(each, lr=0.1, momentum=0.9) for each in (criterion, other)]
    given = [(torch.randn(9, 11, requires_grad=True), torch.randint(C, (9,))) for _ in range(3)]
    for features, target in given:
        for each, optimizer in zip((criterion, other), optimizers, strict=True):
            each(features, target).backward()
            optimizer.step(features, target)
        assert len(calls) == 1
        calls.clear()
    assert relative(criterion.centroid_logits, other.centroid_logits) < 1e-6
    # Of another batch, or once the centroids have moved, all is formed anew.
    criterion(features, target)
    for count in (2, 3):
        optimizers[0].step(features.flip(0), target.flip(0))
        assert len(calls) == count


def fused_step(criterion, features, target):
    """Fused optimisers move no version counter."""
    logits = criterion.centroid_logits
    logits.grad = criterion.centroid_gradient(features, target)
    torch.optim.SGD([logits], lr=50.0, fused=True).step()
    logits.grad = None


BETWEEN = {
    "features": lambda criterion, features, target: features.mul_(1.5),
    "target": lambda criterion, features, target: target.copy_(target.flip(0)),
    "another batch": lambda criterion, features, target: criterion(features + 1, target),
    "another batch, compiled": lambda criterion, features, target: torch.compile(criterion, backend="eager")(
        features + 1, target
    ),
    "evaluation of another batch": lambda criterion, features, target: criterion.eval()(features + 1, target),
    "centroids": lambda criterion, features, target: criterion.centroid_logits.mul_(0.9),
    "centre": lambda criterion, features, target: criterion.center.add_(0.3),
    "no centre": lambda criterion, features, target: setattr(criterion, "center_momentum", None),
    "weight": lambda criterion, features, target: criterion.weight.mul_(torch.arange(1.0, C + 1)),
    "option": lambda criterion, features, target: setattr(criterion, "temperature", 0.5),
    "centroids, .data": lambda criterion, features, target: setattr(
        criterion.centroid_logits, "data", criterion.centroid_logits * 0.9
    ),
    "centroids, vector_to_parameters": lambda criterion, features, target: nn.utils.vector_to_parameters(
        0.9 * criterion.centroid_logits.flatten(), [criterion.centroid_logits]
    ),
    "centroids in .data, then train()": lambda criterion, features, target: (
        criterion.centroid_logits.data.mul_(0.9),
        criterion.train(),
    ),
    "centre, .data": lambda criterion, features, target: setattr(criterion.center, "data", criterion.center + 0.3),
    "a fused optimiser": lambda criterion, features, target: fused_step(criterion, features, target),
    "a step": lambda criterion, features, target: CentroidSGD(criterion, 30.0).step(features, target),
    "state_dict": lambda criterion, features, target: criterion.load_state_dict(
        {name: 1.1 * value for name, value in criterion.state_dict().items()}
    ),
}


@plain_and_focus
@pytest.mark.parametrize("edit", BETWEEN)
def test_what_the_forward_pass_found_is_not_used_once_something_has_changed(edit, focus):
    criterion, _ = pair(weight=torch.ones(C), center_momentum=0.5, separation_focus=focus)
    optimizer = CentroidSGD(criterion, 30.0)
    (first, second), *_ = batches(1)
    criterion(first, second)
    with torch.no_grad():
        BETWEEN[edit](criterion, first, second)
    fresh = copy.deepcopy(criterion)
    optimizer.step(first, second)
    CentroidSGD(fresh, 30.0).step(first, second)
    assert torch.equal(criterion.centroid_logits, fresh.centroid_logits)


def test_the_graph_of_the_features_is_left_alone():
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0)
    (features, target), *_ = batches(1)
    features.requires_grad_()
    optimizer.step(features * 2, target)
    assert features.grad is None
    assert criterion.centroid_logits.grad is None
    assert not criterion.centroid_logits.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("setting", ["defaults", "by sample", "focus", "several"])
def test_a_step_without_a_batch_takes_that_of_the_last_forward_pass(setting, compiled):
    criterion, other = pair(**SETTINGS[setting], center_momentum=0.5)
    optimizer, of_other = CentroidSGD(criterion, 30.0, 0.9), CentroidSGD(other, 30.0, 0.9)
    forward = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
    weight = torch.ones(M, requires_grad=True)
    for features, target in batches(3):
        before = criterion.centroid_logits.clone()
        forward(features * weight, target).backward()
        criterion.eval()(features + 1, target.flip(0))  # a validation between is not what it learns from
        criterion.train()
        if not compiled:
            with torch.no_grad():
                criterion(features + 1, target.flip(0))  # nor one that forgot eval()
        assert optimizer.step() is None
        other(features, target)
        of_other.step(features, target)
        assert not torch.equal(criterion.centroid_logits, before)
        assert relative(criterion.centroid_logits, other.centroid_logits) < 1e-6


def test_a_step_without_a_batch_that_there_is_not():
    criterion, _ = pair()
    criterion(*next(batches(1)))
    optimizer = CentroidSGD(criterion, 30.0)
    for make in (lambda: optimizer, lambda: CentroidSGD(copy.deepcopy(criterion), 30.0)):
        with pytest.raises(
            RuntimeError, match=r"features: got none, .*expected one before step\(\), or step\(features"
        ):
            make().step()
        criterion(*next(batches(1)))
    with pytest.raises(TypeError, match="target: got None, expected step"):
        optimizer.step(next(batches(1))[0])
    with pytest.raises(TypeError, match="features: got None, expected step"):
        optimizer.step(target=torch.zeros(3))


def test_a_closure_is_called_with_gradients_enabled_before_the_step():
    criterion, other = pair()
    optimizer = CentroidSGD(criterion, 30.0)
    features, target = next(batches(1))

    def closure():
        loss = criterion(features.requires_grad_(), target)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert torch.equal(loss, other(features, target))
    CentroidSGD(other, 30.0).step(features, target)
    assert torch.equal(criterion.centroid_logits, other.centroid_logits)


def test_a_gradient_scaler_calls_step():
    criterion, other = pair()
    network, scaler = nn.Linear(3, M), torch.amp.GradScaler("cpu")
    optimizers = torch.optim.SGD(network.parameters(), 0.1), CentroidSGD(criterion, 30.0)
    x, target = torch.randn(B, 3), torch.randint(C, (B,))
    features = network(x)
    scaler.scale(criterion(features, target)).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    other(features, target)
    CentroidSGD(other, 30.0).step(features, target)
    assert torch.equal(criterion.centroid_logits, other.centroid_logits)
