"""Is a loss the one that is defined? Random problems, and the comparison with the definition in float64.

For this package's backends, and for an author of other kernels: whatever takes the arguments of
:func:`ncmi_kernels.ncmi_loss` but `backend` can be held against the definition. `python -m ncmi_kernels check` does it
with the backends that can run on a machine, and the package's own tests use what is here.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import reference
from ncmi_kernels._options import ACTIVATIONS, OPTION_NAMES, SEPARATIONS, Options
from ncmi_kernels.functional import DegenerateMinimumWarning, ncmi_loss

__all__ = [
    "EXTREMES",
    "QUANTITIES",
    "Options",
    "Result",
    "check",
    "device_of",
    "errors",
    "evaluate",
    "pairwise",
    "random_problem",
    "relative_error",
    "to_dtype",
]

Problem = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Loss = Callable[..., Tensor]
QUANTITIES = ("loss", "input gradient", "centroid gradient")

# ------------------------------------------------------------------------------------------------------------
# Problems
# ------------------------------------------------------------------------------------------------------------


def random_problem(
    rows: int,
    classes: int,
    columns: int,
    *,
    ignore: bool = False,
    center: bool = False,
    weight: bool = False,
    spread: float = 2.0,
    dtype: torch.dtype = torch.float64,
    centroids_per_class: int = 1,
) -> Problem:
    """A random problem, of torch's generator and on torch's default device.

    Args:
        rows: B.
        classes: C.
        columns: M.
        ignore: whether every third target is -100.
        center: whether there is one.
        weight: whether there are class weights, of 0.1 to 1.1.
        spread: standard deviation of input and centroid_logits.
        dtype: of all but the target. The same seed gives the same numbers in each, but for rounding.
        centroids_per_class: K.

    Returns:
        input [B, M], target [B] int64, centroid_logits [C K, M], center [M] or None, weight [C] or None.

    Example:
        >>> from ncmi_kernels.testing import random_problem
        >>> input, target, centroid_logits, center, weight = random_problem(8, 3, 16, center=True)
        >>> input.shape, centroid_logits.shape, weight is None
        (torch.Size([8, 16]), torch.Size([3, 16]), True)
    """
    target = torch.randint(classes, (rows,))
    if ignore:
        target[::3] = -100
    return (
        (spread * torch.randn(rows, columns, dtype=torch.float64)).to(dtype),
        target,
        (spread * torch.randn(classes * centroids_per_class, columns, dtype=torch.float64)).to(dtype),
        torch.randn(columns, dtype=torch.float64).to(dtype) if center else None,
        (torch.rand(classes, dtype=torch.float64) + 0.1).to(dtype) if weight else None,
    )


def _level(value: float, rows: int, columns: int = 30) -> Tensor:
    return value + torch.linspace(-3, 3, columns).expand(rows, columns)


EXTREMES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "rows at -200": lambda: (_level(-200, 4), torch.randn(3, 30)),
    "rows at 200": lambda: (_level(200, 4), torch.randn(3, 30)),
    "centroids": lambda: (
        torch.randn(6, 30),
        torch.cat((_level(-200, 1), _level(60, 1), _level(0, 1) + torch.randn(30))),
    ),
    "all below": lambda: (2 * torch.randn(8, 12) - 95, 2 * torch.randn(5, 12) - 60),
    "spread 30": lambda: (30 * torch.randn(11, 40), 30 * torch.randn(6, 40)),
    "spread 300": lambda: (300 * torch.randn(11, 40), 300 * torch.randn(6, 40)),
}
"""Saturated float32 values by name: functions that draw input and centroid_logits. At -200 the sum of the sigmoids
underflows."""


def to_dtype(dtype: torch.dtype, problem: Sequence[Tensor | None]) -> Any:
    """The same problem with its floating tensors in another dtype."""
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in problem)


def pairwise(**factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Combinations of the factors' values such that any two values of two factors meet in one of them.

    About as many as the two largest factors have pairs, where the product has exponentially many. Greedy: each
    combination begins with a pair that has not met, and each other factor takes the value with the most new pairs.

    Args:
        factors: at least two, each with its values.

    Returns:
        Dicts from the factors' names to a value; the same ones for the same factors.

    Example:
        >>> from ncmi_kernels.testing import pairwise
        >>> len(pairwise(a="xy", b="xy", c="xy", d="xy"))  # of 16
        6
    """
    Choice = tuple[str, int]

    def pair(a: Choice, b: Choice) -> frozenset[Choice]:
        return frozenset((a, b))

    choices = {name: [(name, index) for index in range(len(values))] for name, values in factors.items()}
    # A dict for a set that keeps its order.
    apart = {pair(a, b): None for one, two in itertools.combinations(choices.values(), 2) for a in one for b in two}
    found = []
    while apart:
        taken = dict(sorted(next(iter(apart))))
        for name, every in choices.items():
            if name not in taken:
                gains = [sum(pair(each, other) in apart for other in taken.items()) for each in every]
                taken[name] = gains.index(max(gains))
        for a, b in itertools.combinations(taken.items(), 2):
            apart.pop(pair(a, b), None)
        found.append({name: values[taken[name]] for name, values in factors.items()})
    return found


# ------------------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in the 2-norm, in float64; ||actual|| where `expected` is 0.

    Args:
        actual: any shape and floating dtype.
        expected: of the same shape.

    Returns:
        The error; NaN where either has NaN.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm()
    return ((actual - expected).norm() / torch.where(scale == 0, 1.0, scale)).item()


def evaluate(
    problem: Problem,
    options: Options,
    backend: str | Loss,
    literal: bool = False,
    upstream: float = 1.0,
    class_prior: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Loss and gradients of a problem.

    Args:
        problem: input, target, centroid_logits, center, weight, as :func:`random_problem` gives them.
        options: of the loss.
        backend: by name; or a function with the arguments of :func:`ncmi_kernels.ncmi_loss` but `backend`; or
            "float64", the reference on the problem in float64.
        literal: of "float64", by the definition with its [B, C, M] tensor (`reference.literal_terms`).
        upstream: the gradient of the loss, in each of its elements.
        class_prior: [C] or None.

    Returns:
        The loss, detached, and the gradients of input and centroid_logits.
    """
    z, target, xi, center, weight = to_dtype(torch.float64, problem) if backend == "float64" else problem
    z, xi = z.detach().requires_grad_(), xi.detach().requires_grad_()  # strides as they are, which a clone may not keep
    if backend == "float64":
        loss = reference.loss(z, target, xi, center, weight, options, class_prior, literal=literal)
    else:
        loss = _loss_of((z, target, xi, center, weight), options, backend, class_prior)
    grads = torch.autograd.grad(loss, (z, xi), torch.full_like(loss, upstream))
    return loss.detach(), *grads


def _loss_of(problem: Problem, options: Options, backend: str | Loss, class_prior: Tensor | None) -> Tensor:
    z, target, xi, center, weight = problem
    function = partial(ncmi_loss, backend=backend) if isinstance(backend, str) else backend
    keywords = {name: getattr(options, name) for name in OPTION_NAMES}
    return function(z, target, xi, center=center, weight=weight, class_prior=class_prior, **keywords)


def errors(problem: Problem, options: Options, backend: str | Loss, **others: Any) -> tuple[float, float, float]:
    """Relative errors of the :data:`QUANTITIES` against the literal definition in float64, of the same numbers.

    Args:
        problem: as in :func:`evaluate`.
        options: of the loss.
        backend: a name or a function.
        others: `upstream` and `class_prior` of :func:`evaluate`.

    Returns:
        The :func:`relative_error` of the loss and of the gradients of input and centroid_logits.

    Example:
        >>> from ncmi_kernels.testing import Options, errors, random_problem
        >>> max(errors(random_problem(8, 3, 16), Options(separation_focus=10.0), "reference")) < 1e-10
        True
    """
    actual = evaluate(problem, options, backend, **others)
    loss, input, centroids = map(relative_error, actual, evaluate(problem, options, "float64", True, **others))
    return loss, input, centroids


def device_of(backend: str) -> str:
    """Where tensors for a backend have to be: "cuda", or "cpu", also for Triton's interpreter where there is no GPU."""
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


# ------------------------------------------------------------------------------------------------------------
# The check of a backend
# ------------------------------------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)
FACTORS: dict[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.float64, *HALF),
    "ratio": (  # and reduction
        *(("batch", "mean"), ("sample", "mean"), ("sample", "sum"), ("sample", "none")),
        *(("soft_margin", "mean"), ("soft_margin", "none")),
    ),
    "shape": ((13, 7, 37), (33, 40, 17), (9, 5, 520), (20, 17, 64)),
    "temperature": (0.7, 1.0),
    "l2_normalize": (False, True),
    "activation": ACTIVATIONS,
    "separation": SEPARATIONS,
    "separation_focus": (0.0, 10.0),
    "centroids_per_class": (1, 2),
    "class_prior": (False, True),
    "center": (False, True),
    "weight": (False, True),
    "ignore": (False, True),
}
DOUBLE = 1e-10  # how far results of float64 arithmetic may be off
GRADIENT_SCALE = 64.0  # upstream: gradients are well inside float16's range then, as under a GradScaler


@dataclass(frozen=True)
class Result:
    """What came of one problem.

    Attributes:
        what: "random", "extreme" or "gradcheck".
        dtype: of the problem, as "float32".
        case: shape and options.
        errors: relative errors of the :data:`QUANTITIES`; none of gradcheck.
        limits: what they may be.
        note: the exception that ended it.
    """

    what: str
    dtype: str
    case: str
    errors: tuple[float, ...] = ()
    limits: tuple[float, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was raised, and each error is a number within its limit."""
        return not self.note and all(error <= limit for error, limit in zip(self.errors, self.limits, strict=True))

    @property
    def largest(self) -> float:
        """The largest error as a part of its limit, infinite where it is NaN."""
        parts = [error / limit for error, limit in zip(self.errors, self.limits, strict=True)]
        return max((part if part == part else float("inf") for part in parts), default=0.0)


def check(
    backend: str | Loss, *, seed: int, single: float = 1e-5, device: str | None = None, fast: bool = False
) -> list[Result]:
    """Hold a loss against the definition in float64.

    - Random problems, with dtypes, shapes and options by :func:`pairwise`. Errors are at most 1e-10 in float64, and
      `single` in float32 and half precisions, to which a half gradient may add what storing the exact one costs.
    - Saturated values (:data:`EXTREMES`) in float32: at most 3 `single`. A result below 1e-30 is right where the exact
      one is below it too.
    - torch.autograd.gradcheck with the options in pairs again, without `separation_focus` and `centroids_per_class`:
      their weights are not differentiated.

    The loss has to have the shape that its reduction gives, and be float64 for float64, float32 for other dtypes.

    Args:
        backend: a name; or a function with the arguments of :func:`ncmi_kernels.ncmi_loss` but `backend`.
        seed: of the problems, which are the same for every backend. torch's generator is left as it was.
        single: the limit in float32. Plain PyTorch needs 1e-4.
        device: where the problems are; None for :func:`device_of` a name, and for the CPU for a function.
        fast: gradcheck in random directions only.

    Returns:
        A result for each problem. What the loss raises is the `note` of one.

    Example:
        >>> from functools import partial
        >>> from ncmi_kernels import ncmi_loss
        >>> from ncmi_kernels.testing import check
        >>> results = check(partial(ncmi_loss, backend="reference"), seed=0, single=1e-4)
        >>> all(result.passed for result in results)
        True
    """
    device = device or (device_of(backend) if isinstance(backend, str) else "cpu")
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateMinimumWarning)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs too
        return [
            *_random(backend, device, single),
            *_extreme(backend, device, single),
            *_gradcheck(backend, device, fast),
        ]


def _draw(factors: dict[str, Any], device: str, **more: Any) -> tuple[Problem, Options, Tensor | None]:
    """The problem and the options of a combination of FACTORS, and its class priors; drawn on the CPU."""
    (rows, classes, columns), (ratio, reduction) = factors["shape"], factors["ratio"]
    shown = {name: factors[name] for name in ("ignore", "center", "weight", "centroids_per_class")}
    with torch.device("cpu"):
        problem = random_problem(rows, classes, columns, spread=1.0, **shown, **more)
        prior = torch.rand(classes, dtype=torch.float64) + 0.1
    options = {name: value for name, value in factors.items() if name in OPTION_NAMES and name != "ratio"}
    on_device = tuple(each if each is None else each.to(device) for each in problem)
    chosen = (prior / prior.sum()).to(device) if factors["class_prior"] else None
    return on_device, Options(ratio=ratio, reduction=reduction, **options), chosen  # type: ignore[return-value]


def _described(factors: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in factors.items() if name != "dtype")


def _compared(
    what: str,
    case: str,
    problem: Problem,
    options: Options,
    backend: str | Loss,
    single: float,
    prior: Tensor | None = None,
) -> Result:
    """The result of a problem."""
    dtype = problem[0].dtype
    name = str(dtype).removeprefix("torch.")
    others: dict[str, Any] = {"upstream": GRADIENT_SCALE, "class_prior": prior}
    expected = evaluate(problem, options, "float64", literal=True, **others)
    try:
        actual = evaluate(problem, options, backend, **others)
    except Exception as error:
        return Result(what, name, case, note=f"{type(error).__name__}: {error}")
    wanted = (tuple(expected[0].shape), torch.promote_types(dtype, torch.float32))
    if (got := (tuple(actual[0].shape), actual[0].dtype)) != wanted:
        return Result(what, name, case, note=f"loss: got shape and dtype {got}, expected {wanted}")
    limits = [DOUBLE if dtype is torch.float64 else single] * len(QUANTITIES)
    if dtype in HALF:
        for index in (1, 2):
            limits[index] += 1.05 * relative_error(expected[index].to(dtype), expected[index])
    found = tuple(map(relative_error, actual, expected))
    if what == "extreme":
        nothing = [max(a.abs().max(), e.abs().max()) < 1e-30 for a, e in zip(actual, expected, strict=True)]
        found = tuple(0.0 if none else error for error, none in zip(found, nothing, strict=True))
    return Result(what, name, case, found, tuple(limits))


def _random(backend: str | Loss, device: str, single: float) -> list[Result]:
    results = []
    for factors in pairwise(**FACTORS):
        problem, options, prior = _draw(factors, device, dtype=factors["dtype"])
        results.append(_compared("random", _described(factors), problem, options, backend, single, prior))
    return results


def _extreme(backend: str | Loss, device: str, single: float) -> list[Result]:
    results = []
    factors = {"name": list(EXTREMES), "separation": SEPARATIONS, "ratio": ("batch", "sample"), "focus": (0.0, 2.0)}
    for case in pairwise(**factors):
        with torch.device("cpu"):
            drawn = EXTREMES[case["name"]]()
        z, xi = (each.to(device) for each in drawn)
        target = torch.arange(len(z), device=device) % len(xi)
        options = Options(separation=case["separation"], ratio=case["ratio"], separation_focus=case["focus"])
        results.append(
            _compared("extreme", _described(case), (z, target, xi, None, None), options, backend, 3 * single)
        )
    return results


def _gradcheck(backend: str | Loss, device: str, fast: bool) -> list[Result]:
    """The weights of nearness are not differentiated, which gradcheck would find: those options are left out."""
    results = []
    factors = {**FACTORS, "shape": [(5, 3, 6)], "separation_focus": [0.0], "centroids_per_class": [1]}
    del factors["dtype"]
    for case in pairwise(**factors):
        problem, options, prior = _draw(case, device)
        z, target, xi, center, weight = problem

        def loss(a: Tensor, b: Tensor, fixed: Any = (target, center, weight, options, backend, prior)) -> Tensor:
            return _loss_of((a, fixed[0], b, *fixed[1:3]), *fixed[3:])

        note = ""
        try:
            torch.autograd.gradcheck(loss, (z.requires_grad_(), xi.requires_grad_()), fast_mode=fast)
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
        results.append(Result("gradcheck", "float64", _described(case), note=note))
    return results
