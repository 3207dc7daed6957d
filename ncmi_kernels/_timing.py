"""How steps are timed: on a device, and in interleaved rounds, with ratios within them.

A round is one step of each in random order, so that none always inherits the caches and the heap of the same neighbour,
and a machine whose speed drifts slows all of them alike. `python -m ncmi_kernels bench` and all that is in benchmarks/
time by this; the method is in benchmarks/README.md.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

FLUSH_BYTES = 2**28
# The clock that torch.cuda._sleep counts is at most about 2 GHz.
CYCLES_PER_US = 2000


class Device:
    """Where the steps run, and how they are measured there: the CPU, by wall time."""

    torch_device, cache_bytes = torch.device("cpu"), 0

    def time(self, run: Callable[[], object], lead_us: float) -> float:
        """Microseconds that the device needs for `run`, which the host queues in less than `lead_us`."""
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e3

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that `run` allocates at once, at most; None here, where `peak_of` finds it in a process of its own."""
        run()
        return None

    def synchronize(self) -> None:
        """Wait for all that was queued."""


class Cuda(Device):
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._flush = torch.empty(max(FLUSH_BYTES, 2 * self.cache_bytes), dtype=torch.int8, device=self.torch_device)
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, run: Callable[[], object], lead_us: float) -> float:
        """Cold, and the device's alone.

        A buffer larger than the L2 cache is overwritten, as triton's do_bench does; then a kernel that only waits keeps
        the device busy until the host has queued what is timed, between two events.
        """
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


@dataclass
class Entry:
    """What takes part in rounds, and what was measured of it.

    Attributes:
        name: of the implementation.
        take: takes a step; it gives microseconds by mode. None for what cannot be measured.
        share: of the time; it sits out rounds while it has used more. 1 never sits out.
        group: those of one group have a share, and all rounds, in common. "": alone.
        heavy: a step may take seconds. What it uses is put on top of the time for the others.
        note: why there are no numbers.
        peaks: bytes that the first and a later step allocate at most.
        spent: seconds so far.
        rounds: what `take` gave, by the number of the round; those below 0 warm up.
    """

    name: str
    take: Callable[[], dict[str, float]] | None = None
    share: float = 1.0
    group: str = ""
    heavy: bool = False
    note: str = ""
    peaks: tuple[int | None, int | None] = (None, None)
    spent: float = 0.0
    rounds: dict[int, dict[str, float]] = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        """Go on without it."""
        self.note, self.take = reason_of(error), None

    def samples(self, mode: str) -> list[float]:
        """Of one mode, over the rounds."""
        return [laps[mode] for number, laps in self.rounds.items() if number >= 0 and mode in laps]

    def ratio(self, to: "Entry", mode: str, before: int = 0) -> float | None:
        """Median over the rounds of the quotient with another one's step.

        Args:
            to: the other one.
            mode: of the steps.
            before: not the step of the same round, but the median of so many rounds before.
        """
        quotients = []
        for number, laps in self.rounds.items():
            numbers = range(number - before, number) if before and to.name != self.name else [number]
            prices = [to.rounds[each][mode] for each in numbers if mode in to.rounds.get(each, ())]
            if number >= 0 and mode in laps and prices:
                quotients.append(laps[mode] / median(prices))
        return median(quotients) if quotients else None


def reason_of(error: BaseException) -> str:
    """One line, for the column `note`."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def run_rounds(
    entries: Sequence[Entry], seconds: float, *, least: int, most: int = 2000, each: int = 0, warm_up: int = 0
) -> None:
    """Rounds for so many seconds, without the garbage collector.

    Args:
        entries: of which the slow ones sit out rounds. Where all would, those that are not heavy take part.
        seconds: to aim for; the heavy ones' come on top, and are not part of what the others have a share of.
        least: rounds, however long they take.
        most: rounds.
        each: the first rounds, which nothing sits out.
        warm_up: rounds before these, for what never sits out.
    """
    order = random.Random(0)
    began = time.perf_counter()

    def is_due(entry: Entry, number: int, elapsed: float) -> bool:
        if entry.share == 1 or number < 0:
            return entry.share == 1
        group = [other for other in entries if other is entry or (entry.group and other.group == entry.group)]
        return number < each or sum(other.spent for other in group) <= entry.share * elapsed

    gc.collect()
    gc.disable()
    try:
        for number in range(-warm_up, most):
            running = [entry for entry in entries if entry.take is not None]
            elapsed = time.perf_counter() - began - sum(entry.spent for entry in entries if entry.heavy)
            if not running or (number >= least and elapsed > seconds):
                break
            due = [entry for entry in running if is_due(entry, number, elapsed)]
            due = due or [entry for entry in running if not entry.heavy]
            order.shuffle(due)
            for entry in due:
                start = time.perf_counter()
                try:
                    entry.rounds[number] = entry.take() if entry.take else {}
                except Exception as error:
                    entry.fail(error)
                entry.spent += time.perf_counter() - start
    finally:
        gc.enable()


def spread(microseconds: Sequence[float]) -> dict[str, Any]:
    """The columns that summarise the repetitions, TIMES; nothing of none."""
    if not microseconds:
        return {}
    p20, _, _, p80 = quantiles([*microseconds] * (1 + (len(microseconds) == 1)), n=5, method="inclusive")
    return {"repetitions": len(microseconds), "median_us": median(microseconds), "p20_us": p20, "p80_us": p80}
