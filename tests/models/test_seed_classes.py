"""Classes as tutorials write them in PyTorch: what they save loads here, and answers the same.

Each class below is a short writing of one that circulates, with its module names, biases, strides
and extra ReLUs; the counterpart is a row of the table.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from keras_resnet.models.zoo import create_model
from keras_resnet.system.errors import InputError
from keras_resnet.weights.load import load_torchvision
from keras_resnet.weights.mapping import to_torchvision
from keras_resnet.weights.verify import verify


class PaperAlexNet(nn.Module):
    """Five convolutions and three linear layers, each an `nn.Sequential` of its own."""

    convs = ((96, 11, 4, 2), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1))
    pool, side = (3, 2), 6

    def __init__(self, num_classes):
        super().__init__()
        fed = 3
        for i, (width, kernel, stride, padding) in enumerate(self.convs, start=1):
            layers = [nn.Conv2d(fed, width, kernel, stride, padding), nn.ReLU()]
            if i in (1, 2, 5):
                layers.append(nn.MaxPool2d(*self.pool))
            setattr(self, f"conv{i}", nn.Sequential(*layers))
            fed = width
        flat = fed * self.side**2
        self.fc1 = nn.Sequential(nn.Flatten(), nn.Linear(flat, 4096), nn.ReLU(), nn.Dropout())
        self.fc2 = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout())
        self.fc3 = nn.Sequential(nn.Linear(4096, num_classes))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class CifarAlexNet(PaperAlexNet):
    """The same for 32x32 pictures: 3x3 kernels, 2x2 pooling."""

    convs = ((64, 3, 1, 1), (256, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    pool, side = (2, 2), 4


class LongAndShortWay(nn.Module):
    """A basic block with biases, a ReLU before the addition too, and a bare 1x1 shortcut."""

    def __init__(self, fed, width, stride=1, shortcut=None):
        super().__init__()
        self.longway = nn.Sequential(
            *(nn.Conv2d(fed, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()),
        )
        self.shortway = shortcut

    def forward(self, x):
        side = x if self.shortway is None else self.shortway(x)
        return torch.relu(side + self.longway(x))


class SequentialResNet34(nn.Module):
    """A ResNet-34 for CIFAR-10, ImageNet stem; each stage's first block wrapped once more."""

    def __init__(self, num_classes, more=(2, 3, 5, 2)):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        fed = 64
        for i, (width, count) in enumerate(zip((64, 128, 256, 512), more, strict=True)):
            stride = 1 if i == 0 else 2
            shortcut = nn.Sequential(nn.Conv2d(fed, width, 1, stride))
            first = nn.Sequential(LongAndShortWay(fed, width, stride, shortcut))
            rest = [LongAndShortWay(width, width) for _ in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            fed = width
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x):
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "avg_pool"):
            x = getattr(self, name)(x)
        return self.fc(x.flatten(1))


class Basic(nn.Module):
    """torchvision's basic block, as most tutorials copy it."""

    expansion = 1

    def __init__(self, fed, width, stride=1, downsample=None, **_):
        super().__init__()
        self.conv1 = nn.Conv2d(fed, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x):
        side = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + side)


class Bottleneck(nn.Module):
    """The bottleneck with groups; where it strides and how often it rectifies are its variants."""

    expansion = 4
    stride_on, relu_before_add = "3x3", False

    def __init__(self, fed, width, stride=1, downsample=None, groups=1, width_per_group=64):
        super().__init__()
        inner = int(width * width_per_group / 64) * groups
        first, second = (stride, 1) if self.stride_on == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(fed, inner, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, second, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x):
        side = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu((self.relu(y) if self.relu_before_add else y) + side)


class TwiceRectified(Bottleneck):
    """Stride on the first 1x1, and a ReLU before the addition as well."""

    stride_on, relu_before_add = "1x1", True


class ResNet(nn.Module):
    """Stem, four stages, pooling, head, with the options of the copies that circulate."""

    def __init__(self, block, depths, num_classes, stage="layer", head=True, pool=None, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        fed = 64
        self.stages = [f"{stage}{i + 1}" for i in range(4)]
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            width, blocks = 64 * 2**i, []
            for j in range(depth):
                stride, out = 2 if i and not j else 1, width * block.expansion
                side = None
                if stride != 1 or fed != out:
                    side = nn.Sequential(
                        nn.Conv2d(fed, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                    )
                blocks.append(block(fed, width, stride, side, **options))
                fed = out
            setattr(self, name, nn.Sequential(*blocks))
        self.include_top = head
        if head:
            self.avgpool = pool or nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(fed, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1)) if self.include_top else x


def resnet34(num_classes=5, **options):
    return ResNet(Basic, (3, 4, 6, 3), num_classes, **options)


def bottlenecks(block=Bottleneck, **options):
    return ResNet(block, (3, 4, 6, 3), 5, **options)


CASES = {
    # name: (class, variant, classes, picture size)
    "alexnet paper": (lambda: PaperAlexNet(5), "alexnet_paper", 5, 224),
    "alexnet cifar": (lambda: CifarAlexNet(10), "alexnet_cifar10", 10, 32),
    "longway": (lambda: SequentialResNet34(10), "resnet34_cifar10", 10, 32),
    "copy of resnet34": (resnet34, "resnet34", 5, 64),
    "copy of resnet50": (bottlenecks, "resnet50", 5, 64),
    "copy of resnext50": (
        lambda: bottlenecks(groups=32, width_per_group=4), "resnext50_32x4d", 5, 64
    ),
    # Its AvgPool2d(7) wants 224.
    "stages": (
        lambda: bottlenecks(TwiceRectified, stage="stage", pool=nn.AvgPool2d(7)),
        "resnet50_v1_relu", 5, 224,
    ),
}  # fmt: skip
ONCE = ("alexnet paper", "stages", "copy of resnet34", "copy of resnet50", "copy of resnext50")
LONG = ("copy of resnet50",)  # the class of the copy of resnext50
PARAMS = [
    pytest.param(
        name,
        marks=[pytest.mark.once] * (name in ONCE) + [pytest.mark.long] * (name in LONG),
    )
    for name in CASES
]


def after_training(module: nn.Module) -> nn.Module:
    """Random statistics, so that nothing passes because a batch norm does nothing."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.3, 0.3)
            child.running_mean.uniform_(-0.3, 0.3)
            child.running_var.uniform_(0.5, 1.5)
    return module.eval()


def both_outputs(module, model, size, rng):
    """The two networks' outputs for the same pictures, as torch lays them out."""
    images = rng.standard_normal((1, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(images)).numpy()
    ours = model(images.transpose(0, 2, 3, 1), training=False)
    ours = keras.ops.convert_to_numpy(ours)
    return (ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours), theirs


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.slow
def test_a_saved_tutorial_class_imports_and_answers_the_same(tmp_path, rng, name):
    build, variant, num_classes, size = CASES[name]
    torch.manual_seed(0)
    module = after_training(build())
    torch.save(module.state_dict(), tmp_path / "model.pth")
    model = create_model(variant, num_classes=num_classes, input_shape=(size, size, 3))
    report = load_torchvision(model, tmp_path / "model.pth")
    assert report.ok and (variant, num_classes) in report.variants
    ours, theirs = both_outputs(module, model, size, rng)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert verify(model, tmp_path / "model.pth").passed
    exported = to_torchvision(model)
    assert list(exported) == list(module.state_dict())
    assert all(
        exported[key].tobytes() == tensor.numpy().tobytes()
        for key, tensor in module.state_dict().items()
    )


@pytest.mark.once
@pytest.mark.slow
def test_a_headless_copy_imports_into_a_headless_model(rng):
    module = after_training(resnet34(head=False))
    model = create_model("resnet34", include_top=False, input_shape=(64, 64, 3))
    assert load_torchvision(model, module.state_dict(), verify=True).verification.passed
    ours, theirs = both_outputs(module, model, 64, rng)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.once
@pytest.mark.slow
def test_five_classes_over_a_thousand_the_two_ways():
    """Load all, then swap the last layer; or delete the last layer's entries, then load."""
    state = after_training(resnet34(1000)).state_dict()
    model = create_model("resnet34", num_classes=5, input_shape=(64, 64, 3))
    with pytest.raises(InputError, match="has 1000 classes, resnet34 has 5"):
        load_torchvision(model, state)
    own = to_torchvision(model)["fc.weight"]
    skipped = load_torchvision(model, state, head="skip")
    assert np.array_equal(to_torchvision(model)["fc.weight"], own)
    replaced = load_torchvision(model, state, head="replace")
    assert not np.array_equal(to_torchvision(model)["fc.weight"], own)
    assert set(skipped.skipped) == set(replaced.skipped) == {"fc.weight", "fc.bias"}
    without_head = {k: v for k, v in state.items() if "fc" not in k}
    assert load_torchvision(model, without_head, head="skip").ok
    assert not load_torchvision(model, without_head, strict=False).ok
