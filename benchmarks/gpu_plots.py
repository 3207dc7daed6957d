"""Plots of the GPU benchmark's results: GB/s over M, and time over B M.

    python benchmarks/gpu_plots.py DIR

Reads DIR/bench_gpu.csv; writes PNG files beside it. Shapes are told apart by where they lie; a line joins the shapes
of one implementation.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_results import FULL, NO_GRAD, Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import read_rows


@dataclass(frozen=True)
class _Plot:
    """A panel for each dtype, a line for each implementation.

    Attributes:
        name: of the PNG file.
        rows: what to draw.
        x: the abscissa of a row.
        y: the ordinate of a row, or None to leave it out.
        labels: the title, and those of the axes.
        log_y: logarithmic ordinate.
    """

    name: str
    rows: Sequence[Row]
    x: Callable[[Row], float]
    y: Callable[[Row], float | None]
    labels: tuple[str, str, str]
    log_y: bool = True

    def draw(self, directory: Path) -> bool:
        """Write the file; False, and no file, where there is nothing to draw."""
        rows = [row for row in self.rows if self.y(row) is not None]
        if not rows:
            return False
        title, xlabel, ylabel = self.labels
        dtypes = sorted({row.dtype for row in rows})
        figure = Figure(figsize=(6.5 * len(dtypes), 5), layout="constrained")
        for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
            self._panel(axes, [row for row in rows if row.dtype == dtype])
            yscale = "log" if self.log_y else "linear"
            axes.set(title=dtype, xscale="log", yscale=yscale, xlabel=xlabel, ylabel=ylabel)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
        figure.suptitle(f"{title} ({rows[0].device}, {rows[0].date[:10]})")
        figure.savefig(directory / self.name, dpi=120)
        return True

    def _panel(self, axes: Axes, rows: Sequence[Row]) -> None:
        for index, name in enumerate(dict.fromkeys(row.implementation for row in rows)):
            points = [(self.x(row), value) for row in rows if row.implementation == name and (value := self.y(row))]
            style = "-" if name.split()[0] in ("cuda", "triton") else "--"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", color=f"C{index % 10}", label=name)


def draw_all(directory: Path) -> list[Path]:
    """The plots that the results suffice for."""
    rows = [row for row in read_rows(directory / "bench_gpu.csv", Row) if row.median_us is not None]
    full = [row for row in rows if row.mode == FULL]
    no_grad = [row for row in rows if row.mode == NO_GRAD]
    microseconds, speed = "median, us", "GB/s of model bytes"
    both = "Forward and backward"
    plots = (
        _Plot("no_grad_gb_per_s.png", no_grad, _columns, _speed, ("No-grad forward", "M", speed), log_y=False),
        _Plot("full_gb_per_s.png", full, _columns, _speed, (both, "M", speed), log_y=False),
        _Plot("full_time.png", full, _elements, _time, (both, "B M", microseconds)),
    )
    return [directory / plot.name for plot in plots if plot.draw(directory)]


def _columns(row: Row) -> float:
    return row.M


def _elements(row: Row) -> float:
    return row.B * row.M


def _speed(row: Row) -> float | None:
    return row.gb_per_s


def _time(row: Row) -> float | None:
    return row.median_us


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where there is nothing to draw."""
    parser = argparse.ArgumentParser(description="Draw the results of the GPU benchmark.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="with bench_gpu.csv; PNG files are written there")
    directory = parser.parse_args(arguments).directory
    paths = draw_all(directory)
    for path in paths:
        print(path)
    if not paths:
        print(f"nothing to draw in {directory}/bench_gpu.csv", file=sys.stderr)
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main())
