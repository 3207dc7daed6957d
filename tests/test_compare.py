"""The comparison of two revisions: what is slower is found, what cannot be compared is told."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from ncmi_kernels import available_backends

if importlib.util.find_spec("scipy") is None:
    pytest.skip("the comparison needs scipy", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import compare
from cases import Shape

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"no C++ kernels: {available_backends()['cpu']}"
)

SHAPE = Shape(64, 20, 300)
QUICK = ("--shapes", str(SHAPE), "--launches", "1", "--seconds", "1")


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(compare, "TURN", 0.002)


@pytest.fixture
def tree(tmp_path):
    """A copy of this tree's package, with its library, and code to come after its own."""

    def make(code=""):
        shutil.copytree(compare.ROOT / "ncmi_kernels", tmp_path / "ncmi_kernels")
        with (tmp_path / "ncmi_kernels" / "__init__.py").open("a") as file:
            file.write(code)
        return tmp_path

    return make


SLOW = """
import time
def _slowly(forward=NCMILoss.forward):
    def slow(*args):
        end = time.perf_counter() + 3e-3  # several times the longest case, on slow machines too
        while time.perf_counter() < end:
            pass
        return forward(*args)
    return slow
NCMILoss.forward = _slowly()
"""


def test_what_is_slower_is_found(tree, capsys):
    copy = tree(SLOW)
    quick = (*QUICK, "--threshold", "2")  # a single pair of processes may differ by half for nothing
    assert compare.main(["--base-dir", str(compare.ROOT), "--head-dir", str(copy), *quick]) == 1
    output = capsys.readouterr().out
    slower = [line for line in output.splitlines() if "SLOWER" in line]
    assert len(slower) == 9, output  # all but CentroidSGD alone, which needs no forward pass
    assert not any("CentroidSGD  " in line for line in slower)
    assert "9 of 10 cases slower" in output
    # Seen from the other side it is faster.
    assert compare.main(["--base-dir", str(copy), "--head-dir", str(compare.ROOT), *quick]) == 0
    assert capsys.readouterr().out.count("faster") >= 9


def test_a_base_without_a_name(tree, capsys):
    copy = tree("\ndel CentroidSGD\n")
    for name in ("_tables.py", "_timing.py"):  # which only benchmarks need, and older revisions lack
        (copy / "ncmi_kernels" / name).unlink()
    compare.main(["--base-dir", str(copy), *QUICK])
    output = capsys.readouterr().out
    assert output.count("not in base: 64x20x300, CentroidSGD") == 2
    assert "has no attribute 'CentroidSGD'" in output
    assert compare.main(["--base-dir", str(compare.ROOT), "--head-dir", str(copy), *QUICK]) == 2
    assert "head: 64x20x300, CentroidSGD" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path, tree, capsys):
    assert compare.main(["--base", "no-such-revision"]) == 2
    assert "--base: got 'no-such-revision', expected a revision of" in capsys.readouterr().err
    assert compare.main(["--base-dir", str(tree("raise ImportError('broken')\n")), *QUICK]) == 2
    assert "compare: base: ImportError: broken" in capsys.readouterr().err


def test_interval():
    """The widest that leaves out no more than 1% on both sides together, by the binomial distribution."""
    values = list(range(1, 31))
    assert compare.median_interval(values) == (8, 23)  # P(X < 8) = 0.0026, P(X < 9) = 0.0081
    assert compare.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    result = compare.Result(None, base=[[1.0] * 20, [1.0] * 20], head=[[1.2] * 20, [1.3] * 20])
    assert result.ratio() == pytest.approx(1.25)
    assert result.interval() == (1.2, 1.3)
    assert [result.mark(threshold) for threshold in (1.1, 1.25)] == ["SLOWER", "slower"]
    result = compare.Result(None, base=[[1.0] * 20, [1.0] * 20], head=[[0.9] * 20, [1.3] * 20])
    assert result.mark(1.1) == ""  # one launch was lucky
