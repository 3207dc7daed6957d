"""The labelled images of the experiments.

Fashion-MNIST and the digits as in the demo; `fashion-pairs`, a task of 100 classes made of Fashion-MNIST; and CIFAR-100
from its official files or from folders of images. The suffix ":validation" of a name keeps part of the training set to
choose settings by; ":10000" before it trains on so many images of the rest.
"""

import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import folders

DATASETS = ("digits", "fashion-mnist", "fashion-pairs", "cifar-100")
VALIDATION = ":validation"
CIFAR_CLASSES, CIFAR_SIDE = 100, 32
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

    def to(self, device: str) -> "Images":
        """The same on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return dataclasses.replace(self, **tensors)


def load(name: str, directory: Path | None = None, cache_dir: Path | None = None) -> Images:
    """The data set of that name.

    Args:
        name: of `DATASETS`; behind it ":N" for N training images, then `VALIDATION`, or neither.
        directory: of the files of Fashion-MNIST or CIFAR-100; None for where Debian's package puts Fashion-MNIST.
        cache_dir: where the cache of folders of images is; None for `directory`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed.
    """
    base, _, count = name.removesuffix(VALIDATION).partition(":")
    if base not in DATASETS or not re.fullmatch(r"[1-9]\d*" if ":" in name.removesuffix(VALIDATION) else "", count):
        raise ValueError(
            f"name: got {name!r}, expected one of {', '.join(DATASETS)}, behind it :N for N images to train on, "
            f"and {VALIDATION}"
        )
    if base == "cifar-100":
        images = cifar_100(directory, cache_dir)
    elif base == "digits":
        images = Images(*data.digits(), data.CLASSES)
    else:
        fashion = data.fashion_mnist(directory or data.FASHION_MNIST_DIR)
        images = Images(*fashion, data.CLASSES) if base == "fashion-mnist" else fashion_pairs(fashion)
    if name.endswith(VALIDATION):  # first, so that the same images are held out whatever N is
        images = held_out(images)
    return some(images, int(count)) if count else images


def some(images: Images, count: int) -> Images:
    """So many of the training images, always the same ones.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(images.train_x):
        raise ValueError(f"name: got {count} images to train on, expected at most {len(images.train_x)}")
    kept = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(1))[:count]
    return dataclasses.replace(images, train_x=images.train_x[kept], train_y=images.train_y[kept])


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


class _Array:
    """What a pickle says of an array: its shape, its dtype and its bytes. NumPy itself would follow their lies."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> Tensor:
        """[N, 3072], uint8.

        Raises:
            ValueError: it is another array.
        """
        _, shape, dtype, column_major, content = self.state
        if (
            not isinstance(dtype, _Dtype)
            or dtype.name not in ("u1", b"u1")
            or column_major
            or type(content) is not bytes
        ):
            raise ValueError("data: got another array, expected uint8, row by row")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and flags; of bytes there is nothing to say."""


class _Arrays(pickle.Unpickler):
    """Of a pickle the arrays, and what Python has of its own; whatever else it names is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them by protocol 2
            return lambda text, _: text.encode("latin1")
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return {"ndarray": _Array, "dtype": _Dtype}[name]
        raise ValueError(f"it names {module}.{name}, expected nothing but arrays of NumPy")


def cifar_100(directory: Path | None, cache_dir: Path | None = None) -> Images:
    """CIFAR-100 from the files `train` and `test` of its official python version, unpacked, or from folders of images.

    For training: padded by 4 and cropped to 32 at random, flipped at random, turned by up to 15 degrees.

    Args:
        directory: with the files, or with the folders train/CLASS and test/CLASS (`folders.read`).
        cache_dir: where the cache of the folders is; None for `directory`.

    Raises:
        FileNotFoundError: no directory, or a file is missing in it.
        ValueError: a file is malformed.
    """
    if directory is None:
        raise FileNotFoundError("--data-dir: got none, expected the directory of CIFAR-100 (python version), unpacked")
    if (directory / "cifar-100-python").is_dir():
        directory = directory / "cifar-100-python"
    if (directory / "train").is_dir():
        parts = folders.read(directory, CIFAR_CLASSES, CIFAR_SIDE, cache_dir)
    else:
        parts = (*_cifar_part(directory / "train"), *_cifar_part(directory / "test"))
    return Images(*parts, CIFAR_CLASSES, _prepare_cifar)


def _cifar_part(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there. Unpack cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
            "or name a directory of folders train/CLASS and test/CLASS of images"
        )
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"fine_labels"]
        pixels = pixels.pixels() if isinstance(pixels, _Array) else None
    except Exception as error:
        raise ValueError(f"{path}: not a file of CIFAR-100's python version ({error!r})") from error
    if type(labels) is not list or not labels or any(type(y) is not int or not 0 <= y < CIFAR_CLASSES for y in labels):
        raise ValueError(f"{path}: got other fine_labels, expected a list of integers in [0, {CIFAR_CLASSES})")
    if pixels is None or pixels.shape != (len(labels), 3 * CIFAR_SIDE**2):
        raise ValueError(f"{path}: got other data, expected an array [N, 3072] of uint8 and as many labels")
    return pixels.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), torch.tensor(labels)


def _prepare_cifar(x: Tensor, augment: bool) -> Tensor:
    x = x.float() / 255
    if augment:
        x = rotate(flip(crop(x, 4)), 15.0)
    mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_DEVIATION))
    return (x - mean) / deviation


def crop(x: Tensor, padding: int) -> Tensor:
    """Each image [B, channels, H, W] moved by up to `padding` pixels both ways, at random; black where it was not."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), device=x.device)
    rows, columns = (start + torch.arange(end, device=x.device) for start, end in ((top, height), (left, width)))
    return padded[
        torch.arange(batch, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].movedim(3, 1)


def flip(x: Tensor) -> Tensor:
    """Each image with its left and right exchanged, or not, at random."""
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Each image turned about its centre by up to so many degrees either way, at random; black where it was not."""
    angle = torch.deg2rad((2 * torch.rand(len(x), device=x.device) - 1) * degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # The grid is in units of half a side, so that of other than square images the axes have to be scaled.
    aspect = x.shape[2] / x.shape[3]
    turn = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
