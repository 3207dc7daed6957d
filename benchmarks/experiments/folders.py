"""Labelled images from folders, as torchvision's ImageFolder has them: train/CLASS/*.png and test/CLASS/*.png, or JPEG.

Classes are numbered in alphabetical order. What was read is kept in one file, until a file of the folders changes.
"""

import hashlib
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

CACHE = "images.pt"
PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")


def read(
    directory: Path, classes: int, side: int, cache_dir: Path | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 3, side, side], uint8, and labels [N], int64, of train/ and of test/, each in a fixed random order.

    Args:
        directory: with the folders.
        classes: how many there are.
        side: of the images, in pixels.
        cache_dir: where the cache is; None for `directory`.

    Raises:
        FileNotFoundError: train/ or test/ is missing.
        ValueError: a file is no such image, a folder is empty or of other classes, or the cache is malformed.
        OSError: the cache cannot be written.
    """
    files = {part: _files(directory / part, classes) for part in PARTS}
    names = [{path.parent.name for path, _ in found} for found in files.values()]
    if different := sorted(names[0] ^ names[1]):
        raise ValueError(
            f"{directory}: got class folder {different[0]!r} in {PARTS[different[0] in names[1]]} only, "
            "expected the same ones in train and test"
        )
    key, cache = _key(directory, files, side), (cache_dir or directory) / CACHE
    if cache.exists():
        try:
            kept = torch.load(cache, weights_only=True)
            if kept["key"] == key:
                return tuple(kept["tensors"])
        except Exception as error:
            raise ValueError(f"{cache}: got no cache of images ({error!r}); delete it, it is made again") from error
    tensors = [tensor for found in files.values() for tensor in _read(found, side)]
    _write(cache, {"key": key, "tensors": tensors})
    return tuple(tensors)  # type: ignore[return-value]


def _files(directory: Path, classes: int) -> list[tuple[Path, int]]:
    """The images and their labels, in order; what is hidden, as .DS_Store, does not count."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: not there, expected the folders train/CLASS and test/CLASS of images")
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) != classes:
        raise ValueError(f"{directory}: got {len(folders)} class folders, expected {classes}")
    files = []
    for label, folder in enumerate(folders):
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        if not found:
            raise ValueError(f"{folder}: got an empty folder, expected PNG or JPEG images")
        for path in found:
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                raise ValueError(f"{path}: expected nothing but PNG or JPEG images in a class folder")
        files += [(path, label) for path in found]
    return files


def _key(directory: Path, files: dict[str, list[tuple[Path, int]]], side: int) -> str:
    """Changes with any name, size or time of a file; the time of the last change of its entry cannot be set back."""
    lines = [f"1 {side}"]  # the version of what is kept
    for path, _ in (file for found in files.values() for file in found):
        stat = path.stat()
        lines.append(repr((str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _read(files: list[tuple[Path, int]], side: int) -> tuple[Tensor, Tensor]:
    # By class, the first images would be of a few classes only.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(2)).tolist()
    pixels = torch.stack([_pixels(files[index][0], side) for index in order])
    return pixels, torch.tensor([files[index][1] for index in order])


def _pixels(path: Path, side: int) -> Tensor:
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            size, mode = image.size, image.mode  # of the header: nothing has been decoded yet
            if size == (side, side) and mode in ("RGB", "L", "P"):
                image.verify()  # the checksums, after which it has to be opened again
                with Image.open(path, formats=("PNG", "JPEG")) as again:
                    content = bytearray(again.convert("RGB").tobytes())
                return torch.frombuffer(content, dtype=torch.uint8).view(side, side, 3).movedim(2, 0).contiguous()
    except Exception as error:  # Pillow's are of many types
        raise ValueError(f"{path}: got no whole image ({error}), expected PNG or JPEG") from error
    raise ValueError(f"{path}: got {size[0]} x {size[1]} pixels of mode {mode}, expected {side} x {side}, RGB, L or P")


def _write(cache: Path, content: dict[str, object]) -> None:
    whole = cache.with_suffix(f".{os.getpid()}.new")
    try:
        torch.save(content, whole)
        os.replace(whole, cache)  # so that another process never reads half of it
    except (OSError, RuntimeError) as error:
        whole.unlink(missing_ok=True)
        raise OSError(f"{cache}: the cache cannot be written ({error}); --cache-dir names another place") from error
