"""The experiments, one command each; what is done already is not done again.

    python benchmarks/experiments compare
    python benchmarks/experiments ablation --data fashion-pairs --jobs 2

Every network that was trained is a line of the CSV file. `report.py` makes tables and figures of it.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import images
import plans
from arguments import positive
from store import Place, append, load_images, missing, read_rows, results
from tqdm import tqdm
from training import PRECISIONS, check_precision

RESULTS = Path(__file__).resolve().parent.parent / "results" / "experiments.csv"
# By experiment: its runs, and the data sets that it takes when none are named.
EXPERIMENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "compare": (plans.compare, (plans.DIGITS, plans.FASHION, plans.PAIRS)),
    "paper": (plans.paper, (plans.CIFAR,)),
    "ablation": (plans.ablation, (plans.DIGITS, plans.PAIRS)),
    "supcon-rate": (plans.supcon_rate, (plans.DIGITS, plans.FASHION, plans.PAIRS)),
    "batch-size": (plans.batch_size, (plans.DIGITS, plans.FASHION, plans.PAIRS)),
    "networks": (plans.networks, (plans.DIGITS, plans.FASHION)),
    "checkpoints": (plans.checkpoints, (plans.DIGITS, plans.PAIRS)),
    "search": (plans.search, (plans.PAIRS,)),
    "final": (plans.final, (plans.PAIRS,)),
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="experiments", description="Train what an experiment compares, and measure it."
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--data", nargs="+", choices=images.DATASETS, help="data sets (default: those that need no download)"
    )
    parser.add_argument("--data-dir", type=Path, help="where the files of Fashion-MNIST or CIFAR-100 are")
    parser.add_argument(
        "--cache-dir", type=Path, help="keep what was read of folders of images there (default: beside)"
    )
    parser.add_argument("--seeds", type=positive, help="runs of each setting (default: 3, one for a search)")
    parser.add_argument("--epochs", type=positive, help="how long (default: by data set)")
    parser.add_argument("--jobs", type=positive, default=1, help="networks at a time, each on one thread (default: 1)")
    parser.add_argument("--device", default="cpu", help="that trains, as cuda (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the network (default: by setting); not in the rows, so name an --output",
    )
    parser.add_argument("--budget", nargs="+", help="of search and final: 10000-images, short, long (default: all)")
    parser.add_argument(
        "--trials", type=positive, default=plans.TRIALS, help="of search and final, for each arm (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV file, added to (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, help="keep the state of unfinished runs there, to go on from")
    options = parser.parse_args(arguments)
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output: {options.output.absolute().parent} is not a directory")
    place = Place(options.data_dir, options.cache_dir, options.work_dir, options.device)
    plan, usual = EXPERIMENTS[options.experiment]
    datasets = options.data or usual
    seeds = options.seeds or (1 if options.experiment in ("search", "supcon-rate") else 3)
    try:
        rows = read_rows(options.output)
        if plan is plans.final:
            plan = partial(plan, rows=rows)
        if plan is plans.search or options.experiment == "final":
            plan = partial(plan, budgets=options.budget, count=options.trials)
        runs = missing(plan(datasets, seeds, options.epochs), rows)
        if options.precision is not None:
            runs = [replace(run, setting=replace(run.setting, precision=options.precision)) for run in runs]
        for run in runs:
            check_precision(run.setting.precision, options.device)
        if options.work_dir is not None:
            options.work_dir.mkdir(parents=True, exist_ok=True)
        for dataset in dict.fromkeys(run.dataset for run in runs):
            load_images(dataset, place)  # a missing file is told before anything is trained
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    with tqdm(total=sum(run.epochs for run in runs), unit="epoch", smoothing=0.1) as bar:
        for run, made in results(runs, options.jobs, place):
            if missing([run], read_rows(options.output)):  # not made by another process meanwhile
                append(options.output, made)
            bar.set_postfix_str(f"{run.dataset}, {run.name}: {made[-1].accuracy:.1f}%")
            bar.update(run.epochs)
    print(f"{len(runs)} networks trained; {options.output} has them", file=sys.stderr)


if __name__ == "__main__":
    main()
