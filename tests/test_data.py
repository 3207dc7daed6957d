"""The image loaders of the demo, on idx files written here."""

import gzip
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("sklearn") is None:
    pytest.skip("the loaders need scikit-learn", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data

IMAGES = torch.arange(6 * 4 * 4, dtype=torch.uint8).view(6, 4, 4)
LABELS = torch.tensor([0, 9, 1, 8, 2, 7], dtype=torch.uint8)
TEST_IMAGES, TEST_LABELS = IMAGES[:2].flip(1), LABELS[:2]


def idx(tensor):
    return struct.pack(f">BBBB{tensor.dim()}I", 0, 0, 8, tensor.dim(), *tensor.shape) + bytes(tensor.flatten().tolist())


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=["", ".gz"])
def suffix(request):
    return request.param


@pytest.fixture
def directory(tmp_path, suffix):
    write(tmp_path / f"train-images-idx3-ubyte{suffix}", idx(IMAGES))
    write(tmp_path / f"train-labels-idx1-ubyte{suffix}", idx(LABELS))
    write(tmp_path / f"t10k-images-idx3-ubyte{suffix}", idx(TEST_IMAGES))
    write(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", idx(TEST_LABELS))
    return tmp_path


def test_fashion_mnist(directory):
    loaded = data.fashion_mnist(directory)
    pooled = torch.nn.functional.avg_pool2d(torch.cat([IMAGES, TEST_IMAGES])[:, None].float(), 2)
    expected = (pooled - pooled[:6].mean()) / pooled[:6].std()
    torch.testing.assert_close(loaded.train_x, expected[:6])
    torch.testing.assert_close(loaded.test_x, expected[6:])
    assert loaded.train_y.equal(LABELS.long())
    assert loaded.test_y.equal(TEST_LABELS.long())


def test_digits():
    loaded = data.digits()
    assert [tuple(part.shape) for part in loaded] == [(1347, 1, 8, 8), (1347,), (450, 1, 8, 8), (450,)]
    assert [part.dtype for part in loaded] == [torch.float32, torch.int64] * 2
    assert loaded.train_x.mean().abs() < 1e-5
    assert abs(loaded.train_x.std() - 1) < 1e-5
    assert loaded.test_y.bincount().min() >= 43  # stratified: about 45 of each
    assert all(a.equal(b) for a, b in zip(loaded, data.digits(), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, expected 00 00 08 03"),
        (idx(LABELS), "starts with 00 00 08 01"),
        (b"\x00\x00\x0d\x03" + idx(IMAGES)[4:], "starts with 00 00 0d 03"),
        (idx(IMAGES)[:9], "starts with 00 00 08 03 00 00 00 06 00, expected 00 00 08 03 and sizes"),
        (idx(IMAGES)[:-1], r"got 111 bytes, expected 16 \+ 96 for shape \(6, 4, 4\)"),
        (idx(IMAGES) + b"\x00", r"got 113 bytes, expected 16 \+ 96"),
        (idx(IMAGES[:0]), r"got 16 bytes, expected 16 \+ 0 for shape \(0, 4, 4\)"),
        (struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + bytes(5), r"got 21 bytes, expected 16 \+ 79228162"),
    ],
)
def test_malformed_file(tmp_path, suffix, content, message):
    path = tmp_path / f"images{suffix}"
    write(path, content)
    with pytest.raises(ValueError, match=f"images{suffix}: {message}"):
        data.read_idx(path, 3)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(ValueError, match=r"cut\.gz: not a complete gzip file"):
        data.read_idx(tmp_path / "cut.gz", 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:5], "has 6 images, .*train-labels-idx1-ubyte.* has 5 labels"),
        (LABELS + 1, r"got label 10, expected labels in \[0, 10\)"),
    ],
)
def test_labels_that_do_not_fit(directory, suffix, labels, message):
    write(directory / f"train-labels-idx1-ubyte{suffix}", idx(labels))
    with pytest.raises(ValueError, match=message):
        data.fashion_mnist(directory)


def test_missing_directory_or_file(directory, suffix):
    with pytest.raises(FileNotFoundError, match=r"nowhere: .*train-images.*dataset-fashion-mnist, .*--data-dir"):
        data.fashion_mnist(directory / "nowhere")
    (directory / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        data.fashion_mnist(directory)
