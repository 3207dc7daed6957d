"""The images that the demo and the training tests learn: scikit-learn's digits, and Fashion-MNIST."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


class Dataset(NamedTuple):
    """Images [N, 1, H, W], float32, normalised by mean and deviation of the training set; labels int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Dataset:
    """The 8 x 8 digits of scikit-learn: 1347 to train, 450 to test, always the same ones."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=450, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return _normalised(train_x.view(-1, 1, 8, 8), train_y, test_x.view(-1, 1, 8, 8), test_y)


def fashion_mnist(directory: Path = FASHION_MNIST_DIR) -> Dataset:
    """Fashion-MNIST from its four idx files, plain or gzip, each image averaged down to half its side.

    Raises:
        FileNotFoundError: the directory or one of the files is missing.
        ValueError: a file is malformed, or images and labels do not belong together.
    """
    return _normalised(*_labelled_images(directory, "train"), *_labelled_images(directory, "t10k"))


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an idx file of unsigned bytes (the format of MNIST), gzip where its name ends in .gz.

    Raises:
        ValueError: the file is not an idx file of so many dimensions, is empty, or not as long as it says.
    """
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    try:
        content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path}: starts with {content[:start].hex(' ') or 'nothing'}, expected {magic.hex(' ')} and sizes, "
            f"an idx file of unsigned bytes in {dimensions} dimension(s)"
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) != start + math.prod(shape) or 0 in shape:
        raise ValueError(f"{path}: got {len(content)} bytes, expected {start} + {math.prod(shape)} for shape {shape}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)


def _labelled_images(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path = _find(directory, f"{part}-images-idx3-ubyte")
    labels_path = _find(directory, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels: expected as many of both"
        )
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_path}: got label {labels.max()}, expected labels in [0, {CLASSES})")
    return F.avg_pool2d(images[:, None].float(), 2), labels


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{directory}: neither {name} nor {name}.gz is there. Fashion-MNIST comes with the Debian package "
        f"dataset-fashion-mnist, in {FASHION_MNIST_DIR}; --data-dir names another directory of its idx files."
    )


def _normalised(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Dataset:
    mean, deviation = train_x.float().mean(), train_x.float().std()
    return Dataset((train_x.float() - mean) / deviation, train_y, (test_x.float() - mean) / deviation, test_y)
