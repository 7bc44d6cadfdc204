"""The networks that torch users compare with: torchvision's, and He et al.'s for CIFAR in torch."""

from __future__ import annotations

import re

import peers


def is_cifar(name: str) -> bool:
    """Whether a variant is one of section 4.2 of the paper, which torchvision has not."""
    return name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def classes_of(name: str) -> int:
    """Classes of the data set that a variant is for."""
    return 10 if is_cifar(name) else 1000


def label(contender: str, model: str) -> str:
    """What a contender is called: without torchvision's name where the network is not its."""
    return contender.replace("torchvision", "native torch") if is_cifar(model) else contender


def torch_model(name: str):
    """A `torch.nn.Module` with random weights: torchvision's, or `cifar_resnet`."""
    if is_cifar(name):
        return cifar_resnet(int(re.sub(r"\D", "", name)))
    return getattr(peers.import_torchvision().models, name)(weights=None)


def cifar_resnet(depth: int):
    """A ResNet of 6n+2 layers with shortcuts that have no weights (He et al. 2015, 4.2), in torch.

    Modules are named as in well-known implementations: `layer1.0.conv1`, `linear`.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels, filters, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(filters)
            self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(filters)
            self.stride, self.added = stride, filters - channels

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if self.added:
                half = self.added // 2
                x = F.pad(
                    x[:, :, :: self.stride, :: self.stride],
                    (0, 0, 0, 0, half, self.added - half),
                )
            return F.relu(y + x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            channels = 16
            for stage, filters in enumerate((16, 32, 64), 1):
                blocks = []
                for index in range((depth - 2) // 6):
                    stride = 2 if stage > 1 and index == 0 else 1
                    blocks.append(Block(channels, filters, stride))
                    channels = filters
                self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    return Network()
