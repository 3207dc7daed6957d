"""torch.compile, torch.export, torch.jit.trace, compiled autograd and fake tensors, of a criterion and of a step."""

import copy
import io
from functools import partial

import pytest
import torch
from criteria import CRITERIA, B, C, M, batch, exactly, loss_and_grads, step_pair
from problems import check
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad

from ncmi_kernels import CentroidSGD, NCMILoss, ncmi_terms

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")


# ------------------------------------------------------------------------------------------------------------
# A criterion
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


# ------------------------------------------------------------------------------------------------------------
# A training step, terms, export
# ------------------------------------------------------------------------------------------------------------


def compare_training(pair, compiled_step, eager_step, tolerance):
    """Both train on the same batches, of many sizes."""
    for size in (7, 16, 33, 64, 65):
        x, y = torch.randn(size, 8), torch.randint(C, (size,))
        torch.testing.assert_close(compiled_step(x, y).detach(), eager_step(x, y).detach(), rtol=tolerance, atol=1e-7)
    states = [{**network.state_dict(), **criterion.state_dict()} for network, criterion, *_ in pair]
    torch.testing.assert_close(*states, rtol=tolerance, atol=1e-6)
    assert states[0]["num_batches_tracked"] == 5


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
@pytest.mark.parametrize(("ratio", "learnt"), [("batch", False), ("sample", True)])
def test_compiled_forward_with_an_eager_optimizer(ratio, learnt, dynamic, graphs):
    torch._dynamo.reset()
    counter = CompileCounter()
    pair = step_pair(ratio, learnt)

    def step(network, criterion, wanted, optimizer, forward, x, y):
        optimizer.zero_grad()
        loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 0.1)
        optimizer.step()
        return loss

    forwards = [lambda x, y, network=n, criterion=c: criterion(network(x), y) for n, c, *_ in pair]
    forwards[0] = torch.compile(forwards[0], fullgraph=True, dynamic=dynamic, backend=counter)
    compare_training(pair, *(partial(step, *each, f) for each, f in zip(pair, forwards, strict=True)), 1e-6)
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("ratio", "learnt", "backend"),
    [("batch", True, "aot_eager"), ("sample", False, "aot_eager"), ("batch", True, "inductor")],
)
def test_a_whole_step_in_one_graph(ratio, learnt, backend):
    """Forward, backward and update of model and centroids. (torch breaks the graph in Optimizer.step, for any loss.)"""
    torch._dynamo.reset()
    counters.clear()

    def step(network, criterion, wanted, x, y):
        loss = criterion(network(x), y)
        gradients = grad(loss, wanted)
        with torch.no_grad():
            for parameter, gradient in zip(wanted, gradients, strict=True):
                parameter.sub_(gradient, alpha=0.5)
        return loss.detach()

    pair = step_pair(ratio, learnt)
    whole = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compare_training(pair, *(partial(f, *each[:3]) for each, f in zip(pair, (whole, step), strict=True)), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_step_with_an_optimizer():
    torch._dynamo.reset()
    pair = step_pair("batch", True)

    def step(network, criterion, wanted, optimizer, x, y):
        optimizer.zero_grad()
        loss = criterion(network(x), y)
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(step, dynamic=True, backend="aot_eager")
    compare_training(pair, *(partial(f, *each) for each, f in zip(pair, (compiled, step), strict=True)), 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_terms(backend):
    torch._dynamo.reset()
    compiled = torch.compile(partial(ncmi_terms, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 9):
        xi = torch.randn(C, M).requires_grad_()
        z, y = torch.randn(size, M).requires_grad_(), torch.randint(C, (size,))
        actual, expected = compiled(z, y, xi), ncmi_terms(z, y, xi, backend=backend)
        torch.testing.assert_close(actual, expected)
        upstream = torch.randn(size), torch.randn(size)
        torch.testing.assert_close(grad(actual, (z, xi), upstream), grad(expected, (z, xi), upstream))


class Method(nn.Module):
    """A network and a method of a criterion, as one module."""

    def __init__(self, name, learnt, **keywords):
        super().__init__()
        self.network, self.criterion = nn.Linear(8, M), NCMILoss(C, M, learn_centroids=learnt)
        self.name, self.keywords = name, keywords
        batch = torch.randn(30, M), torch.arange(30) % C
        self.criterion(*batch)
        self.criterion.fit_class_means([batch])

    def forward(self, x, *target):
        return getattr(self.criterion, self.name)(self.network(x), *target, **self.keywords)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("forward", {}),
        ("scores", {}),
        ("scores", {"class_means": True}),
        ("predict", {}),
        ("predict", {"class_means": True}),
    ],
)
def test_export_of_the_evaluation(name, keywords, learnt):
    module = Method(name, learnt, **keywords).eval()

    def arguments(size):
        return (torch.randn(size, 8), *([torch.randint(C, (size,))] if name == "forward" else []))

    example = arguments(5)
    rows = {0: torch.export.Dim("rows", min=2, max=4096)}
    exported = torch.export.export(module, example, dynamic_shapes=(rows, *([(rows,)] if name == "forward" else [])))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 7, 64):
        batch = arguments(size)
        torch.testing.assert_close(loaded(*batch), module(*batch), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------
# Tracing without values
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITERIA)
def test_fake_tensors(name):
    """What estimates memory or counts operations of a whole program without running it."""
    with FakeTensorMode() as mode:
        options = {key: mode.from_tensor(o) if isinstance(o, torch.Tensor) else o for key, o in CRITERIA[name].items()}
        criterion = NCMILoss(C, M, **options)
        z, y = torch.randn(B, M, requires_grad=True), torch.randint(C, (B,))
        optimizer = CentroidSGD(criterion, 0.1, momentum=0.9)
        for training in (True, False):
            loss = criterion.train(training)(z, y)
            assert loss.shape == ()
            loss.backward()
        assert z.grad.shape == (B, M)
        optimizer.step(z.detach(), y)
        assert criterion.fit_class_means([(z.detach(), y)]).shape == (C, M)
        assert criterion.predict(z, class_means=True).shape == (B,)
        assert ncmi_terms(z, y, torch.randn(C, M))[0].shape == (B,)


def test_fake_inputs_leave_nothing_in_a_real_criterion():
    criterion = NCMILoss(C, M, learn_centroids=False).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        criterion(torch.randn(B, M), torch.randint(C, (B,)))
    z, y = torch.randn(B, M), torch.randint(C, (B,))
    exactly(criterion(z, y), copy.deepcopy(criterion)(z, y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CRITERIA)
def test_jit_trace(name, training):
    criterion = NCMILoss(C, M, **CRITERIA[name]).train(training)
    z, y = torch.randn(B, M), torch.arange(B) % C
    traced = torch.jit.trace(criterion, (z, y), check_trace=False)
    for size in (B, 2 * B):
        z, y = torch.randn(size, M), torch.arange(size) % C
        twin = copy.deepcopy(criterion)
        torch.testing.assert_close(traced(z, y), twin(z, y), rtol=1e-5, atol=0)
        exactly(criterion.num_batches_tracked, twin.num_batches_tracked)


@pytest.mark.parametrize("name", CRITERIA)
def test_compiled_autograd(name):
    criterion = NCMILoss(C, M, **CRITERIA[name])
    z, y = torch.randn(B, M, requires_grad=True), torch.arange(B) % C
    loss = criterion(z, y)
    (expected,) = grad(loss, z, retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    exactly(z.grad, expected)


@pytest.mark.parametrize(("name", "backend"), [("batch", "aot_eager"), ("focus", "inductor")])
def test_the_alternating_recipe_compiled_is_one_graph(name, backend):
    """Eager calls and steps of the centroids, before and between, fill caches that no graph may depend on."""
    torch._dynamo.reset()
    counters.clear()
    (network, criterion, wanted, _), twins = step_pair("batch", True, **CRITERIA[name])
    optimizers = [CentroidSGD(each, 5.0, 0.9) for each in (criterion, twins[1])]

    def forward(x, y):
        features = network(x)
        return criterion(features, y), features

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    for size in (9, 9, 4):
        x, y = torch.randn(size, 8), torch.randint(C, (size,))
        criterion(torch.randn(7, M), torch.arange(7) % C), criterion.eval()(torch.ones(2, M), y[:2]), criterion.train()
        twins[1].load_state_dict(criterion.state_dict())
        loss, features = compiled(x, y)
        expected = twins[1](twins[0](x), y)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad(loss, wanted[:2]), grad(expected, twins[2][:2]), rtol=1e-4, atol=1e-7)
        optimizers[0].step(features, y), optimizers[1].step(twins[0](x), y)
        torch.testing.assert_close(criterion.centroid_logits, twins[1].centroid_logits, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
