"""NCMILoss: construction, the running centre, the loss, its options, and what a graph keeps of it."""

import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
from criteria import BACKENDS, OPTIONS, B, C, M, activated, batch, exactly, loss_and_grads
from problems import HALF, WAYS, every_ratio, every_way
from torch import nn

from ncmi_kernels import DivergenceWarning, NCMILoss, _ops, ncmi_loss, ncmi_terms, reference

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


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
        "num_classes": C,
        "feature_dim": C,
        "training": True,
    }
    assert {name: getattr(criterion, name) for name in defaults} == defaults
    assert [name for name, p in criterion.named_parameters() if p.requires_grad] == ["centroid_logits"]
    assert set(criterion.state_dict()) == {
        "centroid_logits",
        "center",
        "num_batches_tracked",
        "class_means",
        "scores_temperature",
    }
    exactly(criterion.center, torch.zeros(C))
    exactly(criterion.class_means, torch.zeros(C, C))
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


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
@every_way
def test_the_centre_stays_where_gradients_are_disabled(way, disabled):
    """An evaluation loop that forgot eval() has the loss of one that did not."""
    criterion = NCMILoss(C, M, **WAYS[way], center_momentum=0.5)
    criterion(*batch())
    before = copy.deepcopy(dict(criterion.state_dict()))
    input, target = batch(1)
    with disabled():
        exactly(criterion(input, target), criterion.eval()(input, target))
        exactly(dict(criterion.state_dict()), before)
        criterion.train()
        with torch.inference_mode(False), torch.enable_grad():
            criterion(*batch(1))
    exactly(criterion.num_batches_tracked, torch.tensor(2))
    assert not torch.equal(criterion.center, before["center"])


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
