"""The networks of the experiments: small convolutional ones for CPUs, a perceptron, ResNet-18 for CIFAR."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import demo
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolutional(channels: int, outputs: int, width: int = 32) -> nn.Module:
    """The demo's, with the mean over each quarter: of two images side by side, left and right must stay apart."""
    return demo.convolutional(outputs, channels, width, cells=2)


def perceptron(channels: int, outputs: int) -> nn.Module:
    """Two hidden layers of 256 on the pixels, whatever their number."""
    return nn.Sequential(
        nn.Flatten(),
        nn.LazyLinear(256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, outputs),
    )


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(channels: int, outputs: int) -> nn.Module:
    """ResNet-18 with the stem for small images: a 3 x 3 convolution without stride, and no pooling."""
    widths = (64, 64, 128, 256, 512)
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for stage, (inputs, width) in enumerate(pairwise(widths)):
        layers += [Block(inputs, width, 1 if stage == 0 else 2), Block(width, width, 1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class Residual(nn.Sequential):
    """Layers that keep the shape, and a shortcut around them."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, channels, H, W] to the same."""
        return input + super().forward(input)


def resnet9(channels: int, outputs: int, width: int = 48) -> nn.Module:
    """A residual network for CPUs: three convolutions with a halving of the side, for images of 15 pixels or more."""

    def layers(inputs: int, width: int, *pool: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        return [convolution, *pool, nn.BatchNorm2d(width), nn.ReLU()]

    def halved(inputs: int, width: int) -> list[nn.Module]:
        return layers(inputs, width, nn.MaxPool2d(2))

    wide = 4 * width
    return nn.Sequential(
        nn.Conv2d(channels, 24, 2, bias=False),  # few channels and no normalisation, where there are most pixels
        nn.ReLU(),
        *halved(24, width),
        *halved(width, wide),
        Residual(*layers(wide, wide)),
        *halved(wide, wide),
        Residual(*layers(wide, wide)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(wide, outputs),
    )


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": convolutional,
    **{f"cnn-{width}": partial(convolutional, width=width) for width in (4, 8, 16, 64)},
    "perceptron": perceptron,
    "resnet9": resnet9,
    **{f"resnet9-{width}": partial(resnet9, width=width) for width in (32, 64)},
    "resnet18": resnet18,
}


def build(name: str, example: Tensor, outputs: int) -> nn.Module:
    """The network of that name for images like `example` [1, channels, H, W]."""
    network = NETWORKS[name](example.shape[1], outputs)
    network.eval()
    with torch.no_grad():
        network(example)  # lazy layers take their sizes, before there are optimizers
    channels_last: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last
