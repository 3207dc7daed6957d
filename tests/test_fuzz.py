"""The public API against the definition in float64, on what hypothesis makes up; `make fuzz` tries more of it.

How far a result may be off is no constant: it is measured, for each case, on the definition itself. `literal` can be
told to round as an arithmetic of machine precision eps would (`Rounding`): f, log a, p and the differences of
logarithms, and the gradients that come back through them, are moved by up to eps of their size; normalisers by as much
as float64 loses, since all sums are float64. What DRAWS such evaluations are off by, the root of the mean of their
squares, is what a good implementation in that precision is off by. Allowed are LEEWAY times as much, and what storing
the result costs. So ill-conditioned cases (a separation as small as its rounding, features that all lie at their
centre) are known as such, and all others are held to what they can be.

Plain PyTorch, and the products of separation_focus, do not keep to these rules. For them logarithms are rounded after
they are normalised, and normalisers as everything else (`plain`). Second derivatives are autograd's of plain PyTorch;
they are compared in float64 arithmetic, where 1e-9 of their norm is allowed as well.

The loss and the gradient of the input are compared by row, others as a whole: those of centroids are sums over rows.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncmi_kernels import NCMILoss, ncmi_loss, ncmi_terms

EXAMPLES = os.environ.get("NCMI_FUZZ")  # `make fuzz` sets it; otherwise there are few, the same ones each time
DRAWS = 8
LEEWAY = 16
DOUBLE = 8 * torch.finfo(torch.float64).eps  # the definition itself is no better

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BY_SAMPLE = ("sample", "soft_margin")
KINDS = ("normal", "unit", "constant rows", "equal rows", "one-hot")


@dataclass(frozen=True)
class Values:
    """offset + scale * (rows of a kind)."""

    kind: str
    scale: float
    offset: float

    def tensor(self, rows: int, columns: int, dtype: torch.dtype, own: Tensor | None = None) -> Tensor:
        x = torch.randn(rows, columns, dtype=torch.float64)
        if self.kind == "unit":
            x = F.normalize(x, dim=1)
        elif self.kind == "constant rows":
            x = x[:, :1].expand(rows, columns)
        elif self.kind == "equal rows":
            x = x[:1] + 1e-3 * torch.randn(rows, columns, dtype=torch.float64)
        elif self.kind == "one-hot":
            x = 10.0 * (torch.arange(rows)[:, None] % columns == torch.arange(columns))
        elif self.kind == "own centroids":
            x = own + 1e-3 * x
        largest = 6e4 if dtype == torch.float16 else 1e37
        return (self.offset + self.scale * x).clamp(-largest, largest).to(dtype)


@dataclass(frozen=True)
class Case:
    api: str
    backend: str
    shape: str
    rows: int
    classes: int
    columns: int
    dtype: torch.dtype
    centroid_dtype: torch.dtype
    features: Values
    centroids: Values
    layout: str
    centroid_layout: str
    target_layout: str
    center: bool
    weight: str | None
    class_prior: str | None
    ignored: str | None
    ratio: tuple[str, str]  # and reduction
    options: dict[str, Any]
    seed: int


def values(kinds: tuple[str, ...], largest: float) -> st.SearchStrategy[Values]:
    return st.builds(
        Values,
        kind=st.sampled_from(kinds),
        scale=st.sampled_from([s for s in (1.0, 1.0, 0.0, 1e-30, 1e-6, 0.04, 10.0, 1e3, 1e5) if s <= largest]),
        offset=st.sampled_from((0.0, 0.0, 1e-6, 1e-3, 1.0, 30.0, -8.0, -20.0, -200.0)),
    )


huge = st.builds(Values, kind=st.sampled_from(KINDS), scale=st.sampled_from((1e19, 1e25, 1e30)), offset=st.just(0.0))
layouts = st.sampled_from(("contiguous", "transposed", "expanded", "sliced", "offset"))
cases = st.builds(
    Case,
    api=st.sampled_from(("ncmi_loss", "ncmi_terms", "NCMILoss")),
    backend=st.sampled_from(("cpu", "cpu", "reference")),
    shape=st.sampled_from(("[B, M]", "[B, M]", "[M]", "[B, M, 2]")),
    rows=st.sampled_from((1, 0)) | st.integers(2, 40),
    classes=st.integers(2, 30),
    columns=st.integers(2, 70) | st.sampled_from((127, 128, 129, 192, 300)),
    dtype=st.sampled_from(DTYPES),
    centroid_dtype=st.sampled_from(DTYPES),
    features=values((*KINDS, "own centroids"), 1e5) | values((*KINDS, "own centroids"), 1e5) | huge,
    centroids=values(KINDS, 10.0),
    layout=layouts,
    centroid_layout=layouts,
    target_layout=layouts,
    center=st.booleans(),
    weight=st.sampled_from((None, "random", "some zero", "zero")),
    class_prior=st.sampled_from((None, None, "random", "some zero")),
    ignored=st.sampled_from((None, None, "some", "all")),
    ratio=st.sampled_from((("batch", "mean"), *((r, s) for r in BY_SAMPLE for s in ("mean", "sum", "none")))),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from((1.0, 0.2, 0.01, 5.0)),
            "l2_normalize": st.booleans(),
            "activation": st.sampled_from(("nsf", "softmax")),
            "separation": st.sampled_from(("sample_to_centroid", "centroid_to_sample")),
            "separation_focus": st.sampled_from((0.0, 0.0, 0.5, 10.0)),
            "centroids_per_class": st.sampled_from((1, 1, 1, 3)),
            "centroid_focus": st.sampled_from((0.0, 4.0)),
            "eps": st.sampled_from((1e-8, 1e-3, 1.0)),
            "sharpness": st.sampled_from((4.0, 1.0, 0.7, 30.0)),
            "ignore_index": st.sampled_from((-100, 0, 1, 255)),
        }
    ),
    seed=st.integers(0, 3),
).filter(lambda case: case.features.scale <= 1e5 or case.options["l2_normalize"])


def laid_out(t: Tensor, layout: str, junk: float) -> Tensor:
    """`t` with other strides, among `junk` that nobody may read. Expanded, its first row takes the place of all."""
    if t.dim() == 0 or layout == "contiguous":
        return t
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if layout == "expanded":
        return t[:1].clone().expand_as(t)
    if layout == "sliced":
        return torch.stack([t, torch.full_like(t, junk)], dim=-1).flatten(-2)[..., ::2]
    return torch.cat([torch.full((1,), junk, dtype=t.dtype), t.flatten()])[1:].view(t.shape)  # offset


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Input, target, centroid logits, centre, class weights and priors, as the API takes them."""
    torch.manual_seed(case.seed)
    count = {"[M]": 1, "[B, M]": case.rows, "[B, M, 2]": 2 * case.rows}[case.shape]
    several = case.options["centroids_per_class"]
    xi = case.centroids.tensor(case.classes * several, case.columns, case.centroid_dtype)
    xi = laid_out(xi, case.centroid_layout, math.nan)
    target = torch.randint(case.classes, (count,))
    z = case.features.tensor(count, case.columns, case.dtype, xi[target * several].double())
    ignore_index = case.options["ignore_index"]
    if case.ignored and case.api != "ncmi_terms":
        target[:: 3 if case.ignored == "some" else 1] = ignore_index
    if case.shape == "[M]":
        z, target = z[0], target[0]
    elif case.shape == "[B, M, 2]":
        z, target = z.view(case.rows, 2, case.columns).movedim(-1, 1), target.view(case.rows, 2)
    z, target = laid_out(z, case.layout, math.nan), laid_out(target, case.target_layout, 1000)
    if case.api != "ncmi_terms" and case.layout != "expanded":
        (z.movedim(1, -1) if z.dim() > 1 else z)[target == ignore_index] = math.nan
    center = torch.randn(case.columns).to(case.centroid_dtype) if case.center else None
    weight = None if case.weight is None else torch.rand(case.classes).to(case.centroid_dtype) + 0.1
    if weight is not None and case.weight != "random":
        weight[:: 2 if case.weight == "some zero" else 1] = 0
    prior = None
    if case.class_prior:
        prior = torch.rand(case.classes, dtype=torch.float64) + 0.1
        if case.class_prior == "some zero" and case.classes > 3:
            prior[::2] = 0
        prior /= prior.sum()
    return z, target, xi, center, weight, prior


class Rounding:
    """Moves numbers, and the gradients that come back through them, by up to eps of a size: by default their own.

    With an even seed each by itself; with an odd one equal sizes alike, as an arithmetic does.
    """

    def __init__(self, eps: float = 0.0, plain: bool = False, seed: int = 0) -> None:
        self.eps, self.plain, self.alike = eps, plain, seed % 2 == 1
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, x: Tensor, size: Tensor, eps: float) -> Tensor:
        if self.alike:  # a hash of float32's bits
            odd = 2 * torch.randint(2**61, (), generator=self.generator) + 1
            bits = (size.detach().contiguous().view(torch.int64) + 2**28) >> 29
            share = (bits * odd).double() / 2**63
        else:
            share = 2 * torch.rand(size.shape, generator=self.generator, dtype=torch.float64) - 1
        return x + size * (share * eps)

    def __call__(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        if not self.eps:
            return x
        x = self.moved(x, x if size is None else size.detach(), self.eps)
        x.register_hook(lambda grad: self.moved(grad, grad, self.eps))
        return x

    def normaliser(self, log_sum: Tensor) -> Tensor:
        if not self.eps:
            return log_sum
        size = 1 + log_sum.detach().abs()
        log_sum = self.moved(log_sum, size, self.eps if self.plain else DOUBLE)
        # What is off in a logarithm is off, relatively, in the p that come of it, which then do not add up to one.
        back = size if self.plain else 1
        log_sum.register_hook(lambda grad: self.moved(grad, grad * back, self.eps))
        return log_sum

    def distribution(self, log_a: Tensor, log_sum: Tensor) -> Tensor:
        """exp(log_a - log_sum), for one use: what comes back to the normaliser is a sum of its own, and so rounded."""
        log_sum = log_sum.clone()
        log_sum.register_hook(lambda grad: self.moved(grad, grad, self.eps))
        return self((log_a - log_sum).exp())


def activate(x: Tensor, temperature: float, softmax: bool, rounded: Rounding) -> tuple[Tensor, Tensor]:
    """Log a [N, M] of the rows of x, up to a constant, and log sum a [N, 1]; their difference is log p."""
    if softmax:
        shift = 0 if rounded.plain else x.detach().amax(dim=1, keepdim=True)
        log_a = rounded((x - shift) / temperature)
        excess = torch.ones_like(log_a)
    else:
        f = rounded(x / temperature)
        near = f.abs() < 4
        log_cosh = torch.log1p(2 * torch.sinh(torch.where(near, f, 0) / 4).square())  # of f / 2
        log_a = torch.where(near, f / 2 - log_cosh, F.logsigmoid(f) + math.log(2))  # a = 2 sigma, 1 where f is 0
        excess = torch.expm1(-log_a).abs().clamp(max=1)  # near 1 a - 1 is rounded, not a
    log_sum = log_a.logsumexp(dim=1, keepdim=True)
    p = (log_a - log_sum).exp()
    lost = rounded(p, p if rounded.plain else p * excess).sum(dim=1, keepdim=True).log()
    return log_a, rounded.normaliser(log_sum + lost)


def literal(
    z: Tensor,
    target: Tensor,
    xi: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    prior: Tensor | None,
    case: Case,
    rounded: Rounding,
) -> list[Tensor]:
    """What the API returns for [N, M] features, from the [N, C K, M] tensor: [loss], or [A, G]. All float64."""
    options, (ratio, reduction), several = case.options, case.ratio, case.options["centroids_per_class"]
    softmax = options["activation"] == "softmax"
    kept = torch.ones_like(target).bool() if case.api == "ncmi_terms" else target != options["ignore_index"]
    y, x = target[kept], z[kept]
    if center is not None:
        x = rounded(x - center)
    if options["l2_normalize"]:
        short = x.detach().norm(dim=1, keepdim=True) < 1e-12
        length = rounded(x.masked_fill(short, 1).norm(dim=1, keepdim=True))
        x = rounded(x / length.masked_fill(short, 1e-12))
    log_a, log_a_sum = activate(x, options["temperature"], softmax, rounded)
    log_b, log_b_sum = activate(xi, 1.0, softmax, rounded)
    own = F.one_hot(y, case.classes).bool().repeat_interleave(several, dim=1)
    difference = rounded(log_a)[:, None] - rounded(log_b)  # [N, C K, M]
    constant = log_a_sum[:, None] - log_b_sum  # [N, C K, 1]
    if rounded.plain and not rounded.eps:  # as large as the logarithms are, the exact result is to have none of this
        difference, constant = (log_a - log_a_sum)[:, None] - (log_b - log_b_sum), torch.zeros_like(constant)
    size = (log_a - log_a_sum)[:, None].abs() + (log_b - log_b_sum).abs() if rounded.plain else difference.abs()

    def own_divergence(from_sample: bool) -> Tensor:  # [N, K]
        d = (rounded(difference[own], size[own]) - constant[own]).view(len(y), several, case.columns)
        if from_sample:
            return (rounded.distribution(log_a, log_a_sum)[:, None] * d).sum(dim=2)
        return -(rounded.distribution(log_b, log_b_sum).unflatten(0, (-1, several))[y] * d).sum(dim=2)

    def by_nearness(d: Tensor, focus: float, counts: Tensor) -> Tensor:
        d = d.detach().masked_fill(counts == 0, math.inf)
        nearest = d.amin(dim=1, keepdim=True).clamp(min=torch.finfo(d.dtype).tiny)
        return torch.softmax(counts.log() - (focus * (d / nearest) if focus else 0), dim=1)

    a = own_divergence(True)
    a = (by_nearness(a, options["centroid_focus"], torch.ones_like(a)) * a).sum(dim=1)
    shared = size.amax(dim=1, keepdim=True)  # the classes are summed once, for all rows
    p, q = rounded.distribution(log_a, log_a_sum)[:, None], rounded.distribution(log_b, log_b_sum)
    if rounded.plain:
        p, shared = rounded(p.expand_as(difference)), shared.expand_as(difference)  # or each is multiplied
    differences = rounded(difference, shared) - constant
    from_sample = options["separation"] == "sample_to_centroid"
    divergence = (p * differences if from_sample else -q * differences).sum(dim=2)
    prior = torch.full((case.classes,), 1 / case.classes, dtype=torch.float64) if prior is None else prior
    share = (prior / several).repeat_interleave(several).masked_fill(own, 0)
    if every_pair(options):
        divergence = divergence - divergence.detach().clamp(max=0)  # rounding may leave less than 0
    if options["separation_focus"]:
        share = by_nearness(divergence, options["separation_focus"], share) * (1 - prior[y])[:, None]
    g = (share * divergence.masked_fill(own, 0)).sum(dim=1)
    # The own class is in the sum of all and subtracted, each rounded.
    g = g + prior[y] * (own_divergence(from_sample) - own_divergence(from_sample)).mean(dim=1)

    def of_all_rows(t: Tensor) -> Tensor:
        return t.new_zeros(len(z)).masked_scatter(kept, t)

    if case.api == "ncmi_terms":
        return [of_all_rows(a), of_all_rows(g)]
    w = torch.ones_like(a) if weight is None else weight[y]
    if ratio == "batch":
        return [(w @ a / w.sum()) / (w @ g / w.sum() + options["eps"])]
    each = a / (g + options["eps"])
    if ratio == "soft_margin":
        each = F.softplus(options["sharpness"] * each.clamp(min=1e-100).log(), threshold=700) / options["sharpness"]
    each = w * each
    return [of_all_rows(each) if reduction == "none" else each.sum() / (w.sum() if reduction == "mean" else 1)]


def every_pair(options: dict[str, Any]) -> bool:
    """Whether samples and centroids meet in matrix products."""
    return bool(options["separation_focus"] > 0 or options["centroids_per_class"] > 1)


def rows(t: Tensor) -> Tensor:
    """[M], [B, M] or [B, M, d] as [N, M]."""
    return t.movedim(1, -1).flatten(0, -2) if t.dim() > 1 else t[None]


def derivatives(
    function: Callable[..., list[Tensor]], z: Tensor, xi: Tensor, *, twice: bool = False, repeat: bool = False
) -> list[Tensor]:
    """The outputs and the gradients of a random sum of them; or, `twice`, those of a random sum of these gradients."""
    torch.manual_seed(7)
    leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in (z, xi)]
    outputs = function(*leaves)
    total = sum((o.flatten() * torch.randn(o.numel()).to(o.dtype)).sum() for o in outputs)
    grads = torch.autograd.grad(total, leaves, retain_graph=True, create_graph=twice)
    if twice:
        total = sum((rows(g) * torch.randn(rows(g).shape).to(g.dtype)).sum() for g in grads)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [rows(g).reshape(1, -1) for g in grads]
    if repeat:
        again = torch.autograd.grad(total, leaves)
        torch.testing.assert_close(again, grads, rtol=0, atol=0, equal_nan=True, msg="other bits the second time")
    return [*(o.detach().reshape(-1, 1) for o in outputs), rows(grads[0]), grads[1].reshape(1, -1)]


def compare(name: str, actual: Tensor, exact: Tensor, moved: list[Tensor], share: float = 0.0) -> None:
    """Raise AssertionError where a row of [N, K] is further from `exact` than roundings make it, as the module says."""
    finfo = torch.finfo(actual.dtype)
    actual, exact = (t.double().clamp(-finfo.max, finfo.max) for t in (actual, exact))
    error = (actual - exact).norm(dim=1)
    spread = torch.stack([(m - exact).norm(dim=1) for m in moved]).square().mean(dim=0).sqrt()
    least = max(finfo.tiny * finfo.eps, 1e-35)  # a float32 on the way may underflow
    storing = (finfo.eps * exact.abs() + least).norm(dim=1) + share * exact.norm(dim=1)
    good = (error <= LEEWAY * spread + storing) | (actual.isnan().any(dim=1) & exact.isnan().any(dim=1))
    for row in good.logical_not().nonzero()[:1].flatten().tolist():
        raise AssertionError(
            f"{name}, row {row}: off by {error[row]:.2g} of {exact[row].norm():.2g}; "
            f"rounding makes {spread[row]:.2g}, storing {storing[row]:.2g}"
        )


def check(case: Case) -> None:
    z, target, xi, center, weight, prior = problem(case)
    given = [t for t in (z, target, xi, center, weight, prior) if t is not None]
    before = [t.clone() for t in given]
    options = {**case.options, "backend": case.backend, "ratio": case.ratio[0], "reduction": case.ratio[1]}
    parameter, momentum = xi, 0.9 if case.center else None
    if case.api == "NCMILoss":
        its = {"center_momentum": momentum, "weight": weight, "class_prior": prior, "dtype": case.centroid_dtype}
        criterion = NCMILoss(case.classes, case.columns, **its, **options)
        parameter = criterion.centroid_logits
        parameter.data = xi

    def call(z: Tensor, xi: Tensor) -> list[Tensor]:
        if case.api == "NCMILoss":
            return [criterion(z, target)]
        if case.api == "ncmi_loss":
            return [ncmi_loss(z, target, xi, center=center, weight=weight, class_prior=prior, **options)]
        others = {
            k: v for k, v in options.items() if k not in ("eps", "ignore_index", "ratio", "reduction", "sharpness")
        }
        return list(ncmi_terms(z, target, xi, center=center, class_prior=prior, **others))

    actual = derivatives(call, z, parameter, repeat=True)
    torch.testing.assert_close(given, before, rtol=0, atol=0, equal_nan=True, msg="an argument was modified")

    flat = rows(z).double()
    if case.api == "NCMILoss" and case.center:
        center = criterion.center
        used = flat[target.flatten() != case.options["ignore_index"]]
        mean, finfo = used.mean(dim=0), torch.finfo(center.dtype)
        if len(used) and mean.abs().max() < finfo.max:
            # A sum of n numbers rounds n - 1 times, in float64, here and there.
            relative = 2 * finfo.eps + len(used) * torch.finfo(torch.float64).eps
            good = (center - mean).abs() <= relative * used.abs().mean(dim=0) + finfo.tiny
            assert good.all(), f"center: got {center}, expected {mean}"

    def definition(rounded: Rounding, twice: bool = False) -> list[Tensor]:
        c, w = (None if t is None else t.double() for t in (center, weight))
        pi = prior if case.api != "NCMILoss" or prior is None else criterion.class_prior.double()
        pi = None if pi is None else pi / pi.sum()
        return derivatives(
            lambda z, xi: literal(z, target.flatten(), xi, c, w, pi, case, rounded), flat, xi.double(), twice=twice
        )

    work = torch.promote_types(torch.promote_types(case.dtype, case.centroid_dtype), torch.float32)
    eps = DOUBLE if work == torch.float64 else torch.finfo(work).eps
    plain = case.backend == "reference" or every_pair(case.options)
    moved = zip(*(definition(Rounding(eps, plain, seed)) for seed in range(DRAWS)), strict=True)
    names = ["concentration", "separation"] if case.api == "ncmi_terms" else ["loss"]
    names += ["gradient of input", "gradient of centroids"]
    for name, *results in zip(names, actual, definition(Rounding(plain=plain)), moved, strict=True):
        compare(name, *results)

    if case.dtype == case.centroid_dtype == torch.float64:
        if case.api == "NCMILoss":
            criterion.eval()  # the centre stays
        moved = zip(*(definition(Rounding(eps, True, seed), twice=True) for seed in range(DRAWS)), strict=True)
        results = derivatives(call, z, parameter, twice=True), definition(Rounding(plain=True), twice=True), moved
        for name, *result in zip(("input", "centroids"), *results, strict=True):
            compare(f"second derivative by {name}", *result, share=1e-9)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:  # threads cost five times what they save on tensors this small
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning", "ignore::ncmi_kernels.DivergenceWarning")
@settings(max_examples=int(EXAMPLES or 100), derandomize=EXAMPLES is None, deadline=None)
@given(case=cases)
def test_public_api(case: Case) -> None:
    check(case)
