"""How far loss and gradients are from float64, by the kernels and by autograd of the collapsed formula.

    python benchmarks/accuracy.py

The authors' setting: features of length one and one-hot centroids, B = 128, C = 100, M = 512, float32. There p and q
differ by a percent, so that the loss is of second order in their difference and every inconsistent rounding shows.
Errors are ||a - b|| / ||b||, b in float64 by the collapsed form on the same float32 inputs; the worst of the seeds.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from arguments import output, positive
from devices import describe_machine
from records import MACHINE, write_lines
from tqdm import tqdm

from ncmi_kernels import available_backends
from ncmi_kernels.testing import QUANTITIES, Options, evaluate, relative_error

RESULTS = Path(__file__).parent / "results" / "cpu" / "accuracy.csv"
ROWS, CLASSES, FEATURES = 128, 100, 512
SIZES = {"B": ROWS, "C": CLASSES, "M": FEATURES}


class Case(NamedTuple):
    """One setting of the loss."""

    temperature: float
    separation: str
    ratio: str


COLUMNS = (*MACHINE, *SIZES, *Case._fields, "path", "seeds", "quantity", "relative_error")
CASES = [
    Case(*values)
    for values in itertools.product((0.2, 1.0), ("sample_to_centroid", "centroid_to_sample"), ("batch", "sample"))
]


def errors(case: Case, seed: int, device: str, backend: str) -> list[float]:
    """Relative errors of the three quantities."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, FEATURES, generator=generator).to(device)
    target = torch.randint(CLASSES, (ROWS,), generator=generator).to(device)
    xi = 10 * torch.eye(CLASSES, FEATURES, device=device)
    problem, settings = (z, target, xi, z.mean(dim=0), None), Options(l2_normalize=True, **case._asdict())
    return [*map(relative_error, evaluate(problem, settings, backend), evaluate(problem, settings, "float64"))]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Errors of loss and gradients against float64.")
    runnable = [name for name, reason in available_backends().items() if reason is None and name != "reference"]
    parser.add_argument("--backend", choices=runnable, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=5, help="random problems, of which the worst (default: 5)")
    parser.add_argument("--output", type=output, default=RESULTS, help="the CSV file (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = "cpu" if options.backend == "cpu" else "cuda"
    common = {**describe_machine(torch.device(device)), **SIZES, "seeds": options.seeds}
    lines = []
    for case in tqdm(CASES):
        for path, backend in ((options.backend, options.backend), ("autograd", "reference")):
            each = [errors(case, seed, device, backend) for seed in range(options.seeds)]
            for quantity, values in zip(QUANTITIES, zip(*each, strict=True), strict=True):
                found = {"path": path, "quantity": quantity, "relative_error": f"{max(values):.3g}"}
                lines.append({**common, **case._asdict(), **found})
    write_lines(options.output, lines, COLUMNS)


if __name__ == "__main__":
    main()
