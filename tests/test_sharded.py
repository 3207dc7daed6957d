"""ShardedNCMILoss: the numbers of NCMILoss with all centroids in one process, whatever is where."""

import tempfile

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from groups import IGNORED, SIZES, M, batches, close, criterion_of, own, part, with_group
from groups import sharded_pair as pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ncmi_kernels import CentroidSGD, NCMILoss, ShardedNCMILoss

SEVERAL = {"centroids_per_class": 3, "separation_focus": 3.0}

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


def check_no_step_and_what_is_refused():
    rank = dist.get_rank()
    sharded, _ = pair(7, torch.float64)
    each, _ = batches(SIZES[2], torch.float64, classes=7)
    optimizer = CentroidSGD(sharded, 20.0, 0.9, 1e-2)
    optimizer.step(*each[rank])
    before = own(sharded.centroid_logits).clone()
    optimizer.step(torch.randn(3, M, dtype=torch.float64), torch.full((3,), IGNORED))
    assert torch.equal(own(sharded.centroid_logits), before)
    sharded.centroid_logits.requires_grad_(True)

    # A target that is no class, a double backward, and what cannot be assigned or formed.
    features, target = torch.randn(3, M, dtype=torch.float64, requires_grad=True), torch.tensor([0, 5, 6])
    with pytest.raises(IndexError, match="value 7 at row 1"):
        sharded(features[:2], torch.tensor([0, 7]))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(sharded(features, target), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"scores: got .* expected predict"):
        sharded.scores(features)
    with pytest.raises(AttributeError, match="process_group"):
        sharded.process_group = None
    with pytest.raises(ValueError, match=r"num_classes: got 7, expected a multiple of the 2 processes .* 2, so that"):
        ShardedNCMILoss(7, M, device_mesh=sharded.device_mesh, centroids_per_class=2)


def test_a_step_of_no_rows_and_what_is_refused():
    processes.run(2, check_no_step_and_what_is_refused)


def check_edits():
    """Fixed centroids: what is kept of them is not used once they have changed."""
    rank = dist.get_rank()
    for edit in (
        lambda logits: logits.mul_(0.7),
        lambda logits: logits.detach().mul_(0.7),
        lambda logits: logits.to_local().mul_(0.7),
        lambda logits: logits.copy_(0.7 * logits),
    ):
        sharded, plain = pair(13, torch.float64, learn_centroids=False, center_momentum=None)
        each, whole = batches(SIZES[dist.get_world_size()], torch.float64, classes=13)
        before = sharded(*each[rank]).item()
        with torch.no_grad():
            edit(sharded.centroid_logits)
            plain.centroid_logits.mul_(0.7)
        loss = sharded(*each[rank])
        torch.testing.assert_close(loss, plain(*whole), rtol=1e-11, atol=0)
        assert abs(loss.item() - before) > 1e-3, "the edit has to matter"
    # Through memory that has no counter in common with the parameter: seen from the next train() or eval() on.
    own(sharded.centroid_logits).div_(0.7)
    torch.testing.assert_close(sharded.train()(*each[rank]).item(), before, rtol=1e-11, atol=0)


def test_fixed_centroids_that_change():
    processes.run(2, check_edits)


def check_unlike_processes():
    """Each process has a batch, and wants of it, what it likes: one has no rows, in another dtype, and no gradient."""
    rank = dist.get_rank()
    for classes, options in ((8, {}), (8, {"separation_focus": 3.0}), (8, SEVERAL)):
        sharded, plain = pair(classes, learn_centroids=False, center_momentum=None, **options)
        features = torch.randn(5, M, generator=torch.Generator().manual_seed(0)).bfloat16()
        target = torch.tensor([0, 7, 3, 5, 1])
        with torch.inference_mode():  # what is kept of fixed centroids is for graphs as well
            sharded(features[: 5 * (rank == 0)].float(), target[: 5 * (rank == 0)])
        mine = features.clone().requires_grad_() if rank == 0 else torch.zeros(0, M)
        loss = sharded(mine, target if rank == 0 else target[:0])
        every = features.clone().requires_grad_()
        expected = plain(every, target)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        if rank == 0:
            loss.backward(), expected.backward()
            close(mine.grad.float() / 2, every.grad.float(), 1e-2)
        # The losses of no reduction are the process's own, to do with as it likes.
        sharded.ratio, sharded.reduction = "sample", "none"
        losses = sharded(mine, target if rank == 0 else target[:0])
        losses *= 2


def test_processes_that_are_unlike():
    processes.run(2, check_unlike_processes)


# ------------------------------------------------------------------------------------------------------------
# Training, prediction, checkpoints
# ------------------------------------------------------------------------------------------------------------


def check_training():
    rank = dist.get_rank()
    for by_autograd, classes, options in ((True, 13, {}), (False, 13, {}), (True, 8, SEVERAL), (False, 8, SEVERAL)):
        sharded, plain = pair(classes, torch.float64, **options)
        if by_autograd:
            optimizers = [torch.optim.SGD(c.parameters(), 20.0, momentum=0.9) for c in (sharded, plain)]
        else:
            optimizers = [CentroidSGD(c, 20.0, 0.9, 1e-3, nesterov=True) for c in (sharded, plain)]
        before = plain.centroid_logits.clone()
        for seed in range(6):
            each, whole = batches(SIZES[dist.get_world_size()], torch.float64, seed, classes=classes)
            for criterion, optimizer, batch in zip((sharded, plain), optimizers, (each[rank], whole), strict=True):
                optimizer.zero_grad()
                loss = criterion(*batch)
                if by_autograd:
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(criterion.parameters(), 1e-3)
                    optimizer.step()
                else:
                    optimizer.step(*batch)
        close(sharded.centroid_logits, plain.centroid_logits, 1e-9)
        assert (plain.centroid_logits - before).norm() > 1e-4


def check_prediction():
    rank, size = dist.get_rank(), dist.get_world_size()
    for classes, options in ((2, {}), (13, {}), (8, SEVERAL)):
        sharded, plain = pair(classes, torch.float64, **options)
        each, whole = batches(SIZES[dist.get_world_size()], torch.float64, classes=classes)
        sharded(*each[rank]), plain(*whole)
        rows = [len(target) for _, target in each]
        expected = plain.predict(whole[0]).split(rows)[rank]
        assert torch.equal(sharded.predict(each[rank][0]), expected)
        assert sharded.predict(each[rank][0][:0]).shape == (0,)
        with torch.inference_mode():
            assert torch.equal(sharded.predict(each[rank][0]), expected)
            gradient = sharded.centroid_gradient(*each[rank])
            close(gradient, plain.centroid_gradient(*whole), 1e-11)
        # Processes with different numbers of batches.
        mine = [each[rank]] * (1 + (rank == size - 1))
        close(sharded.fit_class_means(mine), plain.fit_class_means([*each, each[-1]]), 1e-11)
        expected = plain.predict(whole[0], class_means=True).split(rows)[rank]
        assert torch.equal(sharded.predict(each[rank][0], class_means=True), expected)
        assert isinstance(sharded.centroids(), DTensor)
        close(sharded.centroids(), plain.centroids(), 1e-12)


def check_initial():
    """The same for every number of processes: one-hot rows, or random directions of length 10."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    assert torch.equal(own(ShardedNCMILoss(7, 9, device_mesh=mesh).centroid_logits), part(10 * torch.eye(7, 9)))
    torch.manual_seed(5 + dist.get_rank())  # process 0's counts
    several = ShardedNCMILoss(4, 9, device_mesh=mesh, centroids_per_class=2).centroid_logits
    assert torch.equal(own(several), part(10 * torch.eye(8, 9)))
    drawn = ShardedNCMILoss(3001, 9, device_mesh=mesh).centroid_logits
    assert torch.allclose(own(drawn).norm(dim=1), torch.tensor(10.0))
    return drawn.full_tensor().detach().numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_training_prediction_and_the_first_centroids(size):
    found = processes.run(size, check_all)
    for each in found:
        np.testing.assert_array_equal(each, found[0])
    assert len(np.unique(found[0], axis=0)) == 3001
    if size == 4:
        np.testing.assert_array_equal(processes.run(2, check_initial)[0], found[0])


def check_all():
    check_training()
    check_prediction()
    return check_initial()


def save(directory, classes, options):
    sharded, _ = pair(classes, torch.float64, **options)
    optimizer = CentroidSGD(sharded, 20.0, 0.9)
    for seed in range(3):
        each, _ = batches(SIZES[dist.get_world_size()], torch.float64, seed, classes=classes)
        sharded(*each[dist.get_rank()])
        optimizer.step(*each[dist.get_rank()])
    sharded.fit_class_means([each[dist.get_rank()]])
    checkpoint.save({"criterion": sharded.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=directory)
    return numbers(sharded, optimizer)


def resume(directory, classes, options):
    sharded, _ = pair(classes, torch.float64, **options)
    optimizer = CentroidSGD(sharded, 20.0, 0.9)
    with torch.no_grad():
        own(sharded.centroid_logits).fill_(float("nan"))
    state = {"criterion": sharded.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.load(state, checkpoint_id=directory)
    sharded.load_state_dict(state["criterion"])
    optimizer.load_state_dict(state["optimizer"])
    return numbers(sharded, optimizer)


def numbers(sharded, optimizer):
    (state,) = optimizer.state.values()
    tables = sharded.centroid_logits.detach(), sharded.class_means, state["momentum_buffer"]
    return [*(table.full_tensor().numpy() for table in tables), sharded.center.numpy(), state["step"]]


@pytest.mark.parametrize(("classes", "options"), [(13, {}), (8, SEVERAL)])
def test_checkpoints_move_between_numbers_of_processes(classes, options):
    with tempfile.TemporaryDirectory() as directory:
        saved = processes.run(4, save, directory, classes, options)[0]
        for size in (2, 4):
            loaded = processes.run(size, resume, directory, classes, options)
            for each in loaded:
                for actual, expected in zip(each, saved, strict=True):
                    np.testing.assert_array_equal(actual, expected)


# ------------------------------------------------------------------------------------------------------------
# DTensor and FSDP2
# ------------------------------------------------------------------------------------------------------------


def check_dtensors():
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    sharded, plain = pair(7, torch.float64)
    each, _ = batches(SIZES[dist.get_world_size()], torch.float64, classes=7)
    features, target = each[rank]
    for criterion in (sharded, plain):
        for name in ("input", "target"):
            arguments = {"input": features, "target": target}
            arguments[name] = DTensor.from_local(arguments[name], mesh, run_check=False)
            with pytest.raises(RuntimeError, match=rf"{name}: got a DTensor, expected .*to_local"):
                criterion(**arguments)
    # Within fully_shard the centroids are whole in the forward pass, and only then.
    for learn in (True, False):
        plain = criterion_of(torch.float64, classes=7, learn_centroids=learn, ignore_index=IGNORED)
        wrapped = with_group(plain)
        fully_shard(wrapped, mesh=mesh)
        each, whole = batches(SIZES[dist.get_world_size()], torch.float64, classes=7)
        for _ in range(2):
            torch.testing.assert_close(wrapped(*each[rank]), plain(*whole), rtol=1e-11, atol=0)
            for criterion in (wrapped, plain):
                criterion.load_state_dict({name: 0.9 * value for name, value in criterion.state_dict().items()})
        if learn:
            wrapped(*each[rank]).backward(), plain(*whole).backward()
            close(wrapped.centroid_logits.grad.full_tensor(), plain.centroid_logits.grad, 1e-11)
        with pytest.raises(RuntimeError, match=r"centroid_logits: got a DTensor, expected .* ShardedNCMILoss"):
            CentroidSGD(wrapped, 0.1).step(*each[rank])

    # The network sharded, the criterion outside: the gradients of one process with all rows.
    torch.manual_seed(0)
    networks = [torch.nn.Linear(5, M, dtype=torch.float64) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    fully_shard(networks[0], mesh=mesh)
    shared, alone = (NCMILoss(7, M, dtype=torch.float64) for _ in range(2))
    shared.process_group = dist.group.WORLD
    input, classes = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 7
    mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
    shared(networks[0](input[mine]), classes[mine]).backward()
    alone(networks[1](input), classes).backward()
    for actual, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        close(actual.grad.full_tensor(), expected.grad, 1e-11)


def test_dtensors_are_refused_and_a_sharded_network_is_trained():
    processes.run(2, check_dtensors)


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


def check_construction():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for changes, exception, message in (
        ({"device_mesh": "cpu"}, TypeError, "device_mesh: got str"),
        ({"device_mesh": init_device_mesh("cpu", (1, 2))}, ValueError, "device_mesh: got 2 dimensions"),
        ({"process_group": dist.group.WORLD}, TypeError, "process_group: got"),
        ({"device": "cpu"}, TypeError, "device: got 'cpu'"),
        ({"num_classes": 1}, ValueError, "num_classes: got 1"),
        ({"temperature": 0}, ValueError, "temperature: got 0"),
    ):
        with pytest.raises(exception, match=message):
            ShardedNCMILoss(**{"num_classes": 7, "feature_dim": M, "device_mesh": mesh} | changes)
    with pytest.raises(RuntimeError, match="backend: got 'reference'"):
        ShardedNCMILoss(7, M, device_mesh=mesh, backend="reference")(
            torch.randn(2, M), torch.zeros(2, dtype=torch.int64)
        )


def test_construction():
    processes.run(2, check_construction)


def test_without_torch_distributed():
    with pytest.raises(RuntimeError, match=r"device_mesh: got no initialized torch\.distributed"):
        ShardedNCMILoss(7, M, device_mesh=None)
