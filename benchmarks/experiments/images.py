"""The labelled images of the experiments.

Fashion-MNIST and the digits as in the demo; `fashion-pairs`, a task of 100 classes made of Fashion-MNIST; and CIFAR-100
from its official files. The suffix ":validation" of a name keeps part of the training set to choose settings by.
"""

import codecs
import dataclasses
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

DATASETS = ("digits", "fashion-mnist", "fashion-pairs", "cifar-100")
VALIDATION = ":validation"
# CIFAR-100's own statistics, by channel, of pixels in [0, 1].
CIFAR_MEAN, CIFAR_DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class Images:
    """Images [N, channels, H, W] as they are kept, and labels [N], int64.

    `prepare` makes of a batch what a network sees; its second argument says whether to augment.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    prepare: Callable[[Tensor, bool], Tensor] = lambda x, augment: x


def load(name: str, directory: Path | None = None) -> Images:
    """The data set of that name.

    Args:
        name: of `DATASETS`, or with `VALIDATION` behind it.
        directory: of the files of Fashion-MNIST or CIFAR-100; None for where Debian's package puts Fashion-MNIST.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed.
    """
    base, _, rest = name.partition(VALIDATION)
    if base not in DATASETS or rest:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(DATASETS)}, or with {VALIDATION} behind it")
    if base == "cifar-100":
        images = cifar_100(directory)
    elif base == "digits":
        images = Images(*data.digits(), data.CLASSES)
    else:
        fashion = data.fashion_mnist(directory or data.FASHION_MNIST_DIR)
        images = Images(*fashion, data.CLASSES) if base == "fashion-mnist" else fashion_pairs(fashion)
    return held_out(images) if name.endswith(VALIDATION) else images


def held_out(images: Images) -> Images:
    """A sixth of the training images, in an order that is always the same, in the place of the test images."""
    order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
    rest, kept = order.split((len(order) - len(order) // 6, len(order) // 6))
    x, y = images.train_x, images.train_y
    return dataclasses.replace(images, train_x=x[rest], train_y=y[rest], test_x=x[kept], test_y=y[kept])


def fashion_pairs(fashion: data.Dataset) -> Images:
    """Two images of Fashion-MNIST side by side, of the classes a and b: class 10 a + b of 100.

    Each image is in one pair, and those of the test set are of the test set: 30 000 pairs and 5 000.
    """

    def pair(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        left, right = order[: 2 * (len(x) // 2)].chunk(2)
        return torch.cat([x[left], x[right]], dim=3), data.CLASSES * y[left] + y[right]

    return Images(*pair(fashion.train_x, fashion.train_y, 0), *pair(fashion.test_x, fashion.test_y, 1), 100)


class _Arrays(pickle.Unpickler):
    """Of a pickle the arrays of NumPy, and what Python has of its own; whatever else it names is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them by protocol 2
            return codecs.encode
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return numpy.ndarray.__reduce__(numpy.empty(0))[0]  # wherever this NumPy has it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(numpy, name)
        raise ValueError(f"it names {module}.{name}, expected nothing but arrays of NumPy")


def cifar_100(directory: Path | None) -> Images:
    """CIFAR-100 from the files `train` and `test` of its official python version, unpacked.

    For training: padded by 4 and cropped to 32 at random, flipped at random, turned by up to 15 degrees.

    Raises:
        FileNotFoundError: no directory, or a file is missing in it.
        ValueError: a file is malformed.
    """
    if directory is None:
        raise FileNotFoundError("--data-dir: got none, expected the directory of CIFAR-100 (python version), unpacked")
    if (directory / "cifar-100-python").is_dir():
        directory = directory / "cifar-100-python"
    return Images(*_cifar_part(directory / "train"), *_cifar_part(directory / "test"), 100, _prepare_cifar)


def _cifar_part(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there. Unpack cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        pixels, labels = content[b"data"], torch.tensor(content[b"fine_labels"])
    except Exception as error:
        raise ValueError(f"{path}: not a file of CIFAR-100's python version ({error!r})") from error
    if not isinstance(pixels, numpy.ndarray) or pixels.dtype != numpy.uint8 or pixels.shape != (len(labels), 3072):
        raise ValueError(f"{path}: got other data, expected an array [N, 3072] of uint8 and as many labels")
    if labels.dtype != torch.int64 or not len(labels) or labels.min() < 0 or labels.max() >= 100:
        raise ValueError(f"{path}: got other fine_labels, expected integers in [0, 100)")
    return torch.from_numpy(numpy.ascontiguousarray(pixels)).reshape(-1, 3, 32, 32), labels


def _prepare_cifar(x: Tensor, augment: bool) -> Tensor:
    x = x.float() / 255
    if augment:
        x = rotate(flip(crop(x, 4)), 15.0)
    return (x - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_DEVIATION).view(3, 1, 1)


def crop(x: Tensor, padding: int) -> Tensor:
    """Each image [B, channels, H, W] moved by up to `padding` pixels both ways, at random; black where it was not."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def flip(x: Tensor) -> Tensor:
    """Each image with its left and right exchanged, or not, at random."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Each image turned about its centre by up to so many degrees either way, at random; black where it was not."""
    angle = torch.deg2rad((2 * torch.rand(len(x)) - 1) * degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid is in units of half a side, so that of other than square images the axes have to be scaled.
    aspect = x.shape[2] / x.shape[3]
    turn = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
