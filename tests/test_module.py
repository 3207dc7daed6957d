"""NCMILoss: its state, its prediction, and that nothing it keeps for speed is ever out of date."""

import copy
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from problems import HALF, WAYS, check, every_ratio, every_way
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ncmi_kernels import CentroidSGD, DivergenceWarning, NCMILoss, _ops, _plain, ncmi_loss, ncmi_terms, reference

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")

BACKENDS = ("cpu", "reference")
B, C, M = 7, 4, 6
OPTIONS = {
    "temperature": 0.5,
    "l2_normalize": False,
    "activation": "softmax",
    "separation": "centroid_to_sample",
    "ratio": "sample",
    "ignore_index": 2,
    "eps": 0.1,
}


def batch(seed=0, size=B, columns=M, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(size, columns, generator=generator) + torch.arange(columns) / columns
    return input.to(dtype), torch.randint(C, (size,), generator=generator)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def loss_and_grads(function, input, *parameters):
    """function(input), and its gradients by the input and by the parameters that require one."""
    input = input.detach().requires_grad_()
    loss = function(input)
    wanted = [input, *(p for p in parameters if p.requires_grad)]
    return loss.detach(), *torch.autograd.grad(loss.sum(), wanted)


def distribution(features, criterion):
    """p of the features in float64, from the definition."""
    x = features.double() - criterion.center.double()
    if criterion.l2_normalize:
        x = x / x.norm(dim=1, keepdim=True)
    return activated(x / criterion.temperature, criterion)


def activated(x, criterion):
    value = x.double().exp() if criterion.activation == "softmax" else x.double().sigmoid()
    return value / value.sum(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# Construction
# ------------------------------------------------------------------------------------------------------------


def test_defaults():
    criterion = NCMILoss(C)
    defaults = {
        "temperature": 1.0,
        "center_momentum": 0.999999,
        "l2_normalize": True,
        "activation": "nsf",
        "separation": "sample_to_centroid",
        "ratio": "batch",
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "eps": 1e-8,
        "backend": None,
        "class_means": None,
        "num_classes": C,
        "feature_dim": C,
        "training": True,
    }
    assert {name: getattr(criterion, name) for name in defaults} == defaults
    assert [name for name, p in criterion.named_parameters() if p.requires_grad] == ["centroid_logits"]
    assert set(criterion.state_dict()) == {"centroid_logits", "center", "num_batches_tracked", "class_means"}
    exactly(criterion.center, torch.zeros(C))
    exactly(criterion.num_batches_tracked, torch.tensor(0))


def test_device_and_dtype():
    weight = torch.ones(C, dtype=torch.float64)
    criterion = NCMILoss(C, M, weight=weight, device="meta", dtype=torch.bfloat16)
    for tensor in (criterion.centroid_logits, criterion.center, criterion.weight):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16)
    assert NCMILoss(C, weight=weight).weight.dtype == torch.float32
    assert NCMILoss(C, weight=weight, dtype=torch.float64).weight.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(("classes", "columns"), [(2, 2), (4, 4), (4, 9)])
def test_initial_centroids_are_one_hot(classes, columns):
    criterion = NCMILoss(classes, columns)
    exactly(criterion.centroid_logits.detach(), 10 * torch.eye(columns)[:classes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_initial_centroids_in_fewer_dimensions_than_classes(dtype):
    def logits(seed):
        torch.manual_seed(seed)
        return NCMILoss(20, 5, dtype=dtype).centroid_logits.detach()

    first = logits(0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert first.dtype == dtype
    first = first.double()
    torch.testing.assert_close(first.norm(dim=1), torch.full((20,), 10.0).double(), rtol=0, atol=tolerance)
    cosine = first @ first.T / 100 - torch.eye(20)
    assert cosine.abs().max() < 0.99
    exactly(logits(0).double(), first)
    assert not torch.equal(logits(1).double(), first)


def test_reset_parameters():
    criterion = NCMILoss(C, M)
    input, target = batch()
    criterion(input, target)
    criterion.fit_class_means([(input, target)])
    with torch.no_grad():
        criterion.centroid_logits.zero_()
    criterion.reset_parameters()
    fresh = NCMILoss(C, M).state_dict()
    assert criterion.state_dict().keys() == fresh.keys()
    for name, tensor in criterion.state_dict().items():
        exactly(tensor, fresh[name])


def test_repr():
    assert repr(NCMILoss(C, M)) == "NCMILoss(num_classes=4, feature_dim=6)"
    changed = {"temperature": 0.5, "ratio": "sample", "separation_focus": 2.0}
    criterion = NCMILoss(C, **changed, center_momentum=None, backend="cpu")
    settings = "temperature=0.5, ratio='sample', separation_focus=2.0, center_momentum=None, backend='cpu'"
    assert repr(criterion) == f"NCMILoss(num_classes=4, feature_dim=4, {settings})"
    criterion.temperature = 1.0
    assert "temperature" not in repr(criterion)


def test_centroids_are_distributions_and_differentiable():
    criterion = NCMILoss(C, M)
    centroids = criterion.centroids()
    torch.testing.assert_close(centroids.detach().double(), activated(criterion.centroid_logits, criterion).detach())
    centroids[0, 0].backward()
    assert criterion.centroid_logits.grad[0].abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------
# The running centre
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_way
def test_centre_update_rule(way, module_dtype, input_dtype, momentum):
    criterion = NCMILoss(C, M, center_momentum=momentum, dtype=module_dtype, **WAYS[way])
    rtol = {torch.float32: 2e-7, torch.float64: 1e-12, torch.bfloat16: 8e-3}[module_dtype]
    for step, size in enumerate((5, 1, 8)):
        input, target = batch(step, size, dtype=input_dtype)
        input = input * (step + 1)
        mean = input.double().mean(dim=0)
        before = criterion.center.double().clone()
        # Rows that are ignored do not count, whatever they hold.
        ignored = torch.full((2, M), torch.nan, dtype=input_dtype)
        criterion(torch.cat((ignored, input)), torch.cat((torch.tensor([-100, -100]), target)))
        expected = momentum * before + (1 - momentum) * mean if step else mean
        torch.testing.assert_close(criterion.center, expected.to(module_dtype), rtol=rtol, atol=0)
        exactly(criterion.num_batches_tracked, torch.tensor(step + 1))
        criterion.eval()
        frozen = criterion.center.clone()
        criterion(input + 1, target)
        exactly(criterion.center, frozen)
        exactly(criterion.num_batches_tracked, torch.tensor(step + 1))
        criterion.train()


@pytest.mark.parametrize("first", [True, False])
@every_way
def test_batch_without_a_sample_changes_nothing(way, first):
    criterion = NCMILoss(C, M, center_momentum=0.5, **WAYS[way])
    input, target = batch()
    if not first:
        criterion(input, target)
    before = criterion.center.clone()
    assert criterion(input + 1, torch.full_like(target, -100)).isnan()
    assert criterion(input[:0], target[:0]).isnan()
    exactly(criterion.center, before)
    exactly(criterion.num_batches_tracked, torch.tensor(0 if first else 1))
    criterion(input + 1, target)
    mean = (input + 1).double().mean(dim=0)
    expected = mean if first else 0.5 * before.double() + 0.5 * mean
    torch.testing.assert_close(criterion.center, expected.float(), rtol=2e-7, atol=0)


@every_ratio
@every_way
def test_centre_that_moves_before_the_backward_pass_of_an_evaluation(way, ratio):
    criterion = NCMILoss(C, M, center_momentum=0.5, ratio=ratio, **WAYS[way])
    input, target = batch()
    criterion(*batch(1))
    expected = loss_and_grads(lambda x: criterion.eval()(x, target), input)
    by_centroids = torch.autograd.grad(criterion(input, target), criterion.centroid_logits)
    input.requires_grad_()
    loss, of_frozen_features = criterion(input, target), criterion(input.detach(), target)
    criterion.train()(*batch(2))
    exactly((loss.detach(), *torch.autograd.grad(loss, input)), expected)
    exactly(torch.autograd.grad(of_frozen_features, criterion.centroid_logits), by_centroids)


@pytest.mark.parametrize("focus", [0.0, 5.0])
@every_ratio
@pytest.mark.parametrize("edited", ["center", "centroid_logits"])
def test_edits_before_the_backward_pass_of_the_function(edited, ratio, focus):
    input, target = batch()
    tensors = {"centroid_logits": torch.randn(C, M, requires_grad=True), "center": torch.zeros(M)}
    losses = [ncmi_loss(input, target, **tensors, ratio=ratio, separation_focus=focus)]
    losses.append(ncmi_terms(input, target, **tensors, separation_focus=focus)[0].sum())
    with torch.no_grad():
        tensors[edited].add_(1)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_centring(backend):
    criterion = NCMILoss(C, M, center_momentum=None, backend=backend)
    input, target = batch()
    logits = criterion.centroid_logits
    exactly(criterion(input, target), ncmi_loss(input, target, logits, l2_normalize=True, backend=backend))
    exactly(criterion.center, torch.zeros(M))
    exactly(criterion.num_batches_tracked, torch.tensor(0))


@every_way
def test_centre_that_is_not_contiguous_moves_too(way):
    criterion = NCMILoss(C, M, **WAYS[way])
    criterion.center = torch.zeros(M, 2)[:, 0]
    input, target = batch()
    criterion(input, target)
    torch.testing.assert_close(criterion.center, input.mean(dim=0), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The loss
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, OPTIONS, {"ratio": "sample", "reduction": "none"}, {"separation_focus": 5.0}], ids=str
)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_the_function_s_at_the_module_s_centre(backend, learnt, weighted, options):
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0]) if weighted else None
    criterion = NCMILoss(C, M, learn_centroids=learnt, weight=weight, backend=backend, center_momentum=0.5, **options)
    logits = criterion.centroid_logits
    for step, training in enumerate((True, True, False, True)):
        input, target = batch(step)
        before = criterion.center.clone()
        actual = loss_and_grads(lambda x, y=target: criterion.train(training)(x, y), input, logits)  # noqa: B023
        assert torch.equal(before, criterion.center) != training
        arguments = {"l2_normalize": True, **options, "weight": weight, "backend": backend}
        center = criterion.center.clone()
        expected = loss_and_grads(
            lambda x, y=target, c=center, a=arguments: ncmi_loss(x, y, logits, center=c, **a), input, logits
        )
        assert len(actual) == len(expected) == (3 if learnt else 2)
        exactly(actual, expected)


def test_fixed_centroids_get_no_gradient():
    criterion = NCMILoss(C, M, learn_centroids=False)
    input, target = batch()
    input.requires_grad_()
    criterion(input, target).backward()
    assert input.grad.abs().sum() > 0
    assert criterion.centroid_logits.grad is None
    assert not criterion.centroid_logits.requires_grad
    assert "centroid_logits" in dict(criterion.named_parameters())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(M,), (3, M), (3, M, 2), (2, M, 3, 2), (0, M), (2, M, 0)])
@every_way
def test_shapes_against_the_flattened_call(way, shape, reduction):
    options = {"ratio": "sample", "reduction": reduction, "center_momentum": 0.5, **WAYS[way]}
    criterion, flat = NCMILoss(C, M, **options), NCMILoss(C, M, **options)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(shape, generator=generator)
        target = torch.randint(C, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
        rows = input.reshape(1, M) if len(shape) == 1 else input.movedim(1, -1).reshape(-1, M)
        actual = loss_and_grads(lambda x, y=target: criterion(x, y), input, criterion.centroid_logits)
        expected = loss_and_grads(lambda x, y=target: flat(x, y.flatten()), rows, flat.centroid_logits)
        assert actual[0].shape == (target.shape if reduction == "none" else ())
        assert actual[1].shape == input.shape
        grad = expected[1]
        grad = grad[0] if len(shape) == 1 else grad.reshape(shape[:1] + shape[2:] + (M,)).movedim(-1, 1)
        torch.testing.assert_close(actual[0].flatten(), expected[0].flatten(), equal_nan=True)
        torch.testing.assert_close(actual[1], grad)
        torch.testing.assert_close(actual[2], expected[2], equal_nan=True)
        exactly(criterion.center, flat.center)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("learnt", [True, False])
@every_way
def test_dtypes_of_module_and_input(way, learnt, module_dtype, input_dtype):
    names = {torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "half"}
    convert = names.get(module_dtype, "float")
    criterion = getattr(NCMILoss(C, M, learn_centroids=learnt, weight=torch.ones(C), **WAYS[way]), convert)()
    logits = criterion.centroid_logits
    for training in (True, True, False):
        input, target = batch(dtype=input_dtype)
        actual = loss_and_grads(lambda x, y=target: criterion.train(training)(x, y), input, logits)  # noqa: B023
        wide = torch.float64 in (module_dtype, input_dtype)
        assert actual[0].dtype == (torch.float64 if wide else torch.float32)
        assert [grad.dtype for grad in actual[1:]] == [input_dtype, module_dtype][: 1 + learnt]
        exact_logits = logits.detach().double().requires_grad_(learnt)
        expected = loss_and_grads(
            lambda x, y=target, q=exact_logits: ncmi_loss(
                x, y, q, center=criterion.center, l2_normalize=True, **WAYS[way] | WAYS["reference"]
            ),
            input.double(),
            exact_logits,
        )
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-12 if wide else 1e-5, atol=0)
        for grad, exact in zip(actual[1:], expected[1:], strict=True):
            tolerance = 1e-2 if grad.dtype in HALF else 1e-4
            assert (grad.double() - exact).norm() <= tolerance * exact.norm()
    assert {p.dtype for p in (criterion.center, criterion.weight, criterion.centroid_logits)} == {module_dtype}
    assert criterion.num_batches_tracked.dtype == torch.int64
    assert criterion.num_batches_tracked == 2
    means = criterion.fit_class_means([(input, target)])
    assert means.dtype == module_dtype
    for class_means in (False, True):
        scores = criterion.scores(input, class_means=class_means)
        assert scores.dtype == (torch.float64 if wide else torch.float32)
        exactly(criterion.predict(input, class_means=class_means), scores.argmax(dim=1))


@every_way
def test_autocast_changes_nothing(way):
    criterion, plain = (NCMILoss(C, M, **WAYS[way]) for _ in range(2))
    input, target = batch()
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_grads(lambda x: criterion(x, target), input, criterion.centroid_logits)
        scores, predicted = criterion.scores(input), criterion.predict(input)
    exactly(actual, loss_and_grads(lambda x: plain(x, target), input, plain.centroid_logits))
    exactly((scores, predicted), (plain.scores(input), plain.predict(input)))
    exactly(criterion.center, plain.center)


# ------------------------------------------------------------------------------------------------------------
# Options after construction
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [*OPTIONS.items(), ("separation_focus", 5.0)], ids=str)
def test_option_set_later_is_the_option_given_at_once(option):
    input, target = batch()
    criterion = NCMILoss(C, M, learn_centroids=False)
    before = criterion(input, target)
    setattr(criterion, *option)
    assert getattr(criterion, option[0]) == option[1]
    later = criterion(input, target)
    fresh = NCMILoss(C, M, learn_centroids=False, **dict([option])).eval()
    fresh.center.copy_(criterion.center)
    assert not torch.equal(later, before)
    exactly(criterion.eval()(input, target), fresh(input, target))


def test_what_is_assigned_later_is_checked():
    input, target = batch()
    for backend in ("cpu", "reference"):
        for focus in (0.0, 5.0):
            for name, value, parts in (
                ("weight", torch.ones(C + 1), rf"weight: got shape \({C + 1},\), expected \({C},\)"),
                ("weight", torch.ones(C, device="meta"), "weight: got device meta, expected cpu"),
                ("weight", nn.Parameter(torch.ones(C)), "weight: got a tensor that requires a gradient"),
                ("center", torch.zeros(M - 1), rf"center: got shape \({M - 1},\), expected \({M},\)"),
                ("center", torch.zeros(M, device="meta"), "center: got device meta, expected cpu"),
            ):
                criterion = NCMILoss(C, M, backend=backend, separation_focus=focus)
                setattr(criterion, name, value)
                with pytest.raises((ValueError, RuntimeError), match=parts):
                    criterion(input, target)
    criterion = NCMILoss(C, M)
    criterion.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="several devices"):
        criterion(input, target)
    with pytest.raises(ValueError, match="center_momentum: got 2"):
        criterion.center_momentum = 2.0
    criterion.center_momentum = np.float32(0.5)
    assert criterion.center_momentum == 0.5


def test_option_set_later_is_checked():
    criterion = NCMILoss(C, M)
    with pytest.raises(ValueError, match=r"temperature: got -1, expected a finite number > 0"):
        criterion.temperature = -1
    with pytest.raises(ValueError, match=r"reduction: got 'none' with ratio='batch'"):
        criterion.reduction = "none"
    assert (criterion.temperature, criterion.reduction) == (1.0, "mean")
    criterion.ratio = "sample"
    criterion.reduction = "none"
    assert criterion(*batch()).shape == (B,)


# ------------------------------------------------------------------------------------------------------------
# State: state_dict, copies, pickles
# ------------------------------------------------------------------------------------------------------------


def trained(steps=3, *, fitted=False, learnt=True, seed=0, **options):
    """A criterion with more classes than dimensions (random centroids), some steps into its training."""
    torch.manual_seed(seed)
    criterion = NCMILoss(C, 3, learn_centroids=learnt, center_momentum=0.9, weight=torch.ones(C), **options)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for step in range(steps):
        input, target = batch(step, columns=3)
        loss = criterion(input, target)
        if learnt:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if fitted:
        criterion.fit_class_means([batch(seed + 1, 40, columns=3)])
    return criterion


def assert_same(criterion, other):
    """Same state, and the same loss to the bit, in evaluation and in the next training steps."""
    state, others = criterion.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        exactly(others[name], tensor)
        assert others[name].data_ptr() != tensor.data_ptr()
    for seed, training in ((7, False), (8, True), (9, True)):
        input, target = batch(seed, columns=3)
        exactly(other.train(training)(input, target), criterion.train(training)(input, target))
        exactly(other.center, criterion.center)
        exactly(other.num_batches_tracked, criterion.num_batches_tracked)
    input, _ = batch(10, columns=3)
    for class_means in (False, True)[: 1 + (criterion.class_means is not None)]:
        exactly(other.scores(input, class_means=class_means), criterion.scores(input, class_means=class_means))


@pytest.mark.parametrize("into", ["fresh", "trained", "fitted"])
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict_round_trip_during_training(backend, learnt, fitted, into):
    criterion = trained(fitted=fitted, learnt=learnt, backend=backend)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    steps = 0 if into == "fresh" else 2
    other = trained(steps, fitted=into == "fitted", learnt=learnt, seed=1, backend=backend)
    assert not torch.equal(other.centroid_logits, criterion.centroid_logits)
    keys = other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert (other.class_means is not None) == fitted
    assert_same(criterion, other)


def test_state_dict_of_a_model_that_holds_the_criterion():
    def model(seed, **options):
        return nn.ModuleDict({"net": nn.Linear(2, 3), "criterion": trained(seed=seed, **options)})

    for fitted, into in ((True, False), (False, True)):
        first, second = model(0, fitted=fitted), model(1, fitted=into)
        assert bool(first.state_dict()["criterion.class_means"].any()) == fitted
        second.load_state_dict(first.state_dict(), strict=True)
        assert_same(first["criterion"], second["criterion"])


def test_state_dict_with_a_key_missing_or_too_many_is_refused():
    state = trained().state_dict()
    with pytest.raises(RuntimeError, match="center"):
        trained().load_state_dict({name: tensor for name, tensor in state.items() if name != "center"})
    with pytest.raises(RuntimeError, match="another"):
        trained().load_state_dict({**state, "another": torch.zeros(1)})


@pytest.mark.parametrize("fitted", [True, False])
def test_loading_keeps_the_dtype_of_the_module(fitted):
    other = trained().double()
    if fitted:
        other.fit_class_means([batch(columns=3)])
    criterion = trained(fitted=True)
    other.load_state_dict(criterion.state_dict())
    assert {t.dtype for t in other.state_dict().values()} == {torch.float64, torch.int64}
    exactly(other.class_means, criterion.class_means.double())


def test_class_means_stay_where_nothing_is_said_of_them():
    model = nn.ModuleDict({"net": nn.Linear(2, 3), "criterion": trained(fitted=True)})
    before = model["criterion"].class_means.clone()
    net = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("net")}
    missing = model.load_state_dict(net, strict=False).missing_keys
    assert "criterion.class_means" in missing
    exactly(model["criterion"].class_means, before)
    with pytest.raises(RuntimeError, match="class_means"):
        model.load_state_dict({name: t for name, t in model.state_dict().items() if "class_means" not in name})


@pytest.mark.parametrize("fitted", [True, False])
def test_class_means_that_do_not_fit_are_refused(fitted):
    criterion = trained(fitted=fitted)
    before = None if criterion.class_means is None else criterion.class_means.clone()
    other = NCMILoss(C + 1, 3)
    other.fit_class_means([(torch.randn(20, 3), torch.arange(20) % C)])
    shape = {**criterion.state_dict(), "class_means": torch.rand(3, 2)}
    for state in (other.state_dict(), shape):
        with pytest.raises(RuntimeError, match="size mismatch for class_means"):
            criterion.load_state_dict(state)
        exactly(criterion.class_means, before) if fitted else None
        assert (criterion.class_means is None) != fitted
    criterion.class_means = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"class_means: got shape \(3, 2\), expected \(4, 3\)"):
        criterion.predict(torch.randn(2, 3), class_means=True)


def test_class_means_fitted_in_inference_mode_are_an_ordinary_buffer():
    criterion = NCMILoss(C, M)
    with torch.inference_mode():
        criterion.fit_class_means([batch()])
    criterion.class_means.mul_(0.5)


def test_a_new_criterion_takes_class_means_from_a_distributed_checkpoint(tmp_path):
    saved = trained(fitted=True)
    checkpoint.save({"criterion": saved.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for new in (trained(seed=1), trained(seed=1, fitted=True)):
        state = {"criterion": new.state_dict()}
        checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        new.load_state_dict(state["criterion"])
        assert_same(new, copy.deepcopy(saved))


def test_state_dict_is_loaded_by_assignment():
    criterion, other = trained(fitted=True, learnt=False), trained(0, seed=1, learnt=False)
    other(*batch(columns=3))
    other.load_state_dict(copy.deepcopy(criterion.state_dict()), assign=True)
    assert_same(criterion, other)


def through_file(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
def test_copies(learnt, fitted, name):
    criterion = trained(fitted=fitted, learnt=learnt, separation="centroid_to_sample")
    other = COPIES[name](criterion)
    assert other._table._key is None
    assert repr(other) == repr(criterion)
    assert other.centroid_logits.requires_grad == learnt
    assert_same(criterion, other)
    # Neither follows what happens to the other.
    input, target = batch(columns=3)
    before = criterion.eval()(input, target)
    with torch.no_grad():
        other.centroid_logits.neg_()
    other.temperature = 0.1
    exactly(criterion(input, target), before)
    assert not torch.equal(other.eval()(input, target), before)


# ------------------------------------------------------------------------------------------------------------
# The cache of fixed centroids
# ------------------------------------------------------------------------------------------------------------

EDITED = torch.randn(C, C, generator=torch.Generator().manual_seed(5))


def optimiser_step(optimizer=torch.optim.SGD, **options):
    def step(criterion):
        criterion.requires_grad_(True)
        with torch.enable_grad():
            criterion(*batch(3, columns=C)).backward()
        optimizer(criterion.parameters(), lr=100.0, **options).step()
        criterion.requires_grad_(False)

    return step


def inference_mode(criterion):
    with torch.inference_mode():
        criterion.centroid_logits.mul_(0.3)


def replace_data(criterion):
    criterion.centroid_logits.data = EDITED.clone()


def transpose_data(criterion):
    # Same address, shape and version: only the strides differ.
    criterion.centroid_logits.data = criterion.centroid_logits.data.t()


def replace_parameter(criterion):
    criterion.centroid_logits = nn.Parameter(EDITED.clone(), requires_grad=False)


def edit_in_float64_and_back(criterion):
    criterion.double().centroid_logits.mul_(0.3)
    criterion.float()


def set_option(name):
    return lambda criterion: setattr(criterion, name, OPTIONS[name])


def other_separation(criterion):
    pair = ("sample_to_centroid", "centroid_to_sample")
    criterion.separation = pair[criterion.separation == pair[0]]


def load(**options):
    return lambda criterion: criterion.load_state_dict(
        {**copy.deepcopy(criterion.state_dict()), "centroid_logits": EDITED.clone()}, **options
    )


EDITS = {
    "in place": lambda criterion: criterion.centroid_logits.mul_(0.3),
    "one element": lambda criterion: criterion.centroid_logits[1, 2].fill_(7.0),
    "copy_": lambda criterion: criterion.centroid_logits.copy_(EDITED),
    "nn.init": lambda criterion: nn.init.normal_(criterion.centroid_logits),
    "through detach": lambda criterion: criterion.centroid_logits.detach().copy_(EDITED),
    "load_state_dict": load(),
    "load_state_dict by assignment": load(assign=True),
    "replace .data": replace_data,
    "transpose .data": transpose_data,
    "replace the parameter": replace_parameter,
    "vector_to_parameters": lambda criterion: nn.utils.vector_to_parameters(
        EDITED.flatten(), [criterion.centroid_logits]
    ),
    "to float64": lambda criterion: criterion.to(torch.float64),
    "to float64 and back": edit_in_float64_and_back,
    "to bfloat16": lambda criterion: criterion.bfloat16(),
    "optimiser step": optimiser_step(),
    "optimiser step, for each": optimiser_step(foreach=True),
    "optimiser step, fused": optimiser_step(fused=True, momentum=0.9),
    "optimiser step, fused AdamW": optimiser_step(torch.optim.AdamW, fused=True),
    "CentroidSGD": lambda criterion: CentroidSGD(criterion, lr=100.0).step(*batch(3, columns=C)),
    "inference mode": inference_mode,
    "reset_parameters": lambda criterion: criterion.reset_parameters(),
    "separation": other_separation,
    "activation": set_option("activation"),
    "temperature": set_option("temperature"),
}


def fixed_criterion(**options):
    """A criterion with fixed centroids that has been used, so that its cache is filled."""
    criterion = NCMILoss(C, C, learn_centroids=False, **options)
    with torch.no_grad():
        criterion.centroid_logits.add_(torch.arange(C * C).view(C, C) / 10)  # not symmetric
    for seed in range(2):
        criterion(*batch(seed, columns=C))
    return criterion


def fresh_copy(criterion):
    names = ("temperature", "activation", "separation", "separation_focus")
    options = {name: getattr(criterion, name) for name in names}
    fresh = NCMILoss(C, C, learn_centroids=False, dtype=criterion.centroid_logits.dtype, **options)
    with torch.no_grad():
        fresh.centroid_logits.copy_(criterion.centroid_logits)
        fresh.center.copy_(criterion.center)
    return fresh


def check_against_a_copy(criterion):
    given = batch(4, columns=C)
    exactly(criterion(*given), copy.deepcopy(criterion)(*given))


def test_fixed_centroids_that_share_their_memory():
    """A vector that is changed in place and set as the parameters again, and another process's writing."""
    options = {"learn_centroids": False, "center_momentum": None}
    criterion = NCMILoss(C, C, **options)
    flat = nn.utils.parameters_to_vector(criterion.parameters()).detach().clone()
    for _ in range(3):
        flat += torch.randn(flat.shape)
        nn.utils.vector_to_parameters(flat, criterion.parameters())
        check_against_a_copy(criterion)
    criterion = NCMILoss(C, C, **options).share_memory()
    check_against_a_copy(criterion)
    # What another process does to shared memory, by another tensor of it.
    storage = criterion.centroid_logits.untyped_storage()
    other = torch.empty(0).set_(torch.UntypedStorage._new_shared_fd_cpu(*storage._share_fd_cpu_()))
    other += torch.randn(other.shape)
    check_against_a_copy(criterion)


@pytest.mark.parametrize("fused", [True, False])
def test_centroids_frozen_between_backward_pass_and_step(fused):
    criterion = NCMILoss(C, C, center_momentum=None)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5, fused=fused)
    criterion(*batch(3, columns=C)).backward()
    criterion.requires_grad_(False)
    check_against_a_copy(criterion)
    optimizer.step()
    check_against_a_copy(criterion)
    optimizer.zero_grad()
    check_against_a_copy(criterion)


@pytest.mark.parametrize("options", [{}, {"separation": "centroid_to_sample"}, {"separation_focus": 5.0}], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_fixed_centroids_are_never_out_of_date(edit, options):
    criterion = fixed_criterion(**options)
    input, target = batch(4, columns=C)
    before = criterion.eval()(input, target)
    with torch.no_grad():
        EDITS[edit](criterion)
    fresh = fresh_copy(criterion).eval()
    for _ in range(2):
        actual = loss_and_grads(lambda x: criterion(x, target), input)
        assert actual[0].item() != before.item()
        exactly(actual, loss_and_grads(lambda x: fresh(x, target), input))


def test_fixed_centroids_given_for_one_call():
    criterion = fixed_criterion().eval()
    input, target = batch(4, columns=C)
    before = criterion(input, target)
    expected = ncmi_loss(input, target, EDITED, center=criterion.center, l2_normalize=True)
    for given in (EDITED, nn.Parameter(EDITED, requires_grad=False)):
        replaced = {"centroid_logits": given}
        exactly(torch.func.functional_call(criterion, replaced, (input, target)), expected)
        exactly(criterion(input, target), before)


def test_fixed_centroids_used_in_inference_mode_first():
    criterion, plain = (NCMILoss(C, C, learn_centroids=False) for _ in range(2))
    input, target = batch(columns=C)
    with torch.inference_mode():
        criterion(input, target)
    plain(input, target)
    exactly(
        loss_and_grads(lambda x: criterion(x, target), input),
        loss_and_grads(lambda x: plain(x, target), input),
    )


@pytest.fixture
def calls(monkeypatch):
    """The centroids of which statistics were computed, call by call."""
    seen, compute = [], _plain.table_of

    def counted(centroid_logits, options, backend):
        seen.append(centroid_logits)
        return compute(centroid_logits, options, backend)

    monkeypatch.setattr(_plain, "table_of", counted)
    return seen


@pytest.mark.parametrize("focus", [0.0, 5.0])
def test_fixed_centroids_are_computed_once(focus, calls):
    criterion = NCMILoss(C, M, learn_centroids=False, separation_focus=focus)
    for seed, training in enumerate((True, True, False)):
        input, target = batch(seed, size=3 + seed)
        criterion.training = training
        criterion(input.requires_grad_(), target).backward()
    assert len(calls) == 1
    with torch.no_grad():
        criterion.centroid_logits.mul_(0.5)
    for _ in range(2):
        criterion(*batch())
    assert len(calls) == 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_edits_that_no_version_counter_sees_count_from_the_next_train_or_eval_on(mode, calls):
    criterion = NCMILoss(C, M, learn_centroids=False, center_momentum=None)
    criterion(*batch())
    criterion.centroid_logits.data.copy_(torch.randn(C, M))
    actual = getattr(criterion, mode)()(*batch())
    assert len(calls) == 2
    fresh = NCMILoss(C, M, center_momentum=None)
    fresh.load_state_dict(criterion.state_dict())
    assert torch.equal(actual, fresh(*batch()))


def test_learnt_centroids_are_computed_every_time(calls):
    criterion = NCMILoss(C, M)
    for _ in range(2):
        criterion(*batch())
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------------
# What is seen of the batches
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"ratio": "sample", "reduction": "none"}, {"separation": "centroid_to_sample"}, {"separation_focus": 5.0}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_last_terms(backend, training, options):
    weight = torch.arange(1.0, C + 1)
    criterion = NCMILoss(C, M, weight=weight, ignore_index=1, backend=backend, **options).train(training)
    assert criterion.last_terms is None
    for seed in range(2):
        input, target = batch(seed)
        criterion(input.requires_grad_(), target)
    arguments = {name: value for name, value in options.items() if name.startswith("separation")}
    arguments |= {"center": criterion.center, "l2_normalize": True}
    each = ncmi_terms(input.double(), target, criterion.centroid_logits.double(), **arguments)
    w = weight.double()[target] * (target != 1)
    for actual, terms in zip(criterion.last_terms, each, strict=True):
        assert actual.dtype is torch.float64
        assert not actual.requires_grad
        torch.testing.assert_close(actual, (w * terms).sum() / w.sum(), rtol=1e-5, atol=0)
    if "ratio" not in options:
        cmi, gamma = criterion.last_terms
        torch.testing.assert_close((cmi / (gamma + criterion.eps)).float(), criterion.eval()(input, target))
    assert copy.deepcopy(criterion).last_terms is None


def test_last_terms_of_a_compiled_criterion():
    criterion = NCMILoss(C, M)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        compiled(*batch(seed))
        found = criterion.last_terms
        criterion.eval()(*batch(seed))
        exactly(found, criterion.last_terms)
        criterion.train()


@pytest.mark.parametrize("trouble", ["nan", "inf", "no separation"])
@every_way
def test_warns_once_when_training_has_failed(way, trouble):
    criterion = NCMILoss(C, M, **WAYS[way], center_momentum=None)
    input, target = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(input, target)
        criterion.eval()(input * torch.nan, target)  # seen by whoever evaluates
        criterion.train()
        nothing = NCMILoss(C, M, **WAYS[way], ratio="sample", reduction="sum")
        assert nothing(input, torch.full_like(target, -100)) == 0
    if trouble == "no separation":
        with torch.no_grad():
            criterion.centroid_logits.fill_(0.5)
        message = "separation of a batch is next to nothing"
        input = torch.ones_like(input)
    else:
        input = input.clone()
        input[2, 1] = float(trouble)
        message = "loss of a batch is not finite"
    with pytest.warns(DivergenceWarning, match=message) as caught:
        criterion(input, target)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(input, target)
    with pytest.warns(DivergenceWarning):
        copy.deepcopy(criterion)(input, target)


# ------------------------------------------------------------------------------------------------------------
# What a graph keeps
# ------------------------------------------------------------------------------------------------------------

GRAPHS = {
    "batch": {},
    "sample": {"ratio": "sample"},
    "other separation": {"separation": "centroid_to_sample"},
    "focus": {"separation_focus": 5.0},
    "fixed": {"learn_centroids": False},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_loss_keeps_nothing_large_after_its_backward_pass(name):
    """All that a graph needs goes through hooks on saved tensors, and autograd lets go of it."""
    classes, columns, rows = 300, 70, 9
    criterion = NCMILoss(classes, columns, **GRAPHS[name])
    input, target = batch(size=rows, columns=columns)
    input.requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(tensor.untyped_storage()) if tensor.numel() >= rows * columns else None)
        return tensor

    before = {id(p) for p in criterion.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = criterion(input, target)
    assert len([each for each in saved if each is not None]) >= 3
    loss.backward()
    large = [
        each
        for each in reachable(loss.grad_fn)
        if each.numel() >= rows * columns and id(each) not in before and each is not input
    ]
    assert large == []


def reachable(node):
    """Tensors that the attributes of a graph's node lead to."""
    found, pending, seen = [], [vars(node) if hasattr(node, "__dict__") else {}], set()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, dict):
            pending += each.values()
        elif isinstance(each, (list, tuple)):
            pending += each
        elif hasattr(each, "__dict__"):
            pending.append(vars(each))
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_saved_tensors_that_were_moved_away_and_back(name):
    criterion = NCMILoss(C, M, **GRAPHS[name])
    input, target = batch()
    expected = loss_and_grads(lambda x: copy.deepcopy(criterion)(x, target), input)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().numpy(), torch.from_numpy):
        exactly(loss_and_grads(lambda x: criterion(x, target), input), expected)


@pytest.mark.parametrize("focus", [0.0, 5.0])
def test_weights_changed_in_place_before_a_backward_pass(focus):
    input, target = batch()
    weight = torch.rand(C)
    input.requires_grad_()
    for create_graph in (True, False):
        loss = ncmi_loss(input, target, torch.randn(C, M), weight=weight, separation_focus=focus)
        weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, input, create_graph=create_graph)


@every_ratio
@pytest.mark.parametrize("focus", [0.0, 5.0])
@pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
def test_ignored_rows_stay_zero_whatever_comes_from_above(upstream, focus, ratio):
    for backend in BACKENDS:
        criterion = NCMILoss(C, M, ratio=ratio, separation_focus=focus, backend=backend)
        input, target = batch()
        target[2:4] = -100
        input.requires_grad_()
        criterion(input, target).backward(torch.tensor(upstream))
        exactly(input.grad[2:4], torch.zeros(2, M))
        assert not input.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"separation_focus": 5.0}, {"backend": "reference"}], ids=str)
def test_a_forward_pass_that_fails_has_moved_nothing(options, monkeypatch):
    criterion = NCMILoss(C, M, **options)
    criterion(*batch())
    before = copy.deepcopy(criterion.state_dict())

    def fail(*args, **kwargs):
        raise MemoryError

    run = _ops.operators("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(run, "terms" if options else "loss", fail)
        patch.setattr(reference, "terms", fail)
        with pytest.raises(MemoryError):
            criterion(*batch(1))
    input, target = batch(2)
    target[3] = C
    with pytest.raises(IndexError):
        criterion(input, target)
    exactly(dict(criterion.state_dict()), dict(before))


# ------------------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------------------


def negative_divergences(p, q):
    """- KL(p_i || q_c) in float64 [B, C], from the definition."""
    p, q = p[:, None], q[None]
    return -(p * (p.log() - q.log())).sum(dim=2)


PREDICTED = {
    "defaults": {},
    "no l2": {"l2_normalize": False},
    "softmax": {"activation": "softmax", "temperature": 0.2},
    "float64": {"dtype": torch.float64},
    "no centre": {"center_momentum": None},
}


def predicting(options, classes=C, columns=M, size=64):
    """A criterion with random centroids and class means, and features."""
    generator = torch.Generator().manual_seed(0)
    criterion = NCMILoss(classes, columns, **options)
    dtype = criterion.center.dtype
    with torch.no_grad():
        criterion.centroid_logits.add_(torch.randn(classes, columns, generator=generator))
    features = torch.randn(size, columns, generator=generator, dtype=torch.float64).to(dtype)
    criterion(features, torch.arange(size) % classes)
    criterion.fit_class_means([(features, torch.arange(size) % classes)])
    return criterion, features + 0.1


@pytest.mark.parametrize("class_means", [False, True])
@pytest.mark.parametrize("name", PREDICTED)
def test_scores_and_predictions_against_the_definition(name, class_means):
    criterion, features = predicting(PREDICTED[name])
    p = distribution(features, criterion)
    q = criterion.class_means.double() if class_means else activated(criterion.centroid_logits.detach(), criterion)
    divergences = negative_divergences(p, q)
    scores = criterion.scores(features, class_means=class_means)
    assert (scores.shape, scores.dtype) == ((64, C), features.dtype)
    assert not scores.requires_grad
    entropy = (p * p.log()).sum(dim=1, keepdim=True)
    expected = divergences + entropy
    assert (scores.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    predicted = criterion.predict(features, class_means=class_means)
    exactly(predicted, divergences.argmax(dim=1))
    exactly(predicted, scores.argmax(dim=1))
    assert len(predicted.unique()) > 1


@pytest.mark.parametrize("class_means", [False, True])
def test_predictions_where_all_classes_are_nearly_as_likely(class_means):
    # With many features of length one, p and q differ by a percent, and the scores of two classes by 1e-4.
    criterion, features = predicting({}, classes=50, columns=512, size=500)
    q = criterion.class_means.double() if class_means else activated(criterion.centroid_logits.detach(), criterion)
    divergences = negative_divergences(distribution(features, criterion), q)
    exactly(criterion.predict(features, class_means=class_means), divergences.argmax(dim=1))


@pytest.mark.parametrize("class_means", [True, False])
def test_predictions_of_any_shape_that_the_loss_takes(class_means):
    criterion = NCMILoss(C, M)
    image, classes = torch.randn(3, M, 2, 4), torch.randint(C, (3, 2, 4))
    rows = image.movedim(1, -1).reshape(-1, M)
    exactly(criterion.fit_class_means([(image, classes)]), NCMILoss(C, M).fit_class_means([(rows, classes.flatten())]))
    criterion.fit_class_means([(image, classes), (rows[0], classes[0, 0, 0])])
    scores, predicted = (function(rows, class_means=class_means) for function in (criterion.scores, criterion.predict))
    exactly(criterion.scores(image, class_means=class_means).movedim(1, -1).reshape(-1, C), scores)
    exactly(criterion.predict(image, class_means=class_means), predicted.view(3, 2, 4))
    torch.testing.assert_close(criterion.scores(rows[0], class_means=class_means), scores[0])
    exactly(criterion.predict(rows[0], class_means=class_means), predicted[0])
    assert criterion.scores(image[:0], class_means=class_means).shape == (0, C, 2, 4)


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e37])
def test_the_length_of_huge_features_drops_out(scale):
    criterion = NCMILoss(C, M, center_momentum=None)
    features, target = torch.randn(30, M), torch.randint(C, (30,))
    exactly(criterion.predict(scale * features), criterion.predict(features))
    expected = criterion.fit_class_means([(features, target)]).clone()
    torch.testing.assert_close(criterion.fit_class_means([(scale * features, target)]), expected)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_state_alone(training):
    criterion, features = predicting({})
    criterion.train(training)
    before = copy.deepcopy(criterion.state_dict())
    criterion.predict(features)
    criterion.scores(features)
    exactly(criterion.predict(features[:0]), torch.zeros(0, dtype=torch.int64))
    criterion.fit_class_means([(features - 0.1, torch.arange(64) % C)])
    exactly(dict(criterion.state_dict()), dict(before))


def test_class_means_are_the_direct_means():
    criterion, _ = predicting({"ignore_index": 1})
    features, target = batch(1, 50)
    p = distribution(features, criterion)
    expected = torch.stack([p[target == c].mean(dim=0) if c != 1 else torch.zeros(M).double() for c in range(C)])
    whole = criterion.fit_class_means([(features, target)])
    assert whole is criterion.class_means
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=0)
    sizes = (1, 20, 0, 3, 26)
    streamed = criterion.fit_class_means(pair for pair in zip(features.split(sizes), target.split(sizes), strict=True))
    torch.testing.assert_close(streamed.double(), expected, rtol=1e-6, atol=0)


def test_class_means_of_samples_that_are_ignored_or_not_there():
    criterion = NCMILoss(C, M)
    features, target = batch(1, 50)
    target[target == 2] = -100
    features[target == -100] = torch.nan
    means = criterion.fit_class_means([(features, target)])
    assert means.isfinite().all()
    exactly(means[2], torch.zeros(M))
    present = [0, 1, 3]
    torch.testing.assert_close(means[present].sum(dim=1), torch.ones(3))
    features, _ = batch(2, 50)
    scores = criterion.scores(features, class_means=True)
    exactly(scores[:, 2], torch.full((50,), -torch.inf))
    assert scores[:, present].isfinite().all()
    predicted = criterion.predict(features, class_means=True)
    exactly(predicted, scores.argmax(dim=1))
    assert set(predicted.tolist()) == set(present)


@pytest.mark.parametrize("activation", ["nsf", "softmax"])
def test_missing_class_is_not_predicted_where_a_probability_underflows(activation):
    criterion = NCMILoss(C, M, l2_normalize=False, center_momentum=None, activation=activation)
    features, _ = batch(1, 9)
    criterion.fit_class_means([(features, torch.arange(9) % 3)])
    features[:, 0] = -200.0
    scores = criterion.scores(features, class_means=True)
    exactly(scores[:, 3], torch.full((9,), -torch.inf))
    assert scores[:, :3].isfinite().all()
    exactly(criterion.predict(features, class_means=True), scores.argmax(dim=1))


def test_class_means_fitted_again():
    criterion, features = predicting({})
    first = criterion.class_means.clone()
    other, target = batch(3, 40)
    criterion.fit_class_means([(other, target)])
    fresh = copy.deepcopy(criterion)
    fresh.reset_parameters()
    fresh.center.copy_(criterion.center)
    fresh.fit_class_means([(other, target)])
    assert not torch.equal(criterion.class_means, first)
    exactly(criterion.class_means, fresh.class_means)
    exactly(criterion.scores(features, class_means=True), fresh.scores(features, class_means=True))


# ------------------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------------------


def compiled_pair(**options):
    """The same criterion twice, for torch.compile and for eager."""
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0])
    return [NCMILoss(C, M, weight=weight, center_momentum=0.5, **options) for _ in range(2)]


def compare_step(compiled, function, eager, seed, size, dtype=torch.float32):
    input, target = batch(seed, size, dtype=dtype)
    target[0] = -100
    actual = loss_and_grads(lambda x: function(x, target), input, compiled.centroid_logits)
    expected = loss_and_grads(lambda x: eager(x, target), input, eager.centroid_logits)
    check(actual, expected, 1e-6)
    if not eager.separation_focus:  # of which products of matrices round otherwise
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(compiled.center, eager.center, rtol=1e-6, atol=1e-8)
    exactly(compiled.num_batches_tracked, eager.num_batches_tracked)


@pytest.fixture(scope="module", params=[{}, {"learn_centroids": False}, {"separation_focus": 5.0}], ids=str)
def traced(request):
    """A criterion compiled for any batch size, its eager twin, and the counter of the graphs compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = compiled_pair(**request.param)
    yield compiled, torch.compile(compiled, fullgraph=True, dynamic=True, backend=counter), eager, counter
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_compiled_gives_what_eager_gives(traced, training):
    compiled, function, eager, counter = traced
    compiled.train(training), eager.train(training)
    before = compiled.num_batches_tracked.clone()
    compare_step(compiled, function, eager, 0, 5)
    graphs = counter.frame_count
    for seed, size in ((1, 5), (2, 9), (3, 16), (4, 2)):
        compare_step(compiled, function, eager, seed, size)
    assert counter.frame_count == graphs > 0  # one graph for every batch size
    exactly(compiled.num_batches_tracked, before + (5 if training else 0))


def test_compiled_follows_edited_centroids_and_options(traced):
    compiled, function, eager, _ = traced
    for criterion in (compiled, eager):
        criterion.eval()
        with torch.no_grad():
            criterion.centroid_logits.mul_(0.5)
    compare_step(compiled, function, eager, 5, 6)
    for criterion in (compiled, eager):
        criterion.temperature = 0.5
    compare_step(compiled, function, eager, 6, 6)


def test_compiled_refuses_a_target_and_keeps_the_centre(traced):
    compiled, function, eager, _ = traced
    compiled.train(), eager.train()
    compare_step(compiled, function, eager, 7, 6)
    state = copy.deepcopy(dict(compiled.state_dict()))
    input = batch(8, 6)[0].requires_grad_()
    with pytest.raises(IndexError, match=r"target: value 4 at row 2 is out of range, expected a class in \[0, 4\)"):
        function(input, torch.tensor([0, 1, C, 2, 3, 0]))
    exactly(dict(compiled.state_dict()), state)


@pytest.mark.parametrize("learnt", [True, False])
def test_compiled_bfloat16_input_and_reference_backend(learnt):
    torch._dynamo.reset()
    for options, dtype in (({}, torch.bfloat16), ({"backend": "reference"}, torch.float32)):
        compiled, eager = compiled_pair(learn_centroids=learnt, **options)
        function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            compare_step(compiled, function, eager, seed, 5, dtype)


def test_compiled_by_inductor_with_the_layer_before_it():
    torch._dynamo.reset()
    compiled, eager = compiled_pair()
    torch.manual_seed(0)
    layer = nn.Linear(M, M, bias=False)
    function = torch.compile(lambda x, y: compiled(layer(x), y), fullgraph=True)
    for seed in range(3):
        input, target = batch(seed)
        actual = loss_and_grads(lambda x, y=target: function(x, y), input, compiled.centroid_logits, layer.weight)
        expected = loss_and_grads(lambda x, y=target: eager(layer(x), y), input, eager.centroid_logits, layer.weight)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(compiled.center, eager.center)
        exactly(compiled.num_batches_tracked, torch.tensor(seed + 1))
    torch._dynamo.reset()
