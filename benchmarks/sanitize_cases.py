"""Every operator of a backend on small problems, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize_cases.py [--backend cuda]

Odd sizes, rows short and long, both separations and ratios, float32 and bfloat16. Fails where an operator was not
called or a result is not finite.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import CentroidSGD, NCMILoss, _ops, _plain, ncmi_terms
from ncmi_kernels._schema import SCHEMAS, Operators

# B, C, M for their edges, where those of cases.py are for their speed: less than a warp, more than one, rows of several
# kilobytes and rows longer than shared memory; for separation_focus several chunks of rows, and rows of many classes.
SHAPES = ((5, 3, 7), (33, 4, 130), (7, 5, 2051), (2, 3, 70001), (600, 33, 9), (3, 4500, 5))


def counting(operators: Operators, calls: Counter[str]) -> Operators:
    """The same operators; each call is counted."""

    def counted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return operator(*arguments)

        return call

    return Operators(**{name: counted(name, getattr(operators, name)) for name in SCHEMAS})


def run_case(
    shape: tuple[int, int, int], dtype: torch.dtype, separation: str, ratio: str, backend: str, device: str
) -> list[Tensor]:
    """All operators at one shape: losses and gradients."""
    rows, classes, columns = shape
    z = torch.randn(rows, columns, device=device).to(dtype).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)
    y[0] = -100
    settings: dict[str, Any] = {"separation": separation, "ratio": ratio, "backend": backend, "device": device}
    results = []
    prior = torch.full((classes,), 1 / (classes - 1))
    prior[-1] = 0  # one class that does not count
    several: dict[str, Any] = {"separation_focus": 5.0, "centroids_per_class": 3, "class_prior": prior}
    variants: tuple[dict[str, Any], ...] = (several, {"separation_focus": 5.0}, {})
    for variant, learn in itertools.product(variants, (True, False)):
        criterion = NCMILoss(classes, columns, learn_centroids=learn, **variant, **settings)
        loss = criterion(z, y)
        wanted = [z, criterion.centroid_logits] if learn else [z]
        # An upstream gradient other than 1, which scales what the forward pass has made.
        results += [loss, *torch.autograd.grad(loss, wanted, torch.full_like(loss, 0.5))]
        if variant and learn:
            CentroidSGD(criterion, lr=0.1, momentum=0.9).step(z, y)
            results.append(criterion.centroid_logits)
    concentration, separated = ncmi_terms(
        z, y.clamp(min=0), criterion.centroid_logits, center=criterion.center, separation=separation,
        l2_normalize=True, backend=backend,
    )  # fmt: skip
    results += [concentration, separated, *torch.autograd.grad((concentration + separated).sum(), z)]
    run, options = _ops.operators(backend), criterion.options
    logits, batch = criterion.centroid_logits, (z.detach(), y, criterion.center)
    stats = _plain.table_of(logits, options, backend)
    values, of_rows = run.terms(*batch, *stats, *options.features, options.ignore_index)
    how = options.centroid_to_sample, options.every_pair, *options.loss
    reduced = run.reduce(values, of_rows, y, None, None, *how)
    known, last = (of_rows, reduced[1]), (options.centroid_to_sample, -100)
    totals = run.class_totals(*batch, *known, None, *last)
    results += [*reduced, totals, run.centroid_grad(*batch, logits, *stats, *known, None, *last, totals)]
    # By parts of the centroids, of which here is one.
    relative, distribution, level = run.focus_table(*stats, options.centroid_to_sample)
    factor = distribution if options.centroid_to_sample else relative
    product = run.focus_rows(*batch, *stats, of_rows, *last) @ factor.T
    of_part, shared = (of_rows, y, stats[3], level), values.new_empty(3, rows)
    shared[0] = run.focus_nearest(product, *of_part, *last)
    run.focus_weights_(product, values[1], *of_part, 5.0, *last, 1, shared)
    results += [product, shared]
    of_rows_alone = torch.rand(2, rows, columns).to(logits)
    results.append(run.input_grad(*batch, *stats, *known, None, *last, *of_rows_alone))
    for momentum, buffer in ((0.9, torch.zeros_like(logits)), (0.0, None)):
        moved, stats = logits.detach().clone(), _plain.table_of(logits, options, backend)
        sgd = (0.1, momentum, 1e-3, momentum > 0)
        stepping = options.softmax, options.centroid_to_sample, -100, *sgd
        run.centroid_step_(*batch, moved, buffer, *stats, *known, *stepping)
        results += [moved, *stats]
    update = (criterion.num_batches_tracked, 0.9)
    results.append(_ops.update_center_(criterion.center, update, z.detach(), y, classes, -100, backend))
    return results


def run_all(backend: str, device: str, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Counter[str]:
    """Every case; how often each operator was called.

    Raises:
        RuntimeError: a result is not finite.
    """
    calls: Counter[str] = Counter()
    original = _ops.operators
    operators = counting(original(backend), calls)
    _ops.operators = lambda backend: operators
    try:
        settings = itertools.product(
            shapes, (torch.float32, torch.bfloat16), ("sample_to_centroid", "centroid_to_sample"), ("batch", "sample")
        )
        for case in settings:
            results = run_case(*case, backend, device)
            if not all(bool(result.isfinite().all()) for result in results):
                raise RuntimeError(f"{case}: a result is not finite")
    finally:
        _ops.operators = original
    return calls


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    calls = run_all(options.backend, options.device)
    missing = [name for name in SCHEMAS if not calls[name]]
    print(", ".join(f"{name}: {calls[name]}" for name in SCHEMAS))
    if missing:
        print(f"not called: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
