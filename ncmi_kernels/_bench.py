"""What `python -m ncmi_kernels bench` measures: the loss beside cross_entropy, with and without a linear head."""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ncmi_kernels
from ncmi_kernels._tables import show
from ncmi_kernels._timing import Cuda, Device, Entry, run_rounds, spread
from ncmi_kernels.modules import NCMILoss

CROSS_ENTROPY, HEAD = "cross_entropy", "cross_entropy with head"
FORWARD, FULL = "forward", "forward+backward"
LEAST_ROUNDS, WARM_UP_ROUNDS = 10, 3
Shape = tuple[int, int, int]


@dataclass
class Step:
    """A criterion, its batch, and what of it takes a gradient."""

    criterion: Callable[[Tensor, Tensor], Tensor]
    z: Tensor
    y: Tensor
    wanted: list[Tensor]

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        return self.criterion(self.z, self.y)

    def full(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.forward(), self.wanted)

    def take(self, device: Device, lead_us: float) -> dict[str, float]:
        """Microseconds of both modes."""
        return {FORWARD: device.time(self.forward, lead_us), FULL: device.time(self.full, lead_us)}


def steps_of(shape: Shape, device: torch.device, backend: str | None) -> dict[str, Step]:
    """What is compared, float32: features z [B, M], which are the logits of cross_entropy without a head."""
    B, C, M = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, M, generator=generator).to(device).requires_grad_()
    y = torch.randint(min(C, M), (B,), generator=generator).to(device)
    head = nn.Linear(M, C, bias=False, device=device)
    losses: dict[str, dict[str, Any]] = {
        "ncmi batch": {"learn_centroids": False},
        "ncmi batch + centroids": {},
        "ncmi focus": {"learn_centroids": False, "separation_focus": 10.0},
        "ncmi focus + centroids": {"separation_focus": 10.0},
    }
    steps = {
        CROSS_ENTROPY: Step(F.cross_entropy, z, y, [z]),
        HEAD: Step(lambda z, y: F.cross_entropy(head(z), y), z, y, [z, head.weight]),
    }
    for name, options in losses.items():
        criterion = NCMILoss(C, M, backend=backend, device=device, **options)
        steps[name] = Step(criterion, z, y, [z, *(p for p in criterion.parameters() if p.requires_grad)])
    return steps


def entry_of(name: str, step: Step, device: Device) -> Entry:
    """An entry of a step that has run twice; with a note where it fails."""
    entry = Entry(name)
    lead_us = 0.0
    try:
        for _ in range(2):
            device.synchronize()
            start = time.perf_counter()
            step.full()
            lead_us = 1.5e6 * (time.perf_counter() - start) + 20  # the host's part
            device.synchronize()
        entry.take = partial(step.take, device, min(lead_us, 5000.0))
    except Exception as error:
        entry.fail(error)
    return entry


def measure(shape: Shape, device: Device, backend: str | None, seconds: float) -> list[dict[str, Any]]:
    """The rows of a shape, one for each criterion and mode."""
    entries = [entry_of(*each, device) for each in steps_of(shape, device.torch_device, backend).items()]
    run_rounds(entries, seconds, least=LEAST_ROUNDS, warm_up=WARM_UP_ROUNDS)
    price, head = entries[:2]
    return [
        {
            **dict(zip("BCM", shape, strict=True)),
            "implementation": entry.name,
            "mode": mode,
            **spread(entry.samples(mode)),
            "ratio_to_cross_entropy": entry.ratio(price, mode),
            "ratio_to_head": entry.ratio(head, mode),
            "note": entry.note,
        }
        for mode in (FORWARD, FULL)
        for entry in entries
    ]


COLUMNS = (
    *("device", "torch", "ncmi_kernels", "backend", "threads", "B", "C", "M", "implementation", "mode"),
    *("repetitions", "median_us", "p20_us", "p80_us", "ratio_to_cross_entropy", "ratio_to_head", "note"),
)


def bench(shapes: Sequence[Shape], device: str, backend: str | None, seconds: float, file: Path | None) -> int:
    """Measure, print a table and write the CSV file; 1 where something could not be measured."""
    on = Cuda() if device == "cuda" else Device()
    common = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "ncmi_kernels": ncmi_kernels.__version__,
        "backend": backend or ncmi_kernels._backends.resolve(None, torch.empty(0, device=device)),
        "threads": torch.get_num_threads(),
    }
    print(", ".join(f"{name} {value}" for name, value in common.items()) + "; float32, medians in microseconds")
    rows = [{**common, **row} for shape in shapes for row in measure(shape, on, backend, seconds / len(shapes))]
    lines = []
    for row in rows:
        shape = ", ".join(str(row[size]) for size in "BCM")
        numbers = (
            [f"{row['median_us']:.0f}", *("" if row[name] is None else f"{row[name]:.2f}" for name in COLUMNS[-3:-1])]
            if not row["note"]
            else []
        )
        lines.append([shape, row["mode"], row["implementation"], *(numbers or [row["note"], "", ""])])
    show(["B, C, M", "mode", "", "us", "/ cross_entropy", "/ with head"], lines)
    if file is not None:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return int(any(row["note"] for row in rows))
