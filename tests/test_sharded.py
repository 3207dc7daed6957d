"""ShardedNCMILoss: the numbers of NCMILoss with all centroids in one process, whatever is where."""

import tempfile

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from conftest import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ncmi_kernels import CentroidSGD, NCMILoss, ShardedNCMILoss

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")

M = 9
IGNORED = -7
SIZES = {2: [8, 5], 4: [5, 0, 3, 8]}  # rows of each process
CLASSES = {2: [2, 7], 4: [2, 7, 13]}  # even, uneven, and fewer classes than processes
VARIANTS = [
    {"separation": separation, "ratio": ratio, "reduction": reduction}
    for separation in ("sample_to_centroid", "centroid_to_sample")
    for ratio, reduction in (("batch", "mean"), ("sample", "mean"), ("sample", "sum"))
]


def batches(classes, dtype, seed=0):
    """A batch for each process, and all of them in one; about one row in five is ignored."""
    sizes = SIZES[dist.get_world_size()]
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(sizes), M, generator=generator, dtype=torch.float64) + torch.arange(M) / M
    target = torch.randint(classes, (sum(sizes),), generator=generator)
    target[torch.rand(len(target), generator=generator) < 0.2] = IGNORED
    whole = features.to(dtype), target
    return list(zip(*(tensor.split(sizes) for tensor in whole), strict=True)), whole


def pair(classes, dtype=torch.float32, columns=M, **options):
    """A criterion whose centroids are shared out, and one that has them all."""
    options = {"dtype": dtype, "ignore_index": IGNORED, "center_momentum": 0.5, **options}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = NCMILoss(classes, columns, **options)
    options.pop("process_group", None)
    sharded = ShardedNCMILoss(classes, columns, device_mesh=mesh, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        plain.centroid_logits.copy_(torch.randn(classes, columns, generator=generator, dtype=torch.float64))
        own(sharded.centroid_logits).copy_(part(plain.centroid_logits))
    return sharded, plain


def own(table):
    return table.detach().to_local()


def part(whole):
    """The rows of a [C, M] tensor that this process has."""
    rows = -(-len(whole) // dist.get_world_size())
    return whole.detach()[dist.get_rank() * rows :][:rows]


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert not len(expected) or relative(actual, expected) <= tolerance


def gradients(criterion, features, target, wanted):
    features = features.detach().requires_grad_()
    loss = criterion(features, target)
    grads = torch.autograd.grad(loss, [features, *wanted], torch.tensor(3.0, dtype=loss.dtype))
    return loss.detach(), *grads


# ------------------------------------------------------------------------------------------------------------
# Against one process
# ------------------------------------------------------------------------------------------------------------


def check_step(classes, options, dtype, input_dtype, tolerance, learn):
    rank, size = dist.get_rank(), dist.get_world_size()
    sharded, plain = pair(classes, dtype, learn_centroids=learn, **options)
    for seed in range(2):  # fixed centroids come from the cache the second time
        each, whole = batches(classes, input_dtype, seed)
        rows = [len(target) for _, target in each]
        loss, by_input, *by_centroids = gradients(sharded, *each[rank], [sharded.centroid_logits] if learn else [])
        expected_loss, expected_by_input, *expected_by_centroids = gradients(
            plain, *whole, [plain.centroid_logits] if learn else []
        )
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
        rounding = tolerance if input_dtype == dtype else torch.finfo(input_dtype).eps
        close(by_input / size, expected_by_input.split(rows)[rank], rounding)
        if learn:
            assert isinstance(by_centroids[0], DTensor)
            close(own(by_centroids[0]), part(expected_by_centroids[0]), tolerance)
        # The centre does not move in it, and the next step starts from the same one.
        gradient = sharded.centroid_gradient(*each[rank])
        close(own(gradient), part(plain.centroid_gradient(*whole)), tolerance)
        close(sharded.center, plain.center, tolerance)
        for actual, expected in zip(sharded.last_terms, plain.last_terms, strict=True):
            torch.testing.assert_close(actual, expected, rtol=max(tolerance, 1e-12), atol=0)


def check_steps():
    weight_of = {n: torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.5 for n in (2, 7, 13)}
    for classes in CLASSES[dist.get_world_size()]:
        weight = weight_of[classes]
        for index, options in enumerate(VARIANTS):
            learn = index % 2 == 0
            check_step(classes, options, torch.float64, torch.float64, 1e-11, learn)
            check_step(classes, {**options, "weight": weight}, torch.float32, torch.float32, 2e-6, not learn)
        check_step(classes, {"center_momentum": None}, torch.float32, torch.bfloat16, 2e-6, True)
        check_step(classes, {"activation": "softmax", "l2_normalize": False}, torch.float32, torch.float32, 2e-6, True)


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_is_that_of_one_process_with_all_rows_and_classes(size):
    processes.run(size, check_steps)


def check_special_batches():
    rank = dist.get_rank()
    sharded, plain = pair(7, torch.float64, ratio="sample", reduction="none")
    each, whole = batches(7, torch.float64)
    losses, expected = sharded(*each[rank]), plain(*whole)
    rows = slice(0, 8) if rank == 0 else slice(8, 13)
    close(losses, expected[rows], 1e-11)
    upstream = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    features, every = each[rank][0].requires_grad_(), whole[0].requires_grad_()
    by_input, by_centroids = torch.autograd.grad(
        sharded(features, each[rank][1]), [features, sharded.centroid_logits], upstream[rows]
    )
    expected_by_input, expected_by_centroids = torch.autograd.grad(
        plain(every, whole[1]), [every, plain.centroid_logits], upstream
    )
    close(by_input, expected_by_input[rows], 1e-11)
    close(own(by_centroids), part(expected_by_centroids), 1e-11)

    sharded, plain = pair(7, torch.float64)
    image = torch.randn(4, M, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(4))
    loss, by_input = gradients(sharded, image[rank::2], target[rank::2], [])
    expected_loss, expected_by_input = gradients(plain, image, target, [])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0)
    close(by_input / 2, expected_by_input[rank::2], 1e-11)

    # No row counts anywhere: as one process.
    nothing = torch.full((3,), IGNORED)
    loss, by_input = gradients(sharded, torch.randn(3, M, dtype=torch.float64), nothing, [])
    assert loss.isnan()
    assert not by_input.any()
    optimizer = CentroidSGD(sharded, 20.0, 0.9, 1e-2)
    optimizer.step(*each[rank])
    before = own(sharded.centroid_logits).clone()
    optimizer.step(torch.randn(3, M, dtype=torch.float64), nothing)
    assert torch.equal(own(sharded.centroid_logits), before)
    sharded.centroid_logits.requires_grad_(True)

    # A target that is no class, a double backward, and what cannot be assigned or formed.
    with pytest.raises(IndexError, match="value 7 at row 1"):
        sharded(image[:2, :, 0], torch.tensor([0, 7]))
    features = torch.randn(3, M, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(sharded(features, target[0, :3]), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"scores: got .* expected predict"):
        sharded.scores(features)
    with pytest.raises(AttributeError, match="process_group"):
        sharded.process_group = None
    sharded.separation_focus = 2.0
    with pytest.raises(ValueError, match=r"separation_focus: got 2.0, expected 0"):
        sharded(features, target[0, :3])


def test_special_batches_and_what_is_refused():
    processes.run(2, check_special_batches)


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
        each, whole = batches(13, torch.float64)
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


# ------------------------------------------------------------------------------------------------------------
# Training, prediction, checkpoints
# ------------------------------------------------------------------------------------------------------------


def check_training():
    rank = dist.get_rank()
    for by_autograd in (True, False):
        sharded, plain = pair(13, torch.float64)
        if by_autograd:
            optimizers = [torch.optim.SGD(c.parameters(), 20.0, momentum=0.9) for c in (sharded, plain)]
        else:
            optimizers = [CentroidSGD(c, 20.0, 0.9, 1e-3, nesterov=True) for c in (sharded, plain)]
        before = plain.centroid_logits.clone()
        for seed in range(6):
            each, whole = batches(13, torch.float64, seed)
            for criterion, optimizer, batch in zip((sharded, plain), optimizers, (each[rank], whole), strict=True):
                optimizer.zero_grad()
                loss = criterion(*batch)
                if by_autograd:
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(criterion.parameters(), 1e-3)
                    optimizer.step()
                else:
                    optimizer.step(*batch)
        close(own(sharded.centroid_logits), part(plain.centroid_logits), 1e-9)
        assert (plain.centroid_logits - before).norm() > 1e-4


def check_prediction():
    rank, size = dist.get_rank(), dist.get_world_size()
    for classes in (2, 13):
        sharded, plain = pair(classes, torch.float64)
        each, whole = batches(classes, torch.float64)
        sharded(*each[rank]), plain(*whole)
        rows = [len(target) for _, target in each]
        expected = plain.predict(whole[0]).split(rows)[rank]
        assert torch.equal(sharded.predict(each[rank][0]), expected)
        assert sharded.predict(each[rank][0][:0]).shape == (0,)
        with torch.inference_mode():
            assert torch.equal(sharded.predict(each[rank][0]), expected)
            gradient = sharded.centroid_gradient(*each[rank])
            close(own(gradient), part(plain.centroid_gradient(*whole)), 1e-11)
        # Processes with different numbers of batches.
        mine = [each[rank]] * (1 + (rank == size - 1))
        close(own(sharded.fit_class_means(mine)), part(plain.fit_class_means([*each, each[-1]])), 1e-11)
        expected = plain.predict(whole[0], class_means=True).split(rows)[rank]
        assert torch.equal(sharded.predict(each[rank][0], class_means=True), expected)
        assert isinstance(sharded.centroids(), DTensor)
        close(own(sharded.centroids()), part(plain.centroids()), 1e-12)


def check_initial():
    """The same for every number of processes: one-hot rows, or random directions of length 10."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    assert torch.equal(own(ShardedNCMILoss(7, 9, device_mesh=mesh).centroid_logits), part(10 * torch.eye(7, 9)))
    torch.manual_seed(5 + dist.get_rank())  # process 0's counts
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


def save(directory, steps):
    return _train(directory, range(steps), save_to=directory)


def resume(directory, steps, further):
    return _train(directory, range(steps, steps + further), load_from=directory)


def _train(directory, seeds, save_to=None, load_from=None):
    sharded, _ = pair(13, torch.float64)
    optimizer = CentroidSGD(sharded, 20.0, 0.9)
    if load_from:
        with torch.no_grad():
            own(sharded.centroid_logits).fill_(float("nan"))
        state = {"criterion": sharded.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.load(state, checkpoint_id=load_from)
        sharded.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        return numbers(sharded, optimizer)
    for seed in seeds:
        each, _ = batches(13, torch.float64, seed)
        sharded(*each[dist.get_rank()])
        optimizer.step(*each[dist.get_rank()])
    sharded.fit_class_means([each[dist.get_rank()]])
    checkpoint.save({"criterion": sharded.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=save_to)
    return numbers(sharded, optimizer)


def numbers(sharded, optimizer):
    (state,) = optimizer.state.values()
    tables = sharded.centroid_logits.detach(), sharded.class_means, state["momentum_buffer"]
    return [*(table.full_tensor().numpy() for table in tables), sharded.center.numpy(), state["step"]]


def test_checkpoints_move_between_numbers_of_processes():
    with tempfile.TemporaryDirectory() as directory:
        saved = processes.run(4, save, directory, 3)[0]
        for size in (2, 4):
            loaded = processes.run(size, resume, directory, 3, 2)
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
    each, _ = batches(7, torch.float64)
    features, target = each[rank]
    for criterion in (sharded, plain):
        for name in ("input", "target"):
            arguments = {"input": features, "target": target}
            arguments[name] = DTensor.from_local(arguments[name], mesh, run_check=False)
            with pytest.raises(RuntimeError, match=rf"{name}: got a DTensor, expected .*to_local"):
                criterion(**arguments)
    # Within fully_shard the centroids are whole in the forward pass, and only then.
    for learn in (True, False):
        _, plain = pair(7, torch.float64, learn_centroids=learn)
        _, wrapped = pair(7, torch.float64, learn_centroids=learn, process_group=dist.group.WORLD)
        fully_shard(wrapped, mesh=mesh)
        each, whole = batches(7, torch.float64)
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
