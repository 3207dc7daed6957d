"""The benchmark of how costs grow: where it stops, what it draws, and that what it runs is what it says."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from ncmi_kernels import available_backends

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_scaling
import devices
import records
from bench_scaling import IMPLEMENTATIONS, Point, Row
from cases import (
    CROSS_ENTROPY_WITH_HEAD,
    LITERAL,
    NCMI_CENTROIDS,
    NCMI_LEARNT,
    NCMI_STATISTICS,
    SCALING_AXES,
    SCALING_BASE,
    TINY,
    Literal,
    Shape,
    batch,
)

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ kernels")
MIB = 2**20


def row(implementation, axis="C", size=10, **values):
    machine = dict.fromkeys(("device", "torch", "ncmi_kernels", "cpu_capability", "date", "backend"), "x")
    sizes = {**SCALING_BASE._asdict(), axis: size}
    return Row(
        **machine,
        threads=1,
        axis=axis,
        **sizes,
        dtype="float32",
        implementation=implementation.name,
        mode="x",
        **values,
    )


def test_each_axis_varies_one_size():
    points = bench_scaling.points_of(SCALING_BASE, SCALING_AXES)
    for axis in "CMB":
        sizes = [point.size for point in points if point.axis == axis]
        assert sizes == sorted(sizes)
        others = {tuple(getattr(p.shape, name) for name in "BCM" if name != axis) for p in points if p.axis == axis}
        assert others == {tuple(getattr(SCALING_BASE, name) for name in "BCM" if name != axis)}
    assert (min(SCALING_AXES["C"]), max(SCALING_AXES["C"])) == (10, 100_000)


def test_the_head_is_a_linear_layer_with_the_gradient_of_its_weight():
    z, y = batch(TINY)
    step = bench_scaling.make_step(CROSS_ENTROPY_WITH_HEAD, TINY, z.device)
    head = step.criterion.head
    assert head.weight.shape == (TINY.C, TINY.M)
    assert all(a is b for a, b in zip(step.wanted, (step.z, head.weight), strict=True))
    expected = F.cross_entropy(z.double() @ head.weight.double().T, y)
    assert relative(step.criterion(z, y), expected) < 1e-6


def test_what_is_said_of_the_centroids_is_so():
    z, y = batch(TINY)
    wanted = {each.name: bench_scaling.make_step(each, TINY, z.device).wanted for each in IMPLEMENTATIONS}
    assert len(wanted[NCMI_LEARNT.name]) == len(wanted[LITERAL.name]) == 1
    assert wanted[NCMI_CENTROIDS.name][1].shape == (TINY.C, TINY.M)
    fixed, statistics = NCMI_LEARNT.build(TINY), NCMI_STATISTICS.build(TINY)
    fixed(z, y)  # computes the same once, and keeps it
    assert all(torch.equal(a, b) for a, b in zip(statistics(z, y), fixed._stats_cache[-1], strict=True))
    kept = fixed._stats_cache
    fixed(z, y)
    assert fixed._stats_cache is kept


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, ""),
        (row(LITERAL, median_us=1e6, peak_extra_bytes=MIB), ""),
        (row(LITERAL, median_us=1.1e6, peak_extra_bytes=MIB), "time: a step would take up to 3.3 s, more than 3 s"),
        (row(LITERAL, median_us=1.0, peak_extra_bytes=16 * MIB), ""),
        (
            row(LITERAL, median_us=1.0, peak_extra_bytes=17 * MIB),
            "memory: up to 0.0 GiB, more than half of the 0.1 GiB",
        ),
        (row(LITERAL, median_us=1.0), ""),
    ],
)
def test_where_it_stops(before, expected):
    point = Point("C", SCALING_BASE._replace(C=30))  # three times the row before
    found = bench_scaling.obstacle(LITERAL, point, before, 3.0, 96 * MIB)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def run(tmp_path, capsys, *arguments):
    path, figure = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    threads = torch.get_num_threads()
    fixed = ["--base", "16x8x32", "--M", "--B", "--budget", "0", "--threads", "1"]
    try:
        assert bench_scaling.main([*fixed, "--csv", str(path), "--png", str(figure), *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    assert figure.read_bytes().startswith(b"\x89PNG")
    return records.read_rows(path, Row), capsys.readouterr().out


def test_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows, out = run(tmp_path, capsys, "--C", "16", "512", "--step-seconds", "1e-9")
    first, stopped = rows[: len(IMPLEMENTATIONS)], rows[len(IMPLEMENTATIONS) :]
    assert [each.implementation for each in first] == [each.name for each in IMPLEMENTATIONS]
    for each in first:
        assert (each.axis, each.B, each.C, each.M, each.backend, each.note) == ("C", 16, 16, 32, "cpu", "")
        assert each.repetitions >= 5  # those that are slow here
        assert 0 < each.p20_us <= each.median_us <= each.p80_us
    assert [each.C for each in stopped] == [512] * len(IMPLEMENTATIONS)
    assert all(each.note.startswith("time: ") and each.median_us is None for each in stopped)
    assert "16, 16, 32" in out
    assert "| time |" in out


def test_memory_grows_as_it_says():
    """Bytes of a step of each, by the shape: nothing of the classes for fixed centroids, C M else, B C M for one."""
    small, large = Shape(64, 512, 256), Shape(64, 4096, 256)
    with devices.memory_worker() as worker:
        peak = {
            (each.name, shape): worker.submit(bench_scaling.step_peak, each.name, shape, 1).result()
            for each in IMPLEMENTATIONS
            for shape in ((small,) if each is LITERAL else (small, large))
        }
    if peak[LITERAL.name, small] is None:
        pytest.skip("needs Linux with glibc 2.33")
    table = 4 * large.C * large.M
    assert peak[NCMI_LEARNT.name, large] == pytest.approx(peak[NCMI_LEARNT.name, small], abs=MIB // 8)
    assert peak[NCMI_LEARNT.name, large] < table / 8
    assert table <= peak[NCMI_STATISTICS.name, large] < 1.5 * table
    assert table <= peak[CROSS_ENTROPY_WITH_HEAD.name, large] < 2 * table
    assert table <= peak[NCMI_CENTROIDS.name, large] < 3 * table
    assert peak[LITERAL.name, small] > 3 * 4 * small.B * small.C * small.M


def test_an_end_that_a_cap_made_is_open():
    pytest.importorskip("matplotlib")
    rows = [
        row(each, axis, size, median_us=1e3 * size, peak_extra_bytes=size * MIB)
        for axis in "CM"
        for each in IMPLEMENTATIONS
        for size in (10, 100)
    ]
    rows.append(row(LITERAL, "C", 1000, note="time: too long"))
    figure = bench_scaling.draw(rows)
    panels = {
        (axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start): axes for axes in figure.axes
    }
    assert sorted(panels) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (_, column), axes in panels.items():
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        opened = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert [line.get_xydata().tolist() for line in opened] == ([[[100, 100]]] if column == 0 else [])
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line not in opened}
        assert lines == {label: [[10, 10], [100, 100]] for label in bench_scaling.LABELS.values()}
    assert panels[0, 0].get_title() == "B = 128, M = 512"
    assert panels[0, 1].get_title() == "B = 128, C = 1000"
    assert panels[1, 0].get_ylabel() == "peak extra memory of a step, MiB"


def test_kernels_that_fail_fail_the_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(bench_scaling, "memory_worker", nullcontext)
    arguments = ["--base", "16x8x32", "--M", "--B", "--C", "16", "--budget", "0"]
    for failing, status in ((LITERAL, 0), (NCMI_LEARNT, 1)):

        def measure(point, implementations, *rest, failing=failing):
            return [row_values(each, note="RuntimeError: x" * (each is failing)) for each in implementations]

        monkeypatch.setattr(bench_scaling, "measure", measure)
        assert bench_scaling.main(arguments) == status
    assert "ncmi batch, learnt at 16x16x32: RuntimeError: x" in capsys.readouterr().out


def row_values(implementation, note):
    return {"axis": "C", "B": 16, "C": 16, "M": 32, "implementation": implementation.name, "mode": "x", "note": note}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device: got cuda, and torch"),
        (["--C", "1", "10"], "--C: got 1, expected at least 2"),
        (["--C", "--M", "--B"], "--C, --M, --B: got no sizes"),
        (["--base", "3x4"], "--base"),
    ],
)
def test_options_are_checked(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_scaling.main(arguments)
    assert message in capsys.readouterr().err


class Gpu(devices.Cpu):
    """A device that measures memory itself."""

    def peak(self, run):
        run()
        return 54321


def test_a_heavy_step_leaves_the_light_ones_their_repetitions(monkeypatch):
    """Five literal steps take longer than the budget; the light ones have 20 rounds, and as many more as without it."""
    now = [0.0]
    monkeypatch.setattr(bench_scaling.time, "perf_counter", lambda: now[0])
    measured = (NCMI_LEARNT, LITERAL)

    class Clock(Gpu):
        def time(self, run, lead_us):
            seconds = 2.0 if isinstance(run.__self__.criterion, Literal) else 0.1
            now[0] += seconds
            return 1e6 * seconds

    for budget, least, most in ((0.0, 20, 20), (5.0, 45, 55)):
        notes = dict.fromkeys((each.name for each in measured), "")
        light, heavy = bench_scaling.measure(Point("C", TINY), measured, notes, Clock(), budget, None)
        assert least <= light["repetitions"] <= most
        assert heavy["repetitions"] == 5


def test_memory_of_a_gpu_is_its_own():
    point = Point("C", TINY)
    notes = dict.fromkeys((each.name for each in IMPLEMENTATIONS), "")
    found = bench_scaling.measure(point, IMPLEMENTATIONS, notes, Gpu(), 0.0, None)
    assert [each["peak_extra_bytes"] for each in found] == [54321] * len(IMPLEMENTATIONS)
    assert all(each["median_us"] > 0 for each in found)


def test_a_step_that_runs_out_of_memory_is_a_note(monkeypatch):
    def fail(implementation, shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_scaling, "make_step", fail)
    (found,) = bench_scaling.measure(Point("C", TINY), [LITERAL], {LITERAL.name: ""}, Gpu(), 0.0, None)
    assert found["note"] == "out of memory"
    assert "median_us" not in found
