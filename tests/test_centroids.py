"""Several centroids a class, and classes that do not count alike: `centroids_per_class` and `class_prior`."""

import copy
import itertools
import math

import pytest
import torch
from conftest import relative
from problems import (
    ACTIVATIONS,
    BOTH,
    HALF,
    LEFT,
    REDUCTIONS,
    SEPARATIONS,
    Options,
    check,
    check_against_the_literal_definition,
    evaluate,
    every_backend,
    every_separation,
    make,
)

from ncmi_kernels import CentroidSGD, NCMILoss, ncmi_loss, ncmi_terms, reference

ROWS, CLASSES, COLUMNS = 13, 5, 11


def priors(classes=CLASSES, none=False):
    """Random ones of sum 1; with `none`, that of the first class is 0."""
    prior = torch.rand(classes, dtype=torch.float64) + 0.1
    if none:
        prior[0] = 0
    return prior / prior.sum()


def problem(own, classes=CLASSES, **options):
    return make(ROWS, classes, COLUMNS, centroids_per_class=own, **options)


def nsf(x):
    return torch.sigmoid(x) / torch.sigmoid(x).sum()


def divergence(p, q):
    return (p * (p / q).log()).sum()


def softmax_of(distances, focus):
    """Weights of softmax(-focus D / min D), numbers."""
    nearest = min(d.item() for d in distances)
    each = [math.exp(-focus * d.item() / nearest) for d in distances]
    return [e / sum(each) for e in each]


def by_definition(z, target, xi, prior, own, separation, focus, centroid_focus):
    """A and G of each sample, in loops, with the weights as numbers."""
    q = [[nsf(xi[v * own + k]) for k in range(own)] for v in range(CLASSES)]
    terms = []
    for row, y in zip(z, target.tolist(), strict=True):
        p = nsf(row)
        of_class = [divergence(p, each) for each in q[y]]
        a = sum(w * d for w, d in zip(softmax_of(of_class, centroid_focus), of_class, strict=True))
        others = [(v, each) for v in range(CLASSES) if v != y for each in q[v]]
        d = [divergence(p, each) if separation == SEPARATIONS[0] else divergence(each, p) for _, each in others]
        shares = [prior[v].item() / own for v, _ in others]
        if focus:
            nearness = [w * s for w, s in zip(softmax_of(d, focus), shares, strict=True)]
            shares = [w / sum(nearness) * (1 - prior[y].item()) for w in nearness]
        terms.append(torch.stack((a, sum(w * each for w, each in zip(shares, d, strict=True)))))
    return torch.stack(terms).T


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("focus", [0.0, 5.0])
@every_separation
def test_against_the_definition(separation, focus, own):
    z, target, xi, _, _ = problem(own)
    z, xi, prior = z.requires_grad_(), xi.requires_grad_(), priors()
    expected = by_definition(z, target, xi, prior, own, separation, focus, 3.0)
    options = {"separation_focus": focus, "centroids_per_class": own, "centroid_focus": 3.0}
    for backend in ("cpu", "reference"):
        actual = ncmi_terms(z, target, xi, separation=separation, class_prior=prior, backend=backend, **options)
        assert relative(torch.stack(actual), expected) < 1e-12
        upstream = torch.randn(2, ROWS, dtype=torch.float64)
        grads = torch.autograd.grad(actual, (z, xi), tuple(upstream), retain_graph=True)
        for grad, exact in zip(grads, torch.autograd.grad(expected, (z, xi), upstream, retain_graph=True), strict=True):
            assert relative(grad, exact) < 1e-11


VARIANTS = list(itertools.product(SEPARATIONS, (0.0, 5.0), (1, 3), (False, True), REDUCTIONS))


@every_backend
@pytest.mark.parametrize(("separation", "focus", "own", "weighed", "ratio"), VARIANTS)
def test_every_variant_matches_the_literal_definition(separation, focus, own, weighed, ratio, backend, interpreted):
    number = VARIANTS.index((separation, focus, own, weighed, ratio))
    if interpreted and number % 7:
        pytest.skip(LEFT)
    if own == 1 and not weighed:
        pytest.skip("has no centroids or priors of its own")
    center, weight, ignore = number % 2 == 0, number % 3 == 0, number % 5 != 0
    options = Options(
        0.7, number % 4 < 2, ACTIVATIONS[number // 2 % 2], separation, *ratio[:1],
        reduction=ratio[1], separation_focus=focus, centroids_per_class=own, centroid_focus=2.0,
    )  # fmt: skip
    its = problem(own, center=center, weight=weight, ignore=ignore)
    prior = priors(none=number % 4 == 1) if weighed else None
    check_against_the_literal_definition(its, options, backend, class_prior=prior)


@every_backend
@pytest.mark.parametrize("own", [1, 2])
@every_separation
def test_gradcheck(separation, own, backend, interpreted):
    z, target, xi, _, weight = problem(own, classes=3, weight=True, ignore=True, spread=1.0)
    z, xi, prior = z[:5].requires_grad_(), xi.requires_grad_(), priors(3)
    options = {"separation": separation, "class_prior": prior, "centroids_per_class": own, "backend": backend}
    inside = target[:5].clamp(min=0)
    # Weights by nearness are not differentiated: only equal ones are part of a function that is.
    alike = {"centroid_focus": 0.0, "l2_normalize": True, **options}
    fast = {"fast_mode": interpreted}
    assert torch.autograd.gradcheck(lambda a, b: ncmi_terms(a, inside, b, **alike), (z, xi), **fast)
    for ratio in ("batch", "soft_margin"):
        assert torch.autograd.gradcheck(
            lambda a, b, ratio=ratio: ncmi_loss(a, target[:5], b, weight=weight, ratio=ratio, **alike), (z, xi), **fast
        )
    if not interpreted:
        assert torch.autograd.gradgradcheck(lambda a, b: ncmi_loss(a, inside, b, **alike), (z, xi))


@every_backend
@pytest.mark.parametrize("focus", [0.0, 5.0])
@every_separation
def test_what_makes_no_difference(separation, focus, backend):
    """Equal priors; the same centroid twice; the centroids of a class that does not count, to others."""
    its = problem(1, ignore=True)
    options = Options(separation=separation, ratio="sample", separation_focus=focus)
    plain = evaluate(its, options, backend)
    for a, e in zip(evaluate(its, options, backend, class_prior=torch.full((CLASSES,), 0.2)), plain, strict=True):
        assert relative(a, e) < 1e-12
    z, target, xi, center, weight = its
    twice = z, target, xi.repeat_interleave(2, dim=0), center, weight
    loss, grad, of_centroids = evaluate(
        twice, Options(separation=separation, ratio="sample", separation_focus=focus, centroids_per_class=2), backend
    )
    assert relative(loss, plain[0]) < 1e-12
    assert relative(grad, plain[1]) < 1e-11
    assert relative(of_centroids.unflatten(0, (-1, 2)).sum(dim=1), plain[2]) < 1e-11

    prior, elsewhere = priors(none=True), torch.where(target == 0, 1, target)
    here = z, elsewhere, xi, center, weight
    there = z, elsewhere, torch.cat([xi[:1] + 1, xi[1:]]), center, weight
    (loss, grad, of_centroids), moved = (evaluate(each, options, backend, class_prior=prior) for each in (here, there))
    assert relative(moved[0], loss) < 1e-12
    assert relative(moved[1], grad) < 1e-11
    assert bool((of_centroids[0] == 0).all())


@every_backend
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype, backend):
    z, target, xi, _, _ = problem(3)
    z, xi = z.to(dtype), xi.float()
    options = Options(l2_normalize=True, separation_focus=5.0, centroids_per_class=3)
    given, prior = (z, target, xi, None, None), priors()
    actual = evaluate(given, options, backend, class_prior=prior)
    assert [each.dtype for each in actual] == [torch.float32, dtype, torch.float32]
    exact = evaluate(given, options, "float64", class_prior=prior)
    check(actual, exact, (5e-6, torch.finfo(dtype).eps, 5e-6))


@pytest.mark.parametrize("focus", [0.0, 5.0])
@pytest.mark.parametrize("own", [1, 2])
def test_transforms(own, focus, monkeypatch):
    """Values and first derivatives are the kernels'."""
    z, target, xi, _, _ = problem(own)
    options = {"class_prior": priors(), "centroids_per_class": own, "separation_focus": focus, "ratio": "sample"}

    def loss(z, y):
        return ncmi_loss(z, y, xi, **options)

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
    batches, targets = torch.stack((z, z + 1)), torch.stack((target, target))
    with monkeypatch.context() as kernels_only:
        kernels_only.setattr(reference, "terms", None)
        assert relative(torch.func.grad(loss)(z, target), expected) < 1e-11
        assert relative(torch.vmap(loss)(batches, targets)[0], loss(z, target)) < 1e-12
        assert relative(torch.vmap(torch.func.grad(loss))(batches, targets)[0], expected) < 1e-11
    tangent = torch.randn_like(z)
    assert relative(torch.func.jvp(lambda z: loss(z, target), (z,), (tangent,))[1], (expected * tangent).sum()) < 1e-10


# ------------------------------------------------------------------------------------------------------------
# The criterion
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 7])
def test_centroids_of_a_class_begin_apart(columns):
    criterion = NCMILoss(5, columns, centroids_per_class=3)
    logits = criterion.centroid_logits.detach()
    assert logits.shape == (15, columns)
    assert relative(logits.norm(dim=1), torch.full((15,), 10.0)) < 1e-6
    assert torch.pdist(logits).min() > 1


def test_prediction_is_of_the_nearest_centroid():
    criterion = NCMILoss(5, 7, centroids_per_class=3, dtype=torch.float64)
    features = torch.randn(40, 7, dtype=torch.float64)
    q = criterion.centroids()
    p = nsf_rows(features / features.norm(dim=1, keepdim=True))
    scores = torch.stack([(p[:, None] * q[3 * c : 3 * c + 3].log()).sum(dim=2).amax(dim=1) for c in range(5)], dim=1)
    assert relative(criterion.scores(features), scores) < 1e-12
    assert torch.equal(criterion.predict(features), scores.argmax(dim=1))
    assert criterion.predict(features.T.reshape(1, 7, 40)).shape == (1, 40)
    means = criterion.fit_class_means([(features, torch.arange(40) % 5)])
    assert relative(means, torch.stack([p[c::5].mean(dim=0) for c in range(5)])) < 1e-12
    assert criterion.predict(features, class_means=True).shape == (40,)


def nsf_rows(x):
    return torch.sigmoid(x) / torch.sigmoid(x).sum(dim=1, keepdim=True)


def test_state():
    criterion = NCMILoss(5, 7, centroids_per_class=3, class_prior=priors().float(), separation_focus=2.0)
    features, target = torch.randn(40, 7), torch.arange(40) % 5
    criterion.fit_class_means([(features, target)])
    criterion(features, target)
    other = NCMILoss(5, 7, centroids_per_class=3, class_prior=torch.full((5,), 0.2), separation_focus=2.0)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.eval()(features, target), criterion.eval()(features, target))
    assert torch.equal(copy.deepcopy(criterion)(features, target), criterion(features, target))
    assert "centroids_per_class=3" in repr(criterion)
    with pytest.raises(RuntimeError, match=r"centroids_per_class: got 3 in the state_dict, .* expected 2"):
        NCMILoss(5, 7, centroids_per_class=2, class_prior=priors()).load_state_dict(criterion.state_dict())
    with pytest.raises(AttributeError, match="centroids_per_class: got an assignment"):
        criterion.centroids_per_class = 2


@pytest.mark.parametrize("focus", [0.0, 5.0])
def test_priors_that_change_are_seen(focus):
    """Of fixed centroids a table is kept, in which the priors are."""
    first, second = priors().float(), priors().float()
    options = {"separation_focus": focus, "learn_centroids": False}
    features, target = torch.randn(40, 7), torch.arange(40) % 5
    criterion, other = (NCMILoss(5, 7, class_prior=prior, **options).eval() for prior in (first, second))
    other.load_state_dict({**criterion.state_dict(), "class_prior": second})
    before, expected = criterion(features, target), other(features, target)
    assert not torch.equal(before, expected)
    criterion.class_prior.copy_(second)
    assert torch.equal(criterion(features, target), expected)
    criterion.class_prior = first
    assert torch.equal(criterion(features, target), before)
    criterion.class_prior = None
    assert relative(criterion(features, target), NCMILoss(5, 7, **options).eval()(features, target)) < 1e-5
    for _ in range(30):  # another tensor may get the memory of the one before
        criterion.class_prior = None
        prior = priors().float()
        criterion.class_prior = prior.clone()
        other.class_prior.copy_(prior)
        assert torch.equal(criterion(features, target), other(features, target))
    criterion.class_prior.data.copy_(second)
    other.class_prior.copy_(second)
    assert torch.equal(criterion.eval()(features, target), other(features, target))


@pytest.mark.parametrize("learnt", BOTH)
def test_priors_of_inference_mode(learnt):
    criterion = NCMILoss(5, 7, class_prior=priors().float(), learn_centroids=learnt)
    features, target = torch.randn(40, 7, requires_grad=True), torch.arange(40) % 5
    with torch.inference_mode():
        criterion.class_prior = criterion.class_prior.clone()
        criterion(features, target)
    fresh = NCMILoss(5, 7, class_prior=criterion.class_prior.clone(), learn_centroids=learnt)
    fresh.load_state_dict(criterion.state_dict())
    for _ in range(2):
        grads = [torch.autograd.grad(each.eval()(features, target), features)[0] for each in (criterion, fresh)]
        assert relative(*grads) < 1e-6


def test_priors_are_taken_relative_to_their_sum():
    """Those of float32, or in bfloat16, do not add up to 1."""
    z, target, xi, _, _ = problem(1)
    prior = priors()
    exact = ncmi_loss(z, target, xi, class_prior=prior)
    assert relative(ncmi_loss(z, target, xi, class_prior=prior * (1 + 5e-5)), exact) < 1e-12
    low = NCMILoss(40, 7, class_prior=priors(40)).bfloat16()
    features, target = torch.randn(50, 7), torch.arange(50) % 40
    rest = {"center": features.mean(dim=0).bfloat16(), "l2_normalize": True}
    prior = low.class_prior.double() / low.class_prior.double().sum()
    expected = ncmi_loss(features, target, low.centroid_logits, class_prior=prior, **rest)
    assert relative(low(features, target), expected) < 1e-6


def test_training():
    """Classes at opposite corners of a square, which no one centroid of each tells apart."""
    corner = torch.arange(400) % 4
    features = 0.1 * torch.randn(400, 6)
    features[:, :2] += 2.0 * torch.stack((corner % 2, corner // 2), dim=1) - 1
    target = (corner % 2) ^ (corner // 2)
    right = []
    for own in (1, 2):
        criterion = NCMILoss(2, 6, centroids_per_class=own, center_momentum=None)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            criterion.centroid_logits.copy_(torch.randn(2 * own, 6, generator=generator))
        optimizer = CentroidSGD(criterion, 1.0, 0.9)
        for _ in range(200):
            criterion(features, target)
            optimizer.step(features, target)
        right.append((criterion.predict(features) == target).float().mean())
    assert right[0] < 0.8
    assert right[1] > 0.99
