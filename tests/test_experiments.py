"""The experiments: data, networks, training runs that can be killed, what is measured, and the plans."""

import csv
import dataclasses
import importlib.util
import io
import pickle
import runpy
import struct
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import relative
from torch import nn

from ncmi_kernels import NCMILoss, _backends, reference

if importlib.util.find_spec("torchmetrics") is None or importlib.util.find_spec("pytorch_metric_learning") is None:
    pytest.skip("the experiments need requirements-dev.txt", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "experiments"))

import data
import gradients
import images
import networks
import plans
import report
import runs
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


def cifar_content(count, seed):
    generator = np.random.default_rng(seed)
    return {
        b"batch_label": b"training batch 1 of 1",
        b"filenames": [b"a.png"] * count,
        b"coarse_labels": [0] * count,
        b"fine_labels": [int(label) for label in generator.integers(100, size=count)],
        b"data": generator.integers(256, size=(count, 3072), dtype=np.uint8),
    }


def write_cifar(directory, train=24, test=8):
    directory.mkdir(parents=True)
    contents = {"train": cifar_content(train, 0), "test": cifar_content(test, 1)}
    for name, content in contents.items():
        (directory / name).write_bytes(python_2(content))
    return contents


def test_cifar_100(tmp_path):
    contents = write_cifar(tmp_path / "cifar-100-python")
    for directory in (tmp_path, tmp_path / "cifar-100-python"):
        found = images.load("cifar-100", directory)
        assert found.classes == 100
        for x, y, part in ((found.train_x, found.train_y, "train"), (found.test_x, found.test_y, "test")):
            assert y.tolist() == contents[part][b"fine_labels"]
            # A line of the file is 1024 bytes of red, 32 of each row of pixels, then green and blue.
            assert x[3, 1, 5, 7] == contents[part][b"data"][3, 1024 + 5 * 32 + 7]
    seen = found.prepare(found.test_x, False)
    pixel = (int(found.test_x[3, 1, 5, 7]) / 255 - 0.4865) / 0.2564
    assert seen[3, 1, 5, 7].item() == pytest.approx(pixel, abs=1e-5)
    torch.manual_seed(0)
    assert not torch.equal(found.prepare(found.test_x, True), seen)
    assert len(images.load("cifar-100:validation", tmp_path).test_x) == 4


def test_cifar_100_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data-dir: got none, expected the directory of CIFAR-100"):
        images.load("cifar-100")
    with pytest.raises(FileNotFoundError, match=r"train: not there. Unpack cifar-100-python.tar.gz"):
        images.load("cifar-100", tmp_path)
    good = cifar_content(4, 0)
    data, labels = "got something else, expected data", r"got other fine_labels, expected 4 integers in \[0, 100\)"
    bad = [
        (data, {b"data": good[b"data"]}),
        (data, {b"fine_labels": good[b"fine_labels"]}),
        (data, [1, 2]),
        ("got BINFLOAT, expected what arrays", {**good, b"fine_labels": [0, 1, 2, 0.5]}),
        *((data, {**good, b"data": good[b"data"][rows]}) for rows in (0, slice(0), np.s_[:, 1:])),
        *((data, {**good, b"data": good[b"data"].astype(dtype)}) for dtype in (bool, np.int8, np.float64, object)),
        *((data, {**good, b"data": other}) for other in (None, 1, b"u1", good[b"fine_labels"], {})),
        *((data, {**good, b"fine_labels": other}) for other in (None, 7, b"1234", {0: 1})),
        *((labels, {**good, b"fine_labels": [0, 1, 2, other]}) for other in (100, -1, True, None, b"3", [3])),
        *((labels, {**good, b"fine_labels": other}) for other in ([], [0] * 3, [0] * 5, good[b"data"])),
    ]
    for message, content in bad:
        (tmp_path / "train").write_bytes(python_2(content))
        with pytest.raises(ValueError, match=message):
            images.load("cifar-100", tmp_path)


def test_cifar_100_by_columns(tmp_path):
    contents = write_cifar(tmp_path / "rows")
    for content in contents.values():
        content[b"data"] = np.asfortranarray(content[b"data"])
    (tmp_path / "train").write_bytes(python_2(contents["train"]))
    (tmp_path / "test").write_bytes(python_2(contents["test"]))
    rows, columns = (images.load("cifar-100", directory) for directory in (tmp_path / "rows", tmp_path))
    assert columns.train_x.equal(rows.train_x)


class Malicious:
    def __reduce__(self):
        return (sys.exit, (7,))


def test_cifar_100_runs_no_code(tmp_path):
    (tmp_path / "train").write_bytes(python_2({**cifar_content(4, 0), b"x": Malicious()}))
    with pytest.raises(ValueError, match=r"it names sys exit, expected nothing but arrays"):
        images.load("cifar-100", tmp_path)


def hostile_pickles():
    """Contents of a file by name, most with something hostile in place of a label, which is loaded last."""

    def string(raw):
        return b"T" + struct.pack("<i", len(raw)) + raw

    def dtype(name=b"u1", flags=0, size=-1):
        state = b"(K\x03" + string(b"|") + b"NNN" + 2 * (b"J" + struct.pack("<i", size)) + b"J"
        return b"cnumpy\ndtype\n" + string(name) + b"K\x00K\x01\x87R" + state + struct.pack("<i", flags) + b"tb"

    def array(shape, dtype, raw, of=b"cnumpy\nndarray\n", state=b""):
        start = b"cnumpy.core.multiarray\n_reconstruct\n" + of + b"K\x00\x85" + string(b"b") + b"\x87R"
        shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in shape) + b"t"
        return start + b"(K\x01" + shape + dtype + b"\x89" + string(raw) + b"tb" + state

    image, nothing = bytes(3072), b""
    pixels = array((1, 3072), dtype(), image)

    def file(label=b"K\x01", data=pixels):
        return b"\x80\x02}(" + string(b"data") + data + string(b"fine_labels") + b"](" + label + b"eu."

    yield "good", file()
    # What is named is not looked up, by whatever opcode.
    for name in (b"os\nsystem", b"builtins\neval", b"numpy\nload", b"_codecs\nencode", b"copyreg\n_reconstructor"):
        yield f"global {name}", file(b"c" + name + b"\n" + string(b"echo") + b"\x85R")
    yield "dotted global", file(b"\x8c\x05numpy\x8c\x0bcore.memmap\x93)R")
    yield "inst", file(b"(" + string(b"echo") + b"ios\nsystem\n")
    yield "obj", file(b"(cnumpy\ndtype\n" + string(b"O") + b"o")
    yield "newobj", file(b"cnumpy\nndarray\n)\x81")
    yield "newobj_ex", file(b"cnumpy\nndarray\n)}\x92")
    yield "extension", file(b"\x82\x01")
    yield "persistent", file(b"P1\n")
    yield "persistent by value", file(b"K\x01Q")
    yield "buffer", file(b"\x97")
    yield "read-only buffer", file(b"\x96" + struct.pack("<Q", 4) + b"AAAA\x98")
    # Objects as labels: none is a number, whatever state it was given.
    for kind, flags in ((b"O8", 0), (b"O8", 63), (b"V8", 63), (b"i8", 0), (b"u1", 63)):
        yield f"label of dtype {kind}, {flags}", file(array((1,), dtype(kind, flags), b"A" * 8))
    yield "dtype as a label", file(dtype())
    for target in (b"K\x01", b"N", b"]", b"}", b")", string(b"x"), b"cnumpy\ndtype\n", dtype(), pixels):
        yield f"state of {target[:9]}", file(target + b"}" + string(b"__class__") + b"K\x01sb")
        yield f"slots of {target[:9]}", file(target + b"N}" + string(b"__defaults__") + b")s\x86b")
    # Arrays that are none.
    for kind in (b"O1", b"O8", b"V1", b"S1", b"b1", b"i1", b"u2", b"u1,u1", b"(3072,)u1", b"3072u1", b"\xff", nothing):
        yield f"data of dtype {kind}", file(data=array((1, 3072), dtype(kind), image))
    for shape in (
        (),
        (0, 3072),
        (-1, 3072),
        (-1, -3072),
        (2**31 - 1, 3072),
        (2, 3072),
        (1, 3071),
        (3072, 1),
        (1, 1, 3072),
    ):
        yield f"data of shape {shape}", file(data=array(shape, dtype(), image))
    yield "no pixels", file(data=array((1, 3072), dtype(), nothing))
    yield "huge numbers", file(data=pixels.replace(b"J\x01\x00\x00\x00", b"\x8a\x10" + b"\xff" * 15 + b"\x7f", 1))
    yield "data without a state", file(data=pixels[: pixels.index(b"(K\x01")])
    yield "state twice", file(data=pixels + b"(K\x01tb")
    # Sizes, places and marks that are not there.
    for size in (-1, 2**31 - 1):
        yield f"string of {size}", file(b"T" + struct.pack("<i", size))
    for opcode, size in ((b"\x8e", 2**40), (b"\x8d", 2**63), (b"\x95", 2**62), (b"\x96", 2**40)):
        yield f"{opcode} of {size}", file(opcode + struct.pack("<Q", size))
    yield "number of 2 GiB", file(b"\x8b\xff\xff\xff\x7f")
    yield "digits", file(b"L" + b"9" * 100_000 + b"L\n")
    for rest in (b"h\x07", b"j\xff\xff\xff\xff", b"N0a", b"0" * 9, b"2", b"e", b"u", b"tttt", b"\x87\x87b", b"R" * 9):
        yield f"rest {rest}", file(rest)
    yield "memo of 2^32 - 1", file(b"r\xff\xff\xff\xffN")
    # Depth: in lists, in keys (of which a hash is taken), in an object that is shown.
    for name, nested in (("lists", b"]" + b"]" * 100_000 + b"a" * 100_000), ("tuples", b")" + b"\x85" * 100_000)):
        yield f"nested {name}", file(nested)
        yield f"nested {name} as a key", file(b"}" + nested + b"Ns")
        yield f"nested {name} as data", file(data=nested)
        yield f"nested {name} as labels", file().replace(b"](K\x01e", nested)
        yield f"nested {name} alone", b"\x80\x02" + nested + b"."
    yield "a list in itself", file(b"]q\x01h\x01a")
    yield "data in itself", file(data=b"]q\x01(h\x01h\x01h\x01e")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"protocol {protocol}", pickle.dumps({**cifar_content(1, 0), b"fine_labels": [Malicious()]}, protocol)
    for size in range(0, len(file()), 7):
        yield f"first {size} bytes", file()[:size]


def test_cifar_100_survives_hostile_files(tmp_path):
    """A ValueError that names the file, and no long one."""
    hostile = dict(hostile_pickles())
    write_cifar(tmp_path / "cifar-100-python")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(hostile.pop("good"))
    assert images.load("cifar-100", tmp_path).train_y.tolist() == [1]
    for name, content in hostile.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train: ") as caught:
            images.load("cifar-100", tmp_path)
        assert len(str(caught.value)) < 500, name


def test_crop():
    torch.manual_seed(0)
    x = 1 + torch.rand(200, 2, 5, 6)
    moved = images.crop(x, 2)
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    offsets = set()
    for image, around in zip(moved, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, around[:, i : i + 5, j : j + 6])]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) == 25


def test_flip():
    torch.manual_seed(0)
    x = torch.rand(200, 1, 3, 4)
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(images.flip(x), x, strict=True)]
    assert 60 < sum(flipped) < 140
    assert sum(torch.equal(a, b) for a, b in zip(images.flip(x), x, strict=True)) > 60


@pytest.mark.parametrize("size", [(7, 7), (6, 6)])
def test_rotate(size, monkeypatch):
    x = torch.rand(3, 2, *size)
    monkeypatch.setattr(torch, "rand", torch.ones)  # the largest angle
    assert torch.allclose(images.rotate(x, 90.0), x.rot90(dims=(2, 3)), atol=1e-5)
    assert torch.allclose(images.rotate(x, 0.0), x, atol=1e-5)


def test_rotate_keeps_angles_of_other_shapes(monkeypatch):
    """A pixel above the centre of a wide image comes to lie beside it, as far away."""
    x = torch.zeros(1, 1, 9, 17)
    x[0, 0, 1, 8] = 1.0  # three above the centre
    monkeypatch.setattr(torch, "rand", torch.ones)
    turned = images.rotate(x, 90.0)[0, 0]
    assert turned[4, 5] == pytest.approx(1, abs=1e-4)
    assert turned.sum() == pytest.approx(1, abs=1e-3)


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


def test_unknown_data():
    for name in ("mnist", "digits:test", "digits:validation:validation"):
        with pytest.raises(ValueError, match="expected one of digits, fashion-mnist"):
            images.load(name)


# ------------------------------------------------------------------------------------------------------------
# Networks and training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks(name):
    for shape in ((1, 8, 8), (3, 32, 32)):
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
    paper = plans.TASKS["cifar-100"].settings["NCMI, paper"]
    assert (paper.lr, paper.weight_decay, paper.batch_size, paper.milestones) == (0.1, 5e-4, 128, (60, 120, 160))
    assert paper.centroid_sgd == {"lr": 1.0, "momentum": 0.999999, "start_epoch": 30}
    assert plans.TASKS["cifar-100"].epochs == 200
    run = Run("test", "cifar-100", "resnet18", "paper", paper, 0, 200)
    parts = training._build(run, found)
    criterion, (group,) = parts["criterion"], parts["optimizer"].param_groups
    (centroids,) = parts["centroids"].param_groups
    assert (criterion.temperature, criterion.separation, criterion.ratio) == (0.2, "centroid_to_sample", "sample")
    assert (criterion.l2_normalize, criterion.center_momentum, criterion.separation_focus) == (True, 0.999999, 0)
    assert torch.equal(criterion.centroid_logits, 10 * torch.eye(100, 512))
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, False)
    assert (centroids["weight_decay"], centroids["start_step"]) == (0, 30)  # with one step an epoch here
    run = Run("test", "cifar-100", "resnet18", "paper", dataclasses.replace(paper, batch_size=8), 0, 1)
    factors = training._schedule(dataclasses.replace(run, epochs=200), 10)
    assert [factors(step) for step in (0, 599, 600, 1199, 1200, 1600)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.008])
    (row,) = training.train(run, found)
    assert 0 <= row.accuracy <= 100
    assert row.gamma > 0


def test_what_does_not_go(digits):
    with pytest.raises(ValueError, match="features: got 5 for cross-entropy, expected 10"):
        training.train(dataclasses.replace(a_run("ce"), setting=Setting("ce", 0.1, features=5)), digits)
    with pytest.raises(ValueError, match="loss: got 'hinge', expected one of ce, ncmi, supcon"):
        training.train(dataclasses.replace(a_run("ce"), setting=Setting("hinge", 0.1)), digits)


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
    separation = reference.mean_of_other_classes(divergence, target, focus).sum()
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
    arms = [run.name.partition(":")[0] for run in searched]
    assert {arm: arms.count(arm) for arm in arms} == dict.fromkeys(plans.ARMS, plans.TRIALS)
    assert plans.trials() == plans.trials()
    assert {name for name, _ in plans.chosen(rows, "fashion-pairs").values()} == {f"{a}: trial 7" for a in plans.ARMS}
    with pytest.raises(ValueError, match="search: 1 of 60 trials on fashion-pairs are missing"):
        plans.chosen(rows[1:], "fashion-pairs")


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
    assert [row["seed"] for row in runs.read_rows(file)] == ["0"] * 4 + ["1"] * 4
    assert not list((tmp_path / "work").iterdir())
    for bad, message in (
        (["--data-dir", str(tmp_path), "--data", "cifar-100"], "train: not there"),
        (["--output", str(tmp_path / "none" / "x.csv")], "is not a directory"),
        (["--work-dir", str(file), "--data", "digits"], "File exists"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", *bad])
        assert message in capsys.readouterr().err
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
                runs.append(file, rows)  # as if by the other one
            yield run, rows

    monkeypatch.setitem(command["main"].__globals__, "results", results)
    command["main"](["compare", "--data", "digits", "--seeds", "2", "--output", str(file)])
    assert len(runs.read_rows(file)) == 8


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
    for table in tables.values():
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1
        assert len(table.splitlines()) > 4
    assert "51.00 ± 1.00" in tables["compare"]
    assert "51.00 ± 1.00" in tables["final"]
    assert "51.0 ± 1.0" in tables["ablation"]
    assert tables["batch-size"].count("51.0 ± 1.0") == 4 * len(plans.BATCH_SIZES)
    assert tables["networks"].count("-1.00") == 3
    assert tables["checkpoints"].count("| -1.00 | -1.00 |") == 3
    for draw in report.FIGURES.values():
        figure = draw(rows)
        assert all(axes.lines for axes in figure.axes)


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
