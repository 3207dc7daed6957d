"""One command on a machine with a CUDA GPU: build, test, sanitise, measure, and write down what came of it.

    make gpu-report OUT=dir [PYTHON=python3]
    python benchmarks/gpu_report.py --out DIR [--parts build tests ...] [--seconds 525]

Needs a Python with a CUDA build of torch, and setuptools; pytest for the tests, matplotlib for the plot and
compute-sanitizer for its parts; no network and no rights. The package is compiled into OUT/work/site by `setup.py
build`, which needs no pip, installs nothing and leaves the checkout as it is; caches are kept under OUT/work too.

Each part is a process of its own, with a time limit and its output in OUT/<part>.log; one that fails, hangs or cannot
run does not stop the others. The limits add up to less than --seconds; what is left over is the last part's, the times.
OUT/report.md says what became of each part, with the tables. The exit status is 0 only if every part went well.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from arguments import seconds
from records import Row, markdown, pivot, read_rows

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SECONDS = 525.0  # under nine minutes, with what it takes to end a part that hangs
GRACE = 5.0  # seconds between asking a part to end and ending it
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"


class Part(NamedTuple):
    """A part of the report: its name, the arguments of its process, and seconds after which it is ended."""

    name: str
    command: Sequence[str]
    limit: float


class Outcome(NamedTuple):
    """What became of a part; no reason where all is well."""

    name: str
    reason: str
    seconds: float


def all_parts(out: Path, python: str = sys.executable) -> list[Part]:
    """In the order in which they run. `{seconds}` stands for what a part should aim for."""
    work, csv = out / "work", str(out / "bench_gpu.csv")

    def script(name: str, *arguments: str) -> list[str]:
        return [python, str(BENCHMARKS / name), *arguments]

    def bench(part: str) -> list[str]:
        return script("bench_gpu.py", part, "--append", "--csv", csv, "--seconds", "{seconds}")

    def sanitizer(tool: str, *more: str) -> list[str]:
        # Each tensor an allocation of its own, or reading past its end would find torch's next one.
        own = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, *more]
        return [*own, "--error-exitcode", "9", *script("sanitize_cases.py")]

    build = [python, "setup.py", "egg_info", "--egg-base", str(work / "build")]
    build += ["build", "--build-base", str(work / "build"), "--build-lib", str(work / "site")]
    # pyproject.toml's addopts need pytest-benchmark, and some modules packages that need not be here. No cache: it
    # would go to the checkout.
    tests = [python, "-m", "pytest", "-m", "gpu", "-v", "-ra", "-p", "no:cacheprovider"]
    tests += ["--continue-on-collection-errors", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    tests += ["-o", "addopts=", "-o", "faulthandler_timeout=60", str(ROOT / "tests")]
    scaling = ["--device", "cuda", "--csv", str(out / "bench_scaling.csv"), "--png", str(out / "scaling.png")]
    return [
        Part("build", build, 150),
        Part("backends", [python, "-m", "ncmi_kernels.env"], 20),
        Part("tests", tests, 90),
        Part("memcheck", sanitizer("memcheck", "--report-api-errors", "no"), 30),  # torch's own probing fails calls
        Part("racecheck", sanitizer("racecheck"), 30),
        Part("small", bench("small"), 60),
        Part("centroids", bench("centroids"), 25),
        Part("scaling", script("bench_scaling.py", *scaling, "--seconds", "{seconds}", "--step-seconds", "0.5"), 45),
        Part("times", bench("times"), SECONDS),
    ]


def environment(out: Path) -> dict[str, str]:
    """Of every part: the package that was built, and no cache outside OUT."""
    site, cache = out / "work" / "site", out / "work" / "cache"
    built = site if (site / "ncmi_kernels").is_dir() else ROOT
    return {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(CUDA_HOME) / "bin")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH", "")])),
        "FORCE_CUDA": "1",
        "NCMI_REQUIRE_BACKENDS": "triton,cuda",
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "XDG_CACHE_HOME": str(cache),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
    }


# ------------------------------------------------------------------------------------------------------------
# Running them
# ------------------------------------------------------------------------------------------------------------


def run_part(part: Part, limit: float, out: Path) -> Outcome:
    """Run a part's process, its output going to OUT/<part>.log; whatever happens, there is an outcome."""
    start = time.monotonic()
    log = out / f"{part.name}.log"
    # Importing and warming up take their share, and what is under way at the end has to come to it.
    command = [argument.replace("{seconds}", f"{max(0.8 * limit - 15, 1):.0f}") for argument in part.command]
    # Programs that look for modules in the working directory must not find the checkout's, which is not built; only
    # setup.py has to run there.
    directory = ROOT if part.name == "build" else out
    with log.open("wb") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=directory, env=environment(out), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=limit)
                reason = f"exit status {status}: {last_line(log)}" if status else ""
            finally:
                end_group(process)
        except subprocess.TimeoutExpired:
            reason = f"ended after its limit of {limit:.0f} s, at: {last_line(log)}"
        except OSError as error:
            reason = f"could not be started: {error}"
    return Outcome(part.name, reason, time.monotonic() - start)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of a part, its children too: they would keep the device, and disturb what follows."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def run_parts(parts: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """Run the parts one after the other, each within its limit and the time that is left; report after each."""
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        limit = min(part.limit, deadline - time.monotonic())
        print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
        outcomes.append(run_part(part, limit, out) if limit > 0 else Outcome(part.name, "no time was left for it", 0.0))
        print(f"  {outcomes[-1].reason or 'ok'}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_report(out, outcomes)
    return outcomes


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    names, lines = pivot(rows, lambda row: (row.shape, row.dtype, row.mode), "implementation", cell)
    return markdown(["B, C, M", "dtype", "mode", *names], lines) if lines else "Nothing was measured.\n"


def _measured(row: Row) -> str:
    """Microseconds, in brackets GB/s of model bytes; or how many launches."""
    if row.launches is not None:
        return str(row.launches)
    return f"{row.median_us or 0:.1f}" + ("" if row.gb_per_s is None else f" ({row.gb_per_s:.0f})")


def write_report(out: Path, outcomes: Sequence[Outcome]) -> Path:
    """OUT/report.md."""
    rows = read_rows(out / "bench_gpu.csv", Row)
    copies = [f"A copy ran at {row.gb_per_s:.0f} GB/s, read and written.\n" for row in rows if row.mode == "copy"]
    found = [row for row in rows if row.B and (row.median_us is not None or row.launches is not None)]
    memory = [row for row in rows if row.peak_extra_bytes is not None]
    notes = dict.fromkeys(
        f"- {row.implementation} at ({row.shape}) {row.dtype}: {row.note}" for row in rows if row.note
    )
    backends = out / "backends.log"
    text = [
        "# ncmi_kernels on a GPU\n",
        markdown(
            ["part", "outcome", "seconds", "why"],
            [[each.name, "failed" if each.reason else "ok", f"{each.seconds:.0f}", each.reason] for each in outcomes],
        ),
        backends.read_text(errors="replace") if backends.exists() else "",
        "## Times\n\nMicroseconds, medians; in brackets GB/s of model bytes. Launches: how many.\n",
        *copies,
        _table(found, _measured),
        "## Memory\n\nMiB that a later step allocates at once, at most, on top of what was there.\n",
        _table(memory, lambda row: f"{(row.peak_extra_bytes or 0) / 2**20:.1f}"),
    ]
    if (out / "scaling.png").exists():
        text.append("## Growth over C, M and B\n\n![time and memory of a step](scaling.png)\n")
    text += ["## Not measured\n", *notes, ""]
    path = out / "report.md"
    path.write_text("\n".join(text))
    return path


# Files of an earlier run that a new one must not be mixed up with, by the parts that write them. A package that was
# built earlier must not stand in for one that fails to build now.
OUTPUTS = {
    "work/site": ("build",),
    "backends.log": ("backends",),
    "bench_scaling.csv": ("scaling",),
    "scaling.png": ("scaling",),
    "bench_gpu.csv": ("small", "centroids", "times"),
}


def remove_old(out: Path, parts: Sequence[Part]) -> None:
    """Remove what the parts are about to write."""
    names = {part.name for part in parts}
    for name in (name for name, writers in OUTPUTS.items() if names & set(writers)):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    names = [part.name for part in all_parts(Path())]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--seconds", type=seconds, default=SECONDS)
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    (out / "work" / "build").mkdir(parents=True, exist_ok=True)
    parts = [part for part in all_parts(out) if part.name in options.parts]
    remove_old(out, parts)
    outcomes = run_parts(parts, out, options.seconds)
    print(out / "report.md")
    return 1 if any(outcome.reason for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
