"""The command line: `python -m ncmi_kernels check`, `bench` or `env`."""

import argparse
import math
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ncmi_kernels import _backends, _bench, env, testing
from ncmi_kernels._tables import show

CHECK = """Hold every backend that can run here against the definition in float64.

Random problems whose dtypes, shapes and options meet in pairs, saturated values, and gradcheck; a table of the largest
errors, and of the part of its limit that the worst one takes. Triton's interpreter takes part if asked for by name.
Exit status: 0, or 1 where a backend fails.
"""
BENCH = """Time the loss beside cross_entropy, of logits [B, M] and of a linear head from M features to C logits.

All take turns, in rounds of random order; float32. On a GPU the device's time alone, out of cold caches. Ratios are
medians over the rounds. Exit status: 0, or 1 where something could not be measured.
"""
ENV = "Print what a report of a problem has to say about the machine, as Markdown."


def shape(text: str) -> tuple[int, int, int]:
    """A shape, "B,C,M", for argparse."""
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1 or min(sizes[1:]) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected B,C,M with B >= 1, C >= 2 and M >= 2")
    return sizes[0], sizes[1], sizes[2]


def seconds(text: str) -> float:
    """A time for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number >= 0")
    return value


def csv_file(text: str) -> Path:
    """A file to write for argparse: better now than after the measurement."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.absolute().parent} is not a directory")
    return path


def parser_of() -> argparse.ArgumentParser:
    """The subcommands."""
    parser = argparse.ArgumentParser("python -m ncmi_kernels", description="NCMI, on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    check = command("check", CHECK)
    check.add_argument("--backend", choices=_backends.BACKENDS, help="this one only (default: all that can run)")
    check.add_argument("--seed", type=int, help="of the problems (default: a fresh one, which is printed)")
    bench = command("bench", BENCH)
    bench.add_argument("--shape", type=shape, action="append", metavar="B,C,M", help="may be given several times")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    bench.add_argument("--backend", choices=_backends.BACKENDS, help="of the loss (default: the fastest)")
    bench.add_argument("--seconds", type=seconds, default=20.0, help="to measure, in all (default: %(default)s)")
    bench.add_argument("--csv", type=csv_file, metavar="FILE", help="write the results here")
    command("env", ENV)
    return parser


def check(backends: Sequence[str], seed: int) -> int:
    """Check backends and print a table; 1 where one fails."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, --seed {seed}")
    lines, failed = [], []
    for backend in backends:
        interpreted = backend == "triton" and _backends.triton_interprets()
        single = 1e-4 if backend == "reference" else 1e-5
        results = testing.check(backend, seed=seed, single=single, fast=interpreted)
        failed += [(backend, result) for result in results if not result.passed]
        groups = dict.fromkeys((each.what, each.dtype) for each in results)
        for what, dtype in groups:
            own = [each for each in results if (each.what, each.dtype) == (what, dtype)]
            errors = [max(error) for error in zip(*(each.errors for each in own if each.errors), strict=True)]
            shown = [f"{error:.1e}" for error in errors] or [""] * len(testing.QUANTITIES)
            largest = f"{max(each.largest for each in own):.2f}" if errors else ""
            wrong = sum(not each.passed for each in own)
            verdict = f"{wrong} FAILED" if wrong else "passed"
            lines.append([backend, what, dtype, str(len(own)), *shown, largest, verdict])
    show(["backend", "", "dtype", "problems", *testing.QUANTITIES, "of limit", ""], lines)
    for backend, result in failed:
        found = ", ".join(
            f"{error:.2g} of {limit:.2g}" for error, limit in zip(result.errors, result.limits, strict=True)
        )
        print(f"{backend}, {result.what}, {result.dtype}, {result.case}: {result.note or found}")
    print(f"{len(failed)} problems failed" if failed else "all passed")
    return int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = parser_of()
    options = parser.parse_args(arguments)
    if options.command == "env":
        print(env.report())
        return 0
    reasons = _backends.available_backends()
    if options.backend and reasons[options.backend] is not None:
        parser.error(f"--backend: got {options.backend}, which cannot run here: {reasons[options.backend]}")
    if options.command == "check":
        for name, reason in reasons.items():
            if reason is not None and not options.backend:
                print(f"{name} cannot run here: {reason}")
        runnable = [name for name, reason in reasons.items() if reason is None]
        if _backends.triton_interprets() and "triton" in runnable:
            runnable.remove("triton")
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        return check([options.backend] if options.backend else runnable, seed)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got cuda, and torch {torch.__version__} finds no CUDA device")
    expected = testing.device_of(options.backend) if options.backend not in (None, "reference") else options.device
    if expected != options.device:
        parser.error(f"--backend: got {options.backend} for --device {options.device}, expected --device {expected}")
    shapes = options.shape or [(256, 1000, 1000)]
    return _bench.bench(shapes, options.device, options.backend, options.seconds, options.csv)


if __name__ == "__main__":
    sys.exit(main())
