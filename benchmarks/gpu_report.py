"""One command on a machine with a CUDA GPU: build, test, sanitise, measure, and write down what came of it.

    make gpu-report OUT=dir [PYTHON=python3]
    python benchmarks/gpu_report.py --out DIR [--parts build tests ...] [--seconds 525]

Needs a Python with a CUDA build of torch, and setuptools; no network and no rights. pytest for the tests, matplotlib
for the plots and compute-sanitizer for its part: where one is missing, that part is reported as skipped. The package
is compiled into OUT/work/site by `setup.py build`, which needs no pip, installs nothing, leaves the checkout as it is
and works for any user who can write to OUT; caches are kept under OUT/work too.

Each part is a process of its own, with a time limit and its output in OUT/<part>.log; one that fails, hangs or cannot
run does not stop the others. All together keep to --seconds: what a slow part has used is missing from the last one,
the times. OUT/report.md says what became of each part, with the tables. The exit status is 0 only if every part that
was asked for went well.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_results
import records
from arguments import seconds

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
BACKENDS = ("triton", "cuda")
SECONDS = 525.0  # under nine minutes, with what it takes to end a part that hangs
MODULES = ("torch", "triton", "setuptools", "ninja", "pytest", "matplotlib", "numpy", "liger_kernel", "quack")
TOOLS = ("nvcc", "compute-sanitizer")
GRACE = 5.0  # seconds between asking a part to end and ending it

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: on the command line, in the report and of the log.
        command: the arguments of its process, given how many seconds it should aim for.
        limit: seconds after which it is ended.
        least: seconds without which it is not started, and which the parts before leave to it.
        gpu: it needs a CUDA device.
        modules: Python modules that it needs.
        tools: programs that it needs.
        background: it runs beside the parts that follow, up to the first that measures.
        measures: nothing else may run beside it.
    """

    name: str
    command: Callable[[float], list[str]]
    limit: float
    least: float = 5.0
    gpu: bool = True
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    background: bool = False
    measures: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Machine:
    """What was found; empty until the environment was looked at."""

    facts: dict[str, Any] = field(default_factory=dict)

    def obstacle(self, part: Part) -> str | None:
        """Why a part cannot run here, or None."""
        if part.gpu and not self.facts.get("device"):
            return "no CUDA device"
        missing = [name for name in (*part.modules, *part.tools) if not self.facts.get("versions", {}).get(name)]
        return f"{' and '.join(missing)} not found" if missing else None


# ------------------------------------------------------------------------------------------------------------
# The parts
# ------------------------------------------------------------------------------------------------------------


def all_parts(out: Path, python: str = sys.executable) -> list[Part]:
    """In the order in which they run; the last to measure takes the time that is left."""
    work = out / "work"

    def script(name: str, *arguments: str) -> list[str]:
        return [python, str(BENCHMARKS / name), *arguments]

    def bench(part: str, limit: float, least: float, background: bool = False) -> Part:
        def command(seconds: float) -> list[str]:
            # Importing and warming up take their share, and what is under way at the end has to come to it.
            return script("bench_gpu.py", part, "--out", str(out), "--budget", f"{max(0.8 * seconds - 15, 1):.0f}")

        return Part(part, command, limit, least, background=background, measures=not background)

    def scaling(seconds: float) -> list[str]:
        files = ["--csv", str(out / "bench_scaling.csv")]
        files += ["--png", str(out / "scaling.png")] if importlib.util.find_spec("matplotlib") else []
        budget = f"{max(0.8 * seconds - 15, 1):.0f}"
        return script("bench_scaling.py", "--device", "cuda", *files, "--budget", budget, "--step-seconds", "0.5")

    def sanitizer(tool: str) -> Part:
        def command(seconds: float) -> list[str]:
            program = find_tool("compute-sanitizer") or "compute-sanitizer"
            # Each tensor an allocation of its own, or reading past its end would find torch's next one. Calls of the
            # CUDA API that fail are torch's own probing.
            own = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", "9"]
            quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
            return [*own, *quiet, *script("sanitize_cases.py")]

        return Part(tool, command, 45, least=15, tools=("compute-sanitizer",))

    def build(seconds: float) -> list[str]:
        setup = [python, "setup.py", "egg_info", "--egg-base", str(work / "build")]
        return [*setup, "build", "--build-base", str(work / "build"), "--build-lib", str(work / "site")]

    def tests(seconds: float) -> list[str]:
        # pyproject.toml's addopts need pytest-benchmark, and some modules packages that need not be here. No cache: it
        # would go to the checkout.
        pytest = [python, "-m", "pytest", "-m", "gpu", "-v", "-ra", "-p", "no:cacheprovider"]
        pytest += ["--continue-on-collection-errors", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        return [*pytest, "-o", "addopts=", "-o", "faulthandler_timeout=60", str(ROOT / "tests")]

    return [
        Part("environment", lambda seconds: script("gpu_report.py", "--look", "--out", str(out)), 60, gpu=False),
        Part("build", build, 180, least=10, gpu=False, modules=("torch", "setuptools")),
        Part("backends", lambda seconds: script("gpu_report.py", "--check-backends", "--out", str(out)), 40),
        bench("compile", 150, 10, background=True),
        Part("tests", tests, 150, least=30, modules=("pytest",)),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        bench("copy", 30, 15),
        bench("small", 60, 20),
        bench("memory", 30, 15),
        bench("profile", 40, 15),
        bench("centroids", 40, 15),
        Part("scaling", scaling, 70, least=30, measures=True),
        bench("times", 300, 40),
        Part("plots", lambda seconds: script("gpu_plots.py", str(out)), 30, gpu=False, modules=("matplotlib",)),
    ]


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    directories = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(directories))


def environment(out: Path, machine: Machine) -> dict[str, str]:
    """The environment of every part: the package that was built, and no cache outside OUT."""
    site, cache = out / "work" / "site", out / "work" / "cache"
    built = site if (site / "ncmi_kernels").is_dir() else ROOT
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(built), os.environ.get("PYTHONPATH", "")])),
        "FORCE_CUDA": "1",
        "NCMI_REQUIRE_BACKENDS": ",".join(BACKENDS),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "XDG_CACHE_HOME": str(cache),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
    }
    # For the device that is here alone: a third of the time that compiling for all would take.
    if machine.facts.get("capability"):
        variables.setdefault("TORCH_CUDA_ARCH_LIST", machine.facts["capability"])
    return variables


# ------------------------------------------------------------------------------------------------------------
# Running them
# ------------------------------------------------------------------------------------------------------------


def run_part(part: Part, limit: float, out: Path, variables: Mapping[str, str]) -> Outcome:
    """Run a part's process, its output going to OUT/<part>.log; whatever happens, there is an outcome."""
    start = time.monotonic()

    def outcome(status: str, reason: str = "") -> Outcome:
        return Outcome(part.name, status, reason, time.monotonic() - start)

    log = out / f"{part.name}.log"
    # Programs that look for modules in the working directory must not find the checkout's, which is not built; only
    # setup.py has to run there.
    directory = ROOT if part.name == "build" else out
    with log.open("wb") as file:
        command = part.command(limit)
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=directory, env=dict(variables), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return outcome(FAILED, f"could not be started: {error}")
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return outcome(FAILED, f"ended after its limit of {limit:.0f} s, at: {last_line(log)}")
        finally:
            end_group(process)
    if status == 0:
        return outcome(OK)
    return outcome(FAILED, f"exit status {status}: {last_line(log)}")


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


def run_parts(
    parts: Sequence[Part], out: Path, seconds: float = SECONDS, machine: Machine | None = None
) -> list[Outcome]:
    """Run the parts one after the other, each within its limit and what the later ones leave."""
    machine = machine or Machine()
    deadline = time.monotonic() + seconds
    outcomes: dict[str, Outcome | Future[Outcome]] = {}

    def joined() -> list[Outcome]:
        return [each.result() if isinstance(each, Future) else each for each in outcomes.values()]

    with ThreadPoolExecutor(1) as beside:
        for index, part in enumerate(parts):
            if part.measures:
                joined()
            reserved = sum(later.least for later in parts[index + 1 :])
            limit = min(part.limit, deadline - time.monotonic() - reserved)
            obstacle = machine.obstacle(part) if part.name != "environment" else None
            print(f"{part.name}: {obstacle or f'at most {max(limit, 0):.0f} s'}", flush=True)
            if obstacle:
                outcomes[part.name] = Outcome(part.name, SKIPPED, obstacle)
            elif limit < part.least:
                outcomes[part.name] = Outcome(part.name, FAILED, "no time was left for it")
            elif part.background:
                outcomes[part.name] = beside.submit(run_part, part, limit, out, environment(out, machine))
            else:
                outcomes[part.name] = run_part(part, limit, out, environment(out, machine))
            if part.name == "environment":
                machine.facts = read_facts(out)
        return joined()


# ------------------------------------------------------------------------------------------------------------
# What is here
# ------------------------------------------------------------------------------------------------------------


def look(out: Path) -> int:
    """Write OUT/environment.json: the versions, what is missing, the device. 1 without a CUDA device."""
    versions: dict[str, str] = {name: module_version(name) for name in MODULES}
    versions |= {name: find_tool(name) or "" for name in TOOLS}
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions,
        "device": "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    reason = "torch is not installed"
    if versions["torch"]:
        reason = look_at_device(facts)
    (out / "environment.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts, indent=2))
    missing = [name for name, version in versions.items() if not version]
    print(f"missing: {', '.join(missing) or 'nothing'}")
    if reason:
        print(f"no GPU: {reason}")
    return 1 if reason else 0


def module_version(name: str) -> str:
    """The version of a module that can be imported, or ""."""
    if importlib.util.find_spec(name) is None:
        return ""
    for distribution in (name, name.replace("_", "-"), f"{name}-kernels"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def look_at_device(facts: dict[str, Any]) -> str:
    """Add the device to the facts; the reason why there is none, or ""."""
    try:
        import torch
    except Exception as error:  # an ImportError, or an OSError from a library that does not load
        return f"torch could not be imported: {error}"
    facts["cuda"] = torch.version.cuda or ""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }
    return ""


def read_facts(out: Path) -> dict[str, Any]:
    """What `look` has written, or nothing."""
    file = out / "environment.json"
    if not file.exists():
        return {}
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def check_backends() -> int:
    """Print what can run; 1 where one that the report is about cannot."""
    import ncmi_kernels
    from ncmi_kernels import _ops

    reasons = ncmi_kernels.available_backends()
    if reasons["triton"] is None:
        try:
            _ops.operators("triton")  # imported only when it is first used
        except Exception as error:
            reasons["triton"] = f"{type(error).__name__}: {error}"
    print(f"ncmi_kernels {ncmi_kernels.__version__} from {Path(ncmi_kernels.__file__).parent}")
    for name, reason in reasons.items():
        print(f"{name}: {'can run' if reason is None else reason}")
    missing = [f"{name}: {reasons[name]}" for name in ("cpu", *BACKENDS) if reasons[name] is not None]
    if missing:
        print(f"cannot run here: {'; '.join(missing)}")
    return 1 if missing else 0


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------


def write_report(out: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> Path:
    """OUT/report.md."""
    rows = records.read_rows(out / "bench_gpu.csv", gpu_results.Row)
    text = [
        f"# ncmi_kernels on {facts.get('device') or 'a machine without a CUDA device'}\n",
        f"{facts.get('date', '')}; {describe_versions(facts)}\n",
        records.markdown(
            ["part", "outcome", "seconds", "why"],
            [[each.name, each.status, f"{each.seconds:.0f}", each.reason] for each in outcomes],
        ),
    ]
    if rows:
        text += [
            "## Aims\n",
            gpu_results.aims_table(rows),
            "## Times\n",
            f"Microseconds, medians; in brackets GB/s of model bytes. {describe_copy(out)}\n",
            gpu_results.times_table(rows),
            "## Centroid steps\n",
            gpu_results.times_table(rows, [gpu_results.CENTROID_STEP]),
            "## Small batches\n",
            gpu_results.small_table(rows),
            "## Memory\n",
            gpu_results.memory_table(rows),
        ]
        if (out / "scaling.png").exists():
            text += ["## Growth over C, M and B\n", "![time and memory of a step](scaling.png)\n"]
        text += ["## Not measured\n", *(f"- {note}" for note in gpu_results.notes(rows)), ""]
    path = out / "report.md"
    path.write_text("\n".join(text))
    return path


def describe_versions(facts: Mapping[str, Any]) -> str:
    """One line."""
    versions = {"python": facts.get("python", ""), **facts.get("versions", {}), "cuda": facts.get("cuda", "")}
    return ", ".join(f"{name} {version or 'not found'}" for name, version in versions.items())


def describe_copy(out: Path) -> str:
    """The bandwidth that was measured, or that it was not."""
    file = out / "copy.json"
    if not file.exists():
        return "The copy bandwidth was not measured."
    return f"A copy ran at {json.loads(file.read_text())['gb_per_s']:.0f} GB/s, read and written."


# Files of an earlier run that a new one must not be mixed up with, by the parts that write them.
OUTPUTS = {
    "environment.json": ("environment",),
    "copy.json": ("copy",),
    "profile.csv": ("profile",),
    "bench_scaling.csv": ("scaling",),
    "scaling.png": ("scaling",),
    "bench_gpu.csv": ("small", "memory", "centroids", "times"),
}


def remove_old(out: Path, parts: Sequence[Part]) -> None:
    """Remove what the parts are about to write."""
    names = {part.name for part in parts}
    for file, writers in OUTPUTS.items():
        if names & set(writers):
            (out / file).unlink(missing_ok=True)
    if "build" in names:  # a package built earlier must not stand in for one that fails to build now
        shutil.rmtree(out / "work" / "site", ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these (environment is always looked at)")
    parser.add_argument("--seconds", type=seconds, default=SECONDS)
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check-backends", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    (out / "work" / "build").mkdir(parents=True, exist_ok=True)
    if options.look:
        return look(out)
    if options.check_backends:
        return check_backends()
    parts = all_parts(out)
    names = [part.name for part in parts]
    unknown = set(options.parts or []) - set(names)
    if unknown:
        parser.error(f"--parts: got {' '.join(sorted(unknown))}, expected some of {' '.join(names)}")
    parts = [part for part in parts if not options.parts or part.name in ("environment", *options.parts)]
    remove_old(out, parts)
    outcomes = run_parts(parts, out, options.seconds)
    for outcome in outcomes:
        print(f"{outcome.name:12} {outcome.status:8} {outcome.seconds:5.0f} s  {outcome.reason}")
    print(write_report(out, outcomes, read_facts(out)))
    return 0 if all(outcome.status == OK for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
