"""Time, memory and launches of the NCMI loss on a CUDA GPU, beside cross-entropy and the same loss in plain PyTorch.

    python benchmarks/bench_gpu.py PART --out DIR [--budget SECONDS] [--shapes 256x1000x1000 ...] [--dtypes bfloat16]

`make gpu-report` runs all parts, each in a process of its own. They add rows to DIR/bench_gpu.csv as they go, so a
part that runs out of time leaves what it has measured:
- copy: the bandwidth of a device-to-device copy (also in DIR/copy.json), what the GB/s of the others are a share of;
- compile: nothing but fill the caches on disk with what torch.compile and Triton make for `times`;
- times: every implementation and mode at every shape, and the peak memory of a step;
- small: the small shapes by wall time, replayed from a CUDA graph, and in launches;
- memory: the peak at one shape where the literal form fits;
- classes: a full step over the number of classes;
- profile: the kernels of a step and the time of each, in DIR/profile.csv.

Time. CUDA events around one step. Before it a buffer larger than the L2 cache is overwritten, as triton's do_bench
does, so the features come from memory; then a kernel that only waits keeps the device busy until the host has queued
the step (its host time was measured in the warm-up), so that the time is the device's. What the host costs is the
wall time of `small`. The implementations run interleaved, a round being one step of each in each mode in random
order; slow ones sit out rounds while they have used more than their share. Median, 20th and 80th percentile.

A step in training mode moves the running centre, in no-grad forwards too, as in bench_loss.py; "no centre" leaves
that out. Gradients are asked for with torch.autograd.grad and an upstream gradient that is there already. GB/s are
of the bytes that a step cannot do without (gpu_results.model_bytes), not of those that it moved. Liger's
cross-entropy overwrites its input, and has one of its own.
"""

import argparse
import csv
import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from cases import COMPILED, CROSS_ENTROPY, EAGER, LITERAL, Shape
from gpu_results import (
    BACKWARD,
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
    Traffic,
    append_rows,
    model_bytes,
    quantile,
)
from torch import Tensor, nn

import ncmi_kernels
from ncmi_kernels import NCMILoss

SMALL_SHAPES = (Shape(128, 100, 512), Shape(256, 1000, 1000), Shape(4096, 100, 128))
SHAPES = (
    *SMALL_SHAPES,
    Shape(32768, 1000, 1024),
    Shape(32768, 1000, 4096),
    Shape(16384, 100, 16384),
    Shape(2048, 10, 131072),
)
MEMORY_SHAPE = Shape(256, 1000, 2048)
CLASSES_SHAPES = tuple(Shape(256, C, 256) for C in (10, 30, 100, 300, 1000, 4000))
DTYPES = (torch.bfloat16, torch.float32)

MIN_ROUNDS, MAX_ROUNDS = 5, 100
MAX_SHARE = 0.05  # of the time of the rounds, for one implementation in one mode
COMPILE_SECONDS = 40.0
COPY_BYTES = 2**30
FLUSH_BYTES = 2**28
# The clock that torch.cuda._sleep counts is at most about 2 GHz.
CYCLES_PER_US = 2000
MAX_LEAD_US = 5000.0
# B C M float32 tensors of the literal form that have to fit at once, with room to spare (about 4 are alive).
LITERAL_TENSORS = 6
WALL_STEPS, WALL_SAMPLES = 50, 9
REPLAYS, REPLAY_SAMPLES = 20, 15


# ------------------------------------------------------------------------------------------------------------
# Devices: what is measured with. The CPU's is there to try all the rest without a GPU.
# ------------------------------------------------------------------------------------------------------------


class Device(Protocol):
    """Where the steps run, and how they are measured there."""

    torch_device: torch.device
    cache_bytes: int

    def time(self, run: Callable[[], object], lead_us: float) -> float:
        """Microseconds that the device needs for `run`, which the host queues in less than `lead_us`."""

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that `run` allocates at once, at most; None if unknown."""

    def synchronize(self) -> None:
        """Wait for all that was queued."""

    def free_bytes(self) -> int:
        """Memory that is left."""

    def name(self) -> str:
        """The model."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes: int = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._flush = torch.empty(max(FLUSH_BYTES, 2 * self.cache_bytes), dtype=torch.int8, device=self.torch_device)
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, run: Callable[[], object], lead_us: float) -> float:
        """As the docstring of this file says."""
        self._flush.zero_()
        torch.cuda._sleep(int(lead_us * CYCLES_PER_US))
        self._start.record()
        run()
        self._stop.record()
        self._stop.synchronize()
        return 1e3 * self._start.elapsed_time(self._stop)

    def peak(self, run: Callable[[], object]) -> int | None:
        """By torch's caching allocator, which counts in blocks of 512 bytes."""
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        """What the device has, and what torch holds of it unused."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def name(self) -> str:
        """The model."""
        return torch.cuda.get_device_name(self.torch_device)


class Cpu:
    """The CPU, by wall time."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.cache_bytes = 0

    def time(self, run: Callable[[], object], lead_us: float) -> float:
        """The host is the device."""
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e3

    def peak(self, run: Callable[[], object]) -> int | None:
        """Unknown; bench_loss.py measures it."""
        run()
        return None

    def synchronize(self) -> None:
        """Nothing is queued."""

    def free_bytes(self) -> int:
        """Enough for a try."""
        return 2**28

    def name(self) -> str:
        """The kind."""
        return "cpu"


# ------------------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------------------


CROSS_ENTROPY_TRAFFIC = Traffic()


@dataclass(frozen=True)
class Candidate:
    """One thing to measure: a criterion of features [B, M] and targets [B].

    Attributes:
        name: in tables and CSV files.
        build: makes a fresh criterion for a shape, on the CPU.
        traffic: what a step has to move.
        obstacle: why it cannot be measured at a shape, or None.
        kernels: one of this package's.
        compiled: its first step runs torch.compile.
        overwrites: its input does not survive a step.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    traffic: Traffic = CROSS_ENTROPY_TRAFFIC
    obstacle: Callable[[Shape, Device], str | None] = lambda shape, device: None
    kernels: bool = False
    compiled: bool = False
    overwrites: bool = False


class CompiledCrossEntropy(nn.Module):
    """cross_entropy by torch.compile."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of logits z [B, M] and targets y [B]."""
        return _compiled_cross_entropy(z, y)


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


_compiled_cross_entropy = torch.compile(_cross_entropy, dynamic=False, fullgraph=True)


class QuackCrossEntropy(nn.Module):
    """quack's cross-entropy; the mean is taken here where a version gives the losses by row."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of logits z [B, M] and targets y [B]."""
        from quack.cross_entropy import cross_entropy

        result: Tensor = cross_entropy(z, y)
        return result.mean() if result.dim() else result


def _liger(shape: Shape) -> nn.Module:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    criterion: nn.Module = LigerCrossEntropyLoss()
    return criterion


def _needs(module: str) -> Callable[[Shape, Device], str | None]:
    return lambda shape, device: None if importlib.util.find_spec(module) else f"{module} is not installed"


def _no_compiler(shape: Shape, device: Device) -> str | None:
    if device.torch_device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "torch.compile needs triton, which is not installed"
    compilers = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    return None if any(map(shutil.which, compilers)) else "torch.compile needs a C compiler, and none was found"


def _literal_fits(shape: Shape, device: Device) -> str | None:
    needed = 4 * LITERAL_TENSORS * shape.B * shape.C * shape.M
    free = device.free_bytes()
    return None if needed <= free else f"about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"


def kernels(backend: str) -> tuple[Candidate, ...]:
    """What of one backend is measured."""

    def candidate(name: str, traffic: Traffic, **options: Any) -> Candidate:
        def build(shape: Shape) -> nn.Module:
            return NCMILoss(shape.C, shape.M, backend=backend, **{"learn_centroids": False, **options})

        def obstacle(shape: Shape, device: Device) -> str | None:
            return ncmi_kernels.available_backends()[backend]

        return Candidate(f"{backend} {name}", build, traffic, obstacle, kernels=True)

    batch = Traffic(table=True, centre=True)
    return (
        candidate("batch", batch),
        candidate("sample", batch._replace(one_pass=True), ratio="sample"),
        candidate("batch + centroids", batch._replace(centroids=True), learn_centroids=True),
        candidate("batch, no centre", batch._replace(centre=False), center_momentum=None),
    )


_NCMI = Traffic(table=True, centre=True)
CROSS_ENTROPIES = (
    Candidate("cross_entropy", CROSS_ENTROPY.build),
    Candidate("cross_entropy compiled", lambda shape: CompiledCrossEntropy(), obstacle=_no_compiler, compiled=True),
    Candidate("liger cross_entropy", _liger, obstacle=_needs("liger_kernel"), overwrites=True),
    Candidate("quack cross_entropy", lambda shape: QuackCrossEntropy(), obstacle=_needs("quack")),
)
LITERAL_FORM = Candidate("literal", LITERAL.build, _NCMI, _literal_fits)
PLAIN = (
    Candidate("collapsed eager", EAGER.build, _NCMI),
    Candidate("collapsed compiled", COMPILED.build, _NCMI, _no_compiler, compiled=True),
    LITERAL_FORM,
)


def candidates(backends: Sequence[str]) -> list[Candidate]:
    """All of them, cross_entropy first."""
    return [*CROSS_ENTROPIES, *(each for backend in backends for each in kernels(backend)), *PLAIN]


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [B, M], which require a gradient, and targets [B] that suit cross-entropy too."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(shape.B, shape.M, dtype=dtype, device=device, generator=generator).requires_grad_()
    return z, torch.randint(min(shape.C, shape.M), (shape.B,), device=device, generator=generator)


class Step:
    """One mode of a criterion: what comes before the timed part, the timed part, and what comes after."""

    def __init__(self, criterion: nn.Module, z: Tensor, y: Tensor, mode: str) -> None:
        self.criterion, self.z, self.y, self.mode = criterion, z, y, mode
        self.wanted = [z, *(each for each in criterion.parameters() if each.requires_grad)]
        self._loss: Tensor | None = None
        self._upstream: Tensor | None = None

    def prepare(self) -> None:
        """What a backward step needs."""
        if self.mode == BACKWARD:
            self._forward()

    def run(self) -> None:
        """What is timed."""
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

    candidate: Candidate
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


def modes_of(candidate: Candidate, wanted: Iterable[str]) -> list[str]:
    """The modes of an implementation: an upstream gradient other than 1 is measured of this package's alone."""
    return [mode for mode in wanted if candidate.kernels or mode != FULL_SCALED]


def build(candidate: Candidate, shape: Shape, z: Tensor) -> tuple[nn.Module, Tensor]:
    """A fresh criterion on the device of z, and its features."""
    own = z.detach().clone().requires_grad_() if candidate.overwrites else z
    return candidate.build(shape).to(z.device), own


def prepare(
    candidate: Candidate, shape: Shape, z: Tensor, y: Tensor, wanted: Iterable[str], device: Device, spare: CompileTime
) -> list[Timed]:
    """Compile and warm up; measure the peak memory of a full step, and the host's time for each mode."""
    timed = [Timed(candidate, mode) for mode in modes_of(candidate, wanted)]
    note = candidate.obstacle(shape, device)
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
    if timed.mode == FULL:
        timed.peak = device.peak(step.run)


def run_rounds(timed: Sequence[Timed], device: Device, deadline: float) -> None:
    """Fill in the samples until the deadline, a reading of time.perf_counter; at least MIN_ROUNDS of each."""
    order = random.Random(0)
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            elapsed = time.perf_counter() - began
            due = [each for each in timed if number < MIN_ROUNDS or each.spent <= MAX_SHARE * elapsed]
            order.shuffle(due)
            for each in due:
                if each.step is not None:
                    _sample(each, each.step, device)
    finally:
        gc.enable()


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
        self.candidates = candidates(backends)
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
        append_rows(self.out / "bench_gpu.csv", rows)
        ours = [each.name for each in self.candidates if each.kernels]
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


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Number, median, and 20th and 80th percentile of times in microseconds."""
    p20, median, p80 = (round(quantile(samples, level), 3) for level in (0.2, 0.5, 0.8))
    return {"repetitions": len(samples), "median_us": median, "p20_us": p20, "p80_us": p80}


def describe(device: Device) -> dict[str, Any]:
    """What the numbers depend on, for the columns of the same names."""
    return {
        "device": device.name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "ncmi_kernels": ncmi_kernels.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


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
    size = min(size, device.free_bytes() // 4)
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
    wanted: Sequence[str] = MODES,
    only: Callable[[Candidate], bool] = lambda candidate: True,
) -> None:
    """Every implementation and mode at every shape and dtype; each gets an equal part of the time that is left."""
    end = time.perf_counter() + bench.budget
    spare = CompileTime(bench.budget / 3)
    for index, (shape, dtype) in enumerate(cases):
        now = time.perf_counter()
        share = (end - now) / (len(cases) - index)
        torch.compiler.reset()  # else earlier shapes count towards the limit on recompilations
        z, y = make_batch(shape, dtype, bench.device.torch_device)
        timed = [
            each
            for candidate in bench.candidates
            if only(candidate)
            for each in prepare(candidate, shape, z, y, wanted, bench.device, spare)
        ]
        run_rounds(timed, bench.device, max(now + share, time.perf_counter() + share / 4))
        bench.write(*(bench.timed_row(shape, dtype, each) for each in timed))
        del timed, z, y


def measure_compile(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """Compile what `times` will ask for; torch and Triton keep it on disk."""
    spare = CompileTime(bench.budget)
    for shape, dtype in cases:
        torch.compiler.reset()
        z, y = make_batch(shape, dtype, bench.device.torch_device)
        for candidate in bench.candidates:
            if not (candidate.compiled or candidate.kernels) or candidate.obstacle(shape, bench.device):
                continue
            try:
                criterion, own = build(candidate, shape, z)
                for mode in (NO_GRAD, FULL):
                    spare.first_step(Step(criterion, own, y, mode))
            except Exception as error:
                print(f"{candidate.name} at {shape} {dtype}: {reason_of(error)}")


def measure_memory(bench: Bench, cases: Sequence[tuple[Shape, torch.dtype]]) -> None:
    """Peak of the first full step of a fresh criterion; code was loaded by a step of another one."""
    for shape, dtype in cases:
        z, y = make_batch(shape, dtype, bench.device.torch_device)
        for candidate in bench.candidates:
            if candidate.compiled:
                continue
            bench.write(_memory_row(bench, candidate, shape, dtype, z, y))


def _memory_row(bench: Bench, candidate: Candidate, shape: Shape, dtype: torch.dtype, z: Tensor, y: Tensor) -> Row:
    values: dict[str, Any] = {"note": candidate.obstacle(shape, bench.device) or ""}
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
        z, y = make_batch(shape, dtype, bench.device.torch_device)
        for candidate in bench.candidates:
            if candidate is LITERAL_FORM:
                continue
            if time.perf_counter() > end:
                bench.write(bench.row(shape, dtype, candidate.name, WALL, note="the time for this part is spent"))
                continue
            bench.write(*_small_rows(bench, candidate, shape, dtype, z, y, spare))


def _small_rows(
    bench: Bench,
    candidate: Candidate,
    shape: Shape,
    dtype: torch.dtype,
    z: Tensor,
    y: Tensor,
    spare: CompileTime,
) -> list[Row]:
    note = candidate.obstacle(shape, bench.device)
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
            z, y = make_batch(shape, dtype, bench.device.torch_device)
            for candidate in bench.candidates:
                if not candidate.kernels or candidate.obstacle(shape, bench.device):
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
        measure_compile(bench, grid(shapes or SHAPES, dtypes))
    elif part == "times":
        measure_times(bench, grid(shapes or SHAPES, dtypes))
    elif part == "small":
        measure_small(bench, grid(shapes or SMALL_SHAPES, dtypes))
    elif part == "memory":
        measure_memory(bench, grid(shapes or (MEMORY_SHAPE,), dtypes))
    elif part == "classes":
        measure_times(
            bench,
            grid(shapes or CLASSES_SHAPES, dtypes[-1:]),
            (FULL,),
            lambda candidate: candidate.kernels or candidate is LITERAL_FORM,
        )
    else:
        measure_profile(bench, grid(shapes or SHAPES, dtypes))


PARTS = ("copy", "compile", "times", "small", "memory", "classes", "profile")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of this package's kernels could not be measured, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds to aim for")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
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
