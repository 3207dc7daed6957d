"""The benchmark of how costs grow: where it stops, and that what it runs is what it says."""

import sys
from pathlib import Path

import pytest
import torch

from ncmi_kernels import _timing, available_backends

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_scaling
import devices
import runner
from bench_scaling import BASE, IMPLEMENTATIONS, Point, mode_of
from cases import CROSS_ENTROPY_WITH_HEAD, LITERAL, NCMI_CENTROIDS, NCMI_LEARNT, NCMI_STATISTICS, TINY, Shape, batch
from records import Row, read_rows

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="no C++ kernels")
MIB = 2**20


def test_the_statistics_are_those_that_the_loss_keeps():
    z, y = batch(TINY)
    fixed, statistics = NCMI_LEARNT.build(TINY), NCMI_STATISTICS.build(TINY)
    fixed(z, y)
    assert all(
        torch.equal(a, b)
        for a, b in zip(statistics(z, y), fixed._fixed_table(z, fixed.centroid_logits, "cpu"), strict=True)
    )


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, ""),
        (Row(C=10, median_us=1e6, peak_extra_bytes=MIB), ""),
        (Row(C=10, median_us=1.1e6, peak_extra_bytes=MIB), "time: a step would take up to 3.3 s, more than 3 s"),
        (Row(C=10, median_us=1.0, peak_extra_bytes=16 * MIB), ""),
        (Row(C=10, median_us=1.0, peak_extra_bytes=17 * MIB), "memory: up to 0.0 GiB, more than half of the 0.1 GiB"),
        (Row(C=10, median_us=1.0), ""),
    ],
)
def test_where_it_stops(before, expected):
    point = Point("C", BASE._replace(C=30))  # three times the row before
    found = bench_scaling.obstacle(point, before, 3.0, 96 * MIB)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_command_line(tmp_path):
    """It stops once, and goes no further; the axis is varied alone."""
    file, figure, threads = tmp_path / "scaling.csv", tmp_path / "scaling.png", torch.get_num_threads()
    sizes = ["--base", "16x8x32", "--C", "512", "16", "1024", "--M", "--B", "64"]
    caps = ["--seconds", "0", "--threads", "1", "--step-seconds", "1e-9"]
    try:
        assert bench_scaling.main([*sizes, *caps, "--csv", str(file), "--png", str(figure)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(file, Row)
    names = [each.name for each in IMPLEMENTATIONS]
    assert [row.implementation for row in rows] == names * 3
    assert [(row.axis, row.B, row.C, row.M) for row in rows[:: len(names)]] == [
        ("C", 16, 16, 32), ("C", 16, 512, 32), ("B", 64, 8, 32),
    ]  # fmt: skip
    for row in rows:
        stopped = row.C == 512
        assert row.note.startswith("time: ") == stopped
        assert stopped or 0 < row.p20_us <= row.median_us <= row.p80_us
        assert (row.mode == "statistics") == (row.implementation == NCMI_STATISTICS.name)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_memory_grows_as_it_says():
    """Bytes of a step of each, by the shape: nothing of the classes for fixed centroids, C M else, B C M for one."""
    small, large = Shape(64, 512, 256), Shape(64, 4096, 256)
    with devices.memory_worker() as worker:
        peak = {
            (each.name, shape): worker.submit(runner.cpu_peaks, each.name, mode_of(each), shape, 1).result()
            for each in IMPLEMENTATIONS
            for shape in ((small,) if each is LITERAL else (small, large))
        }
    if peak[LITERAL.name, small][0] is None:
        pytest.skip("needs Linux with glibc 2.33")
    assert peak[LITERAL.name, small][0] > 3 * 4 * small.B * small.C * small.M
    later = {key: peaks[1] for key, peaks in peak.items()}
    table = 4 * large.C * large.M
    assert later[NCMI_LEARNT.name, large] == pytest.approx(later[NCMI_LEARNT.name, small], abs=MIB // 8)
    assert later[NCMI_LEARNT.name, large] < table / 8
    assert table <= later[NCMI_STATISTICS.name, large] < 1.5 * table
    assert table <= later[CROSS_ENTROPY_WITH_HEAD.name, large] < 2 * table
    assert table <= later[NCMI_CENTROIDS.name, large] < 3 * table


def test_a_step_that_fails_is_a_note_and_stops_the_axis(monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scaling = bench_scaling.Scaling(_timing.Device(), None, 5.0)
    monkeypatch.setattr(bench_scaling, "IMPLEMENTATIONS", (NCMI_LEARNT,))
    monkeypatch.setattr(runner.Step, "run", fail)
    (row,) = scaling.measure(Point("C", TINY), 0.0)
    assert (row.note, row.median_us) == ("out of memory", None)
    assert scaling.measure(Point("C", TINY._replace(C=8)), 0.0) == []
    assert len(scaling.measure(Point("B", TINY), 0.0)) == 1
