"""Time, memory and launches of the NCMI loss on a CUDA GPU, beside cross-entropy and the same loss in plain PyTorch.

    python benchmarks/bench_gpu.py PART [--csv FILE] [--seconds 120] [--shapes 256x1000x1000 ...] [--dtypes bfloat16]

`make gpu-report` runs all parts, each in a process of its own (bench_scaling.py has the cost over B, C and M):
- times: the bandwidth of a copy, then every implementation and mode at every shape;
- centroids: a step of the centroids, by CentroidSGD and by what it replaces;
- small: the small shapes by wall time, replayed from a CUDA graph, and in launches, whose kernels are printed.

A time is that of the device alone, cold: CUDA events around one step (Cuda.time of ncmi_kernels/_timing.py). What the
host costs is the wall time of `small`. Each mode of each implementation takes part in the rounds (run_rounds there);
from the sixth on those that have used more than a twentieth of the time sit out. What torch.compile makes is left out
once it has taken a third of the time. `peak_extra_bytes` is of a later step.

A step in training mode moves the running centre, in no-grad forwards too; "no centre" leaves that out. Gradients are
asked for with torch.autograd.grad and an upstream gradient that is there already. GB/s are of the bytes that a step
cannot do without (cases.Traffic), not of those that it moved. Liger's cross-entropy overwrites its input, and has one
of its own.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import (
    BACKWARD,
    CENTROID_SHAPES,
    CENTROID_STEP,
    CENTROID_STEPS,
    COMPILED,
    CROSS_ENTROPY,
    EAGER,
    FORWARD,
    FULL,
    GPU_SHAPES,
    LITERAL,
    NO_GRAD,
    OTHER_CROSS_ENTROPIES,
    PLAIN_CENTROID_STEP,
    SMALL_SHAPES,
    Implementation,
    Shape,
    batch,
    kernels,
)
from devices import describe_gpu, describe_machine, free_bytes
from records import MACHINE, TIMES, Row
from runner import Step, arguments_of, device_of, entry_of, failures, left, measure_all, row_of, timed
from torch import Tensor

from ncmi_kernels import available_backends
from ncmi_kernels._timing import Device, reason_of, run_rounds, spread

MODES = (FORWARD, NO_GRAD, BACKWARD, FULL)
# Of a full step too, but not the time on the device: of an eager call, and of a step replayed from a CUDA graph.
WALL, GRAPH = "wall time, forward+backward", "graph replay, forward+backward"
LAUNCHES = "launches, "  # what the profiler counted: kernels, copies and fills
COPY = "copy"
SPEED = ("model_bytes", "gb_per_s", "share_of_copy")
COLUMNS = (
    *(*MACHINE, "driver", "cuda", "triton", "B", "C", "M", "dtype", "implementation", "mode"),
    *(*TIMES, *SPEED, "peak_extra_bytes", "launches", "note"),
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = ("batch", "sample", "batch + centroids", "batch, no centre")
LEAST_ROUNDS, MOST_ROUNDS, SHARE = 5, 100, 0.05
COPY_BYTES = 2**30
WALL_STEPS, WALL_SAMPLES, REPLAYS, REPLAY_SAMPLES = 50, 9, 20, 15


class Bench:
    """Measures the cases of a part, each a shape and a dtype; knows what torch.compile took and how fast a copy is."""

    def __init__(self, part: str, device: Device, backends: Sequence[str], seconds: float) -> None:
        self.device, self.centroids = device, part == "centroids"
        names = CENTROID_STEPS if self.centroids else OURS
        self.ours = [kernels(backend)[name] for backend in backends for name in names]
        others = (CROSS_ENTROPY, *OTHER_CROSS_ENTROPIES, EAGER, COMPILED, LITERAL)
        self.implementations = [*self.ours, PLAIN_CENTROID_STEP] if self.centroids else [*self.ours, *others]
        self.modes = (CENTROID_STEP,) if self.centroids else MODES
        self.compile_seconds = seconds / 3
        self.copy_gb_per_s: float | None = None

    def copy(self) -> Row:
        """Copying from one buffer to another, read and written, cold: what the GB/s of the others are a share of."""
        size = min(COPY_BYTES, free_bytes(self.device.torch_device) // 4)
        source = torch.ones(size, dtype=torch.int8, device=self.device.torch_device)
        target = torch.empty_like(source)
        target.copy_(source)
        times = spread([self.device.time(lambda: target.copy_(source), 100.0) for _ in range(30)])
        self.copy_gb_per_s = 2 * size / times["median_us"] / 1e3
        return Row(implementation=COPY, mode=COPY, model_bytes=2 * size, gb_per_s=self.copy_gb_per_s, **times)

    def step(self, implementation: Implementation, shape: Shape, mode: str, z: Tensor, y: Tensor) -> Step:
        """A step of a fresh criterion that has run once, and compiled what it needs.

        Raises:
            TimeoutError: the time for torch.compile is spent.
            Exception: whatever the step raises.
        """
        if implementation.compiled and self.compile_seconds <= 0:
            raise TimeoutError("the time for torch.compile is spent")
        own = z.detach().clone().requires_grad_() if implementation.overwrites else z
        step = Step(implementation.build(shape).to(z.device), own, y, mode)
        start = time.perf_counter()
        step.prepare()
        step.run()
        step.release()
        if implementation.compiled:
            self.compile_seconds -= time.perf_counter() - start
        return step

    def times(self, case: tuple[Shape, torch.dtype], seconds: float) -> list[Row]:
        """Every implementation and mode."""
        start, (shape, dtype), on = time.perf_counter(), case, self.device.torch_device
        torch.compiler.reset()  # else earlier shapes count towards the limit on recompilations
        z, y = batch(shape, dtype=dtype, device=on)
        entries = []
        for each in self.implementations:
            for mode in self.modes:
                entry = entry_of(each, share=SHARE, group="", note=each.obstacle(shape, on) or "")
                entries.append((each, mode, entry))
                try:
                    if not entry.note:
                        timed(entry, self.step(each, shape, mode, z, y), self.device)
                except Exception as error:
                    entry.fail(error)
        running = [entry for _, _, entry in entries]
        run_rounds(running, left(start, seconds), least=LEAST_ROUNDS, most=MOST_ROUNDS, each=LEAST_ROUNDS)
        rows = [] if self.centroids or self.copy_gb_per_s else [self.copy()]
        for each, mode, entry in entries:
            row = row_of(entry, mode, **shape._asdict(), dtype=name_of(dtype))
            row.peak_extra_bytes = entry.peaks[1] if mode in (FULL, CENTROID_STEP) else None
            moved = each.traffic.model_bytes(shape, dtype.itemsize, mode, self.device.cache_bytes)
            if row.median_us and moved:
                row.model_bytes, row.gb_per_s = moved, moved / row.median_us / 1e3
                row.share_of_copy = self.copy_gb_per_s and row.gb_per_s / self.copy_gb_per_s
            rows.append(row)
        return rows

    def small(self, case: tuple[Shape, torch.dtype], seconds: float) -> list[Row]:
        """Wall time of an eager step, time of a replayed one, and launches: what bounds small batches."""
        end, (shape, dtype) = time.perf_counter() + seconds, case
        torch.compiler.reset()
        z, y = batch(shape, dtype=dtype, device=self.device.torch_device)
        ways: dict[str, tuple[str, Callable[[Step], dict[str, Any]]]] = {WALL: (FULL, self.wall)}
        if self.device.torch_device.type == "cuda":
            ways |= {LAUNCHES + mode: (mode, launches) for mode in (FORWARD, BACKWARD)} | {GRAPH: (FULL, self.replay)}
        rows = []
        for each in self.implementations:
            for name, (mode, way) in ways.items() if each is not LITERAL else ():
                row = Row(**shape._asdict(), dtype=name_of(dtype), implementation=each.name, mode=name)
                row.note = each.obstacle(shape, z.device) or "no time was left" * (time.perf_counter() > end)
                try:
                    if not row.note:
                        vars(row).update(way(self.step(each, shape, mode, z, y)))
                except Exception as error:
                    row.note = reason_of(error)
                rows.append(row)
        return rows

    def wall(self, step: Step) -> dict[str, Any]:
        """Microseconds of an eager step, of a loop of steps with a synchronisation at the end."""
        samples = []
        for _ in range(WALL_SAMPLES):
            self.device.synchronize()
            start = time.perf_counter()
            for _ in range(WALL_STEPS):
                step.run()
            self.device.synchronize()
            samples.append(1e6 * (time.perf_counter() - start) / WALL_STEPS)
        return spread(samples)

    def replay(self, step: Step) -> dict[str, Any]:
        """Microseconds of a replayed step, of several in a row; from the second on the features may be in the cache."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up on another stream, as torch's documentation asks for
            for _ in range(3):
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()

        def replays() -> None:
            for _ in range(REPLAYS):
                graph.replay()

        replays()
        self.device.synchronize()
        return spread([self.device.time(replays, 20.0 * REPLAYS) / REPLAYS for _ in range(REPLAY_SAMPLES)])


def launches(step: Step) -> dict[str, Any]:
    """How many kernels a step launches; each is printed."""
    found = kernels_of(step)
    for name, microseconds in found:
        print(f"    {microseconds:8.1f} us  {name[:120]}")
    return {"launches": len(found)}


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


def name_of(dtype: torch.dtype) -> str:
    """As the CSV file has it."""
    return str(dtype).removeprefix("torch.")


PARTS = {"times": GPU_SHAPES, "centroids": CENTROID_SHAPES, "small": SMALL_SHAPES}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of this package's kernels could not be measured."""
    parser = arguments_of(__doc__)
    parser.set_defaults(seconds=120)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--append", action="store_true", help="add to the CSV file")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="BxCxM", help="(default: those of the part)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--backends", nargs="+", choices=list(available_backends()), default=["cuda", "triton"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this program")
    options = parser.parse_args(arguments)
    device = device_of(parser, options)
    bench = Bench(options.part, device, options.backends, options.seconds)
    every = [(shape, DTYPES[name]) for shape in options.shapes or PARTS[options.part] for name in options.dtypes]
    measure = bench.small if options.part == "small" else bench.times
    common = {**describe_machine(device.torch_device), **describe_gpu()}
    return failures(measure_all(every, measure, options, COLUMNS, common), [each.name for each in bench.ours])


if __name__ == "__main__":
    sys.exit(main())
