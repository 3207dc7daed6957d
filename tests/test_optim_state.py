"""CentroidSGD as an optimiser: schedules, its state, copies and hooks, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from conftest import relative
from problems import WAYS, every_way
from test_optim import C, M, batches, by_autograd, pair
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ncmi_kernels import CentroidSGD, NCMILoss


def test_start_step():
    delayed, other = pair()
    optimizer = CentroidSGD(delayed, 30.0, 0.9, start_step=2)
    plain = CentroidSGD(other, 30.0, 0.9)
    before = delayed.centroid_logits.clone()
    given = list(batches(4))
    for features, target in given[:2]:
        optimizer.step(features, target)
        assert torch.equal(delayed.centroid_logits, before)
    for features, target in given[2:]:
        optimizer.step(features, target), plain.step(features, target)
    assert torch.equal(delayed.centroid_logits, other.centroid_logits)
    assert not torch.equal(delayed.centroid_logits, before)


def test_learning_rate_schedule():
    scheduled, other = pair()
    optimizer = CentroidSGD(scheduled, 30.0, 0.5)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.1)
    reference = torch.optim.SGD([other.centroid_logits], 30.0, momentum=0.5)
    of_reference = torch.optim.lr_scheduler.MultiStepLR(reference, [1, 2], gamma=0.1)
    for features, target in batches(3):
        scheduled(features, target), other(features, target)
        optimizer.step(features, target), schedule.step()
        by_autograd(other, reference, features, target)
        of_reference.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)
    assert relative(scheduled.centroid_logits, other.centroid_logits) <= 1e-6


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_state_dict_round_trip_gives_the_same_bits(stop, tmp_path):
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9, nesterov=True, start_step=2)
    given = list(batches(5))
    for index, (features, target) in enumerate(given):
        if index == stop:
            torch.save({"criterion": criterion.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
        criterion(features, target), optimizer.step(features, target)
    saved = torch.load(tmp_path / "saved")
    resumed = NCMILoss(C, M)
    of_resumed = CentroidSGD(resumed, 1.0, momentum=0.1)  # all of it comes from the state
    resumed.load_state_dict(saved["criterion"]), of_resumed.load_state_dict(saved["optimizer"])
    for features, target in given[stop:]:
        resumed(features, target), of_resumed.step(features, target)
    assert torch.equal(resumed.centroid_logits, criterion.centroid_logits)
    assert torch.equal(resumed.center, criterion.center)


def test_distributed_checkpoint_into_a_new_optimiser(tmp_path):
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9, start_step=1)
    for features, target in batches(3):
        optimizer.step(features, target)
    expected = optimizer.state_dict()
    checkpoint.save({"optimizer": expected}, checkpoint_id=tmp_path, no_dist=True)
    new = CentroidSGD(pair()[1], 1.0, 0.5)
    state = {"optimizer": new.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    new.load_state_dict(state["optimizer"])
    torch.testing.assert_close(new.state_dict(), expected, rtol=0, atol=0)

    for momentum in (0.0, 0.9):
        optimizer, twin = CentroidSGD(criterion, 30.0, momentum), pair()[1]
        new = CentroidSGD(twin, 1.0, momentum)
        assert get_optimizer_state_dict(twin, new)  # of one that has taken no step
        optimizer.step(features, target)
        set_optimizer_state_dict(twin, new, get_optimizer_state_dict(criterion, optimizer))
        torch.testing.assert_close(new.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_the_state_of_another_optimiser_is_refused():
    optimizer = CentroidSGD(pair()[1], 30.0, 0.9)
    parameter = nn.Parameter(torch.zeros(C, M))
    for other in (torch.optim.SGD([parameter], 0.1, 0.9), torch.optim.Adam([parameter])):
        with pytest.raises(ValueError, match="state_dict: got that of another optimiser without"):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="momentum_buffer of shape"):
        optimizer.load_state_dict(CentroidSGD(NCMILoss(C + 1, M), 30.0, 0.9).state_dict())


def test_a_state_saved_before_all_was_in_the_param_group():
    first, second = (CentroidSGD(pair()[1], 30.0, 0.9) for _ in range(2))
    for features, target in batches(2):
        first.step(features, target)
    group = first.state_dict()["param_groups"][0]
    state = {name: group.pop(name) for name in ("step", "momentum_buffer")}
    second.load_state_dict({"state": {0: state}, "param_groups": [group]})
    assert str(second.state_dict()) == str(first.state_dict())


def test_a_criterion_that_moves_before_the_first_step():
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9)
    criterion.double()
    features, target = next(batches(1))
    optimizer.step(features, target)
    assert optimizer.state[criterion.centroid_logits]["momentum_buffer"].dtype == torch.float64


def test_numbers_of_numpy():
    group = CentroidSGD(pair()[1], np.float32(0.5), start_step=np.int64(3)).param_groups[0]
    assert (group["lr"], group["start_step"]) == (0.5, 3)


def test_copied_with_its_criterion():
    criterion = pair()[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9)
    given = list(batches(2))
    optimizer.step(*given[0])
    twin, of_twin = copy.deepcopy((criterion, optimizer))
    assert of_twin.criterion is twin
    optimizer.step(*given[1]), of_twin.step(*given[1])
    assert torch.equal(criterion.centroid_logits, twin.centroid_logits)


def test_hooks_and_a_momentum_that_is_switched_off():
    criterion, other = pair()
    optimizer, expected = CentroidSGD(criterion, 30.0, 0.9), CentroidSGD(other, 30.0)
    seen = []
    optimizer.register_step_post_hook(lambda *args: seen.append(args))
    optimizer.param_groups[0]["momentum"] = 0.0
    (features, target), *_ = batches(1)
    optimizer.step(features, target), expected.step(features, target)
    assert len(seen) == 1
    assert torch.equal(criterion.centroid_logits, other.centroid_logits)


def test_alternating_training_ends_where_joint_training_does():
    torch.manual_seed(0)
    centres = 2 * torch.randn(C, 10)
    target = torch.arange(210) % C
    input = centres[target] + torch.randn(210, 10)
    losses = []
    for alternating in (True, False):
        torch.manual_seed(1)
        network, criterion = nn.Linear(10, M), NCMILoss(C, M)
        centroid_optimizer = CentroidSGD(criterion, 0.1, 0.9) if alternating else None
        groups = [{"params": list(network.parameters())}]
        if not alternating:
            groups.append({"params": list(criterion.parameters()), "lr": 0.1})
        optimizer = torch.optim.SGD(groups, 1.0, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            features = network(input)
            loss = criterion(features, target)
            loss.backward()
            optimizer.step()
            if centroid_optimizer:
                centroid_optimizer.step(network(input), target)
        losses.append(loss.item())
        assert (criterion.predict(network(input)) == target).float().mean() > 0.95
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------

BAD = {
    "criterion": ({"criterion": nn.CrossEntropyLoss()}, TypeError, "CrossEntropyLoss"),
    "lr type": ({"lr": "fast"}, TypeError, "'fast'"),
    "lr": ({"lr": -0.1}, ValueError, "-0.1"),
    "lr nan": ({"lr": float("nan")}, ValueError, "nan"),
    "momentum": ({"momentum": -1}, ValueError, "-1"),
    "weight_decay": ({"weight_decay": float("inf")}, ValueError, "inf"),
    "momentum for nesterov": ({"nesterov": True}, ValueError, "nesterov"),
    "start_step type": ({"start_step": 1.5}, TypeError, "1.5"),
    "start_step": ({"start_step": -1}, ValueError, "-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments(case):
    changes, exception, got = BAD[case]
    arguments = {"criterion": NCMILoss(C, M), "lr": 0.1} | changes
    with pytest.raises(exception, match=f"{case.split()[0]}: got") as caught:
        CentroidSGD(**arguments)
    assert got in str(caught.value)


def test_no_second_group():
    optimizer = CentroidSGD(NCMILoss(C, M), 0.1)
    with pytest.raises(ValueError, match="param_group: got a second group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@every_way
def test_a_refused_batch_changes_nothing(way):
    criterion = pair(**WAYS[way])[1]
    optimizer = CentroidSGD(criterion, 30.0, 0.9)
    (features, target), *_ = batches(1)
    optimizer.step(features, target)
    before, state = criterion.centroid_logits.clone(), copy.deepcopy(optimizer.state_dict())
    for bad, exception in (
        ((features[:, 1:], target), ValueError),
        ((features, target[1:]), ValueError),
        ((features.long(), target), RuntimeError),
        ((features, torch.full_like(target, C)), IndexError),
    ):
        with pytest.raises(exception):
            optimizer.step(*bad)
        assert torch.equal(criterion.centroid_logits, before)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_reduction_none_and_a_replaced_parameter_are_refused():
    criterion = NCMILoss(C, M, ratio="sample")
    (features, target), *_ = batches(1)
    optimizer = CentroidSGD(criterion, 0.1, 0.9, start_step=1)
    criterion.reduction = "none"
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        optimizer.step(features, target)
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        CentroidSGD(criterion, 0.1)
    with pytest.raises(ValueError, match="reduction: got 'none'"):
        criterion.centroid_gradient(features, target)
    criterion.reduction = "mean"
    for _ in range(2):
        optimizer.step(features, target)
    with pytest.raises(RuntimeError, match=r"momentum_buffer: got torch\.float32 on cpu"):
        criterion.double() and optimizer.step(features.double(), target)
    criterion.centroid_logits = nn.Parameter(torch.zeros(C, M))
    with pytest.raises(RuntimeError, match="centroid_logits is another parameter"):
        optimizer.step(features, target)
