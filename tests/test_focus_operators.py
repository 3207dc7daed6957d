"""The operators between the matrix products of `separation_focus`, by definition in float64.

What a backend takes for x, share and base is its own affair: what is made of them is not.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from conftest import relative
from problems import ACTIVATIONS, HALF, LEFT, every_backend, every_separation, make

from ncmi_kernels import _ops, reference
from ncmi_kernels._schema import ALL_MEAN, CLASS_LOG_NORM, INVERSE_NORM, MEAN_LOG_NORM, OWN_PRIOR, PRIOR

FOCUS = 5.0


class Operands:
    """A batch on its way through the operators, and the same by definition in float64."""

    def __init__(self, run, problem, separation, activation="nsf", l2=False, ignore_index=-100, own=1, prior=None):
        z, target, xi, center, _ = problem
        c2s, softmax = separation == "centroid_to_sample", activation == "softmax"
        self.run, self.problem, self.last = run, problem, (c2s, ignore_index)
        self.batch = z, target, center
        self.prior = prior
        self.table = run.centroid_stats(xi, softmax, c2s, prior)
        terms, self.stats = run.terms(*self.batch, *self.table, 0.7, l2, softmax, *self.last)
        self.relative, self.distribution, self.level = run.focus_table(*self.table, c2s)
        self.x = run.focus_rows(*self.batch, *self.table, self.stats, *self.last)
        self.product = self.x @ (self.distribution if c2s else self.relative).T
        self.weights, self.terms_stats = self.product.clone(), self.stats.clone()
        self.separation = terms[1].clone()
        norms = self.table[3]
        of_rows = self.separation, self.stats, target
        run.focus_weights_(self.weights, *of_rows, norms, self.level, FOCUS, *self.last, own)

        self.kept = target != ignore_index
        wide = None if center is None else center.double()
        y = target[self.kept]
        log_q = reference.log_activation(xi.double(), activation)
        log_p = reference.log_probabilities(z[self.kept].double(), wide, 0.7, l2, activation)
        prior = torch.full((len(xi),), 1 / len(xi), dtype=torch.float64) if prior is None else prior
        self.prior_of_each = prior
        self.others = y[:, None] != torch.arange(len(xi)) % (len(xi) // own)
        self.own_prior = 1 - (self.others * prior).sum(dim=1)
        self.counting = counting = self.others & (prior > 0)
        d = reference.divergences(log_p, log_q, separation)
        nearest = torch.where(counting, d, torch.inf).amin(dim=1, keepdim=True)
        self.exact_weights = torch.where(counting, prior.log() - FOCUS * d / nearest, -torch.inf).softmax(dim=1)
        self.mean = (self.exact_weights * d).sum(dim=1)
        self.log_q, self.log_p, self.y, self.d = log_q, log_p, y, d

    def sums(self, coefficients):
        """class_weights, which had ones, and weighted."""
        class_weights = torch.ones(len(self.log_q), 2, dtype=torch.float64)
        args = self.weights, class_weights, self.stats, coefficients, self.problem[1]
        self.run.focus_sums_(*args, *self.last)
        return class_weights, self.weights.T @ self.x


def of_rows(operands):
    """Coefficients for the rows, 0 where they are ignored."""
    coefficients = torch.rand(len(operands.kept), 4, dtype=torch.float64) + 0.1
    return coefficients * operands.kept[:, None]


def check_operators(run, problem, separation, bound, **options):
    """focus_table, focus_rows, focus_weights_ and focus_sums_ of a problem."""
    its = Operands(run, problem, separation, **options)
    c2s = separation == "centroid_to_sample"
    relative_q = its.relative.double()
    shared = (relative_q - its.log_q).mean(dim=0)  # the same in each class
    assert (relative_q - shared - its.log_q).norm() < bound * its.log_q.norm()
    log_activation, activation, compared, norms = (t.double() for t in its.table)
    above_mean = norms[:-1, CLASS_LOG_NORM] - norms[-1, MEAN_LOG_NORM]
    level = (log_activation - compared[0]) - above_mean[:, None]
    if c2s:
        assert relative(its.distribution.double() + compared[1], its.log_q.exp()) < bound
        level = level * activation * (-norms[:-1, CLASS_LOG_NORM]).exp()[:, None]
    else:
        assert its.distribution.shape == (0, problem[0].shape[1])
    assert (its.level[0] - level.sum(dim=1)).abs().max() < 1e-13 * level.abs().sum(dim=1).max()
    assert torch.equal(its.level[1], its.table[3][:-1, PRIOR])
    assert its.x[~its.kept].eq(0).all()

    assert relative(its.separation[its.kept], its.mean * (1 - its.own_prior)) < bound
    assert relative(its.stats[its.kept, OWN_PRIOR], its.own_prior) < 1e-12
    assert relative(its.weights[its.kept], its.exact_weights) < bound
    assert its.weights[~its.kept].eq(0).all()
    assert its.separation[~its.kept].eq(0).all()
    assert its.weights[its.kept][~its.others].eq(0).all()
    # all_mean is D of the mixture and a number of the row, which all_mean is more than D of the mean centroid by too.
    log_norm = -its.stats[its.kept, INVERSE_NORM].log() - its.table[3][-1, MEAN_LOG_NORM]
    assert (its.stats[its.kept, ALL_MEAN] - log_norm - its.mean).norm() < bound * its.mean.norm()

    coefficients = of_rows(its)
    other = coefficients[its.kept, 1]
    class_weights, weighted = its.sums(coefficients)
    expected = other[:, None] * its.exact_weights
    assert relative(class_weights[:, 0] - 1, expected.sum(dim=0)) < bound
    if c2s:
        expected = expected.T @ (its.log_p + shared)
        assert class_weights[:, 1].eq(1).all()
        assert (weighted - expected).norm() < bound * (its.exact_weights.T @ its.log_p.abs()).norm()
    else:
        assert relative(weighted + (class_weights[:, 1:] - 1), expected.T @ its.log_p.exp()) < bound


def check_gradient(run, problem, separation, bound, **options):
    """centroid_grad with class_weights and weighted, against autograd in float64; the step by it."""
    its = Operands(run, problem, separation, **options)
    z, target, center = its.batch
    xi, activation = problem[2], options.get("activation", "nsf")
    coefficients = of_rows(its)
    class_weights, weighted = its.sums(coefficients)
    class_weights -= 1
    wide = xi.double().clone().requires_grad_()
    log_q = reference.log_activation(wide, activation)
    own, other = coefficients[its.kept, 0], coefficients[its.kept, 1]
    own_log = log_q[its.y]
    by_own = own * (its.log_p.exp() * (its.log_p - own_log)).sum(dim=1)
    by_others = other * (its.exact_weights * reference.divergences(its.log_p, log_q, separation)).sum(dim=1)
    (expected,) = torch.autograd.grad((by_own + by_others).sum(), wide)
    known = *its.table, its.stats, coefficients
    sums = class_weights, weighted
    for upstream in (None, torch.tensor(-3.0, dtype=xi.dtype)):
        grad = run.centroid_grad(z, target, center, xi, *known, upstream, *its.last, None, *sums)
        assert grad.dtype == xi.dtype
        assert relative(grad, expected * (1 if upstream is None else -3)) < bound

    by_row = torch.ones(len(z), dtype=xi.dtype)
    with pytest.raises(RuntimeError, match="upstream"):
        run.centroid_grad(z, target, center, xi, *known, by_row, *its.last, None, *sums)
    for given in ((class_weights, None), (None, weighted)):
        with pytest.raises(RuntimeError, match="both class_weights and weighted"):
            run.centroid_grad(z, target, center, xi, *known, None, *its.last, None, *given)

    check_step(run, its, coefficients, sums, activation)


def check_step(run, its, coefficients, sums, activation):
    """centroid_step_ by the gradient that centroid_grad gives; a batch that is not finite moves nothing."""
    (z, target, center), xi = its.batch, its.problem[2]
    softmax, c2s, ignore_index = activation == "softmax", *its.last
    grad = run.centroid_grad(
        z, target, center, xi, *its.table, its.stats, coefficients, None, c2s, ignore_index, None, *sums
    )
    rate = (xi.norm() / grad.norm()).item()
    momentum = torch.randn_like(xi) / rate
    rounding = 1e-6 if xi.dtype == torch.float32 else 1e-13
    for finite in (True, False):
        if not finite:
            coefficients = coefficients.clone()
            coefficients[its.kept.nonzero()[-1]] = math.nan
        before = [xi, momentum, *its.table]
        after = [t.clone() for t in before]
        moved, average, *_ = after
        of_rows = its.stats, coefficients
        sgd = rate, 0.9, 0.0, False
        run.centroid_step_(z, target, center, *after, *of_rows, softmax, c2s, ignore_index, *sgd, *sums)
        if finite:
            assert relative(average, 0.9 * momentum + grad) < rounding
            assert relative(moved - xi, -rate * (0.9 * momentum + grad)) < rounding
            before = [moved, average, *run.centroid_stats(moved, softmax, c2s, its.prior)]
        for t, expected in zip(after, before, strict=True):
            assert torch.equal(t, expected)


class Part(NamedTuple):
    """What the operators take of some of the classes, and of one more, which does not count and is that of all rows
    whose class is elsewhere."""

    index: torch.Tensor  # of its centroids among all, -1 for those of the class more
    product: torch.Tensor  # NaN for these: they are not looked at
    target: torch.Tensor
    norms: torch.Tensor
    level: torch.Tensor

    @classmethod
    def of(cls, its, classes, own):
        index = torch.cat([torch.cat((classes + start, classes.new_full((1,), -1))) for start in starts(its, own)])
        more, (_, target, *_), (_, ignore_index) = index < 0, its.problem, its.last
        product, level = its.product[:, index], its.level[:, index]
        product[:, more], level[1, more] = math.nan, 0
        found = target[:, None] == classes
        number = torch.where(found.any(dim=1), found.int().argmax(dim=1), len(classes))
        number = torch.where(target == ignore_index, ignore_index, number)
        norms = its.table[3]
        return cls(index, product, number, torch.cat((norms[index], norms[-1:])), level)

    def nearest(self, its, own):
        """Of focus_nearest, which writes nothing."""
        before = self.product.clone(), its.terms_stats.clone()
        of_table = self.target, self.norms, self.level
        nearest = its.run.focus_nearest(self.product, its.terms_stats, *of_table, *its.last, own)
        for t, old in zip((self.product, its.terms_stats), before, strict=True):
            assert torch.equal(t.nan_to_num(7), old.nan_to_num(7))
        return nearest

    def weigh(self, its, own, nearest):
        """The weights, in the order of all centroids, and both sums of focus_weights_, which writes nothing else."""
        shared = torch.full((3, len(nearest)), math.nan, dtype=torch.float64)
        shared[0] = nearest
        separation, before = torch.full_like(nearest, 7), its.terms_stats.clone()
        of_table = self.target, self.norms, self.level
        its.run.focus_weights_(self.product, separation, its.terms_stats, *of_table, FOCUS, *its.last, own, shared)
        assert torch.equal(its.terms_stats, before)
        assert separation.eq(7).all()
        assert torch.equal(shared[0], nearest)
        more = self.index < 0
        assert self.product[:, more].eq(0).all()
        weights = torch.zeros_like(its.product)
        weights[:, self.index[~more]] = self.product[:, ~more]
        return weights, shared[1:]


def starts(its, own):
    """The first centroid of each set."""
    return range(0, len(its.level[0]), len(its.level[0]) // own)


def parts_of(its, own):
    """The first class alone, the next two, and the others: whole, where there are no more."""
    classes = torch.arange(len(its.level[0]) // own)
    return [Part.of(its, some, own) for some in (classes[:1], classes[1:3], classes[3:]) if len(some)]


def check_parts(run, problem, separation, bound, **options):
    """Parts of the centroids: what focus_nearest and focus_weights_ find in each comes to what there is in all."""
    own = options.get("own", 1)
    its = Operands(run, problem, separation, **options)
    kept, prior = its.kept, its.prior_of_each
    parts = parts_of(its, own)
    each = [part.nearest(its, own) for part in parts]
    nearest = torch.stack(each).amin(dim=0)
    of_table = problem[1], its.table[3], its.level
    assert torch.equal(nearest, run.focus_nearest(its.product, its.terms_stats, *of_table, *its.last, own))
    exact_nearest = torch.where(its.counting, its.d, torch.inf).amin(dim=1, keepdim=True)
    assert relative(nearest[kept], exact_nearest[:, 0]) < bound
    assert nearest[~kept].eq(0).all()

    farther = torch.where(its.counting, its.d - exact_nearest, 0)
    exact = torch.where(its.counting, prior * (-FOCUS * farther / exact_nearest).exp(), 0)
    summed = torch.stack((exact, exact * farther))
    scale = (exact * torch.stack((torch.ones_like(its.d), its.d))).sum(dim=2).norm(dim=1)
    weights, sums = torch.zeros_like(its.product), torch.zeros(2, len(kept), dtype=torch.float64)
    for part, its_nearest in zip(parts, each, strict=True):
        of_part, two = part.weigh(its, own, nearest)
        among = part.index[part.index >= 0]
        none = ~its.counting[:, among].any(dim=1)
        assert its_nearest[kept][none].eq(torch.finfo(its.product.dtype).max).all()
        assert of_part[kept][none].eq(0).all()
        assert two[:, kept][:, none].eq(0).all()
        assert two[:, ~kept].eq(0).all()
        assert of_part[~kept].eq(0).all()
        # Of the sums of e and e D over all parts: those of a far part alone are not known so well.
        errors = (two[:, kept] - summed[:, :, among].sum(dim=2)).norm(dim=1)
        assert (errors < bound * scale).all()
        weights += of_part
        sums += two
    assert weights[kept][~its.counting].eq(0).all()
    assert relative(weights[kept], exact) < bound
    # To the last bit as in focus_weights_ alone: of the nearest one nothing but the prior is left.
    assert (weights[kept] / prior.to(weights.dtype)).masked_fill(~its.counting, 0).amax(dim=1).eq(1).all()
    rounding = 1e-6 if weights.dtype == torch.float32 else 1e-13
    assert relative(weights[kept] / sums[0, kept, None], its.weights[kept]) < rounding
    mean = nearest[kept] + sums[1, kept] / sums[0, kept]
    assert relative(mean * (1 - its.own_prior), its.separation[kept]) < rounding


def check_parts_of_nan(run, dtype, separation, own):
    """NaN is never the nearest and makes the sums of its own part NaN, in its own row."""
    problem = make(4, 7, 9, dtype=dtype)
    problem[1][:] = torch.tensor([1, 0, 1, 1])
    its = Operands(run, problem_of(problem, 7, own), separation, own=own)
    its.product[1, 1] = math.nan
    its.product[2] = math.nan
    its.product[3, 1] = math.nan  # of the own class: not looked at
    parts = parts_of(its, own)
    nearest = torch.stack([part.nearest(its, own) for part in parts]).amin(dim=0)
    kept = its.d[1][its.counting[1] & (torch.arange(7 * own) != 1)]
    assert relative(nearest[1], kept.amin()) < BOUNDS[dtype]
    assert nearest[2] == torch.finfo(dtype).max
    for part, rows in zip(parts, ([2], [1, 2], [2]), strict=True):
        sums = part.weigh(its, own, nearest)[1]
        assert sums[1].isnan().nonzero()[:, 0].tolist() == rows


def problem_of(problem, classes, own):
    """With `own` centroids a class."""
    z, target, xi, *rest = problem
    return z, target, make(len(z), own * classes, z.shape[1], dtype=xi.dtype)[2], *rest


def check_every_part(run, dtype, separation, activation):
    """One centroid of each class and three; classes that count alike, and not, the first not at all."""
    for own in (1, 3):
        prior = torch.rand(7, dtype=torch.float64)
        prior[0] = 0
        prior = (prior / prior.sum()).repeat(own) / own
        problem = problem_of(make(13, 7, 36, ignore=True, dtype=dtype), 7, own)
        for of in (None, prior):
            check_parts(run, problem, separation, BOUNDS[dtype], activation=activation, own=own, prior=of)
        check_parts_of_nan(run, dtype, separation, own)


ARITHMETIC = dict.fromkeys((*HALF, torch.float32), torch.float32) | {torch.float64: torch.float64}
BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}


def check_every_kind(run, dtype, separation, activation, shapes=((13, 7, 36), (13, 7, 37), (1, 2, 5))):
    """In 16 bytes, one by one, strided; features large and small."""
    for shape, l2 in itertools.product(shapes, (False, True)):
        z, *rest = make(*shape, center=True, ignore=shape[0] > 1, dtype=ARITHMETIC[dtype])
        z = z.to(dtype)
        for input in (z, torch.stack((z, z), dim=-1)[..., 0]):
            for check in (check_operators, check_gradient):
                check(run, (input, *rest), separation, BOUNDS[dtype], activation=activation, l2=l2)
    check_several_centroids(run, dtype, separation, activation, shapes[-2:])


def check_several_centroids(run, dtype, separation, activation, shapes):
    """Three of each class, and classes that do not count alike: the first not at all."""
    for rows, classes, columns in shapes:
        problem = make(rows, classes, columns, ignore=rows > 1, dtype=ARITHMETIC[dtype])
        z, target, _, *rest = problem
        xi = make(rows, 3 * classes, columns, dtype=ARITHMETIC[dtype])[2]
        prior = torch.rand(classes, dtype=torch.float64)
        prior[0] = 0 if classes > 2 else 0.1
        prior = (prior / prior.sum()).repeat(3) / 3
        options = {"activation": activation, "own": 3, "prior": prior}
        for check in (check_operators, check_gradient):
            check(run, (z.to(dtype), target, xi, *rest), separation, BOUNDS[dtype], **options)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_separation
@pytest.mark.parametrize("dtype", BOUNDS)
def test_operators(dtype, separation, activation, backend, interpreted):
    if interpreted and (activation == "softmax") != (dtype in (torch.float64, torch.bfloat16)):
        pytest.skip(LEFT)
    shapes = {"shapes": ((5, 4, 13),)} if interpreted else {}
    check_every_kind(_ops.operators(backend), dtype, separation, activation, **shapes)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_separation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts(dtype, separation, activation, backend, interpreted):
    if interpreted and (activation == "softmax") != (dtype == torch.float64):
        pytest.skip(LEFT)
    check_every_part(_ops.operators(backend), dtype, separation, activation)


def check_divergences(run, separation):
    """NaN makes the separation of its own row NaN; what rounding leaves below zero is the smallest number."""
    problem = make(6, 5, 9, dtype=torch.float32)
    its = Operands(run, problem, separation)
    target, level = problem[1], its.level
    c2s = separation == "centroid_to_sample"
    product = torch.zeros(6, 5) if c2s else torch.full((6, 5), 1e3)
    product[torch.arange(6), target] = math.nan  # that of the own class is not looked at
    product[1, (target[1] + 1) % 5] = math.nan
    product[2] = math.nan
    level = torch.stack((torch.full_like(level[0], -1e3 if c2s else -1), level[1]))
    separated = torch.empty(6, dtype=torch.float64)
    run.focus_weights_(product, separated, its.stats.clone(), target, its.table[3], level, FOCUS, *its.last)
    assert separated[1:3].isnan().all()
    others = torch.tensor([0, 3, 4, 5])
    assert relative(separated[others], torch.full((4,), 1.17549435e-38 * 0.8, dtype=torch.float64)) < 1e-6
    expected = torch.full((6, 5), 0.25)
    expected[torch.arange(6), target] = 0
    assert relative(product[others], expected[others]) < 1e-6


def check_priors_of_none(run, separation):
    """Where all of the prior is the own class's, no other has a weight, and there is no separation."""
    for own in (1, 2):
        z, _, _, *rest = make(4, 3, 9, dtype=torch.float32)
        xi = make(4, 3 * own, 9, dtype=torch.float32)[2]
        prior = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).repeat(own) / own
        problem = z, torch.tensor([1, 0, 1, 2]), xi, *rest
        its = Operands(run, problem, separation, own=own, prior=prior)
        assert its.weights[::2].eq(0).all()
        assert its.separation[::2].eq(0).all()
        assert its.stats[:, OWN_PRIOR].tolist() == [1, 0, 1, 0]
        assert relative(its.weights[1::2], its.exact_weights[1::2]) < 1e-5


@every_backend
@every_separation
def test_priors_of_none(separation, backend):
    check_priors_of_none(_ops.operators(backend), separation)


@every_backend
@every_separation
def test_divergences_that_are_none(separation, backend):
    check_divergences(_ops.operators(backend), separation)


# Several chunks of rows; many classes; long rows.
LARGE = [(300, 3, 8), (1100, 40, 8), (3, 700, 12), (2, 4500, 12), (3, 4, 4500)]


def check_large(run, shape, separation):
    """The nearest of thousands of classes is at a difference of numbers that are some hundred times as large."""
    problem = make(*shape, ignore=True, dtype=torch.float32)
    bound = BOUNDS[torch.float32] if shape[1] < 100 else 2e-5
    check_operators(run, problem, separation, bound)
    check_parts(run, problem, separation, bound)
    check_gradient(run, problem, separation, bound)


@every_backend
@every_separation
@pytest.mark.parametrize("shape", LARGE)
def test_operators_of_large_shapes(shape, separation, backend, interpreted):
    if interpreted:
        pytest.skip(LEFT)
    check_large(_ops.operators(backend), shape, separation)
