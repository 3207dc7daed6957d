"""The labelled images of the experiments.

Fashion-MNIST and the digits as in the demo; `fashion-pairs`, a task of 100 classes made of Fashion-MNIST; and CIFAR-100
from its official binary files. The suffix ":validation" of a name keeps part of the training set to choose settings by.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def cifar_100(directory: Path | None) -> Images:
    """CIFAR-100 from the files `train.bin` and `test.bin` of its official binary version, unpacked.

    For training: padded by 4 and cropped to 32 at random, flipped at random, turned by up to 15 degrees.

    Raises:
        FileNotFoundError: no directory, or a file is missing in it.
        ValueError: a file is malformed.
    """
    if directory is None:
        raise FileNotFoundError("--data-dir: got none, expected the directory of CIFAR-100 (binary version), unpacked")
    if (directory / "cifar-100-binary").is_dir():
        directory = directory / "cifar-100-binary"
    return Images(*_cifar_part(directory / "train.bin"), *_cifar_part(directory / "test.bin"), 100, _prepare_cifar)


def _cifar_part(path: Path) -> tuple[Tensor, Tensor]:
    """Images and fine labels: a record is a coarse and a fine label and the planes of red, green and blue."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there. Unpack cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    content = bytearray(path.read_bytes())
    if not content or len(content) % 3074:
        raise ValueError(f"{path}: got {len(content)} bytes, expected records of 3074")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, 3074)
    labels = records[:, 1].long()
    if labels.max() >= 100:
        raise ValueError(f"{path}: got label {labels.max()}, expected labels in [0, 100)")
    return records[:, 2:].reshape(-1, 3, 32, 32), labels


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
