"""That networks learn: the digits, in a few epochs, as the demo trains them."""

import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from ncmi_kernels import NCMILoss

if any(find_spec(name) is None for name in ("matplotlib", "rich", "sklearn", "tqdm")):
    pytest.skip("the demo needs matplotlib, rich, scikit-learn and tqdm", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data
import demo

pytestmark = pytest.mark.filterwarnings("ignore::ncmi_kernels.DegenerateMinimumWarning")

RECIPES = demo.TASKS["digits"].recipes
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def train(recipe, dataset, seed):
    return demo.train(recipe, dataset, seed=seed, epochs=6, batch_size=64)


def accuracies(recipe, dataset):
    return [train(recipe, dataset, seed).accuracy[-1] for seed in SEEDS]


def test_as_accurate_as_cross_entropy(digits):
    ncmi = accuracies(RECIPES["NCMI"], digits)
    cross_entropy = accuracies(RECIPES["cross-entropy"], digits)
    assert min(ncmi) >= 95
    assert sum(ncmi) / len(SEEDS) >= sum(cross_entropy) / len(SEEDS) - 2


def test_fixed_centroids(digits):
    recipe = dataclasses.replace(
        RECIPES["NCMI"], criterion=lambda: NCMILoss(data.CLASSES, demo.FEATURES, learn_centroids=False)
    )
    assert train(recipe, digits, seed=0).accuracy[-1] >= 95


def test_in_place_of_cross_entropy(digits):
    assert min(accuracies(RECIPES["NCMI, drop-in"], digits)) >= 93


def test_the_degenerate_minimum(digits):
    """One logit runs away: the loss gets far lower than that of the default separation, and is worth nothing.

    A linear classifier, where the run is all but free of chance.
    """
    outcomes = {}
    for separation in ("centroid_to_sample", "sample_to_centroid"):
        networks = []

        def linear(outputs, networks=networks):
            networks.append(nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)))
            return networks[-1]

        recipe = demo.Recipe(
            lambda separation=separation: NCMILoss(data.CLASSES, l2_normalize=False, separation=separation),
            data.CLASSES,
            lr=0.5,
            network=linear,
        )
        runs = [train(recipe, digits, seed) for seed in SEEDS]
        lowest = [network(digits.test_x).mean(dim=0).min().item() for network in networks]
        outcomes[separation] = [
            (run.accuracy[-1], run.loss[-1], logit) for run, logit in zip(runs, lowest, strict=True)
        ]

    failures, successes = outcomes["centroid_to_sample"], outcomes["sample_to_centroid"]
    for (bad_accuracy, bad_loss, bad_logit), (accuracy, loss, logit) in zip(failures, successes, strict=True):
        assert bad_accuracy < 60
        assert accuracy > 80
        assert bad_loss < loss / 2
        assert bad_logit < -10
        assert abs(logit) < 5


def test_concentration_and_separation(digits):
    """Against the sums over samples and classes, written out."""
    outputs = torch.randn(450, 6, dtype=torch.float64) + 3 * torch.randn(10, 6, dtype=torch.float64)[digits.test_y]
    x = outputs - outputs.mean(dim=0)
    sigmoid = (x / x.norm(dim=1, keepdim=True)).sigmoid()
    p = sigmoid / sigmoid.sum(dim=1, keepdim=True)
    means = torch.stack([p[digits.test_y == c].mean(dim=0) for c in range(10)])
    divergence = (p[:, None] * (p[:, None] / means).log()).sum(dim=2)
    own = divergence[torch.arange(450), digits.test_y]
    cmi, gamma = demo.concentration_and_separation(outputs, digits.test_y)
    assert cmi == pytest.approx(own.mean().item(), rel=1e-9)
    assert gamma == pytest.approx((divergence.sum(dim=1) - own).mean().item() / 10, rel=1e-9)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs=1", "--seeds=2", f"--output={tmp_path / 'curves.png'}"])
    monkeypatch.setenv("COLUMNS", "120")
    demo.main()
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in RECIPES)
    assert "curves.png" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_images_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data=fashion-mnist", "--data-dir=nowhere"])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "dataset-fashion-mnist" in capsys.readouterr().err
