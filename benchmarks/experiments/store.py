"""Runs what an experiment plans, less what is done already, and keeps the results in a CSV file."""

import csv
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import images
import torch
from records import write_lines
from training import STEP, Row, Run, train


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file of results; none where there is no file.

    Raises:
        ValueError: the file has other columns, or a line that is not whole.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != Row._fields:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {list(Row._fields)}")
        rows = list(reader)
    ended = path.read_bytes().endswith(b"\n")  # else a number may have lost its last digits
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values() or (number > len(rows) and not ended):
            raise ValueError(
                f"{path}, line {number}: got {list(row.values())}, expected a whole line of {len(Row._fields)} cells; "
                "delete it, with the other checkpoints of its run"
            )
    return rows


def append(path: Path, rows: list[Row]) -> None:
    """Add lines to the CSV file, which begins with the names of the columns."""
    write_lines(path, [row._asdict() for row in rows], Row._fields, append=True)


def missing(runs: list[Run], rows: list[dict[str, str]]) -> list[Run]:
    """The runs without their lines in the file; those of all checkpoints of a run are written together."""
    done = {tuple(row[name].partition(STEP)[0] for name in Row._fields[:7]) for row in rows}
    return [run for run in runs if run.key not in done]


class Place(NamedTuple):
    """Where the runs find their data, keep their state and train."""

    data_dir: Path | None = None
    cache_dir: Path | None = None
    work_dir: Path | None = None
    device: str = "cpu"


@cache
def load_images(name: str, place: Place) -> images.Images:
    """`images.load`, once in a process."""
    return images.load(name, place.data_dir, place.cache_dir)


def _train(run: Run, place: Place) -> list[Row]:
    name = "-".join(run.key).replace(" ", "_").replace("/", "_").replace(":", "_")
    file = place.work_dir and place.work_dir / f"{name}.pt"
    return train(run, load_images(run.dataset, place), file, device=place.device)


def results(runs: list[Run], jobs: int, place: Place) -> Iterator[tuple[Run, list[Row]]]:
    """Train the networks, so many at a time, each on one thread; one after the other on all of them for one job."""
    if jobs == 1:
        for run in runs:
            yield run, _train(run, place)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=partial(torch.set_num_threads, 1))
    try:
        futures = {pool.submit(_train, run, place): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
