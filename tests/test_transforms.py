"""What is done to a training step: torch.func, double backward, compilation, export, half precision, checkpoints."""

import copy
import io
from functools import partial

import pytest
import torch
from conftest import relative
from problems import (
    ACTIVATIONS,
    LEFT,
    RATIOS,
    SEPARATIONS,
    check,
    every_backend,
    every_ratio,
    every_separation,
    plain_and_focus,
)
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, functional, grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.func import grad as func_grad
from torch.utils.checkpoint import checkpoint

import ncmi_kernels
from ncmi_kernels import CentroidSGD, NCMILoss, ncmi_loss, ncmi_terms

B, C, M, N = 4, 3, 5, 3  # N: size of a mapped dimension

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
exactly = partial(torch.testing.assert_close, rtol=0, atol=0)


def problem(*mapped, dtype=torch.float64):
    """Input, target with a sample ignored, and centroid logits; those with a name in `mapped` have a dimension more."""
    leading = {name: (N,) if name in mapped else () for name in ("input", "target", "centroids")}
    target = torch.randint(C, (*leading["target"], B))
    target[..., 1] = -100
    input = torch.randn(*leading["input"], B, M, dtype=dtype)
    return input, target, torch.randn(*leading["centroids"], C, M, dtype=dtype)


def everything(separation, ratio, backend, focus=0.0):
    """ncmi_loss of three tensors, with all that may come with it."""
    center, weight = torch.randn(M, dtype=torch.float64), torch.rand(C, dtype=torch.float64) + 0.1
    options = {"separation": separation, "ratio": ratio, "l2_normalize": True, "temperature": 0.7}
    options["separation_focus"] = focus
    return partial(ncmi_loss, center=center, weight=weight, backend=backend, **options)


def by_reference(function):
    """The same in plain PyTorch, which transforms and differentiates as torch does."""
    return partial(function, backend="reference")


# ------------------------------------------------------------------------------------------------------------
# torch.func
# ------------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    ("separation", "ratio", "focus"),
    [(SEPARATIONS[0], "batch", 0.0), (SEPARATIONS[1], "sample", 0.0), (SEPARATIONS[0], "batch", 10.0)],
)
def test_grad_of_a_function(separation, ratio, focus, backend):
    loss = everything(separation, ratio, backend, focus)
    z, y, xi = problem()
    z_leaf, xi_leaf = z.clone().requires_grad_(), xi.clone().requires_grad_()
    expected = grad(by_reference(loss)(z_leaf, y, xi_leaf), (z_leaf, xi_leaf))
    close(func_grad(loss, argnums=(0, 2))(z, y, xi), expected)


@every_backend
@pytest.mark.parametrize(("ratio", "focus"), [("batch", 0.0), ("sample", 0.0), ("batch", 10.0)])
@pytest.mark.parametrize("mapped", ["input", "target", "centroids", "input target", "input target centroids"])
def test_vmap_against_a_loop(mapped, ratio, focus, backend, interpreted):
    if interpreted and (ratio, mapped) not in (("batch", "input target centroids"), ("sample", "input")):
        pytest.skip(LEFT)
    mapped = mapped.split()
    loss = everything("centroid_to_sample", ratio, backend, focus)
    tensors = problem(*mapped)
    dims = tuple(0 if name in mapped else None for name in ("input", "target", "centroids"))
    slices = [[t if d is None else t[i] for t, d in zip(tensors, dims, strict=True)] for i in range(N)]

    expected = torch.stack([by_reference(loss)(*each) for each in slices])
    assert expected.unique().numel() == N  # else a wrong slice would not show
    close(vmap(loss, dims)(*tensors), expected)
    # Mapped along the last dimension.
    turned = tuple(t if d is None else t.movedim(0, -1) for t, d in zip(tensors, dims, strict=True))
    close(vmap(loss, tuple(None if d is None else -1 for d in dims))(*turned), expected)

    for argnums in (0, 2), (0,):  # with and without the gradient of the centroids
        each = [func_grad(by_reference(loss), argnums)(*tensors) for tensors in slices]
        expected = tuple(map(torch.stack, zip(*each, strict=True)))
        close(vmap(func_grad(loss, argnums), dims)(*tensors), expected)


@every_backend
def test_mapped_weights_and_centres(backend):
    z, y, xi = problem("input")
    center, weight = torch.randn(M, N, dtype=torch.float64), torch.rand(N, C, dtype=torch.float64)

    def loss(z, center, weight):
        return ncmi_loss(z, y, xi, center=center, weight=weight, backend=backend)

    expected = torch.stack([loss(z[i], center[:, i], weight[i]) for i in range(N)])
    close(vmap(loss, (0, 1, 0))(z, center, weight), expected)


def test_centres_and_weights_are_not_differentiated_whatever_the_nesting():
    z, y, xi = problem("input")
    center, weight = torch.randn(M, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    for backend in ("cpu", "reference"):

        def total(center, weight, backend=backend):
            return vmap(lambda z: ncmi_loss(z, y, xi, center=center, weight=weight, backend=backend))(z).sum()

        exactly(func_grad(total)(center, weight), torch.zeros_like(center))
        with pytest.raises(RuntimeError, match="weight: got a tensor that requires a gradient"):
            func_grad(total, 1)(center, weight)


@every_backend
def test_terms_mapped_and_differentiated(backend):
    z, y, xi = problem("input")
    y = y.clamp(min=0)

    def values(z, y, xi, backend):
        return torch.stack(ncmi_terms(z, y, xi, l2_normalize=True, backend=backend))

    expected = torch.stack([values(each, y, xi, "reference") for each in z])
    close(vmap(lambda each: values(each, y, xi, backend))(z), expected)
    jacobian = jacrev(values, (0, 2))  # a vmap of a backward pass
    close(jacobian(z[0], y, xi, backend), jacobian(z[0], y, xi, "reference"))


@every_ratio
def test_further_derivatives_and_other_modes(ratio):
    loss = everything("sample_to_centroid", ratio, "cpu")
    z, y, xi = problem()
    expected = jacrev(jacrev(by_reference(loss), (0, 2)), (0, 2))(z, y, xi)
    close(jacrev(jacrev(loss, (0, 2)), (0, 2))(z, y, xi), expected)
    close(hessian(loss, (0, 2))(z, y, xi), expected)  # forward mode over reverse mode
    tangents = torch.randn_like(z), torch.randn_like(xi)
    value, slope = jvp(lambda a, b: loss(a, y, b), (z, xi), tangents)
    gradients = func_grad(loss, (0, 2))(z, y, xi)
    close(value, loss(z, y, xi))
    close(slope, sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))

    zs = problem("input")[0]
    nested = vmap(vmap(loss, (0, None, None)), (None, None, 0))(zs, y, torch.stack([xi, -xi]))
    close(nested, torch.stack([torch.stack([loss(each, y, centroids) for each in zs]) for centroids in (xi, -xi)]))
    total = func_grad(lambda zs, f=loss: vmap(f, (0, None, None))(zs, y, xi).square().sum())
    close(total(zs), torch.stack([func_grad(lambda z: loss(z, y, xi).square())(each) for each in zs]))


def slope(function, along):
    return lambda z: jvp(function, (z,), (along,))[1]


TANGENT = torch.linspace(-1, 1, B * M, dtype=torch.float64).view(B, M)
FORWARD = {
    "jvp": lambda f: slope(f, TANGENT),
    "jacfwd": jacfwd,
    "jvp of jvp": lambda f: slope(slope(f, TANGENT), TANGENT.flip(0)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jvp": lambda f: jacrev(slope(f, TANGENT)),
    "jvp of jvp of grad": lambda f: slope(slope(func_grad(f), TANGENT), TANGENT.flip(0)),
    "jvp of hessian": lambda f: slope(hessian(f), TANGENT),
    "vmap of jvp of jvp": lambda f: (
        lambda z: vmap(lambda t: slope(slope(f, t), t)(z))(torch.stack([TANGENT, -TANGENT]))
    ),
    "linearize": lambda f: lambda z: linearize(f, z)[1](TANGENT),
    "dual level": lambda f: lambda z: dual_slope(f, z),
    "hessian by dual level": lambda f: (
        lambda z: functional.hessian(f, z, vectorize=True, outer_jacobian_strategy="forward-mode")
    ),
    "jvp of a vjp made before": lambda f: (
        lambda z: slope(torch.func.vjp(f, z)[1], z.new_ones(()) * 3)(z.new_ones(()))[0]
    ),
}


def dual_slope(function, z):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(z, TANGENT))).tangent


def scalar_functions(backend):
    """Functions of features [B, M] whose forward-mode derivatives no Function's own rule may lose."""
    _, y, xi = problem()
    classes, weight, features = (
        y.clamp(min=0),
        torch.rand(B, dtype=torch.float64),
        torch.randn(B, M, dtype=torch.float64),
    )
    criterion = NCMILoss(C, M, dtype=torch.float64, backend=backend).eval()
    options = {"backend": backend}
    return {
        "batch": lambda z: ncmi_loss(z, y, xi, **options),
        "sample": lambda z: ncmi_loss(z, y, xi, ratio="sample", l2_normalize=True, **options),
        "other separation": lambda z: ncmi_loss(z, y, xi, separation="centroid_to_sample", temperature=0.7, **options),
        "focus": lambda z: ncmi_loss(z, y, xi, separation_focus=5.0, **options),
        "sum of terms": lambda z: ncmi_terms(z, classes, xi, **options)[0].sum(),
        "terms": lambda z: (ncmi_terms(z, classes, xi, **options)[1] * weight).sum(),
        "centroids": lambda z: ncmi_loss(features, y, xi + z[:C], **options),
        "module": lambda z: criterion(z, y),
    }


@pytest.mark.parametrize("name", list(scalar_functions(None)))
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_at_any_depth(transform, name):
    z = problem()[0]
    torch.manual_seed(1)
    actual = FORWARD[transform](scalar_functions(None)[name])(z)
    torch.manual_seed(1)
    expected = FORWARD[transform](scalar_functions("reference")[name])(z)
    close(actual, expected)
    assert expected.detach().abs().max() > 1e-6


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        *(("jvp", name) for name in ("batch", "sample", "focus", "terms", "module")),
        *(("jacfwd", "module"), ("dual level", "batch"), ("dual level", "focus")),
    ],
)
def test_compiled_forward_mode(transform, name):
    """Before and after ordinary calls in the same graph, which take the kernels."""
    torch._dynamo.reset()
    function = scalar_functions(None)[name]
    z = problem()[0]

    def around(z):
        return function(z), FORWARD[transform](function)(z), function(2 * z)

    close(torch.compile(around, fullgraph=True, backend="aot_eager")(z), around(z))


def test_a_compiled_function_called_within_a_level():
    torch._dynamo.reset()
    function = scalar_functions(None)["batch"]
    compiled, z = torch.compile(function, backend="eager"), problem()[0]
    for _ in range(2):
        close(compiled(z), function(z))
        close(dual_slope(compiled, z), dual_slope(function, z))


def test_gradcheck_in_every_mode():
    z, y, xi = problem()
    leaves = z.requires_grad_(), xi.requires_grad_()
    for ratio in RATIOS:
        loss = partial(ncmi_loss, ratio=ratio)
        modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert gradcheck(lambda z, xi, loss=loss: loss(z, y, xi), leaves, **modes)


@pytest.mark.parametrize("focus", [0.0, 5.0])
def test_several_upstream_gradients_at_once(focus):
    z, y, xi = problem()
    classes = y.clamp(min=0)
    options = {"separation_focus": focus}
    functions = [
        lambda z: ncmi_terms(z, classes, xi, **options),
        lambda z: ncmi_loss(z, y, xi, ratio="sample", reduction="none", **options),
        lambda b: ncmi_loss(z, y, b[:C], ratio="sample", reduction="none", **options),
    ]
    point = torch.randn(B, M, dtype=torch.float64)
    for function in functions:
        close(functional.jacobian(function, point, vectorize=True), functional.jacobian(function, point))
    for ratio in RATIOS:
        loss = partial(ncmi_loss, ratio=ratio, **options)
        hessians = [functional.hessian(lambda z, loss=loss: loss(z, y, xi), z, vectorize=v) for v in (True, False)]
        close(*hessians)
        leaves = z.clone().requires_grad_(), xi.clone().requires_grad_()
        value, upstream = loss(leaves[0], y, leaves[1]), torch.tensor([1.0, -3.0], dtype=torch.float64)
        batched = grad(value, leaves, upstream, is_grads_batched=True, retain_graph=True)
        each = [grad(value, leaves, up, retain_graph=True) for up in upstream]
        close(batched, tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize("how", [hessian, lambda f: jacrev(jacrev(f)), lambda f: slope(func_grad(f), TANGENT)])
def test_second_derivatives_of_what_is_made_of_the_terms(how):
    z, y, xi = problem()
    y = y.clamp(min=0)
    for combine in (
        lambda a, g: a.sum(),
        lambda a, g: a.sum() / g.sum(),
        lambda a, g: (a / g).mean(),
        lambda a, g: a @ a,
    ):
        function = lambda z, backend, combine=combine: combine(*ncmi_terms(z, y, xi, backend=backend))  # noqa: E731
        close(*(how(partial(function, backend=backend))(z) for backend in (None, "reference")))


def test_upstream_gradients_that_are_mapped():
    """vmap of the backward pass of a graph that was made outside."""
    z, y, xi = problem()
    for ratio, reduction in (("sample", "none"), ("sample", "mean"), ("batch", "mean")):
        leaves = z.clone().requires_grad_(), xi.clone().requires_grad_()
        loss = ncmi_loss(leaves[0], y, leaves[1], ratio=ratio, reduction=reduction)
        upstream = torch.randn(N, *loss.shape, dtype=torch.float64)
        expected = [grad(loss, leaves, each, retain_graph=True) for each in upstream]
        actual = vmap(lambda each, loss=loss, leaves=leaves: grad(loss, leaves, each, retain_graph=True))(upstream)
        close(actual, tuple(map(torch.stack, zip(*expected, strict=True))))
        assert not any(each.requires_grad for each in actual)


@every_backend
def test_float32_gradients_under_a_transform_are_the_kernels(backend, monkeypatch):
    """In the authors' regime autograd is 1e-4 off: a reference in place of the backend would show."""
    z, y = torch.randn(16, 32), torch.arange(16) % C
    xi = 10 * torch.eye(C, 32)
    options = {"l2_normalize": True, "temperature": 0.2, "backend": backend}
    loss = lambda z, xi: ncmi_loss(z, y, xi, **options)  # noqa: E731
    reference = func_grad(lambda z, xi: ncmi_loss(z, y, xi, **{**options, "backend": "reference"}), (0, 1))
    expected = reference(z.double(), xi.double())
    leaves = z.clone().requires_grad_(), xi.clone().requires_grad_()
    differentiable = grad(loss(*leaves), leaves, create_graph=True)
    monkeypatch.setattr(ncmi_kernels.reference, "terms", None)  # not called
    for actual in (func_grad(loss, (0, 1))(z, xi), differentiable):
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            assert relative(a, e) < 5e-6


def test_half_precision_mapped():
    z, y, xi = problem("input", dtype=torch.float32)
    half = z.bfloat16()
    loss = lambda z: ncmi_loss(z, y, xi)  # noqa: E731
    values, gradients = vmap(loss)(half), vmap(func_grad(loss))(half)
    assert (values.dtype, gradients.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(values, vmap(loss)(half.float()), rtol=1e-6, atol=0)
    exactly(gradients, torch.stack([func_grad(loss)(each) for each in half]))
    assert relative(gradients, vmap(func_grad(loss))(half.float())) < 4e-3


@pytest.mark.parametrize("learnt", [True, False])
@every_ratio
def test_gradients_of_each_sample_of_a_network(ratio, learnt):
    network = nn.Linear(6, M).double()
    criterion = NCMILoss(C, M, ratio=ratio, learn_centroids=learnt, dtype=torch.float64)
    x, y = torch.randn(B, 6, dtype=torch.float64), torch.randint(C, (B,))
    criterion(network(x), y)  # the centre has moved
    criterion.eval()
    parameters = dict(network.named_parameters())
    centroids = dict(criterion.named_parameters())

    def loss(parameters, centroids, x, y):
        return functional_call(criterion, centroids, (functional_call(network, parameters, (x,)), y))

    detached = [{name: p.detach() for name, p in each.items()} for each in (parameters, centroids)]
    per_network, per_centroid = vmap(func_grad(loss, (0, 1)), (None, None, 0, 0))(*detached, x, y)
    centroids["centroid_logits"].requires_grad_()
    wanted = [*parameters.values(), *centroids.values()]
    for i in range(B):
        expected = grad(criterion(network(x[i]), y[i]), wanted)
        close([*(g[i] for g in per_network.values()), *(g[i] for g in per_centroid.values())], list(expected))


def test_an_ensemble_of_criteria():
    criteria = [NCMILoss(C, M, dtype=torch.float64) for _ in range(N)]
    for criterion in criteria:
        criterion(torch.randn(B, M, dtype=torch.float64), torch.randint(C, (B,)))  # centres of their own
        criterion.eval()
    z, y, _ = problem("input")
    parameters, buffers = stack_module_state(criteria)

    def loss(parameters, buffers, z):
        return functional_call(criteria[0], (parameters, buffers), (z, y))

    expected = torch.stack([criterion(each, y) for criterion, each in zip(criteria, z, strict=True)])
    close(vmap(loss)(parameters, buffers, z), expected)


def test_a_transform_leaves_nothing_in_the_cache_of_fixed_centroids():
    criterion = NCMILoss(C, M, learn_centroids=False, dtype=torch.float64).eval()
    z, y, _ = problem("input")
    vmap(func_grad(lambda each: criterion(each, y)))(z)
    leaf = z[0].clone().requires_grad_()
    fresh = NCMILoss(C, M, dtype=torch.float64).eval()
    close(grad(criterion(leaf, y), leaf), grad(fresh(leaf, y), leaf))
    close(vmap(lambda each: criterion(each, y))(z), torch.stack([fresh(each, y) for each in z]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("transform", [vmap, lambda f: func_grad(lambda z: f(z).sum())], ids=["vmap", "grad"])
def test_a_transform_does_not_move_the_centre(transform, backend):
    criterion = NCMILoss(C, M, backend=backend)
    z, y, _ = problem("input", dtype=torch.float32)
    z = z if transform is vmap else z[0]
    before = copy.deepcopy(dict(criterion.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"training: got True inside a torch.func transform, expected criterion.eval"
    ):
        transform(lambda each: criterion(each, y))(z)
    exactly(dict(criterion.state_dict()), before)
    criterion.center_momentum = None
    transform(lambda each: criterion(each, y))(z)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_mapped_target_out_of_range(backend):
    z, y, xi = problem("target")
    y[2, 3] = C
    for function, target in ((ncmi_loss, y), (ncmi_terms, y.clamp(min=0))):
        call = partial(function, backend=backend)
        with pytest.raises(IndexError, match=f"target: value {C} at row .* is out of range"):
            vmap(call, (None, 0, None))(z, target, xi)


# ------------------------------------------------------------------------------------------------------------
# Double backward
# ------------------------------------------------------------------------------------------------------------


@every_backend
@every_separation
@every_ratio
@plain_and_focus
def test_double_backward_is_the_reference_s(focus, ratio, separation, backend):
    z, y, xi = (t.requires_grad_() if t.is_floating_point() else t for t in problem())
    classes, along = y.clamp(min=0), [torch.randn_like(z), torch.randn_like(xi)]
    options = {"center": torch.randn(M, dtype=torch.float64), "separation": separation, "separation_focus": focus}
    results = []
    for name in (backend, "reference"):
        loss = ncmi_loss(z, y, xi, ratio=ratio, l2_normalize=True, backend=name, **options)
        terms = torch.stack(ncmi_terms(z, classes, xi, backend=name, **options))
        first = grad(loss + (terms**2).sum(), (z, xi), create_graph=True)
        scalar = sum((g * v).sum() for g, v in zip(first, along, strict=True))
        results.append([*first, *grad(scalar, (z, xi))])
    check(*results, 1e-10)


@pytest.mark.parametrize(
    ("ratio", "separation", "activation"),  # any two of them meet
    [(RATIOS[i], SEPARATIONS[j], ACTIVATIONS[i ^ j]) for i in (0, 1) for j in (0, 1)],
)
def test_second_derivatives_of_the_module(ratio, separation, activation):
    z, y, xi = problem()
    options = {"ratio": ratio, "separation": separation, "activation": activation, "temperature": 0.7}
    criterion = NCMILoss(C, M, weight=torch.rand(C) + 0.1, dtype=torch.float64, **options)
    criterion(torch.randn_like(z), y)
    criterion.eval()
    agrees = partial(gradgradcheck, inputs=(z.requires_grad_(), xi.requires_grad_()))
    assert agrees(lambda a, b: functional_call(criterion, {"centroid_logits": b}, (a, y)))
    if ratio == "sample":
        criterion.reduction = "none"
        assert agrees(lambda a, b: functional_call(criterion, {"centroid_logits": b}, (a, y)))
    else:
        inside = y.clamp(min=0)
        assert agrees(lambda a, b: ncmi_terms(a, inside, b, separation=separation, activation=activation))


def test_second_derivatives_where_one_input_is_fixed():
    z, y, xi = problem()
    for ratio in RATIOS:
        assert gradgradcheck(lambda a, ratio=ratio: ncmi_loss(a, y, xi, ratio=ratio), z.clone().requires_grad_())
        assert gradgradcheck(lambda b, ratio=ratio: ncmi_loss(z, y, b, ratio=ratio), xi.clone().requires_grad_())


@every_ratio
@pytest.mark.parametrize("l2", [False, True])
def test_ignored_rows_leave_no_trace_in_a_second_derivative(l2, ratio):
    z, y, xi = problem()
    z[1] = torch.nan
    kept = y != -100

    def derivatives(z, y):
        z, b = z.clone().requires_grad_(), xi.clone().requires_grad_()
        first = grad(ncmi_loss(z, y, b, ratio=ratio, l2_normalize=l2), (z, b), create_graph=True)
        return *first, *grad(sum(each.square().sum() for each in first), (z, b))

    for i, (actual, expected) in enumerate(zip(derivatives(z, y), derivatives(z[kept], y[kept]), strict=True)):
        if i % 2 == 0:  # of the input
            exactly(actual[~kept], torch.zeros(1, M, dtype=torch.float64))
            actual = actual[kept]
        close(actual, expected)


def test_second_derivatives_of_a_row_of_length_zero():
    z, y, xi = problem()
    z[0] = 0
    z.requires_grad_(), xi.requires_grad_()
    first = grad(ncmi_loss(z, y, xi, l2_normalize=True), (z, xi), create_graph=True)
    assert all(each.isfinite().all() for each in grad(first[1].square().sum() + first[0][2:].sum(), (z, xi)))


@every_ratio
@pytest.mark.parametrize("training", [False, True])
def test_training_with_a_gradient_penalty(training, ratio):
    """The loss and 10 times the squared gradient of the images: every step, and what it has trained, in float64."""
    trained = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, M)).double()
        criterion = NCMILoss(C, M, ratio=ratio, backend=backend, dtype=torch.float64).train(training)
        parameters = [*network.parameters(), *criterion.parameters()]
        start = copy.deepcopy([p.detach() for p in parameters])
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
        losses = []
        for _ in range(4):
            x, y = torch.randn(B, 6, dtype=torch.float64).requires_grad_(), torch.randint(C, (B,))
            loss = criterion(network(x), y)
            penalty = grad(loss, x, create_graph=True)[0].square().sum()
            optimizer.zero_grad()
            (loss + 10 * penalty).backward()
            assert penalty > 1e-8
            optimizer.step()
            losses += [loss.detach(), penalty.detach()]
        assert all((p - s).abs().max() > 1e-6 for p, s in zip(parameters, start, strict=True))
        trained.append([*losses, *(p.detach() for p in parameters), criterion.center])
    for actual, expected in zip(*trained, strict=True):
        assert relative(actual, expected) < 1e-8


# ------------------------------------------------------------------------------------------------------------
# torch.compile, torch.export
# ------------------------------------------------------------------------------------------------------------


def step_pair(ratio, learnt, rate=0.5, **options):
    """A network, a criterion, and an optimiser of both; twice the same."""
    network = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, M))
    options = {"ratio": ratio, "learn_centroids": learnt, "center_momentum": 0.5, **options}
    criterion = NCMILoss(C, M, **options)
    pair = []
    for _ in range(2):
        modules = nn.ModuleList(copy.deepcopy([network, criterion]))
        wanted = [p for p in modules.parameters() if p.requires_grad]
        pair.append((*modules, wanted, torch.optim.SGD(wanted, lr=rate, momentum=0.9)))
    return pair


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
# Autocast, loss scaling
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_ratio
def test_a_step_under_autocast(ratio, dtype):
    """The network in half precision; the loss in float32, of the same features."""
    (network, criterion, _, optimizer), (_, single, _, _) = step_pair(ratio, True)
    for _ in range(3):
        x, y = torch.randn(16, 8), torch.randint(C, (16,))
        optimizer.zero_grad(), single.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            features = network(x)
            loss = criterion(features, y)
        assert (features.dtype, loss.dtype) == (dtype, torch.float32)
        features.retain_grad()
        loss.backward()
        copied = features.detach().float().requires_grad_()
        expected = single(copied, y)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert features.grad.dtype == dtype
        torch.testing.assert_close(features.grad, copied.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
        torch.testing.assert_close(criterion.centroid_logits.grad, single.centroid_logits.grad, rtol=1e-5, atol=1e-8)
        assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in network.parameters())
        optimizer.step()
        with torch.no_grad():
            single.centroid_logits.copy_(criterion.centroid_logits)
    torch.testing.assert_close(criterion.center, single.center)


@every_ratio
def test_loss_scaling_keeps_float16_gradients_from_underflow(ratio):
    """Scaled by 2 ** 16 they are the float32 gradients times that, rounded once; unscaled most of them are zero."""
    criterion = NCMILoss(C, M, ratio=ratio, temperature=100.0).eval()
    half = (300 * torch.randn(512, M)).half().requires_grad_()
    y = torch.randint(C, (512,))
    single = half.detach().float().requires_grad_()
    (exact,) = grad(criterion(single, y), single)
    unscaled, scaled = (grad(factor * criterion(half, y), half)[0] for factor in (1.0, 2.0**16))
    assert (unscaled == 0).float().mean() > 0.5
    torch.testing.assert_close(scaled, (exact * 2**16).half(), rtol=2**-10, atol=2**-23)
    assert (scaled == 0).float().mean() < 0.1


@every_ratio
def test_a_gradient_scaler_skips_what_overflows_and_recovers(ratio):
    (network, criterion, wanted, optimizer), _ = step_pair(ratio, True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34, growth_interval=1000, backoff_factor=2.0**-24)
    before = [p.detach().clone() for p in wanted]
    for number in range(2):
        x, y = torch.randn(16, 8), torch.randint(C, (16,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(network(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
        if number == 0:
            assert not norm.isfinite()
            exactly([p.detach() for p in wanted], before)
    assert 0 < norm < 10
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(wanted, before, strict=True))
    assert criterion.center.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Tracing without values
# ------------------------------------------------------------------------------------------------------------

CRITERIA = {
    "batch": {},
    "sample": {"ratio": "sample"},
    "focus": {"separation_focus": 5.0},
    "fixed": {"learn_centroids": False},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("name", CRITERIA)
def test_fake_tensors(name):
    """What estimates memory or counts operations of a whole program without running it."""
    with FakeTensorMode():
        criterion = NCMILoss(C, M, **CRITERIA[name])
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


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, accumulation, clipping
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_ratio
def test_a_checkpoint_around_the_criterion(ratio, backend, reentrant):
    """Its forward pass runs twice, and moves the centre once."""
    (network, criterion, wanted, _), (network_2, criterion_2, wanted_2, _) = step_pair(ratio, True)
    criterion.backend = criterion_2.backend = backend
    for number in range(3):
        x, y = torch.randn(9, 8).requires_grad_(), torch.randint(C, (9,))
        repeats = []

        def forward(x, y=y, repeats=repeats):
            repeats.append(None)
            return criterion(network(x), y)

        loss, expected = checkpoint(forward, x, use_reentrant=reentrant), criterion_2(network_2(x), y)
        exactly(loss, expected)
        loss.backward()
        assert len(repeats) == 2
        exactly([p.grad for p in wanted], list(grad(expected, wanted_2)))
        exactly(dict(criterion.state_dict()), dict(criterion_2.state_dict()))
        assert criterion.num_batches_tracked == number + 1
        for p in wanted:
            p.grad = None


@pytest.mark.parametrize("name", ["batch", "sample", "focus"])
def test_two_checkpoints_before_one_backward_pass(name):
    """Without re-entrance the gradients are those at the centres of the forward passes."""
    (network, criterion, wanted, _), (network_2, criterion_2, wanted_2, _) = step_pair(
        **{"ratio": "batch", "learnt": True} | CRITERIA[name]
    )
    batches = [(torch.randn(9, 8) + shift, torch.randint(C, (9,))) for shift in (0, 3)]
    sum(checkpoint(lambda x, y: criterion(network(x), y), *batch, use_reentrant=False) for batch in batches).backward()
    expected = grad(sum(criterion_2(network_2(x), y) for x, y in batches), wanted_2)
    exactly([p.grad for p in wanted], list(expected))
    exactly(criterion.center, criterion_2.center)


@every_ratio
def test_accumulated_gradients(ratio):
    """By sample they are the gradient of the whole batch; by batch they are that of the mean of the ratios."""
    (network, criterion, wanted, _), _ = step_pair(ratio, True)
    x, y = torch.randn(24, 8), torch.randint(C, (24,))
    criterion(network(x), y)
    criterion.eval()
    for part in range(3):
        rows = slice(8 * part, 8 * part + 8)
        (criterion(network(x[rows]), y[rows]) / 3).backward()
    accumulated = torch.cat([p.grad.flatten() for p in wanted])

    def flat(loss):
        return torch.cat([g.flatten() for g in grad(loss, wanted)])

    whole = flat(criterion(network(x), y))
    options = {"center": criterion.center, "l2_normalize": True}
    concentration, separation = ncmi_terms(network(x), y, criterion.centroid_logits, **options)
    means = concentration.view(3, 8).mean(dim=1), separation.view(3, 8).mean(dim=1)
    if ratio == "sample":
        assert relative(accumulated, whole) < 1e-5
    else:
        assert relative(accumulated, flat((means[0] / (means[1] + 1e-8)).mean())) < 1e-5
        assert relative(accumulated, whole) > 1e-3


def test_accumulation_by_sample_of_unequal_micro_batches():
    """The sum of each, divided by the weight of all."""
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    z, y, xi = torch.randn(9, M).double(), torch.arange(9) % C, torch.randn(C, M).double()
    y[2] = -100
    xi.requires_grad_()
    loss = partial(ncmi_loss, ratio="sample", weight=weight)
    parts = sum(loss(z[rows], y[rows], xi, reduction="sum") for rows in (slice(0, 2), slice(2, 9)))
    parts = parts / weight[y[y >= 0]].sum()
    whole = loss(z, y, xi)
    close(parts, whole)
    close(grad(parts, xi), grad(whole, xi))


def test_clipping_the_norm_of_the_gradients():
    (_, criterion, _, _), _ = step_pair("batch", True)
    z, y = torch.randn(9, M).requires_grad_(), torch.randint(C, (9,))
    criterion(z, y).backward()
    gradients = [z.grad.clone(), criterion.centroid_logits.grad.clone()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    bound = norm.item() / 4
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_([z, criterion.centroid_logits], bound), norm)
    for actual, before in zip((z.grad, criterion.centroid_logits.grad), gradients, strict=True):
        torch.testing.assert_close(actual, before / 4, rtol=1e-4, atol=0)
