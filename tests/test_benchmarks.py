"""The benchmark's own parts on a tiny shape, the memory of a step, and the cases for pytest-benchmark.

The last are skipped unless asked for: pytest tests/test_benchmarks.py --benchmark-only --benchmark-autosave
"""

import argparse
import csv
import ctypes
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ncmi_kernels import NCMILoss, available_backends, reference

if importlib.util.find_spec("rich") is None:
    pytest.skip("the benchmark needs rich", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_loss
import cases
import devices
from cases import (
    COMPILED_CROSS_ENTROPY,
    CROSS_ENTROPY,
    CROSS_ENTROPY_WITH_HEAD,
    EAGER,
    IMPLEMENTATIONS,
    KERNELS,
    LITERAL,
    NCMI_CENTROIDS,
    NCMI_FOCUS,
    NCMI_SAMPLE,
    SHAPES,
    TINY,
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


def two_steps(criterion):
    """Losses and gradients of two batches; the second one uses the centre that the first one set."""
    results = []
    for seed in (0, 1):
        z, y = cases.batch(TINY, seed)
        loss = criterion(z + seed, y)
        loss.backward()
        results.append((loss.detach(), z.grad))
    return results


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------
# The implementations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=slug)
def test_gives_a_loss_and_a_gradient(implementation):
    criterion = build(implementation, TINY)
    z, y = cases.batch(TINY)
    loss = criterion(z, y)
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    wanted = [z, *(parameter for parameter in criterion.parameters() if parameter.requires_grad)]
    for tensor in wanted:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0
    assert len(wanted) == (2 if implementation in (NCMI_CENTROIDS, CROSS_ENTROPY_WITH_HEAD) else 1)


OTHER_LOSSES = (CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, CROSS_ENTROPY_WITH_HEAD, NCMI_SAMPLE, NCMI_FOCUS)


@pytest.mark.parametrize("implementation", [each for each in IMPLEMENTATIONS if each not in OTHER_LOSSES], ids=slug)
def test_the_same_loss(implementation):
    criterion, literal = build(implementation, TINY), LITERAL.build(TINY)
    if isinstance(criterion, NCMILoss):  # some start from centroids of their own
        literal.ncmi.load_state_dict(criterion.state_dict())
    expected = two_steps(literal)
    for (loss, grad), (expected_loss, expected_grad) in zip(two_steps(criterion), expected, strict=True):
        assert relative_error(loss, expected_loss) < 1e-4
        assert relative_error(grad, expected_grad) < 1e-4


def test_cross_entropy_compiled():
    criterion, (z, y) = build(COMPILED_CROSS_ENTROPY, TINY), cases.batch(TINY)
    torch.testing.assert_close(criterion(z, y), F.cross_entropy(z, y))


def test_without_a_compiler_what_needs_one_is_noted(worker, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bench_loss, "IMPLEMENTATIONS", (CROSS_ENTROPY, COMPILED_CROSS_ENTROPY))
    rows = bench_loss.measure(TINY, 1, 0.1, worker)
    assert [row.note for row in rows] == [""] * 3 + ["torch.compile needs a C++ compiler (no-such-compiler)"] * 3
    assert [row.median_us is None for row in rows] == [False] * 3 + [True] * 3


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


def test_focus_and_the_head_that_it_replaces():
    criterion, head = build(NCMI_FOCUS, TINY), build(CROSS_ENTROPY_WITH_HEAD, TINY).head
    assert (criterion.options.separation_focus, criterion.centroid_logits.requires_grad) == (10, False)
    assert [parameter.shape for parameter in head.parameters()] == [(TINY.C, TINY.M)]


def test_ratio_by_sample():
    criterion = NCMI_SAMPLE.build(TINY)
    assert criterion.ratio == "sample"
    (loss, grad), _ = two_steps(criterion)
    z, y = cases.batch(TINY)
    expected = reference.loss(
        z, y, criterion.centroid_logits, z.detach().mean(dim=0), None, criterion.options, literal=True
    )
    expected.backward()
    assert relative_error(loss, expected.detach()) < 1e-4
    assert relative_error(grad, z.grad) < 1e-4


def test_shape_text():
    assert [Shape.parse(str(shape)) for shape in SHAPES] == list(SHAPES)
    for text in ("256x1000", "0x3x4", "4x1x4", "4x3x4x5", "axbxc"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}', expected BxCxM"):
            Shape.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: got 0, expected at least 1"),
        (["--threads", "1", "two"], "--threads: invalid integer value: 'two'"),
        (["--shapes", "3x4"], "--shapes: got '3x4', expected BxCxM"),
        (["--budget", "-1"], "--budget: got -1, expected at least 0"),
        (["--budget", "nan"], "--budget: got nan, expected at least 0"),
        (["--csv", "no-such-directory/out.csv"], "no-such-directory is not a directory"),
    ],
)
def test_options_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_loss.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The measurement
# ------------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys, monkeypatch):
    measured = [each for each in IMPLEMENTATIONS if not each.compiled]  # which takes seconds
    monkeypatch.setattr(bench_loss, "IMPLEMENTATIONS", measured)
    monkeypatch.setattr(bench_loss, "MAX_ROUNDS", bench_loss.MIN_ROUNDS + 2)
    file = tmp_path / "out.csv"
    bench_loss.main(["--shapes", str(TINY), "--threads", "1", "--budget", "6", "--csv", str(file)])

    table = capsys.readouterr().out
    assert "6 x 4 x 10" in table
    assert all(implementation.name in table for implementation in measured)
    with file.open(newline="") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    columns = (
        "device torch ncmi_kernels cpu_capability date B C M dtype threads implementation mode repetitions "
        "median_us p20_us p80_us ratio_to_cross_entropy ratio_to_head peak_extra_bytes later_peak_extra_bytes "
        "minor_faults_per_step note"
    )
    assert reader.fieldnames == columns.split()
    assert [(row["implementation"], row["mode"]) for row in rows] == [
        (implementation.name, mode) for implementation in measured for mode in bench_loss.MODES
    ]
    for row in rows:
        assert (row["B"], row["C"], row["M"], row["dtype"], row["threads"]) == (
            "6",
            "4",
            "10",
            "float32",
            "1",
        )
        assert 1 <= int(row["repetitions"]) <= bench_loss.MAX_ROUNDS
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert float(row["ratio_to_cross_entropy"]) > 0
        assert (row["ratio_to_head"] != "") == (row["implementation"] == NCMI_FOCUS.name)
        if row["implementation"] == CROSS_ENTROPY.name:
            assert int(row["repetitions"]) >= bench_loss.MIN_ROUNDS
            assert float(row["ratio_to_cross_entropy"]) == 1


def kept(names, *rounds):
    """The forward rows of implementations whose steps took these times; a round is as long as those that took part."""
    measured, keeper = [bench_loss.Measurement(each) for each in names], bench_loss.Keeper()
    for number, times in enumerate(rounds, start=-3):  # the first three warm up
        steps = [dict.fromkeys(bench_loss.MODES, bench_loss.Sample(time, 0)) for time in times]
        keeper.keep(measured[: len(times)], steps, number)
    return [bench_loss._summary(each, "forward") for each in measured]


def test_ratios_are_of_rounds_next_to_each_other():
    """A machine that is slower for a while leaves the ratio as it is."""
    rounds = [(3.0 * speed, 2.0 * speed) for speed in (1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4)]
    ours, cross_entropy = kept((cases.NCMI_BATCH, CROSS_ENTROPY), *rounds)
    assert (ours["ratio_to_cross_entropy"], cross_entropy["ratio_to_cross_entropy"]) == (1.5, 1)
    assert (ours["median_us"], ours["repetitions"], ours["ratio_to_head"]) == (12, 10, None)


def test_what_a_slow_step_does_to_its_round_is_not_in_its_ratio():
    """It makes the cross_entropy after it slower: here twice as slow."""
    rounds = [(2.0,), (2.0,), (9.0,), (4.0, 100.0), (2.0,), (2.0,), (4.0, 100.0), (2.0,)]
    cross_entropy, literal = kept((CROSS_ENTROPY, LITERAL), *rounds)
    assert (literal["ratio_to_cross_entropy"], literal["repetitions"]) == (50, 2)
    assert (cross_entropy["ratio_to_cross_entropy"], cross_entropy["median_us"]) == (1, 2)


def test_focus_is_beside_the_head_in_every_round():
    names = (CROSS_ENTROPY, CROSS_ENTROPY_WITH_HEAD, NCMI_FOCUS)
    *_, focus = kept(names, (2.0,), (2.0,), (2.0,), (2.0, 40.0, 50.0), (2.0,), (2.0, 80.0, 100.0))
    assert (focus["ratio_to_head"], focus["ratio_to_cross_entropy"]) == (1.25, 37.5)


# ------------------------------------------------------------------------------------------------------------
# Rounds
# ------------------------------------------------------------------------------------------------------------


def rounds_of(monkeypatch, seconds, deadline, **how):
    """How many rounds each implementation takes part in, whose steps take so many seconds; and the time in all."""
    now = [0.0]
    monkeypatch.setattr(cases.time, "perf_counter", lambda: now[0])
    entries = [bench_loss.Measurement(each) for each in seconds]
    taken = {each.name: [] for each in seconds}

    def take(due, number, order):
        for entry in due:
            now[0] += seconds[entry.candidate]
            entry.spent += seconds[entry.candidate]
            taken[entry.candidate.name].append(number)

    cases.run_rounds(entries, take, deadline, **{"least": 20, "most": 2000, **how})
    return taken, now[0]


def test_slow_ones_sit_out_rounds(monkeypatch):
    seconds = {CROSS_ENTROPY: 0.01, EAGER: 0.5}
    taken, spent = rounds_of(monkeypatch, seconds, 20.0, warm_up=3)
    assert taken["cross_entropy"][:4] == [-3, -2, -1, 0]
    assert min(taken["collapsed eager"]) >= 0
    assert 0.1 * spent < 0.5 * len(taken["collapsed eager"]) < 0.2 * spent
    taken, spent = rounds_of(monkeypatch, seconds, 20.0, each=5, max_share=0.5)
    assert taken["collapsed eager"][:5] == [0, 1, 2, 3, 4]
    assert taken["collapsed eager"][5] > 100
    assert 0.5 * len(taken["collapsed eager"]) == pytest.approx(0.5 * spent, abs=0.6)


def test_few_slow_ones_use_all_of_the_time(monkeypatch):
    """Of which each would sit out for good."""
    taken, spent = rounds_of(monkeypatch, {EAGER: 0.1, NCMI_SAMPLE: 0.1}, 10.0, each=5, max_share=0.05)
    assert spent == pytest.approx(10, abs=0.3)
    assert len(taken["collapsed eager"]) == len(taken["ncmi sample"])


def test_the_time_of_a_heavy_one_is_given_back(monkeypatch):
    alone, _ = rounds_of(monkeypatch, {CROSS_ENTROPY: 0.1}, 10.0)
    taken, spent = rounds_of(monkeypatch, {CROSS_ENTROPY: 0.1, LITERAL: 4.0}, 10.0)
    assert len(taken["cross_entropy"]) == pytest.approx(len(alone["cross_entropy"]), abs=1)
    assert spent == pytest.approx(10 + 4.0 * len(taken["literal"]), abs=0.2)
    seconds = {CROSS_ENTROPY: 0.01, EAGER: 0.5}
    alone, _ = rounds_of(monkeypatch, seconds, 20.0)
    taken, _ = rounds_of(monkeypatch, {**seconds, LITERAL: 4.0}, 20.0)
    assert len(taken["collapsed eager"]) == pytest.approx(len(alone["collapsed eager"]), abs=1)


def test_what_is_beside_another_has_its_rounds(monkeypatch):
    seconds = {CROSS_ENTROPY: 0.01, CROSS_ENTROPY_WITH_HEAD: 0.3, NCMI_FOCUS: 0.2}
    taken, spent = rounds_of(monkeypatch, seconds, 20.0, warm_up=3)
    assert taken["ncmi focus"] == taken["cross_entropy with head"]
    assert 0.1 * spent < (0.3 + 0.2) * len(taken["ncmi focus"]) < 0.2 * spent  # the share of one


def test_what_does_not_fit_is_noted(worker, monkeypatch):
    assert LITERAL.obstacle(TINY, CPU) is None
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    monkeypatch.setattr(bench_loss, "IMPLEMENTATIONS", (CROSS_ENTROPY, LITERAL))
    rows = bench_loss.measure(TINY, 1, 0.1, worker)
    timed, left_out = rows[:3], rows[3:]
    assert [row.note for row in timed] == ["", "", ""]
    assert all(row.median_us is not None for row in timed)
    for row in left_out:
        assert row.note == "memory: about 0 GiB, more than half of the 0 GiB that are free"
        assert (row.repetitions, row.median_us, row.ratio_to_cross_entropy) == (0, None, None)
    assert bench_loss.make_table(rows).row_count == 1


def allocate_four_mib():
    malloc = ctypes.CDLL(None).malloc
    free = ctypes.CDLL(None).free
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


@pytest.mark.parametrize(
    ("shape", "too_large"),
    [
        pytest.param(Shape(256, 1000, 1000), 256 * 1000 * 1000, id="256x1000x1000"),
        pytest.param(Shape(64, 4000, 512), 64 * 4000 * 512, id="64x4000x512"),
        pytest.param(Shape(4096, 4000, 16), 4096 * 4000, id="4096x4000x16"),  # shows a [B, C] tensor too
    ],
)
@pytest.mark.parametrize("implementation", KERNELS, ids=slug)
def test_memory_is_linear(implementation, shape, too_large, worker):
    first, later = worker.submit(bench_loss.step_peaks, implementation.name, shape, 1).result()
    if first is None:
        pytest.skip("needs Linux with glibc 2.33")
    bound = 4 * (shape.B * shape.M + shape.C * shape.M) * 4 + MIB
    assert bound < 4 * too_large
    gradient = 4 * shape.B * shape.M
    assert gradient <= later <= bound
    assert gradient <= first <= bound


# ------------------------------------------------------------------------------------------------------------
# For pytest-benchmark: in one thread, so that the runs of different machines compare.
# ------------------------------------------------------------------------------------------------------------

EVERY_CASE = pytest.mark.parametrize(
    ("shape", "implementation"),
    [
        pytest.param(shape, implementation, id=f"{shape}-{slug(implementation)}")
        for shape in SHAPES
        for implementation in IMPLEMENTATIONS
    ],
)


def run_benchmark(benchmark, group, shape, implementation, step):
    torch.set_num_threads(1)
    torch.compiler.reset()
    benchmark.group = f"{shape} {group}"
    benchmark.extra_info.update(implementation=implementation.name, **devices.describe_machine())
    criterion, (z, y) = build(implementation, shape), cases.batch(shape)

    def call():
        bench_loss.forget_gradients(criterion, z)
        return step(criterion, z, y)

    if implementation.heavy:
        loss = benchmark.pedantic(call, rounds=2)
    else:
        call()  # compiles
        loss = benchmark(call)
    assert bool(loss.isfinite()), "a fast wrong answer"
    return z


@EVERY_CASE
def test_forward_backward(benchmark, shape, implementation):
    def step(criterion, z, y):
        loss = criterion(z, y)
        loss.backward()
        return loss

    z = run_benchmark(benchmark, "forward+backward", shape, implementation, step)
    assert bool(z.grad.isfinite().all())
    assert bool(z.grad.any())


@EVERY_CASE
def test_no_grad_forward(benchmark, shape, implementation):
    with torch.no_grad():
        run_benchmark(benchmark, "no-grad forward", shape, implementation, lambda criterion, z, y: criterion(z, y))
