"""What decides a published number: the implementations, ratios, quantiles, shares of time, memory.

And the cases for pytest-benchmark, skipped unless asked for:
pytest tests/test_benchmarks.py --benchmark-only --benchmark-autosave
"""

import ctypes
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from ncmi_kernels import NCMILoss, _timing, available_backends, reference
from ncmi_kernels._timing import Entry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_loss
import cases
import devices
import records
import runner
from cases import (
    COMPILED_CROSS_ENTROPY,
    CROSS_ENTROPY,
    CROSS_ENTROPY_WITH_HEAD,
    EAGER,
    FORWARD,
    FULL,
    IMPLEMENTATIONS,
    KERNELS,
    LINEAR_CROSS_ENTROPY,
    LITERAL,
    NCMI_BATCH,
    NCMI_CENTROIDS,
    NCMI_FOCUS,
    NCMI_FOCUS_CENTROIDS,
    NCMI_SAMPLE,
    NCMI_SEVERAL_CENTROIDS,
    NO_GRAD,
    SHAPES,
    TINY,
    WITH_PRODUCTS,
    Shape,
)
from devices import CPU

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"no C++ kernels: {available_backends()['cpu']}"
)

MIB = 2**20


def slug(implementation):
    return implementation.name.replace(" + ", "+").replace(" ", "-")


def build(implementation, shape):
    obstacle = implementation.obstacle(shape, CPU)
    if obstacle:
        pytest.skip(obstacle)
    return implementation.build(shape)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worker():
    with devices.memory_worker() as pool:
        yield pool


# ------------------------------------------------------------------------------------------------------------
# The implementations are what their names say
# ------------------------------------------------------------------------------------------------------------


def two_steps(criterion):
    """Losses and gradients of two batches; the second one uses the centre that the first one set."""
    results = []
    for seed in (0, 1):
        z, y = cases.batch(TINY, seed)
        loss = criterion(z + seed, y)
        loss.backward()
        results.append((loss.detach(), z.grad))
    return results


OTHER_LOSSES = (CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, CROSS_ENTROPY_WITH_HEAD, NCMI_SAMPLE, *WITH_PRODUCTS)


@pytest.mark.parametrize("implementation", [each for each in IMPLEMENTATIONS if each not in OTHER_LOSSES], ids=slug)
def test_the_same_loss(implementation):
    criterion, literal = build(implementation, TINY), LITERAL.build(TINY)
    if isinstance(criterion, NCMILoss):  # some start from centroids of their own
        literal.ncmi.load_state_dict(criterion.state_dict())
    wanted = [each for each in criterion.parameters() if each.requires_grad]
    assert len(wanted) == (implementation is NCMI_CENTROIDS)
    for (loss, grad), (expected_loss, expected_grad) in zip(two_steps(criterion), two_steps(literal), strict=True):
        assert relative(loss, expected_loss) < 1e-4
        assert relative(grad, expected_grad) < 1e-4
    assert all(each.grad.abs().max() > 0 for each in wanted)


def test_other_losses():
    z, y = cases.batch(TINY)
    torch.testing.assert_close(CROSS_ENTROPY.build(TINY)(z, y), F.cross_entropy(z, y))
    torch.testing.assert_close(build(COMPILED_CROSS_ENTROPY, TINY)(z, y), F.cross_entropy(z, y))
    for with_head in (CROSS_ENTROPY_WITH_HEAD, LINEAR_CROSS_ENTROPY):
        head = with_head.build(TINY)
        (weight,) = head.parameters()
        assert weight.shape == (TINY.C, TINY.M)
        torch.testing.assert_close(head(z, y), F.cross_entropy(z @ weight.T, y))
    for with_focus, learnt in ((NCMI_FOCUS, False), (NCMI_FOCUS_CENTROIDS, True)):
        focus = with_focus.build(TINY)
        assert (focus.options.separation_focus, focus.centroid_logits.requires_grad) == (10, learnt)
    several = NCMI_SEVERAL_CENTROIDS.build(TINY)
    assert several.ncmi.centroid_logits.shape == (4 * several.classes, TINY.M)
    assert several(z, y) == several.ncmi(z, y % several.classes)
    sample = NCMI_SAMPLE.build(TINY)
    assert sample.ratio == "sample"
    centre = z.detach().mean(dim=0)
    expected = reference.loss(z, y, sample.centroid_logits, centre, None, sample.options, literal=True)
    assert relative(sample(z, y), expected) < 1e-4


def test_plain_pytorch_computes_log_q_once(monkeypatch):
    criterion, (z, y) = build(EAGER, TINY), cases.batch(TINY)
    activate, rows = reference.log_activation, []

    def counted(x, activation):
        rows.append(len(x))
        return activate(x, activation)

    monkeypatch.setattr(reference, "log_activation", counted)
    for _ in range(2):
        criterion(z, y).backward()
    assert rows == [TINY.B] * 2  # and none of TINY.C


# ------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------


def test_quantiles():
    values = [random.Random(0).random() for _ in range(24)]
    found = _timing.spread(values)
    expected = [np.median(values), *np.quantile(values, (0.2, 0.8))]
    assert [found[name] for name in ("median_us", "p20_us", "p80_us")] == pytest.approx(expected)
    assert found["repetitions"] == 24
    assert set(_timing.spread([7.0]).values()) == {1, 7.0}
    assert _timing.spread([]) == {}


def test_rows_survive_the_file(tmp_path):
    file, columns = tmp_path / "bench.csv", ("B", "implementation", "median_us", "launches", "note")
    first = records.Row(B=3, implementation="a, b", median_us=1.25, launches=4)
    second = records.Row(note="out of memory, as was to be expected")
    assert records.read_rows(file, records.Row) == []
    records.write_rows(file, [first], columns, append=True)
    records.write_rows(file, [second], columns, append=True)
    assert records.read_rows(file, records.Row) == [first, second]
    records.write_rows(file, [second], columns)
    assert records.read_rows(file, records.Row) == [second]


# ------------------------------------------------------------------------------------------------------------
# Ratios
# ------------------------------------------------------------------------------------------------------------


def entries_of(*rounds, warm_up=3):
    """Entries "0", "1", ... whose steps took these times; a round is as long as those that took part."""
    entries = [Entry(str(index)) for index in range(max(map(len, rounds)))]
    for number, times in enumerate(rounds, start=-warm_up):
        for entry, time in zip(entries, times, strict=False):
            entry.rounds[number] = {FULL: time}
    return entries


def test_ratios_are_of_rounds_next_to_each_other():
    """A machine that is slower for a while leaves the ratio as it is."""
    cross_entropy, ours = entries_of(*[(2.0 * speed, 3.0 * speed) for speed in (1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4)])
    assert ours.ratio(cross_entropy, FULL, before=3) == ours.ratio(cross_entropy, FULL) == 1.5
    assert cross_entropy.ratio(cross_entropy, FULL, before=3) == 1
    row = runner.row_of(ours, FULL)
    assert (row.median_us, row.repetitions) == (12, 10)  # without those that warm up


def test_what_a_slow_step_does_to_its_round_is_not_in_its_ratio():
    """It makes the cross_entropy after it slower: here twice as slow."""
    cross_entropy, literal = entries_of((2.0,), (2.0,), (9.0,), (4.0, 100.0), (2.0,), (2.0,), (4.0, 100.0), (2.0,))
    assert literal.ratio(cross_entropy, FULL, before=3) == 50
    assert literal.ratio(cross_entropy, FULL) == 25


def test_the_ratios_of_bench_loss(worker, monkeypatch):
    """Each mode to cross_entropy's of that mode, focus to the head; and what cannot be measured is noted."""
    measured = (CROSS_ENTROPY, LITERAL, CROSS_ENTROPY_WITH_HEAD, NCMI_FOCUS, NCMI_BATCH)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    times = {"cross_entropy": 2.0, "cross_entropy with head": 40.0, "ncmi focus": 50.0, "ncmi batch": 3.0}

    def rounds(entries, *_, **__):
        for entry in entries:
            for number in range(5 if entry.take else 0):
                laps = {FORWARD: 1.0, FULL: 2.0, NO_GRAD: 0.5}
                entry.rounds[number] = {mode: factor * times[entry.name] for mode, factor in laps.items()}

    monkeypatch.setattr(bench_loss, "run_rounds", rounds)
    rows = bench_loss.measure((TINY, 1), 0.0, worker, measured)
    assert [(row.implementation, row.mode) for row in rows] == [
        (each.name, mode) for each in measured for mode in bench_loss.MODES
    ]
    for row in rows:
        if row.implementation == "literal":
            assert row.note == "memory: about 0 GiB, more than half of the 0 GiB that are free"
            assert (row.median_us, row.ratio_to_cross_entropy) == (None, None)
        else:
            assert row.ratio_to_cross_entropy == times[row.implementation] / 2
            assert row.ratio_to_head == (1.25 if row.implementation == "ncmi focus" else None)
    assert runner.failures(rows, cases.OUR_NAMES) == 0
    assert runner.failures([records.Row(implementation="ncmi batch", note="x")], cases.OUR_NAMES) == 1


def test_bench_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_loss, "IMPLEMENTATIONS", (CROSS_ENTROPY, NCMI_CENTROIDS, LITERAL))
    file = tmp_path / "out.csv"
    assert bench_loss.main(["--shapes", str(TINY), "--threads", "1", "--seconds", "0", "--csv", str(file)]) == 0
    rows = records.read_rows(file, records.Row)
    assert [row.mode for row in rows] == [*bench_loss.MODES] * 3
    for row in rows:
        assert (row.B, row.C, row.M, row.dtype, row.threads, row.torch) == (*TINY, "float32", 1, torch.__version__)
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.repetitions >= (1 if row.implementation == "literal" else bench_loss.LEAST_ROUNDS)
    assert "6, 4, 10" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Rounds
# ------------------------------------------------------------------------------------------------------------


def rounds_of(monkeypatch, steps, seconds, **how):
    """Which rounds each entry takes part in, whose steps take so many seconds; and the time in all."""
    now = [0.0]
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])

    def step(seconds):
        now[0] += seconds
        return {FULL: 1e6 * seconds}

    entries = [Entry(name, lambda s=s: step(s), **more) for name, (s, more) in steps.items()]
    _timing.run_rounds(entries, seconds, **{"least": 20, **how})
    return {entry.name: list(entry.rounds) for entry in entries}, now[0]


QUICK = (0.01, {})
SLOW = (0.5, {"share": 0.15})
HEAVY = (4.0, {"share": 0.15, "heavy": True})


def test_slow_ones_sit_out_rounds(monkeypatch):
    taken, spent = rounds_of(monkeypatch, {"quick": QUICK, "slow": SLOW}, 20.0, warm_up=3)
    assert taken["quick"][:4] == [-3, -2, -1, 0]
    assert min(taken["slow"]) >= 0
    assert 0.1 * spent < 0.5 * len(taken["slow"]) < 0.2 * spent
    taken, _ = rounds_of(monkeypatch, {"quick": QUICK, "slow": SLOW}, 20.0, each=5)
    assert taken["slow"][:5] == [0, 1, 2, 3, 4]
    assert taken["slow"][5] > 100
    # Where each would sit out for good, all of them go on.
    taken, spent = rounds_of(monkeypatch, {name: (0.1, {"share": 0.05}) for name in "ab"}, 10.0, each=5)
    assert spent == pytest.approx(10, abs=0.3)
    assert len(taken["a"]) == len(taken["b"])


def test_the_time_of_a_heavy_one_is_given_back(monkeypatch):
    for others in ({"quick": (0.1, {})}, {"quick": QUICK, "slow": SLOW}):
        alone, _ = rounds_of(monkeypatch, others, 20.0)
        taken, spent = rounds_of(monkeypatch, {**others, "heavy": HEAVY}, 20.0)
        for name, rounds in alone.items():
            assert len(taken[name]) == pytest.approx(len(rounds), abs=1)
        assert spent == pytest.approx(20 + 4.0 * len(taken["heavy"]), abs=0.7)


def test_a_group_has_its_share_and_its_rounds_in_common(monkeypatch):
    more = {"share": 0.15, "group": "g"}
    taken, spent = rounds_of(monkeypatch, {"quick": QUICK, "a": (0.3, more), "b": (0.2, more)}, 20.0)
    assert taken["a"] == taken["b"]
    assert 0.1 * spent < 0.5 * len(taken["a"]) < 0.2 * spent


def test_a_step_that_fails_late_is_left_out():
    calls = []

    def late():
        calls.append(None)
        if len(calls) > 6:
            raise RuntimeError("CUDA error: something\nsecond line")
        return {FULL: 1.0}

    entries = [Entry("late", late), Entry("other", lambda: {FULL: 2.0})]
    _timing.run_rounds(entries, 0.0, least=20)
    assert (entries[0].note, len(entries[0].rounds)) == ("RuntimeError: CUDA error: something", 6)
    assert (entries[1].note, len(entries[1].rounds)) == ("", 20)
    entries[0].fail(torch.OutOfMemoryError("CUDA out of memory.\nmany bytes"))
    assert entries[0].note == "out of memory"


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def allocate_four_mib():
    malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
    malloc.restype = ctypes.c_void_p
    malloc.argtypes = (ctypes.c_size_t,)
    free.argtypes = (ctypes.c_void_p,)
    for _ in range(2):  # one after the other: at once there are no more than four
        tensor = torch.empty(2 * MIB, dtype=torch.uint8)
        free(malloc(2 * MIB))
        del tensor


def peak_of_four_mib():
    return [devices.peak_of(allocate_four_mib) for _ in range(3)]


def test_memory_counts_tensors_and_malloc(worker):
    for peak in worker.submit(peak_of_four_mib).result():
        if peak is None:
            pytest.skip("needs Linux with glibc 2.33")
        assert peak == pytest.approx(4 * MIB, abs=MIB // 16)


@pytest.mark.parametrize("shape", [Shape(256, 1000, 1000), Shape(64, 4000, 512), Shape(4096, 4000, 16)], ids=str)
@pytest.mark.parametrize("implementation", KERNELS, ids=slug)
def test_memory_is_linear(implementation, shape, worker):
    first, later = worker.submit(runner.cpu_peaks, implementation.name, FULL, shape, 1).result()
    if first is None:
        pytest.skip("needs Linux with glibc 2.33")
    bound = 4 * (shape.B * shape.M + shape.C * shape.M) * 4 + MIB
    too_large = min(shape.B * shape.C * shape.M, 4096 * 4000)  # the last shape shows a [B, C] tensor too
    assert bound < 4 * too_large
    gradient = 4 * shape.B * shape.M
    assert gradient <= later <= bound
    assert gradient <= first <= bound


# ------------------------------------------------------------------------------------------------------------
# For pytest-benchmark: in one thread, so that the runs of different machines compare.
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FULL, NO_GRAD])
@pytest.mark.parametrize(
    ("shape", "implementation"),
    [
        pytest.param(shape, implementation, id=f"{shape}-{slug(implementation)}")
        for shape in SHAPES
        for implementation in IMPLEMENTATIONS
    ],
)
def test_speed(benchmark, shape, implementation, mode):
    torch.set_num_threads(1)
    torch.compiler.reset()
    benchmark.group = f"{shape} {mode}"
    benchmark.extra_info.update(implementation=implementation.name, **devices.describe_machine())
    criterion, (z, y) = build(implementation, shape), cases.batch(shape)

    def call():
        z.grad = None
        criterion.zero_grad()
        with torch.set_grad_enabled(mode == FULL):
            loss = criterion(z, y)
        if mode == FULL:
            loss.backward()
        return loss

    if implementation.heavy:
        loss = benchmark.pedantic(call, rounds=2)
    else:
        call()  # compiles
        loss = benchmark(call)
    assert bool(loss.isfinite()), "a fast wrong answer"
    assert mode == NO_GRAD or (bool(z.grad.isfinite().all()) and bool(z.grad.any()))
