"""Renews the tables and figures of the README and of the pages from the CSV files of measurements.

    python benchmarks/figures.py            # or: make figures
    python benchmarks/figures.py --check    # writes nothing; status 1 if something is not up to date

Between `<!-- table: NAME -->` and `<!-- end -->` a page has what the function of that name in `TABLES` makes of the
measurements. `FIGURES` has the pictures: each PNG carries a fingerprint of what is drawn in it, which does not depend
on how a machine renders it. To add one is to write a function and name it there.
"""

import argparse
import csv
import hashlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent / "experiments"))
import bench_scaling
import bench_step
import report
from records import markdown, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/benchmarks.md", "benchmarks/README.md", "benchmarks/experiments/README.md")
)
BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FINGERPRINT = "ncmi_kernels.fingerprint"

Row = dict[str, str]


@cache
def rows(name: str) -> list[Row]:
    """The lines of a CSV file under benchmarks/results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def machine(of: list[Row]) -> str:
    """Where, when and with what rows were measured."""
    row = of[0]
    return f"{row['device']}, {row['cpu_capability']}, torch {row['torch']}, {row['date'][:10]}"


def unique(values: Iterable[str]) -> list[str]:
    """The values in the order in which they first come."""
    return list(dict.fromkeys(values))


def loss_speed() -> str:
    """Forward and backward of each implementation, microseconds and the ratio to cross_entropy."""
    measured = _loss_speeds()
    names = [name for name in unique(row["implementation"] for row in measured) if name not in WITH_PRODUCTS]
    lines = []
    for key, group in report.grouped(measured, "B", "C", "M", "threads").items():
        cells = {row["implementation"]: row for row in group}
        lines.append([", ".join(key[:3]), key[3], *(_time(cells[name]) for name in names)])
    command = "`python benchmarks/bench_loss.py --csv FILE`"
    return f"{command} ({machine(measured)}):\n\n" + markdown(("B, C, M", "threads", *names), lines)


HEAD, FOCUS = "cross_entropy with head", "ncmi focus"
LEARNT = FOCUS + " + centroids"
SEVERAL = LEARNT + ", 4 a class"
WITH_PRODUCTS = (HEAD, "linear_cross_entropy", FOCUS, LEARNT, SEVERAL)


def focus_speed() -> str:
    """Forward and backward of what has matrix products, microseconds and the ratio to the head; memory, MiB."""
    return _beside_the_head(_speeds("cpu/bench_focus.csv"), WITH_PRODUCTS[:-1])


def centroids_speed() -> str:
    """The same of as many centroids, 1 and 4 a class."""
    return _beside_the_head(_speeds("cpu/bench_centroids.csv"), (HEAD, LEARNT, SEVERAL))


def _beside_the_head(measured: list[Row], names: tuple[str, ...]) -> str:
    lines = []
    for key, group in report.grouped(measured, "B", "C", "M", "threads").items():
        cells = {row["implementation"]: row for row in group}
        times = [f"{float(cells[name]['median_us']):.0f}" for name in names]
        ratios = ["", *(f" ({float(cells[name]['ratio_to_head']):.2f})" for name in names[1:])]
        memory = [f"{int(cells[name]['peak_extra_bytes']) / 2**20:.1f}" for name in (HEAD, names[-1])]
        cells_of_line = [time + ratio for time, ratio in zip(times, ratios, strict=True)]
        lines.append([", ".join(key[:3]), key[3], *cells_of_line, ", ".join(memory)])
    command = "`python benchmarks/bench_loss.py --implementations ... --csv FILE`"
    head = ("B, C, M", "threads", *names, "MiB: first, last")
    return f"{command} ({machine(measured)}):\n\n" + markdown(head, lines)


def focus_parts() -> str:
    """Where these times go, microseconds, on one thread."""
    measured = [row for row in rows("cpu/bench_parts.csv") if row["threads"] == "1"]
    phases = unique(row["phase"] for row in measured)
    lines = []
    for (*shape, name), group in report.grouped(measured, "B", "C", "M", "implementation").items():
        cells = {row["phase"]: row for row in group}
        times = (f"{float(cells[p]['median_us']):.0f} ({100 * float(cells[p]['share']):.0f}%)" for p in phases[1:])
        lines.append([", ".join(shape), name, f"{float(cells[phases[0]]['median_us']):.0f}", *times])
    command = "`python benchmarks/bench_parts.py --csv FILE`"
    return f"{command} ({machine(measured)}):\n\n" + markdown(("B, C, M", "", *phases), lines)


def focus_ratios() -> str:
    """The same in short, on two threads: the ratio to the head."""
    shapes = report.grouped((row for row in _speeds("cpu/bench_focus.csv") if row["threads"] == "2"), "B", "C", "M")
    cells = [{row["implementation"]: row for row in group} for group in shapes.values()]
    shown = ("NCMI with focus, centroids fixed", FOCUS), ("NCMI with focus, centroids learnt", LEARNT)
    lines = [[name, *(f"{float(cell[of]['ratio_to_head']):.2f}" for cell in cells)] for name, of in shown]
    return markdown(("B, C, M", *(", ".join(shape) for shape in shapes)), lines)


def _loss_speeds() -> list[Row]:
    return _speeds("cpu/bench_loss_avx512_intel.csv")


def _speeds(file: str) -> list[Row]:
    return [row for row in rows(file) if row["mode"] == "forward+backward"]


def _time(row: Row) -> str:
    if not row["median_us"]:
        return "no compiler" if row["note"].startswith("torch.compile") else "does not fit"
    return f"{float(row['median_us']):.0f} ({float(row['ratio_to_cross_entropy']):.2f})"


def test_accuracy() -> str:
    """Experiment 1 in short: test accuracy in percent by data set and loss."""
    losses = ("cross-entropy", "NCMI", "NCMI, focus")
    lines = []
    measured = sorted(report.of(rows("experiments.csv"), "compare"), key=lambda row: row["dataset"])
    for (dataset,), group in report.grouped(measured, "dataset").items():
        cells = report.grouped(group, "setting")
        lines.append([dataset, *(report.spread(cells[(loss,)], "accuracy", 2) for loss in losses)])
    return markdown(("test accuracy, %", *losses), lines)


def speed_ratios() -> str:
    """Forward and backward in short, on two threads: the ratio to cross_entropy."""
    shapes = report.grouped((row for row in _loss_speeds() if row["threads"] == "2"), "B", "C", "M")
    cells = [{row["implementation"]: row for row in group} for group in shapes.values()]
    lines = [
        [shown, *(f"{float(cell[name]['ratio_to_cross_entropy']):.2f}" for cell in cells)] for shown, name in RATIOS
    ]
    return markdown(("B, C, M", *(", ".join(shape) for shape in shapes)), lines)


RATIOS = (  # as the page has it, the implementation
    ("NCMI / cross_entropy", "ncmi batch"),
    ('NCMI, `ratio="sample"` / cross_entropy', "ncmi sample"),
    ("NCMI, centroids learnt / cross_entropy", "ncmi batch + centroids"),
    ("NCMI in plain PyTorch / cross_entropy", "collapsed eager"),
)


def training_step() -> str:
    """A whole training step, milliseconds, and the share of the loss and of the centroids' step."""
    measured = [row for row in rows("cpu/bench_step.csv") if row["phase"] == "step" and row["share"]]
    methods = unique(row["method"] for row in measured)
    lines = []
    tasks = unique(row["task"] for row in measured)
    measured.sort(key=lambda row: (tasks.index(row["task"]), row["threads"]))
    for key, group in report.grouped(measured, "task", "B", "C", "M", "threads").items():
        cells = {row["method"]: row for row in group}
        shown = [f"{float(cells[m]['median_us']) / 1e3:.1f} ({100 * float(cells[m]['share']):.1f}%)" for m in methods]
        lines.append([f"{key[0]} ({', '.join(key[1:4])})", key[4], *shown])
    command = "`python benchmarks/bench_step.py --csv FILE`"
    return f"{command} ({machine(measured)}):\n\n" + markdown(("data (B, C, M)", "threads", *methods), lines)


def centroid_step() -> str:
    """A step of the centroids alone, microseconds and the ratio to CentroidSGD."""
    measured = [row for row in rows("cpu/bench_step.csv") if row["task"] == "centroid step"]
    methods = unique(row["method"] for row in measured)
    measured.sort(key=lambda row: (int(row["B"]), int(row["C"]), int(row["M"]), row["threads"]))
    lines = []
    for key, group in report.grouped(measured, "B", "C", "M", "threads").items():
        cells = {row["method"]: row for row in group}
        shown = [f"{float(cells[m]['median_us']):.0f} ({float(cells[m]['ratio']):.2f})" for m in methods]
        lines.append([", ".join(key[:3]), key[3], *shown])
    command = "`python benchmarks/bench_step.py --csv FILE`"
    return f"{command} ({machine(measured)}):\n\n" + markdown(("B, C, M", "threads", *methods), lines)


def accuracy() -> str:
    """Relative errors of loss, gradient of the input and gradient of the centroids, by the kernels and by autograd."""
    measured = rows("cpu/accuracy.csv")
    paths = unique(row["path"] for row in measured)
    lines = []
    for key, group in report.grouped(measured, "temperature", "separation", "ratio").items():
        each = [[row for row in group if row["path"] == path] for path in paths]
        cells = [", ".join(f"{float(row['relative_error']):.0e}" for row in found) for found in each]
        lines.append([*key, *cells])
    header = ("temperature", "separation", "ratio", *(f"loss, input gradient, centroid gradient: {p}" for p in paths))
    return f"`python benchmarks/accuracy.py` ({machine(measured)}):\n\n" + markdown(header, lines)


def sharded_bytes() -> str:
    """KiB that a process sends in a step: payload, and what the kernel counted."""
    measured = rows("cpu/sharded_bytes.csv")
    methods = unique(row["method"] for row in measured)
    lines = []
    for (classes,), group in report.grouped(measured, "C").items():
        cells = {row["method"]: row for row in group}
        shown = [
            f"{float(cells[m]['payload_bytes']) / 1024:.0f} ({float(cells[m]['loopback_bytes']) / 1024:.0f})"
            for m in methods
        ]
        lines.append([f"{int(classes):,}", *shown])
    row = measured[0]
    shape = f"{row['processes']} processes, {row['B']} rows each, M = {row['M']}, float32"
    command = f"`python benchmarks/bench_sharded.py` ({shape}; {machine(measured)}):\n\n"
    return command + markdown(("C", *methods), lines)


def ncmi_accuracy() -> str:
    """NCMI and accuracy of the checkpoints of training runs, and their rank correlation: means over the runs."""
    measured = rows("cpu/ncmi_accuracy.csv")
    lines = []
    for key, group in report.grouped(measured, "loss", "distribution").items():
        runs = [
            [(float(row["accuracy"]), float(row["ncmi"])) for row in run]
            for run in report.grouped(group, "seed").values()
        ]
        ends = [statistics.mean(run[at][column] for run in runs) for column in (0, 1) for at in (0, -1)]
        ranks = [statistics.mean(spearmanr(run[half:]).statistic for run in runs) for half in (0, len(runs[0]) // 2)]
        digits = (".1f", ".1f", ".3g", ".3g", ".2f", ".2f")
        lines.append([", ".join(key), *(f"{value:{d}}" for value, d in zip((*ends, *ranks), digits, strict=True))])
    about = f"{measured[0]['data']}, {len(runs)} seeds, {len(runs[0])} checkpoints a run; {machine(measured)}"
    header = (
        "loss, distribution",
        "accuracy first, %",
        "last, %",
        "NCMI first",
        "NCMI last",
        "rank correlation",
        "of the later half",
    )
    return f"`python benchmarks/ncmi_accuracy.py` ({about}):\n\n" + markdown(header, lines)


def gradients() -> str:
    """Which samples a loss pulls at: mean and deviation over the seeds."""
    lines = []
    for (loss,), group in report.grouped(rows("gradients.csv"), "loss").items():
        columns = ("wrong_samples", "wrong_pull", "wrong_over_secure", "away_from_nearest")
        lines.append([loss, *(report.spread(group, column) for column in columns)])
    header = (
        "loss",
        "wrong samples, %",
        "their share of the pull, %",
        "pull, wrong over secure",
        "from the nearest, %",
    )
    return markdown(header, lines)


def _of_experiments(make: Callable[[list[Row]], Any]) -> Any:
    """A table or a figure that is made of the experiments."""
    return make(rows("experiments.csv"))


TABLES: dict[str, Callable[[], str]] = {
    "test-accuracy": test_accuracy,
    "speed-ratios": speed_ratios,
    "loss-speed": loss_speed,
    "focus-speed": focus_speed,
    "focus-parts": focus_parts,
    "focus-ratios": focus_ratios,
    "centroids-speed": centroids_speed,
    "training-step": training_step,
    "centroid-step": centroid_step,
    "accuracy": accuracy,
    "sharded-bytes": sharded_bytes,
    "ncmi-accuracy": ncmi_accuracy,
    "gradients": gradients,
    **{name: partial(_of_experiments, table) for name, table in report.TABLES.items()},
}
FIGURES: dict[str, Callable[[], Figure]] = {
    "cpu/step.png": lambda: bench_step.draw(read_rows(RESULTS / "cpu/bench_step.csv", bench_step.Row)),
    "cpu/scaling.png": lambda: bench_scaling.draw(read_rows(RESULTS / "cpu/bench_scaling.csv", bench_scaling.Row)),
    **{f"figures/{name}.png": partial(_of_experiments, draw) for name, draw in report.FIGURES.items()},
}


def renewed(page: str) -> str:
    """The text of a page with all of its tables made again.

    Raises:
        KeyError: it names a table that there is not.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}{found[3]}", page)


def fingerprint(figure: Figure) -> str:
    """What is drawn: all data and texts of a figure, to six digits."""
    parts = [text.get_text() for text in figure.texts] + [figure.get_suptitle()]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale(), axes.get_yscale()]
        parts += [text.get_text() for text in axes.texts]
        for line in axes.lines:
            parts += [str(line.get_label()), str(line.get_color()), _digits(line.get_xydata())]
        for patch in axes.patches:
            if isinstance(patch, Rectangle):  # a bar
                parts.append(_digits([patch.get_bbox().bounds]))
        for collection in axes.collections:
            parts.append(_digits(collection.get_offsets()))  # of points
            parts += [_digits(path.vertices) for path in collection.get_paths()]  # of bands and segments
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digits(points: Any) -> str:
    return repr([[f"{float(value):.6g}" for value in point] for point in points])


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint that a PNG carries."""
    with Image.open(path) as image:
        text: str | None = image.info.get(FINGERPRINT)
    return text


def stale() -> list[Path]:
    """The pages and figures that are not what the measurements make of them."""
    found = [page for page in PAGES if page.exists() and renewed(page.read_text()) != page.read_text()]
    for name, draw in FIGURES.items():
        path = RESULTS / name
        if not path.exists() or fingerprint_in(path) != fingerprint(draw()):
            found.append(path)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Renew tables and figures from the measurements.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if something is not up to date")
    arguments = parser.parse_args()
    old = stale()
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is not up to date' if arguments.check else 'is renewed'}")
        if arguments.check:
            continue
        if path.suffix == ".md":
            path.write_text(renewed(path.read_text()))
        else:
            figure = FIGURES[str(path.relative_to(RESULTS))]()
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png", dpi=130, metadata={"Software": None, FINGERPRINT: fingerprint(figure)})
    if arguments.check and old:
        sys.exit(1)


if __name__ == "__main__":
    main()
