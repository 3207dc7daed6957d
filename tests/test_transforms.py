"""torch.func, forward mode, and double backward."""

import copy
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
from torch.autograd import forward_ad, functional, grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.func import grad as func_grad

import ncmi_kernels
from ncmi_kernels import NCMILoss, ncmi_loss, ncmi_terms

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
    prior = torch.rand(C, N, dtype=torch.float64).softmax(dim=0)

    def loss(z, center, weight, prior):
        return ncmi_loss(z, y, xi, center=center, weight=weight, class_prior=prior, backend=backend)

    expected = torch.stack([loss(z[i], center[:, i], weight[i], prior[:, i]) for i in range(N)])
    close(vmap(loss, (0, 1, 0, 1))(z, center, weight, prior), expected)
    with pytest.raises(ValueError, match=r"class_prior: got a minimum of .* and a sum of 2"):
        vmap(loss, (0, 1, 0, 1))(z, center, weight, 2 * prior)


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
    priors = torch.rand(N, C, dtype=torch.float64).softmax(dim=1)
    criteria = [NCMILoss(C, M, dtype=torch.float64, class_prior=prior) for prior in priors]
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
