"""The README's and the pages' tables and figures are what the committed measurements make of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("pytorch_metric_learning") is None or importlib.util.find_spec("matplotlib") is None:
    pytest.skip("figures need requirements-dev.txt", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import figures
from matplotlib.figure import Figure


def test_nothing_is_stale():
    assert figures.stale() == [], "run `make figures`"


def test_every_table_is_shown_and_known():
    shown = [found["name"] for page in figures.PAGES for found in figures.BLOCK.finditer(page.read_text())]
    assert set(shown) == set(figures.TABLES)
    pages = "".join(page.read_text() for page in figures.PAGES)
    for name in figures.FIGURES:
        assert f"{Path(name).name})" in pages


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    """In a page, in a figure, and in the measurements."""
    page = tmp_path / "page.md"
    table = figures.TABLES["sharded-bytes"]()
    page.write_text(f"before\n<!-- table: sharded-bytes -->\n{table}<!-- end -->\nafter\n")
    monkeypatch.setattr(figures, "PAGES", (page,))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    numbers = [1.0, 2.0, 3.0, 4.0, 5.0]

    def draw():
        figure = Figure()
        axes = figure.subplots()
        figure.suptitle(str(numbers[4]))
        axes.plot([1], numbers[:1])
        axes.bar([1], numbers[1:2])
        axes.scatter([1], numbers[2:3])
        axes.fill_between([1, 2], [0, 1], numbers[3])
        return figure

    monkeypatch.setattr(figures, "FIGURES", {"a.png": draw})
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    assert figures.stale() == [tmp_path / "a.png"]
    figures.main()
    assert figures.stale() == []
    for index in range(len(numbers)):  # each in a kind of mark of its own
        numbers[index] += 0.001
        assert figures.stale() == [tmp_path / "a.png"]
        numbers[index] -= 0.001
    text = page.read_text()
    page.write_text(text.replace("1,000,000", "1,000,001"))
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "1,000,001" in page.read_text()  # a check writes nothing
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    assert page.read_text() == text
    changed = [row | {"payload_bytes": "1024"} for row in figures.rows("cpu/sharded_bytes.csv")]
    monkeypatch.setattr(figures, "rows", lambda name: changed)
    assert figures.stale() == [page]
    page.write_text("<!-- table: other -->\n<!-- end -->\n")
    with pytest.raises(KeyError):
        figures.stale()
