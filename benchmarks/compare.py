"""Whether the working tree is slower than another revision of it: both run the same cases, taking turns.

    make bench-compare BASE=<revision>
    python benchmarks/compare.py --base main~3 [--threshold 1.1] [--shapes 128x100x512 ...] [--seconds 240]

The cases are the kernels' of cases.py, forward and backward and without gradients, and steps of CentroidSGD: alone, and
after forward and backward as training runs them. They are those of the working tree for both, so the base needs the
public names that they use, and reference.py; a case that the base cannot build is listed with the reason. CPU, float32.

The base is exported by `git archive` to build/compare/ and compiled there with this Python's torch, once for each
revision; the working tree runs as it stands, with the library that it was built with (`make` builds it first). Each
revision has a process of its own, which imports ncmi_kernels from its own tree.

The processes take turns of some milliseconds, in random order, the other one asleep: what slows the machine down for
longer than that hits both. A turn starts with steps that do not count, for the caches, and gives the median of its
steps. `head / base` is the median over the pairs of turns of their quotient. Where a process has its code and its
memory is luck that a second process has anew, so all of it is done with several pairs of processes (--launches), each
with the cases in an order of its own. The interval is that of the median with a confidence of 99%, from the order
statistics of the quotients, widened to the medians of the launches. A case is marked "slower" (or "faster") where the
whole interval is above (or below) 1, and "SLOWER" where it is above the threshold.

Exit status: 0, or 1 where a case is SLOWER, or 2 where revisions could not be compared.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from arguments import positive, seconds
from cases import FULL, KERNELS, NO_GRAD, SHAPES, TINY, Shape, batch, ncmi
from scipy.stats import binom
from steps import no_grad_step, train_step
from tqdm import tqdm

import ncmi_kernels

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "compare"

CENTROID_STEP, ALTERNATING = "CentroidSGD", "CentroidSGD after ncmi batch"

TURN = 0.01  # seconds
MIN_STEPS, MAX_STEPS = 3, 200  # of a turn
MIN_PAIRS = 10
CONFIDENCE = 0.99


class CompareError(Exception):
    """Revisions cannot be compared."""


class Case(NamedTuple):
    """What is timed: an implementation of cases.py or a step of CentroidSGD, at a shape."""

    shape: Shape
    name: str
    mode: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.name}, {self.mode}"


def cases_of(shapes: Sequence[Shape]) -> list[Case]:
    """All cases, by shape."""
    return [
        Case(shape, name, mode)
        for shape in shapes
        for name, mode in (
            *((implementation.name, mode) for implementation in KERNELS for mode in (FULL, NO_GRAD)),
            (CENTROID_STEP, "step"),
            (ALTERNATING, f"{FULL}, step"),
        )
    ]


# ------------------------------------------------------------------------------------------------------------
# The worker: one revision
# ------------------------------------------------------------------------------------------------------------


def make_step(case: Case) -> Callable[[], float]:
    """A step of a case; it gives its microseconds."""
    z, y = batch(case.shape)
    if case.name in (CENTROID_STEP, ALTERNATING):
        return _centroid_step(case, z, y)
    criterion = next(each for each in KERNELS if each.name == case.name).build(case.shape)
    take = train_step if case.mode == FULL else no_grad_step
    return lambda: take(criterion, z, y)[case.mode]


def _centroid_step(case: Case, z: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    criterion = ncmi(case.shape, learn_centroids=True, learnt=True)
    criterion(z, y)  # sets the centre
    optimizer = ncmi_kernels.CentroidSGD(criterion, lr=0.01, momentum=0.9)

    def step() -> float:
        z.grad = None
        start = time.perf_counter_ns()
        if case.name == ALTERNATING:
            criterion(z, y).backward()
        optimizer.step(z, y)
        return (time.perf_counter_ns() - start) / 1e3

    return step


def work(tree: Path) -> None:
    """Answer the lines of stdin, each a list of JSON: ["case", shape, name, mode], then ["turn", steps] as often."""
    found = Path(ncmi_kernels.__file__).resolve().parent.parent
    if found != tree.resolve():
        raise CompareError(f"ncmi_kernels: got {found}, expected {tree}")
    reason = ncmi_kernels.available_backends()["cpu"]
    if reason is not None:
        raise CompareError(reason)
    torch.set_num_threads(int(os.environ["COMPARE_THREADS"]))
    step: Callable[[], float] = float
    _answer("ready")
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "turn":
            steps = arguments[0]
            for _ in range(max(1, steps // 5)):
                step()
            _answer(median(step() for _ in range(steps)))
        else:
            shape, name, mode = arguments
            try:
                step = make_step(Case(Shape(*shape), name, mode))
                step()
                _answer(None)
            except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, StopIteration) as error:
                _answer(_one_line(f"{type(error).__name__}: {error}"))


def _answer(value: object) -> None:
    print(json.dumps(value), flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


# ------------------------------------------------------------------------------------------------------------
# Both
# ------------------------------------------------------------------------------------------------------------


class Worker:
    """The process of one revision, seen from here; within `with`."""

    def __init__(self, name: str, tree: Path, threads: int) -> None:
        self.name, self.tree, self.threads = name, tree, threads

    def __enter__(self) -> "Worker":
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", str(self.tree)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONPATH": str(self.tree), "COMPARE_THREADS": str(self.threads)},
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, *command: object) -> None:
        """Send a command; its answer is to be read by `answer`."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.answer()

    def answer(self) -> Any:
        """What the process says next.

        Raises:
            CompareError: if it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        raise CompareError(f"{self.name}: {lines[-1] if lines else f'its process ended with status {status}'}")

    def turn(self, steps: int) -> float:
        """Microseconds of a step, the median of a turn."""
        self.ask("turn", steps)
        return float(self.answer())


@dataclass
class Result:
    """The turns of a case: microseconds of a step, by launch."""

    case: Case
    base: list[list[float]] = field(default_factory=list)
    head: list[list[float]] = field(default_factory=list)
    obstacle: str = ""

    def ratios(self) -> list[list[float]]:
        """head / base for each pair of turns, by launch."""
        return [[h / b for b, h in zip(*pair, strict=True)] for pair in zip(self.base, self.head, strict=True)]

    def ratio(self) -> float:
        """The median of all quotients."""
        return median(list(chain.from_iterable(self.ratios())))

    def interval(self) -> tuple[float, float]:
        """Where the ratio may be."""
        launches = [median(ratios) for ratios in self.ratios()]
        low, high = median_interval(list(chain.from_iterable(self.ratios())))
        return min(low, *launches), max(high, *launches)

    def mark(self, threshold: float) -> str:
        """What the interval says."""
        low, high = self.interval()
        if low > threshold:
            return "SLOWER"
        return "slower" if low > 1 else "faster" if high < 1 else ""


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what the values are drawn from with CONFIDENCE, whatever it is.

    The number of values below the median is binomial; so the interval goes from the k-th smallest to the k-th largest
    with the greatest k for which P(fewer than k below) <= (1 - CONFIDENCE) / 2, and at least 1.
    """
    k = max(1, int(binom.ppf((1 - CONFIDENCE) / 2, len(values), 0.5)))
    ordered = sorted(values)
    return ordered[k - 1], ordered[-k]


def run_case(case: Case, both: tuple[Worker, Worker], seconds: float, order: random.Random) -> tuple[list[float], ...]:
    """The turns of base and of head, as many.

    Raises:
        CompareError: if the head cannot build the case; that of the base is a LookupError with the reason.
    """
    base, head = both
    for worker in both:
        worker.ask("case", *case)
    missing = {worker.name: worker.answer() for worker in both}
    if missing["head"]:
        raise CompareError(f"head: {case}: {missing['head']}")
    if missing["base"]:
        raise LookupError(missing["base"])
    step = max(worker.turn(MIN_STEPS) for worker in both) / 1e6
    steps = min(MAX_STEPS, max(MIN_STEPS, round(TURN / step)))
    turns: dict[str, list[float]] = {"base": [], "head": []}
    end = time.perf_counter() + seconds
    while len(turns["base"]) < MIN_PAIRS or time.perf_counter() < end:
        for worker in (base, head) if order.random() < 0.5 else (head, base):
            turns[worker.name].append(worker.turn(steps))
    return turns["base"], turns["head"]


def compare(
    base: Path, head: Path, cases: Sequence[Case], *, threads: int, launches: int, seconds: float
) -> list[Result]:
    """Run all cases of both trees.

    Raises:
        CompareError: if one of the trees does not run, or no case runs in both.
    """
    results = [Result(case) for case in cases]
    order = random.Random(0)
    with tqdm(total=launches * len(cases), unit="case") as bar:
        for _ in range(launches):
            with Worker("base", base, threads) as b, Worker("head", head, threads) as h:
                both = b, h
                for worker in both:
                    worker.answer()  # that it is ready
                for result in order.sample(results, len(results)):  # what ran before decides what the allocator holds
                    bar.set_description(str(result.case))
                    try:
                        turns = run_case(result.case, both, seconds / launches / len(cases), order)
                        result.base.append(turns[0])
                        result.head.append(turns[1])
                    except LookupError as reason:
                        result.obstacle = str(reason)
                    bar.update()
    if all(result.obstacle for result in results):
        raise CompareError(f"base: none of the cases runs; the first one: {results[0].obstacle}")
    return results


# ------------------------------------------------------------------------------------------------------------
# Trees
# ------------------------------------------------------------------------------------------------------------


def built_tree(revision: str) -> Path:
    """The revision, exported and compiled, or as an earlier call left it.

    Raises:
        CompareError: if there is no such revision, or it cannot be compiled.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not revision or found.returncode:
        detail = _one_line(found.stderr)
        raise CompareError(f"--base: got {revision!r}, expected a revision of {ROOT}" + (f" ({detail})" * bool(detail)))
    commit = found.stdout.strip()
    tree = BUILT / commit
    if _library(tree):
        return tree
    print(f"building {revision}, {commit[:12]}, in {tree}", file=sys.stderr, flush=True)
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = tree / "archive.zip"
    subprocess.run(["git", "archive", "--format=zip", f"--output={archive}", commit], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, tree)
    archive.unlink()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(
        command, cwd=tree, capture_output=True, text=True, check=False, env={**os.environ, "FORCE_CPU": "1"}
    )
    if not _library(tree):
        raise CompareError(f"--base: {revision} could not be compiled:\n{(built.stdout + built.stderr)[-4000:]}")
    return tree


def check_tree(option: str, tree: Path) -> Path:
    """The tree, if it has been built.

    Raises:
        CompareError: if it has not.
    """
    if not _library(tree):
        raise CompareError(f"{option}: got {tree}, which has no ncmi_kernels/_C*.so, expected a tree that is built")
    return tree.resolve()


def _library(tree: Path) -> list[Path]:
    return list((tree / "ncmi_kernels").glob("_C*.so"))


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------


HEADER = ("B x C x M", "case", "mode", "base, us", "head, us", "head / base", "interval", "")


def line_of(result: Result, threshold: float) -> list[str]:
    """A line of the table."""
    if result.obstacle:
        return [*map(str, result.case), "", "", "", "", "not in base"]
    low, high = result.interval()
    times = [f"{median(chain.from_iterable(turns)):.1f}" for turns in (result.base, result.head)]
    return [*map(str, result.case), *times, f"{result.ratio():.3f}", f"{low:.3f} to {high:.3f}", result.mark(threshold)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description="Compare the speed of the working tree with another revision.")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--base", metavar="REVISION", help="exported and compiled in build/compare/")
    base.add_argument("--base-dir", type=Path, metavar="DIR", help="a tree of the base that is built already")
    parser.add_argument("--head-dir", type=Path, metavar="DIR", default=ROOT, help="(default: this tree)")
    parser.add_argument("--threshold", type=float, default=1.1, help="of head / base (default: %(default)s)")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="+", metavar="BxCxM", default=(TINY, *SHAPES), help="(default: all)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--launches", type=positive, default=3, help="pairs of processes (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, default=240, help="of timing, in all (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.threshold >= 1:  # nor NaN, which no interval is above
        parser.error(f"--threshold: got {options.threshold}, expected at least 1")
    try:
        head = check_tree("--head-dir", options.head_dir)
        tree = check_tree("--base-dir", options.base_dir) if options.base is None else built_tree(options.base)
        every = cases_of(options.shapes)
        results = compare(
            tree, head, every, threads=options.threads, launches=options.launches, seconds=options.seconds
        )
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(
        f"head: {head}\nbase: {options.base or tree}\n{options.threads} thread(s), torch {torch.__version__}; medians"
    )
    from ncmi_kernels._tables import show  # here, as a worker's ncmi_kernels is the base's, which may lack it

    show(HEADER, [line_of(result, options.threshold) for result in results])
    for result in results:
        if result.obstacle:
            print(f"not in base: {result.case}: {result.obstacle}")
    slower = [r for r in results if not r.obstacle and r.mark(options.threshold) == "SLOWER"]
    print(f"{len(slower)} of {len(results)} cases slower than {options.threshold:g} times the base")
    return 1 if slower else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
    else:
        sys.exit(main())
