"""The experiments: data, networks, training runs that can be killed, what is measured, and the plans."""

import csv
import dataclasses
import importlib.util
import io
import os
import pickle
import runpy
import shutil
import struct
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import relative
from PIL import Image
from torch import nn

from ncmi_kernels import NCMILoss, _backends, reference

if importlib.util.find_spec("torchmetrics") is None or importlib.util.find_spec("pytorch_metric_learning") is None:
    pytest.skip("the experiments need requirements-dev.txt", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "experiments"))

import data
import folders
import gradients
import images
import networks
import plans
import report
import store
import training
from training import Run, Setting

EXPERIMENTS = Path(training.__file__).parent

pytestmark = pytest.mark.skipif(_backends.load_library() is not None, reason="no C++ kernels")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------
# CIFAR-100
# ------------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 and NumPy 1 write it, and so the official files: bytes are strings."""

    def save_string(self, text):
        short = len(text) < 256
        self.write(b"U" + struct.pack("<B", len(text)) if short else b"T" + struct.pack("<i", len(text)))
        self.write(text)
        self.memoize(text)

    def save_str(self, text):
        self.save_string(text.encode())

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_string, str: save_str}


def python_2(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def python_3(content):
    return pickle.dumps(content, 2)


def cifar_content(count, seed):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(256, size=(count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"fine_labels": generator.integers(100, size=count).tolist(), b"batch_label": b"some"}


def write_cifar(directory, written=python_2, train=24, test=8):
    directory.mkdir(parents=True)
    contents = {"train": cifar_content(train, 0), "test": cifar_content(test, 1)}
    for name, content in contents.items():
        (directory / name).write_bytes(written(content))
    return contents


@pytest.mark.parametrize("written", [python_2, python_3])
def test_cifar_100(tmp_path, written):
    contents = write_cifar(tmp_path / "cifar-100-python", written)
    for directory in (tmp_path, tmp_path / "cifar-100-python"):
        found = images.load("cifar-100", directory)
        assert found.classes == 100
        for x, y, part in ((found.train_x, found.train_y, "train"), (found.test_x, found.test_y, "test")):
            assert y.tolist() == contents[part][b"fine_labels"]
            # 1024 bytes of red, 32 of each row of pixels, then green and blue.
            assert x[3, 1, 5, 7] == contents[part][b"data"][3, 1024 + 5 * 32 + 7]
    seen = found.prepare(found.test_x, False)
    pixel = (int(found.test_x[3, 1, 5, 7]) / 255 - 0.4865) / 0.2564
    assert seen[3, 1, 5, 7].item() == pytest.approx(pixel, abs=1e-5)
    torch.manual_seed(0)
    assert not torch.equal(found.prepare(found.test_x, True), seen)
    assert len(images.load("cifar-100:validation", tmp_path).test_x) == 4


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was run')",)


def test_cifar_100_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir: got none, expected the directory of CIFAR-100"):
        images.load("cifar-100")
    with pytest.raises(FileNotFoundError, match=r"train: not there. Unpack cifar-100-python.tar.gz"):
        images.load("cifar-100", tmp_path)
    good = cifar_content(4, 0)
    for content, message in (
        ([], "not a file of CIFAR-100"),
        ({**good, b"x": Malicious()}, "names .*exec"),
        ({**good, b"data": good[b"data"][:3]}, "other data"),
        ({**good, b"data": good[b"data"].astype(int)}, "another array"),
        ({**good, b"data": good[b"data"].tolist()}, "other data"),
        ({**good, b"fine_labels": [0, 1, 2, 100]}, "other fine_labels"),
        ({**good, b"fine_labels": [0.0, 1.0, 2.0, 3.0]}, "other fine_labels"),
    ):
        (tmp_path / "train").write_bytes(python_3(content))
        with pytest.raises(ValueError, match=f"train: .*{message}"):
            images.load("cifar-100", tmp_path)


def test_a_dtype_that_lies_is_no_pointer(tmp_path):
    """Flags of 0 on dtype O would make NumPy take bytes of the file for objects."""

    class Lie:
        def __init__(self, made, state):
            self.made, self.state = made, state

        def __reduce__(self):
            return (*self.made, self.state)

    dtype = Lie((np.dtype, ("O8", False, True)), (3, "|", None, None, None, -1, -1, 0))
    array = Lie(np.empty(0).__reduce__()[:2], (1, (1,), dtype, False, b"A" * 8))
    good = cifar_content(1, 0)
    for content in ({**good, b"fine_labels": [array]}, {**good, b"data": array}):
        (tmp_path / "train").write_bytes(python_3(content))
        with pytest.raises(ValueError, match=r"train: (got other fine_labels|.*another array)"):
            images.load("cifar-100", tmp_path)


@pytest.fixture(scope="module")
def folders_of_images(tmp_path_factory):
    """A hundred classes, two images to train and one to test of each, of one colour: its class and its number."""
    directory = tmp_path_factory.mktemp("folders")
    for part, count in (("train", 2), ("test", 1)):
        for label in range(100):
            (directory / part / f"class {label:02}").mkdir(parents=True)
            for number in range(count):
                path = directory / part / f"class {label:02}" / f"{number}.png"
                Image.new("RGB", (32, 32), (label, number, 7)).save(path)
    return directory


@pytest.fixture
def folder(folders_of_images, tmp_path):
    shutil.copytree(folders_of_images, tmp_path / "images")
    return tmp_path / "images"


def test_folders_of_images(folder, monkeypatch):
    Image.new("L", (32, 32), 5).save(folder / "train" / "class 05" / "grey.jpg")
    (folder / "train" / "class 05" / ".DS_Store").write_bytes(b"")
    found = images.load("cifar-100", folder)
    assert (len(found.train_x), len(found.test_x)) == (201, 100)
    assert torch.equal(found.test_x[:, 0, 3, 4].long(), found.test_y)
    assert torch.equal(found.train_x[:, 0, 3, 4].long(), found.train_y)
    assert found.test_x[0, 2].unique().tolist() == [7]
    assert len(found.train_y[:50].unique()) > 25, "not in the order of the classes"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_pixels", None)  # from the cache nothing is decoded
        again = images.load("cifar-100", folder)
        assert torch.equal(again.train_x, found.train_x)
        assert torch.equal(again.train_y, found.train_y)
    path = folder / "test" / "class 09" / "0.png"
    times = path.stat()
    Image.new("RGB", (32, 32), (9, 1, 7)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = images.load("cifar-100", folder)
    assert changed.test_x[changed.test_y == 9, 1].unique().tolist() == [1], "a changed file is read again"
    (folder / "train" / "class 05" / "grey.jpg").unlink()
    assert len(images.load("cifar-100", folder).train_x) == 200


def test_the_cache(folder, tmp_path):
    cache_dir = tmp_path / "cache"
    with pytest.raises(OSError, match=r"images.pt: the cache cannot be written .* --cache-dir names another place"):
        images.load("cifar-100", folder, cache_dir)
    cache_dir.mkdir()
    images.load("cifar-100", folder, cache_dir)
    assert [path.name for path in cache_dir.iterdir()] == ["images.pt"]
    assert not (folder / "images.pt").exists()
    for content in (b"", (cache_dir / "images.pt").read_bytes()[:-100], pickle.dumps(Malicious())):
        (cache_dir / "images.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"images.pt: got no cache of images .* delete it"):
            images.load("cifar-100", folder, cache_dir)


def damaged(content):
    at = content.index(b"IDAT") + 8
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def png(*arguments):
    file = io.BytesIO()
    Image.new(*arguments).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), r"0.png: got no whole image"),
        (lambda path: path.write_bytes(damaged(path.read_bytes())), r"0.png: got no whole image"),
        (lambda path: path.write_bytes(b""), r"0.png: got no whole image"),
        (lambda path: path.write_bytes(b"GIF89a"), r"0.png: got no whole image"),
        (lambda path: path.write_bytes(png("RGB", (32, 31))), r"0.png: got 32 x 31 pixels .* expected 32 x 32"),
        (lambda path: path.write_bytes(png("I;16", (32, 32))), r"0.png: got 32 x 32 pixels of mode I;16"),
        (lambda path: path.rename(path.with_suffix(".gif")), r"0.gif: expected nothing but PNG or JPEG"),
        (lambda path: path.unlink(), r"class 03: got an empty folder, expected PNG or JPEG images"),
        (lambda path: path.parent.rename(path.parent.parent / "other"), r"'class 03' in train only, expected the same"),
        (lambda path: shutil.rmtree(path.parent), r"test: got 99 class folders, expected 100"),
    ],
)
def test_folders_refuse(folder, change, message):
    change(folder / "test" / "class 03" / "0.png")
    with pytest.raises(ValueError, match=message):
        images.load("cifar-100", folder)
    assert not (folder / "images.pt").exists()


def test_folders_without_test(folder):
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match=r"test: not there, expected the folders train/CLASS and test/CLASS"):
        images.load("cifar-100", folder)


def test_some_of_the_training_images(tmp_path):
    write_cifar(tmp_path / "files")
    whole, some = (images.load(f"cifar-100{of}:validation", tmp_path / "files") for of in ("", ":7"))
    assert (len(whole.train_x), len(some.train_x)) == (20, 7)
    assert torch.equal(some.test_x, whole.test_x)
    for name, message in (("cifar-100:21:validation", "at most 20"), ("cifar-100:", ":N"), ("cifar-100:x", ":N")):
        with pytest.raises(ValueError, match=message):
            images.load(name, tmp_path / "files")


def test_augmentation(monkeypatch):
    """Moved by up to the padding in each direction, flipped half of the time, turned about the centre."""
    torch.manual_seed(0)
    x = 1 + torch.rand(200, 2, 5, 6)
    offsets = set()
    for image, around in zip(images.crop(x, 2), nn.functional.pad(x, (2, 2, 2, 2)), strict=True):
        offsets |= {(i, j) for i in range(5) for j in range(5) if torch.equal(image, around[:, i : i + 5, j : j + 6])}
    assert len(offsets) == 25
    flipped = images.flip(x)
    assert 60 < sum(torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True)) < 140
    assert sum(torch.equal(a, b) for a, b in zip(flipped, x, strict=True)) > 60
    monkeypatch.setattr(torch, "rand", torch.ones)  # the largest angle
    square = x[..., :5]
    assert torch.allclose(images.rotate(square, 90.0), square.rot90(dims=(2, 3)), atol=1e-5)
    assert torch.allclose(images.rotate(x, 0.0), x, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The other data sets
# ------------------------------------------------------------------------------------------------------------


def small_fashion():
    """Each image is of one value, its number; of the test set a thousand more."""
    x = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 4, 4)
    y = torch.arange(40) % 10
    return data.Dataset(x, y, 1000 + x[:20], y[:20])


def test_fashion_pairs():
    found = images.fashion_pairs(small_fashion())
    assert found.classes == 100
    for x, y, first, count in ((found.train_x, found.train_y, 0, 20), (found.test_x, found.test_y, 1000, 10)):
        assert x.shape == (count, 1, 4, 8)
        left, right = x[:, 0, 0, 0], x[:, 0, 0, -1]
        assert torch.equal(x[:, 0, 2, :4], left[:, None].expand(-1, 4))
        assert sorted(torch.cat([left, right]).tolist()) == list(range(first, first + 2 * count))
        assert torch.equal(y, (10 * (left % 10) + right % 10).long())
    again = images.fashion_pairs(small_fashion())
    assert torch.equal(again.train_x, found.train_x)


def test_held_out():
    x = torch.arange(30.0).view(30, 1, 1, 1)
    whole = images.Images(x, torch.arange(30), 100 + x, torch.arange(30), 30)
    part = images.held_out(whole)
    assert (len(part.train_x), len(part.test_x)) == (25, 5)
    assert sorted(torch.cat([part.train_y, part.test_y]).tolist()) == list(range(30))
    assert torch.equal(part.test_x.flatten().long(), part.test_y)


# ------------------------------------------------------------------------------------------------------------
# Networks and training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks(name):
    for shape in ((1, 16, 15) if name.startswith("resnet9") else (1, 8, 8), (3, 32, 32)):
        network = networks.build(name, torch.zeros(1, *shape), 13)
        assert network(torch.randn(2, *shape)).shape == (2, 13)
    if name == "resnet18":
        network = networks.build(name, torch.zeros(1, 3, 32, 32), 10)
        assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962


def test_left_and_right_stay_apart():
    torch.manual_seed(0)
    network = networks.build("cnn", torch.zeros(1, 1, 14, 28), 5)
    x = torch.randn(4, 1, 14, 28)
    swapped = torch.cat(x.chunk(2, dim=3)[::-1], dim=3)
    assert (network(x) - network(swapped)).abs().max() > 1e-3


SETTINGS = {
    "ce": Setting("ce", 0.1, batch_size=64),
    "ncmi": Setting("ncmi", 2.0, batch_size=64, features=32),
    "focus": Setting("ncmi", 2.0, batch_size=64, features=32, options=plans.FOCUS, centroid_lr=0.1, centroid_scale=4.0),
    "alternating": Setting("ncmi", 2.0, batch_size=64, features=32, centroid_sgd={"lr": 0.1, "start_epoch": 1}),
    "supcon": Setting("supcon", 0.2, batch_size=64, features=32),
    "steps": Setting("ce", 0.1, batch_size=64, milestones=(1,)),
}


def a_run(name, epochs=2, **others):
    return Run("test", "digits", "cnn", name, SETTINGS[name], 0, epochs, **others)


@pytest.fixture(scope="module")
def digits():
    return images.load("digits")


def without_seconds(rows):
    return [row._replace(seconds=0.0) for row in rows]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_goes_on(name, digits, tmp_path):
    """It learns, and stopped after an epoch it ends with the numbers of a run that was not stopped."""
    run = a_run(name)
    (row,) = whole = training.train(run, digits)
    assert 80 < row.accuracy < 100
    assert 80 < row.train_accuracy <= 100
    assert row.ncmi == pytest.approx(row.cmi / row.gamma)
    assert 0 < row.ece < 30
    assert row.seconds > 0

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    work = tmp_path / "work" / "state.pt"
    with pytest.raises(Killed):
        training.train(run, digits, work, kill)
    assert work.exists()
    torch.manual_seed(123)
    assert without_seconds(training.train(run, digits, work)) == without_seconds(whole)
    assert not work.exists()

    # What another setting of the same name has left is not gone on from.
    with pytest.raises(Killed):
        training.train(dataclasses.replace(run, setting=dataclasses.replace(run.setting, lr=0.01)), digits, work, kill)
    assert without_seconds(training.train(run, digits, work)) == without_seconds(whole)


def test_checkpoints(digits):
    run = a_run("ncmi", checkpoints=5)
    rows = training.train(run, digits)
    steps = [int(row.setting.removeprefix("ncmi, step ")) for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == 2 * 22
    assert rows[-1].accuracy > rows[0].accuracy
    # Measuring on the way changes nothing.
    (whole,) = training.train(a_run("ncmi"), digits)
    assert without_seconds(rows[-1:]) == without_seconds([whole._replace(setting=rows[-1].setting)])


def test_the_papers_recipe(tmp_path):
    """ResNet-18 on files of CIFAR-100's format, with the preset that the paper gives."""
    write_cifar(tmp_path / "files")
    found = images.load("cifar-100", tmp_path / "files")
    paper = plans.PAPER_TASK.settings["NCMI, paper"]
    run = Run("test", "cifar-100", "resnet18", "paper", paper, 0, 200)
    parts = training._build(run, found, "cpu")
    (centroids,) = parts["centroids"].param_groups
    assert torch.equal(parts["criterion"].centroid_logits, 10 * torch.eye(100, 512))
    assert (centroids["weight_decay"], centroids["start_step"]) == (0, 30)  # with one step an epoch here
    factors = training._schedule(run, 10)
    assert [factors(step) for step in (0, 599, 600, 1199, 1200, 1600)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.008])
    (row,) = training.train(dataclasses.replace(run, setting=dataclasses.replace(paper, batch_size=8), epochs=1), found)
    assert 0 <= row.accuracy <= 100
    assert row.gamma > 0


@pytest.mark.parametrize("focus", [0.0, 10.0])
def test_which_samples_a_loss_pulls_at(focus):
    """The pull away from each class is its weight in the separation: what the derivative by the divergence is."""
    torch.manual_seed(0)
    outputs, target = torch.randn(6, 9, dtype=torch.float64), torch.randint(5, (6,))
    criterion = NCMILoss(5, 9, separation_focus=focus, dtype=torch.float64)
    criterion(outputs, target)
    criterion.eval()
    log_p, log_q = criterion._log_probabilities(outputs), criterion._log_centroids(False)
    divergence = reference.divergences(log_p, log_q, "sample_to_centroid").detach().requires_grad_()
    separation = reference.separation_of(divergence, target, criterion.options).sum()
    expected = torch.autograd.grad(separation, divergence)[0]
    pushes = gradients.pushes(criterion, outputs, target)
    assert relative(pushes, expected * 5 / 4) < 1e-9
    entropy = gradients.pushes(nn.CrossEntropyLoss(), outputs[:, :5], target)
    leaf = outputs[:, :5].clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(leaf, target, reduction="sum"), leaf)
    grad = grad.scatter(1, target[:, None], 0)  # by the other logits it is their probability
    assert relative(entropy, grad / grad.sum(dim=1, keepdim=True)) < 1e-9


def test_the_pull_of_wrong_samples(digits):
    lines = []

    def note(network, criterion):
        outputs = training.outputs_of(network, digits, digits.test_x)
        lines.append(gradients.measure("ce", 0, 1, criterion, outputs, digits.test_y))

    (row,) = training.train(a_run("ce", epochs=1), digits, on_end=note)
    (line,) = lines
    assert line.wrong_samples == pytest.approx(100 - row.accuracy)
    assert line.wrong_over_secure > 2
    assert line.wrong_samples < line.wrong_pull < 100
    assert 100 / 9 < line.away_from_nearest < 100


def test_calibration_error():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10)
    target = torch.distributions.Categorical(logits=logits).sample()
    error = training.calibration_error(logits, target)
    assert error < 1.5  # of which most is the noise of a bin
    for factor in (1e-3, 50.0):  # another temperature is not another calibration
        assert training.calibration_error(factor * logits, target) == pytest.approx(error, abs=0.05)
    # A class that no score is finite for changes little, whatever the scale of the others.
    absent = torch.cat([1e-3 * logits, torch.full_like(logits[:, :1], -torch.inf)], dim=1)
    assert training.calibration_error(absent, target) == pytest.approx(error, abs=0.5)
    # Sure of all, right about half: no temperature mends what is sure of the wrong ones in particular.
    sure = torch.where(torch.arange(20_000)[:, None] % 4 < 2, 10 * logits, 0.1 * logits)
    assert training.calibration_error(sure, target) > 5


# ------------------------------------------------------------------------------------------------------------
# Plans, the file of results, the command line
# ------------------------------------------------------------------------------------------------------------


def rows_of(runs, accuracy=lambda run: 50.0):
    measured = dict(zip(training.Row._fields[7:], map(str, (60, 0, 0.01, 0.1, 0.1, 2, 3)), strict=True))
    names = training.Row._fields[:7]
    return [dict(zip(names, run.key, strict=True)) | measured | {"accuracy": str(accuracy(run))} for run in runs]


def test_plans():
    command = runpy.run_path(str(EXPERIMENTS / "__main__.py"))
    searched = plans.search(["fashion-pairs"], 1, None)
    rows = rows_of(searched, lambda run: 90.0 if run.name.endswith("trial 7") else 50.0)
    for experiment, (plan, usual) in command["EXPERIMENTS"].items():
        others = {"rows": rows} if experiment == "final" else {}
        runs = plan(usual, 2, None, **others)
        assert len({run.key for run in runs}) == len(runs)
        assert {run.seed for run in runs} == {0, 1}
        assert {run.network for run in runs} <= set(networks.NETWORKS)
        assert {run.epochs for run in plan(usual, 1, 3, **others)} == {3}
        if experiment != "final":
            assert {run.dataset.partition(":")[0] for run in plan(["cifar-100"], 1, None)} == {"cifar-100"}
    short = plans.TASKS["fashion-pairs"].budgets["short"]
    arms = [run.name.partition(":")[0] for run in searched]
    assert {arm: arms.count(arm) for arm in arms} == dict.fromkeys(plans.ARMS, plans.TRIALS)
    assert plans.trials("fashion-pairs") == plans.trials("fashion-pairs")
    assert {name for name, _ in plans.chosen(rows, "fashion-pairs", short).values()} == {
        f"{a}: trial 7" for a in plans.ARMS
    }
    with pytest.raises(ValueError, match="search: 1 of 60 trials on fashion-pairs, 8 epochs, are missing"):
        plans.chosen(rows[1:], "fashion-pairs", short)


def test_budgets():
    """Each arm has as many trials at each budget, however many are done; the choice is by the budget's own rows."""
    runs = plans.search(["cifar-100"], 1, None, None, 3)
    found = [(run.dataset, run.epochs) for run in runs]
    places = [("cifar-100:10000:validation", 30), ("cifar-100:validation", 8), ("cifar-100:validation", 16)]
    assert found == [place for place in places for _ in range(18)]
    assert [run.name.partition(":")[0] for run in runs[:6]] == list(plans.CIFAR_ARMS)
    assert len({run.key for run in runs}) == len(runs)
    assert plans.trials("cifar-100", 3).items() <= plans.trials("cifar-100").items()
    rows = rows_of(runs, lambda run: 90.0 if run.name.endswith(f"trial {run.epochs % 3}") else 50.0)
    small, short = (plans.TASKS["cifar-100"].budgets[name] for name in ("10000-images", "short"))
    assert {name[-1] for name, _ in plans.chosen(rows, "cifar-100", small, 3).values()} == {"0"}
    assert {name[-1] for name, _ in plans.chosen(rows, "cifar-100", short, 3).values()} == {"2"}
    final = plans.final(["cifar-100"], 1, None, rows, ["10000-images"], 3)
    assert {(run.dataset, run.epochs) for run in final} == {("cifar-100:10000", 30)}
    assert "cifar-100:10000, 30 epochs, NCMI, soft margin | 3 | 90.00" in report.search(rows)
    with pytest.raises(ValueError, match=r"--budget: got 'long', expected of short for fashion-pairs"):
        plans.search(["fashion-pairs"], 1, None, ["long"])


@pytest.mark.parametrize("arm", plans.CIFAR_ARMS)
def test_trials_train(arm, tmp_path):
    write_cifar(tmp_path / "files")
    setting = dataclasses.replace(plans.trials("cifar-100", 1)[f"{arm}: trial 0"], precision="float32")
    run = Run("test", "cifar-100", "resnet9-32", arm, setting, 0, 1)
    (row,) = training.train(run, images.load("cifar-100", tmp_path / "files"))
    assert row.gamma > 0


def test_bfloat16(digits, monkeypatch):
    run = a_run("ce")
    half = dataclasses.replace(run, setting=dataclasses.replace(run.setting, precision="bfloat16"))
    monkeypatch.setattr(training, "check_precision", lambda *_: None)  # slow is fast enough here
    (row,) = training.train(half, digits)
    (whole,) = training.train(run, digits)
    assert 80 < row.accuracy < 100
    assert row.cmi != whole.cmi


def test_precision_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"precision: got 'half', expected one of float32, bfloat16"):
        training.check_precision("half", "cpu")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(RuntimeError, match=r"precision: got bfloat16, which cpu does not have"):
        training.check_precision("bfloat16", "cpu")


def test_command_line(tmp_path, capsys):
    main = runpy.run_path(str(EXPERIMENTS / "__main__.py"))["main"]
    file = tmp_path / "out.csv"
    arguments = ["compare", "--data", "digits", "--epochs", "2", "--output", str(file)]
    main([*arguments, "--seeds", "1", "--jobs", "2"])
    with file.open(newline="") as opened:
        reader = csv.DictReader(opened)
        first = list(reader)
    columns = "experiment dataset network loss setting seed epochs train_accuracy accuracy cmi gamma ncmi ece seconds"
    assert reader.fieldnames == columns.split()
    assert {(row["loss"], row["setting"]) for row in first} == {
        ("ce", "cross-entropy"),
        ("ncmi", "NCMI"),
        ("ncmi", "NCMI, focus"),
        ("ncmi", "NCMI, focus, fixed"),
    }
    before = file.read_bytes()
    main([*arguments, "--seeds", "1"])  # nothing is left to do
    assert file.read_bytes() == before
    assert "0 networks trained" in capsys.readouterr().err
    main([*arguments, "--seeds", "2", "--work-dir", str(tmp_path / "work")])
    assert file.read_bytes().startswith(before)
    assert [row["seed"] for row in store.read_rows(file)] == ["0"] * 4 + ["1"] * 4
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(SystemExit):
        main(["compare", "--data", "cifar-100", "--data-dir", str(tmp_path)])
    assert "train: not there" in capsys.readouterr().err, "before anything is trained"
    whole, header = file.read_text(), ",".join(reader.fieldnames)
    for text, message in (
        ("a,b\n", "out.csv: got columns ['a', 'b']"),
        (whole[:-1], "out.csv, line 9: got ['compare', 'digits'"),  # the last number may have had more digits
        (whole[:-60], "out.csv, line 9: got ['compare', 'digits'"),
        (whole[: len(header) + 20], "out.csv, line 2: got ['compare', 'digits'"),
        (whole[:-9] + whole[len(header) + 1 :], "out.csv, line 9: got ['compare', 'digits'"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_two_processes_at_once(tmp_path, monkeypatch):
    """What another process has made meanwhile is not written a second time."""
    command = runpy.run_path(str(EXPERIMENTS / "__main__.py"))
    file = tmp_path / "out.csv"

    def results(runs, *_):
        for run in runs:
            rows = [training.Row(*run.key[:5], run.seed, run.epochs, *[0.5] * 7)]
            if run.setting.loss == "ce":
                store.append(file, rows)  # as if by the other one
            yield run, rows

    monkeypatch.setitem(command["main"].__globals__, "results", results)
    command["main"](["compare", "--data", "digits", "--seeds", "2", "--output", str(file)])
    assert len(store.read_rows(file)) == 8


def test_report():
    """Every table and figure from made-up rows, in which accuracy goes with the seed and NCMI with the error."""
    rows = []
    for experiment in ("compare", "ablation", "batch_size", "networks", "search"):
        runs = getattr(plans, experiment)(["fashion-pairs"], 3, None)
        rows += rows_of(runs, lambda run: 50.0 + run.seed)
    for epochs in plans.FINAL_EPOCHS:
        rows += rows_of(plans.final(["fashion-pairs"], 3, epochs, rows), lambda run: 50.0 + run.seed)
    for run in plans.checkpoints(["fashion-pairs"], 2, None):
        rows += [
            row | {"setting": f"{run.name}, step {step}", "accuracy": str(10 * step), "ncmi": str(1 / step)}
            for step in range(1, 9)
            for row in rows_of([run])
        ]
    for index, row in enumerate(row for row in rows if row["experiment"] == "networks"):
        row["ncmi"], row["accuracy"] = str(0.1 + index / 1000), str(90 - index)
    tables = {name: table(rows) for name, table in report.TABLES.items()}
    assert "51.00 ± 1.00" in tables["compare"]
    assert "51.00 ± 1.00" in tables["final"]
    assert "51.0 ± 1.0" in tables["ablation"]
    assert tables["batch-size"].count("51.0 ± 1.0") == 4 * len(plans.BATCH_SIZES)
    assert tables["networks"].count("-1.00") == 3
    assert tables["checkpoints"].count("| -1.00 | -1.00 |") == 3
    assert all(axes.lines for draw in report.FIGURES.values() for axes in draw(rows).axes)


@pytest.mark.parametrize("name", ["compare", "ablation", "batch_size", "networks", "checkpoints"])
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_report_averages_no_run_twice(name):
    """Neither a run that was written twice nor one of another length is taken for one more seed."""
    rows = rows_of(getattr(plans, name)(["digits"], 2, None))
    table = getattr(report, name)
    table(rows)
    longer = [row | {"epochs": "9"} for row in rows]
    for others in (rows,) if name == "compare" else (rows, longer):  # that one has a line for each length
        with pytest.raises(ValueError, match=r"^(seed|setting): got"):
            table(rows + others)
