"""Time, memory and launches of the NCMI loss on a CUDA GPU, beside cross-entropy and the same loss in plain PyTorch.

    python benchmarks/bench_gpu.py PART --out DIR [--budget SECONDS] [--shapes 256x1000x1000 ...] [--dtypes bfloat16]

`make gpu-report` runs all parts, each in a process of its own. They add rows to DIR/bench_gpu.csv as they go, so a
part that runs out of time leaves what it has measured (bench_scaling.py has the cost over B, C and M):
- copy: the bandwidth of a device-to-device copy (also in DIR/copy.json), what the GB/s of the others are a share of;
- compile: nothing but fill the caches on disk with what torch.compile and Triton make for `times`;
- times: every implementation and mode at every shape, and the peak memory of a step;
- small: the small shapes by wall time, replayed from a CUDA graph, and in launches;
- memory: the peak at one shape where the literal form fits;
- centroids: a step of the centroids, by CentroidSGD and by what it replaces;
- profile: the kernels of a step and the time of each, in DIR/profile.csv.

Time. CUDA events around one step, cold and without the host's part (devices.Cuda.time; the host's time of a step was
measured in the warm-up). What the host costs is the wall time of `small`. The implementations run interleaved, a round
being one step of each in each mode in random order; slow ones sit out rounds while they have used more than their
share. Median, 20th and 80th percentile.

A step in training mode moves the running centre, in no-grad forwards too, as in bench_loss.py; "no centre" leaves
that out. Gradients are asked for with torch.autograd.grad and an upstream gradient that is there already. GB/s are
of the bytes that a step cannot do without (gpu_results.model_bytes), not of those that it moved. Liger's
cross-entropy overwrites its input, and has one of its own.
"""

import argparse
import csv
import importlib.metadata
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from arguments import seconds
from cases import (
    CENTROID_SHAPES,
    CENTROID_STEPS,
    COMPILED,
    CROSS_ENTROPY,
    EAGER,
    GPU_SHAPES,
    LITERAL,
    MEMORY_SHAPE,
    OTHER_CROSS_ENTROPIES,
    PLAIN_CENTROID_STEP,
    SMALL_SHAPES,
    CentroidStep,
    Implementation,
    Shape,
    batch,
    kernels,
    run_rounds,
)
from devices import Cpu, Cuda, Device, describe_machine, driver_version, free_bytes
from gpu_results import (
    BACKWARD,
    CENTROID_STEP,
    FORWARD,
    FULL,
    FULL_SCALED,
    GRAPH,
    LAUNCHES_BACKWARD,
    LAUNCHES_FORWARD,
    MODES,
    NO_GRAD,
    WALL,
    Row,
    model_bytes,
)
from records import spread, write_rows
from torch import Tensor, nn

from ncmi_kernels import available_backends

DTYPES = (torch.bfloat16, torch.float32)

MIN_ROUNDS, MAX_ROUNDS = 5, 100
MAX_SHARE = 0.05  # of the time of the rounds, for one implementation in one mode
COMPILE_SECONDS = 40.0
COPY_BYTES = 2**30
MAX_LEAD_US = 5000.0
WALL_STEPS, WALL_SAMPLES = 50, 9
REPLAYS, REPLAY_SAMPLES = 20, 15


# ------------------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------------------

OURS = ("batch", "sample", "batch + centroids", "batch, no centre")


def candidates(backends: Sequence[str]) -> list[Implementation]:
    """The losses, cross_entropy first. On a GPU the kernels read centroids whether or not they are one-hot."""
    ours = [kernels(backend)[name] for backend in backends for name in OURS]
    return [CROSS_ENTROPY, *OTHER_CROSS_ENTROPIES, *ours, EAGER, COMPILED, LITERAL]


def centroid_steps(backends: Sequence[str]) -> list[Implementation]:
    """Those of this package, and what they replace."""
    return [*(kernels(backend)[name] for backend in backends for name in CENTROID_STEPS), PLAIN_CENTROID_STEP]


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


class Step:
    """One mode of a criterion: what comes before the timed part, the timed part, and what comes after."""

    def __init__(self, criterion: nn.Module, z: Tensor, y: Tensor, mode: str) -> None:
        self.criterion, self.z, self.y, self.mode = criterion, z, y, mode
        self.wanted = [z, *(each for each in criterion.parameters() if each.requires_grad)]
        self._loss: Tensor | None = None
        self._upstream: Tensor | None = None

    def prepare(self) -> None:
        """What a backward step needs, or one of the centroids."""
        if self.mode == BACKWARD:
            self._forward()
        elif isinstance(self.criterion, CentroidStep):
            self.criterion.prepare(self.z, self.y)

    def run(self) -> None:
        """What is timed."""
        if self.mode == CENTROID_STEP:
            self.criterion(self.z, self.y)
            return
        if self.mode != BACKWARD:
            self._forward()
        if self.mode not in (FORWARD, NO_GRAD):
            self._backward()

    def release(self) -> None:
        """Free the graph."""
        self._loss = None

    def _forward(self) -> None:
        self._loss = None
        with torch.set_grad_enabled(self.mode != NO_GRAD):
            self._loss = self.criterion(self.z, self.y)

    def _backward(self) -> None:
        assert self._loss is not None
        if self._upstream is None:  # at the first step, which is not timed
            self._upstream = torch.full_like(self._loss.detach(), 0.5 if self.mode == FULL_SCALED else 1.0)
        torch.autograd.grad(self._loss, self.wanted, self._upstream)
        self._loss = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after so many seconds: between two Python instructions, not inside a call."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class CompileTime:
    """What is left for torch.compile, for one implementation and for all."""

    def __init__(self, total: float, each: float = COMPILE_SECONDS) -> None:
        self.left, self.each = total, each

    def first_step(self, step: Step) -> None:
        """Run a step that compiles."""
        if self.left <= 0:
            raise TimeoutError("the time for torch.compile is spent")
        start = time.monotonic()
        limit = min(self.each, self.left)
        try:
            with time_limit(limit):
                step.prepare()
                step.run()
        except Exception as error:
            if time.monotonic() - start >= limit:  # dynamo and inductor wrap the TimeoutError in errors of theirs
                raise TimeoutError(f"torch.compile took longer than {limit:.0f} s") from error
            raise
        finally:
            self.left -= time.monotonic() - start
            step.release()


def reason_of(error: BaseException) -> str:
    """One line, for the column `note`."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# ------------------------------------------------------------------------------------------------------------
# Times
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """One implementation in one mode at one shape, and what was measured of it."""

    candidate: Implementation
    mode: str
    step: Step | None = None
    note: str = ""
    lead_us: float = 0.0
    spent: float = 0.0
    peak: int | None = None
    samples: list[float] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Go on without it."""
        self.note, self.step = reason_of(error), None


def modes_of(candidate: Implementation, wanted: Iterable[str]) -> list[str]:
    """The modes of an implementation: an upstream gradient other than 1 is measured of this package's alone."""
    return [mode for mode in wanted if candidate.kernels or mode != FULL_SCALED]


def build(candidate: Implementation, shape: Shape, z: Tensor) -> tuple[nn.Module, Tensor]:
    """A fresh criterion on the device of z, and its features."""
    own = z.detach().clone().requires_grad_() if candidate.overwrites else z
    return candidate.build(shape).to(z.device), own


def prepare(
    candidate: Implementation,
    shape: Shape,
    z: Tensor,
    y: Tensor,
    wanted: Iterable[str],
    device: Device,
    spare: CompileTime,
) -> list[Timed]:
    """Compile and warm up; measure the peak memory of a full step, and the host's time for each mode."""
    timed = [Timed(candidate, mode) for mode in modes_of(candidate, wanted)]
    note = candidate.obstacle(shape, device.torch_device)
    if note:
        for each in timed:
            each.note = note
        return timed
    failure: Exception | None = None
    try:
        criterion, own = build(candidate, shape, z)
    except Exception as error:
        failure = error
    for each in timed:
        try:
            if failure is not None:
                raise failure
            each.step = Step(criterion, own, y, each.mode)
            if candidate.compiled:
                spare.first_step(each.step)
            _warm_up(each, device)
        except Exception as error:
            each.fail(error)
            # Another mode may need less memory; but what did not compile would take its time once more.
            failure = error if candidate.compiled else failure
    return timed


def _warm_up(timed: Timed, device: Device) -> None:
    step = timed.step
    assert step is not None
    for _ in range(2):
        step.prepare()
        device.synchronize()
        start = time.perf_counter()
        step.run()
        host = time.perf_counter() - start
        device.synchronize()
        step.release()
    timed.lead_us = min(1.5e6 * host + 20, MAX_LEAD_US)
    if timed.mode in (FULL, CENTROID_STEP):
        step.prepare()
        timed.peak = device.peak(step.run)


def time_steps(
    timed: Sequence[Timed],
    device: Device,
    deadline: float,
    *,
    least: int | None = None,
    max_share: float = MAX_SHARE,
) -> None:
    """Fill in the samples until the deadline, a reading of time.perf_counter; at least MIN_ROUNDS of each."""

    def take(due: list[Timed], number: int, order: random.Random) -> None:
        order.shuffle(due)
        for each in due:
            if each.step is not None:
                _sample(each, each.step, device)

    run_rounds(timed, take, deadline, least=least or MIN_ROUNDS, most=MAX_ROUNDS, each=MIN_ROUNDS, max_share=max_share)


def _sample(timed: Timed, step: Step, device: Device) -> None:
    start = time.perf_counter()
    try:
        step.prepare()
        timed.samples.append(device.time(step.run, timed.lead_us))
        step.release()
    except Exception as error:
        timed.fail(error)
    timed.spent += time.perf_counter() - start


class Bench:
    """What all parts share: the device, the CSV file, and what every row says."""

    def __init__(self, device: Device, out: Path, backends: Sequence[str], budget: float) -> None:
        self.device, self.out, self.budget = device, out, budget
        self.candidates, self.centroid_steps = candidates(backends), centroid_steps(backends)
        self.failures: list[str] = []  # of this package's kernels; that others cannot be measured is no failure
        self.common = describe(device)
        copy = out / "copy.json"
        self.copy_gb_per_s: float | None = json.loads(copy.read_text())["gb_per_s"] if copy.exists() else None

    def row(self, shape: Shape, dtype: torch.dtype, implementation: str, mode: str, **values: Any) -> Row:
        """A row of the CSV file."""
        dtype_name = str(dtype).removeprefix("torch.")
        return Row(
            **self.common, **shape._asdict(), dtype=dtype_name, implementation=implementation, mode=mode, **values
        )

    def write(self, *rows: Row) -> None:
        """Keep rows at once, and show that something goes on."""
        write_rows(self.out / "bench_gpu.csv", rows, append=True)
        ours = [each.name for each in (*self.candidates, *self.centroid_steps) if each.kernels]
        for row in rows:
            if row.note and row.implementation in ours:
                self.failures.append(f"{row.implementation}, {row.mode}: {row.note}")
            value = row.note if row.median_us is None else f"{row.median_us:.1f} us"
            print(f"{row.shape_text()} {row.dtype} {row.implementation}, {row.mode}: {value}", flush=True)

    def timed_row(self, shape: Shape, dtype: torch.dtype, timed: Timed) -> Row:
        """The row of what was timed."""
        values: dict[str, Any] = {"note": timed.note, "peak_extra_bytes": timed.peak}
        if timed.samples:
            values |= spread(timed.samples)
            moved = model_bytes(shape, dtype.itemsize, timed.mode, timed.candidate.traffic, self.device.cache_bytes)
            if moved is not None:
                speed = moved / values["median_us"] / 1e3
                values |= {"model_bytes": moved, "gb_per_s": round(speed, 1)}
                if self.copy_gb_per_s:
                    values["share_of_copy"] = round(speed / self.copy_gb_per_s, 4)
        return self.row(shape, dtype, timed.candidate.name, timed.mode, **values)


def describe(device: Device) -> dict[str, Any]:
    """What the numbers depend on, for the columns of the same names."""
    return {
        **describe_machine(device.torch_device),
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ------------------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------------------


def measure_copy(bench: Bench, size: int = COPY_BYTES) -> float:
    """GB/s of copying from one buffer to another, read and written, cold."""
    device = bench.device
    size = min(size, free_bytes(device.torch_device) // 4)
    source = torch.ones(size, dtype=torch.int8, device=device.torch_device)
    target = torch.empty_like(source)
    target.copy_(source)
    samples = [device.time(lambda: target.copy_(source), 100.0) for _ in range(30)]
    result = spread(samples)
    speed = 2 * size / result["median_us"] / 1e3
    (bench.out / "copy.json").write_text(json.dumps({"bytes": size, "gb_per_s": speed, **result}))
    print(f"copy of {size / 2**20:.0f} MiB: {result['median_us']:.1f} us, {speed:.0f} GB/s read and written")
    return speed


def measure_times(
    bench: Bench,
    cases: Sequence[tuple[Shape, torch.dtype]],
    implementations: Sequence[Implementation],
    wanted: Sequence[str] = MODES,
) -> None:
    """Every implementation and mode at every shape and dtype; each gets an equal part of the time that is left."""
    end = time.perf_counter() + bench.budget
    spare = CompileTime(bench.budget / 3)
    for index, (shape, dtype) in enumerate(cases):
        now = time.perf_counter()
        share = (end - now) / (len(cases) - index)
        torch.compiler.reset()  # else earlier shapes count towards the limit on recompilations
        z, y = batch(shape, dtype=dtype, device=bench.device.torch_device)
        timed = [
            each
            for implementation in implementations
            for each in prepare(implementation, shape, z, y, wanted, bench.device, spare)
        ]
        time_steps(timed, bench.device, max(now + share, time.perf_counter() + share / 4))
        bench.write(*(bench.timed_row(shape, dtype, each) for each in timed))
        del timed, z, y


def measure_compile(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """Compile what `times` and `centroids` will ask for; torch and Triton keep it on disk."""
    spare = CompileTime(bench.budget)
    steps = grid(CENTROID_SHAPES, dict.fromkeys(dtype for _, dtype in cases))
    for implementations, modes, shapes in (
        (bench.candidates, (NO_GRAD, FULL), cases),
        (bench.centroid_steps, (CENTROID_STEP,), steps),
    ):
        for shape, dtype in shapes:
            torch.compiler.reset()
            z, y = batch(shape, dtype=dtype, device=bench.device.torch_device)
            for candidate in implementations:
                compiles = candidate.compiled or candidate.kernels
                if not compiles or candidate.obstacle(shape, bench.device.torch_device):
                    continue
                try:
                    criterion, own = build(candidate, shape, z)
                    for mode in modes:
                        spare.first_step(Step(criterion, own, y, mode))
                except Exception as error:
                    print(f"{candidate.name} at {shape} {dtype}: {reason_of(error)}")


def measure_memory(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """Peak of the first full step of a fresh criterion; code was loaded by a step of another one."""
    for shape, dtype in cases:
        z, y = batch(shape, dtype=dtype, device=bench.device.torch_device)
        for candidate in bench.candidates:
            if candidate.compiled:
                continue
            bench.write(_memory_row(bench, candidate, shape, dtype, z, y))


def _memory_row(bench: Bench, candidate: Implementation, shape: Shape, dtype: torch.dtype, z: Tensor, y: Tensor) -> Row:
    values: dict[str, Any] = {"note": candidate.obstacle(shape, bench.device.torch_device) or ""}
    if not values["note"]:
        try:
            few = shape._replace(B=2)
            warm, own = build(candidate, few, z[:2].detach().clone().requires_grad_())
            Step(warm, own, y[:2], FULL).run()
            criterion, own = build(candidate, shape, z)
            values["peak_extra_bytes"] = bench.device.peak(Step(criterion, own, y, FULL).run)
        except Exception as error:
            values["note"] = reason_of(error)
    return bench.row(shape, dtype, candidate.name, FULL, **values)


def measure_small(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """Wall time of an eager step, time of a replayed one, and launches: what bounds small batches."""
    end = time.perf_counter() + bench.budget
    spare = CompileTime(bench.budget / 3)
    for shape, dtype in cases:
        torch.compiler.reset()
        z, y = batch(shape, dtype=dtype, device=bench.device.torch_device)
        for candidate in bench.candidates:
            if candidate is LITERAL:
                continue
            if time.perf_counter() > end:
                bench.write(bench.row(shape, dtype, candidate.name, WALL, note="the time for this part is spent"))
                continue
            bench.write(*_small_rows(bench, candidate, shape, dtype, z, y, spare))


def _small_rows(
    bench: Bench,
    candidate: Implementation,
    shape: Shape,
    dtype: torch.dtype,
    z: Tensor,
    y: Tensor,
    spare: CompileTime,
) -> list[Row]:
    note = candidate.obstacle(shape, bench.device.torch_device)
    if note:
        return [bench.row(shape, dtype, candidate.name, WALL, note=note)]

    def attempt(mode: str, measure: Callable[[], dict[str, Any]]) -> Row:
        try:
            return bench.row(shape, dtype, candidate.name, mode, **measure())
        except Exception as error:
            return bench.row(shape, dtype, candidate.name, mode, note=reason_of(error))

    try:
        criterion, own = build(candidate, shape, z)
        step = Step(criterion, own, y, FULL)
        if candidate.compiled:
            spare.first_step(step)
        for _ in range(3):
            step.run()
        bench.device.synchronize()
    except Exception as error:
        return [bench.row(shape, dtype, candidate.name, WALL, note=reason_of(error))]
    rows = [attempt(WALL, lambda: wall_time(step, bench.device))]
    if bench.device.torch_device.type == "cuda":
        forward, backward = (Step(criterion, own, y, mode) for mode in (FORWARD, BACKWARD))
        rows.append(attempt(LAUNCHES_FORWARD, lambda: {"launches": len(kernels_of(forward))}))
        rows.append(attempt(LAUNCHES_BACKWARD, lambda: {"launches": len(kernels_of(backward))}))
        rows.append(attempt(GRAPH, lambda: replay_time(step, bench.device)))
    return rows


def wall_time(step: Step, device: Device) -> dict[str, Any]:
    """Microseconds of an eager step, of a loop of steps with a synchronisation at the end."""
    samples = []
    for _ in range(WALL_SAMPLES):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(WALL_STEPS):
            step.run()
        device.synchronize()
        samples.append(1e6 * (time.perf_counter() - start) / WALL_STEPS)
    return spread(samples)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after a warm-up on another stream, as torch's documentation asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_time(step: Step, device: Device) -> dict[str, Any]:
    """Microseconds of a replayed step, of several in a row; from the second on the features may be in the cache."""
    graph = capture(step.run)

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    replay()
    device.synchronize()
    return spread([device.time(replay, 20.0 * REPLAYS) / REPLAYS for _ in range(REPLAY_SAMPLES)])


def kernels_of(step: Step) -> list[tuple[str, float]]:
    """Name and microseconds of everything that the timed part of a step runs on the device, by torch's profiler.

    Raises:
        RuntimeError: if the profiler sees nothing, as where its access to the device is restricted.
    """
    from torch.profiler import DeviceType, ProfilerActivity, profile

    for _ in range(2):  # also for the upstream gradient of the first
        step.prepare()
        step.run()
    step.prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        # Something that is seen if anything is: a backward pass may launch nothing.
        torch.zeros(1, device="cuda")
        step.run()
        torch.cuda.synchronize()
    step.release()
    seen = [
        (event.name, event.time_range.elapsed_us(), event.time_range.start)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not seen:
        raise RuntimeError("the profiler saw no kernel")
    return [(name, duration) for name, duration, _ in sorted(seen, key=lambda event: event[2])[1:]]


PROFILE_COLUMNS = ("B", "C", "M", "dtype", "implementation", "phase", "position", "kernel", "us")


def measure_profile(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """The kernels of a forward and a backward pass, one after the other, with what each took (features not cold)."""
    with (bench.out / "profile.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(PROFILE_COLUMNS)
        for shape, dtype in cases:
            z, y = batch(shape, dtype=dtype, device=bench.device.torch_device)
            for candidate in bench.candidates:
                if not candidate.kernels or candidate.obstacle(shape, bench.device.torch_device):
                    continue
                criterion, own = build(candidate, shape, z)
                for mode in (FORWARD, BACKWARD):
                    try:
                        found = kernels_of(Step(criterion, own, y, mode))
                    except Exception as error:
                        bench.failures.append(f"{candidate.name}, {mode} at {shape}: {reason_of(error)}")
                        continue
                    for position, (name, duration) in enumerate(found):
                        line = [*shape, str(dtype).removeprefix("torch."), candidate.name, mode, position, name]
                        writer.writerow([*line, round(duration, 2)])
                file.flush()


def grid(shapes: Iterable[Shape], dtypes: Iterable[torch.dtype]) -> list[tuple[Shape, torch.dtype]]:
    """All pairs."""
    dtypes = list(dtypes)
    return [(shape, dtype) for shape in shapes for dtype in dtypes]


def run_part(part: str, bench: Bench, shapes: Sequence[Shape] | None, dtypes: Sequence[torch.dtype]) -> None:
    """One of PARTS, at its own shapes unless told others."""
    if part == "copy":
        measure_copy(bench)
    elif part == "compile":
        measure_compile(bench, grid(shapes or GPU_SHAPES, dtypes))
    elif part == "times":
        measure_times(bench, grid(shapes or GPU_SHAPES, dtypes), bench.candidates)
    elif part == "small":
        measure_small(bench, grid(shapes or SMALL_SHAPES, dtypes))
    elif part == "memory":
        measure_memory(bench, grid(shapes or (MEMORY_SHAPE,), dtypes))
    elif part == "centroids":
        measure_times(bench, grid(shapes or CENTROID_SHAPES, dtypes), bench.centroid_steps, (CENTROID_STEP,))
    else:
        measure_profile(bench, grid(shapes or GPU_SHAPES, dtypes))


PARTS = ("copy", "compile", "times", "small", "memory", "centroids", "profile")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of this package's kernels could not be measured, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=seconds, default=120.0, help="seconds to aim for")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backends", nargs="+", choices=list(available_backends()), default=["cuda", "triton"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this program")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    dtypes = [getattr(torch, name) for name in options.dtypes] if options.dtypes else list(DTYPES)
    device: Device = Cuda() if options.device == "cuda" else Cpu()
    bench = Bench(device, options.out, options.backends, options.budget)
    run_part(options.part, bench, options.shapes, dtypes)
    if bench.failures:
        print(f"{len(bench.failures)} could not be measured, the first: {bench.failures[0]}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
