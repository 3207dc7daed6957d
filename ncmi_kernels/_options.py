"""The options of the loss, checked once."""

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

ACTIVATIONS = ("nsf", "softmax")
SEPARATIONS = ("sample_to_centroid", "centroid_to_sample")
RATIOS = ("batch", "sample", "soft_margin")
REDUCTIONS = ("none", "mean", "sum")


class Features(NamedTuple):
    """How rows become probabilities, and which divergences are taken; in the order that operators take it."""

    temperature: float
    l2_normalize: bool
    softmax: bool
    centroid_to_sample: bool


class LossOptions(NamedTuple):
    """How terms become a loss; in the order that operators take it."""

    batch_ratio: bool
    reduction: int  # an index into REDUCTIONS
    eps: float
    sharpness: float  # 0 without the soft margin
    ignore_index: int


@dataclass(frozen=True)
class Options:
    """Everything about the loss that is not a tensor. :func:`ncmi_kernels.ncmi_loss` documents each."""

    temperature: float = 1.0
    l2_normalize: bool = False
    activation: str = "nsf"
    separation: str = "sample_to_centroid"
    ratio: str = "batch"
    ignore_index: int = -100
    reduction: str = "mean"
    eps: float = 1e-8
    separation_focus: float = 0.0
    sharpness: float = 4.0
    centroids_per_class: int = 1
    centroid_focus: float = 4.0

    softmax: bool = field(init=False, repr=False)
    centroid_to_sample: bool = field(init=False, repr=False)
    batch_ratio: bool = field(init=False, repr=False)
    scalar_by_sample: bool = field(init=False, repr=False)  # by sample, and one number for the batch
    every_pair: bool = field(init=False, repr=False)  # whether each sample and centroid have a weight
    features: Features = field(init=False, repr=False)
    loss: LossOptions = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("temperature", "eps", "sharpness"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        for name in ("separation_focus", "centroid_focus"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name), zero=True))
        object.__setattr__(
            self, "centroids_per_class", check_count("centroids_per_class", self.centroids_per_class, least=1)
        )
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("separation", SEPARATIONS),
            ("ratio", RATIOS),
            ("reduction", REDUCTIONS),
        ):
            check_choice(name, getattr(self, name), choices)
        if not isinstance(self.l2_normalize, bool):
            raise TypeError(f"l2_normalize: got {self.l2_normalize!r}, expected True or False")
        if not isinstance(self.ignore_index, Integral) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index: got {self.ignore_index!r}, expected an integer")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index: got {self.ignore_index!r}, expected an integer of 64 bits")
        object.__setattr__(self, "ignore_index", int(self.ignore_index))
        if self.ratio == "batch" and self.reduction != "mean":
            raise ValueError(
                f"reduction: got {self.reduction!r} with ratio='batch', which is one number for the whole batch; "
                "expected 'mean' (or ratio='sample')"
            )

        # What the operators take in place of the names; formed here once, not at every step.
        softmax = self.activation == "softmax"
        centroid_to_sample = self.separation == "centroid_to_sample"
        batch_ratio = self.ratio == "batch"
        sharpness = self.sharpness if self.ratio == "soft_margin" else 0.0
        for name, value in (
            ("softmax", softmax),
            ("centroid_to_sample", centroid_to_sample),
            ("batch_ratio", batch_ratio),
            ("scalar_by_sample", not batch_ratio and self.reduction != "none"),
            ("every_pair", self.separation_focus > 0 or self.centroids_per_class > 1),
            ("features", Features(self.temperature, self.l2_normalize, softmax, centroid_to_sample)),
            (
                "loss",
                LossOptions(batch_ratio, REDUCTIONS.index(self.reduction), self.eps, sharpness, self.ignore_index),
            ),
        ):
            object.__setattr__(self, name, value)


OPTION_NAMES = tuple(option.name for option in fields(Options) if option.init)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any, *, least: int) -> int:
    """`value` as an int; raises TypeError or ValueError unless it is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
    return int(value)


def check_positive(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` as a float; raises TypeError or ValueError unless it is a finite number above zero (or `zero`)."""
    number: Any = value
    bound = ">= 0" if zero else "> 0"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number {bound}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf and not (zero and number == 0):
        raise ValueError(f"{name}: got {value!r}, expected a finite number {bound}")
    return float(number)


def check_fraction(name: str, value: Any) -> float:
    """`value` as a float; raises TypeError or ValueError unless it is a number in [0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a number in [0, 1] or None")
    if not 0 <= (number := float(value)) <= 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in [0, 1] or None")
    return number
