"""The GPU benchmark and report, as far as they can be tried without a GPU."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_gpu
import gpu_report
import sanitize_cases
from bench_gpu import WALL, Bench
from cases import BACKWARD, CENTROID_STEP, FORWARD, FULL, NO_GRAD, TINY, Implementation, Shape, Traffic, batch
from gpu_report import ROOT, Part
from records import Row, read_rows, write_rows
from runner import Step

from ncmi_kernels import _timing, available_backends

needs_cpu_kernels = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ kernels")

# ------------------------------------------------------------------------------------------------------------
# Bytes
# ------------------------------------------------------------------------------------------------------------

BATCH = Traffic(table=True, centre=True)
Z, XI = 1000 * 50 * 4, 7 * 50 * 4  # bytes of [B, M] and [C, M] in float32


@pytest.mark.parametrize(
    ("traffic", "mode", "expected"),
    [
        (Traffic(), FORWARD, Z),
        (Traffic(), BACKWARD, 2 * Z),
        (Traffic(), FULL, 3 * Z),
        (BATCH, NO_GRAD, 2 * Z + XI),
        (BATCH, FORWARD, 2 * Z + XI),
        (BATCH, BACKWARD, 2 * Z + XI),
        (BATCH, FULL, 4 * Z + 2 * XI),
        (BATCH, CENTROID_STEP, Z + 5 * XI),
        (BATCH._replace(centre=False), FULL, 3 * Z + 2 * XI),
        (BATCH._replace(one_pass=True), NO_GRAD, 2 * Z + XI),
        (BATCH._replace(one_pass=True), FORWARD, 3 * Z + XI),
        (BATCH._replace(one_pass=True), BACKWARD, None),
        (BATCH._replace(one_pass=True), FULL, 3 * Z + XI),
        (BATCH._replace(centroids=True), FULL, 5 * Z + 5 * XI),
    ],
)
def test_model_bytes(traffic, mode, expected):
    assert traffic.model_bytes(Shape(1000, 7, 50), 4, mode, cache_bytes=0) == expected


def test_model_bytes_of_few_samples_of_what_fits_the_cache_and_of_half_precision():
    few = BATCH.model_bytes(Shape(10, 1000, 50), 4, FULL, cache_bytes=0)
    assert few == BATCH.model_bytes(Shape(10, 10, 50), 4, FULL, cache_bytes=0)
    learnt = BATCH._replace(centroids=True).model_bytes(Shape(10, 1000, 50), 4, FULL, cache_bytes=0)
    assert learnt - few == 4 * 50 * (10 + 3 * 1000), "their gradient is of all classes"
    sample, shape = BATCH._replace(one_pass=True), Shape(1000, 7, 50)
    assert sample.model_bytes(shape, 4, NO_GRAD, Z) == Z + XI, "the centre's read comes from the cache"
    assert sample.model_bytes(shape, 4, NO_GRAD, Z - 1) == 2 * Z + XI
    assert sample.model_bytes(shape, 2, FULL, Z) == 3 * Z // 2 + 2 * XI, "its gradient waits for the backward pass"


# ------------------------------------------------------------------------------------------------------------
# The benchmark
# ------------------------------------------------------------------------------------------------------------


def cross_entropy(name="cross_entropy", **settings):
    return Implementation(name, lambda shape: torch.nn.CrossEntropyLoss(), **settings)


def make_bench(*implementations, part="times", seconds=60.0):
    bench = Bench(part, _timing.Device(), (), seconds)
    bench.implementations = implementations
    return bench


def test_times(monkeypatch):
    """What cannot be measured leaves the others; GB/s are of the model's bytes, and a share of the copy's."""
    monkeypatch.setattr(bench_gpu, "COPY_BYTES", 3000)
    monkeypatch.setattr(_timing.Device, "time", lambda self, run, lead_us: (run(), 10.0)[1])

    def explode(shape):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany bytes")

    absent = cross_entropy("absent", obstacle=lambda shape, device: "absent is not installed")
    big = Implementation("big", explode)
    compiled = cross_entropy("compiled", compiled=True)
    bench = make_bench(cross_entropy(), absent, big, compiled)
    bench.compile_seconds = 0.0
    copy, *rows = bench.times((TINY, torch.float32), 0.0)
    assert copy.gb_per_s == 2 * 3000 / 10.0 / 1e3
    assert [(row.implementation, row.mode) for row in rows] == [
        (each.name, mode) for each in bench.implementations for mode in bench_gpu.MODES
    ]
    notes = {"absent": "absent is not installed", "big": "out of memory", "cross_entropy": ""}
    notes["compiled"] = "TimeoutError: the time for torch.compile is spent"
    for row in rows:
        assert (row.B, row.C, row.M, row.dtype, row.note) == (*TINY, "float32", notes[row.implementation])
        assert (row.median_us is None) == bool(row.note)
        if not row.note:
            moved = 6 * 10 * 4 * {FULL: 3, BACKWARD: 2}.get(row.mode, 1)
            assert (row.model_bytes, row.gb_per_s, row.share_of_copy) == (moved, moved / 1e4, moved / 1e4 / 0.6)
            assert row.repetitions >= bench_gpu.LEAST_ROUNDS
    rows = bench.times((TINY, torch.float32), 0.0)
    assert bench_gpu.COPY not in {row.mode for row in rows}, "once is enough"
    z, y = batch(TINY)
    own = bench.step(cross_entropy(overwrites=True), TINY, FULL, z, y).z
    assert torch.equal(own, z)
    assert own.data_ptr() != z.data_ptr(), "what is overwritten is not shared"


def test_a_step_times_what_its_mode_says():
    passes = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            passes.append("forward")
            return z.sum()

        @staticmethod
        def backward(ctx, upstream):
            passes.append("backward")
            return upstream.expand(*TINY[::2])

    criterion = mock.Mock(side_effect=lambda z, y: Watched.apply(z))
    criterion.parameters.return_value = []
    for mode, expected in (
        (FORWARD, ["forward"]),
        (NO_GRAD, ["forward"]),
        (BACKWARD, ["backward"]),
        (FULL, ["forward", "backward"]),
    ):
        step = Step(criterion, *batch(TINY), mode)
        step.prepare()
        passes.clear()
        step.run()
        assert passes == expected


def test_the_cuda_timer(monkeypatch):
    """Flushed, kept busy, and only then timed; the order is what counts."""
    calls = mock.Mock()
    calls.stop.synchronize.return_value = None
    calls.start.elapsed_time.return_value = 0.25
    device = _timing.Cuda.__new__(_timing.Cuda)
    device._flush, device._start, device._stop = calls.flush, calls.start, calls.stop
    monkeypatch.setattr(torch.cuda, "_sleep", calls.sleep)
    assert device.time(calls.run, 30.0) == 250.0
    assert [each[0] for each in calls.mock_calls] == [
        "flush.zero_", "sleep", "start.record", "run", "stop.record", "stop.synchronize", "start.elapsed_time",
    ]  # fmt: skip
    assert calls.sleep.call_args.args == (60_000,)


def test_kernels_are_counted(monkeypatch):
    """In the order in which they ran, without the marker, the host's events and annotations."""
    cuda, cpu = torch.profiler.DeviceType.CUDA, torch.profiler.DeviceType.CPU

    def event(name, start, device=cuda, annotation=False):
        duration = mock.Mock(start=start)
        duration.elapsed_us.return_value = 2.5
        result = mock.Mock(time_range=duration, device_type=device, is_user_annotation=annotation)
        result.name = name
        return result

    events = [event("second", 3), event("marker", 1), event("first", 2), event("aten::zeros", 0, cpu)]
    events.append(event("range", 0, annotation=True))
    profiler = mock.MagicMock()
    profiler.return_value.__enter__.return_value.events.side_effect = lambda: events
    monkeypatch.setattr(torch.profiler, "profile", profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench_gpu.torch, "zeros", lambda *sizes, device: None)
    assert bench_gpu.kernels_of(mock.Mock()) == [("first", 2.5), ("second", 2.5)]
    assert bench_gpu.launches(mock.Mock()) == {"launches": 2}
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        bench_gpu.kernels_of(mock.Mock())


@needs_cpu_kernels
def test_benchmark_command_line(tmp_path, monkeypatch, capsys):
    """Parts add to one file; kernels that cannot be measured fail a part, what others lack does not."""
    file = tmp_path / "bench_gpu.csv"
    monkeypatch.setattr(bench_gpu, "OTHER_CROSS_ENTROPIES", ())
    monkeypatch.setattr(bench_gpu, "COPY_BYTES", 3000)
    monkeypatch.setattr(bench_gpu, "COMPILED", cross_entropy("absent", obstacle=lambda shape, device: "x"))
    tiny = ["--device", "cpu", "--shapes", "6x4x10", "--dtypes", "float32", "--append", "--csv", str(file)]
    for part in ("small", "centroids", "times"):
        seconds = "60" if part == "small" else "0"
        assert bench_gpu.main([part, *tiny, "--backends", "cpu", "--seconds", seconds]) == 0
    rows = read_rows(file, Row)
    assert {row.mode for row in rows} == {WALL, CENTROID_STEP, bench_gpu.COPY, *bench_gpu.MODES}
    measured = {row.implementation for row in rows if row.median_us}
    assert measured >= {"cpu batch", "cpu sample", "cpu batch + centroids", "cpu CentroidSGD", "literal"}
    assert {row.note for row in rows if row.implementation not in measured} == {"x"}
    assert bench_gpu.main(["centroids", *tiny, "--backends", "cuda", "--seconds", "0"]) == 1
    assert "cuda CentroidSGD, centroid step at 6, 4, 10: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------


def part(name, code, limit=60.0):
    return Part(name, [sys.executable, "-c", code], limit)


def test_one_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE", 1.0)
    # Its child ignores the request to end, and would outlive it.
    child = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(99)
"""
    hanging = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
print("so far", flush=True)
time.sleep(99)
"""
    parts = [
        part("failing", "print('out'); raise SystemExit('no such thing')"),
        part("hanging", hanging, limit=5.0),
        Part("absent", ["/nonexistent/program"], 5),
        part("last", "print('hello {seconds}')", limit=40.0),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 90)
    assert outcomes[0].reason == "exit status 1: no such thing"
    assert outcomes[1].reason == "ended after its limit of 5 s, at: so far"
    assert "could not be started" in outcomes[2].reason
    assert outcomes[3].reason == ""
    assert (tmp_path / "last.log").read_text().endswith("hello 17\n")
    report = (tmp_path / "report.md").read_text()
    assert "| failing | failed |" in report
    assert "| last | ok |" in report
    orphan = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(orphan)
    assert gpu_report.run_parts(parts, tmp_path, 0)[3].reason == "no time was left for it"


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_parts(tmp_path):
    """Nothing but the last one can take the time of another; what is run is there, and takes these arguments."""
    parts = gpu_report.all_parts(tmp_path)
    assert sum(each.limit for each in parts[:-1]) < gpu_report.SECONDS - 60
    scripts = {each.name: each.command[1:] for each in parts if each.command[1].startswith(str(ROOT))}
    assert set(scripts) == {"small", "centroids", "scaling", "times"}
    for script, *arguments in scripts.values():
        command = [sys.executable, script, *(each.replace("{seconds}", "5") for each in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert "finds no CUDA device" in done.stderr


def test_command_line(tmp_path, monkeypatch):
    parts = [part("build", "pass"), part("good", "pass"), part("times", "raise SystemExit(3)")]
    monkeypatch.setattr(gpu_report, "all_parts", lambda out: parts)
    built = tmp_path / "work" / "site" / "ncmi_kernels"
    built.mkdir(parents=True)
    assert gpu_report.environment(tmp_path)["PYTHONPATH"].startswith(f"{tmp_path}/work/site")
    row = Row(
        B=128, C=100, M=512, dtype="float32", implementation="x", mode=FULL, median_us=5.0, peak_extra_bytes=2**20
    )
    write_rows(tmp_path / "bench_gpu.csv", [row], bench_gpu.COLUMNS)
    assert gpu_report.main(["--out", str(tmp_path), "--parts", "good"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "| 128, 100, 512 | float32 | forward+backward | 5.0 |" in report
    assert "| 128, 100, 512 | float32 | forward+backward | 1.0 |" in report
    assert built.exists()
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "exit status 3" in report
    assert "128, 100, 512" not in report, "figures of an earlier run"
    assert not built.exists(), "a package built earlier is not taken for this one"


@pytest.mark.parametrize("required", ["", "cuda"])
def test_a_required_backend_that_cannot_run_fails_the_gpu_tests(required):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    environment = {**os.environ, "NCMI_REQUIRE_BACKENDS": required}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "test_gpu.py"), "-k", "test_under_autocast"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if required else 0), done.stdout
    assert ("NCMI_REQUIRE_BACKENDS and cannot run" in done.stdout) is bool(required)


@needs_cpu_kernels
def test_the_sanitizer_sees_every_operator(monkeypatch):
    calls = sanitize_cases.run_all("cpu", "cpu", [(5, 3, 7)])
    assert all(calls[name] for name in sanitize_cases.SCHEMAS), calls
    monkeypatch.setattr(sanitize_cases, "run_all", lambda backend, device: Counter(loss=1))
    assert sanitize_cases.main([]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(sanitize_cases, "run_case", lambda *case: [torch.tensor([1.0, float("nan")])])
    with pytest.raises(RuntimeError, match="not finite"):
        sanitize_cases.run_all("cpu", "cpu", [(5, 3, 7)])
