"""The GPU benchmark and report, as far as they can be tried without a GPU."""

import json
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
import bench_scaling
import cases
import gpu_report
import gpu_results
import records
import sanitize_cases
from bench_gpu import Step
from cases import LITERAL, TINY, Implementation, Shape, batch
from conftest import relative
from gpu_report import FAILED, OK, ROOT, SKIPPED, Machine, Part
from gpu_results import (
    BACKWARD,
    CENTROID_STEP,
    FORWARD,
    FULL,
    FULL_SCALED,
    GRAPH,
    LAUNCHES_FORWARD,
    NO_GRAD,
    WALL,
    Row,
    Traffic,
)

from ncmi_kernels import available_backends

needs_cpu_kernels = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ kernels")
GPU = Machine({"device": "a GPU", "versions": {"pytest": "1"}})


def row(implementation="cuda batch", mode=FULL, shape=(128, 100, 512), dtype="float32", **values):
    machine = dict.fromkeys(("device", "driver", "torch", "cuda", "triton", "ncmi_kernels", "cpu_capability"), "x")
    B, C, M = shape
    return Row(
        **machine, date="2026-01-02", B=B, C=C, M=M, dtype=dtype, implementation=implementation, mode=mode, **values
    )


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
        (BATCH._replace(centre=False), FULL, 3 * Z + 2 * XI),
        (BATCH._replace(one_pass=True), NO_GRAD, 2 * Z + XI),
        (BATCH._replace(one_pass=True), FORWARD, 3 * Z + XI),
        (BATCH._replace(one_pass=True), BACKWARD, None),
        (BATCH._replace(one_pass=True), FULL, 3 * Z + XI),
        (BATCH._replace(one_pass=True), FULL_SCALED, 5 * Z + XI),
        (BATCH._replace(centroids=True), FULL, 5 * Z + 5 * XI),
    ],
)
def test_model_bytes(traffic, mode, expected):
    assert gpu_results.model_bytes((1000, 7, 50), 4, mode, traffic, cache_bytes=0) == expected


def test_model_bytes_of_a_batch_smaller_than_the_classes():
    few = gpu_results.model_bytes((10, 1000, 50), 4, FULL, BATCH, cache_bytes=0)
    assert few == gpu_results.model_bytes((10, 10, 50), 4, FULL, BATCH, cache_bytes=0)
    learnt = gpu_results.model_bytes((10, 1000, 50), 4, FULL, BATCH._replace(centroids=True), cache_bytes=0)
    assert learnt - few == 4 * 50 * (10 + 3 * 1000), "their gradient is of all classes"


def test_model_bytes_of_what_fits_the_cache_and_of_half_precision():
    def of(itemsize, mode, cache):
        return gpu_results.model_bytes((1000, 7, 50), itemsize, mode, BATCH._replace(one_pass=True), cache)

    assert of(4, NO_GRAD, Z) == Z + XI, "the centre's read comes from the cache"
    assert of(4, NO_GRAD, Z - 1) == 2 * Z + XI
    assert of(2, FULL, Z) == 3 * Z // 2 + 2 * XI, "a half precision's gradient waits for the backward pass"


# ------------------------------------------------------------------------------------------------------------
# Rows, tables, plots
# ------------------------------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path):
    file = tmp_path / "bench.csv"
    first = row(median_us=1.25, p20_us=1.0, p80_us=2.0, repetitions=3, launches=4, peak_extra_bytes=2**40)
    second = row(mode=FORWARD, note="out of memory, as was to be expected")
    assert records.read_rows(file, Row) == []
    records.write_rows(file, [first], append=True)
    records.write_rows(file, [second], append=True)
    assert file.read_text().count("implementation") == 1
    assert records.read_rows(file, Row) == [first, second]


def test_quantile():
    assert [records.quantile([4.0, 1.0, 3.0, 2.0], level) for level in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert records.quantile([7.0], 0.8) == 7.0


def test_tables():
    rows = [
        row("cross_entropy", median_us=10.0, gb_per_s=1234.4),
        row("cuda batch", median_us=12.34),
        row("absent", note="x is not installed"),
        row("cuda batch", WALL, median_us=40.0),
        row("cuda batch", LAUNCHES_FORWARD, launches=3),
        row("literal", peak_extra_bytes=3 * 2**20),
    ]
    times = gpu_results.times_table(rows).splitlines()
    assert times[0] == "| B, C, M | dtype | mode | cross_entropy | cuda batch |"
    assert times[2:] == ["| 128, 100, 512 | float32 | forward+backward | 10.0 (1234) | 12.3 |"]
    assert gpu_results.small_table(rows).splitlines()[2:] == [
        "| 128, 100, 512 | float32 | cuda batch | 40.0 |  | 3 |  |"
    ]
    assert gpu_results.memory_table(rows).splitlines()[2:] == ["| 128, 100, 512 | float32 | literal | 3.0 |"]
    assert gpu_results.notes(rows) == ["absent at (128, 100, 512) float32: x is not installed"]


def aims(rows):
    lines = [line.split(" | ") for line in gpu_results.aims_table(rows, ["cuda"]).splitlines()[2:]]
    return {line[1]: (line[3], line[4].removesuffix(" |")) for line in lines}


def test_aims():
    assert set(aims([]).values()) == {("unmeasured", "")}
    rows = [
        row("cuda batch", LAUNCHES_FORWARD, launches=3),
        row("cuda sample", LAUNCHES_FORWARD, launches=5),
        row("cuda batch + centroids", LAUNCHES_FORWARD, launches=9),  # no aim for learnt centroids
        row("triton batch", GRAPH, median_us=99.0),
        row("cuda batch", GRAPH, median_us=14.0),
        row("cuda batch", WALL, median_us=60.0),
        row("cross_entropy", WALL, median_us=50.0),
        row("cuda batch", FULL, peak_extra_bytes=2),
        row("literal", FULL, peak_extra_bytes=100),
        row("cuda sample", FULL, peak_extra_bytes=99, median_us=1.0),  # of a timed step
    ]
    found = aims(rows)
    assert found[LAUNCHES_FORWARD] == ("5", "no")
    assert found[gpu_results.LAUNCHES_BACKWARD] == ("unmeasured", "")
    assert found["graph replay of a full step"] == ("14 us", "yes")
    assert found["wall time / cross_entropy's"] == ("1.2", "yes")
    assert found["peak memory / the literal form's"] == ("0.02", "no")


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    import gpu_plots

    assert gpu_plots.main([str(tmp_path)]) == 1
    shapes = [(128, 100, 512), (4096, 100, 128)]
    rows = [
        row(name, mode, shape, dtype, median_us=float(shape[1]), gb_per_s=100.0)
        for name in ("cuda batch", "literal")
        for mode in (FULL, NO_GRAD)
        for shape in shapes
        for dtype in ("float32", "bfloat16")
    ]
    records.write_rows(tmp_path / "bench_gpu.csv", [*rows, row("absent", note="not installed")], append=True)
    assert gpu_plots.main([str(tmp_path)]) == 0
    names = {"no_grad_gb_per_s.png", "full_gb_per_s.png", "full_time.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


# ------------------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------------------


def part(name, code, limit=30.0, **settings):
    return Part(name, lambda seconds: [sys.executable, "-c", code], limit, **{"least": 0.0, "gpu": False, **settings})


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
        part("hanging", hanging, limit=3.0),
        Part("absent", lambda seconds: ["/nonexistent/program"], 5, least=0, gpu=False),
        part("last", "print('hello')"),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 60)
    assert [each.status for each in outcomes] == [FAILED, FAILED, FAILED, OK]
    assert outcomes[0].reason == "exit status 1: no such thing"
    assert outcomes[1].reason == "ended after its limit of 3 s, at: so far"
    assert 3 <= outcomes[1].seconds < 20
    assert "could not be started" in outcomes[2].reason
    assert (tmp_path / "last.log").read_text().endswith("hello\n")
    orphan = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(orphan)


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_is_missing_skips_a_part(tmp_path):
    gpu = part("gpu", "pass", gpu=True)
    tests = part("tests", "pass", modules=("pytest", "absent"), tools=("nothing",))
    outcomes = gpu_report.run_parts([gpu, tests], tmp_path, 60)
    assert [(each.status, each.reason) for each in outcomes] == [
        (SKIPPED, "no CUDA device"),
        (SKIPPED, "pytest and absent and nothing not found"),
    ]
    outcomes = gpu_report.run_parts([gpu, tests], tmp_path, 60, GPU)
    assert [(each.status, each.reason) for each in outcomes] == [(OK, ""), (SKIPPED, "absent and nothing not found")]


def test_later_parts_keep_their_least_time(tmp_path):
    given = {}

    def measuring(name, **settings):
        def command(seconds):
            given[name] = seconds
            return [sys.executable, "-c", "pass"]

        return Part(name, command, gpu=False, **settings)

    parts = [
        measuring("first", limit=100, least=1),
        measuring("second", limit=4, least=1),
        measuring("third", limit=100, least=6),
        measuring("fourth", limit=100, least=7),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 20)
    assert [each.status for each in outcomes] == [OK, OK, OK, OK]
    assert 5 < given["first"] <= 20 - 1 - 6 - 7
    assert 2 < given["second"] <= 4
    assert 9 < given["third"] <= 20 - 7
    outcomes = gpu_report.run_parts(parts, tmp_path, 5)
    assert [each.reason for each in outcomes] == ["no time was left for it"] * 4
    assert {each.status for each in outcomes} == {FAILED}


def test_nothing_runs_beside_a_measurement(tmp_path):
    mark = tmp_path / "mark"
    parts = [
        part("beside", f"import time; time.sleep(2); open({str(mark)!r}, 'w')", background=True),
        part("meanwhile", f"import os; assert not os.path.exists({str(mark)!r})"),
        part("measuring", f"import os; assert os.path.exists({str(mark)!r})", measures=True),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 60)
    assert [(each.name, each.status, each.reason) for each in outcomes] == [
        (name, OK, "") for name in ("beside", "meanwhile", "measuring")
    ]


def test_the_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = {each.name: each for each in gpu_report.all_parts(tmp_path, "python3")}
    assert sum(each.least for each in parts.values()) < gpu_report.SECONDS / 2, "one slow part must not starve the rest"
    for each in parts.values():
        command = each.command(100.0)
        scripts = [argument for argument in command if argument.endswith(".py") and argument != "setup.py"]
        assert all(Path(script).is_file() for script in scripts)
        assert each.name in ("tests", "build") or scripts
        if scripts and scripts[0].endswith("bench_gpu.py"):
            assert command[2] in bench_gpu.PARTS
            assert command[-2:] == ["--budget", "65"]
    assert {"copy", "times", "small", "memory", "centroids", "scaling", "profile"} <= set(parts)
    assert all(parts[name].measures for name in ("copy", "times", "small", "scaling"))
    # Its options are known to bench_scaling.py, which there stops for want of a device alone.
    with pytest.raises(SystemExit):
        bench_scaling.main(parts["scaling"].command(100.0)[2:])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_environment_of_the_parts(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/else/where")
    machine = Machine({"capability": "9.0"})
    before = gpu_report.environment(tmp_path, machine)
    assert before["PYTHONPATH"] == f"{ROOT}:/else/where"
    (tmp_path / "work" / "site" / "ncmi_kernels").mkdir(parents=True)
    after = gpu_report.environment(tmp_path, machine)
    assert after["PYTHONPATH"] == f"{tmp_path}/work/site:/else/where"
    assert after["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert after["NCMI_REQUIRE_BACKENDS"] == "triton,cuda"
    assert all(after[name].startswith(str(tmp_path)) for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu_report.environment(tmp_path, machine)["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_command_line(tmp_path, monkeypatch, capsys):
    parts = [part("environment", "pass"), part("good", "pass"), part("times", "raise SystemExit(3)")]
    monkeypatch.setattr(gpu_report, "all_parts", lambda out: parts)
    records.write_rows(tmp_path / "bench_gpu.csv", [row(median_us=5.0)], append=True)
    assert gpu_report.main(["--out", str(tmp_path), "--parts", "good"]) == 0
    assert "| 128, 100, 512 | float32 | forward+backward | 5.0 |" in (tmp_path / "report.md").read_text()
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "| good | ok |" in report
    assert "| times | failed |" in report
    assert "exit status 3" in report
    assert "5.0" not in report, "figures of an earlier run"
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path), "--parts", "nothing"])
    assert "expected some of environment good times" in capsys.readouterr().err


def test_a_package_built_earlier_is_not_taken_for_this_one(tmp_path):
    built = tmp_path / "work" / "site" / "ncmi_kernels"
    built.mkdir(parents=True)
    gpu_report.remove_old(tmp_path, [part("times", "pass")])
    assert built.exists()
    gpu_report.remove_old(tmp_path, [part("build", "pass")])
    assert not built.exists()


def test_looking_without_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "MODULES", ("torch", "pytest", "no_such_module"))
    assert gpu_report.look(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "no_such_module" in printed.splitlines()[-2]
    assert printed.splitlines()[-1] == f"no GPU: torch {torch.__version__} finds no CUDA device"
    facts = gpu_report.read_facts(tmp_path)
    assert facts["device"] == ""
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["no_such_module"] == ""


def test_looking_with_a_device(tmp_path, monkeypatch):
    properties = mock.Mock(major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    properties.name = "a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert gpu_report.look(tmp_path) == 0
    facts = gpu_report.read_facts(tmp_path)
    assert (facts["device"], facts["capability"], facts["devices"], facts["memory_gib"]) == ("a GPU", "9.0", 2, 80.0)
    assert Machine(facts).obstacle(part("x", "pass", gpu=True)) is None


def test_a_backend_that_cannot_run_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr("ncmi_kernels.available_backends", lambda: {**dict.fromkeys(("cpu", "triton")), "cuda": "why"})
    monkeypatch.setattr("ncmi_kernels._ops.operators", lambda name: None)
    assert gpu_report.check_backends() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "cannot run here: cuda: why"
    monkeypatch.setattr("ncmi_kernels.available_backends", lambda: dict.fromkeys(("cpu", "triton", "cuda")))
    assert gpu_report.check_backends() == 0


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


# ------------------------------------------------------------------------------------------------------------
# The benchmark
# ------------------------------------------------------------------------------------------------------------


class Scripted(bench_gpu.Cpu):
    """A device whose steps take 10, 20, 30, ... us."""

    def __init__(self):
        super().__init__()
        self.leads = []

    def time(self, run, lead_us):
        run()
        self.leads.append(lead_us)
        return 10.0 * (len(self.leads) % 5 + 1)

    def peak(self, run):
        run()
        return 12345


def cross_entropy(name="cross_entropy", **settings):
    return Implementation(name, lambda shape: torch.nn.CrossEntropyLoss(), **settings)


def make_bench(out, candidates, budget=0.0, device=None):
    bench = bench_gpu.Bench(device or Scripted(), out, (), budget)
    bench.candidates = candidates
    return bench


def measured(out):
    return records.read_rows(out / "bench_gpu.csv", Row)


class OutOfMemory(torch.nn.Module):
    def forward(self, z, y):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany bytes")


def test_times(tmp_path):
    (tmp_path / "copy.json").write_text(json.dumps({"gb_per_s": 0.5}))
    candidates = [
        cross_entropy(),
        cross_entropy("ours", kernels=True),
        cross_entropy("absent", obstacle=lambda shape, device: "absent is not installed"),
        Implementation("big", lambda shape: OutOfMemory()),
    ]
    bench_gpu.measure_times(make_bench(tmp_path, []), [(TINY, torch.float32)], candidates)
    rows = {(each.implementation, each.mode): each for each in measured(tmp_path)}
    assert len(rows) == 4 + 5 + 4 + 4, "an upstream gradient other than 1 is measured of the kernels alone"
    for (name, mode), each in rows.items():
        assert (each.B, each.C, each.M, each.dtype, each.torch) == (6, 4, 10, "float32", torch.__version__)
        if name in ("absent", "big"):
            assert each.note == ("absent is not installed" if name == "absent" else "out of memory")
            assert each.median_us is None
            continue
        assert each.note == ""
        assert each.repetitions == bench_gpu.MIN_ROUNDS
        assert each.p20_us <= each.median_us <= each.p80_us
        assert each.peak_extra_bytes == (12345 if mode == FULL else None)
        expected = 6 * 10 * 4 * {FULL: 3, FULL_SCALED: 3, BACKWARD: 2}.get(mode, 1)
        assert each.model_bytes == expected
        assert each.gb_per_s == pytest.approx(expected / each.median_us / 1e3, abs=0.05)
        assert each.share_of_copy == pytest.approx(expected / each.median_us / 1e3 / 0.5, abs=1e-4)


def test_what_was_measured_before_a_crash_is_kept(tmp_path):
    class Crash(BaseException):
        pass

    def explode(shape):
        if shape.B > TINY.B:
            raise Crash
        return torch.nn.CrossEntropyLoss()

    cases = [(TINY, torch.float32), (Shape(7, 4, 10), torch.float32)]
    with pytest.raises(Crash):
        bench_gpu.measure_times(make_bench(tmp_path, []), cases, [Implementation("x", explode)])
    assert {each.B for each in measured(tmp_path)} == {TINY.B}


def test_a_step_that_fails_late_is_left_out(tmp_path):
    class Late(torch.nn.Module):
        calls = 0

        def forward(self, z, y):
            Late.calls += 1
            if Late.calls > 6:
                raise RuntimeError("CUDA error: something\nsecond line")
            return z.sum()

    bench_gpu.measure_times(
        make_bench(tmp_path, []),
        [(TINY, torch.float32)],
        [cross_entropy(), Implementation("late", lambda shape: Late())],
        (FULL,),
    )
    first, late = measured(tmp_path)
    assert (first.note, first.repetitions) == ("", bench_gpu.MIN_ROUNDS)
    assert late.note == "RuntimeError: CUDA error: something"
    assert late.repetitions < bench_gpu.MIN_ROUNDS


@needs_cpu_kernels
def test_every_candidate_gives_a_loss_and_its_gradients():
    z, y = batch(TINY)
    ran = []
    for candidate in bench_gpu.candidates(["cpu"]):
        if candidate.compiled or candidate.obstacle(TINY, z.device):
            continue
        criterion, own = bench_gpu.build(candidate, TINY, z)
        for mode in gpu_results.MODES:
            step = Step(criterion, own, y, mode)
            step.prepare()
            step.run()
            step.release()
        assert len(step.wanted) == (2 if "centroids" in candidate.name else 1)
        ran.append(candidate.name)
    expected = ["cross_entropy", "cpu batch", "cpu sample", "cpu batch + centroids", "cpu batch, no centre"]
    assert set(ran) >= {*expected, "collapsed eager", "literal"}


@needs_cpu_kernels
def test_every_centroid_step_is_the_same_step():
    z, y = batch(TINY)
    moved = {}
    for candidate in bench_gpu.centroid_steps(["cpu"]):
        assert candidate.obstacle(TINY, z.device) is None
        stepper, own = bench_gpu.build(candidate, TINY, z)
        before = stepper.criterion.centroid_logits.detach().clone()
        step = Step(stepper, own, y, CENTROID_STEP)
        for _ in range(3):
            step.prepare()
            centre = stepper.criterion.center.clone()
            step.run()
            step.release()
            assert torch.equal(stepper.criterion.center, centre), "the centre moves in the network's step"
        assert own.grad is None
        moved[candidate.name] = stepper.criterion.centroid_logits.detach() - before
    names = ["cpu CentroidSGD", "cpu CentroidSGD after forward", "cpu kernels, autograd, SGD", "PyTorch, autograd, SGD"]
    assert list(moved) == names
    expected = moved["PyTorch, autograd, SGD"]
    assert expected.abs().max() > 0
    for change in moved.values():
        assert relative(change, expected) < 1e-3


def test_a_step_times_what_its_mode_says():
    passes = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            passes.append("forward")
            return z.sum()

        @staticmethod
        def backward(ctx, upstream):
            passes.append(f"backward {upstream.item()}")
            return upstream.expand(*TINY[::2])

    criterion = mock.Mock(side_effect=lambda z, y: Watched.apply(z))
    criterion.parameters.return_value = []
    z, y = batch(TINY)

    def timed(mode):
        step = Step(criterion, z, y, mode)
        step.prepare()
        passes.clear()
        step.run()
        return list(passes)

    assert timed(FORWARD) == timed(NO_GRAD) == ["forward"]
    assert timed(BACKWARD) == ["backward 1.0"]
    assert timed(FULL) == ["forward", "backward 1.0"]
    assert timed(FULL_SCALED) == ["forward", "backward 0.5"]


def test_an_input_that_is_overwritten_is_not_shared():
    z, _ = batch(TINY, dtype=torch.bfloat16)
    assert bench_gpu.build(cross_entropy(), TINY, z)[1] is z
    own = bench_gpu.build(cross_entropy(overwrites=True), TINY, z)[1]
    assert own.is_leaf
    assert own.requires_grad
    assert own.data_ptr() != z.data_ptr()
    assert torch.equal(own, z)


def test_slow_ones_sit_out_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_gpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench_gpu, "MAX_ROUNDS", 1000)

    class Slow(bench_gpu.Cpu):
        def time(self, run, lead_us):
            now[0] += run() or 0.0
            return 1.0

    timed = []
    for seconds in (0.001, 1.0):
        step = mock.Mock()
        step.run.side_effect = lambda seconds=seconds: seconds
        timed.append(bench_gpu.Timed(cross_entropy(), FULL, step))
    for _ in range(60):  # others, that keep their share of the time
        step = mock.Mock()
        step.run.side_effect = lambda: 0.02
        timed.append(bench_gpu.Timed(cross_entropy(), FULL, step))
    bench_gpu.time_steps(timed, Slow(), 100.0)
    assert now[0] >= 100.0
    assert bench_gpu.MIN_ROUNDS <= len(timed[1].samples) < 15
    assert len(timed[0].samples) > 40


def test_compiling_has_a_limit():
    def step(seconds):
        result = mock.Mock()
        result.run.side_effect = lambda: time.sleep(seconds)
        return result

    spare = bench_gpu.CompileTime(0.5, each=0.2)
    spare.first_step(step(0.01))
    with pytest.raises(TimeoutError, match="took longer than 0 s"):
        spare.first_step(step(5.0))
    with pytest.raises(TimeoutError, match="took longer"):
        spare.first_step(step(5.0))
    with pytest.raises(TimeoutError, match="took longer"):
        spare.first_step(step(5.0))
    with pytest.raises(TimeoutError, match="is spent"):
        spare.first_step(step(0.0))
    with pytest.raises(ValueError, match="wrong"):
        bench_gpu.CompileTime(1.0).first_step(mock.Mock(run=mock.Mock(side_effect=ValueError("wrong"))))


def test_small_memory_and_centroids(tmp_path):
    bench = make_bench(tmp_path, [cross_entropy(), LITERAL, cross_entropy("ours", kernels=True)], 60)
    bench_gpu.measure_small(bench, [(TINY, torch.float32)])
    rows = measured(tmp_path)
    assert [(each.implementation, each.mode) for each in rows] == [("cross_entropy", WALL), ("ours", WALL)]
    assert all(each.median_us > 0 for each in rows)
    (tmp_path / "bench_gpu.csv").unlink()
    bench_gpu.run_part("memory", bench, [TINY], [torch.float32])
    assert [(each.implementation, each.peak_extra_bytes) for each in measured(tmp_path)] == [
        (name, 12345) for name in ("cross_entropy", "literal", "ours")
    ]
    (tmp_path / "bench_gpu.csv").unlink()
    bench.centroid_steps = [cross_entropy("ours, step", kernels=True)]
    bench_gpu.run_part("centroids", bench, [TINY, Shape(6, 5, 10)], [torch.float32])
    rows = measured(tmp_path)
    assert [(each.implementation, each.C, each.mode) for each in rows] == [
        ("ours, step", C, CENTROID_STEP) for C in (4, 5)
    ]
    assert [each.model_bytes for each in rows] == [4 * (6 * 10 + 5 * C * 10) for C in (4, 5)]
    assert all(each.peak_extra_bytes == 12345 for each in rows)


def test_compile_runs_what_has_to_be_compiled(tmp_path, capsys):
    built = []

    def remember(name, **settings):
        def build(shape):
            built.append(name)
            if name == "broken":
                raise RuntimeError("no such thing")
            return torch.nn.CrossEntropyLoss()

        return Implementation(name, build, **settings)

    candidates = [
        remember("plain"),
        remember("broken", compiled=True),
        remember("compiled", compiled=True),
        remember("ours", kernels=True),
    ]
    bench = make_bench(tmp_path, candidates, 60)
    bench.centroid_steps = [remember("step", kernels=True), remember("PyTorch step")]
    bench_gpu.run_part("compile", bench, [TINY], [torch.float32])
    assert built == ["broken", "compiled", "ours", *["step"] * len(cases.CENTROID_SHAPES)]
    assert capsys.readouterr().out == "broken at 6x4x10 torch.float32: RuntimeError: no such thing\n"
    assert measured(tmp_path) == []


def test_copy(tmp_path):
    bench = make_bench(tmp_path, [])
    speed = bench_gpu.measure_copy(bench, 3000)
    kept = json.loads((tmp_path / "copy.json").read_text())
    assert kept["gb_per_s"] == speed == pytest.approx(2 * 3000 / 30.0 / 1e3)
    assert make_bench(tmp_path, []).copy_gb_per_s == speed


def test_the_cuda_timer(monkeypatch):
    """Flushed, kept busy, and only then timed; the order is what counts."""
    calls = mock.Mock()
    calls.stop.synchronize.return_value = None
    calls.start.elapsed_time.return_value = 0.25
    device = bench_gpu.Cuda.__new__(bench_gpu.Cuda)
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
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        bench_gpu.kernels_of(mock.Mock())


def test_no_gpu_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["times", "--out", str(tmp_path)]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "bench_gpu.csv").exists()


def test_a_mode_that_fails_leaves_the_others(tmp_path):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.sum()

        @staticmethod
        def backward(ctx, upstream):
            raise torch.OutOfMemoryError("CUDA out of memory")

    criterion = mock.Mock(spec=torch.nn.Module, side_effect=lambda z, y: NoBackward.apply(z))
    criterion.to.return_value = criterion
    criterion.parameters.return_value = []
    bench = make_bench(tmp_path, [Implementation("x", lambda shape: criterion, kernels=True)])
    bench_gpu.measure_times(bench, [(TINY, torch.float32)], bench.candidates, (FULL, NO_GRAD))
    full, no_grad = measured(tmp_path)
    assert (full.note, full.median_us) == ("out of memory", None)
    assert no_grad.note == ""
    assert no_grad.repetitions == bench_gpu.MIN_ROUNDS
    assert bench.failures == ["x, forward+backward: out of memory"]


def test_kernels_that_cannot_be_measured_fail_the_part(tmp_path, capsys):
    arguments = ["times", "--out", str(tmp_path), "--device", "cpu", "--shapes", "6x4x10", "--dtypes", "float32"]
    absent = cross_entropy("absent", obstacle=lambda shape, device: "not installed")
    with mock.patch.object(bench_gpu, "candidates", return_value=[absent]):
        assert bench_gpu.main([*arguments, "--budget", "0"]) == 0
    ours = cross_entropy("ours", kernels=True, obstacle=lambda shape, device: "not built")
    with mock.patch.object(bench_gpu, "candidates", return_value=[absent, ours]):
        assert bench_gpu.main([*arguments, "--budget", "0"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "5 could not be measured, the first: ours, forward: not built"


@needs_cpu_kernels
def test_benchmark_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "candidates", lambda names: [cases.kernels(*names)["batch"]])
    arguments = ["--device", "cpu", "--backends", "cpu", "--shapes", "6x4x10", "--dtypes", "float32", "--budget", "60"]
    assert bench_gpu.main(["small", "--out", str(tmp_path), *arguments]) == 0
    rows = {each.implementation: each for each in measured(tmp_path)}
    assert rows["cpu batch"].median_us > 0
    assert rows["cpu batch"].torch == torch.__version__


# ------------------------------------------------------------------------------------------------------------
# What compute-sanitizer runs
# ------------------------------------------------------------------------------------------------------------


@needs_cpu_kernels
def test_the_sanitizer_sees_every_operator(monkeypatch):
    calls = sanitize_cases.run_all("cpu", "cpu", [(5, 3, 7)])
    assert all(calls[name] for name in sanitize_cases.SCHEMAS), calls
    assert sanitize_cases._ops.operators("cpu").loss is torch.ops.ncmi_kernels.loss.default, "as it was before"
    monkeypatch.setattr(sanitize_cases, "run_all", lambda backend, device: Counter(loss=1))
    assert sanitize_cases.main([]) == 1


@needs_cpu_kernels
def test_the_sanitizer_refuses_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(sanitize_cases, "run_case", lambda *case: [torch.tensor([1.0, float("nan")])])
    with pytest.raises(RuntimeError, match="not finite"):
        sanitize_cases.run_all("cpu", "cpu", [(5, 3, 7)])
