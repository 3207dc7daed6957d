"""`python -m ncmi_kernels`: what it prints, writes and returns."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from ncmi_kernels import __main__ as command_line
from ncmi_kernels import _backends, _bench, env, testing
from ncmi_kernels._timing import Device

needs_kernels = pytest.mark.skipif(_backends.load_library() is not None, reason="no kernels")


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_as_a_program():
    """Each command has its help, and the reason why a backend cannot run is in the error."""
    command = [sys.executable, "-m", "ncmi_kernels"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "check", "--backend", "cuda"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--backend: got cuda, which cannot run here: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["check", "bench", "env"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main([name, "--help"])
    assert caught.value.code == 0
    assert f"python -m ncmi_kernels {name}" in capsys.readouterr().out


def test_env(capsys):
    assert command_line.main(["env"]) == 0
    assert capsys.readouterr().out == env.report() + "\n"


@needs_kernels
def test_check(capsys, monkeypatch):
    """All that can run but the interpreter; a failure is named, and is the exit status."""
    monkeypatch.setattr(_backends, "triton_interprets", lambda: True)
    assert command_line.main(["check"]) == 0
    printed = capsys.readouterr().out
    backends = {line.split()[0] for line in printed.splitlines() if line.endswith("passed") and " float" in line}
    assert backends == {name for name, reason in _backends.available_backends().items() if not reason} - {"triton"}
    assert printed.endswith("all passed\n")
    wrong = testing.Result("random", "float32", "ratio=batch", (1e-7, float("nan"), 0.0), (1e-5,) * 3)
    raised = testing.Result("gradcheck", "float64", "ratio=sample", note="GradcheckError: Jacobian mismatch")
    monkeypatch.setattr(testing, "check", lambda *_, **__: [wrong, raised])
    assert command_line.main(["check", "--backend", "cpu", "--seed", "7"]) == 1
    printed = capsys.readouterr().out
    assert "--seed 7" in printed
    assert "cpu, random, float32, ratio=batch: 1e-07 of 1e-05, nan of 1e-05, 0 of 1e-05" in printed
    assert "cpu, gradcheck, float64, ratio=sample: GradcheckError: Jacobian mismatch" in printed
    assert printed.count("1 FAILED") == 2
    assert printed.endswith("2 problems failed\n")


@needs_kernels
def test_bench(capsys, tmp_path):
    file = tmp_path / "out.csv"
    shapes = ["--shape", "6,4,10", "--shape", "5,3,8"]
    assert command_line.main(["bench", *shapes, "--seconds", "0", "--csv", str(file)]) == 0
    rows = list(csv.DictReader(file.open()))
    names = [
        *("cross_entropy", "cross_entropy with head", "ncmi batch"),
        *("ncmi batch + centroids", "ncmi focus", "ncmi focus + centroids"),
    ]
    assert [(row["B"], row["mode"], row["implementation"]) for row in rows] == [
        (rows_, mode, name) for rows_ in "65" for mode in ("forward", "forward+backward") for name in names
    ]
    for row in rows:
        assert (row["torch"], row["backend"], row["note"]) == (torch.__version__, "cpu", "")
        assert int(row["repetitions"]) >= _bench.LEAST_ROUNDS
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        if row["implementation"] == "cross_entropy":
            assert float(row["ratio_to_cross_entropy"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("6, 4, 10") == printed.count("5, 3, 8") == 2 * len(names)


@pytest.mark.parametrize("failing", ["ncmi focus", "cross_entropy with head"])
def test_what_cannot_be_measured_is_said(capsys, monkeypatch, failing):
    def fails(z, y):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmany bytes")

    every = _bench.steps_of

    def steps_of(*args):
        steps = every(*args)
        steps[failing].criterion = fails
        return steps

    monkeypatch.setattr(_bench, "steps_of", steps_of)
    assert command_line.main(["bench", "--shape", "6,4,10", "--seconds", "0", "--backend", "reference"]) == 1
    assert capsys.readouterr().out.count("out of memory") == 2


def test_each_step_takes_its_gradients():
    """Those of the head's weight and of the centroids too, where they are learnt."""
    for name, step in _bench.steps_of((6, 4, 10), torch.device("cpu"), "reference").items():
        learnt = "head" in name or "centroids" in name
        assert [tuple(each.shape) for each in step.wanted] == [(6, 10), *[(4, 10)] * learnt], name
        entry = _bench.entry_of(name, step, Device())
        assert set(entry.take()) == {"forward", "forward+backward"}, entry.note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shape", "6,4"], "argument --shape: got '6,4', expected B,C,M with B >= 1, C >= 2 and M >= 2"),
        (["bench", "--shape", "6,1,10"], "got '6,1,10'"),
        (["bench", "--seconds", "-1"], "argument --seconds: got -1, expected a number >= 0"),
        (["bench", "--csv", "/no/such/place/x.csv"], "argument --csv: /no/such/place is not a directory"),
        (["check", "--backend", "gpu"], "invalid choice: 'gpu'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    assert message in refusal(capsys, *arguments)


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys, monkeypatch):
    assert "--device: got cuda, and torch" in refusal(capsys, "bench", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = refusal(capsys, "bench", "--device", "cuda", "--backend", "cpu")
    assert "--backend: got cpu for --device cuda, expected --device cpu" in found
